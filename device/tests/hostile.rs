//! Random descriptor tables with more or less right requests in them: whatever
//! they say, the device neither panics nor writes where it was not told to.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::{ops::Range, sync::Arc};

use proptest::{collection::vec, prelude::*};
use vhost_device_hmm::{
    abi::*,
    counters::Counters,
    engine::Engine,
    hardware::Events,
    memory::{Backing, Memory},
    processor::{Processor, Timing},
    request::QueueKind,
};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

const START: u64 = 0x1_0000;
const LEN: usize = 0x1_0000;
const END: u64 = START + LEN as u64;
const SIZE: u16 = 16;
const TABLE: u64 = START;
const AVAIL: u64 = START + 0x1000;
const USED: u64 = START + 0x2000;
const INDIRECT: u64 = START + 0x3000;
const REQUEST: u64 = START + 0x4000;
const RESPONSE: u64 = START + 0x5000;
const DATA: u64 = START + 0x6000;

type Descriptor = (u64, u32, u16, u16);

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let addr = prop_oneof![
        4 => Just(REQUEST),
        4 => DATA..END,
        2 => Just(DATA),
        2 => Just(INDIRECT),
        1 => END - 20..END + 20,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        4 => prop::sample::select(vec![0, 7, 8, 9, 10, 32, 48, 64, 176, 4096, 8192]),
        1 => 0..0x4000_u32,
        1 => any::<u32>(),
    ];
    // Mostly a chain that goes on, now and then an indirect table.
    let flags = prop::sample::select(vec![0, 1, 1, 1, 2, 3, 3, 3, 4]);
    (
        addr,
        len,
        flags,
        prop_oneof![9 => 0..SIZE, 1 => any::<u16>()],
    )
}

/// A request, and a chain for it, one descriptor of which may be replaced.
#[derive(Clone, Debug)]
struct Attempt {
    request: Vec<u8>,
    chain: Vec<Descriptor>,
}

fn attempt() -> impl Strategy<Value = Attempt> {
    let op = prop_oneof![8 => 1..=4_u32, 2 => 0x100..=0x101_u32, 1 => any::<u32>()];
    let frame = prop_oneof![8 => 0..510_u64, 1 => 500..520_u64, 1 => any::<u64>()];
    let count = prop_oneof![15 => 1..4_u32, 1 => any::<u32>()];
    let off = prop_oneof![15 => Just(0), 1 => any::<u32>()];
    let data = prop_oneof![8 => DATA..END, 1 => END - 5000..END + 20, 1 => any::<u64>()];
    let replaced = prop_oneof![
        3 => Just(None),
        1 => (0..4_usize, descriptor()).prop_map(Some),
    ];
    (op, vec((frame, count), 1..4), off, data, replaced).prop_map(
        |(op, extents, off, data, replaced)| {
            let frames = extents
                .iter()
                .fold(0, |sum: u32, (_, count)| sum.wrapping_add(*count));
            let sources = if op == VIRTIO_HMM_OP_DEVICE_TO_DEVICE {
                extents.len()
            } else {
                0
            };
            let head = virtio_hmm_req {
                op: op.into(),
                flags: off.into(),
                nr_frames: frames.into(),
                nr_extents: u32::try_from(extents.len()).unwrap().into(),
                nr_src_extents: u32::try_from(sources).unwrap().into(),
                ..Default::default()
            };
            let mut request = head.as_slice().to_vec();
            for (frame, count) in extents.iter().chain(extents.iter().rev().take(sources)) {
                let extent = virtio_hmm_extent {
                    frame: (*frame).into(),
                    count: (*count).into(),
                    ..Default::default()
                };
                request.extend(extent.as_slice());
            }
            let len = u32::try_from(request.len()).unwrap();
            let bytes = frames.wrapping_mul(VIRTIO_HMM_FRAME_SIZE);
            let copy = op < VIRTIO_HMM_OP_COUNTERS;
            let response = (
                RESPONSE,
                if copy { frames.wrapping_add(8) } else { 8 },
                2,
                0,
            );
            let mut chain = vec![(REQUEST, len, 1, 1), response];
            match op {
                VIRTIO_HMM_OP_TO_DEVICE => chain.insert(1, (data, bytes, 1, 2)),
                VIRTIO_HMM_OP_FROM_DEVICE => {
                    chain[1] = (RESPONSE, response.1, 3, 2);
                    chain.push((data, bytes, 2, 0));
                }
                _ => {}
            }
            if let Some((at, descriptor)) = replaced
                && let Some(place) = chain.get_mut(at)
            {
                *place = descriptor;
            }
            Attempt { request, chain }
        },
    )
}

fn write_table(mem: &GuestMemoryMmap, table: u64, descriptors: &[Descriptor]) {
    for (at, (addr, len, flags, next)) in (0..).step_by(16).zip(descriptors) {
        let base = table + at;
        mem.write_obj(*addr, GuestAddress(base)).unwrap();
        mem.write_obj(*len, GuestAddress(base + 8)).unwrap();
        mem.write_obj(*flags, GuestAddress(base + 12)).unwrap();
        mem.write_obj(*next, GuestAddress(base + 14)).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1024,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn d10_nothing_but_writable_buffers_is_written(
        mut table in vec(descriptor(), SIZE as usize),
        indirect in vec(descriptor(), SIZE as usize),
        attempt in attempt(),
        head in prop_oneof![4 => Just(0), 1 => 0..SIZE + 1],
        kind in prop::sample::select(vec![QueueKind::Control, QueueKind::Copy, QueueKind::Copy]),
    ) {
        table[..attempt.chain.len()].copy_from_slice(&attempt.chain);
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(START), LEN)]).unwrap();
        write_table(&mem, TABLE, &table);
        write_table(&mem, INDIRECT, &indirect);
        mem.write_slice(&attempt.request, GuestAddress(REQUEST)).unwrap();
        mem.write_obj(1_u16, GuestAddress(AVAIL + 2)).unwrap();
        mem.write_obj(head, GuestAddress(AVAIL + 4)).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(u32::try_from(TABLE).unwrap()), Some(0));
        queue.set_avail_ring_address(Some(u32::try_from(AVAIL).unwrap()), Some(0));
        queue.set_used_ring_address(Some(u32::try_from(USED).unwrap()), Some(0));
        queue.set_ready(true);

        let content = || {
            let mut bytes = vec![0; LEN];
            mem.read_slice(&mut bytes, GuestAddress(START)).unwrap();
            bytes
        };
        let before = content();
        let engine = Engine::new(Arc::new(Memory::new(2 << 20, Backing::Sparse).unwrap()));
        let mut processor = Processor::new(kind, 0, engine, Arc::new(Counters::new(1, Events::default())));
        let chain = queue.iter(&mem).unwrap().next().unwrap();
        let result = processor.process(&mem, chain, Timing::default(), None);
        let after = content();

        let writable: Vec<Range<u64>> = table
            .iter()
            .chain(&indirect)
            .filter(|(_, _, flags, _)| flags & 2 != 0)
            .map(|(addr, len, ..)| *addr..addr.saturating_add((*len).into()))
            .collect();
        let changed = (START..).zip(before.iter().zip(&after)).filter(|(_, (old, new))| old != new);
        for (addr, _) in changed {
            prop_assert!(result.is_ok(), "{addr:#x} changed without a response");
            prop_assert!(writable.iter().any(|range| range.contains(&addr)), "{addr:#x} changed");
        }
    }
}
