//! Swap: to a disk or to compressed memory.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use hmm_stress::failure::Failure;
use virtio_hmm_client::PAGE_SIZE;

use super::{Part, Session};
use crate::measure::drain;

/// Has the kernel reclaim memory, of this program alone.
const RECLAIM: &str = "/sys/fs/cgroup/hmm-bench/memory.reclaim";

/// For how long the kernel is asked to forget what is still in RAM.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) struct Swap(CString);

impl Swap {
    pub(super) fn on(path: &Path) -> Result<Self, Failure> {
        for needed in [path, Path::new(RECLAIM)] {
            if !needed.exists() {
                return Err(Failure::Skip(format!("there is no {}", needed.display())));
            }
        }
        let device = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| Failure::Broken("a device's name has a zero byte".into()))?;
        // SAFETY: the path lives for the call, which changes no memory of this process.
        if unsafe { libc::swapon(device.as_ptr(), 0) } != 0 {
            return Err(Failure::system("swapon"));
        }
        Ok(Self(device))
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // SAFETY: as for swapon.
        unsafe { libc::swapoff(self.0.as_ptr()) };
    }
}

fn advise(part: &Part, advice: libc::c_int) -> Result<(), Failure> {
    let (start, length) = (part.addresses.start, part.addresses.len());
    // SAFETY: the part is of a mapping that is only seen as atomics, and the advice does not
    // change what it holds.
    if unsafe { libc::madvise(start as *mut _, length, advice) } != 0 {
        return Err(Failure::system("madvise"));
    }
    Ok(())
}

/// Pages that are on their way to a disk.
fn being_written() -> Result<u64, Failure> {
    let text = fs::read_to_string("/proc/vmstat").map_err(|source| Failure::System {
        call: "reading /proc/vmstat",
        source,
    })?;
    text.lines()
        .find_map(|line| line.strip_prefix("nr_writeback ")?.parse().ok())
        .ok_or_else(|| Failure::Broken("/proc/vmstat tells nothing about writeback".into()))
}

/// Pages of the part that are in RAM, mapped or not.
fn in_ram(part: &Part) -> Result<usize, Failure> {
    let (start, length) = (part.addresses.start, part.addresses.len());
    let mut pages = vec![0_u8; length / PAGE_SIZE];
    // SAFETY: the call writes a byte for each page of the range, for which there is room.
    if unsafe { libc::mincore(start as *mut _, length, pages.as_mut_ptr()) } != 0 {
        return Err(Failure::system("mincore"));
    }
    Ok(pages.iter().filter(|&&page| page & 1 != 0).count())
}

impl Session for Swap {
    /// It may return before the disk has all of it.
    fn out(&self, part: &Part) -> Result<(), Failure> {
        advise(part, libc::MADV_PAGEOUT)
    }

    /// What has been written to the disk stays in RAM as well, as long as there is room. Reclaim
    /// comes to the last few pages late, so that a hundredth may stay.
    fn settle(&self, part: &Part) -> Result<(), Failure> {
        // Reclaim is slow with pages that are still being written.
        let begun = Instant::now();
        let mut left = in_ram(part)?;
        while left > part.pages.len() / 100 {
            if begun.elapsed() > PATIENCE {
                return Err(Failure::Broken("pages stay in the swap cache".into()));
            }
            if being_written()? == 0 {
                drain()?;
                // It says so when it reclaims less than this.
                let _ = fs::write(RECLAIM, format!("{} swappiness=max", left * PAGE_SIZE));
            }
            thread::sleep(Duration::from_millis(1));
            left = in_ram(part)?;
        }
        Ok(())
    }

    /// The kernel reads all of it ahead, and then maps it.
    fn back(&self, part: &Part) -> Result<(), Failure> {
        advise(part, libc::MADV_WILLNEED)?;
        advise(part, libc::MADV_POPULATE_READ)
    }
}
