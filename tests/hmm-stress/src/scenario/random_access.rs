//! Threads read and write while another migrates the same pages both ways.
//!
//! Shows that no write is lost and no stale byte is seen, whenever a page moves. Most
//! pages belong to one thread each, which knows what they hold; some are counters
//! that all threads increment, where a lost update shows in the sum.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use virtio_hmm_client::Direction;

use crate::context::Context;
use crate::failure::Failure;
use crate::pattern::WORDS;
use crate::region::Region;
use crate::require;

/// Most pages of the region; with more, none would move often.
const MOST_PAGES: usize = 2048;

/// Every page whose number is a multiple of this is one of counters.
const COUNTER_STRIDE: usize = 16;

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let region = context.region(context.pages.min(MOST_PAGES), 0)?;
    let stop = AtomicBool::new(false);
    let increments = thread::scope(|scope| {
        let workers: Vec<_> = (0..context.threads)
            .map(|thread| {
                let (region, stop) = (&region, &stop);
                scope.spawn(move || access(context, region, stop, thread))
            })
            .collect();
        let migrated = migrate(context, &region);
        stop.store(true, Ordering::Relaxed);
        let mut increments = 0;
        for worker in workers {
            increments += worker
                .join()
                .map_err(|_| Failure::Broken("a thread panicked".into()))??;
        }
        migrated.map(|()| increments)
    })?;
    let counted: u64 = (0..region.pages())
        .step_by(COUNTER_STRIDE)
        .flat_map(|page| region.words(page))
        .map(|word| word.load(Ordering::Relaxed))
        .sum();
    require!(
        counted == increments,
        "threads made {increments} increments, memory has {counted}"
    );
    Ok(())
}

fn migrate(context: &Context, region: &Region) -> Result<(), Failure> {
    let mut random = context.random(0);
    let end = context.end();
    loop {
        for direction in [Direction::ToDevice, Direction::ToSystem] {
            let first = random.usize(0..region.pages());
            let last = random.usize(first..region.pages());
            context.migrate(region.range(first..last + 1), direction)?;
        }
        context.migrate(region.all(), Direction::ToDevice)?;
        if std::time::Instant::now() >= end {
            return Ok(());
        }
    }
}

/// Read and write the pages of `thread` until told to stop; returns how many
/// increments were made.
fn access(
    context: &Context,
    region: &Region,
    stop: &AtomicBool,
    thread: usize,
) -> Result<u64, Failure> {
    let mut random = context.random(1 + thread as u64);
    let mut generations = vec![0; region.pages()];
    let own: Vec<usize> = (0..region.pages())
        .filter(|page| page % COUNTER_STRIDE != 0 && page % context.threads == thread)
        .collect();
    let mut increments = 0;
    while !stop.load(Ordering::Relaxed) {
        if let Some(&page) = random.choice(&own) {
            context.check(region, page..page + 1, |_| generations[page])?;
            if random.bool() {
                generations[page] += 1;
                region.fill(page, generations[page]);
            }
        }
        let counters = random.usize(0..region.pages()) / COUNTER_STRIDE * COUNTER_STRIDE;
        region.words(counters)[random.usize(0..WORDS)].fetch_add(1, Ordering::Relaxed);
        increments += 1;
    }
    for page in own {
        context.check(region, page..page + 1, |_| generations[page])?;
    }
    Ok(increments)
}
