//! What the device counts in a session, that is from the connection of a VM to
//! that of the next. `docs/counters.md` says how to read it.
//!
//! Each worker has counters of its own, which share no cache line with those of
//! another, and adds to them without atomic read-modify-write operations. Sums
//! are made by those who ask.

use std::{
    collections::BTreeMap,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use serde::{Serialize, Serializer, ser::SerializeStruct};

use crate::{
    abi::{
        VIRTIO_HMM_FRAME_FAULT, VIRTIO_HMM_FRAME_NOT_DONE, VIRTIO_HMM_FRAME_POISONED,
        VIRTIO_HMM_FRAME_SIZE, VIRTIO_HMM_S_INVALID, VIRTIO_HMM_S_OK, VIRTIO_HMM_S_PARTIAL,
        VIRTIO_HMM_S_RANGE, VIRTIO_HMM_S_UNSUPPORTED, virtio_hmm_counters, virtio_hmm_op_counters,
    },
    hardware::{Counts, Events},
    histogram::{Count, Histogram},
    request::Operation,
    rule::Fault,
};

/// How large a request is, by what its frames could be in the driver's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// One frame, or none.
    Page,
    /// Up to 16 frames.
    UpTo64K,
    /// More.
    UpTo2M,
}

impl Size {
    /// All sizes in order.
    pub const ALL: [Self; 3] = [Self::Page, Self::UpTo64K, Self::UpTo2M];

    /// The size of a request of so many frames.
    pub fn of(frames: u32) -> Self {
        match frames {
            0..=1 => Self::Page,
            2..=16 => Self::UpTo64K,
            _ => Self::UpTo2M,
        }
    }

    /// Its name: the most bytes of such a request.
    pub fn name(self) -> &'static str {
        match self {
            Self::Page => "4K",
            Self::UpTo64K => "64K",
            Self::UpTo2M => "2M",
        }
    }
}

/// Counters of the requests for one operation of one size on one queue.
#[derive(Debug, Default)]
pub struct SizeCounters {
    /// Requests completed.
    pub requests: Count,
    /// Frames done.
    pub frames: Count,
    /// How long requests waited in the ring since the worker had found them.
    pub wait: Histogram,
    /// How long the worker took.
    pub copy: Histogram,
}

impl SizeCounters {
    /// Bytes of the frames done.
    pub fn bytes(&self) -> u64 {
        bytes(self.frames.get())
    }
}

fn bytes(frames: u64) -> u64 {
    frames.wrapping_mul(u64::from(VIRTIO_HMM_FRAME_SIZE))
}

/// Counters of the requests for one operation on one queue.
#[derive(Debug, Default)]
pub struct OperationCounters {
    sizes: [SizeCounters; Size::ALL.len()],
    /// Requests whose status was not `OK`.
    pub errors: Count,
}

impl OperationCounters {
    /// The counters of each size.
    pub fn sizes(&self) -> impl Iterator<Item = (Size, &SizeCounters)> {
        Size::ALL.into_iter().zip(&self.sizes)
    }
}

/// Requests and frames that failed on one queue, by what their status says.
#[derive(Debug, Default, Serialize)]
pub struct Failures {
    /// Requests some of whose frames failed.
    pub partial: Count,
    /// Malformed requests.
    pub invalid: Count,
    /// Requests of an operation that the queue does not know.
    pub unsupported: Count,
    /// Requests for frames that do not exist.
    pub range: Count,
    /// Requests with any other status, as injected faults have.
    pub other: Count,
    /// Frames whose guest page could not be accessed.
    pub frames_fault: Count,
    /// Frames that were not attempted.
    pub frames_not_done: Count,
    /// Frames that had lost their contents.
    pub frames_poisoned: Count,
}

