//! Client of `/dev/hmmN`, the user interface of the virtio-hmm driver.
//!
//! ```no_run
//! use virtio_hmm_client::{Device, Direction};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::open("/dev/hmm0")?;
//! # let (address, length) = (0x10000usize, 0x1000usize);
//! let outcome = device.migrate_all(address..address + length, Direction::ToDevice)?;
//! println!("{} pages moved, {} filled", outcome.moved, outcome.filled);
//! # Ok(()) }
//! ```
//!
//! # Why the calls are safe
//! A range is given as plain addresses and need not belong to the caller's Rust
//! objects. Migrating moves the *frame* behind an address and never changes what
//! is read from it, and asking for residency only looks at the page tables. So
//! whatever the range is, no memory that Rust reasons about changes. If the device is
//! lost, pages that were only in its memory are gone: a later access ends in
//! SIGBUS, never in other bytes.

pub mod abi;
pub mod counters;

use std::fs::File;
use std::io;
use std::ops::{AddAssign, Range};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use libc::Ioctl;
use thiserror::Error;

/// Bytes in one page, the unit in which ranges are given and pages counted.
pub const PAGE_SIZE: usize = 4096;

/// Where the driver shows the counters of the device at `device` (`/dev/hmmN`).
#[must_use]
pub fn debugfs_directory(device: &Path) -> PathBuf {
    let root = Path::new("/sys/kernel/debug/virtio_hmm");
    device
        .file_name()
        .map_or_else(|| root.to_owned(), |name| root.join(name))
}

/// The device file could not be opened.
#[derive(Debug, Error)]
#[error("cannot open {path}")]
pub struct OpenError {
    path: PathBuf,
    source: io::Error,
}

/// Why a call failed.
#[derive(Debug, Error)]
pub enum Error {
    /// EINVAL: the range is empty or not page aligned, or a value is unknown.
    #[error("the range is empty or unaligned, or an argument is unknown")]
    Invalid,
    /// EFAULT: part of the range is not mapped.
    #[error("part of the range is not mapped")]
    Unmapped,
    /// EINTR: a signal came.
    #[error("interrupted by a signal")]
    Interrupted,
    /// ENOMEM: the kernel has no memory for the work.
    #[error("no kernel memory for the work")]
    NoMemory,
    /// EIO: the device is broken.
    #[error("the device is broken")]
    Broken,
    /// EBADF: the file was opened by another address space.
    #[error("the file was opened by another process")]
    OtherAddressSpace,
    /// EBUSY: pages did not come home in time.
    #[error("pages stay busy")]
    Busy,
    /// ENODEV: the device is being unbound, or was.
    #[error("the device is gone")]
    Gone,
    /// An errno that the interface does not document.
    #[error("the call failed in an undocumented way")]
    Other(#[source] io::Error),
    /// The driver answered with a value that this client does not know.
    #[error("the driver reported an unknown {what} {value}")]
    Unknown {
        /// Which enumeration.
        what: &'static str,
        /// The value.
        value: u32,
    },
}

impl Error {
    fn from_errno(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EINVAL) => Self::Invalid,
            Some(libc::EFAULT) => Self::Unmapped,
            Some(libc::EINTR) => Self::Interrupted,
            Some(libc::ENOMEM) => Self::NoMemory,
            Some(libc::EIO) => Self::Broken,
            Some(libc::EBADF) => Self::OtherAddressSpace,
            Some(libc::EBUSY) => Self::Busy,
            Some(libc::ENODEV) => Self::Gone,
            _ => Self::Other(error),
        }
    }
}

/// A migration that ended before its range did, or met unmapped addresses.
#[derive(Debug, Error)]
#[error("migration failed after {} bytes", .outcome.done)]
pub struct MigrateError {
    /// What happened up to then; all zero where the interface reports nothing.
    pub outcome: Outcome,
    /// Why it ended.
    pub source: Error,
}

/// Whether the device can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceState {
    /// It works.
    Ok = 0,
    /// It missed a deadline or was lost.
    Broken = 1,
    /// It is being unbound; its pages come home.
    Closing = 2,
}

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Bytes of device memory.
    pub memory_size: u64,
    /// Bytes of it that are free now.
    pub memory_free: u64,
    /// Changes when the contents of the memory were lost.
    pub generation: u64,
    /// Identity of the memory.
    pub uuid: [u8; 16],
    /// Bytes of a frame of device memory.
    pub frame_size: u32,
    /// Number of copy queues.
    pub copy_queues: u32,
    /// Whether it can be used.
    pub state: DeviceState,
}

/// Where to move pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Direction {
    /// From RAM to device memory.
    ToDevice = 0,
    /// From device memory to RAM.
    ToSystem = 1,
}

