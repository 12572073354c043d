//! Tests that boot VMs. `cargo vm test` runs them; plain `cargo test` lists them as ignored.

#![allow(
    missing_docs,
    reason = "the names of the tests say what they are about"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hmm_e2e::cases::{Shared, Told, case_trial, shared};
use hmm_e2e::{Daemon, Failure, Result, Running, Tool, check, programs, trial, vm, wait_until};
use hmm_hold::HELD;
use hmm_vm::daemon::{Counted, Counters};
use hmm_vm::initramfs::MODULE_PATH;
use hmm_vm::reconcile::sides;
use hmm_vm::testing::MODULES_VARIABLE;
use libtest_mimic::Arguments;
use rustix::process::{Signal, test_kill_process};

/// Where `hmm-hold` writes in the guest that its pages are on the device, and waits to go on.
const READY: &str = "/tmp/ready";
const GO: &str = "/tmp/go";

fn main() {
    let mut arguments = Arguments::from_args();
    // Each boots a machine with as many CPUs as this one has.
    arguments.test_threads.get_or_insert(1);
    let mut trials = vec![
        trial("exit_status_passes_through", exit_status_passes_through),
        trial(
            "signal_of_the_command_becomes_128_and_its_number",
            signal_becomes_a_status,
        ),
        trial("missing_command_is_127", missing_command_is_127),
        trial("output_is_byte_clean_both_ways", output_is_byte_clean),
        trial(
            "boot_reads_commands_from_a_pipe",
            boot_reads_commands_from_a_pipe,
        ),
        trial(
            "boot_on_a_terminal_is_a_shell",
            boot_on_a_terminal_is_a_shell,
        ),
        trial("top_shows_the_device_until_q", top_shows_the_device),
        trial("a_killed_top_gives_the_terminal_back", killed_top),
        trial("ctrl_c_in_top_ends_the_run", ctrl_c_in_top),
        trial("top_without_a_terminal_is_refused", top_is_refused),
        trial(
            "driver_unload_brings_pages_home",
            driver_unload_brings_pages_home,
        ),
        trial("swapped_pages_stay_in_swap", swapped_pages_stay_in_swap),
        trial("model_checker_passes", model_checker_passes),
        trial("tracepoints_tell_what_the_driver_does", tracepoints_tell),
        trial("killed_daemon_ends_the_run", killed_daemon_ends_the_run),
        trial("killed_daemon_ends_the_demo", killed_daemon_ends_the_demo),
        trial(
            "dead_device_is_sigbus_for_its_pages_only",
            dead_device_is_sigbus,
        ),
        trial("lost_pages_outlive_an_unbound_device", lost_pages_outlive),
        trial("guest_panic_is_found", guest_panic_is_found),
        trial("guest_warning_is_found", guest_warning_is_found),
        trial("silent_guest_is_ended", silent_guest_is_ended),
        trial("timeout_ends_the_run", timeout_ends_the_run),
        trial("ctrl_c_leaves_nothing_behind", ctrl_c_leaves_nothing_behind),
        trial(
            "killed_tool_leaves_no_process",
            killed_tool_leaves_no_process,
        ),
        trial(
            "next_vm_never_sees_the_last_ones_bytes",
            next_vm_never_sees_bytes,
        ),
        trial("demo_reconciles_and_the_second_makes_nothing", demo_twice),
        trial("stress_takes_a_turn_and_leaves_nothing_behind", stress_turn),
        trial("host_counters_reconcile_after_contract_tests", || {
            reconciles(contract()?)
        }),
        trial("host_counters_reconcile_after_neighbours", || {
            reconciles(neighbours()?)
        }),
        trial("host_counters_reconcile_after_stress", || {
            reconciles(stress()?)
        }),
    ];
    for name in hmm_stress::contract::NAMES {
        trials.push(case_trial("contract", name, || Ok(&contract()?.told.cases)));
    }
    for name in hmm_stress::neighbours::NAMES {
        trials.push(case_trial("neighbours", name, || {
            Ok(&neighbours()?.told.cases)
        }));
    }
    for name in hmm_stress::scenario::NAMES {
        trials.push(case_trial("stress", name, || Ok(&stress()?.told.cases)));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn exit_status_passes_through() -> Result {
    let run = vm(&["run", "--", "sh", "-c", "exit 42"])?.finish()?;
    run.expect_status(42)?;
    check(run.left_over == 0, || {
        format!("{} files are left over", run.left_over)
    })
}

fn signal_becomes_a_status() -> Result {
    vm(&["run", "--", "sh", "-c", "kill -9 $$"])?
        .finish()?
        .expect_status(137)
}

fn missing_command_is_127() -> Result {
    let run = vm(&["run", "--", "no-such-program"])?.finish()?;
    run.expect_status(127)?;
    run.expect_error("no-such-program")
}

fn output_is_byte_clean() -> Result {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("every byte");
    let bytes: Vec<u8> = (0..75_000u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    fs::write(&file, &bytes)?;
    let script = directory.path().join("script");
    fs::write(
        &script,
        "#!/bin/sh\ncat 'every byte'; cat; printf 'err\\r\\n\\000' >&2\n",
    )?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;

    let input: Vec<u8> = bytes.iter().rev().copied().collect();
    let run = vm(&["run", "--with"])?
        .with([&file])
        .with([PathBuf::from("--with"), script])
        .with(["--", "./script"])
        .finish_with_input(&input)?;
    run.expect_status(0)?;
    check(run.stdout() == [bytes, input].concat(), || {
        "standard output differs".into()
    })?;
    run.expect_error("err\r\n\0")
}

fn boot_reads_commands_from_a_pipe() -> Result {
    let run =
        vm(&["boot"])?.finish_with_input(b"echo kernel $(uname -s)\nls /dev/hmm0\nexit 3\n")?;
    run.expect_status(3)?;
    check(run.text() == "kernel Linux\n/dev/hmm0\n", || {
        format!("{:?}", run.text())
    })
}

fn boot_on_a_terminal_is_a_shell() -> Result {
    let mut terminal = vm(&["boot"])?.on_a_terminal()?;
    terminal.shows("#")?;
    terminal.press("tty; echo $((6 * 7))\r")?;
    terminal.shows("/dev/ttyS0\n42\n")?;
    terminal.press("exit 9\r")?;
    terminal.end(9)
}

fn top_shows_the_device() -> Result {
    let script = "echo early; hmm-stress run ping-pong --duration 15s; echo late; exit 9";
    let command = ["run", "--top", "--", "sh", "-c", script];
    let mut terminal = vm(&command)?.on_a_terminal()?;
    // Below its name is what moves to the device now.
    terminal.wait_for(|screen| {
        let text = screen.contents();
        let mut lines = text
            .lines()
            .skip_while(|line| !line.starts_with("to device"));
        let now = lines.nth(1).unwrap_or_default();
        screen.alternate_screen() && now.contains("MB/s") && !text.contains("early")
    })?;
    terminal.press("q")?;
    terminal.wait_for(|screen| !screen.alternate_screen())?;
    terminal.shows("early\nseed")?;
    terminal.shows("\npass ping-pong")?;
    terminal.shows("\nlate\n")?;
    terminal.end(9)
}

fn killed_top() -> Result {
    let mut terminal =
        vm(&["run", "--top", "--", "sh", "-c", "echo early; sleep 60"])?.on_a_terminal()?;
    terminal.wait_for(vt100::Screen::alternate_screen)?;
    terminal.kill("hmm-top")?;
    terminal.shows("early")?;
    terminal.press("\x03")?;
    terminal.shows("ended by signal 2")?;
    terminal.end(130)
}

fn ctrl_c_in_top() -> Result {
    let options = ["--seed", "1", "--devices", "2"];
    let mut terminal = vm(&["demo", "--top"])?.with(options).on_a_terminal()?;
    terminal.shows(" 1 of 2, ")?;
    terminal.press("\t")?;
    terminal.shows(" 2 of 2, ")?;
    terminal.press("\x03")?;
    terminal.shows("ended by signal 2")?;
    terminal.end(130)
}

fn top_is_refused() -> Result {
    for command in [
        &["run", "--top", "--", "true"][..],
        &["demo", "--top"],
        &["stress", "--top"],
    ] {
        let run = vm(command)?.finish()?;
        run.expect_status(125)?;
        let text = "virtio-hmm: --top needs a terminal as standard input and output\n";
        check(run.errors() == text, || run.errors())?;
    }
    for command in [
        &["run", "--top", "--gdb", "--", "true"][..],
        &["demo", "--top", "--json"],
        &["boot", "--top"],
    ] {
        let run = vm(command)?.finish()?;
        run.expect_status(2)?;
        run.expect_error("'--top'")?;
    }
    Ok(())
}

/// Shell commands that start `hmm-hold` and wait until its pages are on the device.
fn hold_script(rest: &str) -> String {
    format!(
        "hmm-hold 4096 {READY} {GO} & holder=$!
         while [ ! -e {READY} ]; do kill -0 $holder || exit 90; sleep 0.05; done
         {rest}"
    )
}

fn driver_unload_brings_pages_home() -> Result {
    let script = hold_script(&format!(
        "rmmod virtio_hmm || exit 91
         [ ! -e /dev/hmm0 ] || exit 92
         touch {GO}; wait $holder || exit 93
         insmod {MODULE_PATH} || exit 94
         hmm-stress contract s6_whole_range_never_touched || exit 95"
    ));
    let run = vm(&["run"])?
        .with(programs(&["hmm-hold"])?)
        .with(["--", "sh", "-c", &script])
        .finish()?;
    run.expect_status(0)?;
    check(
        run.text().contains("all 4096 pages are as they were"),
        || run.text(),
    )
}

fn swapped_pages_stay_in_swap() -> Result {
    passes_with_swap("hmm-stress run swapped --duration 3s --json")
}

fn model_checker_passes() -> Result {
    passes_with_swap("hmm-stress model --steps 500 --duration 10s --json")
}

fn passes_with_swap(command: &str) -> Result {
    let run = vm(&["run"])?
        .with(swap_modules()?)
        .with(["--", "sh", "-c", &with_swap(command)])
        .finish()?;
    run.expect_status(0)?;
    check(run.text().contains(r#""result":"pass""#), || run.text())
}

/// Options that bring zram into the guest, which Debian's kernel has as a module.
fn swap_modules() -> Result<Vec<PathBuf>> {
    with_modules(&[
        "lib/lz4/lz4hc_compress.ko.xz",
        "drivers/block/zram/zram.ko.xz",
    ])
}

/// Options that bring modules of Debian's kernel into the guest. Other kernels may have
/// them built in.
fn with_modules(names: &[&str]) -> Result<Vec<PathBuf>> {
    let kernel = PathBuf::from(std::env::var(MODULES_VARIABLE)?);
    let options = names
        .iter()
        .map(|name| kernel.join(name))
        .filter(|module| module.exists())
        .flat_map(|module| ["--with".into(), module]);
    Ok(options.collect())
}

/// A script that swaps to zram and runs `command`.
fn with_swap(command: &str) -> String {
    format!(
        "for module in lz4hc_compress zram; do
            [ -e $module.ko.xz ] || continue
            unxz $module.ko.xz && insmod $module.ko || exit 91
        done
        echo 128M > /sys/block/zram0/disksize
        mkswap /dev/zram0 >&2 && swapon /dev/zram0 || exit 92
        {command}"
    )
}

fn tracepoints_tell() -> Result {
    let script = "cd /sys/kernel/tracing || exit 91
        echo 1 > events/virtio_hmm/enable || exit 92
        hmm-stress contract s6_every_other_page_touched >&2 || exit 93
        cat trace";
    let run = vm(&["run", "--", "sh", "-c", script])?.finish()?;
    run.expect_status(0)?;
    for event in [
        "vhmm_migrate_begin: hmm0 direction=to_device trigger=ioctl start=0x",
        "vhmm_migrate_end: hmm0 direction=to_device trigger=ioctl start=0x",
        "vhmm_migration: hmm0 direction=to_device trigger=ioctl start=0x",
        "vhmm_cpu_fault: hmm0 direction=to_system trigger=cpu_fault address=0x",
        "vhmm_copy_submit: hmm0 cookie=",
        "vhmm_copy_complete: hmm0 cookie=",
        "op=0x3 status=0",
    ] {
        check(run.text().contains(event), || {
            format!("no {event:?} in the trace")
        })?;
    }
    Ok(())
}

fn killed_daemon_ends_the_run() -> Result {
    let mut run = vm(&["run", "--", "sh", "-c", "echo up; sleep 600"])?.launch()?;
    run.wait_for_line("up")?;
    expect_quick_end(run)
}

fn killed_daemon_ends_the_demo() -> Result {
    let run = vm(&["demo", "--json"])?.launch()?;
    wait_until("the stress runs", || {
        let controls = run.controls().unwrap_or_default();
        controls
            .iter()
            .filter_map(|control| hmm_vm::daemon::counters(control).ok())
            .any(|counters| counters.to_device.frames > 1000)
    })?;
    expect_quick_end(run)
}

fn expect_quick_end(run: Running) -> Result {
    let started = Instant::now();
    run.kill("vhost-device-hmm", Signal::KILL)?;
    let run = run.finish()?;
    run.expect_status(125)?;
    run.expect_error("the device daemon was killed by signal 9")?;
    check(run.left_over == 0, || {
        format!("{} files are left over", run.left_over)
    })?;
    // Far below every limit of the tool: it was told of the death, not of a silence.
    check(started.elapsed() < Duration::from_secs(20), || {
        "it took a limit to end".into()
    })
}

/// What `script` prints after `held` and the death of the device. It then has a line to read.
fn text_with_dying_device(script: &str) -> Result<String> {
    let mut run = vm(&["run", "--device-may-die"])?
        .with(programs(&["hmm-hold"])?)
        .with(["--", "sh", "-c", script])
        .listening()
        .launch()?;
    run.wait_for_line("held")?;
    run.kill("vhost-device-hmm", Signal::KILL)?;
    run.say(b"\n")?;
    let run = run.finish()?;
    run.expect_status(0)?;
    Ok(run.text())
}

fn dead_device_is_sigbus() -> Result {
    let script = hold_script(&format!(
        "echo held; read line; touch {GO}
         wait $holder; echo holder $?
         head -c 1000000 /dev/zero | wc -c
         hmm-stress contract s6_whole_range_never_touched >/dev/null 2>&1 && exit 96
         echo others go on"
    ));
    let text = text_with_dying_device(&script)?;
    // 135 is 128 and SIGBUS.
    check(text == "holder 135\n1000000\nothers go on\n", || text)
}

/// The driver cannot go while a process maps lost pages, but its device can.
fn lost_pages_outlive() -> Result {
    let script = hold_script(&format!(
        "echo held; read line
         # Somebody has to notice.
         hmm-stress contract s6_single_hole >/dev/null 2>&1 && exit 96
         rmmod virtio_hmm 2>/dev/null && exit 97
         cd /sys/bus/virtio/drivers/virtio_hmm
         echo virtio*[0-9] > unbind || exit 98
         [ ! -e /dev/hmm0 ] || exit 92
         touch {GO}; wait $holder; echo holder $?
         n=0; until rmmod virtio_hmm 2>/dev/null; do
             n=$((n + 1)); [ $n -lt 100 ] || exit 99; sleep 0.1
         done
         echo unloaded"
    ));
    let text = text_with_dying_device(&script)?;
    check(text == "holder 135\nunloaded\n", || text)
}

fn guest_panic_is_found() -> Result {
    let run = vm(&["run", "--", "sh", "-c", "echo c > /proc/sysrq-trigger"])?.finish()?;
    run.expect_status(123)?;
    run.expect_error("Kernel panic")?;
    run.expect_error("console.log")
}

fn guest_warning_is_found() -> Result {
    let warn = "echo '<4>WARNING: CPU: 0 PID: 1 at a test' > /dev/kmsg; sleep 600";
    let run = vm(&["run", "--", "sh", "-c", warn])?.finish()?;
    run.expect_status(123)?;
    run.expect_error("WARNING: CPU: 0 PID: 1 at a test")
}

fn silent_guest_is_ended() -> Result {
    let mut run = vm(&[
        "run",
        "--silence",
        "8s",
        "--",
        "sh",
        "-c",
        "echo up; sleep 600",
    ])?
    .launch()?;
    run.wait_for_line("up")?;
    run.kill("qemu-system", Signal::STOP)?;
    let run = run.finish()?;
    run.expect_status(124)?;
    run.expect_error("silent for 8 s")
}

fn timeout_ends_the_run() -> Result {
    let run = vm(&["run", "--timeout", "12s", "--", "sleep", "600"])?.finish()?;
    run.expect_status(124)?;
    run.expect_error("--timeout 12s")
}

fn ctrl_c_leaves_nothing_behind() -> Result {
    let mounts = || fs::read_to_string("/proc/self/mounts");
    let before = mounts()?;
    let mut run = vm(&["run", "--", "sh", "-c", "echo up; sleep 600"])?.launch()?;
    run.wait_for_line("up")?;
    let processes = [run.child("vhost-device-hmm")?, run.child("qemu-system")?];
    run.signal(Signal::INT)?;
    let run = run.finish()?;
    run.expect_status(130)?;
    check(run.left_over == 0, || {
        format!("{} files are left over", run.left_over)
    })?;
    check(mounts()? == before, || "a mount is left over".into())?;
    for process in processes {
        check(test_kill_process(process).is_err(), || {
            format!("{process:?} is left over")
        })?;
    }
    Ok(())
}

fn killed_tool_leaves_no_process() -> Result {
    let mut run = vm(&["run", "--", "sh", "-c", "echo up; sleep 600"])?.launch()?;
    run.wait_for_line("up")?;
    let processes = [run.child("vhost-device-hmm")?, run.child("qemu-system")?];
    run.signal(Signal::KILL)?;
    run.finish()?;
    wait_until("the daemon and QEMU end", || {
        processes
            .iter()
            .all(|&process| test_kill_process(process).is_err())
    })
}

fn next_vm_never_sees_bytes() -> Result {
    let daemon = Daemon::start()?;
    let machine = |script: &str| -> Result<Running> {
        vm(&["run"])?
            .with(daemon.options())
            .with(programs(&["hmm-hold"])?)
            .with(["--", "sh", "-c", script])
            .listening()
            .launch()
    };
    let mut first = machine(&hold_script("echo held; read line"))?;
    first.wait_for_line("held")?;
    check(daemon.memory_holds(HELD)?, || {
        "the first VM's bytes never were on the device".into()
    })?;
    first.say(b"\n")?;
    first.finish()?.expect_status(0)?;

    let mut second = machine("echo up; read line")?;
    second.wait_for_line("up")?;
    check(!daemon.memory_holds(HELD)?, || {
        "the second VM's device has the first's bytes".into()
    })?;
    check(daemon.counters()? == Counters::default(), || {
        "counters of another VM".into()
    })?;
    second.say(b"\n")?;
    second.finish()?.expect_status(0)
}

fn demo_twice() -> Result {
    vm(&["demo"])?.finish()?.expect_status(0)?;
    let run = vm(&["demo", "--json", "--seed", "7"])?.finish()?;
    run.expect_status(0)?;
    for word in ["making", "building", "downloading", "unpacking"] {
        check(!run.errors().contains(word), || run.errors())?;
    }
    let result: serde_json::Value = serde_json::from_slice(run.stdout())?;
    let number = |name: &str| result.get(name).and_then(serde_json::Value::as_u64);
    for name in ["pages_to_device", "pages_to_system"] {
        check(number(name) > Some(100_000), || {
            format!("{name}: {:?}", number(name))
        })?;
    }
    for name in [
        "cpu_faults",
        "holes_filled",
        "guest_bytes_to_device",
        "guest_bytes_to_system",
    ] {
        check(number(name) > Some(0), || {
            format!("{name}: {:?}", number(name))
        })?;
    }
    check(number("seed") == Some(7), || "another seed".into())?;
    check(number("mismatches") == Some(0), || "mismatches".into())?;
    let same = number("guest_bytes_to_device") == number("host_bytes_to_device")
        && number("guest_bytes_to_system") == number("host_bytes_to_system");
    check(
        same && result.get("reconciled") == Some(&true.into()),
        || "not reconciled".into(),
    )?;
    for name in ["accelerator", "kernel", "qemu"] {
        let text = result.get(name).and_then(serde_json::Value::as_str);
        check(text.is_some_and(|text| !text.is_empty()), || {
            format!("no {name}")
        })?;
    }
    check(result.get("seconds").is_some(), || "no seconds".into())
}

fn stress_turn() -> Result {
    let run = vm(&[
        "stress",
        "--json",
        "--devices",
        "2",
        "--device-memory",
        "16M",
    ])?
    .with(["--turn", "random-access", "--seed", "7"])
    .finish()?;
    run.expect_status(0)?;
    run.expect_error("random-access    seed 7          1 passed")?;
    let result: serde_json::Value = serde_json::from_slice(run.stdout())?;
    for (name, wanted) in [
        ("seed", 7.into()),
        ("turns", 1.into()),
        ("passed", 1.into()),
        ("mismatches", 0.into()),
        ("frames_lost", 0.into()),
        ("reconciled", true.into()),
        ("unloaded", true.into()),
    ] {
        check(result.get(name) == Some(&wanted), || format!("{result:#}"))?;
    }
    Ok(())
}

/// One boot whose results several tests look at.
#[derive(Debug)]
struct Boot {
    told: Told,
    host: Counted,
    /// The tool's own failure, such as a complaint of the guest's kernel.
    failure: Option<String>,
}

fn contract() -> Result<&'static Boot> {
    static BOOT: Shared<Boot> = Shared::new();
    shared(&BOOT, || {
        boot_once(vm(&["run"])?, &["hmm-stress", "contract", "--json"])
    })
}

/// With a block device that keeps what is written to it and completes after 100 ms.
const WITH_DISK: &str = "if [ -e null_blk.ko.xz ]; then
        unxz configfs.ko.xz null_blk.ko.xz && insmod configfs.ko || exit 93
        insmod null_blk.ko nr_devices=1 gb=1 memory_backed=1 irqmode=2 \
            completion_nsec=100000000 || exit 94
    fi
    hmm-stress neighbours --json";

fn neighbours() -> Result<&'static Boot> {
    static BOOT: Shared<Boot> = Shared::new();
    shared(&BOOT, || {
        let disk = with_modules(&[
            "fs/configfs/configfs.ko.xz",
            "drivers/block/null_blk/null_blk.ko.xz",
        ])?;
        // Two nodes, and memory that can go offline.
        let tool = vm(&["run", "--profile", "numa"])?;
        let tool = tool.with(swap_modules()?).with(disk);
        boot_once(tool, &["sh", "-c", &with_swap(WITH_DISK)])
    })
}

fn stress() -> Result<&'static Boot> {
    static BOOT: Shared<Boot> = Shared::new();
    shared(&BOOT, || {
        boot_once(
            vm(&["run"])?,
            &["hmm-stress", "run", "--json", "--duration", "30s"],
        )
    })
}

fn boot_once(tool: Tool, command: &[&str]) -> Result<Boot> {
    let daemon = Daemon::start()?;
    let run = tool
        .with(daemon.options())
        .with(["--"])
        .with(command)
        .finish()?;
    Ok(Boot {
        told: Told::by(&run)?,
        host: daemon.counted()?,
        failure: (run.status() > 1).then(|| run.errors()),
    })
}

/// What driver and daemon counted is the same, and the guest's kernel had nothing to say.
fn reconciles(boot: &Boot) -> Result {
    if let Some(failure) = &boot.failure {
        return Err(Failure(failure.clone()));
    }
    let driver = |name: &str| {
        let change = boot.told.summary.driver.get(name).copied();
        change
            .and_then(|change| u64::try_from(change).ok())
            .unwrap_or(0)
    };
    let sides = sides(driver, &boot.host);
    check(
        sides
            .values()
            .all(|sides| sides.agree() && sides.host.frames > 0),
        || format!("{sides:#?}"),
    )
}
