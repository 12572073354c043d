//! userfaultfd for any access (since 7.3): pages that are there and may not be touched.

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use super::counted::counted;
use super::userfaultfd::{Mode, RWP, Userfaultfd, expect_faults};
use crate::context::Context;
use crate::failure::Failure;
use crate::region::Region;
use crate::require;

/// Pages of a region.
const PAGES: usize = 64;

fn protected(page: usize) -> bool {
    page.is_multiple_of(2)
}

fn protect(uffd: &Userfaultfd, region: &Region) -> Result<(), Failure> {
    (0..PAGES)
        .filter(|&page| protected(page))
        .try_for_each(|page| uffd.access_protect(&region.range(page..page + 1), true))
}

fn migrate(context: &Context, region: &Region) -> Result<(), Failure> {
    counted(context, &[("pages_to_device", PAGES)], || {
        context.settle(region.all(), Direction::ToDevice, 0)
    })?;
    context.expect(region, 0..PAGES, |_| Residency::Device)
}

/// Read all pages: there is a fault for each protected one, and no other.
fn read(context: &Context, uffd: &Userfaultfd, region: &Region) -> Result<(), Failure> {
    let faults = uffd.answering(
        |fault| uffd.access_protect(&(fault.address..fault.address + PAGE_SIZE), false),
        || context.check(region, 0..PAGES, |_| 1),
    )?;
    expect_faults(region, &faults, (0..PAGES).filter(|&page| protected(page)))?;
    require!(
        faults.iter().all(|fault| fault.access_protect),
        "faults of another kind: {faults:x?}"
    );
    context.expect(region, 0..PAGES, |_| Residency::Ram)
}

/// Protected in RAM, and read after the way back and on the device; then protected there.
pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let uffd = Userfaultfd::new(RWP)?;
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    uffd.register(&region.all(), Mode::AccessProtect)?;
    for come_home in [true, false] {
        protect(&uffd, &region)?;
        migrate(context, &region)?;
        if come_home {
            counted(context, &[("pages_to_system", PAGES)], || {
                context.settle(region.all(), Direction::ToSystem, 0)
            })?;
        }
        require!(uffd.fault()?.is_none(), "a fault without an access");
        read(context, &uffd, &region)?;
    }
    migrate(context, &region)?;
    counted(context, &[("cpu_faults", 0)], || protect(&uffd, &region))?;
    read(context, &uffd, &region)?;
    // Nothing is left of it.
    region.fill_all(2);
    migrate(context, &region)?;
    context.check(&region, 0..PAGES, |_| 2)
}
