//! Ranges in which each stretch is of another kind.
//!
//! Shows that holes, zero pages, read-only and inaccessible pages migrate or stay,
//! each with its contents and its protection, when they lie side by side.

use std::ops::Range;
use std::time::Instant;

use virtio_hmm_client::Direction;

use crate::context::Context;
use crate::failure::Failure;
use crate::region::{Access, Region};

/// Most pages of a round.
const MOST_PAGES: usize = 2048;

/// Longest stretch of one kind, in pages.
const LONGEST: usize = 40;

#[derive(Clone, Copy, Debug)]
enum Kind {
    Hole,
    ReadOnlyHole,
    InaccessibleHole,
    ZeroPage,
    Written,
    ReadOnly,
    Inaccessible,
}

const KINDS: [Kind; 7] = [
    Kind::Hole,
    Kind::ReadOnlyHole,
    Kind::InaccessibleHole,
    Kind::ZeroPage,
    Kind::Written,
    Kind::ReadOnly,
    Kind::Inaccessible,
];

impl Kind {
    fn generation(self) -> u64 {
        match self {
            Self::Written | Self::ReadOnly | Self::Inaccessible => 1,
            Self::Hole | Self::ReadOnlyHole | Self::InaccessibleHole | Self::ZeroPage => 0,
        }
    }

    fn access(self) -> Access {
        match self {
            Self::ReadOnly | Self::ReadOnlyHole => Access::Read,
            Self::Inaccessible | Self::InaccessibleHole => Access::None,
            Self::Hole | Self::ZeroPage | Self::Written => Access::Write,
        }
    }
}

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let mut random = context.random(0);
    let end = context.end();
    let mut number = 0;
    loop {
        let region = context.region(context.pages.min(MOST_PAGES), number)?;
        round(context, &region, &mut random)?;
        number += 1;
        if Instant::now() >= end {
            return Ok(());
        }
    }
}

fn round(context: &Context, region: &Region, random: &mut fastrand::Rng) -> Result<(), Failure> {
    let pages = region.pages();
    let mut kinds: Vec<Kind> = Vec::with_capacity(pages);
    while kinds.len() < pages {
        let first = kinds.len();
        let kind = KINDS[random.usize(0..KINDS.len())];
        let last = (first + random.usize(1..=LONGEST)).min(pages);
        kinds.resize(last, kind);
        prepare(region, first..last, kind)?;
    }
    context.soil(pages)?;
    context.migrate(region.all(), Direction::ToDevice)?;
    readable(context, region, &kinds, random)?;
    for _ in 0..4 {
        let first = random.usize(0..pages);
        let last = random.usize(first..pages) + 1;
        let direction = random
            .choice([Direction::ToDevice, Direction::ToSystem])
            .unwrap_or(Direction::ToSystem);
        context.migrate(region.range(first..last), direction)?;
        readable(context, region, &kinds, random)?;
    }
    context.migrate(region.all(), Direction::ToDevice)?;
    region.protect(0..pages, Access::Write)?;
    context.check(region, 0..pages, |page| kinds[page].generation())?;
    context.migrate(region.all(), Direction::ToDevice)?;
    region.fill_all(2);
    context.migrate(region.all(), Direction::ToSystem)?;
    context.check(region, 0..pages, |_| 2)
}

fn prepare(region: &Region, pages: Range<usize>, kind: Kind) -> Result<(), Failure> {
    for page in pages.clone() {
        match kind {
            Kind::Hole | Kind::ReadOnlyHole | Kind::InaccessibleHole => {}
            Kind::ZeroPage => region.touch(page),
            Kind::Written | Kind::ReadOnly | Kind::Inaccessible => region.fill(page, 1),
        }
    }
    region.protect(pages, kind.access())
}

/// Check some of the pages that may be read, and so bring them back by fault.
fn readable(
    context: &Context,
    region: &Region,
    kinds: &[Kind],
    random: &mut fastrand::Rng,
) -> Result<(), Failure> {
    for (page, kind) in kinds.iter().enumerate() {
        if kind.access() != Access::None && random.u8(0..4) == 0 {
            context.check(region, page..page + 1, |_| kind.generation())?;
        }
    }
    Ok(())
}
