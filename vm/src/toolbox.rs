//! The toolbox: QEMU, a guest kernel with its headers, a compiler and a busybox.
//!
//! Either this machine's own, if all of them fit, or those of a root directory
//! that is made for it.

use std::fmt;
use std::path::PathBuf;
use std::process::Command;

use clap::ValueEnum;

use crate::error::{Error, Result};
use crate::host::{Fitting, Host, QEMU};
use crate::kernel::Kernel;
use crate::paths::Cache;
use crate::process::capture;
use crate::report::Report;
use crate::root::Root;

/// Variable that chooses the toolbox, as `--toolbox` does.
pub const TOOLBOX_VARIABLE: &str = "VIRTIO_HMM_TOOLBOX";

/// What the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// This machine's own if all of it fits, else one made of Debian's packages.
    #[default]
    Auto,
    /// This machine's own or an error.
    Host,
    /// One made of Debian's packages.
    Debian,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Host => "host",
            Self::Debian => "debian",
        })
    }
}

/// Where the tools are.
#[derive(Clone, Debug)]
pub enum Toolbox {
    /// On this machine.
    Host(Fitting),
    /// In a root directory of their own.
    Debian(Root),
}

impl Toolbox {
    /// Looks where it is, or will be.
    ///
    /// # Errors
    /// The machine's own is asked for and does not fit, or the recipe cannot be read.
    pub fn place(choice: Choice, cache: &Cache) -> Result<Self> {
        if choice != Choice::Debian {
            match Host::survey().fitting() {
                Ok(host) => return Ok(Self::Host(host)),
                Err(reasons) if choice == Choice::Host => return Err(Error::Unfit(reasons)),
                Err(_) => {}
            }
        }
        Root::of_toolbox(cache).map(Self::Debian)
    }

    /// Whether it is there.
    #[must_use]
    pub fn is_made(&self) -> bool {
        match self {
            Self::Host(_) => true,
            Self::Debian(root) => root.is_made(),
        }
    }

    /// Makes it if it is not there.
    ///
    /// # Errors
    /// apt or its mirror fails, or the cache cannot be written.
    pub fn make(&self, cache: &Cache, mirror: Option<&str>, report: Report) -> Result<()> {
        match self {
            Self::Host(_) => Ok(()),
            Self::Debian(root) => root.make(cache, mirror, report),
        }
    }

    /// What tells it from another.
    #[must_use]
    pub fn identity(&self) -> String {
        match self {
            Self::Host(host) => format!("this machine's, {}", host.qemu),
            Self::Debian(root) => root.path().display().to_string(),
        }
    }

    /// Its kernel.
    ///
    /// # Errors
    /// It holds none.
    pub fn kernel(&self) -> Result<Kernel> {
        match self {
            Self::Host(host) => Ok(host.kernel.clone()),
            Self::Debian(root) => Kernel::of_root(root),
        }
    }

    /// Its QEMU.
    #[must_use]
    pub fn qemu(&self) -> Command {
        match self {
            Self::Host(_) => Command::new(QEMU),
            Self::Debian(root) => {
                let mut command = root.program(QEMU);
                for firmware in ["usr/share/qemu", "usr/share/seabios"] {
                    command.arg("-L").arg(root.path().join(firmware));
                }
                command
            }
        }
    }

    /// Version of its QEMU, as it tells it.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn qemu_version(&self) -> Result<String> {
        let text = capture(self.qemu().arg("--version"))?;
        let line = text.lines().next().unwrap_or_default();
        Ok(line.trim_start_matches("QEMU emulator version ").to_owned())
    }

    /// Its static busybox.
    #[must_use]
    pub fn busybox(&self) -> PathBuf {
        match self {
            Self::Host(host) => host.busybox.clone(),
            Self::Debian(root) => root.path().join("usr/bin/busybox"),
        }
    }
}
