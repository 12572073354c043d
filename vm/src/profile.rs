//! The machine profiles that there are: `qemu-configs/NAME.toml`, or a file of the user's.

use std::fs;
use std::path::{Path, PathBuf};

pub use hmm_profile::{Device, Profile};
use serde::de::DeserializeOwned;

use crate::error::{Error, FileContext, Result};
use crate::paths;

/// Reads the profile of that name, or the file at that path.
///
/// # Errors
/// There is no such profile, or it has an unknown key or a wrong value.
pub fn load(name: &str) -> Result<Profile> {
    let directory = paths::checkout().join("qemu-configs");
    let path = if name.contains('/') || name.ends_with(".toml") {
        PathBuf::from(name)
    } else {
        directory.join(format!("{name}.toml"))
    };
    if !path.exists() {
        return Err(Error::UnknownProfile {
            name: name.to_owned(),
            known: known_profiles(&directory)?,
        });
    }
    read_toml(&path)
}

fn known_profiles(directory: &Path) -> Result<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .at("read", directory)?
        .flatten()
        .filter_map(|entry| {
            entry
                .file_name()
                .to_str()?
                .strip_suffix(".toml")
                .map(ToOwned::to_owned)
        })
        .collect();
    names.sort();
    Ok(names.join(", "))
}

/// Reads a TOML file; an error names the file and the line.
///
/// # Errors
/// The file cannot be read, or does not hold what it should.
pub fn read_toml<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).at("read", path)?;
    hmm_profile::parse(&text).map_err(|error| Error::Config(format!("{}:{error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile_with(change: impl Fn(String) -> String) -> Result<Profile> {
        let default = paths::checkout().join("qemu-configs/default.toml");
        let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        fs::write(file.path(), change(fs::read_to_string(default).unwrap())).unwrap();
        load(file.path().to_str().unwrap())
    }

    #[test]
    fn every_profile_of_the_checkout_is_valid() {
        let directory = paths::checkout().join("qemu-configs");
        let names = known_profiles(&directory).unwrap();
        assert!(names.contains("default"), "{names}");
        for name in names.split(", ") {
            load(name).unwrap().check().unwrap();
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_its_file_and_line() {
        let error = profile_with(|text| format!("{text}\n[device2]\nx = 1\n")).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("device2") && text.contains(".toml:"),
            "{text}"
        );
        let error = profile_with(|text| text.replacen("cpus = 2", "cpus = 2\nqpus = 3", 1));
        let text = error.unwrap_err().to_string();
        let line = 1 + text_line("cpus = 2");
        assert!(
            text.contains("qpus") && text.contains(&format!(".toml:{line}:")),
            "{text}"
        );
    }

    fn text_line(needle: &str) -> usize {
        let default = paths::checkout().join("qemu-configs/default.toml");
        let text = fs::read_to_string(default).unwrap();
        1 + text.lines().position(|line| line == needle).unwrap()
    }

    #[test]
    fn an_unknown_profile_lists_the_known_ones() {
        let text = load("nonesuch").unwrap_err().to_string();
        assert!(
            text.contains("nonesuch") && text.contains("default"),
            "{text}"
        );
    }

    #[test]
    fn values_that_cannot_work_are_refused() {
        for (from, to) in [
            ("cpus = 2", "cpus = 0"),
            ("cpus = 2", "cpus = 2\nnodes = 3"),
            ("memory = \"1G\"", "memory = \"1M\""),
            ("copy_queues = 2", "copy_queues = 2\ncount = 9"),
            ("copy_queues = 2", "copy_queues = 17"),
            ("queue_size = 1024", "queue_size = 1000"),
        ] {
            let profile = profile_with(|text| text.replacen(from, to, 1)).unwrap();
            assert!(profile.check().is_err(), "{to}");
        }
    }
}
