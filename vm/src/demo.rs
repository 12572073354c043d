//! `cargo vm demo`: a short stress, and whether the two sides of the device agree about it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use hmm_init::Stream;
use hmm_stress::report::{Line, Summary};
use serde::Serialize;

use crate::accelerator::Accelerator;
use crate::daemon::{Counters, Operation};
use crate::error::{Error, Result};
use crate::prepare::{Job, MachineOptions, Prepared};
use crate::process::capture;
use crate::report::Report;
use crate::run::{End, pass_on};

/// What the driver's counters of skipped pages begin with.
const SKIPPED: &str = "skipped_";

/// Amounts of both sides of the device for one kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sides {
    /// By the driver's counters.
    pub guest: Amounts,
    /// By the daemon's counters.
    pub host: Amounts,
}

/// How much of one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Amounts {
    /// Requests completed.
    pub requests: u64,
    /// Frames copied or filled.
    pub frames: u64,
    /// Bytes in these frames.
    pub bytes: u64,
}

impl From<Operation> for Amounts {
    fn from(operation: Operation) -> Self {
        let Operation {
            requests,
            frames,
            bytes,
            ..
        } = operation;
        Self {
            requests,
            frames,
            bytes,
        }
    }
}

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
    /// Both sides by kind of request.
    pub counters: BTreeMap<&'static str, Sides>,
    /// Whether all of `counters` agree.
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

/// Boots a machine, stresses the device and compares the counters of its two sides.
///
/// # Errors
/// The machine or the stress program could not be run to the end.
pub fn run(options: &MachineOptions, seed: Option<u64>) -> Result<Demo> {
    let started = std::time::Instant::now();
    let prepared = Prepared::new(options)?;
    let mut command: Vec<String> = [
        "hmm-stress",
        "run",
        "--json",
        "--duration",
        "1s",
        "--size",
        "32M",
    ]
    .map(Into::into)
    .into();
    if let Some(seed) = seed {
        command.extend(["--seed".into(), seed.to_string()]);
    }
    Report.line(&format!(
        "booting on {} and running {}",
        prepared.accelerator(),
        command.join(" ")
    ));
    let mut lines = Lines::default();
    let job = Job {
        command,
        ..Job::default()
    };
    let finished = prepared.run(&job, &mut |stream, data| match stream {
        Stream::Stdout => {
            lines.add(data);
            Ok(())
        }
        Stream::Stderr => pass_on(Stream::Stderr, data),
    })?;
    let (Some(summary), Some(counters)) = (lines.summary, finished.counters) else {
        return Err(Error::Stress(finished.end));
    };
    let mut demo = Demo::new(&summary, &counters);
    // Status 1 is a failed scenario, which the summary tells better.
    if !matches!(finished.end, End::Status(0 | 1)) {
        return Err(Error::Stress(finished.end));
    }
    if finished.end != End::Status(0) && demo.passed() {
        demo.scenarios_failed += 1;
    }
    demo.accelerator = prepared.accelerator();
    demo.kernel = finished.kernel;
    demo.qemu = capture(prepared.toolbox().qemu().arg("--version"))?
        .lines()
        .next()
        .unwrap_or_default()
        .trim_start_matches("QEMU emulator version ")
        .to_owned();
    demo.boot_seconds = finished.boot.as_secs_f64();
    demo.seconds = started.elapsed().as_secs_f64();
    Ok(demo)
}

/// The stress program's lines as they come in.
#[derive(Default)]
struct Lines {
    partial: Vec<u8>,
    summary: Option<Box<Summary>>,
}

impl Lines {
    fn add(&mut self, data: &[u8]) {
        self.partial.extend_from_slice(data);
        while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
            let rest = self.partial.split_off(end + 1);
            let line = std::mem::replace(&mut self.partial, rest);
            // The program tells a person on standard error how each scenario ended.
            if let Ok(Line::Summary(summary)) = serde_json::from_slice(&line) {
                self.summary = Some(summary);
            }
        }
    }
}

