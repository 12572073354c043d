//! madvise on ranges of which part is on the device.

use std::path::Path;

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use super::counted::counted;
use crate::context::Context;
use crate::failure::Failure;
use crate::region::{PMD_PAGES, PageSize, Region};
use crate::require;
use crate::scenario::transparent_huge_pages;

/// Pages of a region, a multiple of 6.
const PAGES: usize = 600;

/// Not in the libc crate.
const MADV_GUARD_INSTALL: libc::c_int = 102;
const MADV_GUARD_REMOVE: libc::c_int = 103;

fn on_device(page: usize) -> bool {
    page.is_multiple_of(2)
}

/// A region of which every other page is on the device, of all in generation 1.
fn mixed(context: &Context) -> Result<Region, Failure> {
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    counted(context, &[("pages_to_device", PAGES / 2)], || {
        (0..PAGES)
            .filter(|&page| on_device(page))
            .try_for_each(|page| {
                context.settle(region.range(page..page + 1), Direction::ToDevice, 0)?;
                Ok(())
            })
    })?;
    expect_mixed(context, &region)?;
    Ok(region)
}

fn expect_mixed(context: &Context, region: &Region) -> Result<(), Failure> {
    context.expect(region, 0..PAGES, |page| {
        if on_device(page) {
            Residency::Device
        } else {
            Residency::Ram
        }
    })
}

/// madvise_cold_or_pageout_pte_range() passes device pages by.
pub(super) fn reclaim(context: &Context) -> Result<(), Failure> {
    let region = mixed(context)?;
    counted(context, &[("cpu_faults", 0)], || {
        region.advise(0..PAGES, libc::MADV_COLD)?;
        expect_mixed(context, &region)?;
        region.page_out(0..PAGES)?;
        let seen = context.device.query(region.all())?;
        for (page, seen) in seen.into_iter().enumerate() {
            require!(
                (seen == Residency::Device) == on_device(page),
                "page {page} is {seen:?}"
            );
        }
        // Pages are read ahead from swap, device pages are no swap.
        if Path::new("/proc/swaps").exists() {
            region.advise(0..PAGES, libc::MADV_WILLNEED)?;
        }
        Ok(())
    })?;
    counted(context, &[("pages_faulted", PAGES / 2)], || {
        context.check(&region, 0..PAGES, |_| 1)
    })?;
    context.expect(&region, 0..PAGES, |_| Residency::Ram)
}

/// MADV_POPULATE_READ and _WRITE bring device pages home, as they do with those in swap.
pub(super) fn populate(context: &Context) -> Result<(), Failure> {
    for advice in [libc::MADV_POPULATE_READ, libc::MADV_POPULATE_WRITE] {
        let region = mixed(context)?;
        counted(context, &[("pages_faulted", PAGES / 2)], || {
            region.advise(0..PAGES, advice)
        })?;
        context.expect(&region, 0..PAGES, |_| Residency::Ram)?;
        context.check(&region, 0..PAGES, |_| 1)?;
    }
    Ok(())
}

/// Every third page is thrown away, some on the device and some not.
pub(super) fn discard(context: &Context) -> Result<(), Failure> {
    let region = mixed(context)?;
    let free = context.free()?;
    let discarded = |page: usize| page.is_multiple_of(3);
    counted(context, &[("cpu_faults", 0)], || {
        (0..PAGES)
            .filter(|&page| discarded(page))
            .try_for_each(|page| region.discard(page..page + 1))
    })?;
    context.wait_free(free + (PAGES / 6 * PAGE_SIZE) as u64)?;
    let seen = context.device.query(region.all())?;
    for (page, seen) in seen.into_iter().enumerate() {
        require!(
            (seen == Residency::None) == discarded(page),
            "page {page} is {seen:?}"
        );
    }
    let generation = |page| if discarded(page) { 0 } else { 1 };
    context.check(&region, 0..PAGES / 2, generation)?;
    // Holes of the second half, and of the first what reading made the zero page.
    counted(context, &[("pages_filled", PAGES / 3)], || {
        context.settle(region.all(), Direction::ToDevice, 0)
    })?;
    context.check(&region, 0..PAGES, generation)?;
    context.settle(region.all(), Direction::ToDevice, 0)?;
    region.discard(0..PAGES)?;
    context.check(&region, 0..PAGES, |_| 0)
}

/// A guard page throws away what is there, and ends whoever touches it.
pub(super) fn guard(context: &Context) -> Result<(), Failure> {
    let region = mixed(context)?;
    let free = context.free()?;
    if region.advise(0..0, MADV_GUARD_INSTALL).is_err() {
        return Err(Failure::Skip("the kernel has no guard pages".into()));
    }
    region.advise(0..PAGES / 2, MADV_GUARD_INSTALL)?;
    context.wait_free(free + (PAGES / 4 * PAGE_SIZE) as u64)?;
    counted(context, &[("pages_filled", 0)], || {
        let outcome = context.migrate(region.range(0..PAGES / 2), Direction::ToDevice)?;
        require!(outcome.moved == 0, "guard pages migrated: {outcome:?}");
        context.expect(&region, 0..PAGES / 2, |_| Residency::None)
    })?;
    region.advise(0..PAGES / 2, MADV_GUARD_REMOVE)?;
    let generation = |page| if page < PAGES / 2 { 0 } else { 1 };
    context.settle(region.all(), Direction::ToDevice, 0)?;
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;
    context.check(&region, 0..PAGES, generation)
}

/// MADV_COLLAPSE brings device pages home, as it does with those in swap
/// (__collapse_huge_page_swapin()), and makes one huge page.
pub(super) fn collapse(context: &Context) -> Result<(), Failure> {
    if !transparent_huge_pages() {
        return Err(Failure::Skip("there are no transparent huge pages".into()));
    }
    for device_pages in [1, PMD_PAGES / 2, PMD_PAGES] {
        let region = context.region(PMD_PAGES, 0)?;
        region.fill_all(1);
        context.settle(region.range(0..device_pages), Direction::ToDevice, 0)?;
        region.advise(0..PMD_PAGES, libc::MADV_HUGEPAGE)?;
        counted(context, &[("pages_faulted", device_pages)], || {
            region.advise(0..PMD_PAGES, libc::MADV_COLLAPSE)
        })?;
        context.expect(&region, 0..PMD_PAGES, |_| Residency::Ram)?;
        context.check(&region, 0..PMD_PAGES, |_| 1)?;
        // It travels as one.
        counted(
            context,
            &[("thp_to_device", 1), ("thp_to_system", 1)],
            || {
                context.settle(region.all(), Direction::ToDevice, 0)?;
                context.expect(&region, 0..PMD_PAGES, |_| Residency::Device)?;
                context.check(&region, 0..PMD_PAGES, |_| 1)
            },
        )?;
    }
    // A huge page on the device is one already, and stays there: the call fails, since
    // find_pmd_or_thp_or_none() takes it for a hole.
    let region = Region::new(PMD_PAGES, PageSize::Huge, context.region_seed(1))?;
    region.fill_all(1);
    context.settle(region.all(), Direction::ToDevice, 0)?;
    counted(context, &[("cpu_faults", 0)], || {
        let result = region.advise(0..PMD_PAGES, libc::MADV_COLLAPSE);
        require!(result.is_err(), "a huge device page was collapsed");
        context.expect(&region, 0..PMD_PAGES, |_| Residency::Device)
    })?;
    context.check(&region, 0..PMD_PAGES, |_| 1)
}
