//! Private anonymous memory whose pages carry patterns.

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_hmm_client::PAGE_SIZE;

use crate::failure::Failure;
use crate::pattern::{Mismatch, Pattern, WORDS, first_difference};
use crate::shared::LOST;

/// Pages in 2 MiB, what one page-table page or one huge page covers.
pub const PMD_PAGES: usize = 512;

/// Pages in 1 GiB.
pub const PUD_PAGES: usize = 512 * PMD_PAGES;

/// What may be done with pages, for [`Region::protect`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing.
    None,
    /// Read.
    Read,
    /// Read and write.
    Write,
}

/// Whether the kernel may use huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB only.
    Small,
    /// Huge pages where they fit.
    Huge,
}

/// A private anonymous mapping, unmapped when it is dropped. Pages are counted from
/// its start. All access is atomic, since several threads and the kernel use it.
#[derive(Debug)]
pub struct Region {
    base: usize,
    pages: usize,
    first: usize,
    seed: u64,
}

impl Region {
    /// Map `pages` pages that nothing has touched, at a multiple of 2 MiB.
    ///
    /// # Errors
    /// The mapping fails.
    pub fn new(pages: usize, page_size: PageSize, seed: u64) -> Result<Self, Failure> {
        Self::aligned(pages, PMD_PAGES, page_size, seed)
    }

    /// Map `pages` untouched pages at a multiple of `alignment` pages, a power of two.
    ///
    /// # Errors
    /// The mapping fails.
    pub fn aligned(
        pages: usize,
        alignment: usize,
        page_size: PageSize,
        seed: u64,
    ) -> Result<Self, Failure> {
        let region = Self {
            base: reserve(pages, alignment)?,
            pages,
            first: 0,
            seed,
        };
        region.advise(
            0..pages,
            match page_size {
                PageSize::Small => libc::MADV_NOHUGEPAGE,
                PageSize::Huge => libc::MADV_HUGEPAGE,
            },
        )?;
        Ok(region)
    }

