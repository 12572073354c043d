//! `cargo vm bench`, with the least that it can measure.

#![allow(
    missing_docs,
    reason = "the names of the tests say what they are about"
)]

use hmm_bench::contender::Contender;
use hmm_bench::report::Cell;
use hmm_bench::work::matching;
use hmm_e2e::{Failure, Result, check, trial, vm};
use libtest_mimic::Arguments;
use serde::Deserialize;

/// What is measured, and what cannot be.
const ONLY: [&str; 2] = ["64K-4k-1t", "2M-thp-4t-back"];

fn main() {
    let mut arguments = Arguments::from_args();
    // It boots a machine with as many CPUs as this one has.
    arguments.test_threads.get_or_insert(1);
    let trials = vec![
        trial("bench_fills_every_cell_or_says_why", fills_every_cell),
        trial("bench_refuses_what_it_cannot_measure", refuses),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}

/// What `--json` prints, as far as it is looked at here.
#[derive(Deserialize)]
struct Bench {
    seed: u64,
    rounds: u32,
    cells: Vec<Cell>,
}

fn fills_every_cell() -> Result {
    let [first, second] = ONLY;
    let run = vm(&["bench", "--json", "--rounds", "1", "--seed", "5"])?
        .with(["--only", first, "--only", second])
        .finish()?;
    run.expect_status(0)?;
    let bench: Bench = serde_json::from_slice(run.stdout())?;
    check((bench.seed, bench.rounds) == (5, 1), || run.text())?;
    let Bench { cells, .. } = bench;
    let works = matching(&ONLY.map(ToOwned::to_owned)).map_err(Failure)?;
    check(cells.len() == works.len() * Contender::ALL.len(), || {
        format!("{} cells for {} works", cells.len(), works.len())
    })?;
    for cell in &cells {
        let says_why = cell
            .missing
            .as_ref()
            .is_some_and(|reason| !reason.is_empty());
        check(cell.page_ns.is_some() != says_why, || format!("{cell:?}"))?;
        let measured = cell.work.memory.impossible().is_none();
        if cell.contender == Contender::VirtioHmm {
            check(cell.page_ns.is_some() == measured, || format!("{cell:?}"))?;
        }
    }
    Ok(())
}

fn refuses() -> Result {
    for (option, value, status) in [
        ("--only", "nonesuch", 125),
        ("--against", "nonesuch", 2),
        ("--rounds", "0", 2),
        ("--seed", "x", 2),
    ] {
        let run = vm(&["bench", option, value])?.finish()?;
        run.expect_status(status)?;
        run.expect_error(value)?;
    }
    Ok(())
}
