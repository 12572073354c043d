//! Signals arrive during migrations of long ranges.
//!
//! Shows that an interrupted call tells how far it came, that what it reports is
//! what happened, and that going on from there completes the range.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use virtio_hmm_client::{Direction, Error, MigrateError, Outcome, PAGE_SIZE};

use crate::context::Context;
use crate::failure::Failure;
use crate::region::{PMD_PAGES, Region};
use crate::require;
use crate::shared::install;

/// How long to try for a call that is interrupted in its middle.
const PATIENCE: Duration = Duration::from_secs(30);

extern "C" fn ignore(_: libc::c_int) {}

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let pages = context.pages.max(8 * PMD_PAGES);
    if context.free()? < (pages * PAGE_SIZE) as u64 {
        return Err(Failure::Skip(
            "too little device memory for several batches".into(),
        ));
    }
    install(libc::SIGUSR1, ignore as *const () as usize, 0)?;
    let region = context.region(pages, 0)?;
    let stop = AtomicBool::new(false);
    // SAFETY: pthread_self always succeeds.
    let target = unsafe { libc::pthread_self() };
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = context.random(0);
            while !stop.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_micros(random.u64(500..30_000)));
                // SAFETY: the target is the thread that waits for this one.
                unsafe { libc::pthread_kill(target, libc::SIGUSR1) };
            }
        });
        let result = interrupted(context, &region);
        stop.store(true, Ordering::Relaxed);
        result
    })
}

fn interrupted(context: &Context, region: &Region) -> Result<(), Failure> {
    let end = context.end();
    let patience = Instant::now() + PATIENCE;
    let mut in_the_middle = 0;
    let mut generation = 0;
    while in_the_middle == 0 || Instant::now() < end {
        require!(
            Instant::now() < patience.max(end),
            "no signal interrupted a migration in its middle"
        );
        generation += 1;
        region.fill_all(generation);
        for direction in [Direction::ToDevice, Direction::ToSystem] {
            in_the_middle += piecewise(context, region, direction)?;
        }
        context.check(region, 0..region.pages(), |_| generation)?;
    }
    Ok(())
}

/// Migrate the region, going on after each signal; returns how many calls were
/// interrupted after some of their range.
fn piecewise(context: &Context, region: &Region, direction: Direction) -> Result<u64, Failure> {
    let mut range = region.all();
    let mut total = Outcome::default();
    let mut in_the_middle = 0;
    loop {
        match context.device.migrate(range.clone(), direction) {
            Ok(outcome) => {
                total += outcome;
                require!(
                    total.done == (region.pages() * PAGE_SIZE) as u64
                        && total.pages() == region.pages() as u64,
                    "the pieces do not add up: {total:?}"
                );
                return Ok(in_the_middle);
            }
            Err(MigrateError {
                outcome,
                source: Error::Interrupted,
            }) => {
                let done = usize::try_from(outcome.done).unwrap_or(usize::MAX);
                require!(
                    done < range.len()
                        && done.is_multiple_of(PAGE_SIZE)
                        && outcome.pages() == (done / PAGE_SIZE) as u64,
                    "an interrupted call reports {outcome:?}"
                );
                in_the_middle += u64::from(done > 0);
                total += outcome;
                range.start += done;
            }
            Err(error) => return Err(error.into()),
        }
    }
}
