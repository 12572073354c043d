//! Pages that the kernel has pinned or refers to, on the way to the device and back.
//!
//! To pin a device page the kernel brings it home. A page of RAM stays as long as it is
//! pinned, and moves when it is not any more.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use virtio_hmm_client::{Direction, PAGE_SIZE, Residency, Skip};

use super::counted::counted;
use super::fault_around;
use super::meanwhile::meanwhile;
use crate::context::Context;
use crate::failure::Failure;
use crate::hold::{PinnedPage, PipedPage};
use crate::region::Region;
use crate::require;

const PAGES: usize = 32;

/// How long reads and writes race with migration.
const RACE: Duration = Duration::from_secs(2);

/// Block devices that keep in RAM what is written to them. The first can be told to
/// complete late.
const DISKS: [&str; 3] = ["/dev/nullb0", "/dev/ram0", "/dev/loop0"];

/// Registered buffers of an io_uring: pinned for as long as the process likes.
pub(super) fn registered_buffers(context: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 0)?;
    // In turn: on the device, in RAM, a hole, the zero page.
    let generation = |page: usize| u64::from(page % 4 < 2);
    for page in 0..PAGES {
        match page % 4 {
            0 | 1 => region.fill(page, 1),
            2 => {}
            _ => region.touch(page),
        }
    }
    for page in (0..PAGES).step_by(4) {
        context.settle(region.range(page..page + 1), Direction::ToDevice, 0)?;
    }
    let registered = 0..PAGES / 2;
    let home = [("pages_faulted", PAGES / 8), ("cpu_faults_oom", 0)];
    let mut pins = counted(context, &home, || {
        registered
            .clone()
            .map(|page| PinnedPage::new(&region, page))
            .collect::<Result<Vec<_>, _>>()
    })?;
    context.expect(&region, registered.clone(), |_| Residency::Ram)?;

    // FOLL_PIN counts in a way that tells a pin from other references.
    let held = registered.len() as u64;
    let settled = context.settle(region.all(), Direction::ToDevice, held)?;
    require!(
        settled.last.skipped(Skip::Pinned) == held,
        "{held} pages are registered: {settled:?}"
    );
    context.expect(&region, 0..PAGES, |page| {
        if registered.contains(&page) {
            Residency::Ram
        } else {
            Residency::Device
        }
    })?;
    context.check(&region, 0..PAGES, generation)?;
    for pin in &mut pins {
        pin.write(2)?;
    }
    pins.into_iter().try_for_each(PinnedPage::release)?;
    let settled = context.settle(region.all(), Direction::ToDevice, 0)?;
    require!(settled.moved >= held, "released pages: {settled:?}");
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;
    context.check(&region, 0..PAGES, |page| {
        if registered.contains(&page) {
            2
        } else {
            generation(page)
        }
    })
}

/// Pages in a pipe: referred to and not pinned.
pub(super) fn pipes(context: &Context) -> Result<(), Failure> {
    let _tunable = fault_around::off()?;
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    context.settle(region.all(), Direction::ToDevice, 0)?;
    let held = PAGES / 2;
    let pipes = counted(context, &[("pages_faulted", held)], || {
        (0..held)
            .map(|page| PipedPage::new(&region, page))
            .collect::<Result<Vec<_>, _>>()
    })?;
    let residency = |page| {
        if page < held {
            Residency::Ram
        } else {
            Residency::Device
        }
    };
    context.expect(&region, 0..PAGES, residency)?;
    let outcome = context.migrate(region.all(), Direction::ToDevice)?;
    require!(
        (outcome.skipped(Skip::Busy), outcome.skipped(Skip::Already))
            == (held as u64, (PAGES - held) as u64),
        "{held} pages are in pipes: {outcome:?}"
    );
    context.expect(&region, 0..PAGES, residency)?;
    // What is read from the pipe is what is in memory then, not when it was put there.
    for (page, pipe) in pipes.into_iter().enumerate() {
        region.fill(page, 2);
        require!(
            pipe.release()?
                .into_iter()
                .eq(region.pattern(page, 2).words()),
            "a pipe shows other bytes than page {page}"
        );
    }
    let settled = context.settle(region.all(), Direction::ToDevice, 0)?;
    require!(settled.moved == held as u64, "drained: {settled:?}");
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;
    context.check(&region, 0..PAGES, |page| if page < held { 2 } else { 1 })
}

/// A block device whose contents may be lost, opened for O_DIRECT.
fn disk(disks: &[&str]) -> Result<File, Failure> {
    let Some(path) = disks.iter().find(|path| Path::new(path).exists()) else {
        return Err(Failure::Skip(format!(
            "there is no block device of {}",
            disks.join(", ")
        )));
    };
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .map_err(|source| Failure::System {
            call: "opening a block device",
            source,
        })
}

