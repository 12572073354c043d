//! A user-mode driver in the guest tests the device against its specification.

#![allow(
    missing_docs,
    reason = "the names of the tests say what they are about"
)]

use hmm_conformance::cases;
use hmm_e2e::cases::{Shared, shared};
use hmm_e2e::ktap::{End, Ends};
use hmm_e2e::{Daemon, Failure, NEEDS_VM, Result, check, trial, vm};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

/// Runs all cases, then looks into the kernel's log and where the device is.
const ALL: &str = "hmm-conformance --fresh --seed 20171 || exit
    ! dmesg | grep 'DMAR:.*fault\\|DMAR: .DMA' || exit 90
    [ -e /sys/bus/pci/drivers/virtio-pci/0000:01:00.0 ] || exit 91";

/// The cases that want a device which nobody has used.
const FRESH: &str = "hmm-conformance --fresh --seed 20171 d17";

fn main() {
    let mut arguments = Arguments::from_args();
    // Each boots a machine with as many CPUs as this one has.
    arguments.test_threads.get_or_insert(1);
    let mut trials = vec![
        trial(
            "conformance::nothing_else_went_wrong",
            nothing_else_went_wrong,
        ),
        trial("conformance::next_vm_finds_an_unused_device", || {
            boot()?.next.clone().map_err(Failure)
        }),
    ];
    trials.extend(cases::all().map(|case| case_trial(case.name)));
    libtest_mimic::run(&arguments, trials).exit();
}

/// A boot whose results several tests look at, and the next one with the same daemon.
#[derive(Debug)]
struct Boot {
    ends: Ends,
    status: i32,
    output: String,
    /// What the daemon wrote to its log.
    log: String,
    /// How the next VM ended.
    next: Result<(), String>,
}

fn boot() -> Result<&'static Boot> {
    static BOOT: Shared<Boot> = Shared::new();
    shared(&BOOT, all_cases)
}

fn all_cases() -> Result<Boot> {
    let daemon = Daemon::start()?;
    let run = vm(&["run", "--profile", "vfio"])?
        .with(daemon.options())
        .with(["--", "sh", "-c", ALL])
        .finish()?;
    Ok(Boot {
        ends: Ends::read(&run.text())?,
        status: run.status(),
        output: run.text() + &run.errors(),
        log: daemon.log()?,
        next: next_vm_finds_an_unused_device(&daemon).map_err(|Failure(text)| text),
    })
}

fn case_trial(name: &'static str) -> Trial {
    let body = move || {
        let boot = boot().map_err(|Failure(text)| text)?;
        match boot.ends.by_name.get(name) {
            Some(End::Passed) => Ok(Completion::Completed),
            Some(End::Skipped(reason)) => Ok(Completion::ignored_with(reason)),
            Some(End::Failed(reason)) => Err(Failed::from(reason)),
            None => Err(Failed::from(format!("it did not run:\n{}", boot.output))),
        }
    };
    Trial::ignorable_test(format!("conformance::{name}"), body)
        .with_kind(NEEDS_VM)
        .with_ignored_flag(true)
}

/// Every case ran, the device's driver has it back, the IOMMU saw no fault, and the daemon has
/// nothing to tell but of the queues that were broken on purpose.
fn nothing_else_went_wrong() -> Result {
    let boot = boot()?;
    check(boot.ends.planned == cases::all().count(), || {
        boot.output.clone()
    })?;
    check(boot.status == 0, || {
        format!("status {}:\n{}", boot.status, boot.output)
    })?;
    let log = &boot.log;
    let expected = |line: &str| {
        let stops = line.contains("ERROR vhost_device_hmm::worker: queue ");
        stops && line.contains(" stops: ")
            || line.contains("ERROR virtio_queue::queue: virtio queue with invalid size: ")
    };
    let complaint = log
        .lines()
        .filter(|line| line.contains(" ERROR ") || line.contains(" WARN "))
        .find(|line| !expected(line));
    check(complaint.is_none(), || format!("{complaint:?} in:\n{log}"))?;
    check(log.contains(" stops: "), || log.clone())
}

/// The daemon that was tested by all cases is as good as new for the next VM.
fn next_vm_finds_an_unused_device(daemon: &Daemon) -> Result {
    vm(&["run", "--profile", "vfio"])?
        .with(daemon.options())
        .with(["--", "sh", "-c", FRESH])
        .finish()?
        .expect_status(0)
}
