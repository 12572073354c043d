//! Memory of kinds that do not migrate: a call leaves it alone, copies nothing, and says
//! why.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr;
use std::time::Instant;

use virtio_hmm_client::{Direction, Error, PAGE_SIZE, Residency, Skip};

use super::counted::counted;
use super::mappings::mappings;
use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::{PMD_PAGES, Region};
use crate::require;

/// Pages of a mapping; they lie in one batch or two.
const PAGES: usize = 24;

/// Huge pages that are tried.
const HUGE_PAGES: usize = 2;

const HUGE_POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Fill the region, and require that nothing of it moves and nothing is copied.
fn stays(context: &Context, region: &Region) -> Result<(), Failure> {
    let pages = region.pages();
    region.fill_all(1);
    let expected = [
        ("skipped_unsupported", pages),
        ("skipped_already", pages),
        ("migrate_retries", 0),
        ("to_device_frames", 0),
        ("fill_frames", 0),
        ("from_device_frames", 0),
    ];
    counted(context, &expected, || {
        for (direction, reason) in [
            (Direction::ToDevice, Skip::Unsupported),
            (Direction::ToSystem, Skip::Already),
        ] {
            context.expect(region, 0..pages, |_| Residency::Ram)?;
            let outcome = context.migrate(region.all(), direction)?;
            require!(
                outcome.skipped(reason) == pages as u64,
                "{direction:?}: {outcome:?}"
            );
        }
        Ok(())
    })?;
    context.expect(region, 0..pages, |_| Residency::Ram)?;
    context.check(region, 0..pages, |_| 1)
}

/// The descriptor that a system call returned.
fn descriptor(call: &'static str, result: libc::c_long) -> Result<OwnedFd, Failure> {
    let fd = i32::try_from(result).map_err(|_| Failure::Broken(format!("{call}: {result}")))?;
    if fd < 0 {
        return Err(Failure::system(call));
    }
    // SAFETY: the descriptor is new and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A file in memory of `pages` pages.
pub(super) fn memory_file(pages: usize) -> Result<File, Failure> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"hmm-stress".as_ptr(), libc::MFD_CLOEXEC) };
    let file = File::from(descriptor("memfd_create", fd.into())?);
    file.set_len((pages * PAGE_SIZE) as u64)
        .map_err(|source| Failure::System {
            call: "ftruncate",
            source,
        })?;
    Ok(file)
}

/// Anonymous memory shared with a child.
pub(super) fn shared_anonymous(context: &Context) -> Result<(), Failure> {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let region = Region::of_kind(PAGES, flags, None, context.region_seed(0))?;
    stays(context, &region)?;
    process::fork(context, |context| {
        context.migrate(region.all(), Direction::ToDevice)?;
        context.check(&region, 0..PAGES, |_| 1)?;
        region.fill_all(2);
        Ok(())
    })?
    .wait()?;
    context.check(&region, 0..PAGES, |_| 2)
}

/// A file mapped as shared.
pub(super) fn shared_file(context: &Context) -> Result<(), Failure> {
    let file = memory_file(PAGES)?;
    let seed = context.region_seed(0);
    let region = Region::of_kind(PAGES, libc::MAP_SHARED, Some(file.as_fd()), seed)?;
    stays(context, &region)?;
    let mut bytes = vec![0; PAGES * PAGE_SIZE];
    file.read_exact_at(&mut bytes, 0)
        .map_err(|source| Failure::System {
            call: "reading a memfd",
            source,
        })?;
    let written = (0..PAGES).flat_map(|page| region.pattern(page, 1).bytes());
    require!(
        bytes.into_iter().eq(written),
        "the file does not hold what was written to its mapping"
    );
    Ok(())
}

