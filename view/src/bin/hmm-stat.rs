//! Shows what a running device does, a line for each interval, as vmstat does.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    thread,
    time::Duration,
};

use clap::Parser;
use hmm_view::{
    interval::parse_interval,
    rates::Activity,
    reading::{self, Reading},
};
use vhost_device_hmm::ErrorChain;

/// Lines after which the head is repeated.
const PAGE: u64 = 20;

/// Show what a running device does, a line for each interval
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Control socket of the device
    socket: PathBuf,
    /// Seconds between two lines
    #[arg(short = 's', long, value_name = "SECONDS", default_value = "1", value_parser = parse_interval)]
    interval: Duration,
    /// Number of lines; without end if not given
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Print a JSON object for each interval
    #[arg(short = 'J', long)]
    json: bool,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Reading(#[from] reading::Error),
    #[error("cannot write")]
    Write(#[from] io::Error),
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

fn text(activity: &Activity) -> String {
    let total = &activity.total;
    let rates = [total.to_device, total.from_device, total.fill].map(|rate| rate / 1e6);
    let counts = [total.requests, total.errors];
    let times = [
        total.wait_p50,
        total.wait_p99,
        total.copy_p50,
        total.copy_p99,
    ];
    let whole = rates.into_iter().chain(counts).map(|n| format!("{n:.0}"));
    let busy = format!("{:.1}", total.busy * 100.0);
    let times = times.map(|ns| format!("{:.1}", ns as f64 / 1e3));
    let used = (activity.memory_used >> 20).to_string();
    row(whole.chain([busy]).chain(times).chain([used]))
}

fn run(args: &Args) -> Result<(), Error> {
    let mut earlier = Reading::take(&args.socket)?;
    let mut out = io::stdout();
    for number in 0..args.count.unwrap_or(u64::MAX) {
        thread::sleep(args.interval);
        let reading = Reading::take(&args.socket)?;
        let activity = Activity::between(&earlier, &reading);
        if args.json {
            serde_json::to_writer(&out, &activity).map_err(io::Error::from)?;
            writeln!(out)?;
        } else {
            if number.is_multiple_of(PAGE) {
                writeln!(out, "{}", head())?;
            }
            writeln!(out, "{}", text(&activity))?;
        }
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
    use hmm_view::rates::Rates;

    use super::*;

    #[test]
    fn lines_are_80_characters_wide() {
        let activity = Activity {
            total: Rates {
                to_device: 12_345_678_901.0,
                busy: 16.0,
                copy_p99: 99_999_900,
                ..Rates::default()
            },
            ..Activity::default()
        };
        for text in head().lines().chain([text(&activity).as_str()]) {
            assert_eq!(text.chars().count(), 80, "{text}");
        }
    }
}
