//! What this checkout is built into: the device daemon, the guest's programs
//! and the kernel module.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde::Deserialize;

use crate::error::{Error, FileContext, Result};
use crate::initramfs;
use crate::kernel::Kernel;
use crate::paths::{self, Cache, remove_all};
use crate::process::{capture, die_with_parent};
use crate::report::Report;
use crate::root::fetch_kernel_files;

pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROFILE: &str = "vm";
/// Package and binary of the device daemon.
const DAEMON: &str = "vhost-device-hmm";
/// Package of the programs that show what a device does, and one of them.
const VIEW: &str = "hmm-view";
const TOP: &str = "hmm-top";
/// Package and binary of the guest's first program.
pub(crate) const INIT: &str = "hmm-init";
const MODULE: &str = "virtio_hmm.ko";
/// The kernel's module for tests, its sources, and what has them built by themselves.
const TEST_HMM: &str = "test_hmm.ko";
const TEST_HMM_SOURCES: [&str; 2] = ["lib/test_hmm.c", "lib/test_hmm_uapi.h"];
const TEST_HMM_KBUILD: &str = "obj-m := test_hmm.o\n";

/// The cargo that runs this tool, or the one in PATH.
#[must_use]
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(paths::checkout());
    command
}

/// Where the Rust programs are, once they are built.
#[derive(Clone, Debug)]
pub struct Programs {
    target: PathBuf,
}

impl Programs {
    /// Asks cargo for the place.
    ///
    /// # Errors
    /// cargo fails.
    pub fn locate() -> Result<Self> {
        #[derive(Deserialize)]
        struct Metadata {
            target_directory: PathBuf,
        }
        let json = capture(cargo().args(["metadata", "--no-deps", "--format-version=1"]))?;
        let metadata: Metadata = serde_json::from_str(&json)
            .map_err(|error| Error::Config(format!("cargo metadata: {error}")))?;
        Ok(Self {
            target: metadata.target_directory,
        })
    }

    /// Builds the daemon and the guest's programs; what the compiler says goes to standard error.
    ///
    /// # Errors
    /// The build fails.
    pub fn build(&self) -> Result<()> {
        if !self.daemon().exists() {
            Report.line("building the device daemon and the guest's programs");
        }
        let guest = initramfs::programs()?;
        let packages: Vec<&str> = [DAEMON, INIT]
            .into_iter()
            .chain(guest.iter().map(String::as_str))
            .collect();
        self.build_packages(&packages)
    }

    /// Builds packages of this workspace for the guest.
    ///
    /// # Errors
    /// The build fails.
    pub fn build_packages(&self, packages: &[&str]) -> Result<()> {
        let mut command = cargo();
        command.args(["build", "--bins", "--target", TARGET, "--profile", PROFILE]);
        // The first build takes a while and shows its progress.
        if self.daemon().exists() {
            command.arg("--quiet");
        }
        for package in packages {
            command.args(["--package", package]);
        }
        // Static, so that they run in a guest that has no library. One set of
        // flags for all of them, so that they share their dependencies.
        let mut flags = env::var_os("RUSTFLAGS").unwrap_or_default();
        flags.push(" -C target-feature=+crt-static");
        command
            .env("RUSTFLAGS", flags)
            .env_remove("CARGO_ENCODED_RUSTFLAGS");
        run_build(&mut command)
    }

    /// Builds `hmm-top` as cargo does by default, which takes less time, and says where it is.
    ///
    /// # Errors
    /// The build fails.
    pub fn build_top(&self) -> Result<PathBuf> {
        let top = self.target.join("debug").join(TOP);
        if !top.exists() {
            Report.line("building hmm-top");
        }
        let mut command = cargo();
        command.args(["build", "--quiet", "--package", VIEW, "--bin", TOP]);
        run_build(&mut command).map(|()| top)
    }

    /// Path of a program.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.target.join(TARGET).join(PROFILE).join(name)
    }

    /// Path of the device daemon.
    #[must_use]
    pub fn daemon(&self) -> PathBuf {
        self.path(DAEMON)
    }
}

