//! The wire format of the device: configuration space, requests and responses.
//!
//! This file is the single source of the ABI. The C header
//! `guest-driver/include/virtio_hmm_abi.h` is generated from it, and a test
//! fails when the two differ. `docs/device-specification.md` gives the meaning.
//!
//! All multi-byte fields are little-endian.

use vm_memory::{ByteValued, Le32, Le64};

/// Virtio device id. Provisional: 6 (ioMemory) has a name in QEMU and no
/// specification; the device uses it until it is given an id of its own.
pub const VIRTIO_ID_HMM: u32 = 6;

/// Version of this interface, in [`virtio_hmm_config::version`].
pub const VIRTIO_HMM_VERSION: u32 = 1;

/// Bytes in one frame of device memory.
pub const VIRTIO_HMM_FRAME_SIZE: u32 = 4096;

/// Most frames that one copy request may name: 2 MiB, one PMD of pages.
pub const VIRTIO_HMM_MAX_FRAMES: u32 = 512;

/// Index of the control queue.
pub const VIRTIO_HMM_QUEUE_CONTROL: u32 = 0;
/// Index of the event queue. No event is defined in version 1.
pub const VIRTIO_HMM_QUEUE_EVENT: u32 = 1;
/// Index of the first copy queue.
pub const VIRTIO_HMM_QUEUE_COPY: u32 = 2;

/// Copy guest pages into device frames.
pub const VIRTIO_HMM_OP_TO_DEVICE: u32 = 1;
/// Copy device frames into guest pages.
pub const VIRTIO_HMM_OP_FROM_DEVICE: u32 = 2;
/// Set device frames to zero.
pub const VIRTIO_HMM_OP_FILL: u32 = 3;
/// Copy device frames to other device frames.
pub const VIRTIO_HMM_OP_DEVICE_TO_DEVICE: u32 = 4;
/// Control queue: read the device's counters of this session.
pub const VIRTIO_HMM_OP_COUNTERS: u32 = 0x100;
/// Control queue: the contents of these frames are no longer needed.
pub const VIRTIO_HMM_OP_DISCARD: u32 = 0x101;

/// The request succeeded, every frame of it.
pub const VIRTIO_HMM_S_OK: u32 = 0;
/// Some frames failed; the status of each frame says which.
pub const VIRTIO_HMM_S_PARTIAL: u32 = 1;
/// The request is malformed; nothing was copied.
pub const VIRTIO_HMM_S_INVALID: u32 = 2;
/// The operation is not known to this queue; nothing was copied.
pub const VIRTIO_HMM_S_UNSUPPORTED: u32 = 3;
/// A frame lies outside device memory; nothing was copied.
pub const VIRTIO_HMM_S_RANGE: u32 = 4;

/// This frame was copied or filled.
pub const VIRTIO_HMM_FRAME_OK: u8 = 0;
/// This frame was not attempted.
pub const VIRTIO_HMM_FRAME_NOT_DONE: u8 = 1;
/// This frame failed: its guest page could not be accessed.
pub const VIRTIO_HMM_FRAME_FAULT: u8 = 2;
/// This frame failed: a device frame that was to be read has lost its contents.
pub const VIRTIO_HMM_FRAME_POISONED: u8 = 3;

/// Device configuration space.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(non_camel_case_types)]
pub struct virtio_hmm_config {
    /// [`VIRTIO_HMM_VERSION`].
    pub version: Le32,
    /// Bytes in a frame, [`VIRTIO_HMM_FRAME_SIZE`].
    pub frame_size: Le32,
    /// Bytes of device memory, a multiple of 2 MiB.
    pub memory_size: Le64,
    /// Number of copy queues, 1 to 16.
    pub copy_queues: Le32,
    /// Most frames in one copy request, at most [`VIRTIO_HMM_MAX_FRAMES`].
    pub max_frames: Le32,
    /// Identity of the memory: the daemon makes it at random when it starts.
    pub uuid: [u8; 16],
    /// Changes whenever the contents of the memory were lost or cleared.
    pub generation: Le64,
}

/// Head of every request, device-readable. `nr_extents` extents follow it
/// at once; for `DEVICE_TO_DEVICE` the extents of the source follow those of
/// the destination and are counted by `nr_src_extents`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(non_camel_case_types)]
pub struct virtio_hmm_req {
    /// One of `VIRTIO_HMM_OP_*`.
    pub op: Le32,
    /// No flag is defined; zero.
    pub flags: Le32,
    /// Sum of the counts of the (destination) extents.
    pub nr_frames: Le32,
    /// Number of (destination) extents.
    pub nr_extents: Le32,
    /// Number of source extents, `DEVICE_TO_DEVICE` only, else zero.
    pub nr_src_extents: Le32,
    /// Zero.
    pub reserved: Le32,
    /// Chosen by the driver, for its traces; the device logs it with errors.
    pub cookie: Le64,
}

/// A run of device frames.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(non_camel_case_types)]
pub struct virtio_hmm_extent {
    /// First frame, counted from the start of device memory.
    pub frame: Le64,
    /// Number of frames, at least 1.
    pub count: Le32,
    /// Zero.
    pub reserved: Le32,
}

/// Head of every response, device-writable, first in the writable part of the
/// chain. For copy requests `nr_frames` status bytes (`VIRTIO_HMM_FRAME_*`)
/// follow it; then, for `FROM_DEVICE`, the guest pages.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(non_camel_case_types)]
pub struct virtio_hmm_resp {
    /// One of `VIRTIO_HMM_S_*`.
    pub status: Le32,
    /// Number of frames whose status is `VIRTIO_HMM_FRAME_OK`.
    pub frames_done: Le32,
}

/// What the device counted for one operation since the session began.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(non_camel_case_types)]
pub struct virtio_hmm_op_counters {
    /// Requests completed, whatever their status.
    pub requests: Le64,
    /// Frames copied or filled.
    pub frames: Le64,
    /// Bytes copied or filled.
    pub bytes: Le64,
    /// Requests whose status was not `VIRTIO_HMM_S_OK`.
    pub errors: Le64,
}

/// Response body of `VIRTIO_HMM_OP_COUNTERS`, follows `virtio_hmm_resp`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(non_camel_case_types)]
pub struct virtio_hmm_counters {
    /// Guest pages to device frames.
    pub to_device: virtio_hmm_op_counters,
    /// Device frames to guest pages.
    pub from_device: virtio_hmm_op_counters,
    /// Frames set to zero.
    pub fill: virtio_hmm_op_counters,
    /// Device frames to device frames.
    pub device_to_device: virtio_hmm_op_counters,
    /// Frames that were discarded.
    pub discard: virtio_hmm_op_counters,
    /// Requests of an operation unknown to their queue.
    pub unsupported: Le64,
}

// SAFETY: the types below are `repr(C)`, hold only integers, have no padding
// (each is checked against its size in `tests/abi_layout.rs`), and every bit
// pattern is a valid value.
unsafe impl ByteValued for virtio_hmm_config {}
// SAFETY: see above.
unsafe impl ByteValued for virtio_hmm_req {}
// SAFETY: see above.
unsafe impl ByteValued for virtio_hmm_extent {}
// SAFETY: see above.
unsafe impl ByteValued for virtio_hmm_resp {}
// SAFETY: see above.
unsafe impl ByteValued for virtio_hmm_op_counters {}
// SAFETY: see above.
unsafe impl ByteValued for virtio_hmm_counters {}
