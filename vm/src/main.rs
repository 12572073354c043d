//! `cargo vm`.

use std::io::{IsTerminal, stdin, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use hmm_bench::contender::Contender;
use hmm_vm::apt::MIRROR_VARIABLE;
use hmm_vm::error::{EXIT_COUNTERS, with_sources};
use hmm_vm::fuzz::{Fuzzers, Target};
use hmm_vm::page::Pages;
use hmm_vm::paths::{Cache, remove_all};
use hmm_vm::prepare::{Job, MachineOptions, Platform, Prepared, dry_run, log_tail};
use hmm_vm::reconcile::grouped;
use hmm_vm::report_directory::ReportDirectory;
use hmm_vm::run::pass_on;
use hmm_vm::sampler::Sampler;
use hmm_vm::stress::{self, Wanted};
use hmm_vm::toolbox::{self, TOOLBOX_VARIABLE};
use hmm_vm::units::parse_duration;
use hmm_vm::view::check_terminal;
use hmm_vm::{Error, Result, bench, demo, doctor, reconcile, testing, torture};
use serde::Serialize;

#[derive(Parser)]
#[command(
    name = "cargo vm",
    about = "Boots a VM with a virtual HMM device and runs programs in it"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a command in the guest and end with its exit status
    #[command(
        after_help = "Exit status: the command's own (128+N if signal N ended it, or the run); \
        122 driver and device counted different amounts, 123 the guest's kernel complained, \
        124 a time limit, 125 any other failure."
    )]
    Run {
        #[command(flatten)]
        machine: MachineOptions,
        /// Copy a file or directory into the guest's /root (again for more)
        #[arg(long, value_name = "PATH")]
        with: Vec<PathBuf>,
        /// Put a Debian package into the guest, and what it depends on (again for more)
        #[arg(long, value_name = "NAME")]
        with_package: Vec<String>,
        /// Set a variable in the command's environment (again for more)
        #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
        env: Vec<(String, String)>,
        /// Show on standard error what driver and device counted
        #[arg(long, conflicts_with = "no_device")]
        counters: bool,
        /// Show what the devices do on the terminal, as hmm-top does; the output comes once q has ended that
        #[arg(long, conflicts_with_all = ["no_device", "gdb"])]
        top: bool,
        /// The command and its arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Stress the device for a moment and compare what guest and host counted
    #[command(
        after_help = "Exit status: 0 only if every scenario passed, no page was wrong and the \
        counters reconcile; 1 if not, 123 to 125 as for run."
    )]
    Demo {
        #[command(flatten)]
        machine: MachineOptions,
        /// Repeat the stress of an earlier run
        #[arg(long)]
        seed: Option<u64>,
        /// Show what the devices do on the terminal, as hmm-top does, until q or the end
        #[arg(long, conflicts_with_all = ["no_device", "gdb", "json"])]
        top: bool,
        /// Print one JSON object on standard output
        #[arg(long)]
        json: bool,
    },
    /// Stress the device for a long time with ever new seeds, and look what is left behind
    #[command(
        after_help = "Exit status: 0 only if every case passed, no page was wrong, the counters \
        reconcile and nothing is left behind; 1 if not, 123 to 125 as for run."
    )]
    Stress {
        #[command(flatten)]
        machine: MachineOptions,
        /// For how long; everything runs at least once
        #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "10m")]
        duration: Duration,
        /// Seed of the first turn
        #[arg(long)]
        seed: Option<u64>,
        /// Take one turn only: a scenario, contract, neighbours or model
        #[arg(long, value_name = "NAME")]
        turn: Option<String>,
        /// Write a page with charts, and its data, into this directory
        #[arg(long, value_name = "DIR")]
        report: Option<PathBuf>,
        /// Show what the devices do on the terminal, as hmm-top does, until q or the end
        #[arg(long, conflicts_with_all = ["no_device", "gdb", "json"])]
        top: bool,
        /// Print one JSON object on standard output
        #[arg(long)]
        json: bool,
    },
    /// Measure the device beside test_hmm, swap and zram
    #[command(
        after_help = "Exit status: 0 only if the device was measured, its bytes were right and the \
        counters reconcile; 1 if not, 123 to 125 as for run."
    )]
    Bench {
        #[command(flatten)]
        machine: MachineOptions,
        /// Rounds; each contender does each work once in a round
        #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
        rounds: u32,
        /// Measure only works whose name has this in it, such as 64M-4k-1t or back (again for more)
        #[arg(long, value_name = "PATTERN")]
        only: Vec<String>,
        /// Measure only this one beside the device: test_hmm, swap or zram (again for more)
        #[arg(long, value_name = "CONTENDER")]
        against: Vec<Contender>,
        /// Repeat the choices of an earlier run
        #[arg(long)]
        seed: Option<u64>,
        /// Write a page with charts, and its data, into this directory
        #[arg(long, value_name = "DIR")]
        report: Option<PathBuf>,
        /// Print one JSON object on standard output
        #[arg(long)]
        json: bool,
    },
    /// Try inputs that nobody thought of on what reads input
    #[command(
        after_help = "Exit status: 0 only if no input shows a fault; 1 if one does, 125 for any \
        other failure. Inputs that reach new code are kept for the next time."
    )]
    Fuzz {
        /// Try only these targets
        #[arg(value_name = "TARGET")]
        targets: Vec<Target>,
        /// For how long to try each
        #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "10m")]
        duration: Duration,
        /// Try the one input in this file
        #[arg(
            long,
            value_name = "FILE",
            requires = "targets",
            conflicts_with = "duration"
        )]
        input: Option<PathBuf>,
    },
    /// Try what is hostile to the device, and what comes from one that fails, and add it all up
    #[command(
        after_help = "Parts: conformance; delay, reorder, error, short, status, poison, drop, \
        stall and dead, each a fault on purpose; deaths; fuzz.\n\
        Exit status: 0 only if no page was wrong, no guest's kernel complained and every part \
        passed; 1 if not, 125 for a failure of the tool."
    )]
    Torture {
        #[command(flatten)]
        machine: MachineOptions,
        /// Do only this part (again for more)
        #[arg(long, value_name = "PART")]
        only: Vec<String>,
        /// How long the device is stressed with each fault, and each fuzz target has
        #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "5s")]
        duration: Duration,
        /// Device daemons to kill
        #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        kills: u32,
        /// Repeat the choices of an earlier run
        #[arg(long)]
        seed: Option<u64>,
        /// Print one JSON object on standard output
        #[arg(long)]
        json: bool,
    },
    /// Run every test of the project
    Test {
        #[command(flatten)]
        platform: Platform,
        /// Run only this program of VM tests, of those in tests/e2e/tests (again for more)
        #[arg(long, value_name = "PROGRAM")]
        only: Vec<String>,
    },
    /// Say what is there, what is missing and what would be done
    Doctor {
        /// Where QEMU, the stock kernel and the compiler come from
        #[arg(long, value_enum, default_value_t = toolbox::Choice::Auto, env = TOOLBOX_VARIABLE)]
        toolbox: toolbox::Choice,
        /// Debian mirror for the toolbox
        #[arg(long, value_name = "URL", env = MIRROR_VARIABLE)]
        mirror: Option<String>,
    },
    /// Remove everything this tool has made outside the checkout
    Clean,
    /// A shell in the guest, with the driver loaded
    #[command(
        after_help = "On a terminal the shell has the guest's console; Ctrl-A x ends the \
        machine. Otherwise it reads its commands from standard input."
    )]
    Boot {
        #[command(flatten)]
        machine: MachineOptions,
        /// Copy a file or directory into the guest's /root (again for more)
        #[arg(long, value_name = "PATH")]
        with: Vec<PathBuf>,
        /// Put a Debian package into the guest, and what it depends on (again for more)
        #[arg(long, value_name = "NAME")]
        with_package: Vec<String>,
        /// Show on standard error what driver and device counted
        #[arg(long, conflicts_with = "no_device")]
        counters: bool,
    },
}

fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("not of the form NAME=VALUE".into()),
    }
}

fn main() -> ExitCode {
    match execute(Cli::parse().command) {
        Ok(status) => status.into(),
        Err(error) => {
            if let Error::Run { logs, .. } = &error
                && !error.is_interruption()
            {
                eprintln!("{}", log_tail(logs));
            }
            eprintln!("virtio-hmm: {}", with_sources(&error));
            error.exit_status().into()
        }
    }
}

fn execute(command: Command) -> Result<u8> {
    match command {
        Command::Run {
            machine,
            with,
            with_package,
            env,
            counters,
            top,
            command,
        } => run(
            &machine,
            counters,
            &Job {
                command,
                files: with,
                packages: with_package,
                environment: env.into_iter().collect(),
                forward_input: !stdin().is_terminal(),
                top,
                ..Job::default()
            },
        ),
        Command::Demo {
            machine,
            seed,
            top,
            json,
        } => {
            if machine.dry_run {
                print!("{}", dry_run(&machine, false)?);
                return Ok(0);
            }
            check_top(top)?;
            let demo = demo::run(&machine, seed, top)?;
            show(&demo, demo.table(), json)?;
            Ok(u8::from(!demo.passed()))
        }
        Command::Stress {
            machine,
            duration,
            seed,
            turn,
            report,
            top,
            json,
        } => {
            if machine.dry_run {
                print!("{}", dry_run(&machine, false)?);
                return Ok(0);
            }
            let wanted = Wanted {
                duration,
                seed,
                turn: turn.as_deref(),
                top,
            };
            check_top(top)?;
            let directory = report.as_deref().map(ReportDirectory::open).transpose()?;
            let sampler = directory.is_some().then(Sampler::default);
            let stress = stress::run(&machine, wanted, sampler)?;
            show(&stress, stress.table(), json)?;
            if let Some(directory) = directory {
                directory.write(&Pages::of_stress(&stress))?;
            }
            Ok(stress.status)
        }
        Command::Bench {
            machine,
            rounds,
            only,
            against,
            seed,
            report,
            json,
        } => {
            let machine = bench::with_profile(machine);
            let wanted = bench::Wanted {
                rounds,
                only: &only,
                against: &against,
                seed,
            };
            wanted.check()?;
            if machine.dry_run {
                print!("{}", dry_run(&machine, false)?);
                return Ok(0);
            }
            let directory = report.as_deref().map(ReportDirectory::open).transpose()?;
            let sampler = directory.is_some().then(Sampler::default);
            let bench = bench::run(&machine, wanted, sampler)?;
            show(&bench, bench.table(), json)?;
            if let Some(directory) = directory {
                directory.write(&Pages::of_bench(&bench))?;
            }
            Ok(u8::from(!bench.passed()))
        }
        Command::Fuzz {
            targets,
            duration,
            input,
        } => fuzz(&targets, duration, input.as_deref()),
        Command::Torture {
            machine,
            only,
            duration,
            kills,
            seed,
            json,
        } => {
            let wanted = torture::Wanted {
                only: &only,
                duration,
                kills,
                seed,
            };
            wanted.check(&machine)?;
            if machine.dry_run {
                print!("{}", dry_run(&machine, false)?);
                return Ok(0);
            }
            let torture = torture::run(&machine, wanted)?;
            show(&torture, torture.table(), json)?;
            Ok(u8::from(!torture.passed()))
        }
        Command::Test { platform, only } => {
            Ok(u8::from(testing::run_tests(&platform, &only)?.failed > 0))
        }
        Command::Doctor { toolbox, mirror } => {
            Ok(u8::from(!doctor::run(toolbox, mirror.as_deref())?))
        }
        Command::Clean => clean().map(|()| 0),
        Command::Boot {
            machine,
            with,
            with_package,
            counters,
        } => {
            let interactive = stdin().is_terminal() && stdout().is_terminal();
            let mut command = vec!["sh".to_owned()];
            command.extend(interactive.then(|| "-l".to_owned()));
            run(
                &machine,
                counters,
                &Job {
                    command,
                    files: with,
                    packages: with_package,
                    interactive,
                    forward_input: !interactive,
                    ..Job::default()
                },
            )
        }
    }
}

