//! Whatever the extents and the buffers of a request, its frames are the ones that a
//! model moves.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

use std::{ops::Range, sync::Arc};

use proptest::{collection::vec, prelude::*};
use vhost_device_hmm::{
    abi::{
        VIRTIO_HMM_OP_DEVICE_TO_DEVICE, VIRTIO_HMM_OP_FILL, VIRTIO_HMM_OP_FROM_DEVICE,
        VIRTIO_HMM_OP_TO_DEVICE, VIRTIO_HMM_QUEUE_COPY, virtio_hmm_extent, virtio_hmm_req,
    },
    counters::Counters,
    engine::Engine,
    hardware::Events,
    memory::{Backing, Memory},
    processor::{Processor, Timing},
    request::{Extent, FRAME_SIZE, QueueKind},
};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

/// Frames of device memory that requests name.
const FRAMES: usize = 24;
const QUEUE_SIZE: u16 = 128;
const TABLE: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// The request and its data, and the response and its data, each in one piece.
const READABLE: u64 = 0x1_0000;
const WRITABLE: u64 = 0x4_0000;
const END: usize = 0x7_0000;

#[derive(Clone, Debug)]
struct Case {
    op: u32,
    /// Frames in the order in which they are named, each once.
    frames: Vec<u64>,
    /// As many, for device to device, which are none of the others.
    sources: Vec<u64>,
    /// After which frames an extent ends though the next one could be in it.
    cuts: Vec<bool>,
    /// Lengths of buffers, the last one being what is left.
    buffers: Vec<usize>,
}

fn case() -> impl Strategy<Value = Case> {
    let op = prop_oneof![
        Just(VIRTIO_HMM_OP_TO_DEVICE),
        Just(VIRTIO_HMM_OP_FROM_DEVICE),
        Just(VIRTIO_HMM_OP_FILL),
        Just(VIRTIO_HMM_OP_DEVICE_TO_DEVICE),
    ];
    // In runs of up to four, so that some extents have several frames.
    let runs = Just((0..FRAMES as u64 / 4).collect::<Vec<_>>()).prop_shuffle();
    let length = prop_oneof![0..40_usize, 0..3 * FRAME_SIZE];
    (
        op,
        runs,
        1..=FRAMES / 2,
        vec(any::<bool>(), FRAMES),
        vec(length, 0..16),
    )
        .prop_map(|(op, runs, count, cuts, buffers)| {
            let all = runs.into_iter().flat_map(|run| run * 4..run * 4 + 4);
            let frames: Vec<u64> = all.clone().take(count).collect();
            let sources = all.skip(count).take(count);
            let is_move = op == VIRTIO_HMM_OP_DEVICE_TO_DEVICE;
            let sources = if is_move { sources.collect() } else { vec![] };
            Case {
                op,
                frames,
                sources,
                cuts,
                buffers,
            }
        })
}

/// The frames as a list of extents.
fn extents(frames: &[u64], cuts: &[bool]) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for (frame, cut) in frames.iter().zip(cuts) {
        match extents.last_mut() {
            Some(last) if !cut && last.frame + u64::from(last.count) == *frame => last.count += 1,
            _ => extents.push(Extent {
                frame: *frame,
                count: 1,
            }),
        }
    }
    extents
}

/// A byte that says where it was at first.
fn byte(place: usize) -> u8 {
    (place / FRAME_SIZE * 7 + place % 251) as u8
}

fn frame(number: u64) -> Range<usize> {
    number as usize * FRAME_SIZE..(number as usize + 1) * FRAME_SIZE
}

/// Descriptors of buffers that cover `len` bytes at `at`.
fn divide(at: u64, len: usize, lengths: &[usize], write: bool, out: &mut Vec<(u64, u32, bool)>) {
    let mut done = 0;
    for length in lengths.iter().chain([&len]) {
        let length = (*length).min(len - done);
        out.push((at + done as u64, length as u32, write));
        done += length;
    }
}

