//! Executes the requests of one queue and writes their responses.

use std::{mem::size_of, ops::Deref, slice, sync::Arc, time::Instant};

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
    counters::{Completed, Counters, QueueCounters, Timed},
    engine::Engine,
    inject::{Injector, Strike},
    memory,
    request::{Extent, FRAME_SIZE, Operation, QueueKind, Rejection, Request},
    rule::Fault,
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

/// What is wrong on purpose with the device, and with one request.
#[derive(Clone, Copy, Debug)]
pub struct Flaws<'a> {
    /// Knows the state of the device.
    pub injector: &'a Injector,
    /// What strikes the request.
    pub strike: Option<Strike>,
}

/// Frames from which on each request is timed: to look at the clock is nothing
/// then.
const TIMED: u32 = 32;

/// What is known of the time of a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timing {
    /// When it was available in the ring; when it was begun, if not said.
    pub arrived: Option<Instant>,
    /// When it was begun, if it is to be timed however small it is.
    pub begun: Option<Instant>,
    /// For how many small requests it stands then.
    pub weight: u64,
}

impl Timing {
    /// Looks at the clock if a request of `frames` frames is large.
    fn begin(&mut self, frames: u32) {
        if frames >= TIMED {
            self.begun.get_or_insert_with(Instant::now);
            // Each of them is timed, and stands for itself.
            self.weight = 1;
        }
    }

    /// Looks at the clock if the request is timed.
    fn end(&self) -> Option<(Instant, Timed)> {
        let begun = self.begun?;
        let now = Instant::now();
        let arrived = self.arrived.unwrap_or(begun);
        let timed = Timed {
            wait: begun.saturating_duration_since(arrived),
            copy: now.saturating_duration_since(begun),
            weight: self.weight,
        };
        Some((now, timed))
    }
}

