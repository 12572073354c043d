//! What /proc/self/pagemap and /proc/self/clear_refs show and do.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use virtio_hmm_client::PAGE_SIZE;

use crate::failure::Failure;

/// The bits of an entry that hold a page frame, or type and offset.
const FRAME: u64 = (1 << 55) - 1;

/// The entry of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    /// The page is in RAM.
    #[must_use]
    pub fn present(self) -> bool {
        self.bit(63)
    }

    /// The page table has something else than a page there: swap, or a device page.
    #[must_use]
    pub fn swap(self) -> bool {
        self.bit(62)
    }

    /// The page is one of a file.
    #[must_use]
    pub fn file(self) -> bool {
        self.bit(61)
    }

    /// userfaultfd waits for a write to the page.
    #[must_use]
    pub fn write_protected(self) -> bool {
        self.bit(57)
    }

    /// The page is in RAM and mapped by nobody else.
    #[must_use]
    pub fn exclusive(self) -> bool {
        self.bit(56)
    }

    /// The page was written since the last [`clear_soft_dirty`].
    #[must_use]
    pub fn soft_dirty(self) -> bool {
        self.bit(55)
    }

    /// Of an entry with [`Entry::swap`]: its type and offset. Both are 0 for who is not root.
    #[must_use]
    pub fn swap_entry(self) -> (u64, u64) {
        (self.frame() & 31, self.frame() >> 5)
    }

    /// Of an entry with [`Entry::present`]: its page frame. 0 for who is not root.
    #[must_use]
    pub fn frame(self) -> u64 {
        self.0 & FRAME
    }

    fn bit(self, bit: u32) -> bool {
        self.0 >> bit & 1 == 1
    }
}

/// The entries of `range`, addresses in bytes.
///
/// # Errors
/// The file cannot be read.
pub fn entries(range: Range<usize>) -> Result<Vec<Entry>, Failure> {
    let read = || {
        let mut bytes = vec![0; range.len() / PAGE_SIZE * 8];
        let offset = (range.start / PAGE_SIZE * 8) as u64;
        File::open("/proc/self/pagemap")?.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|source| Failure::System {
        call: "reading /proc/self/pagemap",
        source,
    })?;
    Ok(bytes
        .chunks_exact(8)
        .map(|word| Entry(u64::from_le_bytes(word.try_into().unwrap_or_default())))
        .collect())
}

/// Mark all pages of this process as not written.
///
/// # Errors
/// The kernel cannot.
pub fn clear_soft_dirty() -> Result<(), Failure> {
    fs::write("/proc/self/clear_refs", "4").map_err(|source| Failure::System {
        call: "writing /proc/self/clear_refs",
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::{PageSize, Region};

    #[test]
    fn touched_pages_are_present() {
        let region = Region::new(4, PageSize::Small, 1).unwrap();
        region.fill(2, 1);
        let present: Vec<_> = entries(region.all())
            .unwrap()
            .into_iter()
            .map(|entry| entry.present() && !entry.swap() && !entry.file())
            .collect();
        assert_eq!(present, [false, false, true, false]);
    }
}
