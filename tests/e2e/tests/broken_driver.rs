//! The contract tests, those between tenants, those of deaths and the scenarios can fail: each
//! patch in `broken-driver/` breaks one rule in a copy of the driver, and names the tests that
//! have to notice; a scenario notices on the debug kernel. The model checker has to find one of
//! them by itself.

#![allow(
    missing_docs,
    reason = "the names of the tests say what they are about"
)]

use std::path::Path;

use hmm_e2e::patch::{self, Patch};
use hmm_e2e::{Failure, Finished, Result, Tool, check, kernel_is_made, trial, vm};
use hmm_stress::deaths::Toll;
use hmm_stress::report::Line;
use hmm_vm::build::{copy_module_sources, module_sources};
use hmm_vm::error::{EXIT_COUNTERS, EXIT_KERNEL};
use libtest_mimic::Arguments;
use tempfile::TempDir;

const PATCHES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/broken-driver");

fn main() -> Result {
    let mut arguments = Arguments::from_args();
    // A build or a boot keeps about one CPU busy.
    arguments.test_threads.get_or_insert(2);
    let mut trials = patch::trials("broken_driver", PATCHES, is_noticed)?;
    trials.push(trial(
        "broken_driver::model_checker_finds_and_shrinks",
        model_checker_finds,
    ));
    libtest_mimic::run(&arguments, trials).exit();
}

fn is_noticed(patch: &Patch) -> Result<Option<String>> {
    let rules: Vec<_> = patch
        .lines("Inject: ")
        .flat_map(|rule| ["--inject", rule])
        .collect();
    let driver = broken_driver(patch)?;
    for test in patch.fails() {
        let prepare = || -> Result<_> {
            Ok(vm(&["run", "--timeout", "150s", "--driver"])?.with([driver.path()]))
        };
        let run = prepare()?;
        if hmm_stress::contract::NAMES.contains(&test) {
            let run = run.with(["--", "hmm-stress", "contract", test]).finish()?;
            // A broken driver may count wrong as well, and that status hides the test's own.
            let counted_wrong = run.status() == i32::from(EXIT_COUNTERS);
            let failed = run.text().contains(&format!("not ok 1 {test}\n"));
            // The test failed, ran into its deadline, or the guest's kernel complained or hung.
            let noticed = matches!(run.status(), 1 | 3 | 123 | 124) || counted_wrong && failed;
            check(noticed, || {
                format!("{test}: not that of a failed test: {}", told(&run))
            })?;
        } else if hmm_stress::tenants::NAMES.contains(&test) {
            let find = |run: Tool| {
                run.with(["--device-memory", "16M", "--append", "init_on_alloc=0"])
                    .with(&rules)
                    .with(["--", "hmm-stress", "tenants", "--json", test])
                    .finish()
            };
            let mut run = find(run)?;
            // Memory that nobody has used since the boot shows nothing, and one boot in some has
            // enough of it for all that is handed out.
            for _ in 0..3 {
                if mismatches(&run.text()) == 0 {
                    run = find(prepare()?)?;
                }
            }
            // Whatever else a test does not like about a device that fails.
            check(mismatches(&run.text()) > 0, || {
                format!("{test}: nothing is seen of others: {}", told(&run))
            })?;
        } else if test == "deaths" {
            let run = run
                .with(["--", "hmm-stress", "deaths", "--json"])
                .finish()?;
            let toll: Toll = serde_json::from_slice(run.stdout())?;
            check(toll.wrong > 0, || {
                format!("nothing is wrong: {}", told(&run))
            })?;
        } else if hmm_stress::scenario::NAMES.contains(&test) {
            if !kernel_is_made("debug") {
                return Ok(Some("needs the debug kernel".into()));
            }
            let run = run
                .with(["--kernel", "debug", "--", "hmm-stress", "run", test])
                .finish()?;
            run.expect_status(i32::from(EXIT_KERNEL))?;
        } else {
            return Err(Failure(format!("there is no test {test:?}")));
        }
    }
    Ok(None)
}

fn told(run: &Finished) -> String {
    format!("status {}:\n{}{}", run.status(), run.text(), run.errors())
}

/// How many pages were wrong, as the last line of `hmm-stress --json` has it.
fn mismatches(text: &str) -> u64 {
    match text.lines().last().map(serde_json::from_str) {
        Some(Ok(Line::Summary(summary))) => summary.mismatches,
        _ => 0,
    }
}

/// A page that was never written is not cleared on its way to the device.
fn model_checker_finds() -> Result {
    let driver = broken_driver(&Patch::read(
        Path::new(PATCHES).join("s6-does-not-fill.patch"),
    )?)?;
    let script = "hmm-stress model --seed 1 --steps 500 >&2; [ $? = 1 ] || exit 91
        hmm-stress model --replay hmm-model-1 >&2; [ $? = 1 ] || exit 92
        grep -v '^#' hmm-model-1";
    let run = vm(&["run", "--timeout", "150s", "--driver"])?
        .with([driver.path()])
        .with(["--", "sh", "-c", script])
        .finish()?;
    // What was never cleared was never counted by the device. The script says something
    // only if the model checker failed both times, as it must.
    run.expect_status(EXIT_COUNTERS.into())?;
    let script = run.text();
    check(
        script.lines().count() <= 3 && script.contains("to-device"),
        || script.clone(),
    )
}

/// A copy of the driver with `patch` applied.
fn broken_driver(patch: &Patch) -> Result<TempDir> {
    let driver = tempfile::tempdir()?;
    copy_module_sources(&module_sources(), driver.path())?;
    patch.apply(driver.path())?;
    Ok(driver)
}
