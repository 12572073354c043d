//! S6: source pages that were never allocated become zero-filled device pages.
//!
//! Each test first leaves other bytes in device memory, so that a frame which was not
//! cleared shows. It requires that the device copied nothing for the holes and filled a
//! frame for each, that the pages are on the device, and that they are zero and in RAM
//! when they came back: once on request and once by CPU fault.

use std::ops::Range;

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use super::device_change;
use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::{Access, PMD_PAGES, PUD_PAGES, PageSize, Region};
use crate::require;
use crate::scenario::transparent_huge_pages;

/// How pages come back to RAM.
#[derive(Clone, Copy, Debug)]
enum Return {
    Request,
    Fault,
}

/// Migrate `pages` of the region that `build` makes to the device and back, in each
/// way. `touched` says which pages were written, in generation 1; the others are holes.
fn holes_become_zero(
    context: &Context,
    build: impl Fn() -> Result<Region, Failure>,
    pages: Range<usize>,
    touched: impl Fn(usize) -> bool,
) -> Result<(), Failure> {
    for back in [Return::Request, Return::Fault] {
        context.soil(2 * pages.len())?;
        let region = build()?;
        for page in pages.clone().filter(|&page| touched(page)) {
            region.fill(page, 1);
        }
        fills(context, &region, pages.clone(), &touched)?;
        returns(context, &region, pages.clone(), &touched, back)?;
    }
    Ok(())
}

/// Migrate `pages` to the device: holes are filled, and only touched pages copied.
fn fills(
    context: &Context,
    region: &Region,
    pages: Range<usize>,
    touched: &impl Fn(usize) -> bool,
) -> Result<(), Failure> {
    let copies = pages.clone().filter(|&page| touched(page)).count();
    let holes = pages.len() - copies;
    let change = device_change(
        context,
        &["to_device_frames", "from_device_frames", "fill_frames"],
        || {
            let range = region.range(pages.clone());
            let settled = context.settle(range, Direction::ToDevice, 0)?;
            require!(
                settled.moved == copies as u64 && settled.filled == holes as u64,
                "{copies} pages and {holes} holes: {settled:?}"
            );
            Ok(())
        },
    )?;
    let [to_device, from_device, filled] = change[..] else {
        return Err(Failure::Broken("the device has other counters".into()));
    };
    require!(
        to_device == copies as i64 && from_device == 0,
        "the device copied {to_device} frames in and {from_device} out for {copies} pages"
    );
    require!(
        filled >= holes as i64,
        "the device filled {filled} frames for {holes} holes"
    );
    context.expect(region, pages, |_| Residency::Device)
}

/// Bring `pages` back, check their bytes, and that they can be written.
fn returns(
    context: &Context,
    region: &Region,
    pages: Range<usize>,
    touched: &impl Fn(usize) -> bool,
    back: Return,
) -> Result<(), Failure> {
    match back {
        Return::Request => {
            let range = region.range(pages.clone());
            let settled = context.settle(range, Direction::ToSystem, 0)?;
            require!(
                settled.moved == pages.len() as u64,
                "{} pages on the way back: {settled:?}",
                pages.len()
            );
        }
        Return::Fault => pages.clone().for_each(|page| region.touch(page)),
    }
    context.expect(region, pages.clone(), |_| Residency::Ram)?;
    context.check(region, pages.clone(), |page| u64::from(touched(page)))?;
    pages.clone().for_each(|page| region.fill(page, 2));
    context.check(region, pages, |_| 2)
}

pub(super) fn whole_range(context: &Context) -> Result<(), Failure> {
    let build = || context.region(1200, 0);
    // Neither end is aligned to a batch.
    holes_become_zero(context, build, 7..1190, |_| false)
}

pub(super) fn every_other(context: &Context) -> Result<(), Failure> {
    for parity in [0, 1] {
        let build = || context.region(1024, parity as u64);
        holes_become_zero(context, build, 0..1024, |page| page % 2 == parity)?;
    }
    Ok(())
}

pub(super) fn zero_page(context: &Context) -> Result<(), Failure> {
    let build = || {
        let region = context.region(600, 0)?;
        (0..600).for_each(|page| region.touch(page));
        context.expect(&region, 0..600, |_| Residency::Zero)?;
        Ok(region)
    };
    holes_become_zero(context, build, 0..600, |_| false)
}

pub(super) fn huge_hole(context: &Context) -> Result<(), Failure> {
    for (number, page_size) in [(0, PageSize::Small), (1, PageSize::Huge)] {
        // A neighbour below is touched, so that there are page tables around the hole.
        let build = || {
            let region = Region::new(3 * PMD_PAGES, page_size, context.region_seed(number))?;
            region.fill(0, 1);
            Ok(region)
        };
        holes_become_zero(context, build, PMD_PAGES..3 * PMD_PAGES, |_| false)?;
    }
    Ok(())
}

pub(super) fn no_page_table(context: &Context) -> Result<(), Failure> {
    let build = || Region::aligned(PUD_PAGES, PUD_PAGES, PageSize::Small, context.seed);
    let middle = PUD_PAGES / 2;
    holes_become_zero(context, build, middle - 700..middle + 2 * PMD_PAGES, |_| {
        false
    })?;
    // Aligned, from the very start of the 1 GiB.
    holes_become_zero(context, build, 0..2 * PMD_PAGES, |_| false)
}

