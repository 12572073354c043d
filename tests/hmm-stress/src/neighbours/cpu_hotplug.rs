//! CPUs go offline and come back during faults and migrations.
//!
//! A request waits on the queue of the CPU that made it, and goes on when that CPU is gone.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use virtio_hmm_client::Direction;

use super::meanwhile::meanwhile;
use crate::context::Context;
use crate::failure::Failure;
use crate::region::Region;
use crate::require;

const PAGES: usize = 512;

/// How often a CPU goes and comes back.
const ROUNDS: usize = 6;

/// A CPU that can go offline. It is online again when this is dropped.
struct Cpu {
    online: PathBuf,
}

impl Cpu {
    /// All that can go offline.
    fn all() -> Vec<Self> {
        let entries = fs::read_dir("/sys/devices/system/cpu")
            .into_iter()
            .flatten();
        entries
            .flatten()
            .map(|entry| entry.path().join("online"))
            // The first CPU often has no such file, and the list of CPUs is none of them.
            .filter(|path| path.exists())
            .map(|online| Self { online })
            .collect()
    }

    fn set(&self, online: bool) -> Result<(), Failure> {
        let value = if online { "1" } else { "0" };
        fs::write(&self.online, value).map_err(|source| Failure::System {
            call: "changing the state of a CPU",
            source,
        })
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        // Nobody is left to tell of a failure.
        let _ = self.set(true);
    }
}

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let mut cpus = Cpu::all();
    if thread::available_parallelism().is_ok_and(|count| cpus.len() >= count.get()) {
        // One has to stay.
        cpus.remove(0);
    }
    if cpus.is_empty() {
        return Err(Failure::Skip("no CPU can go offline".into()));
    }
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    let done = AtomicBool::new(false);
    meanwhile(context, &[&region], &[Direction::ToDevice], || {
        thread::scope(|scope| {
            let readers: Vec<_> = (0..context.threads.max(2) as u64)
                .map(|number| {
                    let (region, done) = (&region, &done);
                    scope.spawn(move || read(context, region, done, number))
                })
                .collect();
            let changed = (0..ROUNDS).try_for_each(|_| {
                cpus.iter().try_for_each(|cpu| cpu.set(false))?;
                thread::sleep(std::time::Duration::from_millis(50));
                cpus.iter().try_for_each(|cpu| cpu.set(true))
            });
            done.store(true, Ordering::Relaxed);
            for reader in readers {
                reader
                    .join()
                    .map_err(|_| Failure::Broken("a thread panicked".into()))??;
            }
            changed
        })
    })?;
    context.check(&region, 0..PAGES, |_| 1)
}

/// Check random pages, which brings them home, until told to end.
fn read(context: &Context, region: &Region, done: &AtomicBool, number: u64) -> Result<(), Failure> {
    let mut random = context.random(number);
    let mut checked = 0;
    while !done.load(Ordering::Relaxed) {
        let page = random.usize(0..PAGES);
        context.check(region, page..page + 1, |_| 1)?;
        checked += 1;
    }
    require!(checked > 0, "a thread got nowhere");
    Ok(())
}
