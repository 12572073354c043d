//! The private memory of the device.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use nix::{
    fcntl::{FallocateFlags, fallocate},
    sys::memfd::{MFdFlags, memfd_create},
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
    /// The pages cannot be given back.
    #[error("cannot clear device memory")]
    Clear(#[source] io::Error),
    /// The range is not inside device memory.
    #[error("range outside device memory")]
    Range(#[source] VolatileError),
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
    /// Given back since the session began.
    pub cleared: u64,
}

/// Memory of the device, in a memfd. The guest never sees a mapping of it.
#[derive(Debug)]
pub struct Memory {
    region: MmapRegion,
    prefault: bool,
    peak: AtomicU64,
    cleared: AtomicU64,
}

impl Memory {
    /// Makes `size` bytes of zero-filled memory, allocated at once if
    /// `prefault`, else on first use.
    ///
    /// # Errors
    /// If the size is out of range, the host has less memory available than
    /// `size`, or it refuses the memory or the mapping.
    pub fn new(size: u64, prefault: bool) -> Result<Self, Error> {
        if size == 0 || size > MAX_SIZE || !size.is_multiple_of(GRANULE) {
            return Err(Error::Size(size));
        }
        if let Some(available) = available().filter(|available| *available < size) {
            return Err(Error::TooLittle { size, available });
        }
        let length = usize::try_from(size).map_err(|_| Error::Size(size))?;
        let file: fs::File = memfd_create("hmm-device-memory", MFdFlags::MFD_CLOEXEC)
            .map_err(|e| Error::Create(e.into()))?
            .into();
        file.set_len(size).map_err(Error::Create)?;
        let region = MmapRegion::from_file(FileOffset::new(file, 0), length).map_err(Error::Map)?;
        let memory = Self {
            region,
            prefault,
            peak: AtomicU64::new(0),
            cleared: AtomicU64::new(0),
        };
        if prefault {
            memory
                .fallocate(FallocateFlags::empty(), 0, size)
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

    /// Gives `len` bytes from `offset` back to the host; they read as zero
    /// afterwards. Prefaulted memory is allocated again at once.
    ///
    /// # Errors
    /// If the host refuses.
    pub fn clear(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.used();
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.fallocate(punch, offset, len).map_err(Error::Clear)?;
        self.cleared.fetch_add(len, Relaxed);
        if self.prefault {
            self.fallocate(FallocateFlags::empty(), offset, len)
                .map_err(Error::Allocate)?;
        }
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
            assert!(matches!(Memory::new(size, false), Err(Error::Size(s)) if s == size));
        }
        assert!(matches!(
            Memory::new(MAX_SIZE, false),
            Err(Error::TooLittle { .. })
        ));
    }

    #[test]
    fn cleared_bytes_read_as_zero_and_their_neighbours_stay() {
        for prefault in [false, true] {
            let memory = Memory::new(GRANULE, prefault).unwrap();
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
        let memory = Memory::new(2 * GRANULE, false).unwrap();
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
        let memory = Memory::new(GRANULE, true).unwrap();
        assert_eq!(memory.usage().used, GRANULE);
    }

    #[test]
    fn slices_stay_inside() {
        let memory = Memory::new(GRANULE, false).unwrap();
        assert_eq!(memory.frames(), 512);
        assert!(memory.slice(GRANULE - 1, 1).is_ok());
        assert!(memory.slice(GRANULE - 1, 2).is_err());
        assert!(memory.slice(u64::MAX, 1).is_err());
    }
}
