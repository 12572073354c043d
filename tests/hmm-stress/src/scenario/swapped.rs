//! Pages in swap.
//!
//! Shows that they are told from holes, stay in swap when their range migrates, and move
//! once they were swapped in, with every byte. Device pages are not swapped out.

use std::fs;
use std::time::Instant;

use virtio_hmm_client::{Direction, Residency, Skip};

use crate::context::Context;
use crate::failure::Failure;
use crate::require;

fn swap_is_on() -> bool {
    // The first line is a heading.
    fs::read_to_string("/proc/swaps").is_ok_and(|swaps| swaps.lines().count() > 1)
}

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    if !swap_is_on() {
        return Err(Failure::Skip("no swap is on".into()));
    }
    let end = context.end();
    loop {
        swap_out_and_migrate(context)?;
        if Instant::now() >= end {
            return Ok(());
        }
    }
}

fn swap_out_and_migrate(context: &Context) -> Result<(), Failure> {
    let pages = context.pages.min(2048);
    let on_device = pages / 4;
    let region = context.region(pages, 0)?;
    region.fill_all(1);
    context.settle(region.range(0..on_device), Direction::ToDevice, 0)?;
    region.page_out(0..pages)?;

    // Which of them the kernel swaps out is its own affair.
    let before = context.device.query(region.all())?;
    let swapped = before
        .iter()
        .filter(|seen| **seen == Residency::Swapped)
        .count() as u64;
    require!(swapped > 0, "none of {pages} pages was swapped out");
    context.expect(&region, 0..on_device, |_| Residency::Device)?;

    let settled = context.settle(region.all(), Direction::ToDevice, 0)?;
    require!(
        settled.last.skipped(Skip::Swapped) == swapped,
        "{swapped} pages were in swap: {:?}",
        settled.last
    );
    let mut expected = before.into_iter().map(|seen| match seen {
        Residency::Swapped => Residency::Swapped,
        _ => Residency::Device,
    });
    context.expect(&region, 0..pages, |_| {
        expected.next().unwrap_or(Residency::None)
    })?;

    context.check(&region, 0..pages, |_| 1)?;
    context.settle(region.all(), Direction::ToDevice, 0)?;
    context.expect(&region, 0..pages, |_| Residency::Device)?;
    context.check(&region, 0..pages, |_| 1)
}
