//! Requests a second through a worker and its ring, in batches, without a driver
//! that would have to be woken; and what of that goes into counting them.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::{
    cell::Cell,
    hint::black_box,
    sync::Arc,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vhost_device_hmm::{
    abi::{
        VIRTIO_HMM_OP_TO_DEVICE, VIRTIO_HMM_QUEUE_COPY, VIRTIO_HMM_S_OK, virtio_hmm_extent,
        virtio_hmm_req,
    },
    counters::{Completed, Counters, Timed},
    engine::Engine,
    hardware::Events,
    inject::Injector,
    memory::{Backing, Memory},
    processor::Processor,
    request::{Operation, QueueKind},
    worker::Worker,
};
use vhost_user_backend::{VringMutex, VringT};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

const TABLE: u64 = 0x1_0000;
const AVAIL: u64 = 0x2_0000;
const USED: u64 = 0x3_0000;
const REQUESTS: u64 = 0x10_0000;
const RESPONSES: u64 = 0x20_0000;
const DATA: u64 = 0x100_0000;
/// Bytes of the driver's memory and of the device's that are used in turn, so that
/// caches do not hold them.
const WORKING_SET: u64 = 64 << 20;
const RING: u16 = 1024;

/// A worker, and a ring of copies to the device of so many frames each.
struct Setup {
    worker: Worker,
    vring: VringMutex,
    mem: GuestMemoryMmap,
    avail: u16,
}

fn setup(frames: u32) -> Setup {
    let ranges = [(GuestAddress(0), (DATA + WORKING_SET) as usize)];
    let mem = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let engine = Engine::new(Arc::new(
        Memory::new(WORKING_SET, Backing::Prefault).unwrap(),
    ));
    let counters = Arc::new(Counters::new(3, Events::default()));
    let atomic = GuestMemoryAtomic::new(mem.clone());
    let processor = Processor::new(
        QueueKind::Copy,
        VIRTIO_HMM_QUEUE_COPY as usize,
        engine,
        Arc::clone(&counters),
    );
    let worker = Worker::new(
        VIRTIO_HMM_QUEUE_COPY,
        atomic.clone(),
        processor,
        counters,
        Arc::new(Injector::new(0, &[], 1).unwrap()),
        None,
    )
    .unwrap();
    let vring = VringMutex::new(atomic, RING).unwrap();
    vring.set_queue_size(RING);
    vring.set_queue_info(TABLE, AVAIL, USED).unwrap();
    vring.set_queue_event_idx(true);
    vring.set_queue_ready(true);
    vring.set_enabled(true);

    let len = frames * 4096;
    for slot in 0..RING / 4 {
        let at = (u64::from(slot) * u64::from(len)) % WORKING_SET;
        let head = virtio_hmm_req {
            op: VIRTIO_HMM_OP_TO_DEVICE.into(),
            nr_frames: frames.into(),
            nr_extents: 1.into(),
            ..Default::default()
        };
        let extent = virtio_hmm_extent {
            frame: (at / 4096).into(),
            count: frames.into(),
            reserved: 0.into(),
        };
        let request = REQUESTS + 64 * u64::from(slot);
        let response = RESPONSES + 1024 * u64::from(slot);
        let bytes = [head.as_slice(), extent.as_slice()].concat();
        mem.write_slice(&bytes, GuestAddress(request)).unwrap();
        let chain = [
            (request, 48, 1),
            (DATA + at, len, 1),
            (response, 8 + frames, 2),
        ];
        for (place, (addr, len, flags)) in (4 * slot..).zip(chain) {
            let mut bytes = addr.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(u16::to_le_bytes(flags));
            bytes.extend((place + 1).to_le_bytes());
            let at = GuestAddress(TABLE + 16 * u64::from(place));
            mem.write_slice(&bytes, at).unwrap();
        }
    }
    for slot in 0..RING {
        let head = 4 * (slot % (RING / 4));
        let at = GuestAddress(AVAIL + 4 + 2 * u64::from(slot));
        mem.write_obj(head, at).unwrap();
    }
    Setup {
        worker,
        vring,
        mem,
        avail: 0,
    }
}

impl Setup {
    /// Has the worker do so many requests, and not look for more when they are done.
    fn run(&mut self, requests: u16) {
        self.avail = self.avail.wrapping_add(requests);
        self.mem
            .write_obj(self.avail, GuestAddress(AVAIL + 2))
            .unwrap();
        // Asked before each request.
        let asked = Cell::new(0);
        self.worker
            .drain(&self.vring, || asked.replace(asked.get() + 1) == requests);
        let used: u16 = self.mem.read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(used, self.avail);
    }
}

fn requests(c: &mut Criterion) {
    for (frames, batch) in [(1_u32, 64_u16), (16, 64), (512, 8)] {
        let mut group = c.benchmark_group("request");
        group.throughput(Throughput::Elements(batch.into()));
        let mut setup = setup(frames);
        group.bench_function(BenchmarkId::from_parameter(frames * 4096), |b| {
            b.iter(|| setup.run(batch));
        });
        group.finish();
    }
}

/// What it takes to count one small request of a row, and one that is timed.
fn counting(c: &mut Criterion) {
    let counters = Counters::new(3, Events::default());
    let queue = counters
        .queues()
        .get(VIRTIO_HMM_QUEUE_COPY as usize)
        .unwrap();
    let begun = Instant::now();
    let count = |timed| {
        queue.record(black_box(&Completed {
            operation: Operation::ToDevice,
            frames: 1,
            done: 1,
            status: VIRTIO_HMM_S_OK,
            timed,
        }));
        queue.ring.calls_suppressed.add(1);
    };
    let mut group = c.benchmark_group("counting");
    group.bench_function("not timed", |b| b.iter(|| count(None)));
    group.bench_function("timed", |b| {
        b.iter(|| {
            let copy = Instant::now().saturating_duration_since(begun);
            count(Some(Timed {
                wait: Duration::from_micros(3),
                copy,
                weight: 1,
            }));
        });
    });
    group.finish();
}

criterion_group!(benches, requests, counting);
criterion_main!(benches);
