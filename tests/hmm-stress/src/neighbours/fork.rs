//! fork in every state of the pages, and of the processes.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use super::counted::counted;
use super::meanwhile::meanwhile;
use crate::context::Context;
use crate::failure::Failure;
use crate::process::{self, pipe};
use crate::region::Region;
use crate::require;

/// Pages of a region, a multiple of 4.
const PAGES: usize = 512;

/// How long a race goes on.
const DURATION: Duration = Duration::from_secs(3);

fn filled(context: &Context) -> Result<Region, Failure> {
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    Ok(region)
}

fn write(region: &Region, own: usize, generation: u64) {
    (own..PAGES)
        .step_by(4)
        .for_each(|page| region.fill(page, generation));
}

/// Parent and child share `on_device` pages at fork, and write to some pages each.
pub(super) fn shared(context: &Context) -> Result<(), Failure> {
    for on_device in [0, PAGES / 2, PAGES] {
        let free = context.free()?;
        let region = filled(context)?;
        if on_device > 0 {
            context.settle(region.range(0..on_device), Direction::ToDevice, 0)?;
        }
        let io = |source| Failure::System {
            call: "a pipe",
            source,
        };
        let (mut wait, mut go) = pipe()?;
        let (mut ready, mut tell) = pipe()?;
        let child = process::fork(context, |context| {
            let residency = |page| {
                if page < on_device {
                    Residency::Device
                } else {
                    Residency::Ram
                }
            };
            context.expect(&region, 0..PAGES, residency)?;
            tell.write_all(b"!").map_err(io)?;
            // The parent has written by then.
            wait.read_exact(&mut [0]).map_err(io)?;
            write(&region, 1, 2);
            let childs = |page| if page % 4 == 1 { 2 } else { 1 };
            context.check(&region, 0..PAGES, childs)?;
            context.settle(region.all(), Direction::ToDevice, 0)?;
            context.expect(&region, 0..PAGES, |_| Residency::Device)?;
            context.check(&region, 0..PAGES, childs)
        })?;
        // Either it looks at where its pages are first, or it has failed.
        drop(tell);
        let _ = ready.read(&mut [0]);
        write(&region, 2, 3);
        // If it has failed, it tells below.
        let _ = go.write_all(b"!");
        // Whatever one of them touches comes home for both: the parent waits.
        child.wait()?;
        let parents = |page| if page % 4 == 2 { 3 } else { 1 };
        context.check(&region, 0..PAGES, parents)?;
        context.settle(region.all(), Direction::ToDevice, 0)?;
        context.expect(&region, 0..PAGES, |_| Residency::Device)?;
        // Nothing is shared any more: no frame is left of the child.
        context.wait_free(free - (PAGES * PAGE_SIZE) as u64)?;
        context.check(&region, 0..PAGES, parents)?;
    }
    Ok(())
}

/// A page that two processes share moves once, for both.
pub(super) fn child_migrates(context: &Context) -> Result<(), Failure> {
    let region = filled(context)?;
    counted(context, &[("pages_to_device", PAGES)], || {
        process::fork(context, |context| {
            context.settle(region.all(), Direction::ToDevice, 0)?;
            context.expect(&region, 0..PAGES, |_| Residency::Device)
        })?
        .wait()
    })?;
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;
    counted(context, &[("pages_to_system", PAGES)], || {
        process::fork(context, |context| {
            context.settle(region.all(), Direction::ToSystem, 0)?;
            Ok(())
        })?
        .wait()
    })?;
    context.expect(&region, 0..PAGES, |_| Residency::Ram)?;
    counted(
        context,
        &[("pages_to_device", PAGES), ("pages_faulted", PAGES)],
        || {
            context.settle(region.all(), Direction::ToDevice, 0)?;
            process::fork(context, |context| context.check(&region, 0..PAGES, |_| 1))?.wait()
        },
    )?;
    context.expect(&region, 0..PAGES, |_| Residency::Ram)?;
    context.check(&region, 0..PAGES, |_| 1)
}

