//! `hmm-conformance`: tests a device against its specification, from user space.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use clap::Parser;
use hmm_conformance::binding;
use hmm_conformance::cases::{self, Case};
use hmm_conformance::driver::Driver;
use hmm_conformance::failure::{Failure, Result};
use hmm_conformance::suite::{Suite, Totals};
use signal_hook::consts::{SIGINT, SIGTERM};
use vhost_device_hmm::ErrorChain;
use vhost_device_hmm::abi::VIRTIO_ID_HMM;

/// Test a heterogeneous memory device against docs/device-specification.md.
///
/// Takes the device from its driver with vfio-pci, and gives it back at the end. Prints KTAP.
#[derive(Parser)]
#[command(
    version,
    after_help = "Exit status: 0 if no case failed, 1 if one did, 2 if none could run, \
    130 if interrupted."
)]
struct Cli {
    /// Run the cases only whose name contains one of these; a statement such as d15 will do
    filters: Vec<String>,
    /// PCI address of the device, such as 0000:01:00.0 [default: the only one there is]
    #[arg(long)]
    bdf: Option<String>,
    /// List cases and statements that are not tested
    #[arg(long)]
    list: bool,
    /// Repeat the choices of an earlier run
    #[arg(long)]
    seed: Option<u64>,
    /// Nobody has used the device since this VM was connected to it: its memory must be zero
    #[arg(long)]
    fresh: bool,
    /// Also run the cases that are known to end QEMU
    #[arg(long)]
    fatal: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.list {
        list();
        return ExitCode::SUCCESS;
    }
    match run(&cli) {
        Ok(status) => status.into(),
        Err(failure) => {
            eprintln!("hmm-conformance: {}", ErrorChain(&failure));
            ExitCode::from(2)
        }
    }
}

fn list() {
    for case in cases::all() {
        println!("{:4} {}", case.statement(), case.name);
    }
    for (statement, reason) in cases::NOT_TESTED {
        println!("{statement:4} not tested: {reason}");
    }
}

fn run(cli: &Cli) -> Result<u8> {
    let selected = select(&cli.filters)?;
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .map_err(|error| Failure::Unfit(format!("cannot handle signals: {error}")))?;
    }
    let bdf = cli.bdf.clone().map_or_else(the_device, Ok)?;
    let seed = cli.seed.unwrap_or_else(random_seed);
    let mut driver = Driver::open(&bdf, seed, cli.fresh)?;
    println!("KTAP version 1\n# device {bdf}, seed {seed}");
    let mut suite = Suite {
        driver: &mut driver,
        fatal: cli.fatal,
        interrupted: &interrupted,
    };
    let Some(totals) = suite.run(&selected) else {
        return Ok(130);
    };
    let Totals {
        passed,
        failed,
        skipped,
    } = totals;
    println!("# Totals: pass:{passed} fail:{failed} skip:{skipped} seed:{seed}");
    Ok(u8::from(failed > 0))
}

/// The cases whose names contain one of these, or all.
fn select(filters: &[String]) -> Result<Vec<&'static Case>> {
    for filter in filters {
        if !cases::all().any(|case| matches(case, filter)) {
            return Err(Failure::Unfit(format!(
                "no case is named {filter}; see --list"
            )));
        }
    }
    let wanted =
        |case: &&Case| filters.is_empty() || filters.iter().any(|filter| matches(case, filter));
    Ok(cases::all().filter(wanted).collect())
}

/// Whether the statement is this one, or the name has this in it: d1 is not d15.
fn matches(case: &Case, filter: &str) -> bool {
    let is = |case: &Case| case.statement().eq_ignore_ascii_case(filter);
    is(case) || case.name.contains(filter) && !cases::all().any(is)
}

fn the_device() -> Result<String> {
    let mut found = binding::find(VIRTIO_ID_HMM)?;
    match (found.pop(), found.is_empty()) {
        (Some(bdf), true) => Ok(bdf),
        (None, _) => Err(Failure::Unfit(
            "there is no device: name one with --bdf".into(),
        )),
        (Some(last), false) => Err(Failure::Unfit(format!(
            "there are several devices, name one with --bdf: {}, {last}",
            found.join(", ")
        ))),
    }
}

/// A seed from the time, short enough to be typed again.
fn random_seed() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |now| u64::from(now.subsec_nanos()))
}
