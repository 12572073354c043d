//! The request parser. The first bytes of an input say what the chain is like, the
//! others are the request, whose lengths may be made to fit, since few would. What it
//! accepts lies in device memory, and it makes no difference where the chain is divided.
#![no_main]

use std::sync::LazyLock;

use hmm_fuzz::{
    AVAIL, CONTROL, FIT, LEN, NEXT, QUEUE_SIZE, REQUEST, START, TABLE, USED, WRITE, contents, load,
    memory,
};
use libfuzzer_sys::{Corpus, fuzz_target};
use vhost_device_hmm::{
    abi::{
        VIRTIO_HMM_FRAME_SIZE, VIRTIO_HMM_MAX_FRAMES, VIRTIO_HMM_OP_COUNTERS,
        VIRTIO_HMM_OP_DISCARD, VIRTIO_HMM_OP_FROM_DEVICE, VIRTIO_HMM_OP_TO_DEVICE,
        virtio_hmm_counters, virtio_hmm_extent, virtio_hmm_req,
    },
    chain::Buffers,
    request::{Extent, Operation, QueueKind, Rejection, Request},
};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap,
};

const DEVICE_FRAMES: u64 = 512;
/// Bytes of guest memory for a request.
const ROOM: usize = LEN - (REQUEST - START) as usize;

static MEMORY: LazyLock<GuestMemoryAtomic<GuestMemoryMmap>> = LazyLock::new(memory);

fuzz_target!(|input: &[u8]| -> Corpus {
    let [kind, split, data @ ..] = input else {
        return Corpus::Reject;
    };
    let Some((lengths, request)) = data.split_first_chunk::<8>() else {
        return Corpus::Reject;
    };
    let mut request = request.to_vec();
    let [data, body] = if kind & FIT != 0 {
        fit(&mut request)
    } else {
        [0, 4].map(|at| u32::from_le_bytes(lengths[at..at + 4].try_into().unwrap()))
    };
    // Longer chains are refused before.
    let [data, body] = [data, body].map(|length| length & ((1 << 30) - 1));
    let kind = match kind & CONTROL {
        0 => QueueKind::Copy,
        _ => QueueKind::Control,
    };
    let whole = parse(kind, &request, 0, data, body);
    let divided = parse(kind, &request, usize::from(*split), data, body);
    assert_eq!(format!("{whole:?}"), format!("{divided:?}"));
    let Ok((operation, frames, extents, sources)) = whole else {
        return Corpus::Keep;
    };
    for extent in extents.iter().chain(&sources) {
        assert!(extent.count > 0);
        let end = extent.frame.checked_add(extent.count.into()).unwrap();
        assert!(end <= DEVICE_FRAMES);
    }
    let sum = |extents: &[Extent]| extents.iter().map(|e| u64::from(e.count)).sum::<u64>();
    if operation != Operation::Counters {
        assert_eq!(sum(&extents), u64::from(frames));
    }
    if operation == Operation::DeviceToDevice {
        assert_eq!(sum(&sources), u64::from(frames));
    }
    if operation.is_copy() {
        assert!(frames <= VIRTIO_HMM_MAX_FRAMES);
    }
    Corpus::Keep
});

/// Gives a request the length that its head says. Returns those of the data and of the
/// response that it needs.
fn fit(request: &mut Vec<u8>) -> [u32; 2] {
    let mut head = virtio_hmm_req::default();
    request.resize(request.len().max(size_of_val(&head)), 0);
    let bytes = head.as_mut_slice();
    bytes.copy_from_slice(&request[..bytes.len()]);
    let [op, frames, extents, sources] = [
        head.op,
        head.nr_frames,
        head.nr_extents,
        head.nr_src_extents,
    ]
    .map(u32::from);
    let extents = u64::from(extents) + u64::from(sources);
    let listed = extents.min(ROOM as u64) as usize * size_of::<virtio_hmm_extent>();
    request.resize(size_of_val(&head) + listed, 0);
    let bytes = frames.wrapping_mul(VIRTIO_HMM_FRAME_SIZE);
    let (data, response) = match op {
        VIRTIO_HMM_OP_TO_DEVICE => (bytes, frames),
        VIRTIO_HMM_OP_FROM_DEVICE => (0, frames.wrapping_add(bytes)),
        VIRTIO_HMM_OP_COUNTERS => (0, size_of::<virtio_hmm_counters>() as u32),
        VIRTIO_HMM_OP_DISCARD => (0, 0),
        _ => (0, frames),
    };
    [data, response]
}

type Parsed = (Operation, u32, Vec<Extent>, Vec<Extent>);

/// Parses a request in two readable buffers, the first of `split` bytes, which are
/// followed by data and by a writable buffer of these lengths.
fn parse(
    kind: QueueKind,
    request: &[u8],
    split: usize,
    data: u32,
    body: u32,
) -> Result<Parsed, Rejection> {
    let mem = MEMORY.memory();
    load(&mem, &[]);
    let request = &request[..request.len().min(ROOM)];
    mem.write_slice(request, GuestAddress(REQUEST)).unwrap();
    let split = split.min(request.len());
    let (first, second) = (split as u32, (request.len() - split) as u32);
    let descriptors = [
        (REQUEST, first, NEXT, 1),
        (REQUEST + split as u64, second, NEXT, 2),
        // What it holds is not looked at, so there is no need for it to exist.
        (START + LEN as u64, data, NEXT, 3),
        (START, body, WRITE, 0),
    ];
    for (at, (addr, len, flags, next)) in (TABLE..).step_by(16).zip(descriptors) {
        mem.write_obj(addr, GuestAddress(at)).unwrap();
        mem.write_obj(len, GuestAddress(at + 8)).unwrap();
        mem.write_obj::<u16>(flags, GuestAddress(at + 12)).unwrap();
        mem.write_obj::<u16>(next, GuestAddress(at + 14)).unwrap();
    }
    mem.write_obj(1_u16, GuestAddress(AVAIL + 2)).unwrap();
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.set_desc_table_address(Some(TABLE as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_ready(true);

    let before = contents(&mem);

    let mut buffers = Buffers::default();
    let chain = queue.iter(mem.clone()).unwrap().next().unwrap();
    buffers.collect(chain).unwrap();
    let mut request = Request::default();
    let operation = request
        .read_head(&mem, kind, &buffers)
        .and_then(|(operation, mut data)| {
            let body = buffers.writable();
            request.read_extents(&mem, operation, &mut data, body, DEVICE_FRAMES)?;
            Ok(operation)
        });
    // It is read, and no more.
    assert!(contents(&mem) == before);
    let frames = request.frames();
    Ok((operation?, frames, request.extents, request.sources))
}
