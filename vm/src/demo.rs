//! `cargo vm demo`: a short stress, and whether the two sides of the device agree about it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hmm_init::Stream;
use hmm_stress::report::{Line, Summary};
use serde::Serialize;

use crate::accelerator::Accelerator;
use crate::error::{Error, Result};
use crate::prepare::{Job, MachineOptions, Prepared};
use crate::reconcile::{self, Sides, grouped};
use crate::report::Report;
use crate::run::{End, pass_on};

/// What the driver's counters of skipped pages begin with.
const SKIPPED: &str = "skipped_";

/// The result, as `--json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct Demo {
    /// "kvm" or "tcg".
    pub accelerator: Accelerator,
    /// Release of the guest's kernel.
    pub kernel: String,
    /// Version of QEMU.
    pub qemu: String,
    /// Seed that repeats the stress.
    pub seed: u64,
    /// Pages copied to the device.
    pub pages_to_device: u64,
    /// Pages that came back, for whatever reason.
    pub pages_to_system: u64,
    /// Of these, pages that a program asked for.
    pub pages_to_system_by_request: u64,
    /// Of these, pages that a CPU touched.
    pub pages_to_system_by_fault: u64,
    /// Of these, by eviction.
    pub pages_to_system_by_eviction: u64,
    /// CPU faults on device pages.
    pub cpu_faults: u64,
    /// Holes and zero pages that became zeroed device pages, without a copy.
    pub holes_filled: u64,
    /// Pages that stayed where they were, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// Pages that did not hold what they should.
    pub mismatches: u64,
    /// Scenarios that passed, failed, and could not run.
    pub scenarios_passed: u64,
    /// See `scenarios_passed`.
    pub scenarios_failed: u64,
    /// See `scenarios_passed`.
    pub scenarios_skipped: u64,
    /// Measured around the calls that moved pages.
    pub bytes_per_second_to_device: u64,
    /// The other way.
    pub bytes_per_second_to_system: u64,
    /// Median time of a CPU fault on a device page.
    pub fault_p50_ns: u64,
    /// 99th percentile of the same.
    pub fault_p99_ns: u64,
    /// By the driver.
    pub guest_bytes_to_device: u64,
    /// By the daemon.
    pub host_bytes_to_device: u64,
    /// By the driver.
    pub guest_bytes_to_system: u64,
    /// By the daemon.
    pub host_bytes_to_system: u64,
    /// Both sides by kind of request, all devices together.
    pub counters: BTreeMap<&'static str, Sides>,
    /// Each device.
    pub devices: Vec<reconcile::Device>,
    /// Whether both sides of every device agree.
    pub reconciled: bool,
    /// From QEMU's start to the guest's first line.
    pub boot_seconds: f64,
    /// The stress alone.
    pub stress_seconds: f64,
    /// The whole demo, with what had to be made first.
    pub seconds: f64,
}

impl Demo {
    /// Whether everything is as it should be.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.mismatches == 0 && self.scenarios_failed == 0 && self.reconciled
    }
}

/// Boots a machine, stresses the device, beside `hmm-top` if that is wanted, and compares the
/// counters of its two sides.
///
/// # Errors
/// The machine or the stress program could not be run to the end.
pub fn run(options: &MachineOptions, seed: Option<u64>, top: bool) -> Result<Demo> {
    let started = std::time::Instant::now();
    let prepared = Prepared::new(options)?;
    let seed = seed.unwrap_or_else(random_seed);
    let stress = format!("hmm-stress run --json --duration 1s --size 32M --seed {seed}");
    Report.line(&format!(
        "booting on {} and running {stress}",
        prepared.accelerator(),
    ));
    let script = format!(
        "status=0
        for device in /dev/hmm*; do {stress} --device $device || status=$?; done
        exit $status"
    );
    let mut lines = Lines::default();
    let job = Job {
        command: vec!["sh".into(), "-c".into(), script],
        top,
        ..Job::default()
    };
    let finished = prepared.run(&job, &mut |stream, data| match stream {
        Stream::Stdout => {
            lines.add(data);
            Ok(())
        }
        Stream::Stderr => pass_on(Stream::Stderr, data),
    })?;
    let Lines { summaries, .. } = lines;
    if summaries.is_empty() || summaries.len() != finished.devices.len() {
        return Err(Error::Stress(finished.end));
    }
    let mut demo = Demo::new(&summaries, finished.devices);
    // Status 1 is a failed scenario, which the summary tells better.
    if !matches!(finished.end, End::Status(0 | 1)) {
        return Err(Error::Stress(finished.end));
    }
    if finished.end != End::Status(0) && demo.passed() {
        demo.scenarios_failed += 1;
    }
    demo.seed = seed;
    demo.accelerator = prepared.accelerator();
    demo.kernel = finished.kernel;
    demo.qemu = prepared.toolbox().qemu_version()?;
    demo.boot_seconds = finished.boot.as_secs_f64();
    demo.seconds = started.elapsed().as_secs_f64();
    Ok(demo)
}

