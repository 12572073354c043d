//! The ways in which a process gives memory up.

use std::io::{Read, Write};

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use super::newcomer::arrives;
use crate::context::Context;
use crate::failure::Failure;
use crate::process::{self, pipe};
use crate::region::{PMD_PAGES, PageSize, Region};
use crate::require;

/// Secrets on as much of the device as is free and as this test may use, and in as much RAM,
/// which is free again.
fn plant(context: &Context, page_size: PageSize) -> Result<Region, Failure> {
    let free = usize::try_from(context.free()?).unwrap_or(usize::MAX) / PAGE_SIZE;
    let pages = free.min(context.pages);
    let in_ram = Region::new(pages, page_size, context.region_seed(1))?;
    in_ram.fill_all(1);
    drop(in_ram);
    let region = Region::new(pages, page_size, context.region_seed(0))?;
    region.fill_all(1);
    context.settle(region.all(), Direction::ToDevice, 0)?;
    Ok(region)
}

/// How many of its pages are on the device.
fn planted(context: &Context, region: &Region) -> Result<usize, Failure> {
    let residency = context.device.query(region.all())?;
    let on_device = residency.iter().filter(|&&seen| seen == Residency::Device);
    Ok(on_device.count())
}

/// The newcomer finds nothing, though there were secrets in `number` of these pages' frames.
fn arrives_after(context: &Context, number: usize, pages: usize) -> Result<(), Failure> {
    arrives(context)?;
    require!(
        number == pages,
        "{number} of {pages} pages had been on the device"
    );
    Ok(())
}

pub(super) fn munmap(context: &Context) -> Result<(), Failure> {
    for page_size in [PageSize::Small, PageSize::Huge] {
        let region = plant(context, page_size)?;
        let (number, pages) = (planted(context, &region)?, region.pages());
        drop(region);
        arrives_after(context, number, pages)?;
    }
    Ok(())
}

pub(super) fn discard(context: &Context) -> Result<(), Failure> {
    for page_size in [PageSize::Small, PageSize::Huge] {
        let region = plant(context, page_size)?;
        let (number, pages) = (planted(context, &region)?, region.pages());
        // First every other half of 2 MiB, in which a huge page is split.
        for first in (0..pages).step_by(PMD_PAGES) {
            region.discard(first..first + PMD_PAGES / 2)?;
        }
        arrives_after(context, number, pages)?;
        region.discard(0..pages)?;
        arrives(context)?;
    }
    Ok(())
}

pub(super) fn lazy_free(context: &Context) -> Result<(), Failure> {
    let region = plant(context, PageSize::Small)?;
    let (number, pages) = (planted(context, &region)?, region.pages());
    // Half of it in RAM, where the kernel may take it at once.
    context.settle(region.range(0..pages / 2), Direction::ToSystem, 0)?;
    region.advise(0..pages, libc::MADV_FREE)?;
    region.page_out(0..pages)?;
    arrives_after(context, number, pages)?;
    // What is left of it travels once more.
    context.settle(region.all(), Direction::ToDevice, 0)?;
    drop(region);
    arrives(context)
}

pub(super) fn request(context: &Context) -> Result<(), Failure> {
    for page_size in [PageSize::Small, PageSize::Huge] {
        let region = plant(context, page_size)?;
        let number = planted(context, &region)?;
        context.settle(region.all(), Direction::ToSystem, 0)?;
        arrives_after(context, number, region.pages())?;
        context.check(&region, 0..region.pages(), |_| 1)?;
    }
    Ok(())
}

pub(super) fn fault(context: &Context) -> Result<(), Failure> {
    let region = plant(context, PageSize::Small)?;
    let number = planted(context, &region)?;
    (0..region.pages()).for_each(|page| region.touch(page));
    arrives_after(context, number, region.pages())?;
    context.check(&region, 0..region.pages(), |_| 1)
}

pub(super) fn eviction(context: &Context) -> Result<(), Failure> {
    // What another opening of the device may use makes room for its own.
    let context = &context.reopen()?;
    let region = plant(context, PageSize::Small)?;
    let (number, pages) = (planted(context, &region)?, region.pages());
    let used = context.device.limit()?.used;
    context
        .device
        .set_limit(Some(used.max((PMD_PAGES * PAGE_SIZE) as u64)))?;
    let before = context.driver_counters()?.get("pages_evicted")?;
    let more = Region::new(pages / 2, PageSize::Small, context.region_seed(2))?;
    more.fill_all(1);
    context.settle(more.all(), Direction::ToDevice, 0)?;
    let evicted = context.driver_counters()?.get("pages_evicted")? - before;
    arrives_after(context, number, pages)?;
    require!(evicted > 0, "nothing was evicted");
    context.check(&region, 0..pages, |_| 1)?;
    context.check(&more, 0..more.pages(), |_| 1)
}

/// A child that leaves secrets behind when it ends as `end` has it.
fn in_a_child(
    context: &Context,
    end: impl FnOnce(Region) -> Result<(), Failure>,
) -> Result<process::Child, Failure> {
    process::fork(context, |context| {
        let region = plant(context, PageSize::Small)?;
        let number = planted(context, &region)?;
        require!(
            number == region.pages(),
            "{number} of {} pages are on the device",
            region.pages()
        );
        end(region)
    })
}

pub(super) fn exit(context: &Context) -> Result<(), Failure> {
    let free = context.free()?;
    let child = in_a_child(context, |region| {
        std::mem::forget(region);
        Ok(())
    })?;
    let left = child.wait();
    context.wait_free(free)?;
    arrives(context)?;
    left
}

pub(super) fn kill(context: &Context) -> Result<(), Failure> {
    let free = context.free()?;
    let (mut ready, mut tell) = pipe()?;
    let child = in_a_child(context, move |region| {
        // Nobody reads any more if the parent is gone.
        let _ = tell.write_all(&[1]);
        loop {
            std::thread::park();
            region.touch(0);
        }
    })?;
    let planted = ready.read_exact(&mut [0]);
    let left = match planted {
        Ok(()) => child.kill(),
        Err(_) => child.wait(),
    };
    context.wait_free(free)?;
    arrives(context)?;
    left
}

pub(super) fn exec(context: &Context) -> Result<(), Failure> {
    let free = context.free()?;
    let child = in_a_child(context, |region| {
        std::mem::forget(region);
        let arguments = [c"true".as_ptr(), std::ptr::null()];
        // SAFETY: both lists end in a null pointer and live for the call.
        unsafe { libc::execv(c"/bin/true".as_ptr(), arguments.as_ptr()) };
        Err(Failure::system("execv"))
    })?;
    let left = child.wait();
    context.wait_free(free)?;
    arrives(context)?;
    left
}

pub(super) fn copy_on_write(context: &Context) -> Result<(), Failure> {
    let region = plant(context, PageSize::Small)?;
    let (number, pages) = (planted(context, &region)?, region.pages());
    let child = process::fork(context, |context| {
        // Every other page is shared no more, and the parent's is still where it was.
        (0..pages).step_by(2).for_each(|page| region.fill(page, 2));
        arrives(context)?;
        context.check(&region, 0..pages, |page| if page % 2 == 0 { 2 } else { 1 })
    })?;
    child.wait()?;
    region.fill_all(3);
    arrives_after(context, number, pages)?;
    context.check(&region, 0..pages, |_| 3)
}
