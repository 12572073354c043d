//! The guest's kernel: where its image is, and what builds a module for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use crate::error::{Error, FileContext, Result};
use crate::named_kernel;
use crate::process::capture;
use crate::root::{Root, check_namespaces};

/// Variable that chooses the guest's kernel, as `--kernel` does.
pub const KERNEL_VARIABLE: &str = "VIRTIO_HMM_KERNEL";

/// Oldest release that is taken from this machine. The driver builds for older ones, too.
pub const OLDEST: Version = Version(7, 3);

/// What the driver and the guest's first program need, which loads no other module.
pub(crate) const NEEDED: [&str; 12] = [
    "BINFMT_ELF",
    "BLK_DEV_INITRD",
    "DEBUG_FS",
    "DEVICE_PRIVATE",
    "DEVTMPFS",
    "MODULES",
    "SERIAL_8250_CONSOLE",
    "TMPFS",
    "TRACING",
    "TRANSPARENT_HUGEPAGE",
    "VIRTIO_CONSOLE",
    "VIRTIO_PCI",
];

/// What the user asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// Debian's.
    #[default]
    Stock,
    /// One of `images/kernels.toml`.
    Named(String),
    /// A build tree of the user's.
    Tree(PathBuf),
}

impl FromStr for Choice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "stock" => Self::Stock,
            name if named_kernel::names()?.contains(name) => Self::Named(name.into()),
            path => Self::Tree(std::path::absolute(path).at("use the kernel", path)?),
        })
    }
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stock => f.write_str("stock"),
            Self::Named(name) => f.write_str(name),
            Self::Tree(path) => path.display().fmt(f),
        }
    }
}

/// The first two numbers of a release or version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32);

impl Version {
    /// Reads `7.3.4+deb13-amd64` or `14.2`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split(|c: char| !c.is_ascii_digit());
        let mut next = || numbers.next()?.parse().ok();
        Some(Self(next()?, next()?))
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// A kernel that can be booted, and for which modules can be built.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its release.
    pub release: String,
    /// What QEMU boots.
    pub image: PathBuf,
    /// Its own modules.
    pub modules: PathBuf,
    /// make's directory for modules, as seen where make runs.
    pub build: PathBuf,
    /// Where make runs: in this root directory, or on the host itself.
    pub root: Option<Root>,
}

impl Kernel {
    /// The user's own, from its build tree.
    ///
    /// # Errors
    /// It is not built, or lacks something that the guest needs.
    pub fn of_tree(tree: &Path) -> Result<Self> {
        let build = tree.canonicalize().at("use the kernel", tree)?;
        let release = build.join("include/config/kernel.release");
        let kernel = Self {
            release: fs::read_to_string(&release)
                .at("read", &release)?
                .trim()
                .to_owned(),
            image: build.join("arch/x86/boot/bzImage"),
            modules: build.clone(),
            build,
            root: None,
        };
        fs::File::open(&kernel.image).at("read", &kernel.image)?;
        let settings = Settings::read(&kernel.build)?;
        match settings.lacks(&NEEDED) {
            None => Ok(kernel),
            Some(lacks) => Err(Error::Config(format!(
                "the kernel in {} is built without {lacks}",
                tree.display()
            ))),
        }
    }

    /// The one that a package has put into a root directory.
    ///
    /// # Errors
    /// It holds none.
    pub(crate) fn of_root(root: &Root) -> Result<Self> {
        let modules = root.path().join("usr/lib/modules");
        fs::read_dir(&modules)
            .at("read", &modules)?
            .flatten()
            .find_map(|entry| {
                let release = entry.file_name().into_string().ok()?;
                let image = entry.path().join("vmlinuz");
                image.exists().then(|| Self {
                    image,
                    modules: entry.path().join("kernel"),
                    build: Path::new("/usr/lib/modules").join(&release).join("build"),
                    release,
                    root: Some(root.clone()),
                })
            })
            .ok_or(Error::Incomplete("kernel"))
    }

    /// Those of its own modules that are files, packed or not; others it has built in, or does
    /// not have.
    pub(crate) fn module_files(&self, names: &[&str]) -> Vec<PathBuf> {
        let names = names
            .iter()
            .flat_map(|name| [(*name).to_owned(), format!("{name}.xz")]);
        names
            .map(|name| self.modules.join(name))
            .filter(|path| path.exists())
            .collect()
    }

    /// Runs a shell script, such as make, in `directory` where this kernel's compiler is.
    pub(crate) fn run(&self, directory: &Path, script: &str) -> Result<String> {
        match &self.root {
            Some(root) => capture(&mut root.enter(directory, script))
                // A failure to enter it is told from one of the script.
                .or_else(|error| check_namespaces().and(Err(error))),
            None => capture(
                Command::new("sh")
                    .args(["-e", "-c", script])
                    .current_dir(directory)
                    .env("LC_ALL", "C"),
            ),
        }
    }
}

/// A kernel's configuration.
#[derive(Clone, Debug)]
pub(crate) struct Settings(String);

impl Settings {
    /// Reads what modules are built with.
    pub(crate) fn read(build: &Path) -> Result<Self> {
        let path = build.join("include/config/auto.conf");
        fs::read_to_string(&path).at("read", path).map(Self)
    }

    fn value(&self, name: &str) -> Option<&str> {
        self.0.lines().find_map(|line| {
            line.strip_prefix("CONFIG_")?
                .strip_prefix(name)?
                .strip_prefix('=')
        })
    }

    /// Those of the options that are not built in.
    fn lacks(&self, options: &[&str]) -> Option<String> {
        let missing: Vec<_> = options
            .iter()
            .filter(|name| self.value(name) != Some("y"))
            .map(|name| format!("CONFIG_{name}=y"))
            .collect();
        (!missing.is_empty()).then(|| missing.join(", "))
    }

    /// What keeps a guest from running on this kernel, or its modules from being built by
    /// this release of gcc.
    pub(crate) fn unfit(&self, gcc: Option<u32>) -> Option<String> {
        if let Some(lacks) = self.lacks(&NEEDED) {
            return Some(format!("it is built without {lacks}"));
        }
        let built_by = self.value("GCC_VERSION")?.parse::<u32>().ok()? / 10_000;
        (gcc? < built_by).then(|| format!("it was built by gcc {built_by}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_compare_by_number() {
        assert_eq!(Version::parse("7.3.4+deb13-amd64"), Some(Version(7, 3)));
        assert_eq!(Version::parse("7.10-rc1"), Some(Version(7, 10)));
        assert!(Version(7, 10) > OLDEST && Version(6, 12) < OLDEST);
        for text in ["", "7", "x.1", "-7.3"] {
            assert_eq!(Version::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_kernel_without_what_the_guest_needs_is_refused_by_name() {
        let all: String = NEEDED.map(|name| format!("CONFIG_{name}=y\n")).concat();
        let settings = Settings(all.clone() + "CONFIG_GCC_VERSION=140200\n");
        assert_eq!(settings.unfit(Some(14)), None);
        let text = settings.unfit(Some(12)).unwrap();
        assert!(text.contains("gcc 14"), "{text}");
        let settings = Settings(all.replace("DEVICE_PRIVATE=y", "DEVICE_PRIVATE=m"));
        let text = settings.unfit(Some(14)).unwrap();
        assert!(text.ends_with("without CONFIG_DEVICE_PRIVATE=y"), "{text}");
    }

    #[test]
    fn a_directory_that_is_no_build_tree_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let text = Kernel::of_tree(directory.path()).unwrap_err().to_string();
        assert!(text.contains("kernel.release"), "{text}");
    }
}
