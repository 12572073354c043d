//! Memory cgroups: device pages stay charged to who had them in RAM, and count towards his
//! limit. Coming home needs no charge, so that no limit is in the way.

use std::io::{Read, Write};

use virtio_hmm_client::{Direction, Residency};

use super::cgroup::Cgroup;
use super::counted::counted;
use super::tunable::wait_until;
use crate::context::Context;
use crate::failure::Failure;
use crate::process::{self, Child, pipe};
use crate::region::Region;
use crate::require;

/// Pages of a region.
const PAGES: usize = 2048;

/// Bytes of it.
const BYTES: u64 = 8 << 20;

/// What a process may use beside its region: page tables, stack, the driver's working
/// memory.
const SLACK: u64 = 1 << 20;

/// A cgroup without swap.
fn cgroup(name: &str) -> Result<Cgroup, Failure> {
    let cgroup = Cgroup::new(name)?;
    // Not there if the kernel has no swap.
    let _ = cgroup.set("memory.swap.max", 0);
    Ok(cgroup)
}

fn migrate(context: &Context, region: &Region) -> Result<(), Failure> {
    counted(context, &[("pages_to_device", region.pages())], || {
        context.settle(region.all(), Direction::ToDevice, 0)
    })?;
    context.expect(region, 0..region.pages(), |_| Residency::Device)
}

fn oom_kills(cgroup: &Cgroup) -> Result<u64, Failure> {
    cgroup.field("memory.events", "oom_kill")
}

/// mem_cgroup_migrate() hands the charge on: nobody is charged twice, or not at all.
pub(super) fn charge(context: &Context) -> Result<(), Failure> {
    let cgroup = cgroup("charge")?;
    process::fork(context, |context| {
        cgroup.enter()?;
        let region = context.region(PAGES, 0)?;
        region.fill_all(1);
        let used = cgroup.number("memory.current")?;
        require!(used >= BYTES, "{used} bytes are charged for {BYTES}");
        let expect = |wanted: u64, when: &str| {
            let used = cgroup.number("memory.current")?;
            require!(
                used.abs_diff(wanted) <= SLACK,
                "{used} bytes are charged {when}, not {wanted}"
            );
            Ok(())
        };
        migrate(context, &region)?;
        expect(used, "on the device")?;
        context.settle(region.range(0..PAGES / 2), Direction::ToSystem, 0)?;
        context.check(&region, 0..PAGES, |_| 1)?;
        expect(used, "back home")?;
        migrate(context, &region)?;
        region.discard(0..PAGES)?;
        expect(used - BYTES, "after all was thrown away")?;
        // A filled hole is charged like one that is touched.
        counted(context, &[("pages_filled", PAGES)], || {
            context.settle(region.all(), Direction::ToDevice, 0)
        })?;
        expect(used, "for filled holes")?;
        context.check(&region, 0..PAGES, |_| 0)
    })?
    .wait()
}

/// Pages go to the device and come home, by fault and by request, with no room left.
pub(super) fn at_limit(context: &Context) -> Result<(), Failure> {
    let cgroup = cgroup("limit")?;
    process::fork(context, |context| {
        cgroup.enter()?;
        let region = context.region(PAGES, 0)?;
        region.fill_all(1);
        migrate(context, &region)?;
        cgroup.set("memory.max", cgroup.number("memory.current")? + SLACK / 2)?;
        for _ in 0..3 {
            let half = PAGES / 2;
            let back = [
                ("pages_to_system", half),
                ("pages_faulted", half),
                ("cpu_faults_oom", 0),
            ];
            counted(context, &back, || {
                context.settle(region.range(0..half), Direction::ToSystem, 0)?;
                context.check(&region, half..PAGES, |_| 1)
            })?;
            context.expect(&region, 0..PAGES, |_| Residency::Ram)?;
            context.check(&region, 0..half, |_| 1)?;
            migrate(context, &region)?;
        }
        context.check(&region, 0..PAGES, |_| 1)
    })?
    .wait()?;
    require!(oom_kills(&cgroup)? == 0, "a process was killed");
    Ok(())
}

