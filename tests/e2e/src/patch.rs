//! Patches that break something on purpose, in a copy of it, and say what has to notice.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::Trial;

use crate::{Result, check, skippable_trial};

/// A patch; what precedes its first file says what it breaks.
#[derive(Debug)]
pub struct Patch {
    path: PathBuf,
    text: String,
}

/// A test of `group` for each patch in a directory; `body` tells what is missing, as that of a
/// [`skippable_trial`] does.
///
/// # Errors
/// The directory cannot be read.
pub fn trials(
    group: &str,
    directory: &str,
    body: fn(&Patch) -> Result<Option<String>>,
) -> Result<Vec<Trial>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory)? {
        paths.push(entry?.path());
    }
    paths.sort();
    let trial_of = |path: PathBuf| {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        skippable_trial(&format!("{group}::{name}"), move || {
            body(&Patch::read(path)?)
        })
    };
    Ok(paths.into_iter().map(trial_of).collect())
}

impl Patch {
    /// Reads it from a file.
    ///
    /// # Errors
    /// The file cannot be read, or the patch does not say what has to notice.
    pub fn read(path: PathBuf) -> Result<Self> {
        let text = fs::read_to_string(&path)?;
        let patch = Self { path, text };
        check(patch.fails().next().is_some(), || {
            "the patch names no test".into()
        })?;
        Ok(patch)
    }

    /// The tests that have to notice.
    pub fn fails(&self) -> impl Iterator<Item = &str> {
        self.lines("Fails: ")
    }

    /// What follows `start` in each line that begins with it.
    pub fn lines(&self, start: &str) -> impl Iterator<Item = &str> {
        self.text
            .lines()
            .filter_map(move |line| line.strip_prefix(start))
            .map(str::trim)
    }

    /// Applies it to the files in a directory.
    ///
    /// # Errors
    /// It does not fit.
    pub fn apply(&self, directory: &Path) -> Result {
        let applied = Command::new("git")
            .args(["apply", "-p0"])
            .arg(&self.path)
            .current_dir(directory)
            // In a repository it would look for the files at its top.
            .env("GIT_CEILING_DIRECTORIES", directory.join(".."))
            .output()?;
        check(applied.status.success(), || {
            String::from_utf8_lossy(&applied.stderr).into_owned()
        })
    }
}
