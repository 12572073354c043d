//! Executes the requests of one queue and writes their responses.

use std::{mem::size_of, ops::Deref, sync::Arc};

use tracing::debug;
use virtio_queue::DescriptorChain;
use vm_memory::{
    Address, ByteValued, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, Permissions,
};

use crate::{
    ErrorChain,
    abi::{
        VIRTIO_HMM_FRAME_FAULT, VIRTIO_HMM_FRAME_OK, VIRTIO_HMM_MAX_FRAMES, VIRTIO_HMM_S_OK,
        VIRTIO_HMM_S_PARTIAL, virtio_hmm_resp,
    },
    chain::{self, Buffers, Cursor, Segment},
    counters::Counters,
    engine::Engine,
    memory,
    request::{Extent, FRAME_SIZE, Operation, QueueKind, Rejection, Request},
};

const HEAD: usize = size_of::<virtio_hmm_resp>();

/// Why a queue cannot go on: there is no place for a response, or the device
/// itself failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The descriptor chain is malformed.
    #[error(transparent)]
    Chain(#[from] chain::Error),
    /// The writable part of the chain is shorter than a response, or lies
    /// outside guest memory.
    #[error("descriptor chain has no place for a response")]
    NoResponse,
    /// Guest memory that could be accessed when it was checked no longer can.
    #[error("cannot access guest memory")]
    Guest(#[from] GuestMemoryError),
    /// Device memory failed.
    #[error("cannot access device memory")]
    Device(#[from] memory::Error),
}

/// What a response says.
struct Outcome {
    status: u32,
    frames_done: u32,
    /// Bytes written after the head, up to the first gap.
    body: usize,
}

/// Executes the requests of one queue.
#[derive(Debug)]
pub struct Processor {
    kind: QueueKind,
    executor: Executor,
    // Kept from request to request only for their allocations.
    buffers: Buffers,
    request: Request,
}

impl Processor {
    /// A processor for a queue of this kind.
    pub fn new(kind: QueueKind, engine: Engine, counters: Arc<Counters>) -> Self {
        Self {
            kind,
            executor: Executor {
                engine,
                counters,
                statuses: Vec::new(),
            },
            buffers: Buffers::default(),
            request: Request::default(),
        }
    }

    /// Executes the request in `chain`, whose buffers are in `mem`, and writes
    /// the response. Returns how many bytes were written, from the start of the
    /// writable part on.
    ///
    /// # Errors
    /// If the chain has no place for a response, or the device failed.
    pub fn process<M>(
        &mut self,
        mem: &GuestMemoryMmap,
        chain: DescriptorChain<M>,
    ) -> Result<u32, Error>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        self.buffers.collect(chain)?;
        let mut head = self.buffers.writable();
        let mut body = head;
        if head.remaining() < HEAD || !body.skip(HEAD, mem, Permissions::Write) {
            return Err(Error::NoResponse);
        }
        let outcome = match self.request.read_head(mem, self.kind, &self.buffers) {
            Ok((operation, mut data)) => {
                let frames = self.executor.engine.memory().frames();
                let outcome = match self
                    .request
                    .read_extents(mem, operation, &mut data, body, frames)
                {
                    Ok(()) => self
                        .executor
                        .execute(mem, operation, &self.request, data, body)?,
                    Err(rejection) => self.reject(&rejection),
                };
                self.executor.record(operation, &outcome);
                outcome
            }
            Err(rejection) => {
                if matches!(rejection, Rejection::Operation(_)) {
                    self.executor.counters.record_unsupported();
                }
                self.reject(&rejection)
            }
        };
        let response = virtio_hmm_resp {
            status: outcome.status.into(),
            frames_done: outcome.frames_done.into(),
        };
        head.write(mem, response.as_slice())?;
        // Chains longer than a u32 can tell are malformed.
        Ok(u32::try_from(HEAD + outcome.body).unwrap_or(u32::MAX))
    }

    fn reject(&self, rejection: &Rejection) -> Outcome {
        debug!(
            cookie = self.request.cookie(),
            "request rejected: {}",
            ErrorChain(rejection)
        );
        Outcome {
            status: rejection.status(),
            frames_done: 0,
            body: 0,
        }
    }
}

/// Executes valid requests.
#[derive(Debug)]
struct Executor {
    engine: Engine,
    counters: Arc<Counters>,
    statuses: Vec<u8>,
}

impl Executor {
    /// Executes `request`, whose readable data starts at `data`, and writes the
    /// body of its response.
    fn execute(
        &mut self,
        mem: &GuestMemoryMmap,
        operation: Operation,
        request: &Request,
        data: Cursor<'_>,
        mut body: Cursor<'_>,
    ) -> Result<Outcome, Error> {
        let frames = request.frames();
        let done = Outcome {
            status: VIRTIO_HMM_S_OK,
            frames_done: frames,
            body: 0,
        };
        self.statuses.clear();
        self.statuses.resize(
            frames.min(VIRTIO_HMM_MAX_FRAMES) as usize,
            VIRTIO_HMM_FRAME_OK,
        );
        let mut data_written = 0;
        match operation {
            Operation::Counters => {
                let counters = self.counters.to_wire();
                body.write(mem, counters.as_slice())?;
                return Ok(Outcome {
                    body: counters.as_slice().len(),
                    ..done
                });
            }
            Operation::Discard => {
                for extent in &request.extents {
                    self.engine
                        .memory()
                        .clear(extent.offset(), extent.bytes() as u64)?;
                }
                return Ok(done);
            }
            Operation::Fill => {
                for extent in &request.extents {
                    self.engine.fill(extent.offset(), extent.bytes())?;
                }
            }
            Operation::DeviceToDevice => self.move_frames(&request.extents, &request.sources)?,
            Operation::ToDevice => {
                self.transfer(mem, Permissions::Read, &request.extents, data)?;
            }
            Operation::FromDevice => {
                let mut data = body;
                data.take(self.statuses.len()).for_each(drop);
                data_written = data.remaining();
                self.transfer(mem, Permissions::Write, &request.extents, data)?;
            }
        }
        body.write(mem, &self.statuses)?;
        let faults = self
            .statuses
            .iter()
            .filter(|status| **status != VIRTIO_HMM_FRAME_OK)
            .count();
        if faults == 0 {
            return Ok(Outcome {
                body: self.statuses.len() + data_written,
                ..done
            });
        }
        Ok(Outcome {
            status: VIRTIO_HMM_S_PARTIAL,
            frames_done: u32::try_from(self.statuses.len() - faults).unwrap_or(frames),
            body: self.statuses.len(),
        })
    }

    fn record(&self, operation: Operation, outcome: &Outcome) {
        let counters = match operation {
            Operation::ToDevice => &self.counters.to_device,
            Operation::FromDevice => &self.counters.from_device,
            Operation::Fill => &self.counters.fill,
            Operation::DeviceToDevice => &self.counters.device_to_device,
            Operation::Discard => &self.counters.discard,
            Operation::Counters => return,
        };
        counters.record(
            outcome.frames_done.into(),
            outcome.status == VIRTIO_HMM_S_OK,
        );
    }

    /// Copies between the frames of `extents` and guest `data`, which it reads
    /// or writes according to `access`. Sets the status of frames whose data
    /// cannot be accessed; nothing of such a frame is copied.
    fn transfer(
        &mut self,
        mem: &GuestMemoryMmap,
        access: Permissions,
        extents: &[Extent],
        mut data: Cursor<'_>,
    ) -> Result<(), Error> {
        let mut statuses = self.statuses.iter_mut();
        // Pieces that follow one another on both sides are copied as one.
        let mut pending = Transfer {
            guest: Segment {
                addr: GuestAddress(0),
                len: 0,
            },
            offset: 0,
        };
        for extent in extents {
            for (offset, status) in (extent.offset()..)
                .step_by(FRAME_SIZE)
                .zip(&mut statuses)
                .take(extent.count as usize)
            {
                let mut pieces = data;
                if !data.skip(FRAME_SIZE, mem, access) {
                    *status = VIRTIO_HMM_FRAME_FAULT;
                    continue;
                }
                let mut offset = offset;
                for guest in pieces.take(FRAME_SIZE) {
                    let copy = Transfer { guest, offset };
                    offset += guest.len as u64;
                    if !pending.extend(copy) {
                        pending.run(mem, access, &self.engine)?;
                        pending = copy;
                    }
                }
            }
        }
        pending.run(mem, access, &self.engine)
    }

    /// Copies the frames of `from` to those of `to`, which are as many.
    fn move_frames(&self, to: &[Extent], from: &[Extent]) -> Result<(), Error> {
        let mut sources = from.iter().copied();
        let mut source = Extent::default();
        for destination in to {
            let mut destination = *destination;
            while destination.count > 0 {
                if source.count == 0 {
                    let Some(next) = sources.next() else {
                        return Ok(());
                    };
                    source = next;
                }
                let count = source.count.min(destination.count);
                let (from, to) = (source.split_front(count), destination.split_front(count));
                self.engine
                    .device_to_device(to.offset(), from.offset(), to.bytes())?;
            }
        }
        Ok(())
    }
}

/// A copy between guest memory and device memory at byte `offset`.
#[derive(Clone, Copy, Debug)]
struct Transfer {
    guest: Segment,
    offset: u64,
}

impl Transfer {
    /// Adds `next` if it follows at once on both sides.
    fn extend(&mut self, next: Self) -> bool {
        let len = self.guest.len as u64;
        let follows = self.guest.addr.checked_add(len) == Some(next.guest.addr)
            && self.offset + len == next.offset;
        if follows {
            self.guest.len += next.guest.len;
        }
        follows
    }

    /// Copies to the device what is to be read from the guest, and from the
    /// device what is to be written there.
    fn run(
        &self,
        mem: &GuestMemoryMmap,
        access: Permissions,
        engine: &Engine,
    ) -> Result<(), Error> {
        let mut offset = self.offset;
        for slice in mem.get_slices(self.guest.addr, self.guest.len, access)? {
            let slice = slice?;
            let len = slice.len() as u64;
            match access {
                Permissions::Read => engine.to_device(offset, &slice)?,
                _ => engine.from_device(offset, slice)?,
            }
            offset += len;
        }
        Ok(())
    }
}
