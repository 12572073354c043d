//! `cargo vm fuzz`: tries inputs that nobody thought of on what reads input, with
//! the targets of `fuzz/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::ValueEnum;

use crate::build::{TARGET, cargo, run_build};
use crate::error::{Error, FileContext, Result};
use crate::paths::{self, Cache};
use crate::process::{run, tail};
use crate::report::Report;

/// Has the compiler tell libFuzzer which code an input reaches, as cargo-fuzz does.
const FLAGS: [&str; 7] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
];
/// Longest input, in bytes, and longest time that one may take, in seconds.
const LIMITS: [&str; 2] = ["-max_len=8192", "-timeout=25"];
/// What libFuzzer calls the number of inputs that it tried.
const INPUTS: &str = "stat::number_of_executed_units:";

/// A fuzz target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum Target {
    Request,
    Ring,
    Control,
    Profile,
}

impl Target {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Ring => "ring",
            Self::Control => "control",
            Self::Profile => "profile",
        }
    }

    /// Inputs that are known to be interesting.
    fn seeds(self) -> PathBuf {
        match self {
            Self::Profile => paths::checkout().join("qemu-configs"),
            _ => fuzz().join("corpus").join(self.name()),
        }
    }
}

fn fuzz() -> PathBuf {
    paths::checkout().join("fuzz")
}

/// The targets, built.
#[derive(Debug)]
pub struct Fuzzers {
    programs: PathBuf,
    found: PathBuf,
}

impl Fuzzers {
    /// Builds them; what the compiler says goes to standard error.
    ///
    /// # Errors
    /// There is no C++ compiler, which libFuzzer needs, or the build fails.
    pub fn build(cache: &Cache) -> Result<Self> {
        if !run(Command::new("c++").arg("--version")).is_ok_and(|output| output.status.success()) {
            return Err(Error::NoCompiler);
        }
        let target = cache.fuzz().join("target");
        let mut command = cargo();
        command
            .args([
                "build",
                "--locked",
                "--release",
                "--bins",
                "--target",
                TARGET,
            ])
            .arg("--manifest-path")
            .arg(fuzz().join("Cargo.toml"))
            .arg("--target-dir")
            .arg(&target)
            .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"));
        if target.exists() {
            command.arg("--quiet");
        } else {
            Report.line("building the fuzz targets");
        }
        run_build(&mut command)?;
        Ok(Self {
            programs: target.join(TARGET).join("release"),
            found: cache.fuzz().join("corpus"),
        })
    }

    /// Tries inputs on `target` for a time, beginning with those that it kept the last
    /// time. Returns how many they were.
    ///
    /// # Errors
    /// One of them shows a fault.
    pub fn run(&self, target: Target, duration: Duration) -> Result<u64> {
        let found = self.found.join(target.name());
        // Where cargo-fuzz puts them.
        let artifacts = fuzz().join("artifacts").join(target.name());
        for directory in [&found, &artifacts] {
            fs::create_dir_all(directory).at("create", directory)?;
        }
        let mut command = self.command(target);
        command
            .arg(format!("-max_total_time={}", duration.as_secs()))
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .arg("-print_final_stats=1")
            .args([found, target.seeds()]);
        inputs(&output(&mut command)?).ok_or(Error::NoInputs)
    }

    /// Tries the input in a file.
    ///
    /// # Errors
    /// It shows a fault.
    pub fn repeat(&self, target: Target, file: &Path) -> Result<()> {
        output(self.command(target).arg(file)).map(drop)
    }

    fn command(&self, target: Target) -> Command {
        let mut command = Command::new(self.programs.join(target.name()));
        command.args(LIMITS);
        command
    }
}

/// Runs a target to its end and returns what it said.
fn output(command: &mut Command) -> Result<String> {
    let output = run(command)?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    Err(Error::Finding(finding(&text)))
}

/// What libFuzzer and the target said of an input that shows a fault: from the panic on,
/// without the stack and what the input looks like.
fn finding(text: &str) -> String {
    let said = |line: &&str| {
        let line = line.trim_start();
        let frame = |line: &str| {
            line.split_once(": ")
                .is_some_and(|(n, _)| n.parse::<u32>().is_ok())
        };
        !(frame(line) || line.starts_with("at ") || line.starts_with("0x") || line.starts_with('#'))
    };
    let from = text.find("panicked at").map_or(0, |at| {
        text.get(..at)
            .and_then(|before| before.rfind('\n'))
            .unwrap_or(0)
    });
    let lines: Vec<&str> = text
        .get(from..)
        .unwrap_or(text)
        .lines()
        .filter(said)
        .collect();
    tail(&lines.join("\n"), 30)
}

fn inputs(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(INPUTS))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_known_and_has_seeds() {
        let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
        let targets = Target::value_variants();
        for target in targets {
            let path = format!("path = \"fuzz_targets/{}.rs\"", target.name());
            assert!(manifest.contains(&path), "{path}");
            assert!(fs::read_dir(target.seeds()).unwrap().count() > 0);
        }
        assert_eq!(manifest.matches("fuzz_targets/").count(), targets.len());
    }

    #[test]
    fn the_number_of_inputs_is_read() {
        let text = "Done 12 runs\nstat::number_of_executed_units: 12\nstat::peak_rss_mb: 3\n";
        assert_eq!(inputs(text), Some(12));
        assert_eq!(inputs("Done 12 runs"), None);
    }

    #[test]
    fn a_finding_is_what_went_wrong_and_the_file() {
        let text = "#12\tNEW cov: 3\n\nthread '<unnamed>' panicked at ring.rs:9:1:\n3 bytes in 2\n\
                    stack backtrace:\n   0: rust_panic\n             at /lib.rs:1:2\n\
                    0x0,0xb,\nTest unit written to ring/crash-1\n";
        let finding = finding(text);
        assert!(
            finding.contains("3 bytes in 2") && finding.contains("crash-1"),
            "{finding}"
        );
        assert!(
            !finding.contains("NEW") && !finding.contains("lib.rs"),
            "{finding}"
        );
    }
}
