//! What others do to huge pages on the device, which one PMD entry maps.

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use super::counted::counted;
use super::userfaultfd::{Mode, PAGEFAULT_FLAG_WP, Userfaultfd, expect_faults};
use crate::context::Context;
use crate::failure::Failure;
use crate::pagemap;
use crate::region::{PMD_PAGES, PageSize, Region};
use crate::require;
use crate::scenario::transparent_huge_pages;

/// Huge pages of a region.
const HUGE: usize = 2;

const PAGES: usize = HUGE * PMD_PAGES;

/// A region of huge pages, in generation 1.
pub(super) fn region(context: &Context) -> Result<Region, Failure> {
    if !transparent_huge_pages() {
        return Err(Failure::Skip("there are no transparent huge pages".into()));
    }
    let region = Region::new(PAGES, PageSize::Huge, context.region_seed(0))?;
    region.fill_all(1);
    Ok(region)
}

/// Migrate the region, each huge page as one.
pub(super) fn migrate(
    context: &Context,
    region: &Region,
    direction: Direction,
) -> Result<(), Failure> {
    let (counter, residency) = match direction {
        Direction::ToDevice => ("thp_to_device", Residency::Device),
        Direction::ToSystem => ("thp_to_system", Residency::Ram),
    };
    counted(context, &[(counter, HUGE)], || {
        context.settle(region.all(), direction, 0)
    })?;
    context.expect(region, 0..PAGES, |_| residency)
}

/// Protected as a whole before, and in part on the device, which splits the PMD there.
pub(super) fn write_protected(context: &Context) -> Result<(), Failure> {
    let uffd = Userfaultfd::new(PAGEFAULT_FLAG_WP)?;
    let region = region(context)?;
    uffd.register(&region.all(), Mode::WriteProtect)?;
    uffd.write_protect(&region.all(), true)?;
    let expect = |protected: fn(usize) -> bool| {
        let entries = pagemap::entries(region.all())?;
        let wrong = (0..PAGES).find(|&page| entries[page].write_protected() != protected(page));
        require!(wrong.is_none(), "the protection of page {wrong:?} is wrong");
        Ok(())
    };
    migrate(context, &region, Direction::ToDevice)?;
    expect(|_| true)?;
    migrate(context, &region, Direction::ToSystem)?;
    expect(|_| true)?;
    context.check(&region, 0..PAGES, |_| 1)?;
    migrate(context, &region, Direction::ToDevice)?;

    // The second huge page, and half of the first.
    const KEPT: usize = PMD_PAGES / 2;
    counted(context, &[("cpu_faults", 0)], || {
        uffd.write_protect(&region.range(PMD_PAGES..PAGES), false)?;
        uffd.write_protect(&region.range(KEPT..PMD_PAGES), false)?;
        expect(|page| page < KEPT)?;
        context.expect(&region, 0..PAGES, |_| Residency::Device)
    })?;
    let faults = uffd.answering(
        |fault| uffd.write_protect(&(fault.address..fault.address + PAGE_SIZE), false),
        || {
            region.fill_all(2);
            Ok(())
        },
    )?;
    expect_faults(&region, &faults, 0..KEPT)?;
    context.check(&region, 0..PAGES, |_| 2)
}

/// The bit of a huge page is that of all its parts. clear_soft_dirty_pmd() leaves it to
/// device pages.
pub(super) fn soft_dirty(context: &Context) -> Result<(), Failure> {
    let region = region(context)?;
    if !pagemap::entries(region.all())?[0].soft_dirty() {
        return Err(Failure::Skip("the kernel has no soft-dirty bits".into()));
    }
    pagemap::clear_soft_dirty()?;
    region.fill(0, 2);
    let generation = |page| if page == 0 { 2 } else { 1 };
    let expect = |dirty: fn(usize) -> bool| {
        let entries = pagemap::entries(region.all())?;
        let wrong = (0..PAGES).find(|&page| entries[page].soft_dirty() != dirty(page));
        require!(wrong.is_none(), "soft-dirty of page {wrong:?} is wrong");
        Ok(())
    };
    expect(|page| page < PMD_PAGES)?;
    migrate(context, &region, Direction::ToDevice)?;
    expect(|page| page < PMD_PAGES)?;
    counted(
        context,
        &[("thp_to_system", HUGE), ("cpu_faults", HUGE)],
        || context.check(&region, 0..PAGES, generation),
    )?;
    expect(|page| page < PMD_PAGES)?;
    migrate(context, &region, Direction::ToDevice)?;
    pagemap::clear_soft_dirty()?;
    expect(|page| page < PMD_PAGES)?;
    migrate(context, &region, Direction::ToSystem)?;
    pagemap::clear_soft_dirty()?;
    expect(|_| false)?;
    context.check(&region, 0..PAGES, generation)
}

/// None of these does anything to a device page, of a huge one in part neither; but what
/// is thrown away is gone.
pub(super) fn advice(context: &Context) -> Result<(), Failure> {
    let region = region(context)?;
    migrate(context, &region, Direction::ToDevice)?;
    let free = context.free()?;
    counted(context, &[("cpu_faults", 0)], || {
        for pages in [0..PAGES, 100..300, 500..700] {
            for advice in [libc::MADV_FREE, libc::MADV_COLD, libc::MADV_PAGEOUT] {
                region.advise(pages.clone(), advice)?;
            }
        }
        Ok(())
    })?;
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;
    context.wait_free(free)?;

    let discarded = 100..PMD_PAGES + 100;
    region.discard(discarded.clone())?;
    context.expect(&region, 0..PAGES, |page| {
        if discarded.contains(&page) {
            Residency::None
        } else {
            Residency::Device
        }
    })?;
    context.check(&region, 0..PAGES, |page| {
        u64::from(!discarded.contains(&page))
    })
}
