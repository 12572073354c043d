//! Soft-dirty bits: which pages were written since a moment.

use virtio_hmm_client::{Direction, Residency};

use super::counted::counted;
use crate::context::Context;
use crate::failure::Failure;
use crate::pagemap;
use crate::region::Region;
use crate::require;

/// Pages of a region, a multiple of 6.
const PAGES: usize = 600;

/// A region whose pages were written, and are marked as not written since.
fn clean_region(context: &Context) -> Result<Region, Failure> {
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    // A new mapping is soft-dirty as a whole.
    if !pagemap::entries(region.all())?[0].soft_dirty() {
        return Err(Failure::Skip("the kernel has no soft-dirty bits".into()));
    }
    pagemap::clear_soft_dirty()?;
    expect_dirty(&region, |_| false)?;
    Ok(region)
}

fn expect_dirty(region: &Region, dirty: impl Fn(usize) -> bool) -> Result<(), Failure> {
    for (page, entry) in pagemap::entries(region.all())?.into_iter().enumerate() {
        require!(
            entry.soft_dirty() == dirty(page),
            "page {page} should have soft-dirty {}: {entry:?}",
            dirty(page)
        );
    }
    Ok(())
}

/// Migrate all pages to the device.
fn migrate(context: &Context, region: &Region) -> Result<(), Failure> {
    counted(context, &[("pages_to_device", PAGES)], || {
        context.settle(region.all(), Direction::ToDevice, 0)
    })?;
    context.expect(region, 0..PAGES, |_| Residency::Device)
}

/// The bits go to the device and back with the pages, and writes are noticed after it.
pub(super) fn survives(context: &Context) -> Result<(), Failure> {
    let region = clean_region(context)?;
    let first = |page: usize| page.is_multiple_of(3);
    (0..PAGES)
        .filter(|&p| first(p))
        .for_each(|p| region.fill(p, 2));
    expect_dirty(&region, first)?;
    migrate(context, &region)?;
    expect_dirty(&region, first)?;

    // One half comes home on request, the other by reading.
    let half = PAGES / 2;
    let generation = |page| if first(page) { 2 } else { 1 };
    counted(
        context,
        &[("pages_to_system", half), ("pages_faulted", half)],
        || {
            context.settle(region.range(0..half), Direction::ToSystem, 0)?;
            context.check(&region, half..PAGES, generation)
        },
    )?;
    context.expect(&region, 0..PAGES, |_| Residency::Ram)?;
    context.check(&region, 0..half, generation)?;
    expect_dirty(&region, first)?;

    // Pages that are written when they are at home, and when they are on the device.
    let second = |page: usize| page % 3 < 2;
    (0..PAGES)
        .filter(|&p| p % 3 == 1)
        .for_each(|p| region.fill(p, 2));
    expect_dirty(&region, second)?;
    migrate(context, &region)?;
    expect_dirty(&region, second)?;
    counted(context, &[("pages_faulted", PAGES / 3)], || {
        (0..PAGES)
            .filter(|&p| p % 3 == 2)
            .for_each(|p| region.fill(p, 2));
        Ok(())
    })?;
    expect_dirty(&region, |_| true)?;
    context.check(&region, 0..PAGES, |_| 2)
}

/// clear_soft_dirty() takes the right to write from pages in RAM, and leaves it to device
/// pages: the first write to one that comes home goes unnoticed.
pub(super) fn cleared(context: &Context) -> Result<(), Failure> {
    let region = clean_region(context)?;
    region.fill_all(2);
    migrate(context, &region)?;
    expect_dirty(&region, |_| true)?;
    counted(context, &[("cpu_faults", 0)], || {
        pagemap::clear_soft_dirty()?;
        expect_dirty(&region, |_| false)
    })?;
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;
    context.check(&region, 0..PAGES, |_| 2)?;
    expect_dirty(&region, |_| false)?;
    region.fill_all(3);
    expect_dirty(&region, |_| false)?;
    // From here on it is as ever.
    pagemap::clear_soft_dirty()?;
    region.fill_all(4);
    expect_dirty(&region, |_| true)?;
    context.check(&region, 0..PAGES, |_| 4)
}
