//! Pages move from the memory of one device to that of another.
//!
//! Shows that each device knows its own pages from the other's, whatever mixture a
//! range holds, and that what comes home is what went there last.

use std::path::PathBuf;
use std::time::Instant;

use virtio_hmm_client::{Device, Direction, Residency, Skip};

use super::huge_pages;
use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::{PMD_PAGES, PageSize, Region};
use crate::require;

const PAGES: usize = 2 * PMD_PAGES;

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let other = context.at(other(context)?)?;
    there_and_on(context, &other, PageSize::Small)?;
    if huge_pages::available() {
        there_and_on(context, &other, PageSize::Huge)?;
    }
    mixture(context, &other)?;
    in_a_child(context, &other)?;
    at_random(context, &other)
}

/// Another device than the one of the context.
fn other(context: &Context) -> Result<PathBuf, Failure> {
    ["/dev/hmm0", "/dev/hmm1"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| path != context.path() && Device::open(path).is_ok())
        .ok_or_else(|| Failure::Skip("there is only one device".into()))
}

/// Where the pages are, as both devices see it.
fn expect(
    context: &Context,
    other: &Context,
    region: &Region,
    seen: Residency,
) -> Result<(), Failure> {
    let mirrored = match seen {
        Residency::Device => Residency::OtherDevice,
        Residency::OtherDevice => Residency::Device,
        same => same,
    };
    context.expect(region, 0..region.pages(), |_| seen)?;
    other.expect(region, 0..region.pages(), |_| mirrored)
}

/// To one device, to the other, back to the first, and home by CPU faults.
fn there_and_on(context: &Context, other: &Context, size: PageSize) -> Result<(), Failure> {
    let region = Region::new(PAGES, size, context.region_seed(0))?;
    region.fill_all(1);
    context.settle(region.all(), Direction::ToDevice, 0)?;
    expect(context, other, &region, Residency::Device)?;
    for (to, seen) in [
        (other, Residency::OtherDevice),
        (context, Residency::Device),
        (other, Residency::OtherDevice),
    ] {
        let fetched = to.driver_counters()?.get("pages_from_peer")?;
        let settled = to.settle(region.all(), Direction::ToDevice, 0)?;
        let fetched = to.driver_counters()?.get("pages_from_peer")? - fetched;
        require!(
            (settled.moved, settled.filled, fetched) == (PAGES as u64, 0, PAGES as u64),
            "{settled:?}, {fetched} of {PAGES} pages from the other device"
        );
        expect(context, other, &region, seen)?;
    }
    // A device brings home only what it has.
    let settled = context.settle(region.all(), Direction::ToSystem, 0)?;
    require!(
        settled.last.skipped(Skip::Already) == PAGES as u64,
        "{settled:?}"
    );
    expect(context, other, &region, Residency::OtherDevice)?;
    context.check(&region, 0..PAGES, |_| 1)?;
    context.expect(&region, 0..PAGES, |_| Residency::Ram)
}

/// A hole, a page in RAM, one on each device, in turn; and each goes where it shall.
fn mixture(context: &Context, other: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 1)?;
    let generation = |page: usize| u64::from(!page.is_multiple_of(4));
    for page in 0..PAGES {
        if generation(page) != 0 {
            region.fill(page, 1);
        }
        let to = match page % 4 {
            2 => context,
            3 => other,
            _ => continue,
        };
        to.settle(region.range(page..page + 1), Direction::ToDevice, 0)?;
    }
    context.settle(region.range(0..PMD_PAGES), Direction::ToDevice, 0)?;
    context.expect(&region, 0..PMD_PAGES, |_| Residency::Device)?;
    other.settle(region.all(), Direction::ToSystem, 0)?;
    context.expect(&region, PMD_PAGES..PAGES, |page| match page % 4 {
        0 => Residency::None,
        2 => Residency::Device,
        _ => Residency::Ram,
    })?;
    context.device.release(region.all())?;
    context.check(&region, 0..PAGES, generation)
}

/// Parent and child have the same pages, on the first device.
fn in_a_child(context: &Context, other: &Context) -> Result<(), Failure> {
    let region = context.region(PMD_PAGES, 2)?;
    region.fill_all(1);
    context.settle(region.all(), Direction::ToDevice, 0)?;
    process::fork(other, |other| {
        other.settle(region.all(), Direction::ToDevice, 0)?;
        other.expect(&region, 0..PMD_PAGES, |_| Residency::Device)?;
        region.fill(0, 2);
        other.check(&region, 0..PMD_PAGES, |page| if page == 0 { 2 } else { 1 })
    })?
    .wait()?;
    context.check(&region, 0..PMD_PAGES, |_| 1)
}

fn at_random(context: &Context, other: &Context) -> Result<(), Failure> {
    let mut random = context.random(0);
    let pages = context.pages.min(4 * PMD_PAGES);
    let region = Region::new(pages, PageSize::Huge, context.region_seed(3))?;
    let mut generations = vec![0; pages];
    let end = context.end();
    let mut generation = 0;
    while generation == 0 || Instant::now() < end {
        generation += 1;
        let first = random.usize(0..pages);
        let some = first..random.usize(first..pages.min(first + PMD_PAGES)) + 1;
        let to = if random.bool() { context } else { other };
        match random.u8(0..8) {
            0..4 => {
                to.migrate(region.range(some), Direction::ToDevice)?;
            }
            4 => {
                to.migrate(region.range(some), Direction::ToSystem)?;
            }
            5 => {
                for page in some {
                    region.fill(page, generation);
                    generations[page] = generation;
                }
            }
            6 => to.check(&region, some, |page| generations[page])?,
            _ => {
                region.discard(some.clone())?;
                generations[some].fill(0);
            }
        }
    }
    context.check(&region, 0..pages, |page| generations[page])
}