impl Failures {
    /// Requests, by their status.
    pub fn requests(&self) -> [(&'static str, &Count); 5] {
        [
            ("partial", &self.partial),
            ("invalid", &self.invalid),
            ("unsupported", &self.unsupported),
            ("range", &self.range),
            ("other", &self.other),
        ]
    }

    /// Frames, by their status.
    pub fn frames(&self) -> [(&'static str, &Count); 3] {
        [
            ("fault", &self.frames_fault),
            ("not_done", &self.frames_not_done),
            ("poisoned", &self.frames_poisoned),
        ]
    }
}

/// Counters of what goes on in a ring.
#[derive(Debug, Default, Serialize)]
pub struct RingCounters {
    /// Requests that waited when the worker last found new ones.
    pub occupancy: Count,
    /// Most requests that ever waited.
    pub occupancy_max: Count,
    /// How often it found as many as the ring can hold.
    pub full: Count,
    /// Notifications by the driver.
    pub kicks: Count,
    /// Notifications of the driver.
    pub calls: Count,
    /// Used buffers of which the driver did not want to be notified.
    pub calls_suppressed: Count,
}

/// Counters of one queue, written by its worker alone.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct QueueCounters {
    operations: [OperationCounters; Operation::ALL.len()],
    /// What failed.
    pub failures: Failures,
    /// The ring.
    pub ring: RingCounters,
    /// What the processor counts, once the worker has begun.
    hardware: OnceLock<Counts>,
}

/// A request that is done.
#[derive(Clone, Copy, Debug)]
pub struct Completed {
    /// What it asked for.
    pub operation: Operation,
    /// Frames that it named.
    pub frames: u32,
    /// Frames that succeeded.
    pub done: u32,
    /// Its status.
    pub status: u32,
    /// How long it took, if that is known.
    pub timed: Option<Timed>,
}

/// How long a request took.
#[derive(Clone, Copy, Debug)]
pub struct Timed {
    /// In the ring before it was begun.
    pub wait: Duration,
    /// From then on.
    pub copy: Duration,
    /// For how many requests it stands.
    pub weight: u64,
}

impl QueueCounters {
    /// Counts a completed request.
    pub fn record(&self, completed: &Completed) {
        let Some(counters) = self.operations.get(completed.operation as usize) else {
            return;
        };
        if let Some(size) = counters.sizes.get(Size::of(completed.frames) as usize) {
            size.frames.add(completed.done.into());
            size.requests.add(1);
            if let Some(timed) = &completed.timed {
                size.wait.record(timed.wait, timed.weight);
                size.copy.record(timed.copy, timed.weight);
            }
        }
        if completed.status != VIRTIO_HMM_S_OK {
            counters.errors.add(1);
            self.record_status(completed.status);
        }
    }

    /// Counts a request that failed with `status`, whatever it asked for.
    pub fn record_status(&self, status: u32) {
        let failures = &self.failures;
        let counter = match status {
            VIRTIO_HMM_S_PARTIAL => &failures.partial,
            VIRTIO_HMM_S_INVALID => &failures.invalid,
            VIRTIO_HMM_S_UNSUPPORTED => &failures.unsupported,
            VIRTIO_HMM_S_RANGE => &failures.range,
            _ => &failures.other,
        };
        counter.add(1);
    }

    /// Counts the frames that failed among those of these statuses.
    pub fn record_frames(&self, statuses: &[u8]) {
        for status in statuses {
            match *status {
                VIRTIO_HMM_FRAME_FAULT => self.failures.frames_fault.add(1),
                VIRTIO_HMM_FRAME_NOT_DONE => self.failures.frames_not_done.add(1),
                VIRTIO_HMM_FRAME_POISONED => self.failures.frames_poisoned.add(1),
                _ => {}
            }
        }
    }

    /// The counters of each operation.
    pub fn operations(&self) -> impl Iterator<Item = (Operation, &OperationCounters)> {
        Operation::ALL.into_iter().zip(&self.operations)
    }

    /// What the processor has counted of the worker, by name.
    pub fn hardware(&self) -> BTreeMap<&'static str, u64> {
        self.hardware.get().map(Counts::read).unwrap_or_default()
    }

    /// How long the worker was busy with requests, in nanoseconds.
    pub fn busy(&self) -> u64 {
        let sizes = self.operations.iter().flat_map(|counters| &counters.sizes);
        sizes.map(|size| size.copy.sum()).sum()
    }
}