fn execute(case: &Case, mem: &GuestMemoryMmap, engine: &Engine) -> u32 {
    let lists = [&case.frames, &case.sources].map(|frames| extents(frames, &case.cuts));
    let [destinations, sources] = lists.each_ref().map(|list| list.len() as u32);
    let head = virtio_hmm_req {
        op: case.op.into(),
        nr_frames: (case.frames.len() as u32).into(),
        nr_extents: destinations.into(),
        nr_src_extents: sources.into(),
        ..Default::default()
    };
    let mut request = head.as_slice().to_vec();
    for extent in lists.concat() {
        let wire = virtio_hmm_extent {
            frame: extent.frame.into(),
            count: extent.count.into(),
            ..Default::default()
        };
        request.extend(wire.as_slice());
    }
    let bytes = case.frames.len() * FRAME_SIZE;
    if case.op == VIRTIO_HMM_OP_TO_DEVICE {
        request.extend((0..bytes).map(|place| !byte(place)));
    }
    let room = match case.op {
        VIRTIO_HMM_OP_FROM_DEVICE => bytes,
        _ => 0,
    };
    mem.write_slice(&request, GuestAddress(READABLE)).unwrap();

    let mut buffers = Vec::new();
    divide(READABLE, request.len(), &case.buffers, false, &mut buffers);
    divide(
        WRITABLE,
        8 + case.frames.len() + room,
        &case.buffers,
        true,
        &mut buffers,
    );
    let last = buffers.len() - 1;
    for (index, (addr, len, write)) in buffers.into_iter().enumerate() {
        let at = TABLE + index as u64 * 16;
        let flags = u16::from(index < last) | u16::from(write) << 1;
        mem.write_obj(addr, GuestAddress(at)).unwrap();
        mem.write_obj(len, GuestAddress(at + 8)).unwrap();
        mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
        mem.write_obj(index as u16 + 1, GuestAddress(at + 14))
            .unwrap();
    }
    mem.write_obj(1_u16, GuestAddress(AVAIL + 2)).unwrap();
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.set_desc_table_address(Some(TABLE as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_ready(true);
    let chain = queue.iter(mem).unwrap().next().unwrap();

    let counters = Arc::new(Counters::new(3, Events::default()));
    let number = VIRTIO_HMM_QUEUE_COPY as usize;
    let mut processor = Processor::new(QueueKind::Copy, number, engine.clone(), counters);
    let answer = processor.process(mem, chain, Timing::default(), None);
    answer.unwrap().unwrap().written
}

proptest! {
    #![proptest_config(ProptestConfig {
        // Miri takes its time.
        cases: if cfg!(miri) { 2 } else { 256 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn requests_move_the_frames_that_they_name(case in case()) {
        let ranges = [(GuestAddress(0), END)];
        let mem = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        let engine = Engine::new(Arc::new(Memory::new(2 << 20, Backing::Sparse).unwrap()));
        // One frame more, which nobody names.
        let device = engine.memory().slice(0, (FRAMES + 1) * FRAME_SIZE).unwrap();
        let before: Vec<u8> = (0..device.len()).map(byte).collect();
        device.write_slice(&before, 0).unwrap();

        let written = execute(&case, &mem, &engine);

        let (mut expected, mut returned) = (before.clone(), Vec::new());
        for (index, number) in case.frames.iter().enumerate() {
            let to = &mut expected[frame(*number)];
            match case.op {
                VIRTIO_HMM_OP_TO_DEVICE => {
                    let at = index * FRAME_SIZE;
                    to.iter_mut().zip(at..).for_each(|(to, place)| *to = !byte(place));
                }
                VIRTIO_HMM_OP_FROM_DEVICE => returned.extend(&before[frame(*number)]),
                VIRTIO_HMM_OP_FILL => to.fill(0),
                _ => to.copy_from_slice(&before[frame(case.sources[index])]),
            }
        }
        let mut after = vec![0; device.len()];
        device.read_slice(&mut after, 0).unwrap();
        prop_assert!(after == expected, "device memory is not what it should be");

        // Status and statuses are 0, which is OK; what follows is as it was.
        let count = case.frames.len();
        let response = [&(count as u32).to_le_bytes()[..], &vec![0; count], &returned].concat();
        prop_assert_eq!(written as usize, 4 + response.len());
        let mut bytes = vec![0; END - WRITABLE as usize];
        mem.read_slice(&mut bytes, GuestAddress(WRITABLE)).unwrap();
        prop_assert_eq!(&bytes[..4], &[0; 4]);
        let (answer, rest) = bytes[4..].split_at(response.len());
        prop_assert!(answer == response, "the response is not what it should be");
        prop_assert!(rest.iter().all(|byte| *byte == 0), "more than the response was written");
    }
}
