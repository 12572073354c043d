//! `hmm-stress`: stress and contract tests of virtio-hmm, run in the guest.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use clap::{Args, Parser, Subcommand};
use hmm_stress::amount::{available_ram, fit_pages, parse_duration, parse_size};
use hmm_stress::case::{self, Snapshot};
use hmm_stress::context::Context;
use hmm_stress::contract;
use hmm_stress::deaths::{self, Toll};
use hmm_stress::failure::Failure;
use hmm_stress::kernel_log::KernelLog;
use hmm_stress::model;
use hmm_stress::neighbours;
use hmm_stress::pattern::mix;
use hmm_stress::report::{Case, Line, Listed, Summary, Verdict};
use hmm_stress::scenario::{self, Scenario};
use hmm_stress::shared;
use hmm_stress::suite::Test;
use hmm_stress::tenants;
use virtio_hmm_client::{Device, PAGE_SIZE};

/// How long a test may take.
const TEST_DEADLINE: Duration = Duration::from_secs(120);

/// How long a scenario may take beside its duration, on a kernel that checks every access.
const SCENARIO_DEADLINE: Duration = Duration::from_secs(300);

/// How long a step of the model checker may take, on average.
const MODEL_STEP: Duration = Duration::from_millis(100);

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List scenarios and tests
    List {
        /// Print one JSON object on each line
        #[arg(long)]
        json: bool,
    },
    /// Run stress scenarios
    Run {
        /// Names of scenarios; all if there is none
        scenarios: Vec<String>,
        #[command(flatten)]
        common: Common,
        /// Time for all scenarios together
        #[arg(long, default_value = "5s", value_parser = parse_duration)]
        duration: Duration,
        /// Threads that access memory at once
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
        threads: u16,
        /// Memory of a region; less is used where the machine has too little
        #[arg(long, default_value = "64M", value_parser = parse_size)]
        size: usize,
        /// Pages that ping-pong moves each way, however long it takes
        #[arg(long, default_value_t = 110_000)]
        pages: u64,
    },
    /// Run contract tests
    Contract {
        /// Names of tests; all if there is none
        tests: Vec<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Run tests with other parts of the kernel's memory management
    Neighbours {
        /// Names of tests; all if there is none
        tests: Vec<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Run tests that look for what other processes have left behind
    Tenants {
        /// Names of tests; all if there is none
        tests: Vec<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Kill the daemons of all devices at random moments, again and again
    Deaths {
        /// How many to kill
        #[arg(long, default_value_t = 20)]
        kills: u64,
        /// Reproduce the choices of an earlier run
        #[arg(long)]
        seed: Option<u64>,
        /// Print one JSON object on stdout
        #[arg(long)]
        json: bool,
    },
    /// Compare random operations of several processes with a model of their memory
    Model {
        #[command(flatten)]
        common: Common,
        /// Steps of a script
        #[arg(long, default_value_t = 2000)]
        steps: usize,
        /// Go on with scripts of further seeds for this time
        #[arg(long, default_value = "0s", value_parser = parse_duration)]
        duration: Duration,
        /// Run the script in this file instead; - is standard input
        #[arg(long, value_name = "FILE")]
        replay: Option<PathBuf>,
    },
}

#[derive(Args)]
struct Common {
    /// The device
    #[arg(long, default_value = "/dev/hmm0")]
    device: PathBuf,
    /// Reproduce the choices of an earlier run
    #[arg(long)]
    seed: Option<u64>,
    /// Print one JSON object on each line of stdout, all else on stderr
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::List { json } => list(json),
        Command::Run {
            scenarios,
            common,
            duration,
            threads,
            size,
            pages,
        } => select(&scenarios, scenario::ALL, |scenario| scenario.name).and_then(|selected| {
            let run = Run::new(&common, threads.into(), size, pages, Style::Lines)?;
            run.scenarios(&selected, duration)
        }),
        Command::Contract { tests, common } => run_tests(&tests, &common, contract::ALL, |test| {
            Some(contract::clause(test))
        }),
        Command::Neighbours { tests, common } => {
            run_tests(&tests, &common, neighbours::ALL, |_| None)
        }
        Command::Tenants { tests, common } => run_tests(&tests, &common, tenants::ALL, |_| None),
        Command::Deaths { kills, seed, json } => die(kills, seed.unwrap_or_else(random_seed), json),
        Command::Model {
            common,
            steps,
            duration,
            replay,
        } => read_script(replay.as_deref()).and_then(|script| {
            let size = model::PAGES * PAGE_SIZE;
            Run::new(&common, 1, size, 0, Style::Lines)?.model(script, steps, duration)
        }),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            eprintln!("hmm-stress: {}", failure.describe());
            ExitCode::from(2)
        }
    }
}

