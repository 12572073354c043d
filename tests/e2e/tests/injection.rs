//! The driver with a device that goes wrong on purpose: data stays right, or is reported
//! lost, and nothing hangs.

#![allow(
    missing_docs,
    reason = "the names of the tests say what they are about"
)]

use hmm_e2e::cases::Told;
use hmm_e2e::{Daemon, Failure, Result, Running, check, trial, vm};
use hmm_stress::report::Verdict;
use hmm_vm::build::Programs;
use hmm_vm::error::EXIT_COUNTERS;
use hmm_vm::initramfs::MODULE_PATH;
use hmm_vm::reconcile::{Sides, sides};
use libtest_mimic::Arguments;
use serde_json::json;

/// Pages of a region; all of them fit into one request.
const PAGES: u64 = 512;

fn main() {
    let mut arguments = Arguments::from_args();
    // Each boots a machine with as many CPUs as this one has.
    arguments.test_threads.get_or_insert(1);
    let trials = vec![
        trial(
            "late_and_reordered_requests_change_nothing",
            late_and_reordered,
        ),
        trial("errors_never_make_bytes_wrong", errors_never_wrong),
        trial("frames_that_fail_stay_where_they_were", frames_that_fail),
        trial("a_request_never_answered_breaks_the_device", never_answered),
        trial("a_lost_and_a_doubled_request_are_noticed", lost_and_doubled),
        trial("torture_adds_up_what_it_tried", torture),
        trial("torture_refuses_what_it_cannot_do", torture_refuses),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}

/// A run of all of `hmm-stress` on a device with faults.
struct Stressed {
    told: Told,
    daemon: Daemon,
    status: i32,
    errors: String,
}

fn stress(rules: &[&str], command: &[&str]) -> Result<Stressed> {
    let mut options = vec!["--inject-seed", "20171"];
    options.extend(rules.iter().flat_map(|rule| ["--inject", rule]));
    let daemon = Daemon::start_with(&options)?;
    let run = vm(&["run", "--counters"])?
        .with(daemon.options())
        .with(["--", "hmm-stress"])
        .with(command)
        .with(["--json", "--seed", "1"])
        .finish()?;
    Ok(Stressed {
        told: Told::by(&run)?,
        daemon,
        status: run.status(),
        errors: run.errors(),
    })
}

impl Stressed {
    /// How many requests met each fault.
    fn injected(&self) -> Result<serde_json::Value> {
        let reply = self.daemon.ask(&json!({ "command": "counters" }))?;
        let injected = reply.pointer("/counters/injected").cloned();
        injected.ok_or_else(|| Failure("the daemon does not say what it injected".into()))
    }

    /// How much a counter of the driver changed.
    fn driver(&self, name: &str) -> i64 {
        self.told.summary.driver.get(name).copied().unwrap_or(-1)
    }

    /// No byte was wrong, and guest and host counted the same.
    fn is_sound(&self) -> Result {
        let summary = &self.told.summary;
        check(summary.mismatches == 0, || {
            format!("{:#?}", self.told.cases)
        })?;
        let driver = |name: &str| u64::try_from(self.driver(name)).unwrap_or(0);
        let sides = sides(driver, &self.daemon.counted()?);
        check(sides.values().all(Sides::agree), || format!("{sides:#?}"))?;
        let shown = self.errors.contains("to device pages") && !self.errors.contains("differs");
        check(shown, || self.errors.clone())?;
        // Beyond 1 the guest's kernel complained, or the run did not come to its end.
        check(self.status <= 1, || self.errors.clone())?;
        for counter in ["src_changed", "broken", "request_timeouts"] {
            let change = summary.driver.get(counter).copied();
            check(change.unwrap_or(0) == 0, || {
                format!("{counter}: {change:?}")
            })?;
        }
        for case in &self.told.cases {
            let bad = [
                "complained",
                "leaked",
                "the driver counted",
                "not done after",
            ];
            let reason = case.reason.as_deref().unwrap_or_default();
            check(!bad.iter().any(|bad| reason.contains(bad)), || {
                format!("{case:?}")
            })?;
        }
        Ok(())
    }
}

fn late_and_reordered() -> Result {
    let rules = [
        "delay=3ms,probability=0.01",
        "delay=100us,probability=0.1",
        "reorder=200us,probability=0.2",
    ];
    let run = stress(&rules, &["run", "--duration", "10s"])?;
    run.is_sound()?;
    let failed: Vec<_> = run
        .told
        .cases
        .iter()
        .filter(|case| case.result == Verdict::Fail)
        .collect();
    check(failed.is_empty() && run.status == 0, || {
        format!("{failed:#?}")
    })?;
    let injected = run.injected()?;
    let count = |fault| injected.get(fault).and_then(serde_json::Value::as_u64);
    check(
        count("delay") > Some(100) && count("reorder") > Some(100),
        || injected.to_string(),
    )
}

/// Tests may then find pages in another place than they expect, or lost.
fn errors_never_wrong() -> Result {
    let rules = [
        "error=2,probability=0.05",
        "short,probability=0.05",
        "status=invalid,probability=0.02",
        "status=4711,probability=0.02",
        "poison,probability=0.005",
        "delay=1ms,probability=0.05",
        "reorder=1ms,probability=0.1",
    ];
    let run = stress(&rules, &["run", "--duration", "10s"])?;
    run.is_sound()?;
    let injected = run.injected()?;
    for fault in ["error", "short", "status", "poison", "delay", "reorder"] {
        let count = injected.get(fault).and_then(serde_json::Value::as_u64);
        check(count > Some(0), || injected.to_string())?;
    }
    // What the device says went wrong is what the driver noticed.
    let host = run.daemon.counters()?;
    let told = host.to_device.errors + host.from_device.errors + host.fill.errors;
    let seen = run.driver("request_errors");
    check(told > 0 && i64::try_from(told) == Ok(seen), || {
        format!("{told} requests failed, the driver noticed {seen}")
    })
}

/// A guest in which `hmm-pages` waits for commands, and its device.
struct Guest {
    running: Running,
    daemon: Daemon,
}

/// What came of a migration.
#[derive(Debug, PartialEq, Eq)]
struct Moved {
    moved: u64,
    filled: u64,
    copy_failed: u64,
}

/// The numbers in a text of names and numbers.
fn numbers(text: &str) -> Vec<u64> {
    let words = text.split_whitespace();
    words.filter_map(|word| word.parse().ok()).collect()
}

impl Guest {
    fn boot() -> Result<Self> {
        let programs = Programs::locate()?;
        programs.build_packages(&["hmm-pages"])?;
        let daemon = Daemon::start_with(&["--inject-seed", "7"])?;
        let running = vm(&["run"])?
            .with(daemon.options())
            .with(["--with".into(), programs.path("hmm-pages")])
            .with(["--", "hmm-pages"])
            .listening()
            .launch()?;
        Ok(Self { running, daemon })
    }

    fn ask(&mut self, command: &str) -> Result<String> {
        self.running.ask(command)
    }

    /// From now on only this goes wrong.
    fn inject(&self, rule: &str) -> Result {
        let request = json!({ "command": "inject", "clear": true, "rule": rule });
        self.daemon.ask(&request).map(drop)
    }

    fn cure(&self) -> Result {
        self.daemon
            .ask(&json!({ "command": "inject", "clear": true }))
            .map(drop)
    }

    fn migrate(&mut self, command: &str) -> Result<Moved> {
        let answer = self.ask(command)?;
        match numbers(&answer)[..] {
            // Few are busy, and could not be asked for.
            [moved, filled, copy_failed, busy] if busy < 8 => Ok(Moved {
                moved: moved + if filled == 0 { busy } else { 0 },
                filled: filled + if filled == 0 { 0 } else { busy },
                copy_failed,
            }),
            _ => Err(Failure(answer)),
        }
    }

    fn holds(&mut self, right: u64, lost: u64) -> Result {
        let answer = self.ask("check")?;
        check(numbers(&answer) == [right, lost, 0], || {
            format!("{answer} instead of right {right} lost {lost}")
        })
    }

    fn run(&mut self, script: &str) -> Result<String> {
        let answer = self.ask(&format!("run {script}"))?;
        let output = answer
            .strip_prefix("exit 0")
            .map(|output| output.trim().to_owned());
        output.ok_or_else(|| Failure(format!("{script}: {answer}")))
    }

    /// A counter of the driver.
    fn counter(&mut self, name: &str) -> Result<u64> {
        let file = "/sys/kernel/debug/virtio_hmm/hmm0/counters";
        let text = self.run(&format!("grep '^{name} ' {file}"))?;
        numbers(&text).first().copied().ok_or(Failure(text))
    }

    /// A region all of whose pages are on the device.
    fn on_device(&mut self) -> Result {
        self.ask(&format!("new {PAGES}"))?;
        let moved = self.migrate("to-device")?;
        check(moved.moved == PAGES, || format!("{moved:?}"))
    }

    fn finish(self) -> Result {
        let Self {
            mut running,
            daemon,
        } = self;
        running.say(b"")?;
        let end = running.finish()?;
        drop(daemon);
        end.expect_status(0)
    }
}

fn expect(seen: &Moved, moved: u64, filled: u64, copy_failed: u64) -> Result {
    let wanted = Moved {
        moved,
        filled,
        copy_failed,
    };
    check(*seen == wanted, || {
        format!("{seen:?} instead of {wanted:?}")
    })
}

fn frames_that_fail() -> Result {
    let mut guest = Guest::boot()?;
    // To the device: what failed stays in RAM.
    for (rule, failed) in [
        ("error=100", 100),
        ("short=10", PAGES - 10),
        ("short=0", PAGES),
        ("status=invalid", PAGES),
        ("status=4711", PAGES),
    ] {
        guest.ask(&format!("new {PAGES}"))?;
        guest.inject(&format!("{rule},op=to_device,count=1"))?;
        let moved = guest.migrate("to-device")?;
        expect(&moved, PAGES - failed, 0, failed)?;
        guest.holds(PAGES, 0)?;

        // Back: what failed stays on the device, and comes later.
        guest.on_device()?;
        guest.inject(&format!("{rule},op=from_device,count=1"))?;
        let moved = guest.migrate("to-system")?;
        expect(&moved, PAGES - failed, 0, failed)?;
        guest.holds(PAGES, 0)?;

        // Holes stay holes.
        guest.ask("holes")?;
        guest.inject(&format!("{rule},op=fill,count=1"))?;
        let moved = guest.migrate("to-device")?;
        expect(&moved, 0, PAGES - failed, failed)?;
        guest.holds(PAGES, 0)?;
    }
    check(guest.counter("cpu_faults_sigbus")? == 0, || "SIGBUS".into())?;

    // A CPU fault asks again, and only gives a page up that does not come.
    guest.on_device()?;
    guest.inject("error,op=from_device,count=2")?;
    guest.holds(PAGES, 0)?;
    guest.on_device()?;
    guest.inject("error,op=from_device,count=3")?;
    guest.holds(PAGES - 1, 1)?;
    guest.holds(PAGES, 0)?;

    // Poisoned frames are lost, and no others.
    guest.ask(&format!("new {PAGES}"))?;
    guest.inject("poison=3,op=to_device,count=1")?;
    let moved = guest.migrate("to-device")?;
    expect(&moved, PAGES, 0, 0)?;
    let moved = guest.migrate("to-system")?;
    expect(&moved, PAGES - 3, 0, 3)?;
    guest.holds(PAGES - 3, 3)?;
    guest.holds(PAGES - 3, 3)?;
    let sigbus = guest.counter("cpu_faults_sigbus")?;
    check(sigbus == 7, || format!("{sigbus} SIGBUS instead of 7"))?;
    // Their next owner writes them first.
    guest.on_device()?;
    guest.holds(PAGES, 0)?;
    check(guest.counter("broken")? == 0, || "broken".into())?;
    guest.run("rmmod virtio_hmm")?;
    guest.finish()
}

fn never_answered() -> Result {
    let mut guest = Guest::boot()?;
    // What is lost of 512 pages on the device, for each way to break it.
    for rule in [
        "drop,op=to_device,count=1",
        "drop=half,op=to_device,count=1",
        "stall,op=to_device,count=1",
        "delay=1000s,op=to_device,count=1",
        "dead,op=to_device,count=1",
    ] {
        begin(&mut guest)?;
        guest.inject(rule)?;
        let answer = guest.ask("to-device")?;
        check(answer.starts_with("error the device is broken"), || {
            format!("{rule}: {answer}")
        })?;
        // All of it was still in RAM.
        guest.holds(PAGES, 0)?;
        end(&mut guest, rule, 0)?;
    }
    for rule in [
        "drop,op=from_device,count=1",
        "drop=half,op=from_device,count=1",
        "drop=all,op=from_device,count=1",
        "stall,op=from_device,count=1",
        "delay=1000s,op=from_device,count=1",
        "dead,op=from_device,count=1",
    ] {
        // Once by request; a CPU fault waits in another place.
        let both = ["touch 7", "to-system"];
        let commands = if rule.starts_with("drop=half") {
            &both[..]
        } else {
            &both[..1]
        };
        for command in commands {
            begin(&mut guest)?;
            guest.on_device()?;
            guest.inject(rule)?;
            let answer = guest.ask(command)?;
            let told = answer.starts_with("error the device is broken") || answer == "signal 7";
            check(told, || format!("{rule}, {command}: {answer}"))?;
            // All of it is lost, and not one byte of a page half copied is shown.
            guest.holds(0, PAGES)?;
            check(guest.ask("touch 300")? == "signal 7", || "no SIGBUS".into())?;
            end(&mut guest, rule, PAGES)?;
        }
    }
    // A hole has nothing to lose.
    begin(&mut guest)?;
    guest.ask(&format!("new {PAGES}"))?;
    guest.ask("holes")?;
    guest.inject("drop,op=fill,count=1")?;
    let answer = guest.ask("to-device")?;
    check(answer.starts_with("error the device is broken"), || answer)?;
    guest.holds(PAGES, 0)?;
    end(&mut guest, "drop,op=fill", 0)?;

    // The device itself is as good as new.
    begin(&mut guest)?;
    guest.on_device()?;
    guest.holds(PAGES, 0)?;
    guest.run("rmmod virtio_hmm")?;
    guest.finish()
}

/// A device that works, a region in RAM, and an empty log.
fn begin(guest: &mut Guest) -> Result {
    guest.cure()?;
    guest.run(&format!(
        "lsmod | grep -q virtio_hmm || insmod {MODULE_PATH} || exit 1; \
         until [ -e /dev/hmm0 ]; do sleep 0.05; done; \
         echo 300 > /sys/module/virtio_hmm/parameters/timeout_ms; \
         dmesg -c > /dev/null"
    ))?;
    guest.ask(&format!("new {PAGES}")).map(drop)
}

/// It broke with one line in the log that tells how many pages are lost, and the driver
/// can be unloaded.
fn end(guest: &mut Guest, rule: &str, lost: u64) -> Result {
    let line = guest.run("dmesg | grep virtio_hmm")?;
    let why = "hmm0 is broken: a request missed its deadline";
    let told = format!("{lost} pages that were only in its memory are lost");
    // Of pages on their way to the device it cannot tell yet.
    check(
        line.contains(why) && (lost == 0 || line.contains(&told)) && line.matches(why).count() == 1,
        || format!("{rule}: {line}"),
    )?;
    check(guest.counter("broken")? == 1, || "not broken".into())?;
    // The lost pages go with their region.
    guest.ask("new 1")?;
    guest.run("rmmod virtio_hmm && ! lsmod | grep -q virtio_hmm")?;
    Ok(())
}

/// The tool says at the end of a run that the sides differ, though the command knows nothing.
fn lost_and_doubled() -> Result {
    let programs = Programs::locate()?;
    programs.build_packages(&["hmm-pages"])?;
    let script = format!("printf 'new {PAGES}\nto-device\nholes\nto-device\n' | hmm-pages");
    let run = vm(&["run", "--inject", "lose,op=to_device,count=1"])?
        .with(["--inject", "double,op=fill,count=1"])
        .with(["--with".into(), programs.path("hmm-pages")])
        .with(["--", "sh", "-c", &script])
        .finish()?;
    run.expect_status(EXIT_COUNTERS.into())?;
    let errors = run.errors();
    // What the guest's side has more of, and whether that is said.
    let more = |name: &str| -> Result<(i64, bool)> {
        let line = errors.lines().find(|line| line.starts_with(name));
        let line = line.ok_or_else(|| Failure(errors.clone()))?;
        match numbers(&line.replace(',', ""))[..] {
            [guest, host, _] => Ok((
                guest.cast_signed().wrapping_sub(host.cast_signed()),
                line.ends_with("differs"),
            )),
            _ => Err(Failure(line.into())),
        }
    };
    let lost = more("to device requests")?;
    let doubled = more("fill requests")?;
    check(lost == (1, true) && doubled == (-1, true), || {
        errors.clone()
    })?;
    for what in ["frames", "bytes"] {
        let (lost, lost_told) = more(&format!("to device {what}"))?;
        let (doubled, doubled_told) = more(&format!("fill {what}"))?;
        check(lost > 0 && lost_told && doubled < 0 && doubled_told, || {
            errors.clone()
        })?;
    }
    let back = more("from device requests")?;
    check(back == (0, false), || errors.clone())
}

/// A fault that can be borne, one that cannot, and a daemon that is killed.
fn torture() -> Result {
    let parts = ["error", "dead", "deaths"];
    // With more queues each may have taken a request when the device dies of the first.
    let run = vm(&["torture", "--copy-queues=1", "--json"])?
        .with(["--duration", "1s", "--kills", "1"])
        .with(parts.iter().flat_map(|part| ["--only", part]))
        .finish()?;
    run.expect_status(0)?;
    let torture: serde_json::Value = serde_json::from_slice(run.stdout())?;
    let part = |at: usize, key: &str| torture.pointer(&format!("/parts/{at}/{key}")).cloned();
    let number = |at, key| {
        part(at, key)
            .and_then(|number| number.as_u64())
            .unwrap_or(0)
    };
    for (at, name) in parts.iter().enumerate() {
        check(part(at, "name") == Some(json!(name)), || {
            torture.to_string()
        })?;
        check(number(at, "checked") > 0, || torture.to_string())?;
    }
    let total = |key: &str| torture.pointer(&format!("/total/{key}")).cloned();
    let injected = number(0, "injected");
    check(injected > 0 && number(1, "injected") == 1, || {
        torture.to_string()
    })?;
    check(total("injected") == Some(json!(injected + 1)), || {
        torture.to_string()
    })?;
    for (key, expected) in [("kills", 1), ("wrong", 0), ("reports", 0)] {
        check(total(key) == Some(json!(expected)), || torture.to_string())?;
    }
    Ok(())
}

fn torture_refuses() -> Result {
    for (options, complaint) in [
        (
            ["--only", "death"],
            "no part death; there are: conformance, ",
        ),
        (["--inject", "dead"], "--inject does not go with torture"),
    ] {
        let run = vm(&["torture"])?.with(options).finish()?;
        run.expect_status(125)?;
        check(run.errors().contains(complaint), || run.errors())?;
    }
    Ok(())
}