/// A System V shared memory segment.
pub(super) fn sysv(context: &Context) -> Result<(), Failure> {
    // SAFETY: the calls have plain arguments; the segment goes away with its last user.
    let address = unsafe {
        let id = libc::shmget(libc::IPC_PRIVATE, PAGES * PAGE_SIZE, 0o600);
        if id < 0 {
            return Err(without("System V shared memory", "shmget"));
        }
        let address = libc::shmat(id, ptr::null(), 0);
        libc::shmctl(id, libc::IPC_RMID, ptr::null_mut());
        address
    };
    if address as isize == -1 {
        return Err(Failure::system("shmat"));
    }
    // SAFETY: the attachment is new and nobody else knows of it. munmap detaches.
    let region = unsafe { Region::adopt(address as usize, PAGES, context.region_seed(0)) };
    stays(context, &region)
}

/// Skip where the kernel lacks a call, and fail for other reasons.
fn without(what: &str, call: &'static str) -> Failure {
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EOPNOTSUPP) => Failure::Skip(format!("there is no {what}")),
        _ => Failure::System {
            call,
            source: error,
        },
    }
}

/// Pages of the hugetlb pool.
pub(super) fn hugetlb(context: &Context) -> Result<(), Failure> {
    let pool = || -> Option<usize> { fs::read_to_string(HUGE_POOL).ok()?.trim().parse().ok() };
    let Some(before) = pool() else {
        return Err(Failure::Skip("there is no hugetlb".into()));
    };
    let resize = |pages: usize| {
        fs::write(HUGE_POOL, pages.to_string()).map_err(|source| Failure::System {
            call: "changing the number of huge pages",
            source,
        })
    };
    resize(before + HUGE_PAGES)?;
    let result = if pool() == Some(before + HUGE_PAGES) {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
        let pages = HUGE_PAGES * PMD_PAGES;
        Region::of_kind(pages, flags, None, context.region_seed(0))
            .and_then(|region| stays(context, &region))
    } else {
        Err(Failure::Skip(format!(
            "the kernel has no memory for {HUGE_PAGES} huge pages"
        )))
    };
    resize(before)?;
    result
}

/// Memory that the kernel itself cannot see.
pub(super) fn secret(context: &Context) -> Result<(), Failure> {
    // SAFETY: memfd_secret takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(without("secret memory", "memfd_secret"));
    }
    let file = File::from(descriptor("memfd_secret", fd)?);
    file.set_len((PAGES * PAGE_SIZE) as u64)
        .map_err(|source| Failure::System {
            call: "ftruncate",
            source,
        })?;
    let seed = context.region_seed(0);
    let region = Region::of_kind(PAGES, libc::MAP_SHARED, Some(file.as_fd()), seed)?;
    stays(context, &region)
}

/// What the kernel maps into every process.
pub(super) fn special(context: &Context) -> Result<(), Failure> {
    let all = mappings()?;
    let of_the_kernel = ["[vdso]", "[vvar]", "[vvar_vclock]"];
    let mut found = 0;
    for mapping in &all {
        let pages = (mapping.range.len() / PAGE_SIZE) as u64;
        if of_the_kernel.contains(&&*mapping.name) {
            found += 1;
            context.device.query(mapping.range.clone())?;
            let outcome = context.migrate(mapping.range.clone(), Direction::ToDevice)?;
            require!(
                outcome.skipped(Skip::Unsupported) == pages,
                "{}: {outcome:?}",
                mapping.name
            );
        } else if mapping.name == "[vsyscall]" {
            // It is not in the part of the address space that a process has.
            let migrated = context
                .device
                .migrate(mapping.range.clone(), Direction::ToDevice);
            require!(
                migrated
                    .as_ref()
                    .is_err_and(|error| matches!(error.source, Error::Invalid)),
                "[vsyscall]: {migrated:?}"
            );
        }
    }
    if found == 0 {
        return Err(Failure::Skip("the kernel maps no vDSO".into()));
    }
    // The clock is read through the vDSO.
    let _ = Instant::now();
    Ok(())
}
