//! The toolbox: QEMU, a guest kernel with its headers, and a compiler, in a
//! directory of their own.
//!
//! It is made of Debian packages that apt downloads with a configuration of its
//! own and dpkg-deb unpacks, so neither root nor anything on the host changes.
//! Maintainer scripts do not run; the recipe names the few links they would make.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::error::{Error, FileContext, Result};
use crate::paths::{self, Cache};
use crate::process::capture;
use crate::profile::read_toml;
use crate::report::Report;

/// Debian's own keys, which decide what the mirror may serve.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Variable that names the mirror, as `--mirror` does.
pub const MIRROR_VARIABLE: &str = "VIRTIO_HMM_MIRROR";

/// `images/toolbox.toml`.
#[derive(Debug, Deserialize, Hash)]
#[serde(deny_unknown_fields)]
struct Recipe {
    suites: Vec<String>,
    packages: Vec<String>,
    directories: Vec<String>,
    links: BTreeMap<String, String>,
    source: Source,
}

#[derive(Debug, Deserialize, Hash)]
#[serde(deny_unknown_fields)]
struct Source {
    package: String,
    files: Vec<String>,
}

/// A finished toolbox.
#[derive(Clone, Debug)]
pub struct Toolbox {
    root: PathBuf,
}

impl Toolbox {
    /// Where the toolbox of this checkout's recipe is, or will be.
    ///
    /// # Errors
    /// The recipe cannot be read.
    pub fn place(cache: &Cache) -> Result<Self> {
        let recipe = recipe()?;
        let mut hasher = DefaultHasher::new();
        recipe.hash(&mut hasher);
        Ok(Self {
            root: cache.toolboxes().join(format!("{:016x}", hasher.finish())),
        })
    }

    /// Whether it is there. It is moved into place complete, or not at all.
    #[must_use]
    pub fn is_made(&self) -> bool {
        self.root.exists()
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
        let recipe = recipe()?;
        let apt = Apt::new(cache, &recipe, mirror)?;
        report.line(&format!(
            "making the toolbox (QEMU, guest kernel and headers, compiler) in {} from {}",
            self.root.display(),
            apt.mirror
        ));
        apt.update(report)?;
        apt.download(&recipe.packages, report)?;

        let partial = self.root.with_extension("partial");
        remove_all(&partial)?;
        fs::create_dir_all(&partial).at("create", &partial)?;
        unpack(&apt.packages()?, &partial, report)?;
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
        let made = Self { root: partial };
        made.release()?;
        fs::rename(&made.root, &self.root).at("create", &self.root)?;
        remove_all(&apt.archives())?;
        report.line(&format!(
            "the toolbox is ready, after {} s",
            started.elapsed().as_secs()
        ));
        Ok(())
    }

    /// Its root directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Release of its kernel.
    ///
    /// # Errors
    /// It holds no kernel.
    pub fn release(&self) -> Result<String> {
        let modules = self.root.join("usr/lib/modules");
        fs::read_dir(&modules)
            .at("read", &modules)?
            .flatten()
            .find(|entry| entry.path().join("vmlinuz").exists())
            .and_then(|entry| entry.file_name().into_string().ok())
            .ok_or(Error::Incomplete("kernel"))
    }

    /// A command that runs one of the toolbox's programs on the host's files,
    /// through the toolbox's own dynamic linker: no namespace, no mount.
    #[must_use]
    pub fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.root.join("usr/lib64/ld-linux-x86-64.so.2"));
        command
            .arg("--library-path")
            .arg(self.root.join("usr/lib/x86_64-linux-gnu"))
            .arg(self.root.join("usr/bin").join(name));
        command
    }

    /// A command that runs `script` with the toolbox as its root directory and
    /// `directory` as `/mnt`, in a mount namespace that ends with it.
    #[must_use]
    pub fn enter(&self, directory: &Path, script: &str) -> Command {
        const MOUNT: &str = r#"
            PATH=/usr/sbin:/usr/bin:/sbin:/bin
            for each in dev proc sys; do mount --rbind "/$each" "$1/$each"; done
            mount --bind "$2" "$1/mnt"
            exec chroot "$1" /bin/sh -e -c "cd /mnt; $3"
        "#;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private"]);
        if !rustix::process::geteuid().is_root() {
            command.arg("--map-root-user");
        }
        command
            .args(["sh", "-e", "-c", MOUNT, "sh"])
            .arg(&self.root)
            .arg(directory)
            .arg(script);
        // The host's locale may not exist here.
        command.env("LC_ALL", "C").env("TMPDIR", "/tmp");
        command
    }

    /// Puts the kernel's own style checker into `directory`.
    ///
    /// # Errors
    /// The kernel's source package cannot be fetched.
    pub fn fetch_checkpatch(
        &self,
        cache: &Cache,
        mirror: Option<&str>,
        directory: &Path,
        report: Report,
    ) -> Result<()> {
        let recipe = recipe()?;
        let _lock = cache.lock(report)?;
        let wanted = |name: &String| Path::new(name).file_name().map(|name| directory.join(name));
        let there = recipe
            .source
            .files
            .iter()
            .filter_map(wanted)
            .all(|path| path.exists());
        if there {
            return Ok(());
        }
        report.line("fetching the kernel's source package for its checkpatch.pl (160 MB, once)");
        let apt = Apt::new(cache, &recipe, mirror)?;
        apt.update(report)?;
        apt.download(std::slice::from_ref(&recipe.source.package), report)?;
        fs::create_dir_all(directory).at("create", directory)?;
        let unpacked = tempfile::tempdir_in(cache.apt()).at("write", cache.apt())?;
        unpack(&apt.packages()?, unpacked.path(), report)?;
        let sources = unpacked.path().join("usr/src");
        let tarball = fs::read_dir(&sources)
            .at("read", &sources)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "xz"))
            .ok_or(Error::Incomplete("kernel source"))?;
        let patterns = recipe.source.files.iter().map(|file| format!("*/{file}"));
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
        remove_all(&apt.archives())
    }
}

