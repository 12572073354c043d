//! `cargo vm torture`: whatever is hostile to the device or comes from one that fails, part by
//! part, and the totals of all of it.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use hmm_init::Stream;
use hmm_stress::deaths::Toll;
use hmm_stress::report::Line;
use serde::Serialize;

use crate::accelerator::{Accelerator, Choice};
use crate::demo::random_seed;
use crate::environment::Environment;
use crate::error::{Error, Result, with_sources};
use crate::fuzz::{Fuzzers, Target};
use crate::paths::Cache;
use crate::prepare::{Job, MachineOptions, Prepared};
use crate::process::{shell_word, tail};
use crate::reconcile::grouped;
use crate::report::Report;
use crate::run::End;
use crate::stress::machine_words;
use crate::units::Size;

/// A driver in user mode that makes every kind of request, well-formed and not.
const CONFORMANCE: &str = "conformance";
/// Daemons that are killed.
const DEATHS: &str = "deaths";
/// Inputs that nobody thought of.
const FUZZ: &str = "fuzz";

/// Faults on purpose, by the name of their part, each with a rule. `lose` and `double` are not
/// among them: that nobody can see them from the answer is what they are for.
const FAULTS: [(&str, &str); 6] = [
    ("delay", "delay=1ms,probability=0.1"),
    ("reorder", "reorder=1ms,probability=0.2"),
    ("error", "error=2,probability=0.05"),
    ("short", "short,probability=0.05"),
    ("status", "status=invalid,probability=0.05"),
    ("poison", "poison,probability=0.01"),
];
/// Those after which the device is broken, so that only what was under way is of interest.
const ENDS: [(&str, &str); 3] = [
    ("drop", "drop,after=300,count=1"),
    ("stall", "stall,after=300,count=1"),
    ("dead", "dead,after=300"),
];

/// Options that are not about the machine, or that each part has by itself.
const OWN_OPTIONS: [&str; 5] = ["--only", "--duration", "--kills", "--seed", "--timeout"];

/// What is stressed when the device breaks: threads that know what each of their pages holds.
const WHEN_BROKEN: &str = "random-access";
/// How long the driver then waits for an answer, in milliseconds.
const TIMEOUT: &str = "2000";
/// Devices whose daemons are killed, and their memory.
const DEVICES: u32 = 3;
const DEVICE_MEMORY: Size = Size(16 * Size::MIB);
/// How long that may take.
const PATIENCE: Duration = Duration::from_secs(3600);

/// What the user wants to have done.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Parts by name; all if there is none.
    pub only: &'a [String],
    /// How long the device is stressed with each fault.
    pub duration: Duration,
    /// Daemons to kill.
    pub kills: u32,
    /// Repeats the choices of an earlier run.
    pub seed: Option<u64>,
}

impl Wanted<'_> {
    /// Looks whether it can be done.
    ///
    /// # Errors
    /// There is no such part, or an option contradicts what the parts set up.
    pub fn check(&self, options: &MachineOptions) -> Result<()> {
        let taken = [
            ("--profile", options.profile.is_some()),
            ("--devices", options.devices.is_some()),
            ("--device-memory", options.device_memory.is_some()),
            ("--device-socket", options.device_socket.is_some()),
            ("--no-device", options.no_device),
            ("--inject", !options.inject.is_empty()),
            ("--gdb", options.gdb),
        ];
        if let Some((option, _)) = taken.into_iter().find(|(_, given)| *given) {
            let text = format!("{option} does not go with torture, which sets up its own machines");
            return Err(Error::Config(text));
        }
        parts(self.only).map(drop)
    }
}

/// What came of one part, or of all of them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// Inputs of the fuzz targets, and cases of the specification's statements.
    pub inputs: u64,
    /// Requests that met a fault on purpose.
    pub injected: u64,
    /// Daemons killed.
    pub kills: u64,
    /// Pages that were compared byte by byte.
    pub checked: u64,
    /// Pages that were lost, each told by SIGBUS.
    pub lost: u64,
    /// Pages that did not hold what they should.
    pub wrong: u64,
    /// Complaints of the guest's kernel.
    pub reports: u64,
    /// Seconds that it took.
    pub seconds: f64,
    /// Why it failed, if it did.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<String>,
    /// What repeats it.
    pub command: String,
}

/// The result, as `--json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct Torture {
    /// What it was got with.
    #[serde(flatten)]
    pub environment: Environment,
    /// Seed of all parts.
    pub seed: u64,
    /// Each part.
    pub parts: Vec<Part>,
    /// The sum of the parts.
    pub total: Part,
}

