//! Private mappings of files.
//!
//! A page that was written is the process's own and migrates. One that was not is the
//! file's, and a hole would become the file's; these stay. The file never changes.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency, Skip};

use super::counted::counted;
use super::refused::memory_file;
use crate::context::Context;
use crate::failure::Failure;
use crate::hold::PinnedPage;
use crate::process;
use crate::region::Region;
use crate::require;

/// Pages of the file; in turn written, read, and not touched.
const PAGES: usize = 96;
const EACH: usize = PAGES / 3;

/// The byte that the file is full of.
const BYTE: u8 = 0x5a;

fn written(page: usize) -> bool {
    page.is_multiple_of(3)
}

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let file = memory_file(PAGES)?;
    fill(&file)?;
    let seed = context.region_seed(0);
    let region = Region::of_kind(PAGES, libc::MAP_PRIVATE, Some(file.as_fd()), seed)?;
    for page in 0..PAGES {
        match page % 3 {
            0 => region.fill(page, 1),
            1 => region.touch(page),
            _ => {}
        }
    }
    let expected = [("to_device_frames", EACH), ("fill_frames", 0)];
    counted(context, &expected, || {
        let settled = context.settle(region.all(), Direction::ToDevice, 0)?;
        require!(
            settled.moved == EACH as u64
                && settled.last.skipped(Skip::Unsupported) == 2 * EACH as u64,
            "{settled:?}"
        );
        Ok(())
    })?;
    only_written_pages_are_on_the_device(context, &region)?;
    in_a_child(context, &region)?;

    // Back by request and by touching them, with the file as it was.
    context.settle(region.all(), Direction::ToDevice, 0)?;
    let settled = context.settle(region.all(), Direction::ToSystem, 0)?;
    require!(settled.moved == EACH as u64, "{settled:?}");
    check(context, &region, 1)?;
    context.settle(region.all(), Direction::ToDevice, 0)?;
    for page in (0..PAGES).filter(|&page| written(page)) {
        region.fill(page, 2);
    }
    check(context, &region, 2)?;
    holds_only(&file)?;
    pinned_pages_say_so(context, &region)?;

    // Truncating a file takes also the private copies of its pages away.
    let free = context.free()?;
    let settled = context.settle(region.all(), Direction::ToDevice, 0)?;
    require!(settled.moved == EACH as u64, "{settled:?}");
    file.set_len(0).map_err(|source| Failure::System {
        call: "ftruncate",
        source,
    })?;
    context.expect(&region, 0..PAGES, |_| Residency::None)?;
    context.wait_free(free)
}

fn only_written_pages_are_on_the_device(context: &Context, region: &Region) -> Result<(), Failure> {
    let residency = context.device.query(region.all())?;
    for (page, seen) in residency.into_iter().enumerate() {
        // Whether the kernel maps pages of the file around one that is read is its own affair.
        let expected = if written(page) {
            seen == Residency::Device
        } else {
            matches!(seen, Residency::Ram | Residency::None)
        };
        require!(expected, "page {page} is {seen:?}");
    }
    Ok(())
}

/// A written page that is pinned is of the right kind, and stays for the pin.
fn pinned_pages_say_so(context: &Context, region: &Region) -> Result<(), Failure> {
    let pin = PinnedPage::new(region, 3)?;
    let settled = context.settle(region.all(), Direction::ToDevice, 1)?;
    require!(
        settled.last.skipped(Skip::Pinned) == 1
            && settled.last.skipped(Skip::Unsupported) == 2 * EACH as u64,
        "one page is pinned: {settled:?}"
    );
    pin.release()?;
    check(context, region, 2)
}

/// A child has copies of its own once it writes.
fn in_a_child(context: &Context, region: &Region) -> Result<(), Failure> {
    process::fork(context, |context| {
        check(context, region, 1)?;
        region.fill_all(3);
        let settled = context.settle(region.all(), Direction::ToDevice, 0)?;
        require!(settled.moved == PAGES as u64, "{settled:?}");
        context.check(region, 0..PAGES, |_| 3)
    })?
    .wait()
}

/// Compare written pages with `generation`, and the others with the file.
fn check(context: &Context, region: &Region, generation: u64) -> Result<(), Failure> {
    for page in 0..PAGES {
        if written(page) {
            context.check(region, page..page + 1, |_| generation)?;
        } else {
            let whole = u64::from_le_bytes([BYTE; 8]);
            let words = region.words(page).iter();
            require!(
                words
                    .map(|word| word.load(Ordering::Relaxed))
                    .all(|word| word == whole),
                "page {page} does not show the file"
            );
        }
    }
    Ok(())
}

fn fill(file: &File) -> Result<(), Failure> {
    file.write_all_at(&[BYTE; PAGES * PAGE_SIZE], 0)
        .map_err(|source| Failure::System {
            call: "writing a memfd",
            source,
        })
}

fn holds_only(file: &File) -> Result<(), Failure> {
    let mut bytes = vec![0; PAGES * PAGE_SIZE];
    file.read_exact_at(&mut bytes, 0)
        .map_err(|source| Failure::System {
            call: "reading a memfd",
            source,
        })?;
    require!(
        bytes.iter().all(|&byte| byte == BYTE),
        "writing to a private mapping changed the file"
    );
    Ok(())
}
