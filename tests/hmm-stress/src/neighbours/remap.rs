//! mremap of device pages: they stay on the device and are found at their new address.

use std::ptr;

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use super::counted::counted;
use crate::context::Context;
use crate::failure::Failure;
use crate::region::{PMD_PAGES, PageSize, Region};
use crate::require;

/// The numbers of pages that are moved, small and with huge pages among them.
const SIZES: [(usize, PageSize); 2] = [(48, PageSize::Small), (2 * PMD_PAGES, PageSize::Huge)];

/// Move the pages elsewhere and leave the old mapping, empty. Returns the new one.
fn leave_mapping(region: &Region, seed: u64) -> Result<Region, Failure> {
    let range = region.all();
    // SAFETY: the pages are moved to an address of the kernel's choice; the old mapping
    // stays valid, and its words are only seen as atomics.
    let moved = unsafe {
        libc::mremap(
            range.start as *mut _,
            range.len(),
            range.len(),
            libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP,
            ptr::null_mut::<libc::c_void>(),
        )
    };
    if moved == libc::MAP_FAILED {
        return Err(Failure::system("mremap"));
    }
    // SAFETY: the mapping is new, as long as the old one, and may be written.
    Ok(unsafe { Region::adopt(moved as usize, region.pages(), seed) })
}

/// Make the region shorter or longer, wherever that is possible.
fn resize(region: Region, pages: usize, seed: u64) -> Result<Region, Failure> {
    let range = region.all();
    std::mem::forget(region);
    // SAFETY: the old mapping was given up, nothing else refers to it.
    let moved = unsafe {
        libc::mremap(
            range.start as *mut _,
            range.len(),
            pages * PAGE_SIZE,
            libc::MREMAP_MAYMOVE,
            ptr::null_mut::<libc::c_void>(),
        )
    };
    if moved == libc::MAP_FAILED {
        return Err(Failure::system("mremap"));
    }
    // SAFETY: the mapping has that size now and may be written.
    Ok(unsafe { Region::adopt(moved as usize, pages, seed) })
}

/// MREMAP_DONTUNMAP, after which the old place holds nothing.
pub(super) fn dont_unmap(context: &Context) -> Result<(), Failure> {
    for (pages, page_size) in SIZES {
        let seed = context.region_seed(0);
        let old = Region::new(pages, page_size, seed)?;
        old.fill_all(1);
        context.settle(old.all(), Direction::ToDevice, 0)?;
        let new = counted(context, &[("pages_faulted", 0)], || {
            leave_mapping(&old, seed)
        })?;
        context.expect(&new, 0..pages, |_| Residency::Device)?;
        context.expect(&old, 0..pages, |_| Residency::None)?;
        let settled = context.settle(old.all(), Direction::ToDevice, 0)?;
        require!(
            (settled.moved, settled.filled) == (0, pages as u64),
            "what was left behind: {settled:?}"
        );
        context.check(&new, 0..pages, |_| 1)?;
        context.check(&old, 0..pages, |_| 0)?;
    }
    Ok(())
}

/// Shorter and longer: pages that are cut off are freed, pages that stay are as they were.
pub(super) fn sizes(context: &Context) -> Result<(), Failure> {
    for (pages, page_size) in SIZES {
        let free = context.free()?;
        let seed = context.region_seed(0);
        let region = Region::new(pages, page_size, seed)?;
        region.fill_all(1);
        context.settle(region.all(), Direction::ToDevice, 0)?;
        // In the middle of a huge page.
        let fewer = pages * 5 / 8;
        let region = resize(region, fewer, seed)?;
        // A large device folio of which a part is unmapped stays whole until somebody splits
        // it: __folio_remove_rmap() queues only folios of RAM for that.
        if page_size == PageSize::Small {
            context.wait_free(free - (fewer * PAGE_SIZE) as u64)?;
        }
        let region = resize(region, pages, seed)?;
        context.expect(&region, 0..pages, |page| {
            if page < fewer {
                Residency::Device
            } else {
                Residency::None
            }
        })?;
        context.check(&region, 0..pages, |page| u64::from(page < fewer))?;
        context.wait_free(free)?;
    }
    Ok(())
}
