//! A worker serves a ring in a guest memory of any contents. The first two bytes
//! of an input say what else is the case, the others are the memory.
#![no_main]

use std::{
    ops::Range,
    sync::{Arc, LazyLock},
    time::Duration,
};

use hmm_fuzz::{
    AVAIL, BANDWIDTH, CONTROL, Chain, EVENT_IDX, LATENCY, LEN, QUEUE_SIZE, RING_END, RULE, START,
    USED, bytes_at, contents, load, memory, used, vring,
};
use libfuzzer_sys::{Corpus, fuzz_target};
use vhost_device_hmm::{
    counters::{Counters, QueueCounters},
    engine::Engine,
    hardware::Events,
    inject::Injector,
    link,
    memory::{Backing, Memory},
    processor::Processor,
    request::QueueKind,
    rule::Rule,
    worker::Worker,
};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

const COPY_QUEUES: u32 = 1;
const RULES: [&str; 11] = [
    "error,probability=0.5",
    "short",
    "poison=2",
    "reorder=1us",
    "delay=1us,probability=0.5",
    "drop=half,after=1",
    "stall,after=1",
    "dead,after=1",
    "status=range",
    "lose",
    "double",
];

struct Device {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    engine: Engine,
    counters: Arc<Counters>,
}

static DEVICE: LazyLock<Device> = LazyLock::new(|| Device {
    memory: memory(),
    engine: Engine::new(Arc::new(Memory::new(2 << 20, Backing::Sparse).unwrap())),
    counters: Arc::new(Counters::new(3, Events::default())),
});

fuzz_target!(|input: &[u8]| -> Corpus {
    let [settings, rule, image @ ..] = input else {
        return Corpus::Reject;
    };
    let Device {
        memory,
        engine,
        counters,
    } = &*DEVICE;
    let before = load(&memory.memory(), image);
    let (kind, queue) = match settings & CONTROL {
        0 => (QueueKind::Copy, 2),
        _ => (QueueKind::Control, 0),
    };
    let vring = vring(memory, settings & EVENT_IDX != 0);
    let rule: Option<Rule> =
        (settings & RULE != 0).then(|| RULES[usize::from(*rule) % RULES.len()].parse().unwrap());
    let rules: Vec<_> = rule.into_iter().collect();
    let injector = Arc::new(Injector::new(1, &rules, COPY_QUEUES).unwrap());
    let link = link::Config {
        bandwidth: (settings & BANDWIDTH != 0).then_some(1 << 30),
        latency: Duration::from_micros(u64::from(settings & LATENCY != 0)),
    };
    let processor = Processor::new(kind, queue, engine.clone(), Arc::clone(counters));
    let mut worker = Worker::new(
        queue as u32,
        memory.clone(),
        processor,
        Arc::clone(counters),
        injector,
        link.link().map(Arc::new),
    )
    .unwrap();
    let queue = &counters.queues()[queue];
    let counted = requests(queue);

    worker.drain(&vring, || false);
    worker.stop(&vring);

    let answers = used(&vring);
    let counted = requests(queue) - counted;
    if rules.is_empty() {
        // A ring that breaks takes the answers along that are still on the link.
        let all = settings & (BANDWIDTH | LATENCY) == 0;
        let answers = u64::from(answers);
        assert!(
            answers == counted || !all && answers < counted,
            "{answers} answers, {counted} requests counted"
        );
    }
    check_memory(&before, &contents(&memory.memory()), answers);
    Corpus::Keep
});

/// Requests that a queue counted: those that it knew, and those that it did not.
fn requests(queue: &QueueCounters) -> u64 {
    let failures = &queue.failures;
    let failed = [
        &failures.partial,
        &failures.invalid,
        &failures.unsupported,
        &failures.range,
        &failures.other,
    ];
    let failed: u64 = failed.into_iter().map(|count| count.get()).sum();
    let mut known = 0;
    let mut known_failed = 0;
    for (_, operation) in queue.operations() {
        known += operation
            .sizes()
            .map(|(_, size)| size.requests.get())
            .sum::<u64>();
        known_failed += operation.errors.get();
    }
    known + failed - known_failed
}

/// Nothing is answered that was not asked, and nothing is written but buffers for
/// it and the used ring, as far as that is known: a request may have been for a
/// copy to the ring itself, or to a table.
fn check_memory(before: &[u8; LEN], after: &[u8; LEN], answers: u16) {
    let number = |contents, addr| u16::from_le_bytes(bytes_at(contents, addr));
    let asked = number(before, AVAIL + 2);
    let heads: Vec<u16> = (AVAIL + 4..)
        .step_by(2)
        .take(asked.min(QUEUE_SIZE).into())
        .map(|entry| number(before, entry))
        .collect();
    let chains = heads.iter().map(|head| Chain::follow(before, *head));
    let chains: Vec<Chain> = chains.collect();
    let tables = chains.iter().flat_map(|chain| &chain.tables);
    let mut fixed: Vec<Range<u64>> = tables.cloned().collect();
    fixed.push(START..RING_END);
    let mut writable: Vec<_> = chains.iter().flat_map(|chain| &chain.writable).collect();
    let overlap = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
    // A table in the used ring is written as well.
    let used_ring = USED..RING_END;
    if fixed
        .iter()
        .any(|fixed| writable.iter().any(|buffer| overlap(fixed, buffer)))
        || fixed[..fixed.len() - 1]
            .iter()
            .any(|table| overlap(table, &used_ring))
    {
        return;
    }

    assert!(answers <= asked, "{answers} answers to {asked} requests");
    for entry in (USED + 4..).step_by(8).take(answers.into()) {
        let id = u32::from_le_bytes(bytes_at(after, entry));
        let len = u32::from_le_bytes(bytes_at(after, entry + 4));
        let chain = heads.iter().position(|head| u32::from(*head) == id);
        let chain = &chains[chain.unwrap()];
        let room: u64 = chain
            .writable
            .iter()
            .map(|buffer| buffer.end - buffer.start)
            .sum();
        assert!(u64::from(len) <= room, "{len} bytes in {room}");
    }
    writable.push(&used_ring);
    for (addr, (old, new)) in (START..).zip(before.iter().zip(after)) {
        if old != new {
            assert!(
                writable.iter().any(|buffer| buffer.contains(&addr)),
                "{addr:#x}"
            );
        }
    }
}
