//! S4: a device page that cannot come back is lost to SIGBUS, so none may be while the
//! device works.
//!
//! Faults race with migration both ways, with discarding and unmapping, and with fork.
//! SIGBUS is counted by the handler in [`shared`](crate::shared), in all processes, and
//! looked at after every test.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use virtio_hmm_client::Direction;

use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::Region;
use crate::require;
use crate::shared::counts;

/// Pages of each range.
const PAGES: usize = 1024;

/// How long the races go on.
const DURATION: Duration = Duration::from_secs(3);

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    let discarded = context.region(PAGES, 1)?;
    let stop = AtomicBool::new(false);
    let before = counts().sigbus.load(Ordering::Relaxed);
    thread::scope(|scope| {
        let readers: Vec<_> = (0..context.threads.max(2) as u64)
            .map(|thread| {
                let (region, stop) = (&region, &stop);
                scope.spawn(move || read(context, region, stop, thread))
            })
            .collect();
        let discarder = scope.spawn(|| discard(&discarded, context.random(100), &stop));
        let raced = race(context, &region, &discarded);
        stop.store(true, Ordering::Relaxed);
        for reader in readers.into_iter().chain([discarder]) {
            reader
                .join()
                .map_err(|_| Failure::Broken("a thread panicked".into()))??;
        }
        raced
    })?;
    let signals = counts().sigbus.load(Ordering::Relaxed) - before;
    require!(signals == 0, "{signals} SIGBUS");
    context.check(&region, 0..PAGES, |_| 1)
}

/// Read and check random pages.
fn read(context: &Context, region: &Region, stop: &AtomicBool, thread: u64) -> Result<(), Failure> {
    let mut random = context.random(1 + thread);
    while !stop.load(Ordering::Relaxed) {
        let page = random.usize(0..PAGES);
        context.check(region, page..page + 1, |_| 1)?;
    }
    Ok(())
}

/// Write to and discard random pages.
fn discard(region: &Region, mut random: fastrand::Rng, stop: &AtomicBool) -> Result<(), Failure> {
    while !stop.load(Ordering::Relaxed) {
        let first = random.usize(0..PAGES);
        let last = PAGES.min(first + 8);
        (first..last).for_each(|page| region.fill(page, 1));
        region.discard(first..last)?;
        region.touch(first);
    }
    Ok(())
}

/// Migrate both ways, unmap what is migrating, and fork, until the time is over.
fn race(context: &Context, region: &Region, discarded: &Region) -> Result<(), Failure> {
    let mut random = context.random(0);
    let end = Instant::now() + DURATION;
    let mut number = 2;
    while Instant::now() < end {
        for direction in [
            Direction::ToDevice,
            Direction::ToSystem,
            Direction::ToDevice,
        ] {
            let first = random.usize(0..PAGES);
            context.migrate(region.range(first..PAGES), direction)?;
            context.migrate(discarded.all(), direction)?;
        }
        context.migrate(region.all(), Direction::ToDevice)?;
        process::fork(context, |context| {
            context.check(region, 0..PAGES / 4, |_| 1)?;
            context.migrate(region.all(), Direction::ToDevice)?;
            context.check(region, 0..PAGES, |_| 1)
        })?
        .wait()?;
        unmap(context, number)?;
        number += 1;
    }
    Ok(())
}

/// Unmap a region, a part at a time, while another thread migrates it.
fn unmap(context: &Context, number: u64) -> Result<(), Failure> {
    let mut region = context.region(PAGES, number)?;
    region.fill_all(1);
    let range = region.all();
    thread::scope(|scope| {
        let migrator = scope.spawn(|| {
            for direction in [
                Direction::ToDevice,
                Direction::ToSystem,
                Direction::ToDevice,
            ] {
                context.migrate_mapped(range.clone(), direction)?;
            }
            Ok::<(), Failure>(())
        });
        while region.pages() > 1 {
            let (left, right) = region.split_at(64);
            drop(left);
            region = right;
            thread::yield_now();
        }
        migrator
            .join()
            .map_err(|_| Failure::Broken("a thread panicked".into()))?
    })
}