pub(super) fn huge_zero_page(context: &Context) -> Result<(), Failure> {
    if !transparent_huge_pages() {
        return Err(Failure::Skip("there are no transparent huge pages".into()));
    }
    let build = || {
        let region = Region::new(2 * PMD_PAGES, PageSize::Huge, context.region_seed(0))?;
        region.touch(3);
        region.touch(PMD_PAGES + 3);
        Ok(region)
    };
    holes_become_zero(context, build, 0..2 * PMD_PAGES, |_| false)?;
    // Only a part of it.
    holes_become_zero(context, build, 100..PMD_PAGES + 100, |_| false)
}

pub(super) fn batch_start(context: &Context) -> Result<(), Failure> {
    for holes in [1, 5, PMD_PAGES - 1] {
        let build = || context.region(2 * PMD_PAGES, 0);
        holes_become_zero(context, build, 0..2 * PMD_PAGES, |page| {
            page % PMD_PAGES >= holes
        })?;
    }
    Ok(())
}

pub(super) fn batch_end(context: &Context) -> Result<(), Failure> {
    for holes in [1, 5, PMD_PAGES - 1] {
        let build = || context.region(2 * PMD_PAGES, 0);
        holes_become_zero(context, build, 0..2 * PMD_PAGES, |page| {
            page % PMD_PAGES < PMD_PAGES - holes
        })?;
    }
    Ok(())
}

pub(super) fn one_page(context: &Context) -> Result<(), Failure> {
    let build = || context.region(16, 0);
    holes_become_zero(context, build, 9..10, |_| false)
}

/// The process may not write, and later may: the page must be its own by then.
pub(super) fn read_only_mapping(context: &Context) -> Result<(), Failure> {
    const PAGES: usize = 300;
    for back in [Return::Request, Return::Fault] {
        context.soil(2 * PAGES)?;
        let region = context.region(PAGES, 0)?;
        region.protect(0..PAGES, Access::Read)?;
        fills(context, &region, 0..PAGES, &|_| false)?;
        region.protect(0..PAGES, Access::Write)?;
        returns(context, &region, 0..PAGES, &|_| false, back)?;
    }
    Ok(())
}

pub(super) fn fork_before_touch(context: &Context) -> Result<(), Failure> {
    const PAGES: usize = 700;
    for back in [Return::Request, Return::Fault] {
        context.soil(3 * PAGES)?;
        let region = context.region(PAGES, 0)?;
        let free = context.free()?;
        process::fork(context, |context| {
            fills(context, &region, 0..PAGES, &|_| false)?;
            returns(context, &region, 0..PAGES, &|_| false, back)
        })?
        .wait()?;
        // The child's pages are its own: the parent still has holes.
        context.wait_free(free)?;
        context.expect(&region, 0..PAGES, |_| Residency::None)?;
        fills(context, &region, 0..PAGES, &|_| false)?;
        returns(context, &region, 0..PAGES, &|_| false, back)?;
    }
    Ok(())
}

pub(super) fn fork_after_fill(context: &Context) -> Result<(), Failure> {
    const PAGES: usize = 700;
    for back in [Return::Request, Return::Fault] {
        context.soil(2 * PAGES)?;
        let free = context.free()?;
        let region = context.region(PAGES, 0)?;
        fills(context, &region, 0..PAGES, &|_| false)?;
        process::fork(context, |context| {
            returns(context, &region, 0..PAGES, &|_| false, back)
        })?
        .wait()?;
        // What the child wrote to its copies is not seen here.
        context.check(&region, 0..PAGES, |_| 0)?;
        context.wait_free(free)?;
        region.fill_all(1);
        context.check(&region, 0..PAGES, |_| 1)?;
    }
    Ok(())
}

/// Migration to RAM sees holes too, and must leave them alone.
pub(super) fn holes_on_the_way_back(context: &Context) -> Result<(), Failure> {
    const PAGES: usize = 1024;
    let region = context.region(PAGES, 0)?;
    let touched = |page: usize| page % 3 == 1 && page < PMD_PAGES;
    for page in (0..PAGES).filter(|&page| touched(page)) {
        region.fill(page, 1);
        context.settle(region.range(page..page + 1), Direction::ToDevice, 0)?;
    }
    let free = context.free()?;
    let pages = (0..PAGES).filter(|&page| touched(page)).count();
    let change = device_change(context, &["fill_frames", "from_device_frames"], || {
        let settled = context.settle(region.all(), Direction::ToSystem, 0)?;
        require!(
            settled.moved == pages as u64 && settled.filled == 0,
            "{pages} pages among holes: {settled:?}"
        );
        Ok(())
    })?;
    require!(
        change == [0, pages as i64],
        "the device filled {} and copied {} frames for {pages} pages",
        change[0],
        change[1]
    );
    context.expect(&region, 0..PAGES, |page| {
        if touched(page) {
            Residency::Ram
        } else {
            Residency::None
        }
    })?;
    context.wait_free(free + (pages * PAGE_SIZE) as u64)?;
    context.check(&region, 0..PAGES, |page| u64::from(touched(page)))
}
