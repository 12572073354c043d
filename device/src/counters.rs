//! What the device counts in a session, that is from the connection of a VM to
//! that of the next.
//!
//! As JSON, where every operation has the same four members:
//! ```json
//! {
//!   "to_device": { "requests": 0, "frames": 0, "bytes": 0, "errors": 0 },
//!   "from_device": {}, "fill": {}, "device_to_device": {}, "discard": {},
//!   "unsupported": 0,
//!   "injected": { "delay": 0, "reorder": 0, "error": 0, "status": 0, "short": 0,
//!                 "drop": 0, "stall": 0, "poison": 0, "dead": 0 }
//! }
//! ```

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::Serialize;

use crate::{
    abi::{VIRTIO_HMM_FRAME_SIZE, virtio_hmm_counters, virtio_hmm_op_counters},
    rule::Fault,
};

/// Counters of one operation.
#[derive(Debug, Default, Serialize)]
pub struct OpCounters {
    requests: AtomicU64,
    frames: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

impl OpCounters {
    /// Counts a completed request that did `frames` frames.
    pub fn record(&self, frames: u64, ok: bool) {
        self.requests.fetch_add(1, Relaxed);
        self.frames.fetch_add(frames, Relaxed);
        self.bytes
            .fetch_add(frames.wrapping_mul(VIRTIO_HMM_FRAME_SIZE.into()), Relaxed);
        self.errors.fetch_add((!ok).into(), Relaxed);
    }

    fn to_wire(&self) -> virtio_hmm_op_counters {
        virtio_hmm_op_counters {
            requests: self.requests.load(Relaxed).into(),
            frames: self.frames.load(Relaxed).into(),
            bytes: self.bytes.load(Relaxed).into(),
            errors: self.errors.load(Relaxed).into(),
        }
    }
}

/// Requests that met a fault on purpose, by fault.
#[derive(Debug, Default, Serialize)]
pub struct Injected {
    delay: AtomicU64,
    reorder: AtomicU64,
    error: AtomicU64,
    status: AtomicU64,
    short: AtomicU64,
    drop: AtomicU64,
    stall: AtomicU64,
    poison: AtomicU64,
    dead: AtomicU64,
}

impl Injected {
    /// Counts a request that met `fault`.
    pub fn record(&self, fault: Fault) {
        let counter = match fault {
            Fault::Delay(_) => &self.delay,
            Fault::Reorder(_) => &self.reorder,
            Fault::Error(_) => &self.error,
            Fault::Status(_) => &self.status,
            Fault::Short(_) => &self.short,
            Fault::Drop(_) => &self.drop,
            Fault::Stall => &self.stall,
            Fault::Poison(_) => &self.poison,
            Fault::Dead => &self.dead,
        };
        counter.fetch_add(1, Relaxed);
    }
}

/// Counters of a session.
#[derive(Debug, Default, Serialize)]
pub struct Counters {
    /// Guest pages to device frames.
    pub to_device: OpCounters,
    /// Device frames to guest pages.
    pub from_device: OpCounters,
    /// Frames set to zero.
    pub fill: OpCounters,
    /// Device frames to device frames.
    pub device_to_device: OpCounters,
    /// Frames given back to the host.
    pub discard: OpCounters,
    unsupported: AtomicU64,
    /// Faults on purpose.
    pub injected: Injected,
}

impl Counters {
    /// Counts a request of an operation unknown to its queue.
    pub fn record_unsupported(&self) {
        self.unsupported.fetch_add(1, Relaxed);
    }

    /// The counters as `VIRTIO_HMM_OP_COUNTERS` reports them.
    pub fn to_wire(&self) -> virtio_hmm_counters {
        virtio_hmm_counters {
            to_device: self.to_device.to_wire(),
            from_device: self.from_device.to_wire(),
            fill: self.fill.to_wire(),
            device_to_device: self.device_to_device.to_wire(),
            discard: self.discard.to_wire(),
            unsupported: self.unsupported.load(Relaxed).into(),
        }
    }
}
