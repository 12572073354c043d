//! What can go wrong, and the exit status that says so.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use virtio_hmm_client::counters::CountersError;

use crate::run::End;

/// Status of a run that ended at a limit of time, as timeout(1) has it.
pub const EXIT_TIMEOUT: u8 = 124;
/// Status of a run whose guest kernel complained.
pub const EXIT_KERNEL: u8 = 123;
/// Status of a run after which the two sides of a device did not agree.
pub const EXIT_COUNTERS: u8 = 122;
/// Status of every other failure of the tool, the machine or the device daemon.
pub const EXIT_FAILURE: u8 = 125;

/// Result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of the tool itself, not of the program in the guest.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("cannot {action} {}", path.display())]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("no home directory: set HOME, XDG_CACHE_HOME or VIRTIO_HMM_CACHE")]
    NoCache,
    #[error("cannot start {program}")]
    Start { program: String, source: io::Error },
    #[error("{program} failed ({status}):\n{output}")]
    Command {
        program: String,
        status: ExitStatus,
        output: String,
    },
    #[error("cargo build failed ({0}); its messages are above")]
    Build(ExitStatus),
    #[error("this machine has no C++ compiler, with which libFuzzer is built")]
    NoCompiler,
    #[error("an input shows a fault:\n{0}")]
    Finding(String),
    #[error("the fuzz target does not say how many inputs it tried")]
    NoInputs,
    #[error("{0}")]
    Config(String),
    #[error("this needs Debian's {0}, which this machine does not have; see `cargo vm doctor`")]
    NotDebian(&'static str),
    #[error("no Debian mirror among this machine's apt sources: name one with --mirror URL")]
    NoMirror,
    #[error(
        "{mirror} has no package {pattern}{}",
        if pattern.contains('*') { ", where * is any version" } else { "" }
    )]
    NoPackage { pattern: String, mirror: String },
    #[error("the toolbox holds no {0}; `cargo vm clean` and a new run make it anew")]
    Incomplete(&'static str),
    #[error(
        "this machine gives neither root nor user namespaces, one of which the build of the \
         kernel module needs"
    )]
    NoNamespaces(#[source] Box<Error>),
    #[error("this machine's own tools do not fit: {0}")]
    Unfit(String),
    #[error(transparent)]
    Profile(hmm_profile::Error),
    #[error("KVM was asked for, but {0}")]
    NoKvm(String),
    #[error("no profile {name}; there are: {known}")]
    UnknownProfile { name: String, known: String },
    #[error("{path} would hide another file of that name in the guest's /root")]
    SameName { path: PathBuf },
    #[error("the device daemon did not open {socket} within {seconds} s")]
    DaemonSilent { socket: PathBuf, seconds: u64 },
    #[error("the device daemon {end} before the machine started: {log}")]
    DaemonStart { end: String, log: String },
    #[error("the device daemon {0} in the middle of the run")]
    DaemonDied(String),
    #[error("QEMU {end} in the middle of the run: {log}")]
    QemuDied { end: String, log: String },
    #[error("the guest powered off before its command ended")]
    PoweredOff,
    #[error("the guest's kernel reported: {0}")]
    Kernel(String),
    #[error("the guest's kernel died before its first program: {0}")]
    Boot(String),
    #[error("the guest has been silent for {0} s")]
    Silent(u64),
    #[error("the run took longer than --timeout {0}s")]
    Timeout(u64),
    #[error("the guest's init failed: {0}")]
    Init(String),
    #[error("the guest sent a line that is no message")]
    Protocol(#[source] io::Error),
    #[error("the guest sent counters that are none")]
    Counters(#[source] CountersError),
    #[error("the guest's program ended early, with status {}", .0.exit_status())]
    Stress(End),
    #[error("the device daemon's control socket answered: {0}")]
    Control(String),
    #[error("QEMU's monitor does not answer")]
    Monitor(#[source] io::Error),
    #[error("QEMU refuses {command}: {reason}")]
    Refused { command: String, reason: String },
    #[error("the guest does not let go of the device")]
    StillPlugged(#[source] io::Error),
    #[error("ended by signal {0}")]
    Interrupted(i32),
    /// Anything that happened once the machine was to start.
    #[error("{}", with_sources(cause))]
    Run { logs: PathBuf, cause: Box<Error> },
}

impl Error {
    /// Whether the user ended the run.
    #[must_use]
    pub fn is_interruption(&self) -> bool {
        match self {
            Self::Run { cause, .. } => cause.is_interruption(),
            Self::Interrupted(_) => true,
            _ => false,
        }
    }

    /// Whether the guest's kernel complained.
    #[must_use]
    pub fn is_report(&self) -> bool {
        match self {
            Self::Run { cause, .. } => cause.is_report(),
            Self::Kernel(_) => true,
            _ => false,
        }
    }

    /// Exit status of the tool for this failure.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Kernel(_) | Self::Boot(_) => EXIT_KERNEL,
            Self::Silent(_) | Self::Timeout(_) => EXIT_TIMEOUT,
            Self::Run { cause, .. } => cause.exit_status(),
            Self::Interrupted(signal) => u8::try_from(128 + signal).unwrap_or(EXIT_FAILURE),
            _ => EXIT_FAILURE,
        }
    }
}

/// Names the file and what was tried in an error of the file system.
pub(crate) trait FileContext<T> {
    fn at(self, action: &'static str, path: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: Into<io::Error>> FileContext<T> for Result<T, E> {
    fn at(self, action: &'static str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| Error::File {
            action,
            path: path.as_ref().to_path_buf(),
            source: source.into(),
        })
    }
}

/// The error and everything that caused it, on one line.
#[must_use]
pub fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}
