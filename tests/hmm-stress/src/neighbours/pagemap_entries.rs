//! What /proc/PID/pagemap and smaps show of device pages: something like swap, that counts
//! as memory in use.

use std::fs::{self, File};
use std::ops::Range;
use std::os::fd::AsRawFd;

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use super::counted::counted;
use crate::context::Context;
use crate::failure::Failure;
use crate::pagemap::{self, Entry};
use crate::process;
use crate::region::{Access, PMD_PAGES, PageSize, Region};
use crate::require;
use crate::scenario::transparent_huge_pages;

/// Pages of a region.
const PAGES: usize = 64;

/// Require that `entries` look like those of device pages, and that all have the same
/// type and each an offset of its own. Returns the type.
fn device_entries(entries: &[Entry]) -> Result<u64, Failure> {
    let (kind, _) = entries[0].swap_entry();
    let mut offsets = Vec::new();
    for entry in entries {
        require!(
            entry.swap() && !entry.present() && !entry.file() && !entry.exclusive(),
            "a device page is {entry:?}"
        );
        require!(
            entry.swap_entry().0 == kind,
            "device pages have the types {kind} and {}",
            entry.swap_entry().0
        );
        offsets.push(entry.swap_entry().1);
    }
    offsets.sort_unstable();
    offsets.dedup();
    require!(offsets.len() == entries.len(), "device pages share frames");
    Ok(kind)
}

/// pte_to_pagemap_entry() shows the entry's type and offset, as for swap. A writable and a
/// read-only entry are of different types.
pub(super) fn entries(context: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    require!(
        pagemap::entries(region.all())?
            .iter()
            .all(|e| e.present() && e.exclusive()),
        "pages in RAM are not present"
    );
    context.settle(region.all(), Direction::ToDevice, 0)?;
    counted(context, &[("cpu_faults", 0)], || {
        let writable = device_entries(&pagemap::entries(region.all())?)?;
        region.protect(0..PAGES, Access::Read)?;
        let readable = device_entries(&pagemap::entries(region.all())?)?;
        require!(
            writable != readable,
            "writable and read-only device pages are of type {writable}"
        );
        context.expect(&region, 0..PAGES, |_| Residency::Device)
    })?;
    context.check(&region, 0..PAGES, |_| 1)?;
    require!(
        pagemap::entries(region.all())?
            .iter()
            .all(|e| e.present() && !e.swap()),
        "pages that came home are not present"
    );
    Ok(())
}

/// So does a huge page, for each of its parts.
pub(super) fn huge(context: &Context) -> Result<(), Failure> {
    if !transparent_huge_pages() {
        return Err(Failure::Skip("there are no transparent huge pages".into()));
    }
    let region = Region::new(PMD_PAGES, PageSize::Huge, context.region_seed(0))?;
    region.fill_all(1);
    counted(context, &[("thp_to_device", 1)], || {
        context.settle(region.all(), Direction::ToDevice, 0)
    })?;
    let entries = pagemap::entries(region.all())?;
    device_entries(&entries)?;
    let first = entries[0].swap_entry().1;
    require!(
        entries
            .iter()
            .zip(first..)
            .all(|(entry, offset)| entry.swap_entry().1 == offset),
        "the frames of a huge device page are not in a row"
    );
    context.check(&region, 0..PMD_PAGES, |_| 1)
}

/// Who is not root sees that a page is there, and not where.
pub(super) fn unprivileged(context: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    process::fork(context, |context| {
        context.settle(region.all(), Direction::ToDevice, 0)?;
        // SAFETY: these change only who this process is.
        let result = unsafe {
            (
                libc::setgid(65534),
                libc::setuid(65534),
                libc::prctl(libc::PR_SET_DUMPABLE, 1),
            )
        };
        require!(result == (0, 0, 0), "cannot become nobody");
        for entry in pagemap::entries(region.all())? {
            require!(
                entry.swap() && entry.swap_entry() == (0, 0),
                "nobody sees {entry:?}"
            );
        }
        Ok(())
    })?
    .wait()?;
    context.check(&region, 0..PAGES, |_| 1)
}

/// Categories of PAGEMAP_SCAN, from linux/fs.h.
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;

/// The ranges in which PAGEMAP_SCAN finds pages of `category`.
fn scan(range: Range<usize>, category: u64) -> Result<Vec<Range<u64>>, Failure> {
    const PAGEMAP_SCAN: libc::Ioctl = 3 << 30 | 96 << 16 | 0x66 << 8 | 16;
    let file = File::open("/proc/self/pagemap").map_err(|source| Failure::System {
        call: "opening /proc/self/pagemap",
        source,
    })?;
    let mut found = vec![[0u64; 3]; range.len() / PAGE_SIZE];
    let mut argument: [u64; 12] = [
        96,
        0,
        range.start as u64,
        range.end as u64,
        0,
        found.as_mut_ptr() as u64,
        found.len() as u64,
        0,
        0,
        category,
        0,
        category,
    ];
    // SAFETY: the argument has the size that the request encodes, and `found` the number
    // of elements that it says.
    let count = unsafe { libc::ioctl(file.as_raw_fd(), PAGEMAP_SCAN, argument.as_mut_ptr()) };
    let Ok(count) = usize::try_from(count) else {
        return Err(Failure::system("PAGEMAP_SCAN"));
    };
    Ok(found[..count]
        .iter()
        .map(|&[start, end, _]| start..end)
        .collect())
}

/// PAGEMAP_SCAN finds device pages among those that are swapped.
pub(super) fn scanned(context: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 0)?;
    (0..PAGES / 2).for_each(|page| region.fill(page, 1));
    let device = 3..17;
    let addresses = |pages| {
        let range = region.range(pages);
        range.start as u64..range.end as u64
    };
    context.settle(region.range(device.clone()), Direction::ToDevice, 0)?;
    counted(context, &[("cpu_faults", 0)], || {
        let swapped = scan(region.all(), SWAPPED)?;
        require!(
            swapped == [addresses(device.clone())],
            "swapped pages are {swapped:x?}"
        );
        let present = scan(region.all(), PRESENT)?;
        let expected = [addresses(0..device.start), addresses(device.end..PAGES / 2)];
        require!(present == expected, "present pages are {present:x?}");
        Ok(())
    })?;
    context.check(&region, 0..PAGES / 2, |_| 1)
}

/// smaps_pte_entry() counts device pages as resident, not as swap.
pub(super) fn resident(context: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    // In a mapping of its own.
    region.protect(0..PAGES, Access::Read)?;
    let before = smaps(&region)?;
    context.settle(region.range(0..PAGES / 2), Direction::ToDevice, 0)?;
    let after = smaps(&region)?;
    let all = (PAGES * PAGE_SIZE / 1024) as u64;
    require!(
        before == (all, 0) && after == (all, 0),
        "(Rss, Swap) were {before:?} and are {after:?} KiB"
    );
    context.check(&region, 0..PAGES, |_| 1)
}

/// KiB of the region that are resident and in swap.
fn smaps(region: &Region) -> Result<(u64, u64), Failure> {
    let text = fs::read_to_string("/proc/self/smaps").map_err(|source| Failure::System {
        call: "reading /proc/self/smaps",
        source,
    })?;
    let head = format!("{:x}-{:x} ", region.all().start, region.all().end);
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&head));
    let mut field = |name: &str| {
        let line = lines.find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    let values = field("Rss:").zip(field("Swap:"));
    values.ok_or_else(|| Failure::Broken("smaps does not have the region".into()))
}