fn show(result: &impl Serialize, table: String, json: bool) -> Result<()> {
    if json {
        let text = serde_json::to_string(result).map_err(std::io::Error::from);
        println!("{}", text.map_err(Error::Protocol)?);
    } else {
        print!("{table}");
    }
    Ok(())
}

/// Runs fuzz targets, all if none is named, and tells how many inputs were tried.
fn fuzz(targets: &[Target], duration: Duration, input: Option<&Path>) -> Result<u8> {
    let targets = match targets {
        [] => Target::value_variants(),
        some => some,
    };
    let fuzzers = Fuzzers::build(&Cache::locate()?)?;
    let mut failed = false;
    for target in targets {
        let name = target.name();
        let result = match input {
            Some(file) => fuzzers.repeat(*target, file).map(|()| 1),
            None => fuzzers.run(*target, duration),
        };
        match result {
            Ok(inputs) => println!("{name:<8}{:>15} inputs tried", grouped(inputs)),
            Err(error @ Error::Finding(_)) => {
                failed = true;
                println!("{name:<8}{}", with_sources(&error));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(failed.into())
}

/// Removes what the tool puts into its cache, and the cache if nothing else is in it.
fn clean() -> Result<()> {
    let cache = Cache::locate()?;
    for path in cache.entries() {
        remove_all(&path)?;
    }
    // It may hold files of the user's, and then stays.
    let _ = std::fs::remove_dir(cache.root());
    eprintln!(
        "virtio-hmm: {} is clean; `cargo clean` removes what cargo built",
        cache.root().display()
    );
    Ok(())
}

fn check_top(wanted: bool) -> Result<()> {
    if wanted { check_terminal() } else { Ok(()) }
}

fn run(machine: &MachineOptions, counters: bool, job: &Job) -> Result<u8> {
    if machine.dry_run {
        print!("{}", dry_run(machine, job.interactive)?);
        return Ok(0);
    }
    check_top(job.top)?;
    let finished = Prepared::new(machine)?.run(job, &mut pass_on)?;
    if reconcile::tell(&finished.devices, counters) {
        return Ok(EXIT_COUNTERS);
    }
    Ok(finished.end.exit_status())
}
