//! Descriptor chains as two streams of bytes, one readable, one writable.
//!
//! A request may be split over descriptors in any way, so nothing above this
//! file knows of descriptors.

use std::{io, ops::Deref};

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, Permissions};

/// Largest queue size, and most descriptors in one chain. A request of 512
/// scattered pages needs little more than half of it.
pub const MAX_DESCRIPTORS: u16 = 1024;

/// Why a chain is no chain.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not end: a loop, a descriptor that cannot be read, a nested
    /// indirect table, or more than 4 GiB.
    #[error("descriptor chain is broken")]
    Broken,
    /// It has more than [`MAX_DESCRIPTORS`] descriptors.
    #[error("descriptor chain is too long")]
    TooLong,
}

/// Bytes of guest memory that follow one another.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Guest-physical address of the first byte.
    pub addr: GuestAddress,
    /// Number of bytes.
    pub len: usize,
}

/// The buffers of one chain. Kept from chain to chain for its allocations.
#[derive(Debug, Default)]
pub struct Buffers {
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    ordered: bool,
}

impl Buffers {
    /// Replaces the contents by the buffers of `chain`.
    ///
    /// # Errors
    /// If the chain is malformed.
    pub fn collect<M>(&mut self, chain: DescriptorChain<M>) -> Result<(), Error>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        self.readable.clear();
        self.writable.clear();
        self.ordered = true;
        // The iterator just ends when it cannot go on. Whether the chain was
        // complete shows in the last descriptor: it must not have a next one.
        let mut complete = false;
        for (index, descriptor) in chain.enumerate() {
            if index >= MAX_DESCRIPTORS.into() {
                return Err(Error::TooLong);
            }
            complete = !descriptor.has_next();
            let len = usize::try_from(descriptor.len()).map_err(|_| Error::Broken)?;
            let segment = Segment {
                addr: descriptor.addr(),
                len,
            };
            if descriptor.is_write_only() {
                self.writable.push(segment);
            } else {
                self.ordered &= self.writable.is_empty();
                self.readable.push(segment);
            }
        }
        if complete { Ok(()) } else { Err(Error::Broken) }
    }

    /// Whether all readable buffers precede all writable ones.
    pub fn ordered(&self) -> bool {
        self.ordered
    }

    /// Start of the device-readable bytes.
    pub fn readable(&self) -> Cursor<'_> {
        Cursor {
            segments: &self.readable,
            offset: 0,
        }
    }

    /// Start of the device-writable bytes.
    pub fn writable(&self) -> Cursor<'_> {
        Cursor {
            segments: &self.writable,
            offset: 0,
        }
    }
}

/// A position in a stream of guest bytes.
#[derive(Clone, Copy, Debug)]
pub struct Cursor<'a> {
    segments: &'a [Segment],
    /// Bytes of the first segment that are already behind.
    offset: usize,
}

impl Cursor<'_> {
    /// Number of bytes ahead.
    pub fn remaining(&self) -> usize {
        // A chain has less than 4 GiB, so neither operation overflows.
        self.segments
            .iter()
            .map(|segment| segment.len)
            .sum::<usize>()
            - self.offset
    }

    /// Takes the next `len` bytes, piece by piece. At the end of the stream
    /// there are fewer.
    pub fn take(&mut self, mut len: usize) -> impl Iterator<Item = Segment> {
        std::iter::from_fn(move || {
            while len > 0 {
                let (first, rest) = self.segments.split_first()?;
                let piece = Segment {
                    addr: GuestAddress(first.addr.0.saturating_add(self.offset as u64)),
                    len: len.min(first.len - self.offset),
                };
                self.offset += piece.len;
                len -= piece.len;
                if self.offset == first.len {
                    self.segments = rest;
                    self.offset = 0;
                }
                if piece.len > 0 {
                    return Some(piece);
                }
            }
            None
        })
    }

    /// Skips the next `len` bytes, or all that are left. Returns whether all
    /// that were skipped can be accessed in this way.
    pub fn skip(&mut self, len: usize, mem: &GuestMemoryMmap, access: Permissions) -> bool {
        self.take(len).fold(true, |all, piece| {
            all & mem.check_range(piece.addr, piece.len, access)
        })
    }

    /// Reads the next `buf.len()` bytes.
    ///
    /// # Errors
    /// If there are fewer, or some lie outside guest memory.
    pub fn read(
        &mut self,
        mem: &GuestMemoryMmap,
        mut buf: &mut [u8],
    ) -> Result<(), GuestMemoryError> {
        for piece in self.take(buf.len()) {
            let (head, tail) = buf.split_at_mut_checked(piece.len).ok_or_else(ended)?;
            mem.read_slice(head, piece.addr)?;
            buf = tail;
        }
        if buf.is_empty() { Ok(()) } else { Err(ended()) }
    }

    /// Writes `buf` to the next bytes.
    ///
    /// # Errors
    /// If there are fewer, or some lie outside guest memory.
    pub fn write(&mut self, mem: &GuestMemoryMmap, mut buf: &[u8]) -> Result<(), GuestMemoryError> {
        for piece in self.take(buf.len()) {
            let (head, tail) = buf.split_at_checked(piece.len).ok_or_else(ended)?;
            mem.write_slice(head, piece.addr)?;
            buf = tail;
        }
        if buf.is_empty() { Ok(()) } else { Err(ended()) }
    }
}

fn ended() -> GuestMemoryError {
    GuestMemoryError::IOError(io::ErrorKind::UnexpectedEof.into())
}
