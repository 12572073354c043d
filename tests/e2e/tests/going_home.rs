//! Pages come home before the device goes, and a device that is lost takes only its own pages
//! along: unplugged, dead, suspended, shut down, or left behind by kexec.

#![allow(
    missing_docs,
    reason = "the names of the tests say what they are about"
)]

use std::env;

use hmm_e2e::{Daemon, Result, check, programs, skippable_trial, trial, vm};
use hmm_vm::testing::IMAGE_VARIABLE;
use libtest_mimic::Arguments;

/// `hold NAME DEVICE` starts `hmm-hold` and waits until its pages are on the device; `touch_held
/// NAME` has it touch them, and says how it ended.
const SHELL: &str = r#"
hold() {
    hmm-hold 4096 /tmp/ready$1 /tmp/go$1 $2 & eval holder$1=$!
    until [ -e /tmp/ready$1 ]; do kill -0 $! || exit 90; sleep 0.05; done
}
touch_held() {
    touch /tmp/go$1; eval wait \$holder$1; echo "$1: status $?"
}
appears() {
    n=0; until [ -e $1 ]; do n=$((n + 1)); [ $n -lt 600 ] || exit 91; sleep 0.05; done
}
vanishes() {
    n=0; while [ -e $1 ]; do n=$((n + 1)); [ $n -lt 600 ] || exit 92; sleep 0.05; done
}
works() {
    hmm-stress contract s6_every_other_page_touched --device $1 >&2 || exit 93
}
counter() { sed -n "s/^$1 //p" /sys/kernel/debug/virtio_hmm/hmm0/counters; }
log() { dmesg | grep "$1" | sed 's/.*\(hmm[0-9]\)/\1/'; }
"#;

