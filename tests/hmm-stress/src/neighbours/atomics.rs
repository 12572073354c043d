//! Atomic instructions of several threads on pages that migrate meanwhile: none is lost.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use virtio_hmm_client::{Direction, Residency};

use super::meanwhile::meanwhile;
use crate::context::Context;
use crate::failure::Failure;
use crate::pattern::WORDS;
use crate::require;

const PAGES: usize = 8;
const TIME: Duration = Duration::from_secs(2);

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 0)?;
    context.settle(region.all(), Direction::ToDevice, 0)?;
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;
    let end = Instant::now() + TIME;
    let add = |thread| {
        let mut random = context.random(thread);
        let mut added = 0;
        while Instant::now() < end {
            let word = &region.words(random.usize(0..PAGES))[random.usize(0..WORDS)];
            if random.bool() {
                word.fetch_add(1, Ordering::Relaxed);
                added += 1;
            } else {
                let seen = word.load(Ordering::Relaxed);
                let order = Ordering::Relaxed;
                let changed = word.compare_exchange(seen, seen + 2, order, order);
                added += if changed.is_ok() { 2 } else { 0 };
            }
        }
        added
    };
    let both = [Direction::ToDevice, Direction::ToSystem];
    let added: u64 = meanwhile(context, &[&region], &both, || {
        thread::scope(|scope| {
            let threads: Vec<_> = (0..context.threads.max(2) as u64)
                .map(|thread| scope.spawn(move || add(thread)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join())
                .sum::<Result<u64, _>>()
                .map_err(|_| Failure::Broken("a thread panicked".into()))
        })
    })?;
    context.settle(region.all(), Direction::ToDevice, 0)?;
    let sum: u64 = (0..PAGES)
        .flat_map(|page| region.words(page))
        .map(|word| word.load(Ordering::Relaxed))
        .sum();
    require!(
        sum == added && added > 0,
        "threads added {added} and memory holds {sum}"
    );
    Ok(())
}
