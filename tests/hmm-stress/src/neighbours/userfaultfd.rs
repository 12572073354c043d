//! A userfaultfd: a file that tells of faults on ranges, which wait for an answer.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use virtio_hmm_client::PAGE_SIZE;

use crate::failure::Failure;
use crate::region::Region;
use crate::require;

// linux/userfaultfd.h, which the libc crate does not have.
const API: u64 = 0xaa;
const IOCTL_API: libc::Ioctl = iowr(0x3f, 24);
const IOCTL_REGISTER: libc::Ioctl = iowr(0x00, 32);
const IOCTL_COPY: libc::Ioctl = iowr(0x03, 40);
const IOCTL_MOVE: libc::Ioctl = iowr(0x05, 40);
const IOCTL_WRITE_PROTECT: libc::Ioctl = iowr(0x06, 24);
const IOCTL_ACCESS_PROTECT: libc::Ioctl = iowr(0x09, 24);
const EVENT_PAGE_FAULT: u8 = 0x12;
const FAULT_WP: u64 = 1 << 1;
const FAULT_RWP: u64 = 1 << 3;

/// Features of a userfaultfd.
pub(super) const PAGEFAULT_FLAG_WP: u64 = 1 << 0;
pub(super) const WP_UNPOPULATED: u64 = 1 << 13;
pub(super) const MOVE: u64 = 1 << 16;
pub(super) const RWP: u64 = 1 << 17;

/// Which faults on a range it tells of.
#[derive(Clone, Copy, Debug)]
pub(super) enum Mode {
    /// On pages that are not there.
    Missing = 1 << 0,
    /// Writes to pages that were protected.
    WriteProtect = 1 << 1,
    /// On pages that a file has and the page table has not.
    Minor = 1 << 2,
    /// Any access to pages that were protected.
    AccessProtect = 1 << 3,
}

/// A fault that waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// First byte of its page.
    pub address: usize,
    /// Whether it is a write to a page that is protected from writes.
    pub write_protect: bool,
    /// Whether it is an access to a page that is protected from any.
    pub access_protect: bool,
}

/// Require that there was a fault for each of `pages` of `region`, in their order, and no
/// other. Several may tell of the same.
///
/// # Errors
/// The faults are of other pages.
pub(super) fn expect_faults(
    region: &Region,
    faults: &[Fault],
    pages: impl IntoIterator<Item = usize>,
) -> Result<(), Failure> {
    let mut seen: Vec<_> = faults.iter().map(|fault| fault.address).collect();
    seen.dedup();
    let expected: Vec<_> = pages
        .into_iter()
        .map(|page| region.range(page..page + 1).start)
        .collect();
    require!(
        seen == expected,
        "faults at {seen:x?}, {expected:x?} expected"
    );
    Ok(())
}

const fn iowr(number: libc::Ioctl, size: libc::Ioctl) -> libc::Ioctl {
    3 << 30 | size << 16 | 0xaa << 8 | number
}

pub(super) struct Userfaultfd {
    file: File,
}

impl Userfaultfd {
    /// Open one with `features`.
    ///
    /// # Errors
    /// [`Failure::Skip`] where the kernel has none, or lacks a feature.
    pub(super) fn new(features: u64) -> Result<Self, Failure> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call only makes a descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let Some(fd) = i32::try_from(fd).ok().filter(|&fd| fd >= 0) else {
            return Err(Failure::Skip("the kernel has no userfaultfd".into()));
        };
        // SAFETY: the descriptor is new and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        let this = Self { file };
        match this.call(IOCTL_API, &mut [API, features, 0]) {
            Err(Failure::System { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                Err(Failure::Skip(format!(
                    "userfaultfd has not all of the features {features:#x}"
                )))
            }
            result => result.map(|()| this),
        }
    }

    /// Tell of faults on `range`.
    pub(super) fn register(&self, range: &Range<usize>, mode: Mode) -> Result<(), Failure> {
        let mut argument = [range.start as u64, range.len() as u64, mode as u64, 0];
        self.call(IOCTL_REGISTER, &mut argument)
    }

    /// Write-protect `range`, or undo it and let those go on that wait.
    pub(super) fn write_protect(&self, range: &Range<usize>, on: bool) -> Result<(), Failure> {
        let mut argument = [range.start as u64, range.len() as u64, on.into()];
        self.call(IOCTL_WRITE_PROTECT, &mut argument)
    }

    /// Protect `range` from any access, or undo it and let those go on that wait.
    pub(super) fn access_protect(&self, range: &Range<usize>, on: bool) -> Result<(), Failure> {
        let mut argument = [range.start as u64, range.len() as u64, on.into()];
        self.call(IOCTL_ACCESS_PROTECT, &mut argument)
    }

    /// Put a page with `words` at `address`, where none may be.
    pub(super) fn copy(&self, address: usize, words: &[u64]) -> Result<(), Failure> {
        let (from, length) = (words.as_ptr() as u64, size_of_val(words) as u64);
        self.call(IOCTL_COPY, &mut [address as u64, from, length, 0, 0])
    }

    /// Move the page at `from` to `to`, where none may be.
    pub(super) fn move_page(&self, to: usize, from: usize) -> Result<(), Failure> {
        let mut argument = [to as u64, from as u64, PAGE_SIZE as u64, 0, 0];
        self.call(IOCTL_MOVE, &mut argument)
    }

    /// The next fault, if one waits.
    pub(super) fn fault(&self) -> Result<Option<Fault>, Failure> {
        let mut message = [0; 32];
        match (&self.file).read(&mut message) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(source) => {
                return Err(Failure::System {
                    call: "reading a userfaultfd",
                    source,
                });
            }
        }
        let event = message[0];
        require!(event == EVENT_PAGE_FAULT, "event {event:#x}");
        let word = |at: usize| {
            message[at..at + 8]
                .iter()
                .rev()
                .fold(0, |n, &b| n << 8 | u64::from(b))
        };
        Ok(Some(Fault {
            // Addresses fit.
            address: usize::try_from(word(16)).unwrap_or(usize::MAX),
            write_protect: word(8) & FAULT_WP != 0,
            access_protect: word(8) & FAULT_RWP != 0,
        }))
    }

    /// Run `body` while `answer` answers faults, and return which there were.
    pub(super) fn answering(
        &self,
        answer: impl Fn(Fault) -> Result<(), Failure> + Sync,
        body: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<Vec<Fault>, Failure> {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let monitor = scope.spawn(|| {
                let mut faults = Vec::new();
                loop {
                    // Once more after the body has ended: its last fault may wait.
                    let stopped = stop.load(Ordering::Relaxed);
                    while let Some(fault) = self.fault()? {
                        faults.push(fault);
                        answer(fault)?;
                    }
                    if stopped {
                        return Ok(faults);
                    }
                    thread::yield_now();
                }
            });
            let result = body();
            stop.store(true, Ordering::Relaxed);
            let faults = monitor
                .join()
                .map_err(|_| Failure::Broken("a thread panicked".into()))?;
            result.and(faults)
        })
    }

    fn call<const N: usize>(
        &self,
        request: libc::Ioctl,
        argument: &mut [u64; N],
    ) -> Result<(), Failure> {
        // SAFETY: the argument has the size that the request encodes. What the calls do
        // to memory is seen by atomics only.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request, argument.as_mut_ptr()) };
        if result != 0 {
            return Err(Failure::system("an ioctl of userfaultfd"));
        }
        Ok(())
    }
}