impl Torture {
    /// Whether nothing was wrong, and all that was to be tried was.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.total.failures.is_empty() && self.total.wrong == 0 && self.total.reports == 0
    }

    /// The table for a person.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<12}{:>11}{:>10}{:>7}{:>14}{:>9}{:>7}{:>9}{:>7}\n",
            "", "inputs", "injected", "kills", "pages checked", "lost", "wrong", "reports", "s"
        );
        for part in self.parts.iter().chain([&self.total]) {
            let _ = writeln!(
                text,
                "{:<12}{:>11}{:>10}{:>7}{:>14}{:>9}{:>7}{:>9}{:>7.1}",
                part.name,
                grouped(part.inputs),
                grouped(part.injected),
                grouped(part.kills),
                grouped(part.checked),
                grouped(part.lost),
                grouped(part.wrong),
                grouped(part.reports),
                part.seconds
            );
        }
        for part in &self.parts {
            for failure in &part.failures {
                let _ = writeln!(text, "\n{}: {failure}\n  {}", part.name, part.command);
            }
        }
        let Environment {
            accelerator,
            kernel,
            qemu,
            commit,
            ..
        } = &self.environment;
        let _ = writeln!(
            text,
            "\nLinux {kernel} on QEMU {qemu}, {accelerator}; commit {commit}, seed {}",
            self.seed
        );
        text
    }
}

/// What a part does.
enum Work {
    Guest(Guest),
    Fuzz,
}

/// What one does in a guest.
enum Guest {
    Conformance,
    Fault { rule: &'static str, ends: bool },
    Deaths,
}

/// The parts whose names are asked for.
fn parts(only: &[String]) -> Result<Vec<(&'static str, Work)>> {
    let fault = |(name, rule), ends| (name, Guest::Fault { rule, ends });
    let all: Vec<_> = [(CONFORMANCE, Guest::Conformance)]
        .into_iter()
        .chain(FAULTS.map(|one| fault(one, false)))
        .chain(ENDS.map(|one| fault(one, true)))
        .chain([(DEATHS, Guest::Deaths)])
        .map(|(name, guest)| (name, Work::Guest(guest)))
        .chain([(FUZZ, Work::Fuzz)])
        .collect();
    let names: Vec<_> = all.iter().map(|(name, _)| *name).collect();
    if let Some(unknown) = only.iter().find(|name| !names.contains(&name.as_str())) {
        let known = names.join(", ");
        return Err(Error::Config(format!(
            "no part {unknown}; there are: {known}"
        )));
    }
    let wanted = |(name, _): &(&str, Work)| only.is_empty() || only.iter().any(|one| one == name);
    Ok(all.into_iter().filter(wanted).collect())
}

/// Does all parts, each with a machine of its own. One that fails does not keep the others.
///
/// # Errors
/// There is no such part, something cannot be made, or the user ended it.
pub fn run(options: &MachineOptions, wanted: Wanted) -> Result<Torture> {
    let works = parts(wanted.only)?;
    let seed = wanted.seed.unwrap_or_else(random_seed);
    let prepared = Prepared::new(options)?;
    let environment = Environment::of(&prepared)?;
    // What it runs on is found out, and told, once.
    let mut options = options.clone();
    options.platform.accel = match prepared.accelerator() {
        Accelerator::Kvm => Choice::Kvm,
        Accelerator::Tcg => Choice::Tcg,
    };
    let mut done = Vec::new();
    for (name, work) in works {
        done.push(match work {
            Work::Guest(guest) => guest.run(name, &options, &wanted, seed)?,
            Work::Fuzz => fuzz(wanted.duration)?,
        });
    }
    Ok(Torture {
        environment,
        seed,
        total: total(&done),
        parts: done,
    })
}

fn total(parts: &[Part]) -> Part {
    let sum = |of: fn(&Part) -> u64| parts.iter().map(of).sum();
    Part {
        name: "total".into(),
        inputs: sum(|part| part.inputs),
        injected: sum(|part| part.injected),
        kills: sum(|part| part.kills),
        checked: sum(|part| part.checked),
        lost: sum(|part| part.lost),
        wrong: sum(|part| part.wrong),
        reports: sum(|part| part.reports),
        seconds: parts.iter().map(|part| part.seconds).sum(),
        failures: parts
            .iter()
            .flat_map(|part| part.failures.clone())
            .collect(),
        command: String::new(),
    }
}

impl Guest {
    fn run(
        &self,
        name: &str,
        options: &MachineOptions,
        wanted: &Wanted,
        seed: u64,
    ) -> Result<Part> {
        let started = Instant::now();
        let mut options = options.clone();
        let seconds = wanted.duration.as_secs_f64();
        let command = match self {
            Self::Conformance => {
                options.profile = Some("vfio".into());
                format!("hmm-conformance --fresh --seed {seed}")
            }
            Self::Fault { rule, ends } => {
                options.inject = vec![(*rule).into()];
                options.inject_seed = Some(seed);
                let scenario = if *ends { WHEN_BROKEN } else { "" };
                format!(
                    "echo {TIMEOUT} > /sys/module/virtio_hmm/parameters/timeout_ms; \
                     hmm-stress run {scenario} --json --size 32M --duration {seconds}s --seed {seed}"
                )
            }
            Self::Deaths => {
                options.devices = Some(DEVICES);
                options.device_memory = Some(DEVICE_MEMORY);
                options.timeout.get_or_insert(PATIENCE);
                let kills = wanted.kills;
                format!("hmm-stress deaths --json --kills {kills} --seed {seed}")
            }
        };
        let mut part = Part {
            name: name.into(),
            command: repeated(&options, &command),
            ..Part::default()
        };
        Report.line(&format!("{name}: {}", part.command));
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        let job = Job {
            command: vec!["sh".into(), "-c".into(), command],
            ..Job::default()
        };
        let finished = Prepared::new(&options)?.run(&job, &mut |stream, data| {
            match stream {
                Stream::Stdout => output.extend_from_slice(data),
                Stream::Stderr => errors.extend_from_slice(data),
            }
            Ok(())
        });
        self.read(&String::from_utf8_lossy(&output), &mut part);
        match finished {
            Ok(finished) => {
                part.injected = finished.devices.iter().map(|one| one.injected).sum();
                self.judge(finished.end, &String::from_utf8_lossy(&errors), &mut part);
            }
            Err(error) if error.is_interruption() => return Err(error),
            Err(error) => {
                part.reports += u64::from(error.is_report());
                part.failures.push(with_sources(&error));
            }
        }
        part.seconds = started.elapsed().as_secs_f64();
        Ok(part)
    }