/// What becomes of pages that are to go to a device whose memory is used up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// The least recently used pages there go home and make room for them.
    #[default]
    Evict,
    /// They stay where they are, [`Skip::NoMemory`].
    Leave,
}

/// How many pages came home, and how many did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Pages that came home.
    pub released: u64,
    /// Pages that did not.
    pub remaining: u64,
}

/// Not all pages came home.
#[derive(Debug, Error)]
#[error("{} pages did not come home", .outcome.remaining)]
pub struct ReleaseError {
    /// What happened up to then; all zero where the interface reports nothing.
    pub outcome: Released,
    /// Why it ended.
    pub source: Error,
}

/// What an open device may use of its memory, and does, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// What it may use; `None` for no limit.
    pub bytes: Option<u64>,
    /// What it uses.
    pub used: u64,
}

/// Why a page stayed where it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Skip {
    /// It was at the destination, or (to RAM) not on this device.
    Already = 0,
    /// Locked, referenced or changing, still so after the driver's retries.
    Busy = 1,
    /// Pinned for DMA.
    Pinned = 2,
    /// In swap.
    Swapped = 3,
    /// In the memory of another device.
    OtherDevice = 4,
    /// A kind of memory that does not migrate.
    Unsupported = 5,
    /// Nothing is mapped there.
    Unmapped = 6,
    /// No free memory at the destination.
    NoMemory = 7,
    /// The device reported an error for it.
    CopyFailed = 8,
}

/// What became of the pages of a range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Bytes that were dealt with, from the start of the range.
    pub done: u64,
    /// Pages copied to the destination.
    pub moved: u64,
    /// Pages that held nothing and are now zero-filled device memory.
    pub filled: u64,
    skipped: [u64; abi::SKIP_NR],
}

impl Outcome {
    /// Pages that stayed where they were for this reason.
    #[must_use]
    pub fn skipped(&self, reason: Skip) -> u64 {
        self.skipped.get(reason as usize).copied().unwrap_or(0)
    }

    /// Pages of every kind together; the driver promises that it is `done` in pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.moved + self.filled + self.skipped.iter().sum::<u64>()
    }
}

impl AddAssign for Outcome {
    fn add_assign(&mut self, other: Self) {
        self.done += other.done;
        self.moved += other.moved;
        self.filled += other.filled;
        for (sum, more) in self.skipped.iter_mut().zip(other.skipped) {
            *sum += more;
        }
    }
}

impl From<&abi::Migrate> for Outcome {
    fn from(raw: &abi::Migrate) -> Self {
        Self {
            done: raw.done,
            moved: raw.moved,
            filled: raw.filled,
            skipped: raw.skipped,
        }
    }
}

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Residency {
    /// Never touched, or not mapped.
    None = 0,
    /// In RAM.
    Ram = 1,
    /// The shared zero page.
    Zero = 2,
    /// In the memory of this device.
    Device = 3,
    /// In the memory of another device.
    OtherDevice = 4,
    /// In swap.
    Swapped = 5,
    /// Being migrated at this moment.
    Moving = 6,
}

impl TryFrom<u8> for Residency {
    type Error = Error;

    fn try_from(value: u8) -> Result<Self, Error> {
        Ok(match value {
            0 => Self::None,
            1 => Self::Ram,
            2 => Self::Zero,
            3 => Self::Device,
            4 => Self::OtherDevice,
            5 => Self::Swapped,
            6 => Self::Moving,
            _ => {
                return Err(Error::Unknown {
                    what: "residency",
                    value: value.into(),
                });
            }
        })
    }
}

impl TryFrom<u32> for DeviceState {
    type Error = Error;

    fn try_from(value: u32) -> Result<Self, Error> {
        Ok(match value {
            0 => Self::Ok,
            1 => Self::Broken,
            2 => Self::Closing,
            _ => {
                return Err(Error::Unknown {
                    what: "device state",
                    value,
                });
            }
        })
    }
}

/// An open device. It acts on the address space of the process that opened it:
/// a forked child opens its own.
#[derive(Debug)]
pub struct Device {
    file: File,
    when_full: WhenFull,
}

