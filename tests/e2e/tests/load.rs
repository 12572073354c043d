//! More of everything than usual, and less of what is needed.

#![allow(
    missing_docs,
    reason = "the names of the tests say what they are about"
)]

use std::fs;
use std::os::unix::fs::MetadataExt;

use hmm_conformance::driver::COPY;
use hmm_e2e::{Failure, Result, Running, ask, check, device_memory, skippable_trial, trial, vm};
use hmm_vm::paths::Cache;
use libtest_mimic::Arguments;
use serde_json::{Value, json};

/// Most that a run may use of device memory and of the daemon's own, of 18 GiB that there are.
const USED: u64 = 2 << 30;

fn main() {
    let mut arguments = Arguments::from_args();
    // Each boots a machine with as many CPUs as this one has, or more.
    arguments.test_threads.get_or_insert(1);
    let trials = vec![
        trial(
            "load::sixteen_queues_eight_cpus_and_16_gib",
            sixteen_queues_eight_cpus_and_16_gib,
        ),
        skippable_trial("load::a_full_disk_hides_no_complaint", full_log),
        skippable_trial("load::a_full_disk_spares_the_last_report", full_report),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}

fn sixteen_queues_eight_cpus_and_16_gib() -> Result {
    let script = "hmm-stress run random-access fault-storm processes \
            --threads 8 --duration 3s >&2 || exit
        cat /sys/kernel/debug/virtio_hmm/hmm0/counters
        echo done; read line";
    let mut run = vm(&["run", "--cpus", "8", "--copy-queues", "16"])?
        .with(["--device-memory", "16G", "--memory", "2G"])
        .with(["--", "sh", "-c", script])
        .listening()
        .launch()?;
    run.wait_for_line("done")?;
    let (memory, own) = used(&run)?;
    check(memory > 0 && memory < USED && own < USED, || {
        format!("{memory} bytes of device memory in use, at most {own} of the daemon's")
    })?;
    let unused = unused_queues(&run)?;
    check(unused.is_empty(), || {
        format!("queues {unused:?} had no request")
    })?;
    run.say(b"\n")?;
    run.finish()?.expect_status(0)
}

/// The copy queues on which there was no request.
fn unused_queues(run: &Running) -> Result<Vec<usize>> {
    let controls = run.controls()?;
    let control = controls
        .first()
        .ok_or_else(|| Failure("no device".into()))?;
    let reply = ask(control, &json!({ "command": "statistics" }))?;
    let queues = reply.pointer("/queues").and_then(Value::as_array);
    let queues = queues.ok_or_else(|| Failure(reply.to_string()))?;
    let first = usize::from(COPY);
    check(queues.len() == first + 16, || reply.to_string())?;
    let used = |queue: &Value| {
        let operations = queue.pointer("/operations").and_then(Value::as_object);
        operations.is_some_and(|operations| !operations.is_empty())
    };
    let copy_queues = queues.iter().enumerate().skip(first);
    let unused = copy_queues.filter(|(_, queue)| !used(queue));
    Ok(unused.map(|(number, _)| number).collect())
}

/// How much is in use of device memory, and the most memory that the daemon has had, in bytes.
fn used(run: &Running) -> Result<(u64, u64)> {
    let pid = run.child("vhost-device-hmm")?.as_raw_nonzero().get();
    let memory = device_memory(pid.unsigned_abs())?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let own = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"))
        .ok_or_else(|| Failure(status.clone()))?;
    Ok((
        fs::metadata(memory)?.blocks() * 512,
        own.parse::<u64>()? * 1024,
    ))
}

/// The guest's log fills the disk on which it is kept, and then the kernel complains.
fn full_log() -> Result<Option<String>> {
    let script = "for line in $(seq 600); do
            echo \"line $line of a log that is too long for its disk\" > /dev/kmsg
        done
        echo '<4>WARNING: CPU: 0 PID: 1 at a test' > /dev/kmsg; sleep 600";
    let run = vm(&["run", "--", "sh", "-c", script])?;
    let run = match run.on_full_disks(&[&Cache::locate()?.logs()])? {
        Ok(run) => run.finish()?,
        Err(reason) => return Ok(Some(reason)),
    };
    run.expect_status(123)?;
    run.expect_error("WARNING: CPU: 0 PID: 1 at a test")?;
    run.expect_error("the guest's log is not kept any more: No space left on device")?;
    Ok(None)
}

/// The report does not fit, and takes the place of no other.
fn full_report() -> Result<Option<String>> {
    let directory = tempfile::tempdir()?;
    let run = vm(&["stress", "--turn", "exit-with-pages", "--devices", "1"])?
        .with(["--report".as_ref(), directory.path()]);
    let run = match run.on_full_disks(&[directory.path()])? {
        Ok(run) => run.finish()?,
        Err(reason) => return Ok(Some(reason)),
    };
    check(run.text().contains("\npassed: "), || run.text())?;
    run.expect_status(125)?;
    run.expect_error("No space left on device")?;
    Ok(None)
}