/// Different from run to run, and short enough to be typed again.
pub(crate) fn random_seed() -> u64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    time.map_or(0, |time| {
        (time.as_micros() & 0xffff_ffff).try_into().unwrap_or(0)
    })
}

/// The stress programs' lines as they come in.
#[derive(Default)]
struct Lines {
    partial: Vec<u8>,
    summaries: Vec<Summary>,
}

impl Lines {
    fn add(&mut self, data: &[u8]) {
        self.partial.extend_from_slice(data);
        while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
            let rest = self.partial.split_off(end + 1);
            let line = std::mem::replace(&mut self.partial, rest);
            // The program tells a person on standard error how each scenario ended.
            if let Ok(Line::Summary(summary)) = serde_json::from_slice(&line) {
                self.summaries.push(*summary);
            }
        }
    }
}

impl Demo {
    fn new(summaries: &[Summary], devices: Vec<reconcile::Device>) -> Self {
        let sum = |of: fn(&Summary) -> u64| summaries.iter().map(of).sum();
        let most = |of: fn(&Summary) -> u64| summaries.iter().map(of).max().unwrap_or(0);
        let mut driver: BTreeMap<&str, u64> = BTreeMap::new();
        for (name, &change) in summaries.iter().flat_map(|summary| &summary.driver) {
            *driver.entry(name).or_default() += u64::try_from(change).unwrap_or(0);
        }
        let skipped = driver
            .iter()
            .filter(|&(_, &count)| count > 0)
            .filter_map(|(name, &count)| Some((name.strip_prefix(SKIPPED)?.to_owned(), count)))
            .collect();
        let driver = |name: &str| driver.get(name).copied().unwrap_or(0);
        let counters = reconcile::total(&devices);
        let total = |name: &str| counters.get(name).copied().unwrap_or_default();
        let (to_device, from_device) = (total("to_device"), total("from_device"));
        Self {
            accelerator: Accelerator::Tcg,
            kernel: String::new(),
            qemu: String::new(),
            seed: 0,
            pages_to_device: driver("pages_to_device"),
            pages_to_system: driver("pages_to_system")
                + driver("pages_released")
                + driver("pages_faulted")
                + driver("pages_evicted")
                + driver("pages_evacuated"),
            pages_to_system_by_request: driver("pages_to_system") + driver("pages_released"),
            pages_to_system_by_fault: driver("pages_faulted"),
            pages_to_system_by_eviction: driver("pages_evicted"),
            cpu_faults: driver("cpu_faults"),
            holes_filled: driver("pages_filled"),
            skipped,
            mismatches: sum(|summary| summary.mismatches),
            scenarios_passed: sum(|summary| summary.passed),
            scenarios_failed: sum(|summary| summary.failed),
            scenarios_skipped: sum(|summary| summary.skipped),
            bytes_per_second_to_device: rate(
                sum(|summary| summary.to_device.bytes),
                sum(|summary| summary.to_device.ns),
            ),
            bytes_per_second_to_system: rate(
                sum(|summary| summary.to_system.bytes),
                sum(|summary| summary.to_system.ns),
            ),
            fault_p50_ns: most(|summary| summary.fault_latency_ns.p50),
            fault_p99_ns: most(|summary| summary.fault_latency_ns.p99),
            guest_bytes_to_device: to_device.guest.bytes,
            host_bytes_to_device: to_device.host.bytes,
            guest_bytes_to_system: from_device.guest.bytes,
            host_bytes_to_system: from_device.host.bytes,
            reconciled: devices
                .iter()
                .all(|device| device.reconciled && device.was_used()),
            counters,
            devices,
            boot_seconds: 0.0,
            stress_seconds: summaries.iter().map(|summary| summary.seconds).sum(),
            seconds: 0.0,
        }
    }

