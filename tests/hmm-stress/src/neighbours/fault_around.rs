//! A CPU fault brings home the pages that most likely are touched next.

use virtio_hmm_client::{Direction, Residency};

use super::counted::counted;
use super::tunable::Tunable;
use crate::context::Context;
use crate::failure::Failure;
use crate::region::{Access, PMD_PAGES, PageSize, Region};

/// The parameter: most pages at a fault.
const PARAMETER: &str = "/sys/module/virtio_hmm/parameters/fault_around";

/// Let faults bring home no page but the touched one.
pub(super) fn off() -> Result<Tunable, Failure> {
    Tunable::set(PARAMETER, "1")
}

/// A region within one PMD, all of it on the device; what was touched before lies above.
fn on_device(context: &Context, pages: usize) -> Result<Region, Failure> {
    let region = Region::new(PMD_PAGES, PageSize::Small, context.region_seed(0))?;
    let (region, above) = region.split_at(pages);
    region.fill_all(1);
    context.settle(region.all(), Direction::ToDevice, 0)?;
    context.settle(above.range(1..2), Direction::ToDevice, 0)?;
    above.touch(1);
    Ok(region)
}

/// Pages before `home` are in RAM, all others on the device.
fn expect_home(context: &Context, region: &Region, home: usize) -> Result<(), Failure> {
    context.expect(region, 0..region.pages(), |page| {
        if page < home {
            Residency::Ram
        } else {
            Residency::Device
        }
    })
}

/// Whoever goes up in memory gets twice as many pages at each fault.
pub(super) fn grows(context: &Context) -> Result<(), Failure> {
    let _tunable = Tunable::set(PARAMETER, "16")?;
    let region = on_device(context, 64)?;
    let mut home = 0;
    for window in [1, 2, 4, 8, 16, 16, 16] {
        let moved = [("cpu_faults", 1), ("pages_faulted", window)];
        counted(context, &moved, || {
            region.touch(home);
            Ok(())
        })?;
        home += window;
        expect_home(context, &region, home)?;
    }
    context.check(&region, 0..64, |_| 1)
}

/// Who does not go up, or switched it off, gets what he touches.
pub(super) fn one_by_one(context: &Context) -> Result<(), Failure> {
    let region = on_device(context, 32)?;
    let moved = [("cpu_faults", 32), ("pages_faulted", 32)];
    counted(context, &moved, || {
        (0..32).rev().for_each(|page| region.touch(page));
        Ok(())
    })?;
    let _tunable = off()?;
    context.settle(region.all(), Direction::ToDevice, 0)?;
    counted(context, &moved, || {
        (0..32).for_each(|page| region.touch(page));
        Ok(())
    })?;
    context.check(&region, 0..32, |_| 1)
}

/// Holes stay holes, and what is in RAM stays there.
pub(super) fn holes(context: &Context) -> Result<(), Failure> {
    let region = on_device(context, 32)?;
    region.discard(4..6)?;
    region.touch(12);
    region.touch(31);
    (0..8).for_each(|page| {
        if !(4..6).contains(&page) {
            region.touch(page);
        }
    });
    context.expect(&region, 0..9, |page| match page {
        4..6 => Residency::None,
        _ => Residency::Ram,
    })?;
    context.check(
        &region,
        0..32,
        |page| if (4..6).contains(&page) { 0 } else { 1 },
    )
}

/// A window ends where the mapping does.
pub(super) fn mapping_ends(context: &Context) -> Result<(), Failure> {
    let region = on_device(context, 32)?;
    region.protect(10..32, Access::Read)?;
    (0..8).for_each(|page| region.touch(page));
    expect_home(context, &region, 10)?;
    context.check(&region, 0..32, |_| 1)
}
