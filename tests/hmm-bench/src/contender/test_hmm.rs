//! The kernel's `test_hmm`, whose device memory is RAM that the guest's CPU copies to.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use hmm_stress::failure::Failure;
use hmm_stress::region::{PageSize, Region};
use virtio_hmm_client::PAGE_SIZE;

use super::{Part, Session};
use crate::work::Memory;

/// `struct hmm_dmirror_cmd` of the kernel's lib/test_hmm_uapi.h.
#[repr(C)]
#[derive(Default)]
struct Command {
    /// First address that the device works on.
    address: u64,
    /// Where data goes that the device reads.
    data: u64,
    /// Pages to work on.
    pages: u64,
    /// Answer: pages worked on.
    done: u64,
    /// Answer: faults of the device.
    faults: u64,
}

const READ: libc::Ioctl = request(0);
const MIGRATE_TO_DEVICE: libc::Ioctl = request(2);
const MIGRATE_TO_SYSTEM: libc::Ioctl = request(3);

/// `_IOWR('H', number, struct hmm_dmirror_cmd)`.
const fn request(number: u32) -> libc::Ioctl {
    libc::_IOWR::<Command>('H' as u32, number)
}

pub(super) struct Mirror {
    file: File,
    /// Where it copies what has gone out.
    copy: Region,
}

impl Mirror {
    pub(super) fn open(path: &Path, memory: Memory) -> Result<Self, Failure> {
        if !path.exists() {
            return Err(Failure::Skip(format!("there is no {}", path.display())));
        }
        let file = File::options().read(true).write(true).open(path);
        let file = file.map_err(|source| Failure::System {
            call: "opening test_hmm's device",
            source,
        })?;
        let copy = Region::new(memory.page_count(), PageSize::Huge, 0)?;
        // There is no page fault when it is written.
        copy.advise(0..copy.pages(), libc::MADV_POPULATE_WRITE)?;
        Ok(Self { file, copy })
    }

    fn call(&self, request: libc::Ioctl, part: &Part) -> Result<(), Failure> {
        let mut command = Command {
            address: part.addresses.start as u64,
            data: self.copy.range(part.pages.clone()).start as u64,
            pages: (part.addresses.len() / PAGE_SIZE) as u64,
            ..Command::default()
        };
        // SAFETY: the call reads and writes one `Command` at its argument, which is one. It
        // writes to `copy`, whose part is as long as the command says and only seen as
        // atomics, and moves pages of the range without changing what they hold.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request, &raw mut command) };
        if result != 0 {
            return Err(Failure::system("an ioctl of test_hmm"));
        }
        Ok(())
    }
}

impl Session for Mirror {
    /// One call moves the part and copies it to the caller.
    fn out(&self, part: &Part) -> Result<(), Failure> {
        match self.call(MIGRATE_TO_DEVICE, part) {
            // Pages stayed behind, which it notices when it copies.
            Err(Failure::System { source, .. }) if source.raw_os_error() == Some(libc::ENOENT) => {
                Ok(())
            }
            other => other,
        }
    }

    fn besides(&self, part: &Part) -> Result<(), Failure> {
        self.call(READ, part)
    }

    fn back(&self, part: &Part) -> Result<(), Failure> {
        self.call(MIGRATE_TO_SYSTEM, part)
    }
}