fn die(kills: u64, seed: u64, json: bool) -> Result<bool, Failure> {
    shared::share()?;
    let start = Instant::now();
    eprintln!("seed {seed}");
    let mut toll = Toll::default();
    let result = deaths::run(seed, kills, &mut toll);
    if json {
        print(&toll);
    } else {
        println!(
            "daemons killed {} in one boot, pages compared {}, lost with SIGBUS {}, wrong {}, complaints of the \
             kernel {}, in {:.0} s, seed {seed}",
            toll.kills,
            toll.checked,
            toll.lost,
            toll.wrong,
            toll.complaints,
            start.elapsed().as_secs_f64()
        );
    }
    result.map(|()| toll.wrong + toll.complaints == 0)
}

/// The script to replay, if there is one.
fn read_script(path: Option<&Path>) -> Result<Option<Vec<model::Step>>, Failure> {
    let Some(path) = path else {
        return Ok(None);
    };
    let text = if path.as_os_str() == "-" {
        io::read_to_string(io::stdin())
    } else {
        fs::read_to_string(path)
    };
    let text = text.map_err(|source| Failure::System {
        call: "reading the script",
        source,
    })?;
    model::read_script(&text).map(Some).map_err(Failure::Broken)
}

/// Run the named tests of a suite, or all; `clause` says which clause a test is about.
fn run_tests(
    names: &[String],
    common: &Common,
    all: &[Test],
    clause: fn(&Test) -> Option<String>,
) -> Result<bool, Failure> {
    let selected = select(names, all, |test| test.name)?;
    Run::new(common, 2, 64 << 20, 0, Style::Ktap)?.tests(&selected, clause)
}

/// The named items, or all.
fn select<T: Copy>(
    names: &[String],
    all: &[T],
    name_of: fn(&T) -> &'static str,
) -> Result<Vec<T>, Failure> {
    if names.is_empty() {
        return Ok(all.to_vec());
    }
    names
        .iter()
        .map(|name| {
            let found = all.iter().find(|item| name_of(item) == name);
            found.copied().ok_or_else(|| {
                Failure::Broken(format!("nothing is named {name}; see hmm-stress list"))
            })
        })
        .collect()
}

fn list(json: bool) -> Result<bool, Failure> {
    let scenarios = scenario::ALL.iter().map(|s| ("scenario", s.name, s.about));
    let tests = contract::ALL.iter().map(|t| ("test", t.name, t.about));
    let neighbours = neighbours::ALL
        .iter()
        .map(|t| ("neighbour", t.name, t.about));
    let tenants = tenants::ALL.iter().map(|t| ("tenant", t.name, t.about));
    let all = scenarios.chain(tests).chain(neighbours).chain(tenants);
    for (kind, name, about) in all {
        if json {
            print(&Listed {
                kind: kind.into(),
                name: name.into(),
                about: about.into(),
            });
        } else {
            println!("{kind:9} {name:46} {about}");
        }
    }
    Ok(true)
}