/// A request that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Bytes written, from the start of the writable part on.
    pub written: u32,
    /// The operation, unless it could not be read or is not known.
    pub operation: Option<Operation>,
    /// Frames that were done.
    pub frames: u32,
    /// When it was done, if it was timed.
    pub done: Option<Instant>,
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
    /// `index` is its number.
    pub fn new(kind: QueueKind, index: usize, engine: Engine, counters: Arc<Counters>) -> Self {
        Self {
            kind,
            executor: Executor {
                engine,
                counters,
                index,
                statuses: Vec::new(),
            },
            buffers: Buffers::default(),
            request: Request::default(),
        }
    }

    /// The operation that `chain` asks for, if its request is valid. Nothing is
    /// done.
    pub fn look<M>(&mut self, mem: &GuestMemoryMmap, chain: DescriptorChain<M>) -> Option<Operation>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        self.buffers.collect(chain).ok()?;
        let mut body = self.buffers.writable();
        body.skip(HEAD, mem, Permissions::Write);
        let head = self.request.read_head(mem, self.kind, &self.buffers);
        let (operation, mut data) = head.ok()?;
        let frames = self.executor.engine.memory().frames();
        self.request
            .read_extents(mem, operation, &mut data, body, frames)
            .ok()?;
        Some(operation)
    }

    /// Executes the request in `chain`, whose buffers are in `mem`, and writes
    /// the response. None if it is not to be answered, which only flaws do.
    ///
    /// # Errors
    /// If the chain has no place for a response, or the device failed.
    pub fn process<M>(
        &mut self,
        mem: &GuestMemoryMmap,
        chain: DescriptorChain<M>,
        mut timing: Timing,
        flaws: Option<Flaws<'_>>,
    ) -> Result<Option<Answer>, Error>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        self.buffers.collect(chain)?;
        let mut head = self.buffers.writable();
        let mut body = head;
        if head.remaining() < HEAD || !body.skip(HEAD, mem, Permissions::Write) {
            return Err(Error::NoResponse);
        }
        let mut done = None;
        let (operation, outcome) = match self.request.read_head(mem, self.kind, &self.buffers) {
            Ok((operation, mut data)) => {
                let frames = self.executor.engine.memory().frames();
                let outcome = match self
                    .request
                    .read_extents(mem, operation, &mut data, body, frames)
                {
                    Ok(()) => {
                        let request = &self.request;
                        timing.begin(request.frames());
                        match flaws {
                            None => self.executor.execute(mem, operation, request, data, body)?,
                            Some(flaws) => {
                                let done = self
                                    .executor
                                    .execute_flawed(mem, operation, request, data, body, flaws)?;
                                let Some(outcome) = done else {
                                    return Ok(None);
                                };
                                outcome
                            }
                        }
                    }
                    Err(rejection) => self.reject(&rejection),
                };
                let timed = timing.end();
                done = timed.map(|(now, _)| now);
                let frames = self.request.frames();
                let timed = timed.map(|(_, timed)| timed);
                let strike = flaws.and_then(|flaws| flaws.strike);
                for _ in 0..strike.map_or(1, |strike| strike.fault.executions()) {
                    self.executor.record(operation, frames, &outcome, timed);
                }
                (Some(operation), outcome)
            }
            Err(rejection) => {
                if let Some(counters) = self.executor.queue() {
                    counters.record_status(rejection.status());
                }
                (None, self.reject(&rejection))
            }
        };
        let response = virtio_hmm_resp {
            status: outcome.status.into(),
            frames_done: outcome.frames_done.into(),
        };
        head.write(mem, response.as_slice())?;
        Ok(Some(Answer {
            // Chains longer than a u32 can tell are malformed.
            written: u32::try_from(HEAD + outcome.body).unwrap_or(u32::MAX),
            operation,
            frames: outcome.frames_done,
            done,
        }))
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
    index: usize,
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
        let done = Outcome {
            status: VIRTIO_HMM_S_OK,
            frames_done: request.frames(),
            body: 0,
        };
        match operation {
            Operation::Counters => {
                let counters = self.counters.to_wire();
                body.write(mem, counters.as_slice())?;
                Ok(Outcome {
                    body: counters.as_slice().len(),
                    ..done
                })
            }
            Operation::Discard => {
                for extent in &request.extents {
                    self.engine
                        .memory()
                        .clear(extent.offset(), extent.bytes() as u64)?;
                }
                Ok(done)
            }
            _ => {
                self.reset_statuses(request);
                let data = guest_data(operation, data, body, self.statuses.len());
                let (to, from) = (&request.extents, &request.sources);
                copy(
                    &self.engine,
                    mem,
                    operation,
                    to,
                    from,
                    data,
                    &mut self.statuses,
                )?;
                self.finish(mem, operation, data, body)
            }
        }
    }

    /// Like [`Self::execute`], with flaws. None if there is to be no answer.
    fn execute_flawed(
        &mut self,
        mem: &GuestMemoryMmap,
        operation: Operation,
        request: &Request,
        data: Cursor<'_>,
        body: Cursor<'_>,
        Flaws { injector, strike }: Flaws<'_>,
    ) -> Result<Option<Outcome>, Error> {
        let fault = strike.map(|strike| strike.fault);
        if let Some(Fault::Status(status)) = fault {
            return Ok(Some(Outcome {
                status,
                frames_done: 0,
                body: 0,
            }));
        }
        let answered = !matches!(fault, Some(Fault::Drop(_)));
        if !operation.is_copy() {
            let outcome = self.execute(mem, operation, request, data, body)?;
            injector.settle(strike, operation, request, &[]);
            return Ok(answered.then_some(outcome));
        }
        self.reset_statuses(request);
        injector.spoil(strike, operation, request, &mut self.statuses);
        let data = guest_data(operation, data, body, self.statuses.len());
        let executions = fault.map_or(1, Fault::executions);
        for _ in 0..executions {
            self.copy_frames(mem, operation, request, data)?;
        }
        if executions > 0 {
            injector.settle(strike, operation, request, &self.statuses);
        }
        if !answered {
            return Ok(None);
        }
        self.finish(mem, operation, data, body).map(Some)
    }

    /// Copies frame by frame, since some may be left out: those that have a
    /// status other than OK.
    fn copy_frames(
        &mut self,
        mem: &GuestMemoryMmap,
        operation: Operation,
        request: &Request,
        data: Cursor<'_>,
    ) -> Result<(), Error> {
        let mut pages = data;
        let mut sources = frames(&request.sources);
        for (to, status) in frames(&request.extents).zip(&mut self.statuses) {
            let page = pages;
            pages.take(FRAME_SIZE).for_each(drop);
            let from = sources.next();
            if *status == VIRTIO_HMM_FRAME_OK {
                let status = slice::from_mut(status);
                copy(
                    &self.engine,
                    mem,
                    operation,
                    &[to],
                    from.as_slice(),
                    page,
                    status,
                )?;
            }
        }
        Ok(())
    }

    fn reset_statuses(&mut self, request: &Request) {
        self.statuses.clear();
        self.statuses.resize(
            request.frames().min(VIRTIO_HMM_MAX_FRAMES) as usize,
            VIRTIO_HMM_FRAME_OK,
        );
    }

    /// Writes the statuses of the frames, and says what came of the request,
    /// whose pages are at `data`.
    fn finish(
        &self,
        mem: &GuestMemoryMmap,
        operation: Operation,
        data: Cursor<'_>,
        mut body: Cursor<'_>,
    ) -> Result<Outcome, Error> {
        body.write(mem, &self.statuses)?;
        let ok = |status: &&u8| **status == VIRTIO_HMM_FRAME_OK;
        let done = self.statuses.iter().filter(ok).count();
        let all = done == self.statuses.len();
        let data_written = match operation {
            Operation::FromDevice if all => data.remaining(),
            _ => 0,
        };
        Ok(Outcome {
            status: if all {
                VIRTIO_HMM_S_OK
            } else {
                VIRTIO_HMM_S_PARTIAL
            },
            frames_done: u32::try_from(done).unwrap_or(u32::MAX),
            body: self.statuses.len() + data_written,
        })
    }

    fn queue(&self) -> Option<&QueueCounters> {
        self.counters.queues().get(self.index)
    }

    fn record(&self, operation: Operation, frames: u32, outcome: &Outcome, timed: Option<Timed>) {
        let Some(counters) = self.queue() else {
            return;
        };
        counters.record(&Completed {
            operation,
            frames,
            done: outcome.frames_done,
            status: outcome.status,
            timed,
        });
        if outcome.status == VIRTIO_HMM_S_PARTIAL {
            counters.record_frames(&self.statuses);
        }
    }
}

