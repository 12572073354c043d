//! S4: a device page that cannot come back is lost to SIGBUS, so none may be while the
//! device works.
//!
//! Faults race with migration both ways, with discarding and unmapping, and with fork.
//! SIGBUS is counted by the handler in [`shared`](crate::shared), in all processes, and
//! looked at after every test.

use std::hint;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use virtio_hmm_client::Direction;

use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::Region;
use crate::require;

/// Pages of each range.
const PAGES: usize = 1024;

/// How long each kind of race goes on.
const DURATION: Duration = Duration::from_secs(2);

/// Pages of the range that is discarded under the faults.
const FAULTING_PAGES: usize = 64;

/// Most turns that the discarding thread waits when a fault begins: a few of them take as
/// long as the kernel needs from the fault to the look at the page.
const MOST_TURNS: u32 = 32;

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    discard_while_faulting(context)?;
    storm(context)
}

/// One thread faults on pages, the other discards each at the very moment: the fault
/// handler then finds no page to bring back, which is no reason for a signal.
fn discard_while_faulting(context: &Context) -> Result<(), Failure> {
    let region = context.region(FAULTING_PAGES, 99)?;
    let mut random = context.random(99);
    let end = Instant::now() + DURATION;
    while Instant::now() < end {
        region.fill_all(1);
        context.migrate(region.all(), Direction::ToDevice)?;
        let faulting = AtomicUsize::new(FAULTING_PAGES);
        thread::scope(|scope| {
            let faulter = scope.spawn(|| {
                (0..FAULTING_PAGES).all(|page| {
                    faulting.store(page, Ordering::Relaxed);
                    let words = region.words(page).iter();
                    words
                        .zip(region.pattern(page, 1).words())
                        .all(|(word, written)| {
                            let seen = word.load(Ordering::Relaxed);
                            seen == written || seen == 0
                        })
                })
            });
            let mut discarded = FAULTING_PAGES;
            while !faulter.is_finished() {
                let page = faulting.load(Ordering::Relaxed);
                if page != discarded {
                    for _ in 0..random.u32(0..MOST_TURNS) {
                        hint::spin_loop();
                    }
                    region.discard(page..page + 1)?;
                    discarded = page;
                }
            }
            let whole = faulter
                .join()
                .map_err(|_| Failure::Broken("a thread panicked".into()))?;
            require!(whole, "a page held neither what was written nor zero");
            Ok::<(), Failure>(())
        })?;
    }
    Ok(())
}

/// Faults, migration, discarding, unmapping and fork all at once.
fn storm(context: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    let discarded = context.region(PAGES, 1)?;
    let stop = AtomicBool::new(false);
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
