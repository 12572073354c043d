//! Files of the kernel that hold one value.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::require;

/// How long a counter may take to get where it must.
const DEADLINE: Duration = Duration::from_secs(30);

/// A file that gets its old value back when this is dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct Tunable {
    path: PathBuf,
    old: String,
}

impl Tunable {
    /// Write `value` to the file at `path`.
    pub(super) fn set(path: impl Into<PathBuf>, value: &str) -> Result<Self, Failure> {
        let path = path.into();
        let old = fs::read_to_string(&path).map_err(|source| Failure::System {
            call: "reading a tunable of the kernel",
            source,
        })?;
        let tunable = Self { path, old };
        tunable.write(value)?;
        Ok(tunable)
    }

    /// Write another value.
    pub(super) fn write(&self, value: &str) -> Result<(), Failure> {
        fs::write(&self.path, value).map_err(|source| Failure::System {
            call: "changing a tunable of the kernel",
            source,
        })
    }
}

impl Drop for Tunable {
    fn drop(&mut self) {
        // A test that fails because of it tells.
        let _ = fs::write(&self.path, &self.old);
    }
}

/// The number in the file at `path`.
pub(super) fn number(path: &str) -> Result<i64, Failure> {
    let text = fs::read_to_string(path).map_err(|source| Failure::System {
        call: "reading a number of the kernel",
        source,
    })?;
    text.trim_end()
        .parse()
        .map_err(|_| Failure::Broken(format!("{path} holds {text:?}")))
}

/// Wait until `condition` holds, which is about `what`.
pub(super) fn wait_until(
    what: &str,
    mut condition: impl FnMut() -> Result<bool, Failure>,
) -> Result<(), Failure> {
    let end = Instant::now() + DEADLINE;
    while !condition()? {
        require!(Instant::now() < end, "not in {DEADLINE:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
