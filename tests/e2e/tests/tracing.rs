//! What docs/driver.md says about recording the driver's tracepoints, done as it says.

#![allow(
    missing_docs,
    reason = "the names of the tests say what they are about"
)]

use hmm_e2e::{Failure, Result, check, trial, vm};
use libtest_mimic::Arguments;

const DOCUMENTATION: &str = include_str!("../../../docs/driver.md");

/// Rows of the table of counters, and what the events of their migrations say.
const TRIGGERS: [(&str, &str); 4] = [
    ("ioctl to device", "direction=to_device trigger=ioctl"),
    ("release", "direction=to_system trigger=release"),
    ("cpu fault", "direction=to_system trigger=cpu_fault"),
    ("eviction", "direction=to_system trigger=eviction"),
];

fn main() {
    let mut arguments = Arguments::from_args();
    // Each boots a machine with as many CPUs as this one has.
    arguments.test_threads.get_or_insert(1);
    let trials = vec![
        trial("trace_cmd_records_every_migration", every_migration),
        trial("a_package_that_is_not_there_is_named", unknown_package),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}

/// The documentation's command with trace-cmd: its options, and its script.
fn recipe() -> Result<(Vec<&'static str>, &'static str)> {
    let command = DOCUMENTATION
        .split("    cargo vm ")
        .find(|text| text.contains("--with-package trace-cmd "))
        .and_then(|text| text.split_once(" -- sh -c '"));
    let (options, rest) = command.ok_or_else(|| Failure("no recipe".into()))?;
    let end = rest.split_once('\'');
    let (script, _) = end.ok_or_else(|| Failure("no end of the recipe".into()))?;
    Ok((options.split_whitespace().collect(), script))
}

/// There is an event with trigger and error for every migration that was counted.
fn every_migration() -> Result {
    let (options, script) = recipe()?;
    let run = vm(&options)?.with(["--", "sh", "-c", script]).finish()?;
    run.expect_status(0)?;
    let (text, errors) = (run.text(), run.errors());
    let events: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("vhmm_migration:"))
        .collect();
    let mut all = 0;
    for (row, words) in TRIGGERS {
        let counted = errors
            .lines()
            .find_map(|line| line.strip_prefix(row)?.split_whitespace().next());
        let counted: usize = counted
            .and_then(|number| number.replace(',', "").parse().ok())
            .ok_or_else(|| Failure(format!("no {row} in\n{errors}")))?;
        let recorded = events.iter().filter(|line| line.contains(words)).count();
        check(recorded == counted && counted > 0, || {
            format!("{recorded} of {counted} migrations of {row} were recorded\n{errors}")
        })?;
        all += recorded;
    }
    check(all == events.len(), || "of other triggers".into())?;
    let right = |line: &&str| line.ends_with(" error=0") && line.contains(" setup_ns=");
    check(events.iter().all(right), || text.clone())
}

fn unknown_package() -> Result {
    let run = vm(&["run", "--with-package", "no-such-package", "--", "true"])?.finish()?;
    run.expect_status(125)?;
    run.expect_error(" has no package no-such-package\n")
}
