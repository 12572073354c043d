//! Shows what a running device does, a line for each interval, as vmstat does.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Duration,
};

use clap::Parser;
use serde::{Deserialize, Serialize};
use vhost_device_hmm::{ErrorChain, abi::VIRTIO_HMM_FRAME_SIZE};

/// Lines after which the head is repeated.
const PAGE: u64 = 20;

/// Show what a running device does, a line for each interval
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Control socket of the device
    socket: PathBuf,
    /// Seconds between two lines
    #[arg(short = 's', long, value_name = "SECONDS", default_value_t = 1.0, value_parser = parse_interval)]
    interval: f64,
    /// Number of lines; without end if not given
    #[arg(short = 'n', long, value_name = "N")]
    count: Option<u64>,
    /// Print a JSON object for each interval
    #[arg(long)]
    json: bool,
}

fn parse_interval(text: &str) -> Result<f64, String> {
    let interval = text.parse().ok().filter(|s| (0.01..=86_400.0).contains(s));
    interval.ok_or_else(|| "not a number from 0.01 to 86400".into())
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot ask the device at {0}")]
    Socket(PathBuf, #[source] io::Error),
    #[error("cannot understand the device")]
    Reply(#[from] serde_json::Error),
    #[error("cannot write")]
    Write(#[source] io::Error),
}

/// A reading of the device's statistics.
#[derive(Clone, Debug, Deserialize)]
struct Reading {
    session: u64,
    time_ns: u64,
    memory: Memory,
    queues: Vec<Queue>,
}

#[derive(Clone, Debug, Deserialize)]
struct Memory {
    used: u64,
}

#[derive(Clone, Debug, Deserialize)]
struct Queue {
    operations: BTreeMap<String, Operation>,
}

#[derive(Clone, Debug, Deserialize)]
struct Operation {
    errors: u64,
    sizes: BTreeMap<String, Size>,
}

#[derive(Clone, Debug, Deserialize)]
struct Size {
    requests: u64,
    frames: u64,
    wait: Times,
    copy: Times,
}

/// A distribution: by what times are less than, their number.
#[derive(Clone, Debug, Default, Deserialize)]
struct Times {
    sum_ns: u64,
    buckets: Vec<(u64, u64)>,
}

/// What happened between two readings.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Line {
    /// Bytes a second.
    to_device: f64,
    from_device: f64,
    fill: f64,
    /// Copy requests a second, and those that failed.
    requests: f64,
    errors: f64,
    /// Parts of the time that the workers of the copy queues were busy, together.
    busy: f64,
    /// Nanoseconds.
    wait_p50: u64,
    wait_p99: u64,
    copy_p50: u64,
    copy_p99: u64,
    /// Bytes of device memory that the host has allocated.
    memory_used: u64,
}

/// Sums over all queues and sizes.
#[derive(Debug, Default)]
struct Sums {
    frames: BTreeMap<String, u64>,
    requests: u64,
    errors: u64,
    busy_ns: u64,
    wait: BTreeMap<u64, u64>,
    copy: BTreeMap<u64, u64>,
}

impl Reading {
    fn sums(&self) -> Sums {
        let mut sums = Sums::default();
        let operations = self.queues.iter().flat_map(|queue| &queue.operations);
        let copies =
            operations.filter(|(name, _)| !matches!(name.as_str(), "counters" | "discard"));
        for (name, operation) in copies {
            sums.errors += operation.errors;
            for size in operation.sizes.values() {
                *sums.frames.entry(name.clone()).or_default() += size.frames;
                sums.requests += size.requests;
                sums.busy_ns += size.copy.sum_ns;
                for (all, times) in [(&mut sums.wait, &size.wait), (&mut sums.copy, &size.copy)] {
                    for (bound, count) in &times.buckets {
                        *all.entry(*bound).or_default() += count;
                    }
                }
            }
        }
        sums
    }

    /// What happened since `earlier`, or since the session began if that was
    /// another one.
    fn since(&self, earlier: &Self) -> Line {
        let now = self.sums();
        let before = if earlier.session == self.session {
            earlier.sums()
        } else {
            Sums::default()
        };
        let time = self.time_ns.saturating_sub(earlier.time_ns).max(1) as f64;
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 * 1e9 / time;
        let bytes = |name: &str| {
            let frames = |sums: &Sums| sums.frames.get(name).copied().unwrap_or(0);
            rate(frames(&now), frames(&before)) * f64::from(VIRTIO_HMM_FRAME_SIZE)
        };
        let (wait, copy) = (
            passed(&now.wait, &before.wait),
            passed(&now.copy, &before.copy),
        );
        Line {
            to_device: bytes("to_device"),
            from_device: bytes("from_device"),
            fill: bytes("fill"),
            requests: rate(now.requests, before.requests),
            errors: rate(now.errors, before.errors),
            busy: now.busy_ns.saturating_sub(before.busy_ns) as f64 / time,
            wait_p50: percentile(&wait, 50),
            wait_p99: percentile(&wait, 99),
            copy_p50: percentile(&copy, 50),
            copy_p99: percentile(&copy, 99),
            memory_used: self.memory.used,
        }
    }
}

/// The times that came to those that were there before.
fn passed(now: &BTreeMap<u64, u64>, before: &BTreeMap<u64, u64>) -> BTreeMap<u64, u64> {
    now.iter()
        .map(|(bound, count)| {
            let before = before.get(bound).copied().unwrap_or(0);
            (*bound, count.saturating_sub(before))
        })
        .collect()
}

/// What so many per cent of the times are less than; 0 if there are none.
fn percentile(times: &BTreeMap<u64, u64>, percent: u64) -> u64 {
    let total: u64 = times.values().sum();
    let wanted = (total * percent).div_ceil(100);
    let mut seen = 0;
    for (bound, count) in times {
        seen += count;
        if seen >= wanted && total > 0 {
            return *bound;
        }
    }
    0
}

/// The columns: name, unit, width. With a space between them they fill 80
/// characters.
const COLUMNS: [(&str, &str, usize); 11] = [
    ("to", "MB/s", 6),
    ("from", "MB/s", 6),
    ("fill", "MB/s", 6),
    ("req", "/s", 7),
    ("err", "/s", 4),
    ("busy", "%", 6),
    ("wait50", "µs", 7),
    ("wait99", "µs", 8),
    ("copy50", "µs", 7),
    ("copy99", "µs", 8),
    ("used", "MiB", 5),
];

fn row(cells: impl Iterator<Item = String>) -> String {
    let columns = cells.zip(COLUMNS);
    let padded: Vec<_> = columns
        .map(|(cell, (.., width))| format!("{cell:>width$}"))
        .collect();
    padded.join(" ")
}

fn head() -> String {
    let names = row(COLUMNS.iter().map(|(name, ..)| (*name).into()));
    let units = row(COLUMNS.iter().map(|(_, unit, _)| (*unit).into()));
    format!("{names}\n{units}")
}

impl Line {
    fn text(&self) -> String {
        let rates = [self.to_device, self.from_device, self.fill].map(|rate| rate / 1e6);
        let counts = [self.requests, self.errors];
        let times = [self.wait_p50, self.wait_p99, self.copy_p50, self.copy_p99];
        let whole = rates.into_iter().chain(counts).map(|n| format!("{n:.0}"));
        let busy = format!("{:.1}", self.busy * 100.0);
        let times = times.map(|ns| format!("{:.1}", ns as f64 / 1e3));
        let used = (self.memory_used >> 20).to_string();
        row(whole.chain([busy]).chain(times).chain([used]))
    }
}

fn read(socket: &Path) -> Result<Reading, Error> {
    let line = || -> io::Result<String> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"{\"command\":\"statistics\"}\n")?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(line)
    };
    let line = line().map_err(|e| Error::Socket(socket.into(), e))?;
    Ok(serde_json::from_str(&line)?)
}