/// A process that waits with all its pages on the device, and then does `then`.
fn holder(
    context: &Context,
    cgroup: &Cgroup,
    then: impl FnOnce(&Context, &Region) -> Result<(), Failure>,
) -> Result<(Child, impl Write), Failure> {
    let (mut ready, mut tell) = pipe()?;
    let (mut wait, go) = pipe()?;
    let child = process::fork(context, |context| {
        cgroup.enter()?;
        let io = |source| Failure::System {
            call: "a pipe",
            source,
        };
        let region = context.region(PAGES, 0)?;
        region.fill_all(1);
        migrate(context, &region)?;
        tell.write_all(b"!").map_err(io)?;
        wait.read_exact(&mut [0]).map_err(io)?;
        then(context, &region)
    })?;
    drop(tell);
    if ready.read_exact(&mut [0]).is_err() {
        child.wait()?;
        return Err(Failure::Broken("a child ended".into()));
    }
    Ok((child, go))
}

/// Require that `child` is killed, its frames are free, and `other` has lost nothing.
fn killed(
    context: &Context,
    cgroup: &Cgroup,
    child: Child,
    free: u64,
    other: &Region,
) -> Result<(), Failure> {
    match child.wait() {
        Err(Failure::Broken(text)) if text.ends_with("signal 9") => {}
        result => require!(false, "it was not killed: {result:?}"),
    }
    require!(oom_kills(cgroup)? == 1, "{} kills", oom_kills(cgroup)?);
    context.wait_free(free)?;
    context.expect(other, 0..PAGES, |_| Residency::Device)?;
    context.check(other, 0..PAGES, |_| 1)?;
    migrate(context, other)
}

/// A process outside of the cgroup, with pages on the device.
fn other(context: &Context) -> Result<Region, Failure> {
    let region = context.region(PAGES, 9)?;
    region.fill_all(1);
    migrate(context, &region)?;
    Ok(region)
}

/// Device pages cannot be reclaimed: a limit below them kills their process.
pub(super) fn lowered_limit(context: &Context) -> Result<(), Failure> {
    let cgroup = cgroup("lowered")?;
    let other = other(context)?;
    let free = context.free()?;
    let (child, _go) = holder(context, &cgroup, |_, _| Ok(()))?;
    // Returns when the process was told to end.
    cgroup.set("memory.max", BYTES / 2)?;
    wait_until("the cgroup's process is killed", || {
        Ok(oom_kills(&cgroup)? > 0)
    })?;
    killed(context, &cgroup, child, free, &other)
}

/// The process needs more RAM than the limit leaves it beside its device pages.
pub(super) fn kill_on_touch(context: &Context) -> Result<(), Failure> {
    let cgroup = cgroup("touch")?;
    let other = other(context)?;
    let free = context.free()?;
    let (child, mut go) = holder(context, &cgroup, |context, _| {
        let more = context.region(PAGES, 1)?;
        more.fill_all(1);
        Ok(())
    })?;
    cgroup.set("memory.max", BYTES + BYTES / 2)?;
    let _ = go.write_all(b"!");
    killed(context, &cgroup, child, free, &other)
}

/// Filled holes are charged in migrate_vma_insert_page(): the process is killed in the
/// middle of a migration.
pub(super) fn kill_on_fill(context: &Context) -> Result<(), Failure> {
    let cgroup = cgroup("fill")?;
    let other = other(context)?;
    let free = context.free()?;
    let (child, mut go) = holder(context, &cgroup, |context, _| {
        let holes = context.region(PAGES, 1)?;
        context.migrate(holes.all(), Direction::ToDevice)?;
        Ok(())
    })?;
    cgroup.set("memory.max", BYTES + BYTES / 2)?;
    let _ = go.write_all(b"!");
    killed(context, &cgroup, child, free, &other)
}