/// Runs a build by cargo; what the compiler says goes to standard error.
pub(crate) fn run_build(command: &mut Command) -> Result<()> {
    let status = die_with_parent(command, Signal::TERM)
        .stdin(Stdio::null())
        .status()
        .map_err(|source| Error::Start {
            program: "cargo".into(),
            source,
        })?;
    if status.success() {
        Ok(())
    } else {
        Err(Error::Build(status))
    }
}

/// Copies the module's sources from the directory `from` into `directory`.
///
/// # Errors
/// They cannot be read, or the directory cannot be written.
pub fn copy_module_sources(from: &Path, directory: &Path) -> Result<()> {
    for file in source_files(from)? {
        let to = directory.join(&file);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).at("create", parent)?;
        }
        fs::copy(from.join(&file), &to).at("write", &to)?;
    }
    Ok(())
}

/// Directory of this checkout's kernel module.
#[must_use]
pub fn module_sources() -> PathBuf {
    paths::checkout().join("guest-driver")
}

/// The module's own files, relative to its directory. Other files there (the
/// Rust client, what an editor leaves) do not make it new.
pub(crate) fn source_files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut directories = vec![PathBuf::new()];
    while let Some(directory) = directories.pop() {
        let path = root.join(&directory);
        for entry in fs::read_dir(&path).at("read", &path)?.flatten() {
            let name = directory.join(entry.file_name());
            if entry.path().is_dir() {
                directories.push(name);
            } else if matches!(
                entry.file_name().to_str(),
                Some(file) if !file.ends_with(".mod.c")
                    && (file.ends_with(".c") || file.ends_with(".h") || file == "Kbuild" || file == "Makefile")
            ) {
                files.push(name);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// make's command line for the module in the directory at hand.
#[must_use]
pub fn make_command(kernel: &Kernel, extra: &str) -> String {
    let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    format!(
        "make --silent -j{jobs} -C '{}' M=\"$PWD\" {extra} modules",
        kernel.build.display()
    )
}

/// Builds the driver in `sources` unless these very files were built for this very kernel.
///
/// # Errors
/// The build fails.
pub fn module(sources: &Path, kernel: &Kernel, cache: &Cache, report: Report) -> Result<PathBuf> {
    named_module(MODULE, sources, kernel, cache, report)
}

/// Builds the kernel's own `test_hmm` from Debian's source of the kernel.
///
/// # Errors
/// The source cannot be fetched, or the build fails.
pub fn test_hmm(
    kernel: &Kernel,
    cache: &Cache,
    mirror: Option<&str>,
    report: Report,
) -> Result<PathBuf> {
    let sources = cache.test_hmm();
    let files = TEST_HMM_SOURCES.map(ToOwned::to_owned);
    fetch_kernel_files(&files, "test_hmm", cache, mirror, &sources, report)?;
    let kbuild = sources.join("Kbuild");
    fs::write(&kbuild, TEST_HMM_KBUILD).at("write", &kbuild)?;
    named_module(TEST_HMM, &sources, kernel, cache, report)
}

fn named_module(
    name: &'static str,
    sources: &Path,
    kernel: &Kernel,
    cache: &Cache,
    report: Report,
) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    // A user builds a kernel again in the same place.
    let image = fs::metadata(&kernel.image).at("read", &kernel.image)?;
    let made = image.modified().at("read", &kernel.image)?;
    (&kernel.image, made).hash(&mut hasher);
    for file in source_files(sources)? {
        let path = sources.join(&file);
        (file, fs::read(&path).at("read", &path)?).hash(&mut hasher);
    }
    let directory = cache.modules().join(format!("{:016x}", hasher.finish()));
    let module = directory.join(name);
    if module.exists() {
        return Ok(module);
    }
    let _lock = cache.lock(report)?;
    if module.exists() {
        return Ok(module);
    }
    report.line(&format!(
        "building {name} for {} with {} gcc",
        kernel.release,
        match kernel.root {
            Some(_) => "the toolbox's",
            None => "this machine's",
        }
    ));
    let partial = directory.with_extension("partial");
    remove_all(&partial)?;
    fs::create_dir_all(&partial).at("create", &partial)?;
    copy_module_sources(sources, &partial)?;
    kernel.run(&partial, &make_command(kernel, ""))?;
    fs::rename(&partial, &directory).at("create", &directory)?;
    if module.exists() {
        Ok(module)
    } else {
        Err(Error::Incomplete(name))
    }
}