fn run(args: &Args) -> Result<(), Error> {
    let mut earlier = read(&args.socket)?;
    let mut out = io::stdout();
    for number in 0..args.count.unwrap_or(u64::MAX) {
        thread::sleep(Duration::from_secs_f64(args.interval));
        let reading = read(&args.socket)?;
        let line = reading.since(&earlier);
        let text = if args.json {
            serde_json::to_string(&line)?
        } else if number.is_multiple_of(PAGE) {
            format!("{}\n{}", head(), line.text())
        } else {
            line.text()
        };
        writeln!(out, "{text}").map_err(Error::Write)?;
        earlier = reading;
    }
    Ok(())
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        // Whoever read the lines has had enough.
        Err(Error::Write(e)) if e.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("hmm-stat: {}", ErrorChain(&e));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(session: u64, time_ns: u64, requests: u64) -> Reading {
        let times = |bound| serde_json::json!({ "sum_ns": 1000 * requests, "max_ns": 1, "buckets": [[bound, requests]] });
        let size = serde_json::json!({
            "requests": requests, "frames": 2 * requests, "wait": times(2000), "copy": times(4000),
        });
        let operations = serde_json::json!({
            "to_device": { "errors": requests / 2, "sizes": { "64K": size } },
            "discard": { "errors": 9, "sizes": {} },
        });
        serde_json::from_value(serde_json::json!({
            "session": session, "time_ns": time_ns, "memory": { "used": 5 << 20 },
            "queues": [{ "operations": {} }, { "operations": operations }],
        }))
        .unwrap()
    }

    #[test]
    fn a_line_is_what_happened_in_between() {
        let line = reading(1, 3_000_000_000, 30).since(&reading(1, 1_000_000_000, 10));
        let expected = Line {
            to_device: 20.0 * 4096.0,
            requests: 10.0,
            errors: 5.0,
            busy: 20_000.0 / 2e9,
            wait_p50: 2000,
            wait_p99: 2000,
            copy_p50: 4000,
            copy_p99: 4000,
            memory_used: 5 << 20,
            ..Line::default()
        };
        assert_eq!(line, expected);
        // Another session began at zero.
        let line = reading(2, 3_000_000_000, 30).since(&reading(1, 1_000_000_000, 90));
        assert_eq!(line.requests, 15.0);
        // Nothing happened.
        let idle = reading(1, 4, 30).since(&reading(1, 2, 30));
        assert_eq!((idle.requests, idle.copy_p99), (0.0, 0));
    }

    #[test]
    fn percentiles_are_bounds() {
        let times = BTreeMap::from([(10, 98), (20, 1), (30, 1)]);
        assert_eq!(
            [50, 98, 99, 100].map(|p| percentile(&times, p)),
            [10, 10, 20, 30]
        );
    }

    #[test]
    fn lines_are_80_characters_wide() {
        let line = Line {
            to_device: 12_345_678_901.0,
            busy: 16.0,
            copy_p99: 99_999_900,
            ..Line::default()
        };
        for text in head().lines().chain([line.text().as_str()]) {
            assert_eq!(text.chars().count(), 80, "{text}");
        }
    }
}
