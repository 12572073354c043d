//! A root directory of its own, made of Debian packages.
//!
//! apt downloads them with a configuration of its own and dpkg-deb unpacks them,
//! so neither root nor anything on the host changes. Maintainer scripts do not
//! run; the recipe names the few links they would make.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde::Deserialize;

use crate::apt::Apt;
use crate::error::{Error, FileContext, Result};
use crate::paths::{self, Cache, remove_all};
use crate::process::capture;
use crate::profile::read_toml;
use crate::report::Report;

/// What a root directory is made of.
#[derive(Clone, Debug, Deserialize, Hash)]
#[serde(deny_unknown_fields)]
pub(crate) struct Recipe {
    suites: Vec<String>,
    pub(crate) packages: Vec<String>,
    directories: Vec<String>,
    links: BTreeMap<String, String>,
    #[serde(default)]
    source: Source,
}

/// Files of the kernel's source package.
#[derive(Clone, Debug, Default, Deserialize, Hash)]
#[serde(deny_unknown_fields)]
struct Source {
    package: String,
    files: Vec<String>,
}

/// A root directory.
#[derive(Clone, Debug)]
pub struct Root {
    what: String,
    recipe: Recipe,
    path: PathBuf,
}

impl Root {
    /// Where the toolbox is, or will be.
    ///
    /// # Errors
    /// The recipe cannot be read.
    pub fn of_toolbox(cache: &Cache) -> Result<Self> {
        let what = "the toolbox (QEMU, guest kernel and headers, compiler)";
        Ok(Self::place(what, toolbox_recipe()?, cache))
    }

    /// Where that of a recipe is, or will be; `what` tells the user what is in it.
    pub(crate) fn place(what: &str, recipe: Recipe, cache: &Cache) -> Self {
        let mut hasher = DefaultHasher::new();
        recipe.hash(&mut hasher);
        Self {
            what: what.into(),
            recipe,
            path: cache.toolboxes().join(format!("{:016x}", hasher.finish())),
        }
    }

    /// Whether it is there. It is moved into place complete, or not at all.
    #[must_use]
    pub fn is_made(&self) -> bool {
        self.path.exists()
    }

    /// Makes it if it is not there.
    ///
    /// # Errors
    /// apt or its mirror fails, or the cache cannot be written.
    pub fn make(&self, cache: &Cache, mirror: Option<&str>, report: Report) -> Result<()> {
        if self.is_made() {
            return Ok(());
        }
        let _lock = cache.lock(report)?;
        if self.is_made() {
            return Ok(());
        }
        let started = Instant::now();
        let (what, recipe) = (&self.what, &self.recipe);
        let apt = Apt::new(cache, "root", &recipe.suites, mirror)?;
        report.line(&format!(
            "making {what} in {} from {}",
            self.path.display(),
            apt.mirror()
        ));
        let partial = self.path.with_extension("partial");
        remove_all(&partial)?;
        apt.unpack(&recipe.packages, &partial, report)?;
        for directory in &recipe.directories {
            let directory = partial.join(directory);
            fs::create_dir_all(&directory).at("create", &directory)?;
        }
        for (link, target) in &recipe.links {
            let link = partial.join(link);
            if fs::symlink_metadata(&link).is_err() {
                symlink(target, &link).at("create", &link)?;
            }
        }
        fs::rename(&partial, &self.path).at("create", &self.path)?;
        apt.forget()?;
        report.line(&format!(
            "{what} is ready, after {} s",
            started.elapsed().as_secs()
        ));
        Ok(())
    }

