//! Calls with bad arguments.
//!
//! Shows that each fails with the documented errno, that what can be done is done,
//! and that memory of other kinds is left alone.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_hmm_client::{Device, Direction, Error, MigrateError, PAGE_SIZE, Residency, Skip, abi};

use crate::context::Context;
use crate::failure::Failure;
use crate::pattern::WORDS;
use crate::process;
use crate::require;

/// First address of the kernel's half of the address space.
const KERNEL: u64 = 0xffff_8000_0000_0000;

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    bad_arguments(context)?;
    bad_pointers(context)?;
    unmapped(context)?;
    argument_in_the_range(context)?;
    inherited(context)?;
    other_memory(context)
}

/// Make call `request` with `argument` as it is, and return its errno, 0 for success.
fn call(device: &Device, request: libc::Ioctl, argument: u64) -> i32 {
    // SAFETY: a bad address makes the call fail and is never used by this process; a
    // good one is a structure of the request's kind that lives for the call. Pages of
    // a range only move.
    let result = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), request, argument) };
    match result {
        0 => 0,
        _ => io::Error::last_os_error().raw_os_error().unwrap_or(0),
    }
}

fn migrate(device: &Device, mut argument: abi::Migrate) -> (i32, abi::Migrate) {
    let errno = call(device, abi::IOCTL_MIGRATE, (&raw mut argument) as u64);
    (errno, argument)
}

fn bad_arguments(context: &Context) -> Result<(), Failure> {
    let region = context.region(4, 0)?;
    region.fill_all(1);
    let good = abi::Migrate {
        start: region.all().start as u64,
        length: region.all().len() as u64,
        ..abi::Migrate::default()
    };
    let page = PAGE_SIZE as u64;
    let bad = [
        (
            "unaligned start",
            abi::Migrate {
                start: good.start + 1,
                ..good
            },
        ),
        (
            "unaligned length",
            abi::Migrate {
                length: good.length - 1,
                ..good
            },
        ),
        ("no length", abi::Migrate { length: 0, ..good }),
        (
            "overflow",
            abi::Migrate {
                start: u64::MAX - page + 1,
                length: 2 * page,
                ..good
            },
        ),
        (
            "endless range",
            abi::Migrate {
                length: u64::MAX - page + 1,
                ..good
            },
        ),
        (
            "unknown direction",
            abi::Migrate {
                direction: 2,
                ..good
            },
        ),
        (
            "huge direction",
            abi::Migrate {
                direction: u32::MAX,
                ..good
            },
        ),
        ("flags", abi::Migrate { flags: 2, ..good }),
    ];
    for (what, argument) in bad {
        let (errno, _) = migrate(&context.device, argument);
        require!(errno == libc::EINVAL, "{what}: errno {errno}");
    }
    bad_releases(context, &good)?;
    bad_limits(context)?;
    let (errno, outcome) = migrate(
        &context.device,
        abi::Migrate {
            start: KERNEL,
            length: page,
            ..good
        },
    );
    require!(
        errno == libc::EINVAL || errno == libc::EFAULT,
        "kernel address: errno {errno}"
    );
    require!(outcome.moved == 0, "kernel memory moved");

    let mut residency = [0u8; 4];
    let good = abi::Query {
        start: good.start,
        length: good.length,
        residency: residency.as_mut_ptr() as u64,
        flags: 0,
    };
    let bad = [
        (
            "unaligned start",
            abi::Query {
                start: good.start + 1,
                ..good
            },
        ),
        (
            "unaligned length",
            abi::Query {
                length: good.length - 1,
                ..good
            },
        ),
        ("no length", abi::Query { length: 0, ..good }),
        (
            "overflow",
            abi::Query {
                start: u64::MAX - page + 1,
                length: 2 * page,
                ..good
            },
        ),
        ("flags", abi::Query { flags: 1, ..good }),
    ];
    for (what, mut argument) in bad {
        let errno = call(
            &context.device,
            abi::IOCTL_QUERY,
            (&raw mut argument) as u64,
        );
        require!(errno == libc::EINVAL, "query, {what}: errno {errno}");
    }
    // Nothing of all this moved a page.
    context.expect(&region, 0..4, |_| Residency::Ram)?;
    context.check(&region, 0..4, |_| 1)
}

