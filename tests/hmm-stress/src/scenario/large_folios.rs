//! Large folios on the device.
//!
//! Shows that a huge page or a hole as large travels as one, and comes home as one when
//! it is touched; that it survives being unmapped, protected, discarded, moved and copied
//! on write in part; and that it goes in small pages when the device has no whole block.

use std::fs;
use std::time::Instant;

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use super::transparent_huge_pages;
use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::{Access, PMD_PAGES, PageSize, Region};
use crate::require;

/// Huge pages of a region.
const HUGE_PAGES: usize = 2;
const PAGES: usize = HUGE_PAGES * PMD_PAGES;

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    if !transparent_huge_pages() {
        return Err(Failure::Skip("there are no transparent huge pages".into()));
    }
    if !wanted() {
        return Err(Failure::Skip("the driver splits huge pages here".into()));
    }
    let end = context.end();
    let mut random = context.random(0);
    loop {
        moves_as_one(context)?;
        hole_is_filled_as_one(context)?;
        changes_in_part(context, &mut random)?;
        copied_on_write(context, &mut random)?;
        goes_small_without_a_block(context)?;
        if Instant::now() >= end {
            return Ok(());
        }
    }
}

/// Kernels before 6.19 have no large folios of device memory.
fn wanted() -> bool {
    fs::read_to_string("/sys/module/virtio_hmm/parameters/large_folios")
        .is_ok_and(|value| value.trim_end() == "Y")
}

/// What counter `name` gained during `action`.
fn gained(
    context: &Context,
    name: &str,
    action: impl FnOnce() -> Result<(), Failure>,
) -> Result<u64, Failure> {
    let before = context.driver_counters()?.get(name)?;
    action()?;
    Ok(context.driver_counters()?.get(name)? - before)
}

fn huge_region(context: &Context, number: u64) -> Result<Region, Failure> {
    Region::new(PAGES, PageSize::Huge, context.region_seed(number))
}

/// A region whose pages are huge and on the device. The kernel may not have had a huge
/// page to begin with, but in a fresh region it nearly always has.
fn on_device(context: &Context, number: u64) -> Result<Region, Failure> {
    let region = huge_region(context, number)?;
    region.fill_all(1);
    context.settle(region.all(), Direction::ToDevice, 0)?;
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;
    Ok(region)
}

fn moves_as_one(context: &Context) -> Result<(), Failure> {
    let mut region = None;
    let there = gained(context, "thp_to_device", || {
        region = Some(on_device(context, 0)?);
        Ok(())
    })?;
    require!(there > 0, "no huge page went to the device as one");
    let Some(region) = region else {
        return Ok(());
    };
    // One touch brings all of it home.
    let home = gained(context, "thp_to_system", || {
        context.check(&region, 5..6, |_| 1)
    })?;
    require!(home == 1, "{home} huge pages came home by one touch");
    context.expect(&region, 0..PMD_PAGES, |_| Residency::Ram)?;
    context.settle(region.all(), Direction::ToSystem, 0)?;
    context.check(&region, 0..PAGES, |_| 1)
}

fn hole_is_filled_as_one(context: &Context) -> Result<(), Failure> {
    context.soil(2 * PAGES)?;
    let region = huge_region(context, 1)?;
    let filled = gained(context, "thp_to_device", || {
        context
            .settle(region.all(), Direction::ToDevice, 0)
            .map(drop)
    })?;
    require!(
        filled == HUGE_PAGES as u64,
        "{filled} of {HUGE_PAGES} huge holes were filled as one"
    );
    context.check(&region, 0..PAGES, |_| 0)
}

fn changes_in_part(context: &Context, random: &mut fastrand::Rng) -> Result<(), Failure> {
    let region = on_device(context, 2)?;
    let discarded = random.usize(1..PMD_PAGES / 2);
    let read_only = random.usize(PMD_PAGES / 2..PMD_PAGES - 1);
    let cut = PMD_PAGES + random.usize(1..PMD_PAGES - 1);

    region.discard(discarded..discarded + 3)?;
    region.protect(read_only..read_only + 1, Access::Read)?;
    let expected = |page: usize| {
        if (discarded..discarded + 3).contains(&page) {
            0
        } else {
            1
        }
    };
    // Part of it by fault, before and after its neighbours are unmapped or moved.
    context.check(&region, 0..discarded + 4, expected)?;
    let (left, right) = region.split_at(cut);
    let right = right.relocate()?;
    context.expect(&right, 0..right.pages(), |_| Residency::Device)?;
    context.check(&left, 0..cut, expected)?;
    context.check(&right, 0..right.pages(), |_| 1)?;

    for part in [&left, &right] {
        context.settle(part.all(), Direction::ToDevice, 0)?;
        context.expect(part, 0..part.pages(), |_| Residency::Device)?;
    }
    let (unmapped, left) = left.split_at(random.usize(1..cut));
    drop(unmapped);
    left.protect(0..left.pages(), Access::Write)?;
    context.settle(left.all(), Direction::ToSystem, 0)?;
    left.fill_all(2);
    context.check(&left, 0..left.pages(), |_| 2)?;
    context.check(&right, 0..right.pages(), |_| 1)
}

fn copied_on_write(context: &Context, random: &mut fastrand::Rng) -> Result<(), Failure> {
    let region = on_device(context, 3)?;
    let (child_page, parent_page) = (random.usize(0..PAGES), random.usize(0..PAGES));
    let child = process::fork(context, |context| {
        region.fill(child_page, 2);
        context.migrate(region.range(0..PMD_PAGES), Direction::ToDevice)?;
        context.check(
            &region,
            0..PAGES,
            |page| if page == child_page { 2 } else { 1 },
        )
    })?;
    region.fill(parent_page, 3);
    context.migrate(region.all(), Direction::ToDevice)?;
    child.wait()?;
    context.check(
        &region,
        0..PAGES,
        |page| if page == parent_page { 3 } else { 1 },
    )
}

/// With one small page left in each block of device memory there is none for a huge one.
fn goes_small_without_a_block(context: &Context) -> Result<(), Failure> {
    let context = &context.without_eviction()?;
    let frames = usize::try_from(context.free()?).unwrap_or(usize::MAX) / PAGE_SIZE;
    // A piece at a time, so that little RAM is needed for much device memory.
    let mut pieces = Vec::new();
    for _ in 0..frames / PMD_PAGES {
        let piece = context.region(PMD_PAGES, 4)?;
        context.settle(piece.all(), Direction::ToDevice, 0)?;
        pieces.push(piece);
    }
    for piece in &pieces {
        context.settle(piece.range(1..PMD_PAGES), Direction::ToSystem, 0)?;
        piece.discard(1..PMD_PAGES)?;
    }
    let mut region = None;
    let fallbacks = gained(context, "thp_fallback", || {
        region = Some(on_device(context, 5)?);
        Ok(())
    })?;
    require!(fallbacks > 0, "there was a whole block after all");
    if let Some(region) = region {
        context.check(&region, 0..PAGES, |_| 1)?;
    }
    let hole = huge_region(context, 6)?;
    context.settle(hole.all(), Direction::ToDevice, 0)?;
    context.expect(&hole, 0..PAGES, |_| Residency::Device)?;
    context.check(&hole, 0..PAGES, |_| 0)
}
