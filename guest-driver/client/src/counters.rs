//! Counters that the driver and the device show in debugfs.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why counters could not be had.
#[derive(Debug, Error)]
pub enum CountersError {
    /// The file could not be read: debugfs is not mounted, or not for this user.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A line is not a name, a space and a decimal number.
    #[error("not a counter: {0:?}")]
    Line(String),
    /// There is no counter of this name.
    #[error("no counter is named {0}")]
    Missing(String),
}

/// A set of named counters, read at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters(BTreeMap<String, u64>);

impl Counters {
    /// Read the driver's counters from `directory`, a device's debugfs directory.
    ///
    /// # Errors
    /// The file cannot be read, or holds something else.
    pub fn of_driver(directory: &Path) -> Result<Self, CountersError> {
        Self::read(&directory.join("counters"))
    }

    /// Have the driver fetch the device's own counters, over the control queue.
    ///
    /// # Errors
    /// As for [`Counters::of_driver`]; also when the device does not answer.
    pub fn of_device(directory: &Path) -> Result<Self, CountersError> {
        Self::read(&directory.join("device_counters"))
    }

    /// How many CPU faults took how long: the names are bounds in nanoseconds, which
    /// that many were shorter than, and no shorter than the bound before.
    ///
    /// # Errors
    /// As for [`Counters::of_driver`].
    pub fn of_fault_latency(directory: &Path) -> Result<Self, CountersError> {
        Self::read(&directory.join("fault_latency"))
    }

    fn read(path: &Path) -> Result<Self, CountersError> {
        let text = fs::read_to_string(path).map_err(|source| CountersError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text)
    }

    /// Parse lines of the form `name value`.
    ///
    /// # Errors
    /// A line has another form.
    pub fn parse(text: &str) -> Result<Self, CountersError> {
        text.lines()
            .map(|line| {
                let bad = || CountersError::Line(line.to_owned());
                let (name, value) = line.split_once(' ').ok_or_else(bad)?;
                let value = value.trim().parse().map_err(|_| bad())?;
                Ok((name.to_owned(), value))
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The value of one counter.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn get(&self, name: &str) -> Result<u64, CountersError> {
        self.0
            .get(name)
            .copied()
            .ok_or_else(|| CountersError::Missing(name.to_owned()))
    }

    /// All counters by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(name, &value)| (name.as_str(), value))
    }

    /// How much each counter changed since `earlier`; a counter that `earlier`
    /// lacks counts from zero.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> BTreeMap<String, i64> {
        self.0
            .iter()
            .map(|(name, value)| {
                let before = earlier.0.get(name).copied().unwrap_or(0);
                (name.clone(), value.wrapping_sub(before).cast_signed())
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_counters() {
        let counters = Counters::parse("pages_to_device 12\nbroken 0\n").unwrap();
        assert_eq!(counters.get("pages_to_device").unwrap(), 12);
        assert_eq!(counters.get("broken").unwrap(), 0);
        assert!(matches!(counters.get("x"), Err(CountersError::Missing(_))));
    }

    #[test]
    fn other_lines_are_refused() {
        for text in ["pages", "pages -1", "pages 1 2", "", "\n"] {
            let parsed = Counters::parse(text);
            assert_eq!(parsed.is_ok(), text.is_empty(), "{text:?}");
        }
    }

    #[test]
    fn a_gauge_may_fall() {
        let before = Counters::parse("free 10\nmoved 5\n").unwrap();
        let after = Counters::parse("free 7\nmoved 9\nnew 3\n").unwrap();
        let change = after.since(&before);
        assert_eq!(change["free"], -3);
        assert_eq!(change["moved"], 4);
        assert_eq!(change["new"], 3);
    }

    #[test]
    fn a_missing_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let error = Counters::of_driver(directory.path()).unwrap_err();
        assert!(error.to_string().ends_with("counters"), "{error}");
    }
}
