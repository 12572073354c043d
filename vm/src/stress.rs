//! `cargo vm stress`: everything that the guest's stress program can do, in turns and with new
//! seeds, for a long time in one guest; and then whether anything was lost.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use hmm_init::Stream;
use hmm_stress::report::{Case, Latency, Line, Verdict};
use hmm_stress::scenario;
use serde::Serialize;

use crate::demo::random_seed;
use crate::environment::Environment;
use crate::error::{Error, Result, with_sources};
use crate::prepare::{Job, MachineOptions, Prepared, log_tail};
use crate::process::{shell_word, tail};
use crate::reconcile::{self, grouped};
use crate::report::Report;
use crate::sampler::{History, Sampler};

/// Suites that run as a whole in a turn, and what they take beside their seed.
const SUITES: [(&str, &str); 3] = [
    ("contract", "contract"),
    ("neighbours", "neighbours"),
    ("model", "model --steps 1000 --duration 5s"),
];
/// Options that are not about the machine: with a value, and without.
const OWN_OPTIONS: [&str; 4] = ["--duration", "--seed", "--turn", "--report"];
const OWN_FLAGS: [&str; 2] = ["--json", "--top"];
/// How long a scenario runs in a turn. They end by themselves, so none is ended early.
const SCENARIO: &str = "--duration 2s --size 64M";
/// How long the last turn, the checks and the power-off may take beyond the stress's time.
const ENDING: Duration = Duration::from_secs(1800);

/// Modules of the kernel's that some of the tests need.
const MODULES: [&str; 4] = [
    "lib/lz4/lz4hc_compress.ko",
    "drivers/block/zram/zram.ko",
    "fs/configfs/configfs.ko",
    "drivers/block/null_blk/null_blk.ko",
];

/// Gives the tests swap, and a block device that completes late. What the kernel does not have
/// is left out, and the tests that need it say so.
const SURROUNDINGS: &str = "
for module in lz4hc_compress zram configfs null_blk; do
    [ ! -e $module.ko.xz ] || unxz $module.ko.xz
    [ $module = null_blk ] && options='nr_devices=1 gb=1 memory_backed=1 irqmode=2 completion_nsec=100000000' || options=
    [ ! -e $module.ko ] || insmod $module.ko $options || exit 91
done
if [ -e /sys/block/zram0 ]; then
    echo 128M > /sys/block/zram0/disksize
    mkswap /dev/zram0 >/dev/null && swapon /dev/zram0 || exit 92
fi
";