impl Device {
    /// Open the device at `path`, `/dev/hmmN`.
    ///
    /// # Errors
    /// The file is not there, or not for this user.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| OpenError {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self {
            file,
            when_full: WhenFull::default(),
        })
    }

    /// The same device, for which migrations do this when its memory is used up.
    #[must_use]
    pub fn when_full(self, when_full: WhenFull) -> Self {
        Self { when_full, ..self }
    }

    /// Describe the device, whatever its state.
    ///
    /// # Errors
    /// [`Error::Gone`]
    pub fn info(&self) -> Result<Info, Error> {
        let mut raw = abi::Info::default();
        // SAFETY: the call writes one `abi::Info` at its argument, which is one.
        unsafe { self.call(abi::IOCTL_INFO, &mut raw) }?;
        Ok(Info {
            memory_size: raw.memory_size,
            memory_free: raw.memory_free,
            generation: raw.generation,
            uuid: raw.uuid,
            frame_size: raw.frame_size,
            copy_queues: raw.copy_queues,
            state: raw.state.try_into()?,
        })
    }

    /// Migrate the pages of `range`, addresses in bytes. Pages that cannot move are
    /// skipped and counted. A signal can end the call between two batches;
    /// [`Device::migrate_all`] goes on after it.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unmapped`] (the mapped pages were dealt with),
    /// [`Error::Interrupted`], [`Error::NoMemory`], [`Error::Broken`],
    /// [`Error::OtherAddressSpace`] or [`Error::Gone`], each with what was done.
    pub fn migrate(
        &self,
        range: Range<usize>,
        direction: Direction,
    ) -> Result<Outcome, MigrateError> {
        let mut raw = abi::Migrate {
            start: range.start as u64,
            length: range.len() as u64,
            direction: direction as u32,
            flags: match self.when_full {
                WhenFull::Evict => 0,
                WhenFull::Leave => abi::MIGRATE_NO_EVICT,
            },
            ..abi::Migrate::default()
        };
        // SAFETY: the call reads and writes one `abi::Migrate` at its argument, which
        // is one. It moves pages of the range without changing what they hold.
        let result = unsafe { self.call(abi::IOCTL_MIGRATE, &mut raw) };
        let outcome = Outcome::from(&raw);
        match result {
            Ok(()) => Ok(outcome),
            Err(source) => Err(MigrateError { outcome, source }),
        }
    }

    /// Migrate the pages of `range` as [`Device::migrate`] does, and go on whenever
    /// a signal interrupts.
    ///
    /// # Errors
    /// As for [`Device::migrate`], without [`Error::Interrupted`]; the outcome is
    /// that of all the calls together.
    pub fn migrate_all(
        &self,
        mut range: Range<usize>,
        direction: Direction,
    ) -> Result<Outcome, MigrateError> {
        let mut outcome = Outcome::default();
        loop {
            match self.migrate(range.clone(), direction) {
                Ok(part) => {
                    outcome += part;
                    return Ok(outcome);
                }
                Err(MigrateError {
                    outcome: part,
                    source: Error::Interrupted,
                }) => {
                    outcome += part;
                    let done = usize::try_from(part.done).unwrap_or(range.len());
                    range.start = range.start.saturating_add(done).min(range.end);
                    if range.is_empty() {
                        return Ok(outcome);
                    }
                }
                Err(mut error) => {
                    outcome += error.outcome;
                    error.outcome = outcome;
                    return Err(error);
                }
            }
        }
    }

    /// Bring home what of `range`, addresses in bytes, is on the device. Unlike
    /// [`Device::migrate`] it leaves no page that is only busy, and it does not
    /// mind addresses that are not mapped.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Busy`], [`Error::Interrupted`],
    /// [`Error::NoMemory`], [`Error::Broken`], [`Error::OtherAddressSpace`] or
    /// [`Error::Gone`] (then all pages are home).
    pub fn release(&self, range: Range<usize>) -> Result<Released, ReleaseError> {
        self.call_release(abi::Release {
            start: range.start as u64,
            length: range.len() as u64,
            ..abi::Release::default()
        })
    }

    /// Bring home all that was migrated through this open device, wherever it is
    /// mapped by now.
    ///
    /// # Errors
    /// As for [`Device::release`].
    pub fn release_all(&self) -> Result<Released, ReleaseError> {
        self.call_release(abi::Release {
            flags: abi::RELEASE_ALL,
            ..abi::Release::default()
        })
    }

    fn call_release(&self, mut raw: abi::Release) -> Result<Released, ReleaseError> {
        // SAFETY: the call reads and writes one `abi::Release` at its argument, which
        // is one. It moves pages without changing what they hold.
        let result = unsafe { self.call(abi::IOCTL_RELEASE, &mut raw) };
        let outcome = Released {
            released: raw.released,
            remaining: raw.remaining,
        };
        match result {
            Ok(()) => Ok(outcome),
            Err(source) => Err(ReleaseError { outcome, source }),
        }
    }

    /// What this open device may use of its memory.
    ///
    /// # Errors
    /// [`Error::OtherAddressSpace`] or [`Error::Gone`].
    pub fn limit(&self) -> Result<Limit, Error> {
        self.call_limit(abi::Limit::default())
    }

    /// Limit what this open device may use of its memory to `bytes`, a multiple of
    /// the page size. Beyond it its own least recently used pages go home.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::OtherAddressSpace`] or [`Error::Gone`].
    pub fn set_limit(&self, bytes: Option<u64>) -> Result<Limit, Error> {
        self.call_limit(abi::Limit {
            bytes: bytes.unwrap_or(u64::MAX),
            flags: abi::LIMIT_SET,
            ..abi::Limit::default()
        })
    }

    fn call_limit(&self, mut raw: abi::Limit) -> Result<Limit, Error> {
        // SAFETY: the call reads and writes one `abi::Limit` at its argument, which is
        // one.
        unsafe { self.call(abi::IOCTL_LIMIT, &mut raw) }?;
        Ok(Limit {
            bytes: (raw.bytes != u64::MAX).then_some(raw.bytes),
            used: raw.used,
        })
    }

    /// Where each page of `range` is, addresses in bytes. It is a snapshot, and may be
    /// out of date at once.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Interrupted`], [`Error::NoMemory`],
    /// [`Error::OtherAddressSpace`] or [`Error::Gone`].
    pub fn query(&self, range: Range<usize>) -> Result<Vec<Residency>, Error> {
        let mut bytes = Vec::new();
        let pages = range.len().div_ceil(PAGE_SIZE);
        bytes
            .try_reserve_exact(pages)
            .map_err(|_| Error::NoMemory)?;
        bytes.resize(pages, 0u8);
        let mut raw = abi::Query {
            start: range.start as u64,
            length: range.len() as u64,
            residency: bytes.as_mut_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the call reads one `abi::Query` at its argument, which is one, and
        // writes one byte for each page of the range at `residency`, where `bytes`
        // has as many.
        unsafe { self.call(abi::IOCTL_QUERY, &mut raw) }?;
        bytes.into_iter().map(Residency::try_from).collect()
    }

    /// # Safety
    /// `request` must only access memory that may be accessed: `T` at `argument`, and
    /// what its fields point at.
    unsafe fn call<T>(&self, request: Ioctl, argument: &mut T) -> Result<(), Error> {
        // SAFETY: the descriptor is open and `argument` is a live, exclusive
        // reference; the caller answers for the rest.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request, argument) };
        if result == -1 {
            return Err(Error::from_errno(io::Error::last_os_error()));
        }
        Ok(())
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documented_errnos_have_their_own_error() {
        let of = |errno| Error::from_errno(io::Error::from_raw_os_error(errno));
        assert!(matches!(of(libc::EINVAL), Error::Invalid));
        assert!(matches!(of(libc::EFAULT), Error::Unmapped));
        assert!(matches!(of(libc::EINTR), Error::Interrupted));
        assert!(matches!(of(libc::ENOMEM), Error::NoMemory));
        assert!(matches!(of(libc::EIO), Error::Broken));
        assert!(matches!(of(libc::EBADF), Error::OtherAddressSpace));
        assert!(matches!(of(libc::EBUSY), Error::Busy));
        assert!(matches!(of(libc::ENODEV), Error::Gone));
        assert!(matches!(of(libc::ENOTTY), Error::Other(_)));
    }

    #[test]
    fn a_file_that_is_no_device_says_so() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let device = Device::open(file.path()).unwrap();
        assert!(matches!(device.info(), Err(Error::Other(_))));
        let missing = Device::open("/nonexistent/hmm0").unwrap_err();
        assert_eq!(missing.to_string(), "cannot open /nonexistent/hmm0");
    }

    #[test]
    fn a_range_too_large_to_answer_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let device = Device::open(file.path()).unwrap();
        assert!(matches!(
            device.query(0..usize::MAX),
            Err(Error::NoMemory | Error::Other(_))
        ));
    }

    #[test]
    fn outcomes_add_up() {
        let mut sum = Outcome::default();
        let mut part = Outcome {
            done: 3 * PAGE_SIZE as u64,
            moved: 1,
            filled: 1,
            skipped: [0; abi::SKIP_NR],
        };
        part.skipped[Skip::Busy as usize] = 1;
        sum += part;
        sum += part;
        assert_eq!(sum.done, 6 * PAGE_SIZE as u64);
        assert_eq!(sum.pages(), 6);
        assert_eq!(sum.skipped(Skip::Busy), 2);
        assert_eq!(sum.skipped(Skip::Pinned), 0);
    }

    #[test]
    fn counters_are_found_by_the_name_of_the_device() {
        assert_eq!(
            debugfs_directory(Path::new("/dev/hmm3")),
            Path::new("/sys/kernel/debug/virtio_hmm/hmm3")
        );
    }
}