    /// Takes the numbers out of what the guest's program printed.
    fn read(&self, output: &str, part: &mut Part) {
        match self {
            Self::Conformance => {
                let results = output.lines().filter(|line| !line.contains("# SKIP"));
                for line in results {
                    let (passed, failed) = (line.starts_with("ok "), line.starts_with("not ok "));
                    part.inputs += u64::from(passed || failed);
                    part.failures.extend(failed.then(|| line.to_owned()));
                }
            }
            Self::Fault { .. } => {
                for line in output.lines() {
                    if let Ok(Line::Scenario(case)) = serde_json::from_str(line) {
                        part.checked += case.operations;
                        part.lost += case.lost;
                        part.wrong += case.mismatches;
                    }
                }
            }
            Self::Deaths => {
                if let Ok(toll) = serde_json::from_str::<Toll>(output) {
                    part.kills = toll.kills;
                    part.checked = toll.checked;
                    part.lost = toll.lost;
                    part.wrong = toll.wrong;
                    part.reports = toll.complaints;
                }
            }
        }
    }

    /// Says what is wrong with a part that came to its end.
    fn judge(&self, end: End, errors: &str, part: &mut Part) {
        // A scenario that cannot go on with such a device has failed, rightly; and of one that is
        // broken no counters can be read in the end.
        let right = match self {
            Self::Fault { ends: false, .. } => matches!(end, End::Status(0 | 1)),
            Self::Fault { ends: true, .. } => matches!(end, End::Status(0..=2)),
            Self::Conformance | Self::Deaths => end == End::Status(0),
        };
        if !right && part.failures.is_empty() {
            let status = end.exit_status();
            part.failures
                .push(format!("exit status {status}: {}", tail(errors, 3)));
        }
        let nothing = match self {
            Self::Conformance => part.inputs == 0,
            Self::Fault { .. } => part.injected == 0 || part.checked == 0,
            Self::Deaths => part.kills == 0,
        };
        if nothing {
            part.failures.push("nothing was tried".into());
        }
    }
}

/// Tries inputs on every fuzz target for a time, on this host.
fn fuzz(duration: Duration) -> Result<Part> {
    let started = Instant::now();
    let mut part = Part {
        name: FUZZ.into(),
        command: format!("cargo vm fuzz --duration {}s", duration.as_secs()),
        ..Part::default()
    };
    Report.line(&format!("{FUZZ}: {}", part.command));
    let fuzzers = match Fuzzers::build(&Cache::locate()?) {
        Ok(fuzzers) => fuzzers,
        Err(error) => {
            part.failures.push(with_sources(&error));
            return Ok(part);
        }
    };
    for target in Target::value_variants() {
        match fuzzers.run(*target, duration) {
            Ok(inputs) => part.inputs += inputs,
            Err(error) => {
                part.failures
                    .push(format!("{}: {}", target.name(), with_sources(&error)))
            }
        }
    }
    part.seconds = started.elapsed().as_secs_f64();
    Ok(part)
}

/// The command line that does a part again, on the machine that the user asked for.
fn repeated(options: &MachineOptions, command: &str) -> String {
    let words = machine_words(std::env::args(), "torture", &OWN_OPTIONS, &["--json"]);
    let mut text = format!("cargo vm run {words}").trim_end().to_owned();
    if let Some(profile) = &options.profile {
        let _ = write!(text, " --profile {}", shell_word(profile));
    }
    for rule in &options.inject {
        let _ = write!(text, " --inject {}", shell_word(rule));
    }
    if let Some(seed) = options.inject_seed {
        let _ = write!(text, " --inject-seed {seed}");
    }
    if let (Some(devices), Some(memory)) = (options.devices, options.device_memory) {
        let _ = write!(text, " --devices {devices} --device-memory {memory}");
    }
    if let Some(timeout) = options.timeout {
        let _ = write!(text, " --timeout {}s", timeout.as_secs());
    }
    let _ = write!(text, " -- sh -c {}", shell_word(command));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::tests::environment;

    fn part(guest: &Guest, output: &str, end: End) -> Part {
        let mut part = Part::default();
        guest.read(output, &mut part);
        part.injected = 1;
        guest.judge(end, "the last words", &mut part);
        part
    }

    const CASE: &str = r#"{"type":"scenario","name":"a","result":"fail","seconds":1.0,"#;

    #[test]
    fn a_part_that_is_unknown_is_named_with_those_that_are_there() {
        assert_eq!(parts(&[]).unwrap().len(), 3 + FAULTS.len() + ENDS.len());
        assert_eq!(parts(&["dead".into()]).unwrap().len(), 1);
        let error = parts(&["death".into()]).err().unwrap().to_string();
        assert!(error.contains("no part death") && error.contains("deaths"));
    }

    #[test]
    fn cases_of_the_conformance_run_count_unless_skipped() {
        let output = "ok 1 d1_a\nok 2 d2_b # SKIP why\nnot ok 3 d3_c\n# Totals: pass:1";
        let part = part(&Guest::Conformance, output, End::Status(1));
        assert_eq!(part.inputs, 2);
        assert_eq!(part.failures, ["not ok 3 d3_c"]);
    }

    #[test]
    fn lost_pages_are_no_failure_and_wrong_ones_are() {
        let guest = Guest::Fault {
            rule: "delay=1ms",
            ends: false,
        };
        let lost = format!("{CASE}\"mismatches\":0,\"lost\":2,\"operations\":7}}");
        let part = part(&guest, &lost, End::Status(1));
        assert_eq!((part.checked, part.lost, part.wrong), (7, 2, 0));
        assert!(part.failures.is_empty(), "{part:?}");
        let torture = |part: Part| Torture {
            environment: environment(),
            seed: 1,
            total: total(std::slice::from_ref(&part)),
            parts: vec![part],
        };
        assert!(torture(part).passed());
        let wrong = lost.replace("\"mismatches\":0", "\"mismatches\":3");
        let part = self::part(&guest, &wrong, End::Status(1));
        let torture = torture(part);
        assert!(!torture.passed() && torture.table().contains("3"));
    }

    #[test]
    fn a_part_that_ends_early_or_tries_nothing_fails() {
        let toll = r#"{"seed":1,"kills":2,"checked":9,"lost":1,"wrong":0,"complaints":0}"#;
        assert!(
            part(&Guest::Deaths, toll, End::Status(0))
                .failures
                .is_empty()
        );
        let failed = part(&Guest::Deaths, toll, End::Signal(9));
        assert_eq!(failed.failures, ["exit status 137: the last words"]);
        let nothing = part(&Guest::Deaths, "", End::Status(0));
        assert_eq!(nothing.failures, ["nothing was tried"]);
    }
}