fn main() {
    let mut arguments = Arguments::from_args();
    // Each boots a machine with as many CPUs as this one has.
    arguments.test_threads.get_or_insert(1);
    let trials = vec![
        trial("unplugged_device_gives_its_pages_back", unplugged),
        trial("dead_devices_can_be_replaced", dead_devices),
        trial("function_reset_leaves_the_pages", function_reset),
        skippable_trial("pages_come_home_before_sleep_and_reboot", sleep),
        skippable_trial("pages_come_home_before_kexec_and_power_off", kexec),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}

/// What a script prints in a guest with two devices.
fn text(options: &[&str], script: &str) -> Result<String> {
    let run = vm(&["run", "--devices", "2", "--silence", "170s", "--counters"])?
        .with(options)
        .with(programs(&["hmm-hold"])?)
        .with(["--", "sh", "-c", &format!("{SHELL}{script}")])
        .finish()?;
    run.expect_status(0)?;
    // It was unplugged, or its driver unloaded.
    run.expect_error("hmm0 is not compared: ")?;
    Ok(run.text())
}

fn unplugged() -> Result {
    let text = text(
        &[],
        "hold one /dev/hmm0
        hold two /dev/hmm1
        hmm-host unplug 0 || exit 95
        vanishes /dev/hmm0
        [ ! -e /sys/kernel/debug/virtio_hmm/hmm0 ] || exit 96
        works /dev/hmm1
        touch_held one
        hmm-host plug 0 || exit 97
        appears /dev/hmm0
        works /dev/hmm0
        hold three /dev/hmm0
        touch_held two
        touch_held three
        rmmod virtio_hmm && echo unloaded",
    )?;
    let all = "all 4096 pages are as they were";
    let wanted =
        format!("{all}\none: status 0\n{all}\ntwo: status 0\n{all}\nthree: status 0\nunloaded\n");
    check(text == wanted, || text)
}

/// A reset of the PCI function forgets device memory and the virtqueues.
fn function_reset() -> Result {
    let text = text(
        &[],
        "hold one /dev/hmm0
        echo 1 > $(dirname $(readlink -f /sys/class/misc/hmm0/device))/reset || exit 95
        works /dev/hmm0
        touch_held one
        rmmod virtio_hmm && echo unloaded",
    )?;
    let wanted = "all 4096 pages are as they were\none: status 0\nunloaded\n";
    check(text == wanted, || text)
}

/// One whose daemon is gone, and one whose daemon answers nothing for longer than a request
/// may take.
fn dead_devices() -> Result {
    let text = text(
        &["--device-may-die"],
        "echo 1000 > /sys/module/virtio_hmm/parameters/timeout_ms
        hold one /dev/hmm0
        hold two /dev/hmm1
        hmm-host kill 0 || exit 95
        hmm-host unplug 0 || exit 96
        vanishes /dev/hmm0
        works /dev/hmm1
        hmm-host pause 1 5 || exit 97
        touch_held two
        log 'is broken'
        # The lost pages of a process that lives keep the number.
        hmm-host plug 0 || exit 98
        appears /dev/hmm2
        works /dev/hmm2
        touch_held one
        hmm-host unplug 1 || exit 99
        hmm-host plug 1 || exit 100
        n=0; until rmmod virtio_hmm 2>/dev/null; do
            n=$((n + 1)); [ $n -lt 100 ] || exit 101; sleep 0.1
        done
        echo unloaded",
    )?;
    let lost = "a request missed its deadline; 4096 pages that were only in its memory are lost";
    // 135 is 128 and SIGBUS.
    let wanted = format!(
        "two: status 135\nhmm0 is broken: {lost}\nhmm1 is broken: {lost}\none: status 135\nunloaded\n"
    );
    check(text == wanted, || text)
}

/// Frames that came from the device after the guest has printed how many did before.
fn last_frames(daemon: &Daemon, text: &str) -> Result<u64> {
    let before = text
        .lines()
        .filter_map(|line| {
            line.split_once("frames so far: ")?
                .1
                .trim()
                .parse::<u64>()
                .ok()
        })
        .next_back()
        .unwrap_or(u64::MAX);
    Ok(daemon.counters()?.from_device.frames.saturating_sub(before))
}

/// Suspend to RAM, and hibernation up to the image, for which there is no disk. The guest says
/// everything in its kernel's log: after that its ports do not open again, for Linux 7.3 asks the
/// host for their state before it can take the answer.
fn sleep() -> Result<Option<String>> {
    let script = "grep -q mem /sys/power/state && [ -e /sys/power/pm_test ] || exit 77
        say() { echo \"e2e: $*\" > /dev/kmsg; }
        asleep() {
            hold $1 /dev/hmm0
            before=$(counter pages_evacuated)
            echo $2 > /sys/power/pm_test
            echo $3 > /sys/power/state || say $1: no sleep
            evacuated=$(($(counter pages_evacuated) - before))
            [ $evacuated -ge 4096 ] || say $1: only $evacuated came home
            works /dev/hmm0 2>/dev/null
            touch_held $1 > /tmp/end
            say $(cat /tmp/end)
        }
        asleep hibernation_freezer freezer disk
        hmm-host wake || say no wake
        asleep suspend none mem
        asleep hibernation_devices devices disk
        hold last /dev/hmm0
        say frames so far: $(counter from_device_frames)
        # The firmware forgets how to power off when it wakes up.
        reboot -f";
    let daemon = Daemon::start()?;
    let run = vm(&["run", "--bzimage", "--silence", "170s"])?
        .with(daemon.options())
        .with(programs(&["hmm-hold"])?)
        .with(["--", "sh", "-c", &format!("{SHELL}{script}")])
        .finish()?;
    if run.status() == 77 {
        return Ok(Some("this kernel has no suspend or no pm_test".into()));
    }
    run.expect_status(125)?;
    run.expect_error("powered off before its command ended")?;
    let console = run.console()?;
    let said: Vec<&str> = console
        .lines()
        .filter_map(|line| Some(line.split_once("e2e: ")?.1.trim_end()))
        .filter(|line| !line.starts_with("frames"))
        .collect();
    let wanted = ["hibernation_freezer", "suspend", "hibernation_devices"]
        .map(|name| format!("{name}: status 0"));
    check(said == wanted, || format!("{said:#?}\n{console}"))?;
    let frames = last_frames(&daemon, &console)?;
    check(frames >= 4096, || {
        format!("{frames} frames came home before the reboot")
    })?;
    Ok(None)
}

fn kexec() -> Result<Option<String>> {
    let script = "
        if grep -q hmm.again /proc/cmdline; then
            echo second kernel
            works /dev/hmm0
            hold last /dev/hmm0
            echo frames so far: $(counter from_device_frames)
            sleep 1
            poweroff -f
        fi
        mv vmlinuz bzImage /tmp 2>/dev/null
        (cd / && find . -xdev | cpio -o -H newc 2>/dev/null) > /tmp/initramfs
        hold first /dev/hmm0
        hmm-kexec /tmp/[vb]* /tmp/initramfs \"$(cat /proc/cmdline) hmm.again\" || exit 77";
    let daemon = Daemon::start()?;
    let run = vm(&["run", "--silence", "170s"])?
        .with(daemon.options())
        .with(["--with".into(), env::var(IMAGE_VARIABLE)?])
        .with(programs(&["hmm-hold", "hmm-kexec"])?)
        .with(["--", "sh", "-c", &format!("{SHELL}{script}")])
        .finish()?;
    if run.status() == 77 {
        return Ok(Some(run.errors()));
    }
    run.expect_status(125)?;
    run.expect_error("powered off before its command ended")?;
    let text = run.text();
    check(text.contains("second kernel"), || text.clone())?;
    // Those of the first kernel are not among the second's counters either.
    let frames = last_frames(&daemon, &text)?;
    check(frames >= 2 * 4096, || {
        format!("{frames} frames came home before kexec and power off")
    })?;
    Ok(None)
}
