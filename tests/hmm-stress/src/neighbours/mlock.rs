//! Locked memory: mlock, mlock2(MLOCK_ONFAULT), mlockall.
//!
//! "Locked" means that the kernel does not swap it out. Who asks for a migration gets it.

use std::fs;

use virtio_hmm_client::{Direction, Residency};

use super::counted::counted;
use super::huge;
use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::{PageSize, Region};
use crate::require;

/// Pages of a region.
const PAGES: usize = 256;

/// Bytes of it in KiB, as the kernel's files say it.
const KIB: i64 = PAGES as i64 * 4;

/// Run `test` in a process of its own and on one CPU: the kernel collects locked pages
/// for each CPU before it counts them.
fn alone(
    context: &Context,
    test: impl FnOnce(&Context) -> Result<(), Failure>,
) -> Result<(), Failure> {
    process::fork(context, |context| {
        // SAFETY: an all-zero set is valid, CPU 0 is in it, and it lives for the call.
        let result = unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(0, &mut set);
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
        };
        if result != 0 {
            return Err(Failure::system("sched_setaffinity"));
        }
        test(context)
    })?
    .wait()
}

/// The value of `name`, in KiB, in a file of lines "name: value kB".
fn field(path: &'static str, name: &str) -> Result<i64, Failure> {
    let text = fs::read_to_string(path).map_err(|source| Failure::System { call: path, source })?;
    text.lines()
        .find_map(|line| {
            let value = line.strip_prefix(name)?.strip_prefix(':')?;
            value.trim().strip_suffix(" kB")?.parse().ok()
        })
        .ok_or_else(|| Failure::Broken(format!("{path} has no {name}")))
}

/// KiB that are locked: of this process by its mappings, and of the machine by its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Locked {
    process: i64,
    machine: i64,
}

impl Locked {
    fn now() -> Result<Self, Failure> {
        // Unlocking a page makes the kernel count what it collected for this CPU.
        let page = Region::new(1, PageSize::Small, 0)?;
        lock(page.all(), Lock::Now)?;
        lock(page.all(), Lock::Not)?;
        drop(page);
        // Fold the counts of all CPUs into one. Nobody else may be there to ask for it.
        let _ = fs::read("/proc/sys/vm/stat_refresh");
        Ok(Self {
            process: field("/proc/self/status", "VmLck")?,
            machine: field("/proc/meminfo", "Mlocked")?,
        })
    }

