//! Other kernels than the stock one: the kernel's own checks find nothing to report, and
//! the driver works on the older kernels that it is said to work on.

#![allow(
    missing_docs,
    reason = "the names of the tests say what they are about"
)]

use std::time::Duration;

use hmm_e2e::{Result, check, kernel_is_made, skippable_trial, vm};
use libtest_mimic::{Arguments, Trial};

/// The debug kernel is several times slower than others.
const PATIENCE: Duration = Duration::from_secs(30 * 60);

fn main() {
    let mut arguments = Arguments::from_args();
    // Each keeps about one CPU busy.
    arguments.test_threads.get_or_insert(2);
    let trials = vec![
        kernel_trial("debug", debug_kernel_reports_nothing),
        kernel_trial("7.2", || stress_passes_on("7.2")),
        kernel_trial("6.12", || stress_passes_on("6.12")),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}

/// A test on a kernel that `cargo vm test` has made, if it could be had.
fn kernel_trial(kernel: &'static str, body: fn() -> Result) -> Trial {
    skippable_trial(&format!("stress_passes_on_{kernel}"), move || {
        if !kernel_is_made(kernel) {
            return Ok(Some("the mirror does not have it".into()));
        }
        body()?;
        Ok(None)
    })
}

/// A report ends the run with a status of its own. Leaks are found when they are asked for:
/// the first scan may take what is on its way for lost.
fn debug_kernel_reports_nothing() -> Result {
    let script = "hmm-stress contract || exit 91
        hmm-stress run --duration 20s || exit 92
        hmm-stress model --steps 500 --duration 10s || exit 93
        rmmod virtio_hmm || exit 94
        echo scan > /sys/kernel/debug/kmemleak || exit 95
        sleep 6
        echo scan > /sys/kernel/debug/kmemleak
        echo leaks:
        cat /sys/kernel/debug/kmemleak";
    let run = vm(&[
        "run",
        "--kernel",
        "debug",
        "--timeout",
        "25m",
        "--silence",
        "2m",
    ])?
    .with(["--", "sh", "-c", script])
    .finish_within(PATIENCE)?;
    run.expect_status(0)?;
    check(run.text().ends_with("leaks:\n"), || run.text())?;
    check(run.text().contains("pass failing-allocations"), || {
        run.text()
    })
}

fn stress_passes_on(kernel: &str) -> Result {
    let script = "uname -r
        hmm-stress contract || exit 91
        hmm-stress run --duration 10s || exit 92
        rmmod virtio_hmm || exit 93";
    let run = vm(&["run", "--kernel", kernel])?
        .with(["--", "sh", "-c", script])
        .finish_within(PATIENCE)?;
    run.expect_status(0)?;
    check(run.text().starts_with(&format!("{kernel}.")), || run.text())
}
