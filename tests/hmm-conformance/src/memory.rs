//! Memory that the program and the device know by the same addresses.
//!
//! The device is given guest-physical addresses and does not translate them. So the memory is
//! huge pages, which stay where they are and are contiguous, and the IOMMU maps each at its
//! physical address.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion, mmap::MmapRegionBuilder,
};

use crate::failure::{Failure, Result};

/// Bytes of a page and of a frame.
pub const PAGE: usize = 4096;
/// Bytes of a huge page; no buffer is longer.
pub const HUGE_PAGE: usize = 2 << 20;
/// Huge pages that the program needs.
pub const HUGE_PAGES: usize = 8;

/// Bit of a pagemap entry: the page is there.
const PRESENT: u64 = 1 << 63;
/// Bits of a pagemap entry: number of the page frame.
const FRAME: u64 = (1 << 55) - 1;

/// The memory, and how much of it is used.
#[derive(Debug)]
pub struct Memory {
    /// The huge pages, each a region at its physical address.
    pub pages: GuestMemoryMmap,
    starts: Vec<u64>,
    next: Mark,
}

/// A place between what is used and what is not.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mark {
    page: usize,
    offset: usize,
}

impl Memory {
    /// Takes the huge pages.
    ///
    /// # Errors
    /// There are too few, or their addresses are not told.
    pub fn new() -> Result<Self> {
        let mut regions = Vec::new();
        for _ in 0..HUGE_PAGES {
            let flags = libc::MAP_PRIVATE
                | libc::MAP_ANONYMOUS
                | libc::MAP_POPULATE
                | libc::MAP_HUGETLB
                | libc::MAP_HUGE_2MB;
            let region: MmapRegion = MmapRegionBuilder::new(HUGE_PAGE)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(flags)
                .build()
                .map_err(|error| {
                    Failure::Unfit(format!(
                        "too few free huge pages of 2 MiB, {HUGE_PAGES} are needed; set \
                         /proc/sys/vm/nr_hugepages ({error})"
                    ))
                })?;
            let start = GuestAddress(physical(region.as_ptr() as u64)?);
            regions.extend(GuestRegionMmap::new(region, start));
        }
        regions.sort_by_key(GuestMemoryRegion::start_addr);
        let pages = GuestMemoryMmap::from_regions(regions)
            .map_err(|error| Failure::Unfit(format!("no memory: {error}")))?;
        let starts = pages.iter().map(|region| region.start_addr().0).collect();
        Ok(Self {
            pages,
            starts,
            next: Mark::default(),
        })
    }

    /// Checks that every page is still where it was, once they are pinned.
    ///
    /// # Errors
    /// One is not.
    pub fn check_addresses(&self) -> Result {
        for (region, start) in self.pages.iter().zip(&self.starts) {
            let address = region.get_host_address(MemoryRegionAddress(0))?;
            if physical(address as u64)? != *start {
                return Err(Failure::Unfit("a huge page has moved; try again".into()));
            }
        }
        Ok(())
    }

    /// How much is used.
    #[must_use]
    pub fn mark(&self) -> Mark {
        self.next
    }

    /// Forgets what was allocated since.
    pub fn release(&mut self, mark: Mark) {
        self.next = mark;
    }

    /// Unused memory of `len` bytes, at most [`HUGE_PAGE`], from a page boundary on.
    ///
    /// # Errors
    /// There is not so much.
    pub fn alloc(&mut self, len: usize) -> Result<u64> {
        if self.next.offset + len > HUGE_PAGE {
            self.next = Mark {
                page: self.next.page + 1,
                offset: 0,
            };
        }
        let start = self.starts.get(self.next.page).filter(|_| len <= HUGE_PAGE);
        let start = start.ok_or_else(|| Failure::Unfit("the program's memory is full".into()))?;
        let at = start + self.next.offset as u64;
        self.next.offset += len.next_multiple_of(PAGE);
        Ok(at)
    }

    /// Puts `bytes` into unused memory.
    ///
    /// # Errors
    /// As for [`Self::alloc`].
    pub fn place(&mut self, bytes: &[u8]) -> Result<(u64, usize)> {
        let at = self.alloc(bytes.len())?;
        self.write(at, bytes)?;
        Ok((at, bytes.len()))
    }

    /// Writes `bytes`.
    ///
    /// # Errors
    /// The address is not the program's.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result {
        Ok(self.pages.write_slice(bytes, GuestAddress(at))?)
    }

    /// Reads `len` bytes.
    ///
    /// # Errors
    /// The address is not the program's.
    pub fn read(&self, at: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.pages.read_slice(&mut bytes, GuestAddress(at))?;
        Ok(bytes)
    }
}

/// The physical address of a page of this process.
fn physical(address: u64) -> Result<u64> {
    const PAGEMAP: &str = "/proc/self/pagemap";
    let failed = |source| Failure::File {
        action: "read",
        path: PAGEMAP.into(),
        source,
    };
    let mut entry = [0; 8];
    let page = PAGE as u64;
    File::open(PAGEMAP)
        .and_then(|file| file.read_exact_at(&mut entry, address / page * 8))
        .map_err(failed)?;
    let entry = u64::from_le_bytes(entry);
    if entry & PRESENT == 0 || entry & FRAME == 0 {
        return Err(Failure::Unfit(
            "physical addresses are told to root alone".into(),
        ));
    }
    Ok((entry & FRAME) * page)
}