    /// Map `pages` pages of another kind of memory, for reading and writing: `flags` and
    /// `file` as for mmap.
    ///
    /// # Errors
    /// The mapping fails.
    pub fn of_kind(
        pages: usize,
        flags: libc::c_int,
        file: Option<BorrowedFd<'_>>,
        seed: u64,
    ) -> Result<Self, Failure> {
        let fd = file.map_or(-1, |file| file.as_raw_fd());
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing.
        let base =
            unsafe { libc::mmap(ptr::null_mut(), pages * PAGE_SIZE, protection, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(Failure::system("mmap"));
        }
        // SAFETY: the mapping is new, that long and writable.
        Ok(unsafe { Self::adopt(base as usize, pages, seed) })
    }

    /// Take over the mapping of `pages` pages at `base`.
    ///
    /// # Safety
    /// It is readable and writable, and nothing else refers to it.
    pub(crate) unsafe fn adopt(base: usize, pages: usize, seed: u64) -> Self {
        Self {
            base,
            pages,
            first: 0,
            seed,
        }
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Addresses of all pages.
    #[must_use]
    pub fn all(&self) -> Range<usize> {
        self.range(0..self.pages)
    }

    /// Addresses of `pages`, which may lie outside the region: only the calls that
    /// take addresses see them.
    #[must_use]
    pub fn range(&self, pages: Range<usize>) -> Range<usize> {
        self.base + pages.start * PAGE_SIZE..self.base + pages.end * PAGE_SIZE
    }

    /// The words of `page`.
    #[must_use]
    pub fn words(&self, page: usize) -> &[AtomicU64; WORDS] {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        // SAFETY: the page lies in the mapping, which lives as long as `self`, is
        // aligned, and every bit pattern is valid. Others change it only through
        // atomics or by the kernel's hand. Protected pages end in a signal.
        unsafe { &*((self.base + page * PAGE_SIZE) as *const [AtomicU64; WORDS]) }
    }

    /// What `page` holds in `generation`.
    #[must_use]
    pub fn pattern(&self, page: usize, generation: u64) -> Pattern {
        Pattern::new(self.seed, (self.first + page) as u64, generation)
    }

    /// Write `generation` to every byte of `page`.
    pub fn fill(&self, page: usize, generation: u64) {
        let pattern = self.pattern(page, generation);
        for (word, value) in self.words(page).iter().zip(pattern.words()) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Write `generation` to every byte of all pages.
    pub fn fill_all(&self, generation: u64) {
        for page in 0..self.pages {
            self.fill(page, generation);
        }
    }

    /// Read one byte of `page`.
    pub fn touch(&self, page: usize) {
        self.words(page)[0].load(Ordering::Relaxed);
    }

    /// Compare every byte of `page` with `generation`; generation 0 is all zeros.
    ///
    /// # Errors
    /// The first byte that differs.
    pub fn check(&self, page: usize, generation: u64) -> Result<(), Mismatch> {
        let pattern = self.pattern(page, generation);
        for (index, (word, expected)) in self.words(page).iter().zip(pattern.words()).enumerate() {
            let seen = word.load(Ordering::Relaxed);
            if let Some((offset, expected, seen)) = first_difference(expected, seen) {
                return Err(Mismatch {
                    region: self.seed,
                    page: (self.first + page) as u64,
                    address: self.base + page * PAGE_SIZE,
                    offset: index * 8 + offset,
                    expected,
                    seen,
                    generation,
                });
            }
        }
        Ok(())
    }

    /// Whether `page` was lost, which whoever touched it was told by SIGBUS.
    #[must_use]
    pub fn is_lost(&self, page: usize) -> bool {
        let mut words = self.words(page).iter();
        words.all(|word| word.load(Ordering::Relaxed) == LOST)
    }

    /// Change what may be done with `pages`. An access that is not allowed ends the
    /// process.
    ///
    /// # Errors
    /// mprotect fails.
    pub fn protect(&self, pages: Range<usize>, access: Access) -> Result<(), Failure> {
        let protection = match access {
            Access::None => libc::PROT_NONE,
            Access::Read => libc::PROT_READ,
            Access::Write => libc::PROT_READ | libc::PROT_WRITE,
        };
        let range = self.clamped(pages);
        // SAFETY: the range lies in this mapping. Protection changes no contents.
        let result =
            unsafe { libc::mprotect(range.start as *mut _, range.end - range.start, protection) };
        if result != 0 {
            return Err(Failure::system("mprotect"));
        }
        Ok(())
    }

    /// Throw the contents of `pages` away: they read as zero afterwards.
    ///
    /// # Errors
    /// madvise fails.
    pub fn discard(&self, pages: Range<usize>) -> Result<(), Failure> {
        self.advise(pages, libc::MADV_DONTNEED)
    }

    /// Ask the kernel to swap `pages` out.
    ///
    /// # Errors
    /// madvise fails.
    pub fn page_out(&self, pages: Range<usize>) -> Result<(), Failure> {
        self.advise(pages, libc::MADV_PAGEOUT)
    }

    /// Leave `pages` out of core dumps.
    ///
    /// # Errors
    /// madvise fails.
    pub fn leave_out_of_dumps(&self, pages: Range<usize>) -> Result<(), Failure> {
        self.advise(pages, libc::MADV_DONTDUMP)
    }

    /// Give the kernel an advice of madvise on `pages`.
    ///
    /// # Errors
    /// madvise fails.
    pub fn advise(&self, pages: Range<usize>, advice: libc::c_int) -> Result<(), Failure> {
        let range = self.clamped(pages);
        // SAFETY: the range lies in this mapping, whose words are only seen as atomics,
        // so that even advice that discards contents changes nothing Rust relies on.
        let result =
            unsafe { libc::madvise(range.start as *mut _, range.end - range.start, advice) };
        if result != 0 {
            return Err(Failure::system("madvise"));
        }
        Ok(())
    }

    fn clamped(&self, pages: Range<usize>) -> Range<usize> {
        self.range(pages.start.min(self.pages)..pages.end.min(self.pages))
    }

    /// Part the region before `page`; each part is unmapped by itself. Patterns stay
    /// with their pages.
    #[must_use]
    pub fn split_at(self, page: usize) -> (Self, Self) {
        let page = page.min(self.pages);
        let left = Self {
            pages: page,
            ..self
        };
        let right = Self {
            base: self.base + page * PAGE_SIZE,
            pages: self.pages - page,
            first: self.first + page,
            seed: self.seed,
        };
        std::mem::forget(self);
        (left, right)
    }

    /// Move the region to other addresses with mremap, the contents with it.
    ///
    /// # Errors
    /// mremap fails; the region is unmapped then.
    pub fn relocate(self) -> Result<Self, Failure> {
        let length = self.pages * PAGE_SIZE;
        let target = reserve(self.pages, PMD_PAGES)?;
        // SAFETY: the old range is this mapping, which `self` gives up; the new one was
        // reserved just now and nothing else refers to it.
        let moved = unsafe {
            libc::mremap(
                self.base as *mut _,
                length,
                length,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                target as *mut libc::c_void,
            )
        };
        if moved == libc::MAP_FAILED {
            return Err(Failure::system("mremap"));
        }
        let relocated = Self {
            base: target,
            ..self
        };
        std::mem::forget(self);
        Ok(relocated)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        unmap(self.base, self.pages * PAGE_SIZE);
    }
}

/// Map `pages` pages at a multiple of `alignment` pages, and return the address.
fn reserve(pages: usize, alignment: usize) -> Result<usize, Failure> {
    let length = pages * PAGE_SIZE;
    let alignment = alignment * PAGE_SIZE;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing.
    let start = unsafe {
        libc::mmap(
            ptr::null_mut(),
            length + alignment,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(Failure::system("mmap"));
    }
    let start = start as usize;
    let base = start.next_multiple_of(alignment);
    unmap(start, base - start);
    unmap(base + length, start + alignment - base);
    Ok(base)
}

fn unmap(start: usize, length: usize) {
    if length > 0 {
        // SAFETY: callers pass addresses that they mapped and that nothing uses any
        // more. It cannot fail in a way that matters: the range is a valid one.
        unsafe { libc::munmap(start as *mut _, length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_hold_what_was_written() {
        let region = Region::new(4, PageSize::Small, 11).unwrap();
        region.fill(2, 5);
        region.check(2, 5).unwrap();
        region.check(1, 0).unwrap();
        region.words(2)[100].store(0, Ordering::Relaxed);
        let mismatch = region.check(2, 5).unwrap_err();
        assert_eq!((mismatch.page, mismatch.offset, mismatch.seen), (2, 800, 0));
        assert_eq!(region.check(2, 6).unwrap_err().offset, 0);
    }

    #[test]
    fn patterns_stay_with_their_pages() {
        let region = Region::new(8, PageSize::Small, 3).unwrap();
        region.fill_all(1);
        let (left, rest) = region.split_at(3);
        let (middle, right) = rest.split_at(2);
        drop(middle);
        let right = right.relocate().unwrap();
        (0..3).for_each(|page| left.check(page, 1).unwrap());
        (0..3).for_each(|page| right.check(page, 1).unwrap());
    }

    #[test]
    fn discarded_pages_are_zero() {
        let region = Region::new(4, PageSize::Small, 3).unwrap();
        region.fill_all(1);
        region.discard(1..3).unwrap();
        for (page, generation) in [1, 0, 0, 1].into_iter().enumerate() {
            region.check(page, generation).unwrap();
        }
    }

    #[test]
    fn alignment_is_kept() {
        let region = Region::aligned(1, PUD_PAGES, PageSize::Small, 1).unwrap();
        assert_eq!(region.all().start % (PUD_PAGES * PAGE_SIZE), 0);
    }
}