fn bad_releases(context: &Context, range: &abi::Migrate) -> Result<(), Failure> {
    let good = abi::Release {
        start: range.start,
        length: range.length,
        ..abi::Release::default()
    };
    let all = abi::RELEASE_ALL;
    let bad = [
        (
            "start",
            abi::Release {
                start: good.start + 1,
                ..good
            },
        ),
        ("length", abi::Release { length: 1, ..good }),
        ("no length", abi::Release { length: 0, ..good }),
        (
            "overflow",
            abi::Release {
                length: u64::MAX - 4095,
                ..good
            },
        ),
        ("flags", abi::Release { flags: 2, ..good }),
        (
            "reserved",
            abi::Release {
                reserved: 1,
                ..good
            },
        ),
        ("all of a range", abi::Release { flags: all, ..good }),
        (
            "all from a start",
            abi::Release {
                flags: all,
                length: 0,
                ..good
            },
        ),
    ];
    for (what, mut argument) in bad {
        let errno = call(
            &context.device,
            abi::IOCTL_RELEASE,
            (&raw mut argument) as u64,
        );
        require!(errno == libc::EINVAL, "release, {what}: errno {errno}");
    }
    for argument in [0, 1, KERNEL] {
        let errno = call(&context.device, abi::IOCTL_RELEASE, argument);
        require!(
            errno == libc::EFAULT,
            "release at {argument:#x}: errno {errno}"
        );
    }
    Ok(())
}

fn bad_limits(context: &Context) -> Result<(), Failure> {
    let set = abi::Limit {
        flags: abi::LIMIT_SET,
        ..abi::Limit::default()
    };
    let bad = [
        ("bytes", abi::Limit { bytes: 4095, ..set }),
        ("flags", abi::Limit { flags: 2, ..set }),
        ("reserved", abi::Limit { reserved: 1, ..set }),
    ];
    for (what, mut argument) in bad {
        let errno = call(
            &context.device,
            abi::IOCTL_LIMIT,
            (&raw mut argument) as u64,
        );
        require!(errno == libc::EINVAL, "limit, {what}: errno {errno}");
    }
    for argument in [0, 1, KERNEL] {
        let errno = call(&context.device, abi::IOCTL_LIMIT, argument);
        require!(
            errno == libc::EFAULT,
            "limit at {argument:#x}: errno {errno}"
        );
    }
    require!(
        context.device.limit()?.bytes.is_none(),
        "a bad call set the limit"
    );
    Ok(())
}

fn bad_pointers(context: &Context) -> Result<(), Failure> {
    for request in [abi::IOCTL_INFO, abi::IOCTL_MIGRATE, abi::IOCTL_QUERY] {
        for address in [0, 8, KERNEL, u64::MAX - 7] {
            let errno = call(&context.device, request, address);
            require!(
                errno == libc::EFAULT,
                "call {request:#x} with {address:#x}: errno {errno}"
            );
        }
    }
    let unknown = libc::_IO(0xB7, 0x7f);
    let errno = call(&context.device, unknown, 0);
    require!(errno == libc::ENOTTY, "unknown call: errno {errno}");

    let region = context.region(2, 1)?;
    for residency in [0, KERNEL] {
        let mut argument = abi::Query {
            start: region.all().start as u64,
            length: region.all().len() as u64,
            residency,
            flags: 0,
        };
        let errno = call(
            &context.device,
            abi::IOCTL_QUERY,
            (&raw mut argument) as u64,
        );
        require!(
            errno == libc::EFAULT,
            "array at {residency:#x}: errno {errno}"
        );
    }
    Ok(())
}

/// A range with a gap: the mapped rest is migrated.
fn unmapped(context: &Context) -> Result<(), Failure> {
    let region = context.region(1200, 2)?;
    region.fill_all(1);
    let range = region.all();
    let (left, rest) = region.split_at(100);
    let (gap, right) = rest.split_at(600);
    drop(gap);
    let Err(Failure::Migrate(error)) = context.migrate(range.clone(), Direction::ToDevice) else {
        return Err(Failure::Broken(
            "a range with a gap migrated without error".into(),
        ));
    };
    let MigrateError { outcome, source } = *error;
    require!(matches!(source, Error::Unmapped), "a gap gave {source}");
    require!(
        outcome.done == range.len() as u64 && outcome.skipped(Skip::Unmapped) == 600,
        "a gap of 600 pages gave {outcome:?}"
    );
    let residency = context.device.query(range)?;
    require!(
        residency[100..700]
            .iter()
            .all(|&page| page == Residency::None),
        "pages of a gap are somewhere"
    );
    for part in [left, right] {
        context.settle(part.all(), Direction::ToDevice, 0)?;
        context.expect(&part, 0..part.pages(), |_| Residency::Device)?;
        context.check(&part, 0..part.pages(), |_| 1)?;
    }
    Ok(())
}

