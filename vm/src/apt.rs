//! Debian packages, fetched by apt and unpacked by dpkg-deb without installing anything.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::error::{Error, FileContext, Result};
use crate::paths::{Cache, remove_all};
use crate::process::capture;
use crate::report::Report;

/// Debian's own keys, which decide what the mirror may serve.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Variable that names the mirror, as `--mirror` does.
pub const MIRROR_VARIABLE: &str = "VIRTIO_HMM_MIRROR";

/// apt with a configuration of its own and no knowledge of the host's packages.
pub(crate) struct Apt {
    directory: PathBuf,
    archives: PathBuf,
    mirror: String,
    preferred: String,
}

impl Apt {
    /// `name` keeps what is fetched for different purposes apart. `suites` are in order of
    /// preference: a package comes from the first that has it.
    pub(crate) fn new(
        cache: &Cache,
        name: &str,
        suites: &[String],
        mirror: Option<&str>,
    ) -> Result<Self> {
        let mirror = match mirror {
            Some(mirror) => mirror.to_owned(),
            None => host_mirror()?,
        };
        if !Path::new(KEYRING).exists() {
            return Err(Error::NotDebian("debian-archive-keyring"));
        }
        let apt = Self {
            directory: cache.apt(),
            archives: cache.apt().join("archives").join(name),
            mirror,
            preferred: suites.first().cloned().unwrap_or_default(),
        };
        for path in [
            apt.directory.join("state/lists/partial"),
            apt.directory.join("cache"),
            apt.directory.join("etc"),
            apt.archives.join("partial"),
        ] {
            fs::create_dir_all(&path).at("create", &path)?;
        }
        let sources = suites
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

    /// Where the packages come from.
    pub(crate) fn mirror(&self) -> &str {
        &self.mirror
    }

    /// Unpacks the packages and what they depend on in `root`. What has been downloaded is
    /// there for another try until [`Self::forget`].
    pub(crate) fn unpack(&self, packages: &[String], root: &Path, report: Report) -> Result<()> {
        self.update(report)?;
        let names = capture(&mut self.command("apt-cache", &["pkgnames"]))?;
        let packages = packages
            .iter()
            .map(|pattern| match newest_match(pattern, &names) {
                Some(name) => Ok(name.to_owned()),
                None => Err(Error::NoPackage {
                    pattern: pattern.clone(),
                    mirror: self.mirror.clone(),
                }),
            })
            .collect::<Result<Vec<_>>>()?;
        self.download(&packages, report)?;
        fs::create_dir_all(root).at("create", root)?;
        unpack(&self.packages()?, root, report)
    }

    /// Removes the downloaded packages.
    pub(crate) fn forget(&self) -> Result<()> {
        remove_all(&self.archives)
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        let directory = self.directory.display();
        for option in [
            format!("Dir={directory}"),
            format!("Dir::State={directory}/state"),
            format!("Dir::State::status={directory}/state/status"),
            format!("Dir::Cache={directory}/cache"),
            format!("Dir::Cache::archives={}", self.archives.display()),
            format!("Dir::Etc={directory}/etc"),
            "APT::Architecture=amd64".into(),
            "APT::Architectures::=amd64".into(),
            "APT::Install-Recommends=false".into(),
            // Without root apt runs as its caller anyhow; as root its own user
            // could not write into the cache.
            "APT::Sandbox::User=root".into(),
            // A suite that cannot be fetched is an error, not a warning.
            "APT::Update::Error-Mode=any".into(),
            "APT::Get::Assume-Yes=true".into(),
            "Acquire::Languages=none".into(),
            "Acquire::Retries=3".into(),
            "Dir::Log=/dev/null".into(),
        ] {
            command.arg("-o").arg(option);
        }
        command.arg("-qq").args(arguments);
        // The host's own configuration counts where it is not overridden: it may name a proxy.
        command.env("LC_ALL", "C.UTF-8");
        command
    }

    fn update(&self, report: Report) -> Result<()> {
        let spinner = report.spinner();
        let result = capture(&mut self.command("apt-get", &["update"]));
        spinner.finish_and_clear();
        result.map(drop)
    }

    fn download(&self, packages: &[String], report: Report) -> Result<()> {
        let install = |option| {
            let arguments = ["install", option, "--target-release", &self.preferred];
            let mut command = self.command("apt-get", &arguments);
            command.args(packages);
            command
        };
        // Lines such as `'http://…/x.deb' x.deb 1234 SHA256:…`, without what is there already.
        let total: u64 = capture(&mut install("--print-uris"))?
            .lines()
            .filter_map(|line| line.split(' ').nth(2)?.parse::<u64>().ok())
            .sum();
        let before = size_of(&self.archives);
        report.line(&format!("downloading {} MB of packages", total / 1_000_000));
        let bar = report.bytes(total);
        let result = thread::scope(|scope| {
            let download = scope.spawn(|| capture(&mut install("--download-only")));
            while !download.is_finished() {
                bar.set_position(size_of(&self.archives).saturating_sub(before));
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
        Ok(fs::read_dir(&self.archives)
            .at("read", &self.archives)?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .collect())
    }
}

/// Of the names, one a line, that of the pattern; where it has a `*`, the one with the newest
/// number in its place.
fn newest_match<'a>(pattern: &str, names: &'a str) -> Option<&'a str> {
    let Some((prefix, suffix)) = pattern.split_once('*') else {
        return names.lines().find(|name| *name == pattern);
    };
    let numbers = |name: &str| -> Option<Vec<u32>> {
        let middle = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
        middle.split('.').map(|part| part.parse().ok()).collect()
    };
    names
        .lines()
        .filter_map(|name| Some((numbers(name)?, name)))
        .max()
        .map(|(_, name)| name)
}

/// Bytes in a directory and the directories in it.
fn size_of(directory: &Path) -> u64 {
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
    fn the_newest_of_a_pattern_is_found_by_number() {
        let names = "linux-image-7.2.9-amd64\nlinux-image-7.2.12-rt-amd64\n\
                     linux-image-7.2.12-amd64\nlinux-image-7.3.1-amd64\n";
        let newest = |pattern| newest_match(pattern, names);
        assert_eq!(
            newest("linux-image-7.2.*-amd64"),
            Some("linux-image-7.2.12-amd64")
        );
        assert_eq!(
            newest("linux-image-*-amd64"),
            Some("linux-image-7.3.1-amd64")
        );
        assert_eq!(newest("linux-image-6.12.*-amd64"), None);
        assert_eq!(
            newest("linux-image-7.3.1-amd64"),
            Some("linux-image-7.3.1-amd64")
        );
        assert_eq!(newest("linux-image-7.3.1-amd64-"), None);
    }

    #[test]
    fn before_the_first_update_the_address_decides() {
        let targets = "http://c/tools/ trixie main \nhttp://f/debian/ trixie main \n";
        assert_eq!(choose_mirror(targets).as_deref(), Some("http://f/debian"));
        assert_eq!(choose_mirror("http://u/ubuntu/ noble main Ubuntu\n"), None);
    }
}
