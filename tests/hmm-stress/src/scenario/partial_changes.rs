//! Parts of a range that lies on the device are unmapped, protected, discarded and
//! moved to other addresses.
//!
//! Shows that each change reaches exactly its pages, that frames of unmapped pages are
//! free again, and that pages are found by what they are and not by where they were.

use std::time::Instant;

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use crate::context::Context;
use crate::failure::Failure;
use crate::region::Access;

/// Most pages of a round.
const MOST_PAGES: usize = 1024;

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let mut random = context.random(0);
    let end = context.end();
    let mut number = 0;
    loop {
        round(context, number, &mut random)?;
        number += 1;
        if Instant::now() >= end {
            return Ok(());
        }
    }
}

fn round(context: &Context, number: u64, random: &mut fastrand::Rng) -> Result<(), Failure> {
    let pages = context.pages.min(MOST_PAGES);
    let region = context.region(pages, number)?;
    region.fill_all(1);
    let free = context.free()?;
    context.settle(region.all(), Direction::ToDevice, 0)?;
    context.expect(&region, 0..pages, |_| Residency::Device)?;

    // Five parts of at least one page each.
    let mut cuts: Vec<usize> = (1..pages).collect();
    random.shuffle(&mut cuts);
    cuts.truncate(4);
    cuts.sort_unstable();

    region.discard(cuts[0]..cuts[1])?;
    region.protect(cuts[2]..cuts[3], Access::Read)?;
    let on_device = pages - (cuts[1] - cuts[0]);
    context.wait_free(free - (on_device * PAGE_SIZE) as u64)?;

    // Addresses from here on are those of the parts.
    let (left, rest) = region.split_at(cuts[1]);
    let (middle, rest) = rest.split_at(cuts[2] - cuts[1]);
    let (read_only, right) = rest.split_at(cuts[3] - cuts[2]);
    let unmapped = middle.pages();
    drop(middle);
    context.wait_free(free - ((on_device - unmapped) * PAGE_SIZE) as u64)?;

    let right = right.relocate()?;
    let read_only = read_only.relocate()?;
    context.expect(&right, 0..right.pages(), |_| Residency::Device)?;
    context.expect(&read_only, 0..read_only.pages(), |_| Residency::Device)?;

    let discarded = |page: usize| if page >= cuts[0] { 0 } else { 1 };
    context.check(&left, 0..left.pages(), discarded)?;
    context.check(&read_only, 0..read_only.pages(), |_| 1)?;
    context.migrate(right.all(), Direction::ToSystem)?;
    context.check(&right, 0..right.pages(), |_| 1)?;
    context.wait_free(free)?;

    // Once more, with what changed; read-only pages move too.
    for part in [&left, &read_only, &right] {
        context.settle(part.all(), Direction::ToDevice, 0)?;
        context.expect(part, 0..part.pages(), |_| Residency::Device)?;
    }
    read_only.protect(0..read_only.pages(), Access::Write)?;
    for part in [&left, &read_only, &right] {
        part.fill_all(2);
        context.check(part, 0..part.pages(), |_| 2)?;
    }
    Ok(())
}