fn recipe() -> Result<Recipe> {
    read_toml(&paths::checkout().join("images/toolbox.toml"))
}

/// Removes a file or directory if it is there.
///
/// # Errors
/// It cannot be removed.
pub fn remove_all(path: &Path) -> Result<()> {
    let removed = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).at("remove", path),
        _ => Ok(()),
    }
}

/// apt with a configuration of its own and no knowledge of the host's packages.
struct Apt {
    directory: PathBuf,
    mirror: String,
    preferred: String,
}

impl Apt {
    fn new(cache: &Cache, recipe: &Recipe, mirror: Option<&str>) -> Result<Self> {
        let mirror = match mirror {
            Some(mirror) => mirror.to_owned(),
            None => host_mirror()?,
        };
        if !Path::new(KEYRING).exists() {
            return Err(Error::NotDebian("debian-archive-keyring"));
        }
        let apt = Self {
            directory: cache.apt(),
            mirror,
            preferred: recipe.suites.first().cloned().unwrap_or_default(),
        };
        for directory in ["state/lists/partial", "cache/archives/partial", "etc"] {
            let path = apt.directory.join(directory);
            fs::create_dir_all(&path).at("create", &path)?;
        }
        let sources = recipe
            .suites
            .iter()
            .map(|suite| format!("deb [signed-by={KEYRING}] {} {suite} main\n", apt.mirror))
            .collect::<String>();
        for (file, text) in [
            ("etc/sources.list", sources),
            ("state/status", String::new()),
        ] {
            let path = apt.directory.join(file);
            fs::write(&path, text).at("write", &path)?;
        }
        Ok(apt)
    }

    fn archives(&self) -> PathBuf {
        self.directory.join("cache/archives")
    }

    fn get(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("apt-get");
        let directory = self.directory.display();
        for option in [
            format!("Dir={directory}"),
            format!("Dir::State={directory}/state"),
            format!("Dir::State::status={directory}/state/status"),
            format!("Dir::Cache={directory}/cache"),
            format!("Dir::Etc={directory}/etc"),
            "APT::Architecture=amd64".into(),
            "APT::Architectures::=amd64".into(),
            "APT::Install-Recommends=false".into(),
            // Without root apt runs as its caller anyhow; as root its own user
            // could not write into the cache.
            "APT::Sandbox::User=root".into(),
            // A suite that cannot be fetched is an error, not a warning.
            "APT::Update::Error-Mode=any".into(),
            "Acquire::Languages=none".into(),
            "Acquire::Retries=3".into(),
            "Dir::Log=/dev/null".into(),
        ] {
            command.arg("-o").arg(option);
        }
        command.arg("-qq").arg("--yes").args(arguments);
        // The host's own configuration counts where it is not overridden: it may name a proxy.
        command.env("LC_ALL", "C.UTF-8");
        command
    }

    fn update(&self, report: Report) -> Result<()> {
        let spinner = report.spinner();
        let result = capture(&mut self.get(&["update"]));
        spinner.finish_and_clear();
        result.map(drop)
    }

