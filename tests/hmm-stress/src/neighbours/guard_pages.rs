//! Guard pages: places in a mapping that nobody may touch (MADV_GUARD_INSTALL).
//!
//! Making one throws the page away that was there, wherever it was. `migrate_vma` does
//! not take a guard for a hole, so it stays.

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency, Skip};

use super::counted::counted;
use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::Region;
use crate::require;

/// Not in the libc crate.
const MADV_GUARD_INSTALL: libc::c_int = 102;
const MADV_GUARD_REMOVE: libc::c_int = 103;

const PAGES: usize = 64;

/// Pages that become guards, half of them while on the device.
const GUARDS: std::ops::Range<usize> = 24..40;
const ON_THE_DEVICE: std::ops::Range<usize> = 0..32;

fn advise(region: &Region, advice: libc::c_int) -> Result<(), Failure> {
    let range = region.range(GUARDS);
    // SAFETY: the range lies in the region, whose words are only seen as atomics. Nothing
    // touches guards but children that are to end by it.
    if unsafe { libc::madvise(range.start as *mut _, range.len(), advice) } == 0 {
        return Ok(());
    }
    let error = Failure::system("madvise");
    match &error {
        Failure::System { source, .. } if source.raw_os_error() == Some(libc::EINVAL) => {
            Err(Failure::Skip("the kernel has no guard pages".into()))
        }
        _ => Err(error),
    }
}

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    context.settle(region.range(ON_THE_DEVICE), Direction::ToDevice, 0)?;
    let free = context.free()?;
    let thrown_away = ON_THE_DEVICE.end - GUARDS.start;
    advise(&region, MADV_GUARD_INSTALL)?;
    context.wait_free(free + (thrown_away * PAGE_SIZE) as u64)?;
    context.expect(&region, GUARDS, |_| Residency::None)?;

    let guards = GUARDS.len();
    let expected = [("fill_frames", 0), ("skipped_unsupported", guards)];
    counted(context, &expected, || {
        let outcome = context.migrate(region.all(), Direction::ToDevice)?;
        require!(
            outcome.skipped(Skip::Unsupported) == guards as u64,
            "{guards} guards: {outcome:?}"
        );
        Ok(())
    })?;
    context.expect(&region, GUARDS, |_| Residency::None)?;
    process::fork(context, |_| {
        region.touch(GUARDS.start);
        Ok(())
    })?
    .wait_signal(libc::SIGSEGV)?;
    let others = || (0..PAGES).filter(|page| !GUARDS.contains(page));
    for page in others() {
        context.check(&region, page..page + 1, |_| 1)?;
    }

    // Without guards there are holes.
    advise(&region, MADV_GUARD_REMOVE)?;
    let settled = context.settle(region.all(), Direction::ToDevice, 0)?;
    require!(settled.filled == guards as u64, "{settled:?}");
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;
    context.check(&region, 0..PAGES, |page| u64::from(!GUARDS.contains(&page)))
}
