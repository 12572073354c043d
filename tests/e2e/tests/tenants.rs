//! Between tenants: what one process or VM leaves behind is never seen by another.
//!
//! The kernel clears no memory of its own accord here, so that what a driver hands out without
//! having written it shows.

#![allow(
    missing_docs,
    reason = "the names of the tests say what they are about"
)]

use hmm_e2e::cases::{Shared, Told, case_trial, shared};
use hmm_e2e::{Daemon, Result, check, programs, trial, vm};
use hmm_hold::HELD;
use hmm_stress::report::Case;
use hmm_stress::tenants;
use hmm_vm::initramfs::MODULE_PATH;
use libtest_mimic::Arguments;
use rustix::process::Signal;

/// Fails unless the kernel leaves memory as it was.
const NOT_CLEARED: &str = "dmesg | grep -q 'heap alloc:off' || exit 90";

/// Looks for what others have left behind.
const LOOK: &str = "hmm-stress tenants tenants_find_zeros >&2";

/// Where `hmm-hold` writes that its secrets are on the device, and waits to go on.
const READY: &str = "/tmp/ready";
const GO: &str = "/tmp/go";

fn main() {
    let mut arguments = Arguments::from_args();
    // Each boots a machine with as many CPUs as this one has.
    arguments.test_threads.get_or_insert(1);
    let mut trials = vec![
        trial(
            "tenants::drivers_that_come_and_go",
            drivers_that_come_and_go,
        ),
        trial(
            "tenants::failed_copies_show_nothing",
            failed_copies_show_nothing,
        ),
        trial(
            "tenants::next_vm_after_a_killed_one",
            next_vm_after_a_killed_one,
        ),
        trial(
            "tenants::next_boot_after_a_hard_reset",
            next_boot_after_a_hard_reset,
        ),
    ];
    trials.extend(tenants::NAMES.map(|name| case_trial("tenants", name, cases)));
    libtest_mimic::run(&arguments, trials).exit();
}

/// A run of a script with this daemon, of which little memory has to be looked at.
fn run(daemon: &Daemon, script: &str) -> Result<hmm_e2e::Tool> {
    Ok(vm(&["run", "--append", "init_on_alloc=0"])?
        .with(daemon.options())
        .with(programs(&["hmm-hold"])?)
        .with(["--", "sh", "-c", &format!("{NOT_CLEARED}\n{script}")]))
}

/// One boot for the ways in which a process gives memory up.
fn cases() -> Result<&'static [Case]> {
    static BOOT: Shared<Vec<Case>> = Shared::new();
    let boot = || {
        let daemon = Daemon::small(&[])?;
        let run = run(&daemon, "exec hmm-stress tenants --json")?.finish()?;
        check(run.status() <= 1, || run.errors())?;
        Ok(Told::by(&run)?.cases)
    };
    shared(&BOOT, boot).map(Vec::as_slice)
}

/// Shell commands that leave secrets on the device, in a process that waits.
fn hold() -> String {
    format!(
        "rm -f {READY} {GO}
         hmm-hold 2048 {READY} {GO} & holder=$!
         while [ ! -e {READY} ]; do kill -0 $holder || exit 91; sleep 0.05; done"
    )
}

/// The driver is unloaded, which brings pages home, and loaded again; and it lets go of the
/// device, which it resets, and takes it again. Each time before and after their process ends.
fn drivers_that_come_and_go() -> Result {
    let hold = hold();
    let script = format!(
        "cd /sys/bus/virtio/drivers/virtio_hmm; device=$(echo virtio*[0-9]); cd
         for end in before after; do
             {hold}
             [ $end = after ] || {{ kill -9 $holder; wait $holder; }}
             rmmod virtio_hmm && insmod {MODULE_PATH} || exit 92
             {LOOK} || exit 93
             touch {GO}; wait $holder; {LOOK} || exit 94

             {hold}
             [ $end = after ] || {{ kill -9 $holder; wait $holder; }}
             echo $device > /sys/bus/virtio/drivers/virtio_hmm/unbind || exit 95
             echo $device > /sys/bus/virtio/drivers/virtio_hmm/bind || exit 96
             {LOOK} || exit 97
             touch {GO}; wait $holder; {LOOK} || exit 98
         done"
    );
    let daemon = Daemon::small(&[])?;
    run(&daemon, &script)?.finish()?.expect_status(0)
}

/// Has a machine that is slow for a moment not break the device.
const PATIENT: &str = "echo 60000 > /sys/module/virtio_hmm/parameters/timeout_ms || exit 99";

/// Copies fail in part, in any direction, and frames lose their contents: pages may be lost, or
/// stay where they are, but nobody sees what others had there.
fn failed_copies_show_nothing() -> Result {
    let mut options = vec!["--inject-seed", "20171"];
    for rule in [
        "error=3,probability=0.2",
        "short,probability=0.1",
        "status=invalid,probability=0.05",
        "poison,probability=0.02",
    ] {
        options.extend(["--inject", rule]);
    }
    let daemon = Daemon::small(&options)?;
    let script = format!("{PATIENT}; exec hmm-stress tenants --json");
    let run = run(&daemon, &script)?.finish()?;
    check(run.status() <= 1, || run.errors())?;
    let told = Told::by(&run)?;
    let all = told.cases.len() == tenants::NAMES.len();
    check(all && told.summary.mismatches == 0, || format!("{told:#?}"))?;
    let counters = daemon.counters()?;
    for operation in [counters.to_device, counters.from_device, counters.fill] {
        check(operation.errors > 0, || format!("{counters:?}"))?;
    }
    Ok(())
}

/// Shell commands that leave secrets on the device, and have others copy to and from it for ever.
fn stress() -> String {
    hold() + "\nhmm-stress run random-access --duration 600s --size 2M >&2 & sleep 1"
}

/// A machine is killed while its secrets are on the device and copies are under way.
fn next_vm_after_a_killed_one() -> Result {
    let daemon = Daemon::small(&[])?;
    let first = stress() + "\necho held; sleep 600";
    let mut first = run(&daemon, &first)?.launch()?;
    first.wait_for_line("held")?;
    check(daemon.memory_holds(HELD)?, || {
        "the first VM's secrets never were on the device".into()
    })?;
    first.kill("qemu-system", Signal::KILL)?;
    first.finish()?.expect_status(125)?;
    run(&daemon, LOOK)?.finish()?.expect_status(0)
}

/// A machine is reset in the same state: it finds the same device, in the middle of copies, and
/// RAM and device memory as they were.
fn next_boot_after_a_hard_reset() -> Result {
    let stress = stress();
    let script = format!(
        "cd /sys/kernel/debug/virtio_hmm/hmm0 || exit 92
         if grep -q '^to_device_requests 0$' device_counters; then
             cd; {stress}
             hmm-host reset; exit 93
         fi
         cd; {LOOK} || exit 94
         hmm-stress run random-access --duration 2s --size 8M >&2 && echo again"
    );
    let run = vm(&["run", "--append", "init_on_alloc=0", "--counters"])?
        .with(["--device-memory", "16M"])
        .with(programs(&["hmm-hold"])?)
        .with(["--", "sh", "-c", &format!("{NOT_CLEARED}\n{script}")])
        .finish()?;
    run.expect_status(0)?;
    run.expect_error("hmm0 is not compared: ")?;
    check(run.text() == "again\n", || run.text())
}
