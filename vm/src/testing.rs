//! `cargo vm test`: every test of the project, and one line at the end.

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use rustix::process::Signal;

use crate::apt::MIRROR_VARIABLE;
use crate::build::{cargo, copy_module_sources, make_command, module_sources, source_files};
use crate::error::{Error, FileContext, Result, with_sources};
use crate::fuzz::{Fuzzers, Target};
use crate::kernel::{KERNEL_VARIABLE, Kernel};
use crate::named_kernel::{self, NamedKernel};
use crate::paths::{self, Cache};
use crate::prepare::{ACCELERATOR_VARIABLE, Platform, Prepared};
use crate::process::{capture, die_with_parent, run};
use crate::reconcile::grouped;
use crate::report::Report;
use crate::root::fetch_checkpatch;
use crate::toolbox::TOOLBOX_VARIABLE;

/// Package of the tests that boot VMs.
const VM_TESTS: &str = "hmm-e2e";
/// The one of its programs that boots the kernels of `images/kernels.toml`.
const KERNEL_TESTS: &str = "kernels";
/// For how long to try each fuzz target.
const FUZZ: Duration = Duration::from_secs(8);
/// Variable that tells these tests where this tool is.
pub const TOOL_VARIABLE: &str = "VIRTIO_HMM_TOOL";
/// Variable that tells them where the kernel's image is.
pub const IMAGE_VARIABLE: &str = "VIRTIO_HMM_IMAGE";
/// Variable that tells them where the kernel's own modules are.
pub const MODULES_VARIABLE: &str = "VIRTIO_HMM_MODULES";
/// Variable that tells them which kernels of `images/kernels.toml` there are, by name.
pub const KERNELS_VARIABLE: &str = "VIRTIO_HMM_KERNELS";

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Passed.
    pub passed: u64,
    /// Failed, which a test binary that cannot be built or ends early also counts as.
    pub failed: u64,
    /// Could not run; each says why.
    pub skipped: u64,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// Reads the line with which a test binary ends.
    fn of_line(line: &str) -> Option<Self> {
        let counts = line.strip_prefix("test result: ")?.split_once(". ")?.1;
        let count = |name: &str| {
            counts
                .split("; ")
                .find_map(|part| part.strip_suffix(name)?.trim_end().parse::<u64>().ok())
        };
        Some(Self {
            passed: count("passed")?,
            failed: count("failed")?,
            skipped: count("ignored")?,
        })
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

enum Verdict {
    Passed,
    /// Passed, and there is something to say of it.
    Noted(String),
    Failed(String),
    Skipped(String),
}

/// Runs everything, or only these programs of VM tests; the last line on standard output is the
/// tally.
///
/// # Errors
/// What the VM tests need cannot be made.
pub fn run_tests(platform: &Platform, only: &[String]) -> Result<Tally> {
    let mut tally = Tally::default();
    if only.is_empty() {
        tally.add(without_vm()?);
    }
    // Made here, so that its progress shows and its failure has one cause.
    let prepared = Prepared::new(&platform.clone().into())?;
    let (cache, mirror) = (Cache::locate()?, platform.mirror.as_deref());
    if only.is_empty() {
        tally.add(module_checks(&prepared.toolbox().kernel()?, &cache, mirror));
    }
    let mut kernels = Vec::new();
    if only.is_empty() || only.iter().any(|program| program == KERNEL_TESTS) {
        for name in named_kernel::names()? {
            let (made, checked) = kernel_checks(&name, &cache, mirror)?;
            kernels.extend(made.then_some(name));
            tally.add(checked);
        }
    }
    let mut tests = cargo();
    tests.args(["test", "--no-fail-fast", "--package", VM_TESTS]);
    for program in only {
        tests.args(["--test", program]);
    }
    tests.args(["--", "--include-ignored"]);
    let tool = env::current_exe().at("find", "this program")?;
    tests
        .env(TOOL_VARIABLE, tool)
        .env(ACCELERATOR_VARIABLE, prepared.accelerator().to_string())
        .env(TOOLBOX_VARIABLE, platform.toolbox.to_string())
        .env(KERNEL_VARIABLE, platform.kernel.to_string())
        .env(KERNELS_VARIABLE, kernels.join(" "))
        .env(IMAGE_VARIABLE, &prepared.kernel().image)
        .env(MODULES_VARIABLE, &prepared.kernel().modules)
        .envs(mirror.map(|mirror| (MIRROR_VARIABLE, mirror)));
    tally.add(cargo_test(&mut tests)?);

    println!("{tally}");
    Ok(tally)
}

/// What needs no VM.
fn without_vm() -> Result<Tally> {
    let mut tally = Tally::default();
    for check in [
        Check::cargo("rustfmt", &["fmt", "--all", "--check"]),
        Check::cargo(
            "rustfmt of fuzz",
            &["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"],
        ),
        Check::cargo(
            "clippy",
            &[
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ],
        ),
        Check::cargo(
            "documentation",
            &["doc", "--quiet", "--workspace", "--no-deps"],
        ),
    ] {
        tally.add(check.run());
    }

    let mut tests = cargo();
    tests.args([
        "test",
        "--no-fail-fast",
        "--workspace",
        "--exclude",
        VM_TESTS,
    ]);
    tally.add(cargo_test(&mut tests)?);

    tally.add(fuzz()?);
    Ok(tally)
}

/// The module on the stock kernel.
fn module_checks(stock: &Kernel, cache: &Cache, mirror: Option<&str>) -> Tally {
    let mut tally = Tally::default();
    for check in [
        ModuleCheck::Warnings,
        ModuleCheck::Sparse,
        ModuleCheck::Checkpatch,
    ] {
        let started = Instant::now();
        let verdict = check.run(stock, cache, mirror);
        tally.add(tell(check.name(), started, verdict));
    }
    tally
}

/// Makes a kernel of that name, and builds the module for it. Returns whether it is made, too.
fn kernel_checks(name: &str, cache: &Cache, mirror: Option<&str>) -> Result<(bool, Tally)> {
    let started = Instant::now();
    let (made, verdict) = match NamedKernel::find(name, cache)?.make(cache, mirror, Report) {
        Ok(kernel) => (true, ModuleCheck::Warnings.run(&kernel, cache, mirror)),
        Err(error @ Error::NoPackage { .. }) => (false, Verdict::Skipped(error.to_string())),
        Err(error) => (false, Verdict::Failed(with_sources(&error))),
    };
    let check = format!("{} on {name}", ModuleCheck::Warnings.name());
    Ok((made, tell(&check, started, verdict)))
}

/// Runs each fuzz target for a moment.
fn fuzz() -> Result<Tally> {
    let started = Instant::now();
    let built = Fuzzers::build(&Cache::locate()?);
    let (fuzzers, verdict) = match built {
        Ok(fuzzers) => (Some(fuzzers), Verdict::Passed),
        Err(error @ Error::NoCompiler) => (None, Verdict::Skipped(error.to_string())),
        Err(error) => (None, Verdict::Failed(with_sources(&error))),
    };
    let mut tally = tell("fuzz targets build", started, verdict);
    let Some(fuzzers) = fuzzers else {
        return Ok(tally);
    };
    for target in Target::value_variants() {
        let started = Instant::now();
        let verdict = match fuzzers.run(*target, FUZZ) {
            Ok(inputs) => Verdict::Noted(format!("{} inputs tried", grouped(inputs))),
            Err(error) => Verdict::Failed(with_sources(&error)),
        };
        tally.add(tell(&format!("fuzz {}", target.name()), started, verdict));
    }
    Ok(tally)
}

struct Check {
    name: &'static str,
    command: Command,
}

impl Check {
    fn cargo(name: &'static str, arguments: &[&str]) -> Self {
        let mut command = cargo();
        command.args(arguments).env("RUSTDOCFLAGS", "-D warnings");
        Self { name, command }
    }

    fn run(mut self) -> Tally {
        let started = Instant::now();
        let mut help = cargo();
        help.args(self.command.get_args().next()).arg("--help");
        let verdict = if run(&mut help).is_ok_and(|output| output.status.success()) {
            match capture(&mut self.command) {
                Ok(_) => Verdict::Passed,
                Err(error) => Verdict::Failed(with_sources(&error)),
            }
        } else {
            Verdict::Skipped("this toolchain has no such component".into())
        };
        tell(self.name, started, verdict)
    }
}

fn tell(name: &str, started: Instant, verdict: Verdict) -> Tally {
    let seconds = started.elapsed().as_secs_f64();
    let (word, reason) = match &verdict {
        Verdict::Passed => ("ok", ""),
        Verdict::Noted(note) => ("ok", note.as_str()),
        Verdict::Failed(reason) => ("FAILED", reason.as_str()),
        Verdict::Skipped(reason) => ("ignored", reason.as_str()),
    };
    let separator = if reason.is_empty() { "" } else { ": " };
    println!("check {name} ... {word} ({seconds:.1} s){separator}{reason}");
    match verdict {
        Verdict::Passed | Verdict::Noted(_) => Tally {
            passed: 1,
            ..Tally::default()
        },
        Verdict::Failed(_) => Tally {
            failed: 1,
            ..Tally::default()
        },
        Verdict::Skipped(_) => Tally {
            skipped: 1,
            ..Tally::default()
        },
    }
}

/// Runs cargo test, shows its output as it comes and adds up its results.
fn cargo_test(command: &mut Command) -> Result<Tally> {
    let started = |source| Error::Start {
        program: "cargo".into(),
        source,
    };
    let mut child = die_with_parent(command, Signal::TERM)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(started)?;
    let mut tally = Tally::default();
    for line in child
        .stdout
        .take()
        .map(BufReader::new)
        .into_iter()
        .flat_map(BufRead::lines)
    {
        let line = line.at("read from", "cargo test")?;
        println!("{line}");
        tally.add(Tally::of_line(&line).unwrap_or_default());
    }
    let status = child.wait().map_err(started)?;
    if !status.success() && tally.failed == 0 {
        tally.failed = 1;
    }
    Ok(tally)
}

#[derive(Clone, Copy)]
enum ModuleCheck {
    Warnings,
    Sparse,
    Checkpatch,
}

impl ModuleCheck {
    fn name(self) -> &'static str {
        match self {
            Self::Warnings => "kernel module, make W=1",
            Self::Sparse => "kernel module, sparse",
            Self::Checkpatch => "kernel module, checkpatch",
        }
    }

    fn run(self, kernel: &Kernel, cache: &Cache, mirror: Option<&str>) -> Verdict {
        let sparse =
            kernel.root.is_some() || capture(Command::new("sparse").arg("--version")).is_ok();
        if matches!(self, Self::Sparse) && !sparse {
            return Verdict::Skipped("this machine has no sparse".into());
        }
        match self.findings(kernel, cache, mirror) {
            Ok(text) if text.is_empty() => Verdict::Passed,
            Ok(text) => Verdict::Failed(text),
            Err(error) => Verdict::Failed(with_sources(&error)),
        }
    }

    fn findings(self, kernel: &Kernel, cache: &Cache, mirror: Option<&str>) -> Result<String> {
        let directory = tempfile::tempdir_in(cache.modules()).at("write", cache.modules())?;
        let directory = directory.path();
        copy_module_sources(&module_sources(), directory)?;
        let inside = |script: &str| kernel.run(directory, script);
        let complaints = |text: String| -> String {
            let own = |line: &&str| line.contains("warning:") || line.contains("error:");
            text.lines().filter(own).collect::<Vec<_>>().join("\n")
        };
        match self {
            Self::Warnings => Ok(complaints(inside(
                &(make_command(kernel, "W=1") + " 2>&1"),
            )?)),
            Self::Sparse => {
                let checker = "sparse.sh";
                let from = paths::checkout().join("images").join(checker);
                std::fs::copy(&from, directory.join(checker)).at("copy", &from)?;
                // Debian's headers come without the script that tries the checker, and
                // make leaves out a checker that was not tried, unless told twice.
                let extra = format!("--no-silent C=2 KBUILD_CHECKSRC=2 CHECK=\"$PWD/{checker}\"");
                let output = inside(&(make_command(kernel, &extra) + " 2>&1"))?;
                if !output.contains("CHECK ") {
                    return Ok("sparse did not run".into());
                }
                Ok(complaints(output))
            }
            Self::Checkpatch => {
                let scripts = cache.checkpatch();
                fetch_checkpatch(cache, mirror, &scripts, Report)?;
                for entry in std::fs::read_dir(&scripts).at("read", &scripts)?.flatten() {
                    let to = directory.join(entry.file_name());
                    std::fs::copy(entry.path(), &to).at("write", &to)?;
                }
                let mut by_exemption = BTreeMap::<_, String>::new();
                for file in source_files(&module_sources())? {
                    let exempt = match file.to_str() {
                        // TRACE_EVENT() has a layout of its own, which checkpatch does not know.
                        Some("trace.h") => "--ignore OPEN_ENDED_LINE,PARENTHESIS_ALIGNMENT",
                        // In the kernel's tree nothing depends on the kernel's version. Here
                        // this one file does, so that no other has to.
                        Some("compat.h") => "--ignore LINUX_VERSION_CODE",
                        _ => "",
                    };
                    *by_exemption.entry(exempt).or_default() += &format!(" {}", file.display());
                }
                let checkpatch =
                    "perl checkpatch.pl --strict --no-tree --no-summary --quiet --terse";
                let script: String = by_exemption
                    .iter()
                    .map(|(exempt, files)| {
                        format!("{checkpatch} {exempt} --file {files} 2>&1 || true\n")
                    })
                    .collect();
                inside(&script)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_test_binaries_are_read() {
        let line = "test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 1 filtered out; \
                    finished in 0.00s";
        assert_eq!(
            Tally::of_line(line),
            Some(Tally {
                passed: 12,
                failed: 0,
                skipped: 3
            })
        );
        let line = "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(
            Tally::of_line(line),
            Some(Tally {
                passed: 1,
                failed: 2,
                skipped: 0
            })
        );
        assert_eq!(Tally::of_line("test foo ... ok"), None);
    }

    #[test]
    fn the_tally_is_one_fixed_form() {
        let tally = Tally {
            passed: 3,
            failed: 1,
            skipped: 2,
        };
        assert_eq!(tally.to_string(), "3 passed, 1 failed, 2 skipped");
    }

    #[test]
    fn tests_that_do_not_build_count_as_a_failure() {
        let mut command = Command::new("false");
        assert_eq!(
            cargo_test(&mut command).unwrap(),
            Tally {
                failed: 1,
                ..Tally::default()
            }
        );
    }
}
