//! Bulk migration to the device and back.
//!
//! Shows that whole ranges arrive and come back with every byte, and measures the
//! bandwidth of each way around the calls.

use std::time::Instant;

use virtio_hmm_client::{Direction, Outcome, PAGE_SIZE};

use crate::context::Context;
use crate::failure::Failure;
use crate::report::Transfer;
use crate::require;

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let region = context.region(context.pages, 0)?;
    let end = context.end();
    let (mut there, mut back) = (0, 0);
    let mut generation = 0;
    while generation == 0 || Instant::now() < end || there.min(back) < context.pages_each_way {
        generation += 1;
        region.fill_all(generation);
        there += travel(context, &region.all(), Direction::ToDevice)?;
        back += travel(context, &region.all(), Direction::ToSystem)?;
        context.check(&region, 0..region.pages(), |_| generation)?;
    }
    Ok(())
}

/// Migrate, measured, and return the pages moved.
fn travel(
    context: &Context,
    range: &std::ops::Range<usize>,
    direction: Direction,
) -> Result<u64, Failure> {
    let start = Instant::now();
    let Outcome { moved, .. } = context.migrate(range.clone(), direction)?;
    let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let mut measurements = context.measurements();
    let transfer: &mut Transfer = match direction {
        Direction::ToDevice => &mut measurements.to_device,
        Direction::ToSystem => &mut measurements.to_system,
    };
    transfer.bytes += moved * PAGE_SIZE as u64;
    transfer.ns += ns;
    let pages = (range.len() / PAGE_SIZE) as u64;
    // A few pages of a thousand may be busy at that moment; nearly all must move.
    require!(
        moved * 100 >= pages * 98,
        "only {moved} of {pages} pages moved {direction:?}"
    );
    Ok(moved)
}