/// Where the guest pages of a request are: `data` that is to be read, or in the
/// `body` of the response, behind `statuses`.
fn guest_data<'a>(
    operation: Operation,
    data: Cursor<'a>,
    body: Cursor<'a>,
    statuses: usize,
) -> Cursor<'a> {
    if operation != Operation::FromDevice {
        return data;
    }
    let mut data = body;
    data.take(statuses).for_each(drop);
    data
}

/// The frames of `extents`, one by one.
fn frames(extents: &[Extent]) -> impl Iterator<Item = Extent> {
    extents.iter().flat_map(|extent| {
        let frames = extent.frame..extent.frame + u64::from(extent.count);
        frames.map(|frame| Extent { frame, count: 1 })
    })
}

/// Does a copy operation with the frames of `extents`, those of `sources`, and
/// guest `data`. Sets the status of frames that fail.
fn copy(
    engine: &Engine,
    mem: &GuestMemoryMmap,
    operation: Operation,
    extents: &[Extent],
    sources: &[Extent],
    data: Cursor<'_>,
    statuses: &mut [u8],
) -> Result<(), Error> {
    match operation {
        Operation::Fill => {
            for extent in extents {
                engine.fill(extent.offset(), extent.bytes())?;
            }
            Ok(())
        }
        Operation::DeviceToDevice => move_frames(engine, extents, sources),
        Operation::ToDevice => transfer(engine, mem, Permissions::Read, extents, data, statuses),
        Operation::FromDevice => transfer(engine, mem, Permissions::Write, extents, data, statuses),
        Operation::Counters | Operation::Discard => Ok(()),
    }
}

/// Copies between the frames of `extents` and guest `data`, which it reads or
/// writes according to `access`. Sets the status of frames whose data cannot be
/// accessed; nothing of such a frame is copied.
fn transfer(
    engine: &Engine,
    mem: &GuestMemoryMmap,
    access: Permissions,
    extents: &[Extent],
    mut data: Cursor<'_>,
    statuses: &mut [u8],
) -> Result<(), Error> {
    let mut statuses = statuses.iter_mut();
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
                    pending.run(mem, access, engine)?;
                    pending = copy;
                }
            }
        }
    }
    pending.run(mem, access, engine)
}

/// Copies the frames of `from` to those of `to`, which are as many.
fn move_frames(engine: &Engine, to: &[Extent], from: &[Extent]) -> Result<(), Error> {
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
            engine.device_to_device(to.offset(), from.offset(), to.bytes())?;
        }
    }
    Ok(())
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
