//! NUMA balancing: the kernel makes pages inaccessible now and then, to learn from the
//! fault which node uses them, and moves them there. Pages migrate in that state too.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use virtio_hmm_client::{Direction, Residency};

use super::meanwhile::meanwhile;
use super::numa::nodes;
use super::tunable::Tunable;
use crate::context::Context;
use crate::failure::Failure;
use crate::region::Region;
use crate::require;

const PAGES: usize = 1024;

/// How long it goes on at least, and at most until the kernel has looked at pages.
const TIME: Duration = Duration::from_secs(4);
const PATIENCE: Duration = Duration::from_secs(60);

const SWITCH: &str = "/proc/sys/kernel/numa_balancing";
const SETTINGS: &str = "/sys/kernel/debug/sched/numa_balancing";

/// A number of /proc/vmstat.
fn event(name: &str) -> Result<u64, Failure> {
    fs::read_to_string("/proc/vmstat")
        .ok()
        .and_then(|text| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        })
        .ok_or_else(|| Failure::Broken(format!("/proc/vmstat has no {name}")))
}

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    if !Path::new(SWITCH).exists() {
        return Err(Failure::Skip("the kernel has no NUMA balancing".into()));
    }
    nodes()?;
    let _settings = [
        Tunable::set(SWITCH, "1")?,
        Tunable::set(format!("{SETTINGS}/scan_delay_ms"), "1")?,
        Tunable::set(format!("{SETTINGS}/scan_period_min_ms"), "1")?,
        Tunable::set(format!("{SETTINGS}/scan_period_max_ms"), "20")?,
    ];
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    let both = [Direction::ToDevice, Direction::ToSystem];
    meanwhile(context, &[&region], &both, || {
        thread::scope(|scope| {
            let readers: Vec<_> = (0..context.threads.max(2) as u64)
                .map(|number| {
                    let region = &region;
                    scope.spawn(move || read(context, region, number))
                })
                .collect();
            readers.into_iter().try_for_each(|reader| {
                reader
                    .join()
                    .map_err(|_| Failure::Broken("a thread panicked".into()))?
            })
        })
    })?;
    // Nothing of the device pages is RAM to balance.
    context.settle(region.all(), Direction::ToDevice, 0)?;
    context.expect(&region, 0..PAGES, |_| Residency::Device)?;
    context.check(&region, 0..PAGES, |_| 1)
}

/// Check random pages until the time is over and pages were made inaccessible and touched.
fn read(context: &Context, region: &Region, number: u64) -> Result<(), Failure> {
    let mut random = context.random(number);
    let before = (event("numa_pte_updates")?, event("numa_hint_faults")?);
    let start = Instant::now();
    loop {
        for _ in 0..200 {
            let page = random.usize(0..PAGES);
            context.check(region, page..page + 1, |_| 1)?;
        }
        let seen = event("numa_pte_updates")? > before.0 && event("numa_hint_faults")? > before.1;
        if seen && start.elapsed() > TIME {
            return Ok(());
        }
        require!(
            start.elapsed() < PATIENCE,
            "NUMA balancing did nothing in {PATIENCE:?}"
        );
    }
}
