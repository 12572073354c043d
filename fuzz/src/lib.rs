//! The guest memory that inputs are put into: a ring, and what it leads to.

use std::ops::Range;

use vhost_user_backend::{VringMutex, VringT};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

/// Number of descriptors in the table.
pub const QUEUE_SIZE: u16 = 16;
/// First address of guest memory.
pub const START: u64 = 0x1_0000;
/// Bytes of guest memory.
pub const LEN: usize = 0x4000;

/// The descriptor table.
pub const TABLE: u64 = START;
/// The available ring.
pub const AVAIL: u64 = START + 0x100;
/// The used ring.
pub const USED: u64 = START + 0x140;
/// What follows the ring.
pub const RING_END: u64 = USED + 6 + 8 * QUEUE_SIZE as u64;
/// Where seeds have an indirect table, a request, its response and its data.
pub const INDIRECT: u64 = START + 0x200;
/// See [`INDIRECT`].
pub const REQUEST: u64 = START + 0x300;
/// See [`INDIRECT`].
pub const RESPONSE: u64 = START + 0x500;
/// See [`INDIRECT`].
pub const DATA: u64 = START + 0x1000;

/// A descriptor is followed by the one that it names.
pub const NEXT: u16 = 1;
/// A descriptor is of a writable buffer.
pub const WRITE: u16 = 2;
/// A descriptor is of a table of others.
pub const TABLE_OF_OTHERS: u16 = 4;

/// A setting of inputs of `ring` and `request`: the control queue.
pub const CONTROL: u8 = 1;
/// A setting of `request`: all lengths are as the head of the request says.
pub const FIT: u8 = 2;
/// A setting of `ring`: event indices.
pub const EVENT_IDX: u8 = 2;
/// A setting of `ring`: the rule that the next byte says.
pub const RULE: u8 = 4;
/// A setting of `ring`: a link of some bandwidth.
pub const BANDWIDTH: u8 = 8;
/// A setting of `ring`: a link of some latency.
pub const LATENCY: u8 = 16;

/// A guest without anything in its memory.
pub fn memory() -> GuestMemoryAtomic<GuestMemoryMmap> {
    let ranges = [(GuestAddress(START), LEN)];
    GuestMemoryAtomic::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

/// Puts `image` at the start of memory, and zeroes behind it. Returns all of it.
pub fn load(memory: &GuestMemoryMmap, image: &[u8]) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    let len = image.len().min(LEN);
    bytes[..len].copy_from_slice(&image[..len]);
    memory.write_slice(&bytes, GuestAddress(START)).unwrap();
    bytes
}

/// All of memory.
pub fn contents(memory: &GuestMemoryMmap) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    memory.read_slice(&mut bytes, GuestAddress(START)).unwrap();
    bytes
}

/// The ring in that memory.
pub fn vring(memory: &GuestMemoryAtomic<GuestMemoryMmap>, event_idx: bool) -> VringMutex {
    let vring = VringMutex::new(memory.clone(), QUEUE_SIZE).unwrap();
    vring.set_queue_size(QUEUE_SIZE);
    vring.set_queue_info(TABLE, AVAIL, USED).unwrap();
    vring.set_queue_event_idx(event_idx);
    vring.set_queue_ready(true);
    vring.set_enabled(true);
    vring
}

/// The next entry of the used ring.
pub fn used(vring: &VringMutex) -> u16 {
    vring.get_ref().get_queue().next_used()
}

/// The bytes of an integer in memory of these contents, zero where there is none.
pub fn bytes_at<const N: usize>(contents: &[u8; LEN], addr: u64) -> [u8; N] {
    addr.checked_sub(START)
        .and_then(|at| {
            contents
                .get(usize::try_from(at).ok()?..)?
                .first_chunk()
                .copied()
        })
        .unwrap_or([0; N])
}

/// What the chain that begins at a descriptor leads to.
#[derive(Default)]
pub struct Chain {
    /// Writable buffers.
    pub writable: Vec<Range<u64>>,
    /// Tables.
    pub tables: Vec<Range<u64>>,
}

impl Chain {
    /// Follows descriptors, at most so many as a chain may have; the device may
    /// refuse it before.
    pub fn follow(contents: &[u8; LEN], head: u16) -> Self {
        let mut chain = Self::default();
        let (mut table, mut index) = (TABLE..TABLE + 16 * u64::from(QUEUE_SIZE), head);
        for _ in 0..=1024 {
            let at = table.start.saturating_add(16 * u64::from(index));
            if at >= table.end {
                break;
            }
            let addr = u64::from_le_bytes(bytes_at(contents, at));
            let len = u32::from_le_bytes(bytes_at(contents, at + 8));
            let [flags, next] =
                [12, 14].map(|field| u16::from_le_bytes(bytes_at(contents, at + field)));
            let range = addr..addr.saturating_add(len.into());
            if flags & TABLE_OF_OTHERS != 0 {
                chain.tables.push(range.clone());
                (table, index) = (range, 0);
                continue;
            }
            if flags & WRITE != 0 {
                chain.writable.push(range);
            }
            if flags & NEXT == 0 {
                break;
            }
            index = next;
        }
        chain
    }
}