    fn download(&self, packages: &[String], report: Report) -> Result<()> {
        let install = |option| {
            let mut command = self.get(&[
                "install",
                option,
                "--target-release",
                self.preferred.as_str(),
            ]);
            command.args(packages);
            command
        };
        // Lines such as `'http://…/x.deb' x.deb 1234 SHA256:…`, without what is there already.
        let total: u64 = capture(&mut install("--print-uris"))?
            .lines()
            .filter_map(|line| line.split(' ').nth(2)?.parse::<u64>().ok())
            .sum();
        let before = size_of(&self.archives());
        report.line(&format!("downloading {} MB of packages", total / 1_000_000));
        let bar = report.bytes(total);
        let result = thread::scope(|scope| {
            let download = scope.spawn(|| capture(&mut install("--download-only")));
            while !download.is_finished() {
                bar.set_position(size_of(&self.archives()).saturating_sub(before));
                thread::sleep(Duration::from_millis(100));
            }
            download.join()
        });
        bar.finish_and_clear();
        match result {
            Ok(result) => result.map(drop),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    fn packages(&self) -> Result<Vec<PathBuf>> {
        let archives = self.archives();
        Ok(fs::read_dir(&archives)
            .at("read", &archives)?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .collect())
    }
}

/// Bytes in a directory and the directories in it.
pub(crate) fn size_of(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => size_of(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

fn unpack(packages: &[PathBuf], root: &Path, report: Report) -> Result<()> {
    report.line(&format!("unpacking {} packages", packages.len()));
    let bar = report.steps(packages.len() as u64);
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(package) = packages.get(next.fetch_add(1, Ordering::Relaxed)) {
            capture(
                Command::new("dpkg-deb")
                    .arg("--extract")
                    .arg(package)
                    .arg(root),
            )?;
            bar.inc(1);
        }
        Ok(())
    };
    let workers = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let result = thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .try_for_each(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
    });
    bar.finish_and_clear();
    result
}

/// The Debian archive among the host's own apt sources.
///
/// # Errors
/// There is no apt, or none of its sources is a Debian archive.
pub fn host_mirror() -> Result<String> {
    let mut command = Command::new("apt-get");
    command.args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)",
        "Identifier: Packages",
    ]);
    let targets = match capture(&mut command) {
        Err(Error::Start { .. }) => return Err(Error::NotDebian("apt")),
        other => other?,
    };
    choose_mirror(&targets).ok_or(Error::NoMirror)
}

/// Picks the line of a whole Debian release; security and updates are other
/// archives. The origin is unknown until the host has run `apt-get update`.
fn choose_mirror(targets: &str) -> Option<String> {
    const RELEASES: [&str; 9] = [
        "bullseye",
        "bookworm",
        "trixie",
        "forky",
        "sid",
        "oldstable",
        "stable",
        "testing",
        "unstable",
    ];
    let candidates = || {
        targets.lines().filter_map(|line| {
            let mut words = line.split(' ');
            let (uri, release, component) = (words.next()?, words.next()?, words.next()?);
            let origin = words.next().unwrap_or_default();
            (RELEASES.contains(&release) && component == "main").then_some((uri, origin))
        })
    };
    candidates()
        .find(|(_, origin)| *origin == "Debian")
        .or_else(|| candidates().find(|(uri, _)| uri.trim_end_matches('/').ends_with("/debian")))
        .map(|(uri, _)| uri.trim_end_matches('/').to_owned())
}

/// Says whether the host lets this user have a mount namespace.
///
/// # Errors
/// It does not, or has no unshare(1).
pub fn check_namespaces() -> Result<()> {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private"]);
    if !rustix::process::geteuid().is_root() {
        command.arg("--map-root-user");
    }
    capture(command.arg("true"))
        .map(drop)
        .map_err(|error| Error::NoNamespaces(Box::new(error)))
}

/// Runs a command in a toolbox; a failure to enter it is told from one of the command.
pub(crate) fn run_inside(command: &mut Command) -> Result<String> {
    match capture(command) {
        Err(error) => check_namespaces().and(Err(error)),
        output => output,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_archive_of_a_whole_release() {
        let targets = "http://a/debian-security/ bookworm-security main Debian\n\
                       http://b/node/ nodistro main . nodistro\n\
                       http://c/tools/ bookworm main Tools\n\
                       http://d/debian/ bookworm-updates main Debian\n\
                       http://e/debian/ bookworm contrib Debian\n\
                       http://f/debian/ bookworm main Debian\n";
        assert_eq!(choose_mirror(targets).as_deref(), Some("http://f/debian"));
    }

    #[test]
    fn before_the_first_update_the_address_decides() {
        let targets = "http://c/tools/ trixie main \nhttp://f/debian/ trixie main \n";
        assert_eq!(choose_mirror(targets).as_deref(), Some("http://f/debian"));
        assert_eq!(choose_mirror("http://u/ubuntu/ noble main Ubuntu\n"), None);
    }
}
