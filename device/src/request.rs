//! Requests: what the readable part of a chain asks for, validated.
//!
//! Everything that the driver says is copied out of guest memory once, and
//! checked before the first byte is moved.

use std::mem::size_of;

use vm_memory::{ByteValued, GuestMemoryError, GuestMemoryMmap, Permissions};

use crate::{
    abi::{
        VIRTIO_HMM_FRAME_SIZE, VIRTIO_HMM_MAX_FRAMES, VIRTIO_HMM_OP_COUNTERS,
        VIRTIO_HMM_OP_DEVICE_TO_DEVICE, VIRTIO_HMM_OP_DISCARD, VIRTIO_HMM_OP_FILL,
        VIRTIO_HMM_OP_FROM_DEVICE, VIRTIO_HMM_OP_TO_DEVICE, VIRTIO_HMM_S_INVALID,
        VIRTIO_HMM_S_RANGE, VIRTIO_HMM_S_UNSUPPORTED, virtio_hmm_counters, virtio_hmm_extent,
        virtio_hmm_req,
    },
    chain::{Buffers, Cursor},
};

/// Bytes in a frame.
pub const FRAME_SIZE: usize = VIRTIO_HMM_FRAME_SIZE as usize;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueKind {
    /// Counters and discards.
    Control,
    /// Copies.
    Copy,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Copy guest pages into device frames.
    ToDevice,
    /// Copy device frames into guest pages.
    FromDevice,
    /// Set device frames to zero.
    Fill,
    /// Copy device frames to other device frames.
    DeviceToDevice,
    /// Report the counters.
    Counters,
    /// Give device frames back to the host.
    Discard,
}

impl Operation {
    /// All operations, in the order of their declaration.
    pub const ALL: [Self; 6] = [
        Self::ToDevice,
        Self::FromDevice,
        Self::Fill,
        Self::DeviceToDevice,
        Self::Counters,
        Self::Discard,
    ];

    /// Its name on the control socket and in rules.
    pub fn name(self) -> &'static str {
        match self {
            Self::ToDevice => "to_device",
            Self::FromDevice => "from_device",
            Self::Fill => "fill",
            Self::DeviceToDevice => "device_to_device",
            Self::Counters => "counters",
            Self::Discard => "discard",
        }
    }

    /// The operation of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|operation| operation.name() == name)
    }

    fn from_wire(kind: QueueKind, op: u32) -> Option<Self> {
        match (kind, op) {
            (QueueKind::Copy, VIRTIO_HMM_OP_TO_DEVICE) => Some(Self::ToDevice),
            (QueueKind::Copy, VIRTIO_HMM_OP_FROM_DEVICE) => Some(Self::FromDevice),
            (QueueKind::Copy, VIRTIO_HMM_OP_FILL) => Some(Self::Fill),
            (QueueKind::Copy, VIRTIO_HMM_OP_DEVICE_TO_DEVICE) => Some(Self::DeviceToDevice),
            (QueueKind::Control, VIRTIO_HMM_OP_COUNTERS) => Some(Self::Counters),
            (QueueKind::Control, VIRTIO_HMM_OP_DISCARD) => Some(Self::Discard),
            _ => None,
        }
    }

    /// Whether it is one of copy queues. Each frame has a status of its own then.
    pub fn is_copy(self) -> bool {
        !matches!(self, Self::Counters | Self::Discard)
    }
}

/// Why a request is answered with an error, nothing having been done.
#[derive(Debug, thiserror::Error)]
pub enum Rejection {
    /// Readable buffers follow writable ones.
    #[error("readable buffers follow writable ones")]
    Order,
    /// The request is too short or lies outside guest memory.
    #[error("cannot read the request")]
    Unreadable(#[source] GuestMemoryError),
    /// The operation is unknown to this queue.
    #[error("operation {0:#x} is unknown to this queue")]
    Operation(u32),
    /// Flags or reserved fields are not zero.
    #[error("flags or reserved fields are not zero")]
    Reserved,
    /// The number of frames or of extents is out of range.
    #[error("{extents} extents and {sources} source extents of {frames} frames")]
    Count {
        /// Number of frames.
        frames: u32,
        /// Number of (destination) extents.
        extents: u32,
        /// Number of source extents.
        sources: u32,
    },
    /// An extent is empty, or the counts do not add up to the number of frames.
    #[error("the counts of the extents do not add up to the number of frames")]
    Sum,
    /// The readable or the writable part does not fit the request.
    #[error("the length of the buffers does not fit the request")]
    Length,
    /// The body of the response cannot be written.
    #[error("the response lies outside guest memory")]
    Unwritable,
    /// A frame does not exist.
    #[error("{0:?} lies outside device memory")]
    Range(Extent),
}

impl Rejection {
    /// The status that reports it, one of `VIRTIO_HMM_S_*`.
    pub fn status(&self) -> u32 {
        match self {
            Self::Operation(_) => VIRTIO_HMM_S_UNSUPPORTED,
            Self::Range(_) => VIRTIO_HMM_S_RANGE,
            _ => VIRTIO_HMM_S_INVALID,
        }
    }
}

/// A run of device frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// First frame.
    pub frame: u64,
    /// Number of frames.
    pub count: u32,
}

impl Extent {
    /// Byte offset of the first frame, if it lies in device memory.
    pub fn offset(self) -> u64 {
        self.frame * FRAME_SIZE as u64
    }

    /// Number of bytes.
    pub fn bytes(self) -> usize {
        self.count as usize * FRAME_SIZE
    }

    /// Removes the first `count` frames, at most all, and returns them.
    pub fn split_front(&mut self, count: u32) -> Self {
        let front = Self {
            frame: self.frame,
            count,
        };
        self.frame += u64::from(count);
        self.count -= count;
        front
    }