/// Print one JSON line. Nothing is left to do when stdout is closed.
fn print(line: &impl serde::Serialize) {
    if let Ok(text) = serde_json::to_string(line) {
        let _ = writeln!(io::stdout().lock(), "{text}");
    }
}

/// What is printed for people.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    Json,
    Lines,
    Ktap,
}

/// A run of scenarios or tests.
struct Run {
    context: Context,
    log: Option<KernelLog>,
    style: Style,
    seed: u64,
    start: Instant,
    before: Snapshot,
    cases: Vec<Case>,
}

impl Run {
    fn new(
        common: &Common,
        threads: usize,
        size: usize,
        pages_each_way: u64,
        style: Style,
    ) -> Result<Self, Failure> {
        shared::share()?;
        let seed = common.seed.unwrap_or_else(random_seed);
        let info = Device::open(&common.device)?.info()?;
        let ram = fs::read_to_string("/proc/meminfo")
            .ok()
            .and_then(|text| available_ram(&text))
            .unwrap_or(u64::MAX);
        let pages = fit_pages(size, info.memory_free, ram);
        let context = Context::new(common.device.clone(), seed, threads, pages, pages_each_way)?;
        let log = KernelLog::open()
            .inspect_err(|failure| {
                eprintln!("the kernel's log is not looked at: {}", failure.describe())
            })
            .ok();
        let style = if common.json { Style::Json } else { style };
        let size = (pages * PAGE_SIZE) as u64;
        match style {
            Style::Json => {
                print(&Line::Begin {
                    seed,
                    size,
                    threads,
                });
                eprintln!("seed {seed}");
            }
            Style::Lines => println!("seed {seed}, {size} bytes a region, {threads} threads"),
            Style::Ktap => println!("KTAP version 1\n# seed {seed}"),
        }
        Ok(Self {
            before: Snapshot::take(&context)?,
            context,
            log,
            style,
            seed,
            start: Instant::now(),
            cases: Vec::new(),
        })
    }

    fn scenarios(mut self, scenarios: &[Scenario], duration: Duration) -> Result<bool, Failure> {
        let weights: u32 = scenarios.iter().map(|scenario| scenario.weight).sum();
        for scenario in scenarios {
            self.context.duration = duration * scenario.weight / weights.max(1);
            let deadline = SCENARIO_DEADLINE + 10 * self.context.duration;
            let line: fn(Case) -> Line = Line::Scenario;
            self.case(scenario.name, deadline, scenario.run, line);
        }
        self.finish()
    }

    fn tests(
        mut self,
        tests: &[Test],
        clause: fn(&Test) -> Option<String>,
    ) -> Result<bool, Failure> {
        if self.style == Style::Ktap {
            println!("1..{}", tests.len());
        }
        // Leave other bytes all over device memory, for tests that look for zeros.
        let frames = self.context.free()? / PAGE_SIZE as u64;
        self.context.soil(usize::try_from(frames).unwrap_or(0))?;
        for test in tests {
            let clause = clause(test);
            self.case(test.name, TEST_DEADLINE, test.run, move |case| Line::Test {
                clause,
                case,
            });
        }
        self.finish()
    }

    fn model(
        mut self,
        script: Option<Vec<model::Step>>,
        steps: usize,
        duration: Duration,
    ) -> Result<bool, Failure> {
        self.context.duration = duration;
        let seed = self.seed;
        let each = MODEL_STEP * u32::try_from(steps).unwrap_or(u32::MAX);
        let deadline = SCENARIO_DEADLINE + model::SHRINK_TIME + each + 10 * duration;
        let body = move |context: &Context| match script {
            Some(script) => model::replay(context, &script),
            None => model::explore(context, seed, steps),
        };
        self.case("model", deadline, body, Line::Scenario);
        self.finish()
    }

