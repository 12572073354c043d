//! S2: destination pages are handed in locked and with one reference.
//!
//! A page that is not locked, or stays locked, or has a reference too many or too few
//! cannot be told at once. It shows when the page is used in every way there is: a
//! lock that stays hangs the next fault, a lost reference frees a frame too early, one
//! too many never frees it.

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::Region;

/// Pages of the range.
const PAGES: usize = 1100;

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let free = context.free()?;
    let region = context.region(PAGES, 0)?;
    let untouched = PAGES / 2;
    let generation = |page| if page < untouched { 1 } else { 0 };
    for page in 0..untouched {
        region.fill(page, 1);
    }
    for _ in 0..3 {
        arrive(context, &region, free)?;
        // Back on request.
        context.settle(region.all(), Direction::ToSystem, 0)?;
        context.expect(&region, 0..PAGES, |_| Residency::Ram)?;
        context.wait_free(free)?;
        context.check(&region, 0..PAGES, generation)?;

        // Back by fault, each page once; some by the child, which shares them.
        arrive(context, &region, free)?;
        process::fork(context, |context| {
            context.check(&region, 0..PAGES / 3, generation)?;
            region.fill(PAGES - 1, 2);
            context.check(&region, PAGES - 1..PAGES, |_| 2)
        })?
        .wait()?;
        context.check(&region, 0..PAGES, generation)?;
        context.expect(&region, 0..PAGES, |_| Residency::Ram)?;
        context.wait_free(free)?;
    }
    // Freed on the device, a part at a time.
    arrive(context, &region, free)?;
    let (left, right) = region.split_at(PAGES / 2);
    drop(left);
    context.wait_free(free - (right.pages() * PAGE_SIZE) as u64)?;
    right.discard(0..right.pages())?;
    context.wait_free(free)
}

/// Move all pages to the device, which then has exactly so many frames fewer.
fn arrive(context: &Context, region: &Region, free: u64) -> Result<(), Failure> {
    context.settle(region.all(), Direction::ToDevice, 0)?;
    context.expect(region, 0..PAGES, |_| Residency::Device)?;
    context.wait_free(free - (PAGES * PAGE_SIZE) as u64)
}