    fn lies_in(self, frames: u64) -> bool {
        self.frame
            .checked_add(self.count.into())
            .is_some_and(|end| end <= frames)
    }
}

/// A request. Kept from one to the next for its allocations.
#[derive(Debug, Default)]
pub struct Request {
    /// Frames of the request, the destination for device to device.
    pub extents: Vec<Extent>,
    /// Frames of the source, for device to device.
    pub sources: Vec<Extent>,
    head: virtio_hmm_req,
    bytes: Vec<u8>,
}

impl Request {
    /// Number of frames of the request.
    pub fn frames(&self) -> u32 {
        self.head.nr_frames.into()
    }

    /// The driver's name for the request.
    pub fn cookie(&self) -> u64 {
        self.head.cookie.into()
    }

    /// Reads the head of the request in `buffers` and finds its operation.
    /// Returns it and the position of what follows the head.
    ///
    /// # Errors
    /// If there is no head, or `kind` of queue does not know the operation.
    pub fn read_head<'a>(
        &mut self,
        mem: &GuestMemoryMmap,
        kind: QueueKind,
        buffers: &'a Buffers,
    ) -> Result<(Operation, Cursor<'a>), Rejection> {
        self.head = virtio_hmm_req::default();
        if !buffers.ordered() {
            return Err(Rejection::Order);
        }
        let mut readable = buffers.readable();
        readable
            .read(mem, self.head.as_mut_slice())
            .map_err(Rejection::Unreadable)?;
        let op = self.head.op.into();
        let operation = Operation::from_wire(kind, op).ok_or(Rejection::Operation(op))?;
        Ok((operation, readable))
    }

    /// Reads the extents, which leaves `readable` at the data, and checks all
    /// of the request but whether its guest pages can be accessed. `body` is
    /// the response without its head, `device_frames` the size of device memory.
    ///
    /// # Errors
    /// If the request is malformed, or names frames that do not exist.
    pub fn read_extents(
        &mut self,
        mem: &GuestMemoryMmap,
        operation: Operation,
        readable: &mut Cursor<'_>,
        mut body: Cursor<'_>,
        device_frames: u64,
    ) -> Result<(), Rejection> {
        let head = self.head;
        if head.flags != 0 || head.reserved != 0 {
            return Err(Rejection::Reserved);
        }
        let frames = u32::from(head.nr_frames);
        let (extents, sources) = (u32::from(head.nr_extents), u32::from(head.nr_src_extents));
        let some = 1..=frames.min(VIRTIO_HMM_MAX_FRAMES);
        let fits = match operation {
            Operation::Counters => frames == 0 && extents == 0 && sources == 0,
            // To discard many frames at once is as little work as to discard one.
            Operation::Discard => some.contains(&extents) && sources == 0,
            _ if frames > VIRTIO_HMM_MAX_FRAMES => false,
            Operation::DeviceToDevice => some.contains(&extents) && some.contains(&sources),
            _ => some.contains(&extents) && sources == 0,
        };
        if !fits {
            return Err(Rejection::Count {
                frames,
                extents,
                sources,
            });
        }

        let statuses = if operation.is_copy() {
            frames as usize
        } else {
            0
        };
        let (data_in, data_out) = match operation {
            Operation::ToDevice => (statuses * FRAME_SIZE, 0),
            Operation::FromDevice => (0, statuses * FRAME_SIZE),
            Operation::Counters => (0, size_of::<virtio_hmm_counters>()),
            _ => (0, 0),
        };
        let listed = (extents as usize + sources as usize) * size_of::<virtio_hmm_extent>();
        if readable.remaining() != listed + data_in || body.remaining() != statuses + data_out {
            return Err(Rejection::Length);
        }
        // Guest pages may turn out to be inaccessible one by one, the rest not.
        let required = if operation == Operation::Counters {
            data_out
        } else {
            statuses
        };
        if !body.skip(required, mem, Permissions::Write) {
            return Err(Rejection::Unwritable);
        }

        let bytes = &mut self.bytes;
        list(mem, readable, extents, frames, bytes, &mut self.extents)?;
        let frames = if sources > 0 { frames } else { 0 };
        list(mem, readable, sources, frames, bytes, &mut self.sources)?;
        match self
            .extents
            .iter()
            .chain(&self.sources)
            .find(|e| !e.lies_in(device_frames))
        {
            Some(extent) => Err(Rejection::Range(*extent)),
            None => Ok(()),
        }
    }
}

/// Reads `count` extents of together `frames` frames into `extents`.
fn list(
    mem: &GuestMemoryMmap,
    readable: &mut Cursor<'_>,
    count: u32,
    frames: u32,
    bytes: &mut Vec<u8>,
    extents: &mut Vec<Extent>,
) -> Result<(), Rejection> {
    bytes.resize(count as usize * size_of::<virtio_hmm_extent>(), 0);
    readable.read(mem, bytes).map_err(Rejection::Unreadable)?;
    extents.clear();
    let mut left = frames;
    for chunk in bytes.chunks_exact(size_of::<virtio_hmm_extent>()) {
        let mut extent = virtio_hmm_extent::default();
        extent.as_mut_slice().copy_from_slice(chunk);
        if extent.reserved != 0 {
            return Err(Rejection::Reserved);
        }
        let count = extent.count.into();
        left = left
            .checked_sub(count)
            .filter(|_| count > 0)
            .ok_or(Rejection::Sum)?;
        extents.push(Extent {
            frame: extent.frame.into(),
            count,
        });
    }
    if left == 0 {
        Ok(())
    } else {
        Err(Rejection::Sum)
    }
}