/// Children are made while the pages migrate both ways, and use and migrate them.
pub(super) fn while_migrating(context: &Context) -> Result<(), Failure> {
    let region = filled(context)?;
    let end = Instant::now() + DURATION;
    meanwhile(
        context,
        &[&region],
        &[Direction::ToDevice, Direction::ToSystem],
        || {
            while Instant::now() < end {
                process::fork(context, |context| {
                    context.check(&region, 0..PAGES / 2, |_| 1)?;
                    write(&region, 0, 2);
                    context.migrate(region.all(), Direction::ToDevice)?;
                    context.check(&region, 0..PAGES, |page| if page % 4 == 0 { 2 } else { 1 })
                })?
                .wait()?;
            }
            Ok(())
        },
    )?;
    context.check(&region, 0..PAGES, |_| 1)
}

/// The process that put pages on the device is gone, its children and grandchildren use
/// them.
pub(super) fn parent_exits_first(context: &Context) -> Result<(), Failure> {
    let free = context.free()?;
    let (mut done, mut tell) = pipe()?;
    let parent = process::fork(context, |context| {
        let region = filled(context)?;
        context.settle(region.all(), Direction::ToDevice, 0)?;
        let (mut gone, here) = pipe()?;
        let (mut ready, mut tell_ready) = pipe()?;
        let child = process::fork(context, |context| {
            // SAFETY: the call only sets a property of this process, which is to outlive
            // its parent.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, 0) };
            drop(here);
            let io = |source| Failure::System {
                call: "a pipe",
                source,
            };
            tell_ready.write_all(b"!").map_err(io)?;
            let grandchild = process::fork(context, |context| {
                // The end of the pipe comes when the first process has ended.
                let _ = gone.read(&mut [0]);
                write(&region, 0, 2);
                let grandchilds = |page| if page % 4 == 0 { 2 } else { 1 };
                context.check(&region, 0..PAGES, grandchilds)?;
                context.settle(region.all(), Direction::ToDevice, 0)?;
                context.check(&region, 0..PAGES, grandchilds)
            })?;
            let _ = gone.read(&mut [0]);
            grandchild.wait()?;
            context.expect(&region, 1..2, |_| Residency::Ram)?;
            context.settle(region.all(), Direction::ToDevice, 0)?;
            context.check(&region, 0..PAGES, |_| 1)?;
            tell.write_all(b"!").map_err(io)
        })?;
        drop(tell_ready);
        let _ = ready.read(&mut [0]);
        // It is not waited for.
        std::mem::forget(child);
        Ok(())
    })?;
    drop(tell);
    parent.wait()?;
    let told = done.read(&mut [0]).unwrap_or(0);
    require!(told == 1, "an orphan failed");
    context.wait_free(free)
}

/// A child that shares the memory (vfork), and one that has its own, run a program.
pub(super) fn exec(context: &Context) -> Result<(), Failure> {
    let region = filled(context)?;
    counted(
        context,
        &[("pages_to_device", PAGES), ("cpu_faults", 0)],
        || {
            context.settle(region.all(), Direction::ToDevice, 0)?;
            // posix_spawn, which is a vfork.
            run(Command::new("/proc/self/exe").arg("--version"))?;
            context.expect(&region, 0..PAGES, |_| Residency::Device)?;
            process::fork(context, |context| {
                context.expect(&region, 0..PAGES, |_| Residency::Device)?;
                let error = std::os::unix::process::CommandExt::exec(
                    Command::new("/proc/self/exe")
                        .arg("--version")
                        .stdout(Stdio::null()),
                );
                Err(Failure::System {
                    call: "execve",
                    source: error,
                })
            })?
            .wait()?;
            context.expect(&region, 0..PAGES, |_| Residency::Device)
        },
    )?;
    context.check(&region, 0..PAGES, |_| 1)
}

fn run(command: &mut Command) -> Result<(), Failure> {
    let status = command
        .stdout(Stdio::null())
        .status()
        .map_err(|source| Failure::System {
            call: "running a program",
            source,
        })?;
    require!(status.success(), "a program ended with {status}");
    Ok(())
}
