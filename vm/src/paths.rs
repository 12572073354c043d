//! Where things are: the checkout, and the cache outside it.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::{Error, FileContext, Result};
use crate::report::Report;

/// The checkout this tool was built from.
#[must_use]
pub fn checkout() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
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

/// The directory of everything this tool makes and keeps.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `VIRTIO_HMM_CACHE`, or `virtio-hmm` in `XDG_CACHE_HOME` or `~/.cache`.
    ///
    /// # Errors
    /// None of these variables nor HOME is set.
    pub fn locate() -> Result<Self> {
        let set = |name| {
            env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let root = set("VIRTIO_HMM_CACHE")
            .or_else(|| set("XDG_CACHE_HOME").map(|dir| dir.join("virtio-hmm")))
            .or_else(|| set("HOME").map(|dir| dir.join(".cache/virtio-hmm")))
            .ok_or(Error::NoCache)?;
        std::path::absolute(&root).at("use", &root).map(Self::at)
    }

    /// In this directory.
    pub(crate) fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// The directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// One toolbox root for each recipe.
    #[must_use]
    pub fn toolboxes(&self) -> PathBuf {
        self.root.join("toolbox")
    }

    /// apt's own state and the packages of an unfinished toolbox.
    #[must_use]
    pub fn apt(&self) -> PathBuf {
        self.root.join("apt")
    }

    /// One build of the kernel module for each of its sources and kernels.
    #[must_use]
    pub fn modules(&self) -> PathBuf {
        self.root.join("module")
    }

    /// What QEMU boots of each kernel.
    #[must_use]
    pub fn boot_images(&self) -> PathBuf {
        self.root.join("boot-image")
    }

    /// The logs of the last runs.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// The kernel's own style checker.
    #[must_use]
    pub fn checkpatch(&self) -> PathBuf {
        self.root.join("checkpatch")
    }

    /// Sources of the kernel's `test_hmm`.
    #[must_use]
    pub fn test_hmm(&self) -> PathBuf {
        self.root.join("test_hmm")
    }

    /// The fuzz targets, and inputs that they found worth keeping.
    #[must_use]
    pub fn fuzz(&self) -> PathBuf {
        self.root.join("fuzz")
    }

    /// Builds of device daemons that tests break on purpose.
    #[must_use]
    pub fn broken_device(&self) -> PathBuf {
        self.root.join("broken-device")
    }

    /// Whether KVM works here.
    #[must_use]
    pub fn accelerator(&self) -> PathBuf {
        self.root.join("accelerator.json")
    }

    fn lock_file(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Everything this tool may have put into the cache.
    #[must_use]
    pub fn entries(&self) -> [PathBuf; 11] {
        [
            self.toolboxes(),
            self.apt(),
            self.modules(),
            self.boot_images(),
            self.logs(),
            self.checkpatch(),
            self.test_hmm(),
            self.fuzz(),
            self.broken_device(),
            self.accelerator(),
            self.lock_file(),
        ]
    }

    /// Keeps other runs of this tool from changing the cache until the file is dropped.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub fn lock(&self, report: Report) -> Result<File> {
        fs::create_dir_all(&self.root).at("create", &self.root)?;
        lock(&self.lock_file(), report)
    }
}

/// Locks a file, which it makes, until it is dropped.
///
/// # Errors
/// It cannot be written.
pub fn lock(path: &Path, report: Report) -> Result<File> {
    let file = File::create(path).at("create", path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => {
            report.line("waiting for another run that prepares the same things");
            flock(&file, FlockOperation::LockExclusive).at("lock", path)?;
        }
        other => other.at("lock", path)?,
    }
    Ok(file)
}
