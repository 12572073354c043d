//! userfaultfd for writes: protection stays with a page, wherever that is.

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use super::counted::counted;
use super::userfaultfd::{Mode, PAGEFAULT_FLAG_WP, Userfaultfd, WP_UNPOPULATED, expect_faults};
use crate::context::Context;
use crate::failure::Failure;
use crate::pagemap;
use crate::region::Region;
use crate::require;

/// Pages of a region, a multiple of 4.
const PAGES: usize = 64;

fn protected(page: usize) -> bool {
    page.is_multiple_of(2)
}

/// Protect the pages that [`protected`] says.
fn protect(uffd: &Userfaultfd, region: &Region) -> Result<(), Failure> {
    (0..PAGES)
        .filter(|&page| protected(page))
        .try_for_each(|page| uffd.write_protect(&region.range(page..page + 1), true))
}

fn expect_protected(region: &Region, protected: impl Fn(usize) -> bool) -> Result<(), Failure> {
    for (page, entry) in pagemap::entries(region.all())?.into_iter().enumerate() {
        require!(
            entry.write_protected() == protected(page),
            "page {page} should be protected {}: {entry:?}",
            protected(page)
        );
    }
    Ok(())
}

/// Write to all pages: there is a fault for each protected one, and no other.
fn write(context: &Context, uffd: &Userfaultfd, region: &Region) -> Result<(), Failure> {
    let faults = uffd.answering(
        |fault| uffd.write_protect(&(fault.address..fault.address + PAGE_SIZE), false),
        || {
            region.fill_all(2);
            Ok(())
        },
    )?;
    expect_faults(region, &faults, (0..PAGES).filter(|&page| protected(page)))?;
    require!(
        faults.iter().all(|fault| fault.write_protect),
        "faults of another kind: {faults:x?}"
    );
    expect_protected(region, |_| false)?;
    context.check(region, 0..PAGES, |_| 2)
}

fn migrate(context: &Context, region: &Region) -> Result<(), Failure> {
    counted(context, &[("pages_to_device", PAGES)], || {
        context.settle(region.all(), Direction::ToDevice, 0)
    })?;
    context.expect(region, 0..PAGES, |_| Residency::Device)
}

fn registered(context: &Context) -> Result<(Userfaultfd, Region), Failure> {
    let uffd = Userfaultfd::new(PAGEFAULT_FLAG_WP)?;
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    uffd.register(&region.all(), Mode::WriteProtect)?;
    Ok((uffd, region))
}

/// Protected in RAM, and written there, on the device, and after the way back.
pub(super) fn survives(context: &Context) -> Result<(), Failure> {
    let (uffd, region) = registered(context)?;
    for back in [None, Some(Direction::ToSystem), Some(Direction::ToDevice)] {
        region.fill_all(1);
        protect(&uffd, &region)?;
        expect_protected(&region, protected)?;
        migrate(context, &region)?;
        expect_protected(&region, protected)?;
        match back {
            // By reading, which nobody waits for.
            None => counted(context, &[("pages_faulted", PAGES)], || {
                context.check(&region, 0..PAGES, |_| 1)
            })?,
            Some(Direction::ToSystem) => {
                context.settle(region.all(), Direction::ToSystem, 0)?;
                context.check(&region, 0..PAGES, |_| 1)?;
            }
            // By writing.
            Some(Direction::ToDevice) => {}
        }
        if back != Some(Direction::ToDevice) {
            context.expect(&region, 0..PAGES, |_| Residency::Ram)?;
            expect_protected(&region, protected)?;
        }
        require!(uffd.fault()?.is_none(), "a fault without a write");
        write(context, &uffd, &region)?;
    }
    Ok(())
}

/// Protected while it is on the device, where it may also be undone.
pub(super) fn on_device(context: &Context) -> Result<(), Failure> {
    let (uffd, region) = registered(context)?;
    migrate(context, &region)?;
    counted(context, &[("cpu_faults", 0)], || {
        uffd.write_protect(&region.all(), true)?;
        expect_protected(&region, |_| true)?;
        (0..PAGES)
            .filter(|&page| !protected(page))
            .try_for_each(|page| uffd.write_protect(&region.range(page..page + 1), false))?;
        expect_protected(&region, protected)?;
        context.expect(&region, 0..PAGES, |_| Residency::Device)
    })?;
    write(context, &uffd, &region)
}

/// Holes can be protected as well; then they are none for migrate_vma_collect_pmd().
pub(super) fn holes(context: &Context) -> Result<(), Failure> {
    let uffd = Userfaultfd::new(PAGEFAULT_FLAG_WP | WP_UNPOPULATED)?;
    let region = context.region(PAGES, 0)?;
    uffd.register(&region.all(), Mode::WriteProtect)?;
    protect(&uffd, &region)?;
    counted(context, &[("pages_filled", PAGES / 2)], || {
        context.migrate(region.all(), Direction::ToDevice)
    })?;
    context.expect(&region, 0..PAGES, |page| {
        if protected(page) {
            Residency::None
        } else {
            Residency::Device
        }
    })?;
    expect_protected(&region, protected)?;
    write(context, &uffd, &region)
}
