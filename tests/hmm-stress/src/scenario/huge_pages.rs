//! Ranges that the kernel backs with huge pages.
//!
//! Shows that they migrate, whole and in part, as holes, as the huge zero page and
//! across fork, with every byte.

use std::fs;
use std::time::Instant;

use virtio_hmm_client::{Direction, Residency};

use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::{PMD_PAGES, PageSize, Region};

/// Huge pages of a region.
const HUGE_PAGES: usize = 4;

/// Whether the kernel gives huge pages to who asks for them.
pub(crate) fn available() -> bool {
    fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
        .is_ok_and(|choice| !choice.contains("[never]"))
}

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    if !available() {
        return Err(Failure::Skip("there are no transparent huge pages".into()));
    }
    let end = context.end();
    loop {
        whole(context)?;
        part(context)?;
        untouched(context)?;
        forked(context)?;
        if Instant::now() >= end {
            return Ok(());
        }
    }
}

fn region(context: &Context, number: u64) -> Result<Region, Failure> {
    Region::new(
        HUGE_PAGES * PMD_PAGES,
        PageSize::Huge,
        context.region_seed(number),
    )
}

fn whole(context: &Context) -> Result<(), Failure> {
    let region = region(context, 0)?;
    let pages = region.pages();
    region.fill_all(1);
    context.settle(region.all(), Direction::ToDevice, 0)?;
    context.expect(&region, 0..pages, |_| Residency::Device)?;
    // One page by fault, the rest on request.
    for page in (0..pages).step_by(PMD_PAGES) {
        context.check(&region, page..page + 1, |_| 1)?;
    }
    context.settle(region.all(), Direction::ToSystem, 0)?;
    context.check(&region, 0..pages, |_| 1)
}

fn part(context: &Context) -> Result<(), Failure> {
    let region = region(context, 1)?;
    let pages = region.pages();
    region.fill_all(1);
    let inner = PMD_PAGES / 2 + 3..pages - 5;
    context.settle(region.range(inner.clone()), Direction::ToDevice, 0)?;
    context.expect(&region, 0..pages, |page| {
        if inner.contains(&page) {
            Residency::Device
        } else {
            Residency::Ram
        }
    })?;
    for page in (0..pages).step_by(3) {
        region.fill(page, 2);
    }
    context.check(&region, 0..pages, |page| {
        if page.is_multiple_of(3) { 2 } else { 1 }
    })
}

/// A huge hole, then the huge zero page.
fn untouched(context: &Context) -> Result<(), Failure> {
    context.soil(2 * HUGE_PAGES * PMD_PAGES)?;
    for (number, touched) in [(2, false), (3, true)] {
        let region = region(context, number)?;
        let pages = region.pages();
        if touched {
            region.touch(1);
        }
        context.settle(region.all(), Direction::ToDevice, 0)?;
        context.check(&region, 0..pages, |_| 0)?;
        region.fill_all(1);
        context.check(&region, 0..pages, |_| 1)?;
    }
    Ok(())
}

fn forked(context: &Context) -> Result<(), Failure> {
    let region = region(context, 4)?;
    let pages = region.pages();
    region.fill_all(1);
    let child = process::fork(context, |context| {
        context.migrate(region.range(0..pages / 2), Direction::ToDevice)?;
        region.fill(7, 2);
        context.check(&region, 0..pages, |page| if page == 7 { 2 } else { 1 })
    })?;
    context.migrate(region.all(), Direction::ToDevice)?;
    region.fill(PMD_PAGES, 3);
    child.wait()?;
    context.check(
        &region,
        0..pages,
        |page| if page == PMD_PAGES { 3 } else { 1 },
    )
}
