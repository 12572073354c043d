//! S1: only entries that are marked as migrating may be touched.
//!
//! A page that something else refers to gets no such mark. A driver that copies it all
//! the same shows in the device's counters; one that also replaces it separates the
//! process from whoever holds the page, which shows in what each sees of the other.

use virtio_hmm_client::{Direction, Residency, Skip};

use super::device_change;
use crate::context::Context;
use crate::failure::Failure;
use crate::hold::{PinnedPage, PipedPage};
use crate::region::Region;
use crate::require;

/// Pages of the range, which spans two batches.
const PAGES: usize = 640;

/// Pages that are held: at the start, the end, side by side, across batches.
const HELD: [usize; 6] = [0, 31, 32, 511, 512, PAGES - 1];

fn residency(page: usize) -> Residency {
    if HELD.contains(&page) {
        Residency::Ram
    } else {
        Residency::Device
    }
}

/// Migrate the region while pages are held, and require that exactly those stay.
fn leaves_held_pages(context: &Context, region: &Region) -> Result<(), Failure> {
    let held = HELD.len() as u64;
    let free = PAGES as u64 - held;
    let mut moved = 0;
    let change = device_change(context, &["to_device_frames", "fill_frames"], || {
        let settled = context.settle(region.all(), Direction::ToDevice, held)?;
        moved = settled.moved;
        let last = settled.last;
        require!(
            last.skipped(Skip::Busy) + last.skipped(Skip::Pinned) == held,
            "{held} pages are held: {last:?}"
        );
        Ok(())
    })?;
    require!(moved == free, "{moved} of {free} free pages moved");
    require!(
        change == [free.cast_signed(), 0],
        "the device copied {} and filled {} frames for {free} free pages",
        change[0],
        change[1]
    );
    context.expect(region, 0..PAGES, residency)
}

/// Pages held by pipes.
pub(super) fn referenced(context: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    let held = HELD
        .iter()
        .map(|&page| Ok((page, PipedPage::new(&region, page)?)))
        .collect::<Result<Vec<_>, Failure>>()?;
    leaves_held_pages(context, &region)?;
    // The pipe still refers to the process's page: it sees what is written now.
    for (page, hold) in held {
        region.fill(page, 2);
        let words = hold.release()?;
        let pattern = region.pattern(page, 2);
        require!(
            words.into_iter().eq(pattern.words()),
            "page {page} was replaced under the pipe that holds it"
        );
    }
    moves_when_released(context, &region)
}

/// Pages pinned for DMA.
pub(super) fn pinned(context: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    let mut held = HELD
        .iter()
        .map(|&page| PinnedPage::new(&region, page))
        .collect::<Result<Vec<_>, _>>()?;
    leaves_held_pages(context, &region)?;
    for pin in &mut held {
        pin.write(2)?;
    }
    for page in HELD {
        context.check(&region, page..page + 1, |_| 2)?;
    }
    held.into_iter().try_for_each(PinnedPage::release)?;
    moves_when_released(context, &region)
}

/// Nothing is held any more: all pages move.
fn moves_when_released(context: &Context, region: &Region) -> Result<(), Failure> {
    let settled = context.settle(region.all(), Direction::ToDevice, 0)?;
    require!(
        settled.moved == HELD.len() as u64,
        "released pages: {settled:?}"
    );
    context.expect(region, 0..PAGES, |_| Residency::Device)?;
    context.check(
        region,
        0..PAGES,
        |page| if HELD.contains(&page) { 2 } else { 1 },
    )
}