    /// Require that so much more is locked now.
    fn expect(self, process: i64, machine: i64) -> Result<(), Failure> {
        let now = Self::now()?;
        let change = (now.process - self.process, now.machine - self.machine);
        require!(
            change == (process, machine),
            "({process}, {machine}) KiB more should be locked by (process, machine), {change:?} are"
        );
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Lock {
    Now,
    OnFault,
    Not,
}

/// Lock or unlock addresses.
fn lock(range: std::ops::Range<usize>, how: Lock) -> Result<(), Failure> {
    let (start, length) = (range.start as *const libc::c_void, range.len());
    // SAFETY: locking changes nothing of what memory holds.
    let result = unsafe {
        match how {
            Lock::Now => libc::mlock(start, length),
            Lock::OnFault => libc::mlock2(start, length, libc::MLOCK_ONFAULT),
            Lock::Not => libc::munlock(start, length),
        }
    };
    if result != 0 {
        return Err(Failure::system("mlock"));
    }
    Ok(())
}

/// Migrate all pages to the device.
fn migrate(context: &Context, region: &Region) -> Result<(), Failure> {
    counted(context, &[("pages_to_device", PAGES)], || {
        context.settle(region.all(), Direction::ToDevice, 0)
    })?;
    context.expect(region, 0..PAGES, |_| Residency::Device)
}

/// Bring all pages home, half of them on request and half by reading, and compare them.
fn come_home(context: &Context, region: &Region) -> Result<(), Failure> {
    let half = PAGES / 2;
    counted(
        context,
        &[("pages_to_system", half), ("pages_faulted", half)],
        || {
            context.settle(region.range(0..half), Direction::ToSystem, 0)?;
            context.check(region, half..PAGES, |_| 1)
        },
    )?;
    context.expect(region, 0..PAGES, |_| Residency::Ram)?;
    context.check(region, 0..half, |_| 1)
}

/// A locked page is locked on the device as well: remove_migration_pte() locks what it
/// maps, device pages too.
pub(super) fn locked(context: &Context) -> Result<(), Failure> {
    alone(context, |context| {
        let region = context.region(PAGES, 0)?;
        region.fill_all(1);
        let before = Locked::now()?;
        lock(region.all(), Lock::Now)?;
        before.expect(KIB, KIB)?;
        for _ in 0..2 {
            migrate(context, &region)?;
            before.expect(KIB, KIB)?;
            come_home(context, &region)?;
            before.expect(KIB, KIB)?;
        }
        lock(region.all(), Lock::Not)?;
        before.expect(0, 0)?;
        migrate(context, &region)?;
        before.expect(0, 0)?;
        come_home(context, &region)
    })
}

/// mlock() faults its pages in, as it does with those in swap. MLOCK_ONFAULT waits for
/// the process to touch them.
pub(super) fn lock_on_device(context: &Context) -> Result<(), Failure> {
    alone(context, |context| {
        let region = context.region(PAGES, 0)?;
        region.fill_all(1);
        let before = Locked::now()?;
        migrate(context, &region)?;
        counted(context, &[("pages_faulted", PAGES)], || {
            lock(region.all(), Lock::Now)
        })?;
        context.expect(&region, 0..PAGES, |_| Residency::Ram)?;
        before.expect(KIB, KIB)?;
        context.check(&region, 0..PAGES, |_| 1)?;
        lock(region.all(), Lock::Not)?;
        before.expect(0, 0)?;

        migrate(context, &region)?;
        counted(context, &[("pages_faulted", 0)], || {
            lock(region.all(), Lock::OnFault)
        })?;
        context.expect(&region, 0..PAGES, |_| Residency::Device)?;
        before.expect(KIB, 0)?;
        come_home(context, &region)?;
        before.expect(KIB, KIB)?;
        drop(region);
        before.expect(0, 0)
    })
}

/// Pages that are unlocked, thrown away or unmapped while they are on the device.
pub(super) fn unlock_on_device(context: &Context) -> Result<(), Failure> {
    alone(context, |context| {
        let before = Locked::now()?;
        let regions = [0, 1, 2].map(|number| context.region(PAGES, number));
        for region in &regions {
            let region = region.as_ref().map_err(|_| Failure::system("mmap"))?;
            region.fill_all(1);
            lock(region.all(), Lock::Now)?;
            migrate(context, region)?;
        }
        before.expect(3 * KIB, 3 * KIB)?;
        let [unlocked, discarded, unmapped] = regions;
        let (unlocked, discarded) = (unlocked?, discarded?);
        drop(unmapped);
        before.expect(2 * KIB, 2 * KIB)?;
        // MADV_DONTNEED is not for locked memory, MADV_DONTNEED_LOCKED is.
        discarded.advise(0..PAGES, libc::MADV_DONTNEED_LOCKED)?;
        before.expect(2 * KIB, KIB)?;
        context.expect(&discarded, 0..PAGES, |_| Residency::None)?;
        drop(discarded);
        before.expect(KIB, KIB)?;

        lock(unlocked.all(), Lock::Not)?;
        come_home(context, &unlocked)?;
        before.expect(0, 0)?;
        migrate(context, &unlocked)?;
        before.expect(0, 0)?;
        come_home(context, &unlocked)
    })
}

/// A locked page in a frame whose last page was active: folio_migrate_flags() takes a page
/// that is active and unevictable for a bug. It hands on the latter for a page that two
/// processes lock: try_to_migrate_one() unlocks it for the second when it is off the LRU.
pub(super) fn after_active(context: &Context) -> Result<(), Failure> {
    alone(context, |context| {
        let active = context.region(PAGES, 0)?;
        active.fill_all(1);
        // Each marks the pages as accessed.
        active.advise(0..PAGES, libc::MADV_POPULATE_WRITE)?;
        active.advise(0..PAGES, libc::MADV_POPULATE_WRITE)?;
        migrate(context, &active)?;
        active.discard(0..PAGES)?;
        let region = context.region(PAGES, 1)?;
        region.fill_all(1);
        lock(region.all(), Lock::OnFault)?;
        process::fork(context, |context| {
            lock(region.all(), Lock::OnFault)?;
            migrate(context, &region)?;
            come_home(context, &region)
        })?
        .wait()?;
        // And the other way round.
        migrate(context, &region)?;
        region.advise(0..PAGES, libc::MADV_DONTNEED_LOCKED)?;
        active.fill_all(1);
        active.advise(0..PAGES, libc::MADV_POPULATE_WRITE)?;
        active.advise(0..PAGES, libc::MADV_POPULATE_WRITE)?;
        migrate(context, &active)?;
        come_home(context, &active)
    })
}

/// Huge pages, locked when they come home, and unlocked on the device.
pub(super) fn huge_pages(context: &Context) -> Result<(), Failure> {
    alone(context, |context| {
        let region = huge::region(context)?;
        let kib = region.pages() as i64 * 4;
        let before = Locked::now()?;
        huge::migrate(context, &region, Direction::ToDevice)?;
        lock(region.all(), Lock::OnFault)?;
        before.expect(kib, 0)?;
        huge::migrate(context, &region, Direction::ToSystem)?;
        before.expect(kib, kib)?;
        huge::migrate(context, &region, Direction::ToDevice)?;
        before.expect(kib, kib)?;
        lock(region.all(), Lock::Not)?;
        context.check(&region, 0..region.pages(), |_| 1)?;
        before.expect(0, 0)?;
        huge::migrate(context, &region, Direction::ToDevice)?;
        before.expect(0, 0)
    })
}

/// Of all memory, also of what comes later. A hole that is filled is not counted before
/// it comes home: migrate_vma_insert_page() locks only what goes to an LRU list.
pub(super) fn lock_all(context: &Context) -> Result<(), Failure> {
    alone(context, |context| {
        let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
        // SAFETY: locking changes nothing of what memory holds.
        if unsafe { libc::mlockall(flags) } != 0 {
            return Err(Failure::system("mlockall"));
        }
        let before = field("/proc/self/status", "VmLck")?;
        let region = context.region(PAGES, 0)?;
        let more = field("/proc/self/status", "VmLck")? - before;
        require!(more == KIB, "{more} KiB more are locked, {KIB} should be");
        counted(context, &[("pages_filled", PAGES)], || {
            context.settle(region.all(), Direction::ToDevice, 0)
        })?;
        context.expect(&region, 0..PAGES, |_| Residency::Device)?;
        context.check(&region, 0..PAGES, |_| 0)?;
        region.fill_all(1);
        migrate(context, &region)?;
        come_home(context, &region)?;
        // SAFETY: as above.
        if unsafe { libc::munlockall() } != 0 {
            return Err(Failure::system("munlockall"));
        }
        migrate(context, &region)?;
        come_home(context, &region)
    })
}
