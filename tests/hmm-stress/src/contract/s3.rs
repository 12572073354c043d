//! S3: not every page need migrate, and one that does not is as it was.
//!
//! Device memory that is nearly full lets a driver move only a part of a range.

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency, Skip};

use crate::context::Context;
use crate::failure::Failure;
use crate::region::{PMD_PAGES, Region};
use crate::require;

/// Pages of device memory that are left free.
const ROOM: usize = 3 * PMD_PAGES + 100;

/// Pages of the range: more than there is room for.
const PAGES: usize = 2 * ROOM;

/// Fill device memory up to [`ROOM`] free pages, with holes, which need no RAM.
fn ballast(context: &Context) -> Result<Region, Failure> {
    let free = usize::try_from(context.free()? / PAGE_SIZE as u64).unwrap_or(0);
    let Some(pages) = free.checked_sub(ROOM).filter(|&pages| pages > 0) else {
        return Err(Failure::Skip(format!(
            "only {free} pages of device memory are free"
        )));
    };
    let ballast = context.region(pages, 1)?;
    let outcome = context.migrate(ballast.all(), Direction::ToDevice)?;
    require!(
        outcome.filled == pages as u64,
        "{pages} holes became {outcome:?}"
    );
    context.wait_free((ROOM * PAGE_SIZE) as u64)?;
    Ok(ballast)
}

/// Require that of all pages `fit` are on the device and the others are `elsewhere`.
fn divided(
    context: &Context,
    region: &Region,
    fit: usize,
    elsewhere: Residency,
) -> Result<(), Failure> {
    let residency = context.device.query(region.all())?;
    let count = |wanted| residency.iter().filter(|&&seen| seen == wanted).count();
    let seen = (count(Residency::Device), count(elsewhere));
    require!(
        seen == (fit, PAGES - fit),
        "{} pages are on the device and {} {elsewhere:?}; {fit} fit of {PAGES}",
        seen.0,
        seen.1
    );
    Ok(())
}

/// Pages with contents.
pub(super) fn touched(context: &Context) -> Result<(), Failure> {
    let context = &context.without_eviction()?;
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    let ballast = ballast(context)?;
    let settled = context.settle(region.all(), Direction::ToDevice, 0)?;
    require!(
        settled.moved == ROOM as u64
            && settled.last.skipped(Skip::NoMemory) == (PAGES - ROOM) as u64,
        "{ROOM} pages fit: {settled:?}"
    );
    divided(context, &region, ROOM, Residency::Ram)?;
    // Pages that stayed can be written; looking at them moves none.
    let residency = context.device.query(region.all())?;
    let stayed = |page: usize| residency[page] == Residency::Ram;
    for page in (0..PAGES).filter(|&page| stayed(page)) {
        context.check(&region, page..page + 1, |_| 1)?;
        region.fill(page, 2);
    }
    divided(context, &region, ROOM, Residency::Ram)?;

    drop(ballast);
    let settled = context.settle(region.all(), Direction::ToDevice, 0)?;
    require!(
        settled.moved == (PAGES - ROOM) as u64,
        "the rest after there was room: {settled:?}"
    );
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;
    context.check(&region, 0..PAGES, |page| if stayed(page) { 2 } else { 1 })
}

/// Pages without.
pub(super) fn holes(context: &Context) -> Result<(), Failure> {
    let context = &context.without_eviction()?;
    context.soil(PAGES)?;
    let region = context.region(PAGES, 0)?;
    let ballast = ballast(context)?;
    let settled = context.settle(region.all(), Direction::ToDevice, 0)?;
    let filled = usize::try_from(settled.filled).unwrap_or(0);
    // A batch of holes may be left as a whole.
    require!(
        filled + PMD_PAGES > ROOM && filled <= ROOM && settled.moved == 0,
        "{ROOM} holes fit: {settled:?}"
    );
    divided(context, &region, filled, Residency::None)?;
    drop(ballast);
    let settled = context.settle(region.all(), Direction::ToDevice, 0)?;
    require!(
        settled.filled == (PAGES - filled) as u64,
        "the rest after there was room: {settled:?}"
    );
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;
    context.check(&region, 0..PAGES, |_| 0)
}
