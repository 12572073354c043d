//! Pages go home by request, for sure: a range, or all that a process has brought.

use std::io::{Read, Write};

use virtio_hmm_client::{Direction, Error, PAGE_SIZE, Residency};

use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::PMD_PAGES;
use crate::require;

const PAGES: usize = 3 * PMD_PAGES;

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    range(context)?;
    everything(context)?;
    limit(context)
}

/// A range with holes in its mapping; what lies outside stays.
fn range(context: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    context.settle(region.all(), Direction::ToDevice, 0)?;
    let (left, middle) = region.split_at(PMD_PAGES);
    let (middle, right) = middle.split_at(10);
    let addresses = left.range(5..PAGES - 5);
    drop(middle);
    let released = context.device.release(addresses)?;
    require!(
        (released.released, released.remaining) == ((PAGES - 20) as u64, 0),
        "{released:?}"
    );
    context.expect(&left, 0..5, |_| Residency::Device)?;
    context.expect(&left, 5..PMD_PAGES, |_| Residency::Ram)?;
    let last = right.pages() - 5;
    context.expect(&right, 0..last, |_| Residency::Ram)?;
    context.expect(&right, last..last + 5, |_| Residency::Device)?;
    context.check(&left, 0..left.pages(), |_| 1)?;
    context.check(&right, 0..right.pages(), |_| 1)
}

/// Wherever they are: where they were, at another address, or in a child alone.
fn everything(context: &Context) -> Result<(), Failure> {
    let other = context.region(PMD_PAGES, 1)?;
    other.fill_all(1);
    context.settle(other.all(), Direction::ToDevice, 0)?;

    let context = &context.reopen()?;
    let [stays, moves, shared] = [2, 3, 4].map(|number| context.region(PMD_PAGES, number));
    let (stays, moves, shared) = (stays?, moves?, shared?);
    for region in [&stays, &moves, &shared] {
        region.fill_all(1);
        context.settle(region.all(), Direction::ToDevice, 0)?;
    }
    let moved = moves.relocate()?;
    let (mut go, mut released) = process::pipe()?;
    let child = process::fork(context, |context| {
        go.read_exact(&mut [0])
            .map_err(|_| Failure::system("read"))?;
        context.expect(&shared, 0..PMD_PAGES, |_| Residency::Ram)?;
        context.check(&shared, 0..PMD_PAGES, |_| 1)
    })?;
    // Only the child has them now.
    shared.discard(0..PMD_PAGES)?;
    let outcome = context.device.release_all()?;
    require!(
        (outcome.released, outcome.remaining) == (3 * PMD_PAGES as u64, 0),
        "{outcome:?}"
    );
    released
        .write_all(&[0])
        .map_err(|_| Failure::system("write"))?;
    child.wait()?;
    context.expect(&stays, 0..PMD_PAGES, |_| Residency::Ram)?;
    context.expect(&moved, 0..PMD_PAGES, |_| Residency::Ram)?;
    context.check(&stays, 0..PMD_PAGES, |_| 1)?;
    context.check(&moved, 0..PMD_PAGES, |_| 1)?;
    require!(
        context.device.limit()?.used == 0,
        "frames are still accounted for"
    );
    // What another open file brought is not touched.
    context.expect(&other, 0..PMD_PAGES, |_| Residency::Device)?;
    context.check(&other, 0..PMD_PAGES, |_| 1)
}

fn limit(context: &Context) -> Result<(), Failure> {
    let context = &context.reopen()?;
    require!(
        context.device.limit()?.bytes.is_none(),
        "there is a limit from the start"
    );
    let refused = context.device.set_limit(Some(PAGE_SIZE as u64 + 1));
    require!(matches!(refused, Err(Error::Invalid)), "{refused:?}");
    let bytes = 16 * PAGE_SIZE as u64;
    let limit = context.device.set_limit(Some(bytes))?;
    require!(
        (limit.bytes, limit.used) == (Some(bytes), 0),
        "{limit:?} after {bytes} were set"
    );
    let region = context.region(64, 5)?;
    region.fill_all(1);
    for first in (0..64).step_by(8) {
        context.settle(region.range(first..first + 8), Direction::ToDevice, 0)?;
    }
    require!(
        context.device.limit()?.used == bytes,
        "the limit is not used"
    );
    context.expect(&region, 0..48, |_| Residency::Ram)?;
    context.expect(&region, 48..64, |_| Residency::Device)?;
    context.check(&region, 0..64, |_| 1)?;
    context.device.set_limit(None)?;
    context.settle(region.all(), Direction::ToDevice, 0)?;
    context.expect(&region, 0..64, |_| Residency::Device)?;
    context.check(&region, 0..64, |_| 1)
}