/// Brings everything to an end, and looks what is left behind.
const CHECKS: &str = "
echo checks
n=0
while [ $n -lt 100 ]; do
    left=0
    for counters in /sys/kernel/debug/virtio_hmm/*/counters; do
        total=$(sed -n 's/^frames_total //p' $counters)
        free=$(sed -n 's/^frames_free //p' $counters)
        left=$((left + total - free))
    done
    [ $left -gt 0 ] || break
    sleep 0.1; n=$((n + 1))
done
echo frames $left
if [ -w /sys/kernel/debug/kmemleak ]; then
    # What is younger than 5 seconds is never reported.
    sleep 6; echo scan > /sys/kernel/debug/kmemleak; sleep 1; echo scan > /sys/kernel/debug/kmemleak
    cat /sys/kernel/debug/kmemleak >&2
    echo kmemleak $(grep -c '^unreferenced object' /sys/kernel/debug/kmemleak)
fi
";

/// A case that failed.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    /// The scenario, test or suite.
    pub name: String,
    /// Seed of its turn.
    pub seed: u64,
    /// Why.
    pub reason: String,
    /// What repeats it.
    pub command: String,
}

/// A turn that was taken.
#[derive(Clone, Debug, Serialize)]
pub struct Turn {
    /// The scenario or suite.
    pub name: String,
    /// Its seed.
    pub seed: u64,
    /// When it began, in seconds after the first one did.
    pub at: f64,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Cases in it that passed.
    pub passed: u64,
    /// Those that failed; at least one if the turn did not end well.
    pub failed: u64,
    /// Those that could not run.
    pub skipped: u64,
    /// Times of its CPU faults on device pages.
    pub fault_latency_ns: Latency,
}

impl Turn {
    /// Whether times of CPU faults were measured in it.
    #[must_use]
    pub fn has_faults(&self) -> bool {
        self.fault_latency_ns.count > 0
    }
}

/// The result, as `--json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct Stress {
    /// What it was got with.
    #[serde(flatten)]
    pub environment: Environment,
    /// Seed of the first turn; each other turn's is made from the one before.
    pub seed: u64,
    /// Seconds from the first turn to the last.
    pub seconds: f64,
    /// Turns taken.
    pub turns: u64,
    /// Cases in these turns that passed.
    pub passed: u64,
    /// Those that failed.
    pub failed: u64,
    /// Those that could not run.
    pub skipped: u64,
    /// Of the latter, which.
    pub skipped_names: BTreeSet<String>,
    /// Pages that did not hold what they should.
    pub mismatches: u64,
    /// Pages checked and calls made.
    pub operations: u64,
    /// What failed.
    pub failures: Vec<Failure>,
    /// The turns in their order.
    pub timeline: Vec<Turn>,
    /// Both sides of every device.
    pub devices: Vec<reconcile::Device>,
    /// Whether both sides of every device agree.
    pub reconciled: bool,
    /// Frames of device memory that were in use when nobody used the device any more; none if
    /// it did not come to that.
    pub frames_lost: Option<u64>,
    /// What kmemleak found; none if the kernel does not have it.
    pub kmemleak: Option<u64>,
    /// Whether the module could be unloaded, for which every struct page of device memory has
    /// to be free.
    pub unloaded: bool,
    /// What ended the run early: the kernel's complaint, a limit.
    pub ended_by: Option<String>,
    /// What the devices did over the time; empty if nobody watched.
    #[serde(skip)]
    pub histories: Vec<History>,
    /// The tool's exit status.
    #[serde(skip)]
    pub status: u8,
}

impl Stress {
    /// Whether everything is as it should be.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
            && self.mismatches == 0
            && self.reconciled
            && self.frames_lost == Some(0)
            && self.kmemleak.unwrap_or(0) == 0
            && self.unloaded
            && self.ended_by.is_none()
    }

    /// The summary for a person.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut row = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<34}{value:>16}");
        };
        let driver = |names: &[&str]| {
            let drivers = self.devices.iter().map(|device| &device.driver);
            grouped(
                drivers
                    .flat_map(|driver| names.iter().map(|name| driver.get(name)))
                    .sum(),
            )
        };
        row("turns", grouped(self.turns));
        row("cases passed", grouped(self.passed));
        row("cases failed", grouped(self.failed));
        row("cases skipped", grouped(self.skipped));
        for name in &self.skipped_names {
            row(&format!("  {name}"), String::new());
        }
        row("operations", grouped(self.operations));
        row("mismatches", grouped(self.mismatches));
        row("pages to the device", driver(&["pages_to_device"]));
        row(
            "pages back on request",
            driver(&["pages_to_system", "pages_released"]),
        );
        row("pages back by CPU fault", driver(&["pages_faulted"]));
        row("pages back by eviction", driver(&["pages_evicted"]));
        row(
            "device frames lost",
            self.frames_lost.map_or("not looked at".into(), grouped),
        );
        row(
            "kmemleak",
            match (self.kmemleak, self.frames_lost) {
                (Some(count), _) => grouped(count),
                (None, Some(_)) => "not in this kernel".into(),
                (None, None) => "not looked at".into(),
            },
        );
        row(
            "module",
            if self.unloaded { "unloaded" } else { "STAYS" }.into(),
        );
        for device in &self.devices {
            let _ = write!(
                text,
                "\n{}\n{}",
                device.device,
                reconcile::table(&device.counters)
            );
        }
        for failure in &self.failures {
            let Failure {
                name,
                reason,
                command,
                ..
            } = failure;
            let _ = writeln!(text, "\nFAILED {name}: {reason}\nrepeat it: {command}");
        }
        if let Some(reason) = &self.ended_by {
            let _ = writeln!(text, "\nended early: {reason}");
        }
        let _ = writeln!(
            text,
            "\n{}: counters {}, Linux {}, {}, {:.0} s, seed {}",
            if self.passed() { "passed" } else { "FAILED" },
            match (self.devices.as_slice(), self.reconciled) {
                ([], _) => "were not compared",
                (_, true) => "reconcile",
                (_, false) => "DO NOT RECONCILE",
            },
            self.environment.kernel,
            self.environment.accelerator,
            self.seconds,
            self.seed
        );
        text
    }
}

/// What to stress.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// For how long; all turns are taken at least once.
    pub duration: Duration,
    /// Seed of the first turn.
    pub seed: Option<u64>,
    /// One turn with that seed, of this name, instead of all for a time.
    pub turn: Option<&'a str>,
    /// Whether `hmm-top` shows the devices meanwhile.
    pub top: bool,
}

/// Boots a machine and stresses the device in it, watched by the sampler if there is one.
///
/// # Errors
/// The machine could not be started.
pub fn run(options: &MachineOptions, wanted: Wanted, sampler: Option<Sampler>) -> Result<Stress> {
    let turns = turns(wanted.turn)?;
    let seed = wanted.seed.unwrap_or_else(random_seed);
    let mut options = options.clone();
    let duration = match wanted.turn {
        Some(_) => Duration::ZERO,
        None => wanted.duration,
    };
    options.timeout.get_or_insert(duration + ENDING);
    let prepared = Prepared::new(&options)?;
    let environment = Environment::of(&prepared)?;
    Report.line(&format!(
        "booting on {}; {} turns again and again for {} s, from seed {seed}",
        prepared.accelerator(),
        turns.len(),
        duration.as_secs()
    ));
    let job = Job {
        command: vec!["sh".into(), "-c".into(), script(&turns, seed, duration)],
        files: prepared.kernel().module_files(&MODULES),
        top: wanted.top,
        sampler,
        unload: true,
        ..Job::default()
    };
    let mut progress = Progress::default();
    let finished = prepared.run(&job, &mut |stream, data| {
        match stream {
            Stream::Stdout => progress.add(data),
            // The last turn's, in case that it fails.
            Stream::Stderr => progress.errors.extend_from_slice(data),
        }
        Ok(())
    });
    let Some(first) = progress.first else {
        finished?;
        return Err(Error::Config(tail(&progress.errors_text(), 5)));
    };
    let mut unloaded = false;
    let (devices, ended_by, status) = match finished {
        Ok(finished) => {
            unloaded = finished.unloaded;
            (finished.devices, None, None)
        }
        Err(error) => {
            if let Error::Run { logs, .. } = &error {
                eprintln!("{}", log_tail(logs));
            }
            progress.interrupted(&error);
            let status = error.exit_status();
            (Vec::new(), Some(with_sources(&error)), Some(status))
        }
    };
    let repeat = machine_words(std::env::args(), "stress", &OWN_OPTIONS, &OWN_FLAGS);
    for failure in &mut progress.failures {
        let (turn, seed) = (&failure.command, failure.seed);
        failure.command = format!("cargo vm stress {repeat}--turn {turn} --seed {seed}");
    }
    let sampler = job.sampler.as_ref();
    let mut stress = Stress {
        environment,
        seed,
        seconds: progress.seconds(),
        turns: progress.turns,
        passed: progress.verdicts[0],
        failed: progress.verdicts[1],
        skipped: progress.verdicts[2],
        skipped_names: progress.skipped,
        mismatches: progress.mismatches,
        operations: progress.operations,
        failures: progress.failures,
        timeline: progress.timeline,
        reconciled: devices.iter().all(|device| device.reconciled)
            && devices.iter().any(reconcile::Device::was_used),
        devices,
        frames_lost: progress.frames_lost,
        kmemleak: progress.kmemleak,
        unloaded,
        ended_by,
        histories: sampler.map_or_else(Vec::new, |sampler| sampler.histories(first)),
        status: 0,
    };
    stress.status = status.unwrap_or(u8::from(!stress.passed()));
    Ok(stress)
}

/// The words behind `command` that are about the machine, each with a space after it: those
/// that are neither among its own `options`, which have a value, nor among its `flags`.
pub(crate) fn machine_words(
    words: impl Iterator<Item = String>,
    command: &str,
    options: &[&str],
    flags: &[&str],
) -> String {
    let mut words = words.skip_while(|word| word != command).skip(1);
    let mut text = String::new();
    while let Some(word) = words.next() {
        let option = word.split_once('=').map_or(word.as_str(), |(name, _)| name);
        if options.contains(&option) {
            if option == word {
                words.next();
            }
        } else if !flags.contains(&word.as_str()) {
            text += &(shell_word(&word) + " ");
        }
    }
    text
}

/// The turns of a round: a name, and the arguments of the stress program.
fn turns(only: Option<&str>) -> Result<Vec<(&'static str, String)>> {
    let scenarios = scenario::NAMES
        .iter()
        .map(|name| (*name, format!("run {name} {SCENARIO}")));
    let suites = SUITES.map(|(name, arguments)| (name, arguments.to_owned()));
    let mut turns: Vec<_> = scenarios.chain(suites).collect();
    if let Some(only) = only {
        let names: Vec<&str> = turns.iter().map(|(name, _)| *name).collect();
        let known = names.join(", ");
        turns.retain(|(name, _)| *name == only);
        if turns.is_empty() {
            return Err(Error::Config(format!("no turn {only}; there are: {known}")));
        }
    }
    Ok(turns)
}

/// What the guest's shell does.
fn script(turns: &[(&str, String)], seed: u64, duration: Duration) -> String {
    let mut script = format!(
        "{SURROUNDINGS}
[ ! -w /sys/kernel/debug/kmemleak ] || echo clear > /sys/kernel/debug/kmemleak
now() {{ read -r up rest < /proc/uptime; echo ${{up%.*}}; }}
set -- /dev/hmm*
devices=$# round=0 turn=0 seed={seed} end=$(($(now) + {}))
turn() {{
    # The first round is taken to its end.
    [ $round -eq 0 ] || [ $(now) -lt $end ] || return
    name=$1 device=/dev/hmm$((turn % devices)); shift
    echo turn $name $seed
    hmm-stress \"$@\" --json --seed $seed --device $device
    echo end $?
    seed=$(((seed * 1103515245 + 12345) & 0x7fffffff)) turn=$((turn + 1))
}}
while :; do
",
        duration.as_secs()
    );
    for (name, arguments) in turns {
        let _ = writeln!(script, "    turn {name} {arguments}");
    }
    let _ = writeln!(
        script,
        "    round=1
    [ $(now) -lt $end ] || break
done
{CHECKS}"
    );
    script
}

/// What the guest has said so far.
#[derive(Default)]
struct Progress {
    partial: Vec<u8>,
    errors: Vec<u8>,
    first: Option<Instant>,
    last: Option<Instant>,
    turn: Option<Ongoing>,
    turns: u64,
    timeline: Vec<Turn>,
    verdicts: [u64; 3],
    skipped: BTreeSet<String>,
    mismatches: u64,
    operations: u64,
    failures: Vec<Failure>,
    frames_lost: Option<u64>,
    kmemleak: Option<u64>,
}

/// A turn that is being taken.
struct Ongoing {
    name: String,
    seed: u64,
    started: Instant,
    verdicts: [u64; 3],
    fault_latency_ns: Latency,
}

impl Progress {
    fn add(&mut self, data: &[u8]) {
        self.partial.extend_from_slice(data);
        while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
            let rest = self.partial.split_off(end + 1);
            let line = std::mem::replace(&mut self.partial, rest);
            self.line(String::from_utf8_lossy(&line).trim_end());
        }
    }

    fn line(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["turn", name, seed] => {
                let now = Instant::now();
                self.first.get_or_insert(now);
                self.errors.clear();
                self.turn = Some(Ongoing {
                    name: (*name).to_owned(),
                    seed: seed.parse().unwrap_or(0),
                    started: now,
                    verdicts: [0; 3],
                    fault_latency_ns: Latency::default(),
                });
            }
            ["end", status] => self.end(status),
            ["checks"] => Report.line("looking for what is left behind"),
            ["frames", count] => self.frames_lost = count.parse().ok(),
            ["kmemleak", count] => {
                self.kmemleak = count.parse().ok();
                if self.kmemleak != Some(0) {
                    eprint!("{}", self.errors_text());
                }
            }
            _ => match serde_json::from_str(line) {
                Ok(Line::Scenario(case) | Line::Test { case, .. }) => self.case(case),
                Ok(Line::Summary(summary)) => {
                    if let Some(turn) = &mut self.turn {
                        turn.fault_latency_ns = summary.fault_latency_ns;
                    }
                }
                _ => {}
            },
        }
    }

    fn case(&mut self, case: Case) {
        self.mismatches += case.mismatches;
        self.operations += case.operations;
        let index = match case.result {
            Verdict::Pass => 0,
            Verdict::Fail => 1,
            Verdict::Skip => 2,
        };
        let turn = self.turn.as_mut().map(|turn| &mut turn.verdicts);
        for verdicts in turn.into_iter().chain([&mut self.verdicts]) {
            if let Some(count) = verdicts.get_mut(index) {
                *count += 1;
            }
        }
        let reason = case.reason.unwrap_or_default();
        match case.result {
            Verdict::Pass => {}
            Verdict::Fail => self.fail(case.name, reason),
            Verdict::Skip => {
                self.skipped.insert(format!("{}: {reason}", case.name));
            }
        }
    }

    fn fail(&mut self, name: String, reason: String) {
        Report.line(&format!("FAILED {name}: {reason}"));
        let turn = self.turn.as_ref();
        self.failures.push(Failure {
            name,
            seed: turn.map_or(0, |turn| turn.seed),
            reason,
            // Completed when the options are at hand.
            command: turn.map(|turn| turn.name.clone()).unwrap_or_default(),
        });
    }

    fn end(&mut self, status: &str) {
        let Some(turn) = &self.turn else { return };
        let [passed, failed, skipped] = turn.verdicts;
        let mut text = format!("{passed} passed");
        for (count, what) in [(failed, "FAILED"), (skipped, "skipped")] {
            if count > 0 {
                let _ = write!(text, ", {count} {what}");
            }
        }
        Report.line(&format!(
            "{:6.0} s  {:<16} seed {:<10} {text} ({:.1} s)",
            self.seconds_until(Instant::now()),
            turn.name,
            turn.seed,
            turn.started.elapsed().as_secs_f64()
        ));
        if status != "0" {
            eprint!("{}", self.errors_text());
        }
        if status != "0" && failed == 0 {
            let reason = format!("hmm-stress ended with status {status}");
            self.fail(turn.name.clone(), reason);
        }
        self.turns += 1;
        self.last = Some(Instant::now());
        self.remember(status == "0");
    }

    fn interrupted(&mut self, error: &Error) {
        if let Some(turn) = &self.turn {
            self.fail(turn.name.clone(), with_sources(error));
        }
        self.remember(false);
    }

    /// The turn that is being taken has ended, well or not.
    fn remember(&mut self, well: bool) {
        let Some(turn) = self.turn.take() else { return };
        let [passed, failed, skipped] = turn.verdicts;
        self.timeline.push(Turn {
            at: self.seconds_until(turn.started),
            seconds: turn.started.elapsed().as_secs_f64(),
            passed,
            failed: failed.max(u64::from(!well)),
            skipped,
            name: turn.name,
            seed: turn.seed,
            fault_latency_ns: turn.fault_latency_ns,
        });
    }

    fn seconds_until(&self, end: Instant) -> f64 {
        let first = self.first.unwrap_or(end);
        end.saturating_duration_since(first).as_secs_f64()
    }

    fn seconds(&self) -> f64 {
        self.seconds_until(self.last.unwrap_or_else(Instant::now))
    }

    fn errors_text(&self) -> String {
        String::from_utf8_lossy(&self.errors).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CASE: &str = r#"{"type":"scenario","name":"sparse","seconds":1.0,"operations":5,"#;

    fn after(lines: &[&str]) -> Progress {
        let mut progress = Progress::default();
        progress.add((lines.join("\n") + "\n").as_bytes());
        progress
    }

    #[test]
    fn cases_are_added_up_over_turns() {
        let pass = format!(r#"{CASE}"result":"pass","mismatches":0}}"#);
        let skip = format!(r#"{CASE}"result":"skip","reason":"no swap","mismatches":0}}"#);
        let turn = ["turn sparse 7", &pass, &skip, "end 0"];
        let progress = after(&[turn, turn].concat());
        assert_eq!((progress.turns, progress.verdicts), (2, [2, 0, 2]));
        assert_eq!(progress.operations, 20);
        let [first, second] = progress.timeline.as_slice() else {
            panic!("{:?}", progress.timeline)
        };
        assert_eq!((first.passed, first.failed, first.skipped), (1, 0, 1));
        assert!(first.at == 0.0 && second.at >= first.seconds);
        assert_eq!(progress.skipped, BTreeSet::from(["sparse: no swap".into()]));
        assert!(progress.failures.is_empty() && progress.turn.is_none());
    }

    #[test]
    fn a_failure_has_the_seed_of_its_turn() {
        let fail = format!(r#"{CASE}"result":"fail","reason":"lost","mismatches":3}}"#);
        let progress = after(&["turn sparse 7", &fail, "end 1"]);
        let [failure] = progress.failures.as_slice() else {
            panic!("{:?}", progress.failures)
        };
        assert_eq!((failure.seed, failure.reason.as_str()), (7, "lost"));
        assert_eq!(progress.mismatches, 3);
    }

    #[test]
    fn a_program_that_just_ends_has_failed() {
        let progress = after(&["turn model 9", "end 139"]);
        assert!(progress.failures[0].reason.contains("139"));
        assert_eq!(progress.timeline[0].failed, 1);
    }

    #[test]
    fn what_is_left_behind_is_read() {
        let progress = after(&["checks", "frames 0", "kmemleak 2"]);
        assert_eq!(
            (progress.frames_lost, progress.kmemleak),
            (Some(0), Some(2))
        );
    }

    #[test]
    fn the_command_that_repeats_a_turn_is_about_the_same_machine() {
        let line =
            "hmm-vm stress --kernel my_tree --duration 10m --seed=4 --json --report out --cpus 4";
        let words = line.split(' ').map(|word| word.replace('_', " "));
        let words = machine_words(words, "stress", &OWN_OPTIONS, &OWN_FLAGS);
        assert_eq!(words, "--kernel 'my tree' --cpus 4 ");
    }

    #[test]
    fn a_turn_is_chosen_by_its_name() {
        assert_eq!(turns(Some("model")).unwrap().len(), 1);
        assert!(turns(None).unwrap().len() > scenario::NAMES.len());
        let text = turns(Some("nonesuch")).unwrap_err().to_string();
        assert!(
            text.contains("ping-pong") && text.contains("contract"),
            "{text}"
        );
    }
}
