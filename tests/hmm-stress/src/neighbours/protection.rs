//! Memory that may not be read, or not written.
//!
//! Migration asks for no permission: it changes where a page is and not what it holds. The
//! permission counts again for who touches the page, wherever it is.

use virtio_hmm_client::{Direction, Residency, Skip};

use super::counted::counted;
use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::Access;
use crate::require;

/// Pages with each kind of protection.
const EACH: usize = 16;
const PAGES: usize = 4 * EACH;

/// What a page of the region may be used for: nothing, reading, all; the last quarter is
/// holes that may not be used.
fn access(page: usize) -> Access {
    match page / EACH {
        1 => Access::Read,
        2 => Access::Write,
        _ => Access::None,
    }
}

fn generation(page: usize) -> u64 {
    u64::from(page < 3 * EACH)
}

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 0)?;
    for page in (0..PAGES).filter(|&page| generation(page) == 1) {
        region.fill(page, 1);
    }
    for first in (0..PAGES).step_by(EACH) {
        region.protect(first..first + EACH, access(first))?;
    }
    // migrate_vma_insert_page() looks at no permission, so forbidden holes are filled too.
    let settled = context.settle(region.all(), Direction::ToDevice, 0)?;
    require!(
        (settled.moved, settled.filled) == (3 * EACH as u64, EACH as u64),
        "{settled:?}"
    );
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;

    // What is not allowed is SIGSEGV, as in RAM, and brings nothing home.
    counted(context, &[("pages_faulted", 0), ("cpu_faults", 0)], || {
        for page in [0, 3 * EACH] {
            process::fork(context, |_| {
                region.touch(page);
                Ok(())
            })?
            .wait_signal(libc::SIGSEGV)?;
        }
        process::fork(context, |_| {
            region.fill(EACH, 2);
            Ok(())
        })?
        .wait_signal(libc::SIGSEGV)
    })?;
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;

    // Half of each kind comes home by request, still forbidden.
    for first in (0..PAGES).step_by(EACH) {
        let half = region.range(first..first + EACH / 2);
        let settled = context.settle(half, Direction::ToSystem, 0)?;
        require!(settled.moved == EACH as u64 / 2, "{settled:?}");
    }
    context.expect(&region, 0..PAGES, |page| {
        if page % EACH < EACH / 2 {
            Residency::Ram
        } else {
            Residency::Device
        }
    })?;
    let again = context.settle(region.all(), Direction::ToDevice, 0)?;
    require!(
        again.moved == PAGES as u64 / 2 && again.last.skipped(Skip::Already) == PAGES as u64 / 2,
        "{again:?}"
    );

    // Allowed again while on the device.
    region.protect(0..PAGES, Access::Write)?;
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;
    context.check(&region, 0..PAGES / 2, generation)?;
    region.fill_all(2);
    context.check(&region, 0..PAGES, |_| 2)?;
    context.expect(&region, 0..PAGES, |_| Residency::Ram)
}
