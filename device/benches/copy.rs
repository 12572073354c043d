//! Throughput of the copy engine beside that of memcpy. Each copy takes the
//! next piece of a 64 MiB working set, so that caches do not hold it.
#![allow(missing_docs, clippy::unwrap_used)]

use std::{ptr, sync::Arc};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vhost_device_hmm::{
    engine::Engine,
    memory::{Backing, Memory},
};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

const WORKING_SET: usize = 64 << 20;

fn copy(c: &mut Criterion) {
    let engine = Engine::new(Arc::new(
        Memory::new(WORKING_SET as u64, Backing::Prefault).unwrap(),
    ));
    // Mappings as guest memory is one: copies between buffers whose places in
    // their pages differ by a few bytes are slower, and no guest does that.
    let [guest, other] = [(); 2].map(|()| {
        let region = MmapRegion::<()>::new(WORKING_SET).unwrap();
        let slice = region.get_slice(0, WORKING_SET).unwrap();
        slice.write_slice(&vec![0x5a; WORKING_SET], 0).unwrap();
        region
    });
    // Maps every page, as in a device that has been in use for a while.
    engine
        .to_device(0, &guest.get_slice(0, WORKING_SET).unwrap())
        .unwrap();

    for size in [4 << 10, 64 << 10, 2 << 20] {
        let mut group = c.benchmark_group("copy");
        group.throughput(Throughput::Bytes(size as u64));
        let mut at = 0;
        let mut next = || {
            at = (at + size) % WORKING_SET;
            at
        };
        group.bench_function(BenchmarkId::new("memcpy", size), |b| {
            b.iter(|| {
                let at = next();
                let (from, to) = (guest.as_ptr(), other.as_ptr());
                // SAFETY: both mappings have WORKING_SET bytes, `size` or more
                // of them after `at`, and nothing else uses them meanwhile.
                unsafe { ptr::copy_nonoverlapping(from.add(at), to.add(at), size) };
            });
        });
        group.bench_function(BenchmarkId::new("to_device", size), |b| {
            b.iter(|| {
                let at = next();
                engine
                    .to_device(at as u64, &guest.get_slice(at, size).unwrap())
                    .unwrap();
            });
        });
        group.bench_function(BenchmarkId::new("from_device", size), |b| {
            b.iter(|| {
                let at = next();
                engine
                    .from_device(at as u64, guest.get_slice(at, size).unwrap())
                    .unwrap();
            });
        });
        group.finish();
    }
}

criterion_group!(benches, copy);
criterion_main!(benches);
