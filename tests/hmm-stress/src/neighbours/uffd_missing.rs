//! userfaultfd for missing pages: who watches a hole decides what is in it.

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use super::counted::counted;
use super::fault_around;
use super::userfaultfd::{Fault, MOVE, Mode, Userfaultfd, expect_faults};
use crate::context::Context;
use crate::failure::Failure;
use crate::region::Region;
use crate::require;

/// Pages of a region.
const PAGES: usize = 64;

/// The first half was touched, the second was not.
const HALF: usize = PAGES / 2;

/// Answer faults with generation 2 of the page.
fn answer(uffd: &Userfaultfd, region: &Region, fault: Fault) -> Result<(), Failure> {
    let page = (fault.address - region.all().start) / PAGE_SIZE;
    let words: Vec<u64> = region.pattern(page, 2).words().collect();
    uffd.copy(fault.address, &words)
}

/// migrate_vma_insert_page() backs off from a hole that is watched.
pub(super) fn holes(context: &Context) -> Result<(), Failure> {
    let _tunable = fault_around::off()?;
    let uffd = Userfaultfd::new(0)?;
    let region = context.region(PAGES, 0)?;
    (0..HALF).for_each(|page| region.fill(page, 1));
    uffd.register(&region.all(), Mode::Missing)?;
    let residency = |page| {
        if page < HALF {
            Residency::Device
        } else {
            Residency::None
        }
    };

    let free = context.free()?;
    // The device is not even asked to fill them.
    let moved = [
        ("pages_to_device", HALF),
        ("fill_requests", 0),
        ("skipped_unsupported", 3 * HALF),
    ];
    counted(context, &moved, || {
        for _ in 0..3 {
            context.migrate(region.all(), Direction::ToDevice)?;
        }
        Ok(())
    })?;
    context.expect(&region, 0..PAGES, residency)?;
    context.wait_free(free - (HALF * PAGE_SIZE) as u64)?;
    require!(uffd.fault()?.is_none(), "migration raised a fault");

    // Device pages are there, for the process and for userfaultfd.
    let faults = uffd.answering(
        |fault| answer(&uffd, &region, fault),
        || context.check(&region, 0..HALF / 2, |_| 1),
    )?;
    require!(faults.is_empty(), "faults on device pages: {faults:?}");
    context.expect(&region, HALF / 2..PAGES, residency)?;
    let words = vec![0; PAGE_SIZE / 8];
    require!(
        uffd.copy(region.range(HALF - 1..HALF).start, &words)
            .is_err(),
        "userfaultfd replaced a device page"
    );

    // Holes are filled by who watches, and what he put there migrates.
    let faults = uffd.answering(
        |fault| answer(&uffd, &region, fault),
        || context.check(&region, HALF..PAGES, |_| 2),
    )?;
    expect_faults(&region, &faults, HALF..PAGES)?;
    context.settle(region.all(), Direction::ToDevice, 0)?;
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;

    // A device page that is thrown away is missing again.
    region.discard(0..HALF)?;
    context.migrate(region.all(), Direction::ToDevice)?;
    context.expect(&region, 0..HALF, |_| Residency::None)?;
    let faults = uffd.answering(
        |fault| answer(&uffd, &region, fault),
        || context.check(&region, 0..PAGES, |_| 2),
    )?;
    expect_faults(&region, &faults, 0..HALF)
}

/// move_pages_ptes() knows pages and swap, and says EFAULT to device pages.
pub(super) fn moving(context: &Context) -> Result<(), Failure> {
    let uffd = Userfaultfd::new(MOVE)?;
    let (from, to) = (context.region(2, 0)?, context.region(2, 0)?);
    from.fill_all(1);
    uffd.register(&to.all(), Mode::Missing)?;
    context.settle(from.range(0..1), Direction::ToDevice, 0)?;
    counted(context, &[("cpu_faults", 0)], || {
        match uffd.move_page(to.range(0..1).start, from.range(0..1).start) {
            Err(Failure::System { source, .. }) => require!(
                source.raw_os_error() == Some(libc::EFAULT),
                "UFFDIO_MOVE of a device page: {source}"
            ),
            result => require!(false, "UFFDIO_MOVE of a device page: {result:?}"),
        }
        context.expect(&from, 0..1, |_| Residency::Device)
    })?;
    // A page that came home moves, and goes to the device from where it is then.
    context.check(&from, 0..1, |_| 1)?;
    for page in 0..2 {
        let range = page..page + 1;
        uffd.move_page(to.range(range.clone()).start, from.range(range).start)?;
    }
    context.settle(to.all(), Direction::ToDevice, 0)?;
    context.expect(&to, 0..2, |_| Residency::Device)?;
    context.expect(&from, 0..2, |_| Residency::None)?;
    context.check(&to, 0..2, |_| 1)?;
    context.check(&from, 0..2, |_| 0)
}

/// There is nothing minor about anonymous memory.
pub(super) fn minor(context: &Context) -> Result<(), Failure> {
    let uffd = Userfaultfd::new(0)?;
    let region = context.region(1, 0)?;
    region.fill(0, 1);
    context.settle(region.all(), Direction::ToDevice, 0)?;
    require!(
        uffd.register(&region.all(), Mode::Minor).is_err(),
        "anonymous memory has minor faults"
    );
    context.expect(&region, 0..1, |_| Residency::Device)?;
    context.check(&region, 0..1, |_| 1)
}
