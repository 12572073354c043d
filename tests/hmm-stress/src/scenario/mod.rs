//! The stress scenarios.

mod devices;
mod exit_with_pages;
mod failing_allocations;
mod fault_storm;
mod fork_cow;
mod huge_pages;
mod ioctl_errors;
mod large_folios;
mod oversubscribed;
mod partial_changes;
mod ping_pong;
mod processes;
mod random_access;
mod release;
mod signals;
mod sparse;
mod swapped;

pub(crate) use huge_pages::available as transparent_huge_pages;

use crate::context::Context;
use crate::failure::Failure;

/// A scenario.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it shows.
    pub about: &'static str,
    /// Its share of the time of a run, beside those of the others.
    pub weight: u32,
    /// Run it for the context's duration.
    pub run: fn(&Context) -> Result<(), Failure>,
}

/// All of them, in the order in which they run.
pub const ALL: &[Scenario] = &[
    Scenario {
        name: "ping-pong",
        about: "bulk migration to the device and back, with the bandwidth of each way",
        weight: 3,
        run: ping_pong::run,
    },
    Scenario {
        name: "random-access",
        about: "threads read and write while the pages migrate both ways",
        weight: 1,
        run: random_access::run,
    },
    Scenario {
        name: "fault-storm",
        about: "CPU faults of several threads on the same, different and interleaved pages",
        weight: 1,
        run: fault_storm::run,
    },
    Scenario {
        name: "fork-cow",
        about: "parents, children and grandchildren share device pages and write to them",
        weight: 1,
        run: fork_cow::run,
    },
    Scenario {
        name: "sparse",
        about: "holes, zero pages, read-only and inaccessible pages, mixed",
        weight: 1,
        run: sparse::run,
    },
    Scenario {
        name: "partial-changes",
        about: "munmap, mprotect, madvise and mremap of parts of device memory",
        weight: 1,
        run: partial_changes::run,
    },
    Scenario {
        name: "exit-with-pages",
        about: "processes end, also by SIGKILL, with pages on the device",
        weight: 1,
        run: exit_with_pages::run,
    },
    Scenario {
        name: "processes",
        about: "several processes use the device at once",
        weight: 1,
        run: processes::run,
    },
    Scenario {
        name: "huge-pages",
        about: "ranges of huge pages, whole and in part",
        weight: 1,
        run: huge_pages::run,
    },
    Scenario {
        name: "large-folios",
        about: "huge pages travel as one, are split on the device, and go small where they must",
        weight: 1,
        run: large_folios::run,
    },
    Scenario {
        name: "oversubscribed",
        about: "a working set of eight times the room on the device, and a neighbour it spares",
        weight: 1,
        run: oversubscribed::run,
    },
    Scenario {
        name: "signals",
        about: "signals interrupt long migrations, which tell how far they came",
        weight: 1,
        run: signals::run,
    },
    Scenario {
        name: "swapped",
        about: "pages in swap stay there until they are touched (needs swap)",
        weight: 0,
        run: swapped::run,
    },
    Scenario {
        name: "devices",
        about: "pages move between two devices (needs a second one)",
        weight: 1,
        run: devices::run,
    },
    Scenario {
        name: "failing-allocations",
        about: "the kernel's allocations fail, one after another (needs fault injection)",
        weight: 0,
        run: failing_allocations::run,
    },
    Scenario {
        name: "release",
        about: "pages go home by request, a range or all of them; a limit for a file",
        weight: 0,
        run: release::run,
    },
    Scenario {
        name: "ioctl-errors",
        about: "calls with bad arguments fail as documented and change nothing",
        weight: 0,
        run: ioctl_errors::run,
    },
];

/// The names of all scenarios.
pub const NAMES: [&str; ALL.len()] = {
    let mut names = [""; ALL.len()];
    let mut index = 0;
    while index < ALL.len() {
        names[index] = ALL[index].name;
        index += 1;
    }
    names
};