impl Demo {
    fn new(summary: &Summary, host: &Counters) -> Self {
        let driver = |name: &str| driver_counter(summary, name);
        let [to_device, from_device, fill] = sides(summary, host);
        let counters = BTreeMap::from([
            ("to_device", to_device),
            ("from_device", from_device),
            ("fill", fill),
        ]);
        let skipped = summary
            .driver
            .iter()
            .filter_map(|(name, &count)| {
                let reason = name.strip_prefix(SKIPPED)?;
                Some((
                    reason.to_owned(),
                    u64::try_from(count).ok().filter(|&count| count > 0)?,
                ))
            })
            .collect();
        Self {
            accelerator: Accelerator::Tcg,
            kernel: String::new(),
            qemu: String::new(),
            seed: summary.seed,
            pages_to_device: driver("pages_to_device"),
            pages_to_system: driver("pages_to_system")
                + driver("pages_faulted")
                + driver("pages_evacuated"),
            pages_to_system_by_request: driver("pages_to_system"),
            pages_to_system_by_fault: driver("pages_faulted"),
            cpu_faults: driver("cpu_faults"),
            holes_filled: driver("pages_filled"),
            skipped,
            mismatches: summary.mismatches,
            scenarios_passed: summary.passed,
            scenarios_failed: summary.failed,
            scenarios_skipped: summary.skipped,
            bytes_per_second_to_device: rate(summary.to_device.bytes, summary.to_device.ns),
            bytes_per_second_to_system: rate(summary.to_system.bytes, summary.to_system.ns),
            fault_p50_ns: summary.fault_latency_ns.p50,
            fault_p99_ns: summary.fault_latency_ns.p99,
            guest_bytes_to_device: to_device.guest.bytes,
            host_bytes_to_device: to_device.host.bytes,
            guest_bytes_to_system: from_device.guest.bytes,
            host_bytes_to_system: from_device.host.bytes,
            // Two sides that both counted nothing agree about nothing.
            reconciled: counters.values().all(|sides| sides.guest == sides.host)
                && to_device.host.frames > 0,
            counters,
            boot_seconds: 0.0,
            stress_seconds: summary.seconds,
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
        let _ = writeln!(text, "\n{:<18}{:>16}{:>16}", "", "guest", "host");
        for (name, sides) in &self.counters {
            let name = name.replace('_', " ");
            for (what, guest, host) in [
                ("requests", sides.guest.requests, sides.host.requests),
                ("frames", sides.guest.frames, sides.host.frames),
                ("bytes", sides.guest.bytes, sides.host.bytes),
            ] {
                let sign = if guest == host { "" } else { "  differs" };
                let _ = writeln!(
                    text,
                    "{:<20}{:>16}{:>16}{sign}",
                    format!("{name} {what}"),
                    grouped(guest),
                    grouped(host)
                );
            }
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

/// What driver and daemon counted of copies to the device, back, and fills.
#[must_use]
pub fn sides(summary: &Summary, host: &Counters) -> [Sides; 3] {
    [
        ("to_device", host.to_device),
        ("from_device", host.from_device),
        ("fill", host.fill),
    ]
    .map(|(name, operation)| {
        let driver = |what: &str| driver_counter(summary, &format!("{name}_{what}"));
        Sides {
            guest: Amounts {
                requests: driver("requests"),
                frames: driver("frames"),
                bytes: driver("bytes"),
            },
            host: operation.into(),
        }
    })
}

fn driver_counter(summary: &Summary, name: &str) -> u64 {
    summary
        .driver
        .get(name)
        .and_then(|&value| u64::try_from(value).ok())
        .unwrap_or(0)
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

fn microseconds(ns: u64) -> String {
    format!("{}.{} µs", ns / 1000, ns % 1000 / 100)
}

/// 1234567 as 1,234,567.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use hmm_stress::report::{Latency, Transfer};

    fn agreeing() -> (Summary, Counters) {
        let one = Operation {
            requests: 3,
            frames: 1000,
            bytes: 1000 * 4096,
            errors: 0,
        };
        let host = Counters {
            to_device: one,
            from_device: one,
            fill: one,
        };
        let mut driver = BTreeMap::from([
            ("pages_to_device".to_owned(), 1000),
            ("pages_to_system".to_owned(), 600),
            ("pages_faulted".to_owned(), 400),
            ("skipped_busy".to_owned(), 5),
            ("skipped_pinned".to_owned(), 0),
        ]);
        for name in ["to_device", "from_device", "fill"] {
            driver.insert(format!("{name}_requests"), 3);
            driver.insert(format!("{name}_frames"), 1000);
            driver.insert(format!("{name}_bytes"), 1000 * 4096);
        }
        let summary = Summary {
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
        };
        (summary, host)
    }

    #[test]
    fn sides_that_agree_reconcile() {
        let (summary, host) = agreeing();
        let demo = Demo::new(&summary, &host);
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
        assert!(!table.contains("differs"), "{table}");
    }

    #[test]
    fn one_frame_of_difference_is_found_and_shown() {
        let (summary, mut host) = agreeing();
        host.fill.frames += 1;
        let demo = Demo::new(&summary, &host);
        assert!(!demo.reconciled && !demo.passed());
        let table = demo.table();
        assert!(
            table.contains("differs") && table.contains("DO NOT RECONCILE"),
            "{table}"
        );
    }

    #[test]
    fn a_stress_that_moved_nothing_does_not_reconcile() {
        let (mut summary, _) = agreeing();
        summary.driver.clear();
        assert!(!Demo::new(&summary, &Counters::default()).reconciled);
    }

    #[test]
    fn mismatches_and_failures_do_not_pass() {
        let (mut summary, host) = agreeing();
        summary.mismatches = 1;
        assert!(!Demo::new(&summary, &host).passed());
        summary.mismatches = 0;
        summary.failed = 1;
        assert!(!Demo::new(&summary, &host).passed());
    }

    #[test]
    fn numbers_are_grouped_by_three() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(grouped(number), text);
        }
    }
}
