//! MADV_FREE: pages that the kernel may throw away until they are written again.
//!
//! Such a page holds what it held, or zeros, and nothing else. Once it was written, its
//! contents count again, wherever it is.

use virtio_hmm_client::{Direction, Residency};

use super::counted::counted;
use crate::context::Context;
use crate::failure::Failure;
use crate::pattern::Mismatch;
use crate::region::Region;
use crate::require;

/// Pages of a region, a multiple of 4.
const PAGES: usize = 512;

/// Require that every page holds one of the generations that `allowed` says.
fn check(
    context: &Context,
    region: &Region,
    allowed: impl Fn(usize) -> &'static [u64],
) -> Result<(), Failure> {
    for page in 0..PAGES {
        let any = allowed(page);
        let wrong = any
            .iter()
            .map(|&generation| region.check(page, generation))
            .collect::<Result<Vec<()>, Mismatch>>();
        if wrong.is_err() && !any.iter().any(|&g| region.check(page, g).is_ok()) {
            // Counts it as a mismatch.
            context.check(region, page..page + 1, |_| any[0])?;
        }
    }
    Ok(())
}

/// madvise_free_pte_range() passes device pages by.
pub(super) fn on_device(context: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    context.settle(region.range(0..PAGES / 2), Direction::ToDevice, 0)?;
    let free = context.free()?;
    counted(context, &[("cpu_faults", 0)], || {
        region.advise(0..PAGES, libc::MADV_FREE)
    })?;
    context.expect(&region, 0..PAGES / 2, |_| Residency::Device)?;
    context.wait_free(free)?;
    // The kernel takes those in RAM when it is asked to.
    region.page_out(0..PAGES)?;
    check(context, &region, |page| {
        if page < PAGES / 2 { &[1] } else { &[0, 1] }
    })
}

/// What is to be thrown away in RAM goes to the device, and is written here and there.
pub(super) fn migrates(context: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    region.advise(0..PAGES, libc::MADV_FREE)?;
    // Written before it leaves, on the device, after it returned, and never.
    (0..PAGES).step_by(4).for_each(|page| region.fill(page, 2));
    let settled = context.settle(region.all(), Direction::ToDevice, 0)?;
    require!(
        settled.moved == PAGES as u64,
        "freed pages did not migrate: {settled:?}"
    );
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;
    (1..PAGES).step_by(4).for_each(|page| region.fill(page, 2));
    context.settle(region.all(), Direction::ToSystem, 0)?;
    (2..PAGES).step_by(4).for_each(|page| region.fill(page, 2));
    context.expect(&region, 0..PAGES, |_| Residency::Ram)?;
    check(
        context,
        &region,
        |page| if page % 4 < 3 { &[2] } else { &[1] },
    )?;

    // Those never written may be thrown away now, the others only swapped out.
    region.page_out(0..PAGES)?;
    let allowed = |page: usize| -> &'static [u64] { if page % 4 < 3 { &[2] } else { &[0, 1] } };
    check(context, &region, allowed)?;
    context.settle(region.all(), Direction::ToDevice, 0)?;
    check(context, &region, allowed)
}
