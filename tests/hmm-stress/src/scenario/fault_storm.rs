//! CPU faults on device pages by several threads at once.
//!
//! Shows that racing faults on one page bring it back once and whole, that faults on
//! different pages do not disturb each other.

use std::hint;
use std::sync::Barrier;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Instant;

use virtio_hmm_client::{Direction, Residency};

use crate::context::Context;
use crate::failure::Failure;
use crate::pattern::mix;
use crate::region::Region;
use crate::require;

/// Which pages the threads touch, and in what order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// All threads the same pages, in one order.
    Same,
    /// Each thread its own stretch.
    Different,
    /// Neighbouring pages by different threads; every other one is written first.
    Interleaved,
}

/// Most pages of a round; more would only repeat.
const MOST_PAGES: usize = 1024;

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let region = context.region(context.pages.min(MOST_PAGES), 0)?;
    let end = context.end();
    let mut generation = 0;
    loop {
        for order in [Order::Different, Order::Same, Order::Interleaved] {
            generation += 1;
            storm(context, &region, order, generation)?;
        }
        if Instant::now() >= end {
            return Ok(());
        }
    }
}

fn storm(context: &Context, region: &Region, order: Order, generation: u64) -> Result<(), Failure> {
    region.fill_all(generation);
    context.settle(region.all(), Direction::ToDevice, 0)?;
    let placed = context.device.query(region.all())?;
    let on_device: Vec<usize> = (0..region.pages())
        .filter(|&page| placed[page] == Residency::Device)
        .collect();
    require!(
        on_device.len() == region.pages(),
        "{} of {} pages are on the device",
        on_device.len(),
        region.pages()
    );
    let barrier = Barrier::new(context.threads);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..context.threads)
            .map(|thread| {
                let pages = share(&on_device, order, thread, context.threads);
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    touch(context, region, order, &pages, generation)
                })
            })
            .collect();
        for worker in workers {
            worker
                .join()
                .map_err(|_| Failure::Broken("a thread panicked".into()))??;
        }
        Ok::<(), Failure>(())
    })?;
    context.expect(region, 0..region.pages(), |_| Residency::Ram)
}

/// The pages of `thread` out of `threads`.
fn share(pages: &[usize], order: Order, thread: usize, threads: usize) -> Vec<usize> {
    match order {
        Order::Same => pages.to_vec(),
        Order::Different => {
            let length = pages.len().div_ceil(threads).max(1);
            pages.chunks(length).nth(thread).unwrap_or(&[]).to_vec()
        }
        Order::Interleaved => pages
            .iter()
            .copied()
            .filter(|page| page % threads == thread)
            .collect(),
    }
}

/// Access each page, and check it.
fn touch(
    context: &Context,
    region: &Region,
    order: Order,
    pages: &[usize],
    generation: u64,
) -> Result<(), Failure> {
    for &page in pages {
        let writes = order == Order::Interleaved && mix(page as u64) & 1 == 0;
        let word = &region.words(page)[0];
        if writes {
            // A write fault that leaves the contents as they are.
            word.fetch_or(0, Ordering::Relaxed);
        } else {
            hint::black_box(word.load(Ordering::Relaxed));
        }
        context.check(region, page..page + 1, |_| generation)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_has_a_thread() {
        let pages: Vec<usize> = (0..10).collect();
        for order in [Order::Different, Order::Interleaved] {
            for threads in 1..13 {
                let mut all: Vec<usize> = (0..threads)
                    .flat_map(|thread| share(&pages, order, thread, threads))
                    .collect();
                all.sort_unstable();
                assert_eq!(all, pages, "{order:?} {threads}");
            }
        }
        assert_eq!(share(&pages, Order::Same, 1, 2), pages);
    }
}
