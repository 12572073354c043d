//! Working sets that do not fit into device memory.
//!
//! Shows that what was used least recently goes home, that no page is lost or left
//! behind, and that a process that wants more than there is takes nothing from one that
//! is content with its share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency, Skip};

use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::{PMD_PAGES, Region};
use crate::require;

/// The working set, in times of what may be on the device.
const TIMES: usize = 8;

/// Blocks of 2 MiB that may be on the device, where device memory itself is too large
/// to be oversubscribed with the guest's RAM.
const BLOCKS: usize = 8;

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    least_recently_used(context)?;
    thrash(context)?;
    spares_a_small_user(context)
}

/// Let this process have a few blocks only, and return how many pages that is.
fn limit(context: &Context) -> Result<usize, Failure> {
    let memory = usize::try_from(context.device.info()?.memory_size).unwrap_or(usize::MAX);
    let pages = (memory / PAGE_SIZE).min(BLOCKS * PMD_PAGES);
    context.device.set_limit(Some((pages * PAGE_SIZE) as u64))?;
    Ok(pages)
}

/// Bring `pages` to the device, all of them.
fn bring(context: &Context, region: &Region, pages: std::ops::Range<usize>) -> Result<(), Failure> {
    let settled = context.settle(region.range(pages.clone()), Direction::ToDevice, 0)?;
    require!(
        settled.last.skipped(Skip::NoMemory) == 0,
        "no room was made for {pages:?}: {settled:?}"
    );
    Ok(())
}

fn resident(context: &Context, region: &Region) -> Result<usize, Failure> {
    let residency = context.device.query(region.all())?;
    Ok(residency
        .iter()
        .filter(|&&seen| seen == Residency::Device)
        .count())
}

/// Blocks go home in the order of their last use, which a migration is even if the
/// pages are there.
fn least_recently_used(context: &Context) -> Result<(), Failure> {
    let context = &context.reopen()?;
    let room = limit(context)?;
    let region = context.region(room + 2 * PMD_PAGES, 0)?;
    let block = |number: usize| number * PMD_PAGES..(number + 1) * PMD_PAGES;
    region.fill_all(1);
    bring(context, &region, 0..room)?;
    // The first was used again, so the second goes.
    bring(context, &region, block(0))?;
    let blocks = room / PMD_PAGES;
    bring(context, &region, block(blocks))?;
    if blocks > 1 {
        context.expect(&region, block(0), |_| Residency::Device)?;
        context.expect(&region, block(1), |_| Residency::Ram)?;
    }
    context.expect(&region, block(blocks), |_| Residency::Device)?;
    let used = context.device.limit()?.used;
    require!(
        used == (room * PAGE_SIZE) as u64,
        "{used} bytes are used of {room} pages"
    );
    context.check(&region, 0..region.pages(), |_| 1)
}

/// Threads that share a working set of eight times what may be on the device.
fn thrash(context: &Context) -> Result<(), Failure> {
    let context = &context.reopen()?;
    let room = limit(context)?;
    let pages = TIMES * room / context.threads / PMD_PAGES * PMD_PAGES;
    let failed = AtomicBool::new(false);
    thread::scope(|scope| {
        let threads = (0..context.threads)
            .map(|number| {
                let failed = &failed;
                scope.spawn(move || {
                    let result = thrash_thread(context, number as u64, pages, room, failed);
                    failed.fetch_or(result.is_err(), Ordering::Relaxed);
                    result
                })
            })
            .collect::<Vec<_>>();
        threads
            .into_iter()
            .try_for_each(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
    })
}

fn thrash_thread(
    context: &Context,
    number: u64,
    pages: usize,
    room: usize,
    failed: &AtomicBool,
) -> Result<(), Failure> {
    let mut random = context.random(number);
    let region = context.region(pages, number)?;
    let mut generations = vec![1; pages];
    region.fill_all(1);
    // All of it once, and some of it until the time is over.
    let end = context.end();
    let mut brought = 0;
    while brought < pages || Instant::now() < end {
        let (first, most) = if brought < pages {
            (brought, PMD_PAGES)
        } else {
            (random.usize(0..pages), random.usize(1..=2 * PMD_PAGES))
        };
        let some = first..pages.min(first + most);
        brought += some.len();
        bring(context, &region, some.clone())?;
        let resident = resident(context, &region)?;
        require!(
            resident <= room,
            "{resident} pages are on the device, where {room} may be"
        );
        let page = random.usize(some.clone());
        context.check(&region, page..page + 1, |page| generations[page])?;
        generations[page] += 1;
        region.fill(page, generations[page]);
        if failed.load(Ordering::Relaxed) {
            return Ok(());
        }
    }
    context.check(&region, 0..pages, |page| generations[page])
}

/// A process that keeps wanting more than the device has, and one with a quarter of it.
fn spares_a_small_user(context: &Context) -> Result<(), Failure> {
    let device = usize::try_from(context.device.info()?.memory_size).unwrap_or(0) / PAGE_SIZE;
    let small = context.region(device / 4, 0)?;
    // Holes need no RAM until they are evicted.
    bring(context, &small, 0..small.pages())?;
    let before = context.driver_counters()?.get("pages_evicted")?;
    process::fork(context, |context| {
        let large = context.region(device + device / 4, 1)?;
        for first in (0..large.pages()).step_by(PMD_PAGES) {
            let some = first..large.pages().min(first + PMD_PAGES);
            bring(context, &large, some.clone())?;
            context.check(&large, some.start..some.start + 1, |_| 0)?;
        }
        Ok(())
    })?
    .wait()?;
    let evicted = context.driver_counters()?.get("pages_evicted")? - before;
    require!(evicted > 0, "nothing had to go home");
    context.expect(&small, 0..small.pages(), |_| Residency::Device)?;
    context.check(&small, 0..small.pages(), |_| 0)
}