/// Read or write `pages` of the region with O_DIRECT, at their place on the disk.
fn transfer(
    disk: &File,
    region: &Region,
    pages: std::ops::Range<usize>,
    write: bool,
) -> Result<(), Failure> {
    let offset = (pages.start * PAGE_SIZE).cast_signed() as libc::off_t;
    let range = region.range(pages);
    // SAFETY: the range is mapped, and its words are only seen as atomics.
    let length = unsafe {
        if write {
            libc::pwrite(
                disk.as_raw_fd(),
                range.start as *const _,
                range.len(),
                offset,
            )
        } else {
            libc::pread(disk.as_raw_fd(), range.start as *mut _, range.len(), offset)
        }
    };
    require!(
        usize::try_from(length) == Ok(range.len()),
        "{} of {} bytes with O_DIRECT gave {length}: {}",
        if write { "a write" } else { "a read" },
        range.len(),
        std::io::Error::last_os_error()
    );
    Ok(())
}

/// O_DIRECT from and into device pages, and pages that are being migrated.
pub(super) fn direct_io(context: &Context) -> Result<(), Failure> {
    let disk = disk(&DISKS)?;
    let region = context.region(4 * PAGES, 0)?;
    let pages = region.pages();
    region.fill_all(1);
    for (write, generation) in [(true, 1), (false, 2)] {
        region.fill_all(generation);
        context.settle(region.all(), Direction::ToDevice, 0)?;
        counted(
            context,
            &[("pages_faulted", pages), ("cpu_faults_oom", 0)],
            || transfer(&disk, &region, 0..pages, write),
        )?;
        context.expect(&region, 0..pages, |_| Residency::Ram)?;
        context.check(&region, 0..pages, |_| 1)?;
    }

    let both = [Direction::ToDevice, Direction::ToSystem];
    meanwhile(context, &[&region], &both, || race(context, &disk, &region))
}

/// Write pages, change them, and read them back, until the time is over.
fn race(context: &Context, disk: &File, region: &Region) -> Result<(), Failure> {
    let mut random = context.random(0);
    let end = Instant::now() + RACE;
    let mut generation = 2;
    while Instant::now() < end {
        let first = random.usize(0..region.pages());
        let pages = first..random.usize(first + 1..=region.pages());
        let fill = |generation| pages.clone().for_each(|page| region.fill(page, generation));
        fill(generation);
        transfer(disk, region, pages.clone(), true)?;
        context.check(region, pages.clone(), |_| generation)?;
        fill(generation + 1);
        transfer(disk, region, pages.clone(), false)?;
        context.check(region, pages.clone(), |_| generation)?;
        generation += 2;
    }
    Ok(())
}

/// A read with O_DIRECT that the disk has not completed yet.
pub(super) fn direct_io_in_flight(context: &Context) -> Result<(), Failure> {
    // Only this one completes late enough, if it was told to.
    let disk = disk(&DISKS[..1])?;
    let region = context.region(2 * PAGES, 0)?;
    let reading = PAGES / 2..PAGES;
    region.fill_all(1);
    transfer(&disk, &region, reading.clone(), true)?;
    for page in reading.clone() {
        region.fill(page, 2);
    }
    context.settle(region.range(0..PAGES), Direction::ToDevice, 0)?;

    let mut ring =
        IoUring::new(1).map_err(|error| Failure::Skip(format!("there is no io_uring: {error}")))?;
    let target = region.range(reading.clone());
    let length = u32::try_from(target.len()).unwrap_or(u32::MAX);
    let entry = opcode::Read::new(types::Fd(disk.as_raw_fd()), target.start as *mut u8, length)
        .offset((reading.start * PAGE_SIZE) as u64)
        .build();
    // SAFETY: the pages stay mapped until the completion below, and their words are only
    // seen as atomics. The process does not go on without the completion.
    unsafe { ring.submission().push(&entry) }
        .map_err(|_| Failure::Broken("the submission queue is full".into()))?;
    let io = |source| Failure::System {
        call: "reading with an io_uring",
        source,
    };
    ring.submit().map_err(io)?;
    let held = reading.len() as u64;
    let meanwhile = context.settle(region.all(), Direction::ToDevice, held);
    let in_time = ring.completion().is_empty();
    let residency = context.device.query(region.range(reading.clone()));
    let still = in_time && ring.completion().is_empty();
    ring.submit_and_wait(1).map_err(io)?;
    let result = ring.completion().next().map(|entry| entry.result());
    require!(
        result.and_then(|result| u32::try_from(result).ok()) == Some(length),
        "a read with O_DIRECT gave {result:?}"
    );
    let meanwhile = meanwhile?;
    let residency = residency?;
    if !still {
        return Err(Failure::Skip("the disk completes at once".into()));
    }
    require!(
        meanwhile.last.skipped(Skip::Pinned) == held,
        "{held} pages are being read into: {meanwhile:?}"
    );
    require!(
        residency.iter().all(|&seen| seen == Residency::Ram),
        "pages that are being read into are {residency:?}"
    );
    // The disk wrote to the pages that the process still has.
    context.check(&region, 0..2 * PAGES, |_| 1)?;
    let settled = context.settle(region.all(), Direction::ToDevice, 0)?;
    require!(
        settled.last.skipped(Skip::Already) == 2 * PAGES as u64 || settled.moved > 0,
        "after the read: {settled:?}"
    );
    context.expect(&region, 0..2 * PAGES, |_| Residency::Device)?;
    context.check(&region, 0..2 * PAGES, |_| 1)
}
