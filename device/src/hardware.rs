//! What the processor counts while a worker runs, as far as the host allows it.
//!
//! A worker opens its counters for itself, once, and never looks at them again;
//! those who ask read them. In a process with a filter of system calls, to open
//! takes `perf_event_open` for the calling thread and the ioctl
//! `PERF_EVENT_IOC_ID`, to read takes `read`.

use std::{
    collections::BTreeMap,
    io,
    sync::{Mutex, PoisonError},
};

use nix::errno::Errno;
use perf_event::{
    Builder, Counter,
    events::{Cache, CacheId, CacheOp, CacheResult, Hardware},
};
use tracing::warn;

/// The names of what can be counted: in user mode, by one thread.
pub const NAMES: [&str; 4] = ["cycles", "instructions", "llc_misses", "dtlb_misses"];

const DTLB_MISSES: Cache = Cache {
    which: CacheId::DTLB,
    operation: CacheOp::READ,
    result: CacheResult::MISS,
};

type Event = (&'static str, fn() -> Builder<'static>);

/// What a worker counts.
#[derive(Clone, Debug, Default)]
pub struct Events(Vec<Event>);

impl Events {
    /// All that can be counted.
    pub fn all() -> Self {
        let [cycles, instructions, llc_misses, dtlb_misses] = NAMES;
        Self(vec![
            (cycles, || Builder::new(Hardware::CPU_CYCLES)),
            (instructions, || Builder::new(Hardware::INSTRUCTIONS)),
            (llc_misses, || Builder::new(Hardware::CACHE_MISSES)),
            (dtlb_misses, || Builder::new(DTLB_MISSES)),
        ])
    }

    /// Those of them that the host lets this thread count, and why not the
    /// others, if there are any.
    pub fn available(self) -> (Self, Option<String>) {
        let mut missing: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        let mut available = self.0;
        available.retain(|event| match open(event) {
            Ok(_) => true,
            Err(e) => {
                missing.entry(reason(&e)).or_default().push(event.0);
                false
            }
        });
        let reasons = missing
            .into_iter()
            .map(|(reason, names)| format!("no counters of {}: {reason}", names.join(", ")));
        let reasons: Vec<_> = reasons.collect();
        let reasons = (!reasons.is_empty()).then(|| reasons.join("; "));
        (Self(available), reasons)
    }

    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().map(|(name, _)| *name)
    }

    /// Begins to count what this thread does.
    pub fn open(&self) -> Counts {
        let opened = self.0.iter().filter_map(|event| match open(event) {
            Ok(counter) => Some((event.0, Mutex::new((counter, 0)))),
            Err(e) => {
                warn!("a worker cannot count {}: {e}", event.0);
                None
            }
        });
        Counts(opened.collect())
    }
}

fn open(&(_, event): &Event) -> io::Result<Counter> {
    event().enabled(true).build()
}

fn reason(error: &io::Error) -> String {
    let why = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EACCES | Errno::EPERM) => {
            "the kernel does not allow it, see kernel.perf_event_paranoid"
        }
        Some(Errno::ENOENT | Errno::ENODEV | Errno::EOPNOTSUPP) => {
            "this processor, or the hypervisor below this machine, has none"
        }
        Some(Errno::ENOSYS) => "the kernel has no perf events",
        _ => return error.to_string(),
    };
    format!("{why} ({error})")
}

/// What is counted of one thread, also when it has ended.
#[derive(Debug, Default)]
pub struct Counts(Vec<(&'static str, Mutex<Known>)>);

/// A counter, and what it was last read as.
type Known = (Counter, u64);

impl Counts {
    /// What was counted by now, by name. Left out is what cannot be told: what
    /// the host stopped to count, or had no free counter for.
    pub fn read(&self) -> BTreeMap<&'static str, u64> {
        let counts = self.0.iter().filter_map(|(name, counter)| {
            let mut counter = counter.lock().unwrap_or_else(PoisonError::into_inner);
            let (counter, last) = &mut *counter;
            let count = counter.read_count_and_time().ok()?;
            let count = estimate(count.count, count.time_enabled, count.time_running)?;
            // An estimate can shrink, which a counter must not.
            *last = count.max(*last);
            Some((*name, *last))
        });
        counts.collect()
    }
}

/// The count for the whole time, when counters were shared and this one ran for
/// a part of it only.
fn estimate(count: u64, enabled: u64, running: u64) -> Option<u64> {
    if enabled == 0 {
        return Some(count);
    }
    let whole = u128::from(count) * u128::from(enabled);
    u64::try_from(whole.checked_div(running.into())?).ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        hint,
        sync::mpsc,
        thread,
        time::{Duration, Instant},
    };

    use perf_event::events::Software;

    use super::*;

    /// Every name, for what kernels count on any machine: nanoseconds that the
    /// thread ran. None where even this is not allowed.
    pub(crate) fn events_of_any_machine() -> Option<Events> {
        let events = NAMES.map(|name| -> Event { (name, || Builder::new(Software::TASK_CLOCK)) });
        let (events, missing) = Events(events.to_vec()).available();
        if let Some(missing) = missing {
            eprintln!("skipped: {missing}");
            return None;
        }
        Some(events)
    }

    fn spin(time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            hint::spin_loop();
        }
    }

    #[test]
    fn a_thread_is_counted_alone_and_beyond_its_end() {
        let Some(events) = events_of_any_machine() else {
            return;
        };
        let (to_self, counts) = mpsc::channel();
        let thread = thread::spawn(move || {
            to_self.send(events.open()).unwrap();
            spin(Duration::from_millis(20));
            Instant::now()
        });
        let start = Instant::now();
        let counts: Counts = counts.recv().unwrap();
        spin(Duration::from_millis(20));
        let ended = thread.join().unwrap();
        let read = counts.read();
        assert_eq!(read.keys().copied().collect::<Vec<_>>(), {
            let mut names = NAMES;
            names.sort_unstable();
            names
        });
        for (name, ns) in &read {
            // It ran as long as it lived at most, and did something.
            let lived = ended.duration_since(start) + Duration::from_secs(1);
            assert!(*ns > 0 && u128::from(*ns) < lived.as_nanos(), "{name} {ns}");
        }
        spin(Duration::from_millis(5));
        assert_eq!(counts.read(), read);
    }

    #[test]
    fn what_is_not_there_is_told_on_one_line() {
        let nonsense = || {
            let mut builder = Builder::new(Software::DUMMY);
            builder.attrs_mut().type_ = u32::MAX;
            builder
        };
        let (events, reason) = Events(vec![("nonsense", nonsense)]).available();
        assert_eq!(events.names().next(), None);
        let reason = reason.unwrap();
        assert!(reason.starts_with("no counters of nonsense: "), "{reason}");
        assert!(!reason.contains('\n'));
        let reason = super::reason(&Errno::EACCES.into());
        assert!(reason.contains("perf_event_paranoid"), "{reason}");
        // Either all four can be counted on this machine, or it says why not.
        let (events, missing) = Events::all().available();
        assert_eq!(events.names().count() < NAMES.len(), missing.is_some());
    }

    #[test]
    fn counters_that_took_turns_are_estimated() {
        assert_eq!(estimate(10, 0, 0), Some(10));
        assert_eq!(estimate(10, 100, 100), Some(10));
        assert_eq!(estimate(10, 100, 50), Some(20));
        assert_eq!(estimate(u64::MAX, u64::MAX, u64::MAX), Some(u64::MAX));
        assert_eq!(estimate(u64::MAX, 2, 1), None);
        assert_eq!(estimate(0, 100, 0), None);
    }
}
