//! `cargo vm bench`: the device beside what is used instead, in one guest.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hmm_bench::contender::Contender;
use hmm_bench::report::{Cell, Line, Results, table};
use hmm_bench::work;
use hmm_init::Stream;
use serde::Serialize;

use crate::build::Programs;
use crate::demo::random_seed;
use crate::environment::Environment;
use crate::error::{Error, Result, with_sources};
use crate::prepare::{Job, MachineOptions, Prepared};
use crate::reconcile;
use crate::report::Report;
use crate::run::{End, pass_on};
use crate::sampler::{History, Sampler};

/// Package and program that runs in the guest.
const PROGRAM: &str = "hmm-bench";

/// How long a machine that has other things to do may take.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Modules of the kernel's that the contenders need.
const MODULES: [&str; 3] = [
    "drivers/block/virtio_blk.ko",
    "lib/lz4/lz4hc_compress.ko",
    "drivers/block/zram/zram.ko",
];

/// Makes the contenders' devices. Where one is missing, the program says so.
const SURROUNDINGS: &str = "
for module in virtio_blk lz4hc_compress zram test_hmm; do
    [ ! -e $module.ko.xz ] || unxz $module.ko.xz
    [ ! -e $module.ko ] || insmod $module.ko || exit 91
done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo +memory > /sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/hmm-bench
echo $$ > /sys/fs/cgroup/hmm-bench/cgroup.procs
[ ! -e /sys/block/zram0 ] || echo 512M > /sys/block/zram0/disksize
for disk in /dev/vda /dev/zram0; do
    [ ! -e $disk ] || mkswap $disk >/dev/null || exit 92
done
";

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Rounds, in each of which each contender does each work once.
    pub rounds: u32,
    /// Works whose name has one of these in it; all if there is none.
    pub only: &'a [String],
    /// Whom to measure beside the device; all if there is none.
    pub against: &'a [Contender],
    /// Seed of the choices.
    pub seed: Option<u64>,
}

impl Wanted<'_> {
    /// Looks whether there is something to measure.
    ///
    /// # Errors
    /// A pattern is in no work's name.
    pub fn check(&self) -> Result<()> {
        let works = work::matching(self.only);
        works.map(drop).map_err(Error::Config)
    }

    /// The program's command line, a word that a shell takes as it is for each argument.
    fn command(&self, seed: u64) -> String {
        let mut words = format!("{PROGRAM} --json --rounds {} --seed {seed}", self.rounds);
        // Every pattern is part of a work's name.
        for pattern in self.only {
            words += &format!(" --only '{pattern}'");
        }
        for contender in self.against {
            words += &format!(" --against {contender}");
        }
        words
    }
}

/// The result, as `--json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct Bench {
    /// Where it was got.
    #[serde(flatten)]
    pub environment: Environment,
    /// Seed that repeats the choices.
    pub seed: u64,
    /// Rounds that were asked for.
    pub rounds: u32,
    /// Each work of each contender, work by work.
    pub cells: Vec<Cell>,
    /// Whether a work of the device went wrong.
    pub failed: bool,
    /// From QEMU's start to the guest's first line.
    pub boot_seconds: f64,
    /// The measurement alone.
    pub bench_seconds: f64,
    /// All of it, with what had to be made first.
    pub seconds: f64,
    /// What the device did over the time; empty if nobody watched.
    #[serde(skip)]
    pub histories: Vec<History>,
}

impl Bench {
    /// Whether all was measured that can be.
    #[must_use]
    pub fn passed(&self) -> bool {
        !self.failed
    }

    /// The table for a person.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = table(&self.cells);
        let Environment {
            accelerator,
            kernel,
            qemu,
            cpu,
            cpus,
            commit,
            ..
        } = &self.environment;
        let _ = writeln!(
            text,
            "\nmedian of {} rounds (lowest-highest); after it virtio-hmm's speed divided by this\n\
            one's, of geometric means: above 1 virtio-hmm is the faster; commit {commit}, seed {}\n\
            Linux {kernel} on QEMU {qemu}, {accelerator}, {cpus} CPUs of {cpu}\n\
            boot {:.1} s, measurement {:.1} s, all {:.1} s",
            self.rounds, self.seed, self.boot_seconds, self.bench_seconds, self.seconds
        );
        text
    }
}

/// The options with the profile that the bench is for, unless they name another.
#[must_use]
pub fn with_profile(mut options: MachineOptions) -> MachineOptions {
    options.profile.get_or_insert_with(|| "bench".into());
    options
}

/// Boots a machine and measures all contenders in it, watched by the sampler if there is one.
///
/// # Errors
/// The machine or the program could not be run to the end.
pub fn run(options: &MachineOptions, wanted: Wanted, sampler: Option<Sampler>) -> Result<Bench> {
    let started = Instant::now();
    let mut options = options.clone();
    options.timeout.get_or_insert(PATIENCE);
    let prepared = Prepared::new(&options)?;
    let seed = wanted.seed.unwrap_or_else(random_seed);
    let command = wanted.command(seed);
    Report.line(&format!(
        "booting on {} and running {command}",
        prepared.accelerator()
    ));
    let job = Job {
        command: vec!["sh".into(), "-c".into(), format!("{SURROUNDINGS}{command}")],
        files: files(&prepared)?,
        sampler,
        ..Job::default()
    };
    let mut lines = Lines::default();
    let finished = prepared.run(&job, &mut |stream, data| match stream {
        Stream::Stdout => {
            lines.add(data);
            Ok(())
        }
        Stream::Stderr => pass_on(Stream::Stderr, data),
    })?;
    let results = lines.results;
    let Some(bench_seconds) = results.seconds else {
        return Err(Error::Stress(finished.end));
    };
    Ok(Bench {
        environment: Environment::of(&prepared)?,
        seed,
        rounds: results.rounds,
        cells: results.cells(),
        failed: results.failed()
            || finished.end != End::Status(0)
            || reconcile::tell(&finished.devices, false),
        boot_seconds: finished.boot.as_secs_f64(),
        bench_seconds,
        seconds: started.elapsed().as_secs_f64(),
        histories: job.sampler.map_or_else(Vec::new, |sampler| {
            sampler.histories(lines.first.unwrap_or(started))
        }),
    })
}

/// The program and the modules, as far as they can be had.
fn files(prepared: &Prepared) -> Result<Vec<PathBuf>> {
    let programs = Programs::locate()?;
    programs.build_packages(&[PROGRAM])?;
    let mut files = prepared.kernel().module_files(&MODULES);
    files.push(programs.path(PROGRAM));
    match prepared.test_hmm() {
        Ok(module) => files.push(module),
        Err(error) => Report.line(&format!("without test_hmm: {}", with_sources(&error))),
    }
    Ok(files)
}

/// The program's lines as they come in.
#[derive(Default)]
struct Lines {
    partial: Vec<u8>,
    first: Option<Instant>,
    results: Results,
}

impl Lines {
    fn add(&mut self, data: &[u8]) {
        self.first.get_or_insert_with(Instant::now);
        self.partial.extend_from_slice(data);
        while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
            let rest = self.partial.split_off(end + 1);
            let line = std::mem::replace(&mut self.partial, rest);
            if let Ok(line) = serde_json::from_slice::<Line>(&line) {
                self.results.add(line);
            }
        }
    }
}
