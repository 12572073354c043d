//! Swap under memory pressure: of a process that has too little memory, pages in RAM go to
//! swap, and device pages stay where they are.

use std::fs;

use virtio_hmm_client::{Direction, Residency, Skip};

use super::cgroup::Cgroup;
use super::counted::counted;
use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::Region;
use crate::require;

/// Pages on the device, and pages in RAM.
const ON_DEVICE: usize = 2048;
const IN_RAM: usize = 4096;

/// Bytes that leave no room for half of the pages in RAM.
const HIGH: u64 = (ON_DEVICE as u64 + IN_RAM as u64 / 2) * 4096;

fn swapped(context: &Context, region: &Region) -> Result<u64, Failure> {
    let seen = context.device.query(region.all())?;
    let swapped = seen.iter().filter(|seen| **seen == Residency::Swapped);
    Ok(swapped.count() as u64)
}

/// Limit the memory of this process, without killing it. The kernel brings it below the
/// limit when more is allocated.
fn press(context: &Context, cgroup: &Cgroup) -> Result<(), Failure> {
    cgroup.set("memory.high", HIGH)?;
    context.region(64, 99)?.fill_all(1);
    Ok(())
}

pub(super) fn pressure(context: &Context) -> Result<(), Failure> {
    // The first line is a heading.
    if !fs::read_to_string("/proc/swaps").is_ok_and(|swaps| swaps.lines().count() > 1) {
        return Err(Failure::Skip("no swap is on".into()));
    }
    let cgroup = Cgroup::new("swap")?;
    process::fork(context, |context| {
        cgroup.enter()?;
        let device = context.region(ON_DEVICE, 0)?;
        let ram = context.region(IN_RAM, 1)?;
        device.fill_all(1);
        ram.fill_all(1);
        counted(context, &[("pages_to_device", ON_DEVICE)], || {
            context.settle(device.all(), Direction::ToDevice, 0)
        })?;

        let on_device =
            |context: &Context| context.expect(&device, 0..ON_DEVICE, |_| Residency::Device);
        counted(context, &[("cpu_faults", 0)], || {
            press(context, &cgroup)?;
            on_device(context)
        })?;
        cgroup.set("memory.high", "max")?;
        let gone = swapped(context, &ram)?;
        require!(
            gone >= IN_RAM as u64 / 4,
            "{gone} pages were swapped out under pressure"
        );

        // What is in swap is skipped, and moves once it was touched.
        let skipped = [("skipped_swapped", usize::try_from(gone).unwrap_or(0))];
        counted(context, &skipped, || {
            let outcome = context.migrate(ram.all(), Direction::ToDevice)?;
            require!(
                outcome.skipped(Skip::Swapped) == gone,
                "{gone} pages were in swap: {outcome:?}"
            );
            Ok(())
        })?;
        require!(swapped(context, &ram)? == gone, "migration touched swap");
        context.check(&ram, 0..IN_RAM, |_| 1)?;
        context.settle(ram.all(), Direction::ToDevice, 0)?;
        context.expect(&ram, 0..IN_RAM, |_| Residency::Device)?;
        on_device(context)?;

        // All of them come home while there is room for half of them: one after the
        // other they go on to swap.
        cgroup.set("memory.high", HIGH)?;
        context.check(&ram, 0..IN_RAM, |_| 1)?;
        counted(context, &[("pages_to_system", ON_DEVICE)], || {
            context.settle(device.all(), Direction::ToSystem, 0)
        })?;
        device.fill_all(2);
        press(context, &cgroup)?;
        require!(
            swapped(context, &ram)? + swapped(context, &device)? > 0,
            "nothing of what came home was swapped out"
        );
        context.check(&device, 0..ON_DEVICE, |_| 2)?;
        context.check(&ram, 0..IN_RAM, |_| 1)?;
        cgroup.set("memory.high", "max")
    })?
    .wait()
}
