//! Device daemons die under their users.

#![allow(
    missing_docs,
    reason = "the names of the tests say what they are about"
)]

use std::time::{SystemTime, UNIX_EPOCH};

use hmm_e2e::{Result, check, trial, vm};
use hmm_stress::deaths::Toll;
use libtest_mimic::Arguments;

/// More than there are devices, so that some die twice.
const KILLS: u64 = 5;

fn main() {
    let mut arguments = Arguments::from_args();
    // Each boots a machine with as many CPUs as this one has.
    arguments.test_threads.get_or_insert(1);
    let trials = vec![trial(
        "death::killed_daemons_take_only_their_pages_along",
        killed_daemons,
    )];
    libtest_mimic::run(&arguments, trials).exit();
}

/// `hmm-stress deaths --kills 200` is the long version of it.
fn killed_daemons() -> Result {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let seed = now.unwrap_or_default().as_secs();
    let (kills, seed) = (KILLS.to_string(), seed.to_string());
    let run = vm(&["run", "--devices", "3", "--device-memory", "16M"])?
        .with(["--", "hmm-stress", "deaths", "--json"])
        .with(["--kills", &kills, "--seed", &seed])
        .finish()?;
    run.expect_status(0)?;
    let toll: Toll = serde_json::from_slice(run.stdout())?;
    println!("{toll:?}");
    let told = toll.kills == KILLS && toll.wrong == 0 && toll.complaints == 0;
    check(told && toll.lost > 100 && toll.checked > 10_000, || {
        format!("{toll:?}")
    })
}
