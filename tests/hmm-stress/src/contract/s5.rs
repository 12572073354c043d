//! S5: the driver changes no source entry.
//!
//! The driver compares its array with a copy taken after setup and counts what differs.
//! A range with pages of every kind shows from outside that each page was dealt with as
//! what it was.

use virtio_hmm_client::{Direction, Residency, Skip};

use super::device_change;
use crate::context::Context;
use crate::failure::Failure;
use crate::hold::PipedPage;
use crate::region::Region;
use crate::require;

/// Pages of the range, which spans three batches.
const PAGES: usize = 1300;

/// What a page is before the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Hole,
    Zero,
    Touched,
    Held,
    OnDevice,
}

impl Kind {
    /// Neighbouring pages are of different kinds; a held page is a rare one.
    fn of(page: usize) -> Self {
        match page % 52 {
            51 => Self::Held,
            place => [Self::Hole, Self::Touched, Self::Zero, Self::OnDevice][place % 4],
        }
    }

    fn generation(self) -> u64 {
        match self {
            Self::Hole | Self::Zero => 0,
            Self::Touched | Self::Held | Self::OnDevice => 1,
        }
    }

    fn residency(self) -> Residency {
        match self {
            Self::Hole => Residency::None,
            Self::Zero => Residency::Zero,
            Self::Touched | Self::Held => Residency::Ram,
            Self::OnDevice => Residency::Device,
        }
    }
}

fn count(kind: Kind) -> u64 {
    (0..PAGES).filter(|&page| Kind::of(page) == kind).count() as u64
}

fn prepare(context: &Context, region: &Region) -> Result<Vec<PipedPage>, Failure> {
    for page in 0..PAGES {
        if Kind::of(page) == Kind::OnDevice {
            region.fill(page, 1);
            context.settle(region.range(page..page + 1), Direction::ToDevice, 0)?;
        }
    }
    let mut held = Vec::new();
    for page in 0..PAGES {
        match Kind::of(page) {
            Kind::Hole | Kind::OnDevice => {}
            Kind::Zero => region.touch(page),
            Kind::Touched => region.fill(page, 1),
            Kind::Held => {
                region.fill(page, 1);
                held.push(PipedPage::new(region, page)?);
            }
        }
    }
    Ok(held)
}

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    context.soil(2 * PAGES)?;
    let region = context.region(PAGES, 0)?;
    let held = prepare(context, &region)?;
    context.expect(&region, 0..PAGES, |page| Kind::of(page).residency())?;
    let src_changed = context.driver_counters()?.get("src_changed")?;
    let change = device_change(context, &["to_device_frames"], || {
        let settled = context.settle(region.all(), Direction::ToDevice, count(Kind::Held))?;
        let holes = count(Kind::Hole) + count(Kind::Zero);
        require!(
            settled.moved == count(Kind::Touched) && settled.filled == holes,
            "{} pages and {holes} holes: {settled:?}",
            count(Kind::Touched)
        );
        let last = settled.last;
        require!(
            last.skipped(Skip::Busy) + last.skipped(Skip::Pinned) == count(Kind::Held),
            "{} pages are held: {last:?}",
            count(Kind::Held)
        );
        Ok(())
    })?;
    require!(
        change == [count(Kind::Touched).cast_signed()],
        "the device copied {change:?} frames"
    );
    let after = context.driver_counters()?.get("src_changed")?;
    require!(
        after == src_changed,
        "the driver changed {} source entries",
        after.wrapping_sub(src_changed)
    );
    context.expect(&region, 0..PAGES, |page| match Kind::of(page) {
        Kind::Held => Residency::Ram,
        Kind::Hole | Kind::Zero | Kind::Touched | Kind::OnDevice => Residency::Device,
    })?;
    drop(held);
    context.settle(region.all(), Direction::ToSystem, 0)?;
    context.check(&region, 0..PAGES, |page| Kind::of(page).generation())
}