/// The argument, and the array of a query, lie in the range that they are about.
fn argument_in_the_range(context: &Context) -> Result<(), Failure> {
    let region = context.region(8, 3)?;
    region.fill_all(1);
    let argument = abi::Migrate {
        start: region.all().start as u64,
        length: region.all().len() as u64,
        ..abi::Migrate::default()
    };
    let place = region.range(3..4).start as *mut abi::Migrate;
    // SAFETY: the page is mapped, writable, aligned, and only this thread uses it.
    unsafe { place.write_volatile(argument) };
    let errno = call(&context.device, abi::IOCTL_MIGRATE, place as u64);
    // SAFETY: as above.
    let outcome = unsafe { place.read_volatile() };
    let pages = outcome.moved + outcome.filled + outcome.skipped.iter().sum::<u64>();
    require!(
        errno == 0 && pages == 8,
        "an argument in its own range: errno {errno}, {outcome:?}"
    );
    region.fill(3, 1);

    context.migrate(region.all(), Direction::ToDevice)?;
    let mut query = abi::Query {
        start: region.all().start as u64,
        length: region.all().len() as u64,
        residency: region.range(5..6).start as u64,
        flags: 0,
    };
    let errno = call(&context.device, abi::IOCTL_QUERY, (&raw mut query) as u64);
    require!(errno == 0, "an array in its own range: errno {errno}");
    let answer = region.words(5)[0].load(Ordering::Relaxed).to_le_bytes();
    require!(
        answer[0] == Residency::Device as u8,
        "an array in its own range says {answer:?}"
    );
    region.fill(5, 1);
    context.check(&region, 0..8, |_| 1)
}

/// A child may not use the file of its parent.
fn inherited(context: &Context) -> Result<(), Failure> {
    let region = context.region(4, 4)?;
    region.fill_all(1);
    let parents = &context.device;
    process::fork(context, |context| {
        let migrated = parents.migrate(region.all(), Direction::ToDevice);
        require!(
            matches!(
                migrated,
                Err(MigrateError {
                    source: Error::OtherAddressSpace,
                    ..
                })
            ),
            "migration with an inherited file: {migrated:?}"
        );
        let queried = parents.query(region.all());
        require!(
            matches!(queried, Err(Error::OtherAddressSpace)),
            "query with an inherited file: {queried:?}"
        );
        context.check(&region, 0..4, |_| 1)
    })?
    .wait()?;
    context.expect(&region, 0..4, |_| Residency::Ram)
}

/// Memory that is not private and anonymous is skipped, and keeps its contents.
fn other_memory(context: &Context) -> Result<(), Failure> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"hmm-stress".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(Failure::system("memfd_create"));
    }
    // SAFETY: the descriptor is new and belongs to nobody else.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(&[0; Mapping::BYTES])
        .map_err(|source| Failure::System {
            call: "writing a memfd",
            source,
        })?;
    let kinds = [
        ("shared memory", libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1),
        ("shared file", libc::MAP_SHARED, fd),
        ("private file", libc::MAP_PRIVATE, fd),
    ];
    for (what, flags, fd) in kinds {
        let mapping = Mapping::new(flags, fd)?;
        let word = |page: usize| &mapping.words()[page * WORDS];
        // Written, read, and two that are not touched.
        word(0).store(7, Ordering::Relaxed);
        word(1).load(Ordering::Relaxed);
        let outcome = context.migrate(mapping.range(), Direction::ToDevice)?;
        // A page written in a private mapping is no page of the file any more.
        let may_move = u64::from(flags == libc::MAP_PRIVATE);
        require!(
            outcome.moved <= may_move && outcome.moved + outcome.skipped(Skip::Unsupported) == 4,
            "{what}: {outcome:?}"
        );
        for page in 0..4 {
            let seen = word(page).load(Ordering::Relaxed);
            let expected = if page == 0 { 7 } else { 0 };
            require!(seen == expected, "{what}: page {page} begins with {seen}");
        }
        word(0).store(0, Ordering::Relaxed);
    }
    Ok(())
}

/// Four pages of some kind of memory, unmapped when dropped.
struct Mapping {
    memory: *mut libc::c_void,
}

impl Mapping {
    const BYTES: usize = 4 * PAGE_SIZE;

    fn new(flags: libc::c_int, fd: libc::c_int) -> Result<Self, Failure> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing.
        let memory = unsafe { libc::mmap(ptr::null_mut(), Self::BYTES, protection, flags, fd, 0) };
        if memory == libc::MAP_FAILED {
            return Err(Failure::system("mmap"));
        }
        Ok(Self { memory })
    }

    fn words(&self) -> &[AtomicU64; 4 * WORDS] {
        // SAFETY: the mapping is that long, aligned, lives as long as `self`, and every
        // bit pattern is valid.
        unsafe { &*self.memory.cast() }
    }

    fn range(&self) -> Range<usize> {
        self.memory as usize..self.memory as usize + Self::BYTES
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and no borrow of it is left.
        unsafe { libc::munmap(self.memory, Self::BYTES) };
    }
}