    /// The table for a person.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut row = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<34}{value:>16}");
        };
        row("pages to the device", grouped(self.pages_to_device));
        row(
            "pages back on request",
            grouped(self.pages_to_system_by_request),
        );
        row(
            "pages back by CPU fault",
            grouped(self.pages_to_system_by_fault),
        );
        row(
            "pages back by eviction",
            grouped(self.pages_to_system_by_eviction),
        );
        row("holes and zero pages filled", grouped(self.holes_filled));
        row("pages skipped", grouped(self.skipped.values().sum()));
        for (reason, count) in &self.skipped {
            row(&format!("  {}", reason.replace('_', " ")), grouped(*count));
        }
        row("mismatches", grouped(self.mismatches));
        row(
            "bandwidth to the device",
            megabytes(self.bytes_per_second_to_device),
        );
        row(
            "bandwidth back on request",
            megabytes(self.bytes_per_second_to_system),
        );
        row("CPU fault, median", microseconds(self.fault_p50_ns));
        row(
            "CPU fault, 99th percentile",
            microseconds(self.fault_p99_ns),
        );
        for device in &self.devices {
            if self.devices.len() > 1 {
                let _ = write!(text, "\n{}", device.device);
            }
            let _ = write!(text, "\n{}", reconcile::table(&device.counters));
        }
        let _ = writeln!(
            text,
            "\ncounters {}; {} scenarios passed, {} failed, {} skipped; seed {}",
            if self.reconciled {
                "reconcile"
            } else {
                "DO NOT RECONCILE"
            },
            self.scenarios_passed,
            self.scenarios_failed,
            self.scenarios_skipped,
            self.seed
        );
        let _ = writeln!(
            text,
            "Linux {} on QEMU {}, {}; boot {:.1} s, stress {:.1} s, all {:.1} s",
            self.kernel,
            self.qemu,
            self.accelerator,
            self.boot_seconds,
            self.stress_seconds,
            self.seconds
        );
        text
    }
}

fn rate(bytes: u64, ns: u64) -> u64 {
    let per_second = u128::from(bytes) * Duration::from_secs(1).as_nanos();
    per_second
        .checked_div(ns.into())
        .and_then(|rate| u64::try_from(rate).ok())
        .unwrap_or(0)
}

fn megabytes(bytes_per_second: u64) -> String {
    format!("{} MB/s", bytes_per_second / 1_000_000)
}

pub(crate) fn microseconds(ns: u64) -> String {
    format!("{}.{} µs", ns / 1000, ns % 1000 / 100)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Counts;
    use crate::reconcile::tests::agreeing;
    use hmm_stress::report::{Latency, Transfer};

    fn summary() -> Summary {
        let driver = BTreeMap::from([
            ("pages_to_device".to_owned(), 1000),
            ("pages_to_system".to_owned(), 600),
            ("pages_faulted".to_owned(), 400),
            ("skipped_busy".to_owned(), 5),
            ("skipped_pinned".to_owned(), 0),
        ]);
        Summary {
            seed: 7,
            seconds: 1.5,
            passed: 4,
            failed: 0,
            skipped: 0,
            mismatches: 0,
            fault_latency_ns: Latency {
                count: 1,
                p50: 12_345,
                p99: 99_999,
                max: 100_000,
            },
            to_device: Transfer {
                bytes: 4_096_000,
                ns: 10_000_000,
            },
            to_system: Transfer::default(),
            driver,
            device: BTreeMap::new(),
        }
    }

    fn devices(count: usize) -> Vec<reconcile::Device> {
        let (guest, host) = agreeing();
        let one = reconcile::devices(&guest, &[Counts::All(host)]);
        one.into_iter().cycle().take(count).collect()
    }

    #[test]
    fn figures_are_taken_from_the_stress() {
        let demo = Demo::new(&[summary()], devices(1));
        assert!(demo.reconciled && demo.passed());
        assert_eq!(demo.pages_to_system, 1000);
        assert_eq!(demo.bytes_per_second_to_device, 409_600_000);
        assert_eq!(demo.bytes_per_second_to_system, 0);
        assert_eq!(demo.skipped, BTreeMap::from([("busy".to_owned(), 5)]));
        let table = demo.table();
        assert!(
            table.contains("409 MB/s") && table.contains("12.3 µs"),
            "{table}"
        );
        assert!(!table.contains("hmm0"), "{table}");
    }

    #[test]
    fn several_devices_are_added_up_and_shown_one_by_one() {
        let demo = Demo::new(&[summary(), summary()], devices(2));
        assert!(demo.passed());
        assert_eq!(demo.pages_to_device, 2000);
        assert_eq!(demo.scenarios_passed, 8);
        assert_eq!(demo.guest_bytes_to_device, 2 * 1000 * 4096);
        assert_eq!(demo.table().matches("hmm0").count(), 2);
    }

    #[test]
    fn one_device_that_does_not_reconcile_fails() {
        let mut devices = devices(2);
        devices[1].reconciled = false;
        let demo = Demo::new(&[summary()], devices);
        assert!(!demo.passed() && demo.table().contains("DO NOT RECONCILE"));
    }

    #[test]
    fn mismatches_and_failures_do_not_pass() {
        let mut summary = summary();
        summary.mismatches = 1;
        assert!(!Demo::new(&[summary.clone()], devices(1)).passed());
        summary.mismatches = 0;
        summary.failed = 1;
        assert!(!Demo::new(&[summary], devices(1)).passed());
    }
}
