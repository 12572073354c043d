//! Runs one scenario or test, and checks what must hold after each.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_hmm_client::counters::Counters;

use crate::context::Context;
use crate::failure::Failure;
use crate::kernel_log::KernelLog;
use crate::report::{Case, Latency, Verdict};
use crate::require;
use crate::shared::counts;
use crate::watchdog::Watchdog;

/// Driver counters that must not move while the device is well.
const MUST_NOT_MOVE: &[&str] = &[
    "cpu_faults_sigbus",
    "src_changed",
    "request_errors",
    "request_timeouts",
    "skipped_copy_failed",
    "broken",
];

/// Operations on which host and guest must agree, and what each counts.
const OPERATIONS: &[&str] = &["to_device", "from_device", "fill"];
const COUNTED: &[&str] = &["requests", "frames", "bytes"];

/// Counters of the driver and of the device at one moment.
#[derive(Debug)]
pub struct Snapshot {
    driver: Counters,
    device: Counters,
    faults: Counters,
}

impl Snapshot {
    /// Read both.
    ///
    /// # Errors
    /// debugfs cannot be read.
    pub fn take(context: &Context) -> Result<Self, Failure> {
        Ok(Self {
            driver: context.driver_counters()?,
            device: context.device_counters()?,
            faults: context.fault_latency()?,
        })
    }

    /// What changed since `earlier`: the driver's counters and the device's.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> (BTreeMap<String, i64>, BTreeMap<String, i64>) {
        (
            self.driver.since(&earlier.driver),
            self.device.since(&earlier.device),
        )
    }

    /// The times of the CPU faults since `earlier`.
    #[must_use]
    pub fn faults_since(&self, earlier: &Self) -> Latency {
        let buckets = self.faults.since(&earlier.faults);
        Latency::of_buckets(
            buckets.iter().filter_map(|(bound, count)| {
                Some((bound.parse().ok()?, u64::try_from(*count).ok()?))
            }),
        )
    }
}

/// Run `body` under a deadline, then check that no device memory is lost, that the
/// counters of guest and host agree, and that the kernel did not complain.
pub fn run(
    name: &str,
    context: &Context,
    log: &mut Option<KernelLog>,
    deadline: Duration,
    late: impl FnOnce(Case) + Send + 'static,
    body: impl FnOnce(&Context) -> Result<(), Failure>,
) -> Case {
    let start = Instant::now();
    let before = Counts::now();
    let case = {
        let name = name.to_owned();
        move |result, reason| {
            let counts = Counts::now();
            Case {
                name,
                result,
                reason,
                seconds: start.elapsed().as_secs_f64(),
                mismatches: counts.mismatches - before.mismatches,
                lost: counts.sigbus - before.sigbus,
                operations: counts.operations - before.operations,
            }
        }
    };
    let watchdog = Watchdog::start(deadline, {
        let case = case.clone();
        move || {
            late(case(
                Verdict::Fail,
                Some(format!("not done after {deadline:?}")),
            ))
        }
    });
    let result = supervise(context, log, before.sigbus, body);
    drop(watchdog);
    match result {
        Ok(()) => case(Verdict::Pass, None),
        Err(Failure::Skip(reason)) => case(Verdict::Skip, Some(reason)),
        Err(failure) => case(Verdict::Fail, Some(failure.describe())),
    }
}

/// [`Shared`](crate::shared::Shared) at one moment.
#[derive(Clone, Copy)]
struct Counts {
    operations: u64,
    mismatches: u64,
    sigbus: u64,
}

impl Counts {
    fn now() -> Self {
        let counts = counts();
        Self {
            operations: counts.operations.load(Ordering::Relaxed),
            mismatches: counts.mismatches.load(Ordering::Relaxed),
            sigbus: counts.sigbus.load(Ordering::Relaxed),
        }
    }
}

fn supervise(
    context: &Context,
    log: &mut Option<KernelLog>,
    sigbus: u64,
    body: impl FnOnce(&Context) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let free = context.free()?;
    let before = Snapshot::take(context)?;
    let result = body(context);
    if let Some(log) = log {
        let complaints = log.complaints()?;
        require!(
            complaints.is_empty(),
            "the kernel complained: {}",
            complaints.join("; ")
        );
    }
    result?;
    let signals = Counts::now().sigbus - sigbus;
    require!(signals == 0, "{signals} SIGBUS");
    context.wait_free(free)?;
    let after = Snapshot::take(context)?;
    let (driver, device) = after.since(&before);
    reconcile(&driver, &device)
}

/// Check changes of the driver's counters against those of the device.
fn reconcile(
    driver: &BTreeMap<String, i64>,
    device: &BTreeMap<String, i64>,
) -> Result<(), Failure> {
    for &name in MUST_NOT_MOVE {
        let change = driver.get(name).copied();
        require!(change == Some(0), "{name} changed: {change:?}");
    }
    for operation in OPERATIONS {
        for counted in COUNTED {
            let name = format!("{operation}_{counted}");
            let (guest, host) = (driver.get(&name), device.get(&name));
            require!(
                guest.is_some() && guest == host,
                "{name}: the driver counted {guest:?}, the device {host:?}"
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(value: i64) -> BTreeMap<String, i64> {
        OPERATIONS
            .iter()
            .flat_map(|operation| COUNTED.iter().map(move |c| format!("{operation}_{c}")))
            .map(|name| (name, value))
            .collect()
    }

    fn driver(value: i64) -> BTreeMap<String, i64> {
        let quiet = MUST_NOT_MOVE.iter().map(|name| ((*name).to_owned(), 0));
        all(value).into_iter().chain(quiet).collect()
    }

    #[test]
    fn equal_changes_reconcile() {
        assert!(reconcile(&driver(3), &all(3)).is_ok());
    }

    #[test]
    fn any_difference_is_told() {
        for name in all(0).keys() {
            let mut device = all(3);
            device.insert(name.clone(), 4);
            let failure = reconcile(&driver(3), &device).unwrap_err();
            assert!(failure.to_string().starts_with(name.as_str()), "{failure}");
        }
        assert!(reconcile(&driver(3), &BTreeMap::new()).is_err());
    }

    #[test]
    fn errors_of_the_driver_are_told() {
        for name in MUST_NOT_MOVE {
            let mut driver = driver(0);
            driver.insert((*name).to_owned(), 1);
            assert!(reconcile(&driver, &all(0)).is_err(), "{name}");
            driver.remove(*name);
            assert!(reconcile(&driver, &all(0)).is_err(), "{name} missing");
        }
    }
}
