//! The conformance cases can fail: each patch in `broken-device/` breaks one statement of the
//! specification in a copy of the device, and names the cases that have to notice.

#![allow(
    missing_docs,
    reason = "the names of the tests say what they are about"
)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use hmm_e2e::ktap::{End, Ends};
use hmm_e2e::patch::{self, Patch};
use hmm_e2e::{Daemon, Finished, Result, check, vm};
use hmm_vm::build::cargo;
use hmm_vm::paths::{Cache, checkout, lock};
use hmm_vm::report::Report;
use libtest_mimic::Arguments;
use tempfile::TempDir;

const PATCHES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/broken-device");
/// Package and binary of the daemon.
const DAEMON: &str = "vhost-device-hmm";
/// Held while a daemon is built.
static TURN: Mutex<()> = Mutex::new(());
/// How a case begins to tell that the device was lost before it, or after it.
const LOST: [&str; 2] = ["the device does not work any more since ", "afterwards: "];

fn main() -> Result {
    let mut arguments = Arguments::from_args();
    // A build or a boot keeps about one CPU busy.
    arguments.test_threads.get_or_insert(2);
    let trials = patch::trials("broken_device", PATCHES, is_noticed)?;
    libtest_mimic::run(&arguments, trials).exit();
}

fn is_noticed(patch: &Patch) -> Result<Option<String>> {
    let device = broken_device(patch)?;
    let daemon = Daemon::start_program(&device.path().join(DAEMON))?;
    // What is broken may show only after a VM in which these cases passed.
    let before: Vec<_> = patch.lines("Before: ").collect();
    if !before.is_empty() {
        run_cases(&daemon, &before)?.expect_status(0)?;
    }
    let cases: Vec<_> = patch.fails().collect();
    let run = run_cases(&daemon, &cases)?;
    run.expect_status(1)?;
    let ends = Ends::read(&run.text())?;
    check(ends.planned == cases.len(), || run.text())?;
    for case in cases {
        let noticed = matches!(
            ends.by_name.get(case),
            Some(End::Failed(reason)) if !LOST.iter().any(|lost| reason.starts_with(lost))
        );
        check(noticed, || {
            format!("{case} does not notice:\n{}", run.text())
        })?;
    }
    Ok(None)
}

fn run_cases(daemon: &Daemon, cases: &[&str]) -> Result<Finished> {
    vm(&["run", "--profile", "vfio"])?
        .with(daemon.options())
        .with(["--", "hmm-conformance", "--fresh", "--seed", "20171"])
        .with(cases)
        .finish()
}

/// A directory with the daemon of a device that has this patch.
fn broken_device(patch: &Patch) -> Result<TempDir> {
    let target = Cache::locate()?.broken_device();
    fs::create_dir_all(&target)?;
    // From before the sources are written, because cargo builds what is newer than its last
    // program, until that is out of the way of the next one. Another checkout may build, too.
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let _lock = lock(&target.join("lock"), Report)?;
    let workspace = tempfile::tempdir()?;
    let sources = Path::new("device/src");
    let device = workspace.path().join("device");
    fs::create_dir_all(workspace.path().join(sources))?;
    link_all_but("device", checkout(), workspace.path())?;
    link_all_but("src", &checkout().join("device"), &device)?;
    for entry in fs::read_dir(checkout().join(sources))? {
        let entry = entry?;
        fs::copy(entry.path(), device.join("src").join(entry.file_name()))?;
    }
    patch.apply(&device.join("src"))?;

    let built = cargo()
        .args(["build", "--quiet", "--locked", "--offline"])
        .args(["--package", DAEMON, "--bin", DAEMON, "--target-dir"])
        .arg(&target)
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .current_dir(workspace.path())
        .output()?;
    check(built.status.success(), || {
        String::from_utf8_lossy(&built.stderr).into_owned()
    })?;
    let program = target.join("debug").join(DAEMON);
    fs::copy(program, workspace.path().join(DAEMON))?;
    Ok(workspace)
}

/// Puts into `to` a link to everything in `from` but one.
fn link_all_but(one: &str, from: &Path, to: &Path) -> Result {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_name() != one {
            symlink(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}