    fn case(
        &mut self,
        name: &str,
        deadline: Duration,
        body: impl FnOnce(&Context) -> Result<(), Failure>,
        line: impl FnOnce(Case) -> Line + Clone + Send + 'static,
    ) {
        // The choices of a scenario do not depend on which others run.
        self.context.seed = name
            .bytes()
            .fold(self.seed, |seed, byte| mix(seed ^ u64::from(byte)));
        let (style, number) = (self.style, self.cases.len() + 1);
        let late = {
            let line = line.clone();
            move |case: Case| show(style, number, &case, line)
        };
        let case = case::run(name, &self.context, &mut self.log, deadline, late, body);
        show(style, number, &case, line);
        self.cases.push(case);
    }

    fn finish(self) -> Result<bool, Failure> {
        let after = Snapshot::take(&self.context)?;
        let (driver, device) = after.since(&self.before);
        let count = |verdict| {
            let cases = self.cases.iter().filter(|case| case.result == verdict);
            cases.count() as u64
        };
        let measurements = self.context.measurements();
        let summary = Summary {
            seed: self.seed,
            seconds: self.start.elapsed().as_secs_f64(),
            passed: count(Verdict::Pass),
            failed: count(Verdict::Fail),
            skipped: count(Verdict::Skip),
            mismatches: self.cases.iter().map(|case| case.mismatches).sum(),
            fault_latency_ns: after.faults_since(&self.before),
            to_device: measurements.to_device,
            to_system: measurements.to_system,
            driver,
            device,
        };
        let passed = summary.failed == 0 && summary.mismatches == 0;
        let totals = format!(
            "pass:{} fail:{} skip:{}",
            summary.passed, summary.failed, summary.skipped
        );
        match self.style {
            Style::Json => print(&Line::Summary(Box::new(summary))),
            Style::Ktap => println!("# Totals: {totals} seed:{}", self.seed),
            Style::Lines => {
                println!(
                    "{totals} mismatches:{} in {:.1} s, seed {}",
                    summary.mismatches, summary.seconds, summary.seed
                );
                for (way, transfer) in [
                    ("to the device", summary.to_device),
                    ("to RAM", summary.to_system),
                ] {
                    if transfer.ns > 0 {
                        let rate = transfer.bytes as f64 * 1e3 / transfer.ns as f64;
                        println!("{way}: {} bytes, {rate:.0} MB/s", transfer.bytes);
                    }
                }
                let latency = summary.fault_latency_ns;
                if latency.count > 0 {
                    println!(
                        "CPU faults: {} measured, p50 {} ns, p99 {} ns, max {} ns",
                        latency.count, latency.p50, latency.p99, latency.max
                    );
                }
            }
        }
        Ok(passed)
    }
}

/// Print how a scenario or test ended.
fn show(style: Style, number: usize, case: &Case, line: impl FnOnce(Case) -> Line) {
    let reason = case.reason.as_deref().unwrap_or_default();
    match (style, case.result) {
        (Style::Json, verdict) => {
            eprintln!("{verdict:?} {} {reason}", case.name);
            print(&line(case.clone()));
        }
        (Style::Lines, verdict) => println!(
            "{:4} {:16} {:6.1} s {:8} operations {reason}",
            format!("{verdict:?}").to_lowercase(),
            case.name,
            case.seconds,
            case.operations
        ),
        (Style::Ktap, Verdict::Pass) => println!("ok {number} {}", case.name),
        (Style::Ktap, Verdict::Skip) => println!("ok {number} {} # SKIP {reason}", case.name),
        (Style::Ktap, Verdict::Fail) => {
            println!("# {reason}\nnot ok {number} {}", case.name);
        }
    }
}

/// A seed from the time and the process, different from run to run.
fn random_seed() -> u64 {
    let time = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |time| {
            time.as_secs() ^ u64::from(time.subsec_nanos()) << 32
        });
    // Short enough to be typed again.
    mix(time ^ u64::from(std::process::id()) << 48) >> 32
}
