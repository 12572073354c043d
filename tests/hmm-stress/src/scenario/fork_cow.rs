//! Fork and copy-on-write across device pages.
//!
//! Shows that parent, child and grandchild each see what they wrote and nothing of
//! the others, wherever the shared pages are and whoever migrates them.

use std::time::Instant;

use virtio_hmm_client::Direction;

use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::Region;

/// Most pages of a round.
const MOST_PAGES: usize = 1024;

/// Generations that the processes write.
const BEFORE: u64 = 1;
const CHILD: u64 = 2;
const PARENT: u64 = 3;
const GRANDCHILD: u64 = 4;

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let end = context.end();
    let mut number = 0;
    loop {
        let region = context.region(context.pages.min(MOST_PAGES), number)?;
        round(context, &region)?;
        number += 1;
        if Instant::now() >= end {
            return Ok(());
        }
    }
}

/// What the parent holds when it has written.
fn parents(page: usize) -> u64 {
    if page.is_multiple_of(3) {
        PARENT
    } else {
        BEFORE
    }
}

fn childs(page: usize) -> u64 {
    if page % 3 < 2 { CHILD } else { BEFORE }
}

fn grandchilds(page: usize) -> u64 {
    if page % 2 == 1 {
        GRANDCHILD
    } else {
        childs(page)
    }
}

/// Write to the pages where `generation` says `own`.
fn write(region: &Region, own: u64, generation: impl Fn(usize) -> u64) {
    for page in 0..region.pages() {
        if generation(page) == own {
            region.fill(page, own);
        }
    }
}

fn round(context: &Context, region: &Region) -> Result<(), Failure> {
    let pages = region.pages();
    let quarter = pages / 4;
    region.fill_all(BEFORE);
    // A quarter stays in RAM.
    context.migrate(region.range(0..3 * quarter), Direction::ToDevice)?;

    let child = process::fork(context, |context| child(context, region))?;
    context.check(region, 0..quarter, |_| BEFORE)?;
    write(region, PARENT, parents);
    context.migrate(region.range(quarter..pages), Direction::ToDevice)?;
    context.check(region, 0..2 * quarter, parents)?;
    context.migrate(region.range(0..2 * quarter), Direction::ToSystem)?;
    context.migrate(region.all(), Direction::ToDevice)?;
    child.wait()?;
    context.check(region, 0..pages, parents)
}

fn child(context: &Context, region: &Region) -> Result<(), Failure> {
    let pages = region.pages();
    context.check(region, 0..pages / 2, |_| BEFORE)?;
    write(region, CHILD, childs);
    context.migrate(region.all(), Direction::ToDevice)?;
    let grandchild = process::fork(context, |context| grandchild(context, region))?;
    context.migrate(region.range(0..pages / 2), Direction::ToSystem)?;
    context.check(region, 0..pages, childs)?;
    // Ends with pages on the device while its own child still uses them.
    context.migrate(region.all(), Direction::ToDevice)?;
    grandchild.wait()?;
    context.check(region, 0..pages / 2, childs)
}

fn grandchild(context: &Context, region: &Region) -> Result<(), Failure> {
    let pages = region.pages();
    context.migrate(region.range(pages / 4..pages), Direction::ToSystem)?;
    context.check(region, 0..pages, childs)?;
    write(region, GRANDCHILD, grandchilds);
    context.migrate(region.all(), Direction::ToDevice)?;
    context.check(region, 0..pages, grandchilds)
}
