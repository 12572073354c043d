//! `hmm-bench`: virtio-hmm beside what is used instead, run in the guest.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use fastrand::Rng;
use hmm_bench::contender::{self, Contender, Devices};
use hmm_bench::measure::measure;
use hmm_bench::report::{Line, Results, table};
use hmm_bench::work::{self, Memory, Step, Work};
use hmm_stress::failure::Failure;

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    /// Rounds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Measure only the works whose name has this in it (again for more)
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
    /// Measure only this one beside virtio-hmm (again for more)
    #[arg(long, value_name = "CONTENDER")]
    against: Vec<Contender>,
    /// Reproduce the choices of an earlier run
    #[arg(long)]
    seed: Option<u64>,
    /// This project's device
    #[arg(long, default_value = "/dev/hmm0")]
    device: PathBuf,
    /// The device of the kernel's `test_hmm`
    #[arg(long, default_value = "/dev/hmm_dmirror0")]
    test_hmm: PathBuf,
    /// A disk with a swap signature
    #[arg(long, default_value = "/dev/vda")]
    swap: PathBuf,
    /// A zram disk with a swap signature
    #[arg(long, default_value = "/dev/zram0")]
    zram: PathBuf,
    /// Print one JSON object on each line of stdout
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let works = match work::matching(&cli.only) {
        Ok(works) => works,
        Err(error) => {
            eprintln!("hmm-bench: {error}");
            return ExitCode::from(2);
        }
    };
    let mut results = Results::default();
    run(&cli, &works, &mut |line| {
        if cli.json {
            print(&line);
        }
        results.add(line);
    });
    if !cli.json {
        print!("{}", table(&results.cells()));
    }
    match results.failed() {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}

/// Print one JSON line. Nothing is left to do when stdout is closed.
fn print(line: &Line) {
    if let Ok(text) = serde_json::to_string(line) {
        let _ = writeln!(io::stdout().lock(), "{text}");
    }
}

fn run(cli: &Cli, works: &[Work], tell: &mut dyn FnMut(Line)) {
    let start = Instant::now();
    let seed = cli.seed.unwrap_or_else(|| Rng::new().u64(..1 << 32));
    let mut rng = Rng::with_seed(seed);
    let devices = Devices {
        virtio_hmm: cli.device.clone(),
        test_hmm: cli.test_hmm.clone(),
        swap: cli.swap.clone(),
        zram: cli.zram.clone(),
    };
    let mut contenders = Contender::ALL.to_vec();
    contenders.retain(|one| {
        *one == Contender::VirtioHmm || cli.against.is_empty() || cli.against.contains(one)
    });
    tell(Line::Begin {
        seed,
        rounds: cli.rounds,
        contenders: contenders.clone(),
    });
    let mut missing: Vec<(Memory, Contender)> = Vec::new();
    for round in 1..=cli.rounds {
        for works in works.chunk_by(|one, other| one.memory == other.memory) {
            let Some(memory) = works.first().map(|work| work.memory) else {
                continue;
            };
            let steps: Vec<Step> = works.iter().map(|work| work.step).collect();
            eprintln!(
                "round {round} of {}, {memory}, after {:.0} s",
                cli.rounds,
                start.elapsed().as_secs_f64()
            );
            for &contender in &contenders {
                if missing.contains(&(memory, contender)) {
                    continue;
                }
                let measured = match memory.impossible() {
                    Some(reason) => Err(Failure::Skip(reason.into())),
                    None => contender::start(contender, &devices, memory)
                        .and_then(|session| measure(&*session, memory, &steps, &mut rng)),
                };
                match measured {
                    Ok(samples) => {
                        for (step, sample) in samples {
                            tell(Line::Sample {
                                contender,
                                work: Work { memory, step },
                                round,
                                page_ns: sample.page_ns,
                            });
                        }
                    }
                    Err(failure) => {
                        missing.push((memory, contender));
                        for &step in &steps {
                            tell(Line::Missing {
                                contender,
                                work: Work { memory, step },
                                failed: !matches!(failure, Failure::Skip(_)),
                                reason: failure.describe(),
                            });
                        }
                    }
                }
            }
        }
        // Who comes after whom changes from round to round.
        contenders.rotate_left(1);
    }
    tell(Line::End {
        seconds: start.elapsed().as_secs_f64(),
    });
}