/// Requests of one operation, on all queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Total {
    /// Completed, whatever their status.
    pub requests: u64,
    /// Frames that succeeded.
    pub frames: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Requests whose status was not `OK`.
    pub errors: u64,
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
    lose: AtomicU64,
    double: AtomicU64,
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
            Fault::Lose => &self.lose,
            Fault::Double => &self.double,
            Fault::Stall => &self.stall,
            Fault::Poison(_) => &self.poison,
            Fault::Dead => &self.dead,
        };
        counter.fetch_add(1, Relaxed);
    }
}

/// Counters of a session.
///
/// As JSON the sums over all queues, where every operation has the same four
/// members:
/// ```json
/// {
///   "to_device": { "requests": 0, "frames": 0, "bytes": 0, "errors": 0 },
///   "from_device": {}, "fill": {}, "device_to_device": {}, "discard": {},
///   "unsupported": 0,
///   "injected": { "delay": 0, "reorder": 0, "error": 0, "status": 0, "short": 0,
///                 "drop": 0, "lose": 0, "double": 0, "stall": 0, "poison": 0,
///                 "dead": 0 }
/// }
/// ```
#[derive(Debug)]
pub struct Counters {
    queues: Box<[QueueCounters]>,
    events: Events,
    /// Faults on purpose.
    pub injected: Injected,
}

impl Counters {
    /// Counters for a device of so many queues, all zero, whose workers have the
    /// processor count these events.
    pub fn new(queues: usize, events: Events) -> Self {
        Self {
            queues: (0..queues).map(|_| QueueCounters::default()).collect(),
            events,
            injected: Injected::default(),
        }
    }

    /// The counters of each queue.
    pub fn queues(&self) -> &[QueueCounters] {
        &self.queues
    }

    /// Has the processor count what this thread does, as the worker of a queue,
    /// if it does not yet.
    pub fn count_hardware(&self, queue: usize) {
        if let Some(counters) = self.queues.get(queue) {
            counters.hardware.get_or_init(|| self.events.open());
        }
    }

    /// The sum over all queues for one operation.
    pub fn total(&self, operation: Operation) -> Total {
        let mut total = Total::default();
        for queue in &self.queues {
            let Some(counters) = queue.operations.get(operation as usize) else {
                continue;
            };
            total.errors += counters.errors.get();
            for size in &counters.sizes {
                total.requests += size.requests.get();
                total.frames += size.frames.get();
            }
        }
        total.bytes = bytes(total.frames);
        total
    }

    fn unsupported(&self) -> u64 {
        let counts = self.queues.iter().map(|queue| &queue.failures.unsupported);
        counts.map(Count::get).sum()
    }

    /// The counters as `VIRTIO_HMM_OP_COUNTERS` reports them.
    pub fn to_wire(&self) -> virtio_hmm_counters {
        let op = |operation| {
            let total = self.total(operation);
            virtio_hmm_op_counters {
                requests: total.requests.into(),
                frames: total.frames.into(),
                bytes: total.bytes.into(),
                errors: total.errors.into(),
            }
        };
        virtio_hmm_counters {
            to_device: op(Operation::ToDevice),
            from_device: op(Operation::FromDevice),
            fill: op(Operation::Fill),
            device_to_device: op(Operation::DeviceToDevice),
            discard: op(Operation::Discard),
            unsupported: self.unsupported().into(),
        }
    }
}

impl Serialize for SizeCounters {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("SizeCounters", 5)?;
        out.serialize_field("requests", &self.requests)?;
        out.serialize_field("frames", &self.frames)?;
        out.serialize_field("bytes", &self.bytes())?;
        out.serialize_field("wait", &self.wait)?;
        out.serialize_field("copy", &self.copy)?;
        out.end()
    }
}

impl Serialize for Counters {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("Counters", 7)?;
        for operation in Operation::ALL {
            if operation != Operation::Counters {
                out.serialize_field(operation.name(), &self.total(operation))?;
            }
        }
        out.serialize_field("unsupported", &self.unsupported())?;
        out.serialize_field("injected", &self.injected)?;
        out.end()
    }
}
