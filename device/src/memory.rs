//! The private memory of the device.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

#[cfg(not(miri))]
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::{
    fcntl::{FallocateFlags, fallocate},
    sys::mman::{MmapAdvise, madvise},
};
use serde::Serialize;
use vm_memory::{
    FileOffset, MmapRegion, VolatileMemory, VolatileSlice, mmap::MmapRegionError,
    volatile_memory::Error as VolatileError,
};

use crate::abi::VIRTIO_HMM_FRAME_SIZE;

/// Device memory is a multiple of this many bytes, so that a 2 MiB folio of the
/// guest never ends up in half a folio's worth of frames.
pub const GRANULE: u64 = 2 << 20;

/// Most bytes of device memory. The guest needs 64 bytes of its own memory for
/// each frame, 16 GiB at this size.
pub const MAX_SIZE: u64 = 1 << 40;

/// Why device memory cannot be made, cleared or accessed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The size is no multiple of [`GRANULE`] from [`GRANULE`] to [`MAX_SIZE`].
    #[error("memory size {0} is not a multiple of 2M from 2M to 1T")]
    Size(u64),
    /// The host has less memory than was asked for.
    #[error("memory size {size} exceeds the {available} bytes available on this host")]
    TooLittle {
        /// Bytes asked for.
        size: u64,
        /// Bytes available.
        available: u64,
    },
    /// The memory cannot be created.
    #[error("cannot create device memory")]
    Create(#[source] io::Error),
    /// The memory cannot be mapped.
    #[error("cannot map device memory")]
    Map(#[source] MmapRegionError),
    /// The host has no pages left for the memory.
    #[error("cannot allocate device memory")]
    Allocate(#[source] io::Error),
    /// The host has too few free huge pages.
    #[error("{free} huge pages of 2M are free, {needed} are needed")]
    HugePages {
        /// Huge pages that memory of this size takes.
        needed: u64,
        /// Those that are free.
        free: u64,
    },
    /// The pages cannot be given back.
    #[error("cannot clear device memory")]
    Clear(#[source] io::Error),
    /// The range is not inside device memory.
    #[error("range outside device memory")]
    Range(#[source] VolatileError),
}

/// What device memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// Pages that the host allocates on first use. They are huge where the host allows
    /// that for shared memory (`/sys/kernel/mm/transparent_hugepage/shmem_enabled`).
    #[default]
    Sparse,
    /// The same, allocated and mapped at the start.
    Prefault,
    /// Huge pages of 2 MiB that the host has set aside (`vm.nr_hugepages`), at the start.
    HugePages,
}

/// How much of the memory is used, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// There are.
    pub size: u64,
    /// The host has allocated now.
    pub used: u64,
    /// The host had allocated at most, as far as anybody looked: whoever asked,
    /// and the device each time before it gave some back.
    pub peak: u64,
    /// Cleared since the session began, for a request or at its end.
    pub cleared: u64,
}

/// Memory of the device, in a memfd. The guest never sees a mapping of it.
#[derive(Debug)]
pub struct Memory {
    region: MmapRegion,
    backing: Backing,
    peak: AtomicU64,
    cleared: AtomicU64,
}

impl Memory {
    /// Makes `size` bytes of zero-filled memory.
    ///
    /// # Errors
    /// If the size is out of range, the host has less memory available than
    /// `size`, or it refuses the memory or the mapping.
    pub fn new(size: u64, backing: Backing) -> Result<Self, Error> {
        if size == 0 || size > MAX_SIZE || !size.is_multiple_of(GRANULE) {
            return Err(Error::Size(size));
        }
        if backing == Backing::HugePages {
            let (needed, free) = (size / GRANULE, free_huge_pages());
            if free < needed {
                return Err(Error::HugePages { needed, free });
            }
        } else if let Some(available) = available().filter(|available| *available < size) {
            return Err(Error::TooLittle { size, available });
        }
        let length = usize::try_from(size).map_err(|_| Error::Size(size))?;
        let region = map(length, backing)?;
        let memory = Self {
            region,
            backing,
            peak: AtomicU64::new(0),
            cleared: AtomicU64::new(0),
        };
        // Fails where the kernel has no transparent huge pages, or already has others here.
        let _ = memory.advise(MmapAdvise::MADV_HUGEPAGE);
        if backing != Backing::Sparse {
            memory
                .advise(MmapAdvise::MADV_POPULATE_WRITE)
                .map_err(Error::Allocate)?;
        }
        Ok(memory)
    }

    /// Bytes of memory.
    pub fn size(&self) -> u64 {
        self.region.size() as u64
    }

    /// Frames of memory.
    pub fn frames(&self) -> u64 {
        self.size() / u64::from(VIRTIO_HMM_FRAME_SIZE)
    }

    /// `len` bytes from byte `offset`.
    ///
    /// # Errors
    /// If the range does not lie inside the memory.
    pub fn slice(&self, offset: u64, len: usize) -> Result<VolatileSlice<'_>, Error> {
        // An offset that does not fit is out of range, which get_slice reports.
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        self.region.get_slice(offset, len).map_err(Error::Range)
    }

    /// Makes `len` bytes from `offset` read as zero. Sparse memory is given back to the
    /// host; other memory stays allocated.
    ///
    /// # Errors
    /// If the range does not lie inside the memory, or the host refuses.
    pub fn clear(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.used();
        if self.backing == Backing::Sparse {
            let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            self.fallocate(punch, offset, len).map_err(Error::Clear)?;
        } else {
            // A page that was given back may be gone when it is needed again.
            self.fill(offset, usize::try_from(len).unwrap_or(usize::MAX))?;
        }
        self.cleared.fetch_add(len, Relaxed);
        Ok(())
    }

    /// Writes zeros to `len` bytes from `offset`.
    ///
    /// # Errors
    /// If the range does not lie inside the memory; nothing is written then.
    pub fn fill(&self, offset: u64, len: usize) -> Result<(), Error> {
        let slice = self.slice(offset, len)?;
        // SAFETY: the slice is a checked range of a mapping that lives as long
        // as `self`; no reference to these bytes ever exists, only raw copies.
        unsafe { ptr::write_bytes(slice.ptr_guard_mut().as_ptr(), 0, slice.len()) };
        Ok(())
    }

    /// How much of it is used.
    pub fn usage(&self) -> Usage {
        Usage {
            size: self.size(),
            used: self.used(),
            peak: self.peak.load(Relaxed),
            cleared: self.cleared.load(Relaxed),
        }
    }

    /// Begins to count anew.
    pub fn begin_session(&self) {
        self.peak.store(0, Relaxed);
        self.cleared.store(0, Relaxed);
    }

    /// Bytes that the host has allocated.
    fn used(&self) -> u64 {
        let file = self.region.file_offset().map(FileOffset::file);
        // Nothing is known of a memory without a file, and there is none.
        let metadata = file.and_then(|file| file.metadata().ok());
        let used = metadata.map_or(0, |metadata| metadata.blocks() * 512);
        self.peak.fetch_max(used, Relaxed);
        used
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let out_of_range = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let offset = offset.try_into().map_err(out_of_range)?;
        let len = len.try_into().map_err(out_of_range)?;
        match self.region.file_offset() {
            Some(memory) => Ok(fallocate(memory.file(), flags, offset, len)?),
            None => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Advises the kernel about all of the memory.
    fn advise(&self, advice: MmapAdvise) -> io::Result<()> {
        if cfg!(miri) {
            return Ok(());
        }
        let start = NonNull::new(self.region.as_ptr()).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the range is all of a mapping that `self` owns, and what is asked for,
        // huge pages or to allocate pages now, changes none of its bytes.
        Ok(unsafe { madvise(start.cast(), self.region.size(), advice) }?)
    }
}

/// Huge pages of 2 MiB that the host has set aside and not given out or promised.
fn free_huge_pages() -> u64 {
    let read = |name| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}");
        fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()
    };
    let (free, promised) = (read("free_hugepages"), read("resv_hugepages"));
    free.unwrap_or(0).saturating_sub(promised.unwrap_or(0))
}

#[cfg(not(miri))]
fn map(length: usize, backing: Backing) -> Result<MmapRegion, Error> {
    let flags = match backing {
        Backing::Sparse | Backing::Prefault => MFdFlags::MFD_CLOEXEC,
        Backing::HugePages => {
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB
        }
    };
    let file: fs::File = memfd_create("hmm-device-memory", flags)
        .map_err(|e| Error::Create(e.into()))?
        .into();
    file.set_len(length as u64).map_err(Error::Create)?;
    MmapRegion::from_file(FileOffset::new(file, 0), length).map_err(Error::Map)
}

/// Miri can map no files, nor be advised. Such memory cannot be cleared.
#[cfg(miri)]
fn map(length: usize, _: Backing) -> Result<MmapRegion, Error> {
    MmapRegion::new(length).map_err(Error::Map)
}

/// Bytes that the host says can be had without swapping, if it says so.
fn available() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn sizes_out_of_range_are_refused() {
        for size in [
            0,
            4096,
            GRANULE - 4096,
            GRANULE + 4096,
            MAX_SIZE + GRANULE,
            u64::MAX,
        ] {
            assert!(matches!(Memory::new(size, Backing::Sparse), Err(Error::Size(s)) if s == size));
        }
        assert!(matches!(
            Memory::new(MAX_SIZE, Backing::Sparse),
            Err(Error::TooLittle { .. })
        ));
    }

    #[test]
    fn cleared_bytes_read_as_zero_and_their_neighbours_stay() {
        for backing in [Backing::Sparse, Backing::Prefault] {
            let memory = Memory::new(GRANULE, backing).unwrap();
            memory
                .slice(0, 3 * 4096)
                .unwrap()
                .write_slice(&[7; 3 * 4096], 0)
                .unwrap();
            memory.clear(4096, 4096).unwrap();
            let mut bytes = [1; 3 * 4096];
            memory
                .slice(0, 3 * 4096)
                .unwrap()
                .read_slice(&mut bytes, 0)
                .unwrap();
            assert!(bytes[..4096].iter().all(|b| *b == 7));
            assert!(bytes[4096..8192].iter().all(|b| *b == 0));
            assert!(bytes[8192..].iter().all(|b| *b == 7));
        }
    }

    #[test]
    fn usage_is_what_the_host_has_allocated() {
        let memory = Memory::new(2 * GRANULE, Backing::Sparse).unwrap();
        assert_eq!(memory.usage().used, 0);
        memory.slice(0, 4096).unwrap().write_obj(1_u8, 0).unwrap();
        let used = memory.usage().used;
        assert!((4096..=GRANULE).contains(&used), "{used}");
        memory.clear(0, GRANULE).unwrap();
        let expected = Usage {
            size: 2 * GRANULE,
            used: 0,
            peak: used,
            cleared: GRANULE,
        };
        assert_eq!(memory.usage(), expected);
        memory.begin_session();
        assert_eq!(memory.usage().cleared, 0);
        let memory = Memory::new(GRANULE, Backing::Prefault).unwrap();
        assert_eq!(memory.usage().used, GRANULE);
    }

    #[test]
    fn huge_pages_are_those_that_are_free() {
        let free = free_huge_pages();
        let result = Memory::new((free + 1) * GRANULE, Backing::HugePages);
        assert!(
            matches!(result, Err(Error::HugePages { needed, free: f }) if needed == free + 1 && f == free),
            "{result:?}"
        );
        if free == 0 {
            eprintln!("not tried: no huge page of 2M is free here (vm.nr_hugepages)");
            return;
        }
        let memory = Memory::new(GRANULE, Backing::HugePages).unwrap();
        assert_eq!(memory.usage().used, GRANULE);
        memory
            .slice(0, 4096)
            .unwrap()
            .write_slice(&[7; 4096], 0)
            .unwrap();
        memory.clear(0, 2048).unwrap();
        let mut bytes = [1; 4096];
        memory
            .slice(0, 4096)
            .unwrap()
            .read_slice(&mut bytes, 0)
            .unwrap();
        assert!(bytes[..2048].iter().all(|b| *b == 0));
        assert!(bytes[2048..].iter().all(|b| *b == 7));
        assert_eq!(memory.usage().used, GRANULE);
    }

    #[test]
    fn slices_stay_inside() {
        let memory = Memory::new(GRANULE, Backing::Sparse).unwrap();
        assert_eq!(memory.frames(), 512);
        assert!(memory.slice(GRANULE - 1, 1).is_ok());
        assert!(memory.slice(GRANULE - 1, 2).is_err());
        assert!(memory.slice(u64::MAX, 1).is_err());
    }
}