    /// Its path on the host.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A command that runs one of its programs on the host's files, through its
    /// own dynamic linker: no namespace, no mount.
    #[must_use]
    pub fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.path.join("usr/lib64/ld-linux-x86-64.so.2"));
        command
            .arg("--library-path")
            .arg(self.path.join("usr/lib/x86_64-linux-gnu"))
            .arg(self.path.join("usr/bin").join(name));
        command
    }

    /// A command that runs `script` with this as its root directory, in the
    /// host's `directory` as `/mnt`. Its namespaces, and all its processes, end with it.
    #[must_use]
    pub fn enter(&self, directory: &Path, script: &str) -> Command {
        const MOUNT: &str = r#"
            PATH=/usr/sbin:/usr/bin:/sbin:/bin
            for each in dev proc sys; do mount --rbind "/$each" "$1/$each"; done
            mount --bind "$2" "$1/mnt"
            exec chroot "$1" /bin/sh -e -c "cd /mnt; $3"
        "#;
        let mut command = unshare();
        command
            .args(["--pid", "--kill-child"])
            .args(["sh", "-e", "-c", MOUNT, "sh"])
            .arg(&self.path)
            .arg(directory)
            .arg(script);
        // The host's locale may not exist here. The kernel's make forgets LC_ALL.
        command
            .env("LC_ALL", "C")
            .env("LANG", "C")
            .env("TMPDIR", "/tmp");
        command
    }
}

/// Puts the kernel's own style checker into `directory`.
///
/// # Errors
/// The kernel's source package cannot be fetched.
pub fn fetch_checkpatch(
    cache: &Cache,
    mirror: Option<&str>,
    directory: &Path,
    report: Report,
) -> Result<()> {
    let files = toolbox_recipe()?.source.files;
    fetch_kernel_files(&files, "checkpatch", cache, mirror, directory, report)
}

/// Puts files of the kernel's source into `directory`, unless they are there; `purpose` is a
/// word for what they are for.
///
/// # Errors
/// The kernel's source package cannot be fetched.
pub(crate) fn fetch_kernel_files(
    files: &[String],
    purpose: &str,
    cache: &Cache,
    mirror: Option<&str>,
    directory: &Path,
    report: Report,
) -> Result<()> {
    let recipe = toolbox_recipe()?;
    let _lock = cache.lock(report)?;
    let wanted = |name: &String| Path::new(name).file_name().map(|name| directory.join(name));
    if files.iter().filter_map(wanted).all(|path| path.exists()) {
        return Ok(());
    }
    report.line(&format!(
        "fetching the kernel's source package for its {purpose} (160 MB, once)"
    ));
    let apt = Apt::new(cache, purpose, &recipe.suites, mirror)?;
    fs::create_dir_all(directory).at("create", directory)?;
    let unpacked = tempfile::tempdir_in(cache.apt()).at("write", cache.apt())?;
    apt.unpack(
        std::slice::from_ref(&recipe.source.package),
        unpacked.path(),
        report,
    )?;
    let tarball = kernel_source(unpacked.path())?;
    let patterns = files.iter().map(|file| format!("*/{file}"));
    capture(
        Command::new("tar")
            .arg("--extract")
            .arg("--file")
            .arg(&tarball)
            .arg("--directory")
            .arg(directory)
            .args(["--wildcards", "--strip-components=2"])
            .args(patterns),
    )?;
    apt.forget()
}

/// The archive in an unpacked source package of the kernel.
pub(crate) fn kernel_source(root: &Path) -> Result<PathBuf> {
    let sources = root.join("usr/src");
    fs::read_dir(&sources)
        .at("read", &sources)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "xz"))
        .ok_or(Error::Incomplete("kernel source"))
}

fn toolbox_recipe() -> Result<Recipe> {
    read_toml(&paths::checkout().join("images/toolbox.toml"))
}

fn unshare() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private"]);
    if !rustix::process::geteuid().is_root() {
        command.arg("--map-root-user");
    }
    command
}

/// Says whether the host lets this user have a mount namespace.
///
/// # Errors
/// It does not, or has no unshare(1).
pub fn check_namespaces() -> Result<()> {
    capture(unshare().arg("true"))
        .map(drop)
        .map_err(|error| Error::NoNamespaces(Box::new(error)))
}
