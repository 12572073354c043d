//! What a result was got with: it says little without.

use std::env;
use std::fs;
use std::num::NonZero;
use std::process::Command;
use std::thread;
use std::time::SystemTime;

use serde::Serialize;

use crate::accelerator::Accelerator;
use crate::error::Result;
use crate::paths;
use crate::prepare::Prepared;
use crate::process::{capture, shell_line};

/// A machine, and what runs on it.
#[derive(Clone, Debug, Serialize)]
pub struct Environment {
    /// "kvm" or "tcg".
    pub accelerator: Accelerator,
    /// Release of the guest's kernel.
    pub kernel: String,
    /// Version of QEMU.
    pub qemu: String,
    /// Model of the host's CPUs.
    pub cpu: String,
    /// CPUs of the host that this process may use.
    pub cpus: usize,
    /// CPUs of the guest.
    pub guest_cpus: u32,
    /// Commit of the checkout, with `-dirty` if files have changed since; "unknown" if this is no
    /// checkout of git's.
    pub commit: String,
    /// What the user typed.
    pub command: String,
    /// When it was typed, in UTC, such as `2026-01-31T12:00:00Z`.
    pub date: String,
}

impl Environment {
    /// Of this process, and the machine that it is about to start.
    ///
    /// # Errors
    /// QEMU cannot be run.
    pub fn of(prepared: &Prepared) -> Result<Self> {
        Ok(Self {
            accelerator: prepared.accelerator(),
            kernel: prepared.kernel().release.clone(),
            qemu: prepared.toolbox().qemu_version()?,
            cpu: cpu_model(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            cpus: thread::available_parallelism().map_or(1, NonZero::get),
            guest_cpus: prepared.profile().cpus,
            commit: commit(),
            command: command(),
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        })
    }
}

fn cpu_model(cpuinfo: &str) -> String {
    let mut names = cpuinfo
        .lines()
        .filter_map(|line| line.strip_prefix("model name")?.split_once(": "));
    names.next().map_or("unknown", |(_, name)| name).to_owned()
}

fn commit() -> String {
    let mut git = Command::new("git");
    // No tag: the commit itself.
    git.args([
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]);
    let commit = capture(git.current_dir(paths::checkout()));
    commit.map_or_else(|_| "unknown".into(), |text| text.trim().to_owned())
}

fn command() -> String {
    let mut command = Command::new("cargo");
    shell_line(command.arg("vm").args(env::args_os().skip(1)))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn environment() -> Environment {
        Environment {
            accelerator: Accelerator::Tcg,
            kernel: "7.3.4-amd64".into(),
            qemu: "11.1.3 (Debian)".into(),
            cpu: "Fast CPU @ 3.00GHz".into(),
            cpus: 2,
            guest_cpus: 2,
            commit: "0123456789ab-dirty".into(),
            command: "cargo vm stress --report out".into(),
            date: "2026-01-31T12:00:00Z".into(),
        }
    }

    #[test]
    fn the_cpu_is_named() {
        let info = "processor\t: 0\nmodel name\t: Fast CPU @ 3.00GHz\nprocessor\t: 1\n\
                    model name\t: Fast CPU @ 3.00GHz\n";
        assert_eq!(cpu_model(info), "Fast CPU @ 3.00GHz");
        assert_eq!(cpu_model(""), "unknown");
    }
}
