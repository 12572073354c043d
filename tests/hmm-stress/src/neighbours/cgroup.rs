//! A memory cgroup of the test's own.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::ptr;
use std::thread;
use std::time::Duration;

use crate::failure::Failure;

/// Where cgroups are mounted, here and elsewhere.
const ROOT: &str = "/sys/fs/cgroup";

/// How often a directory is removed whose last process may just be ending.
const REMOVALS: u32 = 100;

/// A memory cgroup, removed when it is dropped. Its processes have to be gone by then.
#[derive(Debug)]
pub(super) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Make one.
    ///
    /// # Errors
    /// [`Failure::Skip`] where the kernel has no memory cgroups.
    pub(super) fn new(name: &str) -> Result<Self, Failure> {
        mount()?;
        let root = Path::new(ROOT);
        let controllers = read(&root.join("cgroup.controllers"))?;
        if !controllers.split_whitespace().any(|name| name == "memory") {
            return Err(Failure::Skip("the kernel has no memory cgroups".into()));
        }
        write(&root.join("cgroup.subtree_control"), "+memory")?;
        let path = root.join(format!("hmm-stress-{name}-{}", process::id()));
        fs::create_dir(&path).map_err(|source| Failure::System {
            call: "making a cgroup",
            source,
        })?;
        Ok(Self { path })
    }

    /// Put this process there. Memory that it has stays charged to where it was.
    pub(super) fn enter(&self) -> Result<(), Failure> {
        write(&self.path.join("cgroup.procs"), "0")
    }

    /// Write `value` to its file `name`.
    pub(super) fn set(&self, name: &str, value: impl ToString) -> Result<(), Failure> {
        write(&self.path.join(name), &value.to_string())
    }

    /// The number in its file `name`.
    pub(super) fn number(&self, name: &str) -> Result<u64, Failure> {
        let text = read(&self.path.join(name))?;
        text.trim_end()
            .parse()
            .map_err(|_| Failure::Broken(format!("{name} holds {text:?}")))
    }

    /// The number of `field` in its file `name` of lines "field number".
    pub(super) fn field(&self, name: &str, field: &str) -> Result<u64, Failure> {
        let text = read(&self.path.join(name))?;
        text.lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(' ')?.parse().ok())
            .ok_or_else(|| Failure::Broken(format!("{name} has no {field}")))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for _ in 0..REMOVALS {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Mount cgroups, unless they are.
fn mount() -> Result<(), Failure> {
    const KIND: &CStr = c"cgroup2";
    const TARGET: &CStr = c"/sys/fs/cgroup";
    if Path::new(ROOT).join("cgroup.controllers").exists() {
        return Ok(());
    }
    // SAFETY: the strings live for the call, which changes no memory of this process.
    let result = unsafe {
        libc::mount(
            KIND.as_ptr(),
            TARGET.as_ptr(),
            KIND.as_ptr(),
            0,
            ptr::null(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(Failure::Skip(format!(
            "cgroups cannot be mounted: {}",
            io::Error::last_os_error()
        ))),
    }
}

fn read(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|source| Failure::System {
        call: "reading a file of a cgroup",
        source,
    })
}

fn write(path: &Path, value: &str) -> Result<(), Failure> {
    fs::write(path, value).map_err(|source| Failure::System {
        call: "writing a file of a cgroup",
        source,
    })
}
