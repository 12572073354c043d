//! Kernel memory that cannot be had.
//!
//! Shows that whichever allocation of a call fails, the call works nevertheless or says
//! that there is no memory, and that every byte stays right. The kernel makes them fail,
//! if it was built to (`fault-injection/fault-injection` in its documentation): here the
//! n-th of the calling thread, for each n.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::Instant;

use virtio_hmm_client::{Device, Direction, Error, PAGE_SIZE};

use crate::context::Context;
use crate::failure::Failure;
use crate::region::{PMD_PAGES, PageSize, Region};
use crate::require;

/// What may fail, and the settings with which all of it does.
const SETTINGS: [(&str, &[(&str, &str)]); 2] = [
    ("failslab", &[("ignore-gfp-wait", "N"), ("verbose", "0")]),
    (
        "fail_page_alloc",
        &[
            ("ignore-gfp-wait", "N"),
            ("ignore-gfp-highmem", "N"),
            ("min-order", "0"),
            ("verbose", "0"),
        ],
    ),
];

/// No call makes so many allocations.
const MOST: u32 = 100_000;

/// Calls of a thread with failures at random, at least.
const ROUNDS: u32 = 200;

/// Pages of the region whose allocations fail one by one.
const PAGES: usize = 24;

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let debugfs = Path::new("/sys/kernel/debug");
    for (name, settings) in SETTINGS {
        let directory = debugfs.join(name);
        if !directory.exists() {
            let reason = "this kernel cannot make its allocations fail";
            return Err(Failure::Skip(reason.into()));
        }
        for (file, value) in settings {
            fs::write(directory.join(file), value).map_err(system)?;
        }
    }
    one_by_one(context, PageSize::Small, PAGES)?;
    one_by_one(context, PageSize::Huge, PMD_PAGES)?;
    at_random(context)
}

fn system(source: io::Error) -> Failure {
    Failure::System {
        call: "making allocations fail",
        source,
    }
}

/// Makes allocations of this thread fail.
struct Injection(File);

impl Injection {
    fn new() -> Result<Self, Failure> {
        File::options()
            .read(true)
            .write(true)
            .open("/proc/thread-self/fail-nth")
            .map(Self)
            .map_err(system)
    }

    /// Let the `nth` allocation of `call` fail. Returns whether there was one.
    fn fail<T>(&self, nth: u32, call: impl FnOnce() -> T) -> Result<(T, bool), Failure> {
        self.0
            .write_all_at(nth.to_string().as_bytes(), 0)
            .map_err(system)?;
        let result = call();
        // What is left of the count; nothing is allocated to read it.
        let mut left = [0; 12];
        let length = self.0.read_at(&mut left, 0).map_err(system)?;
        self.0.write_all_at(b"0", 0).map_err(system)?;
        let left = left.get(..length).unwrap_or_default();
        Ok((result, left.trim_ascii() == b"0"))
    }
}

/// A call, and where the pages are before it.
struct Call {
    name: &'static str,
    begins_on: Direction,
    call: fn(&Context, &Region) -> Result<(), Error>,
}

const CALLS: [Call; 5] = [
    Call {
        name: "migration to the device",
        begins_on: Direction::ToSystem,
        call: |context, region| migrate(context, region, Direction::ToDevice),
    },
    Call {
        name: "migration to RAM",
        begins_on: Direction::ToDevice,
        call: |context, region| migrate(context, region, Direction::ToSystem),
    },
    Call {
        name: "release",
        begins_on: Direction::ToDevice,
        call: |context, region| match context.device.release(region.all()) {
            // Those that found no memory stay, and can be released later.
            Err(error) if matches!(error.source, Error::Busy) => Ok(()),
            result => result.map(drop).map_err(|error| error.source),
        },
    },
    Call {
        name: "CPU fault",
        begins_on: Direction::ToDevice,
        call: |_, region| {
            (0..region.pages()).for_each(|page| region.touch(page));
            Ok(())
        },
    },
    Call {
        name: "open",
        begins_on: Direction::ToDevice,
        // It has an error of its own.
        call: |context, _| {
            Device::open(context.path())
                .map(drop)
                .or(Err(Error::NoMemory))
        },
    },
];

fn migrate(context: &Context, region: &Region, direction: Direction) -> Result<(), Error> {
    let result = context.device.migrate_all(region.all(), direction);
    result.map(drop).map_err(|error| error.source)
}

/// For each call, let its first allocation fail, then its second, until it makes no more.
fn one_by_one(context: &Context, size: PageSize, pages: usize) -> Result<(), Failure> {
    let injection = Injection::new()?;
    for (
        number,
        Call {
            name,
            begins_on,
            call,
        },
    ) in (0..).zip(&CALLS)
    {
        let region = Region::new(pages, size, context.region_seed(number))?;
        let mut generation = 0;
        let mut nth = 1;
        loop {
            generation += 1;
            region.fill_all(generation);
            context.settle(region.all(), *begins_on, 0)?;
            let (result, failed) = injection.fail(nth, || call(context, &region))?;
            match result {
                Ok(()) => {}
                Err(Error::NoMemory) if failed => {}
                Err(error) => {
                    return Err(Failure::Broken(format!(
                        "{name}, whose allocation {nth} failed: {error}"
                    )));
                }
            }
            context.check(&region, 0..pages, |_| generation)?;
            if !failed {
                break;
            }
            require!(nth < MOST, "a {name} goes on for {nth} allocations");
            // The later ones are much alike: one for each page.
            nth += 1 + nth / 16;
        }
        require!(nth > 1, "no allocation of a {name} fails");
    }
    Ok(())
}

/// Threads whose working sets do not fit together, so that pages are evicted as well.
fn at_random(context: &Context) -> Result<(), Failure> {
    let context = &context.reopen()?;
    let limit = (PMD_PAGES * PAGE_SIZE * context.threads) as u64;
    context.device.set_limit(Some(limit))?;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..context.threads as u64)
            .map(|number| scope.spawn(move || one_thread(context, number)))
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
    })
}

fn one_thread(context: &Context, number: u64) -> Result<(), Failure> {
    let injection = Injection::new()?;
    let mut random = context.random(number);
    let region = context.region(2 * PMD_PAGES, number)?;
    let pages = region.pages();
    let mut generations = vec![1; pages];
    region.fill_all(1);
    let end = context.end();
    let mut rounds = 0;
    while rounds < ROUNDS || Instant::now() < end {
        rounds += 1;
        let first = random.usize(0..pages);
        let some = first..pages.min(first + random.usize(1..=PMD_PAGES));
        let direction = random.choice([Direction::ToDevice, Direction::ToSystem]);
        let direction = direction.unwrap_or(Direction::ToDevice);
        let range = region.range(some.clone());
        let nth = random.u32(1..64);
        let (result, failed) = injection.fail(nth, || context.migrate(range, direction))?;
        match result {
            Err(Failure::Migrate(error)) if failed && matches!(error.source, Error::NoMemory) => {}
            result => drop(result?),
        }
        let page = random.usize(some);
        let (result, _) = injection.fail(random.u32(1..8), || {
            context.check(&region, page..page + 1, |page| generations[page])
        })?;
        result?;
        generations[page] += 1;
        region.fill(page, generations[page]);
    }
    context.check(&region, 0..pages, |page| generations[page])
}
