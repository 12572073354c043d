//! Machine profiles: `qemu-configs/NAME.toml`, or a file of the user's.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, FileContext, Result};
use crate::paths;
use crate::units::Size;

/// A machine, as its file describes it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// QEMU's machine type.
    pub machine: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest RAM.
    pub memory: Size,
    /// NUMA nodes, each with its share of CPUs and memory.
    #[serde(default = "one")]
    pub nodes: u32,
    /// CPU model by accelerator.
    pub cpu: Cpu,
    /// QEMU's IOMMU and its properties.
    #[serde(default)]
    pub iommu: Option<String>,
    /// The device.
    pub device: Device,
    /// Size of a virtio disk in the host's RAM, empty when the machine starts; none if not given.
    #[serde(default)]
    pub disk: Option<Size>,
    /// The driver.
    pub driver: Driver,
    /// The guest's kernel.
    pub kernel: Kernel,
}

/// `-cpu` by accelerator.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// For TCG.
    pub tcg: String,
    /// For KVM.
    pub kvm: String,
}

/// The device and its daemon.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// How many devices there are, each with a daemon of its own.
    #[serde(default = "one")]
    pub count: u32,
    /// Memory of a device.
    pub memory: Size,
    /// Whether the memory is allocated at the start.
    #[serde(default)]
    pub prefault: bool,
    /// Whether the memory is of the host's huge pages.
    #[serde(default)]
    pub huge_pages: bool,
    /// Copy queues, 1 to 16.
    pub copy_queues: u32,
    /// Descriptors in each queue.
    pub queue_size: u32,
    /// Bytes a second that copies take each way; as fast as the host if not given.
    #[serde(default)]
    pub bandwidth: Option<Size>,
    /// Time that each copy takes besides, as the daemon takes it.
    #[serde(default)]
    pub latency: Option<String>,
    /// Rules for faults on purpose, as the daemon takes them.
    #[serde(default)]
    pub inject: Vec<String>,
    /// Seed of these faults.
    #[serde(default)]
    pub inject_seed: Option<u64>,
}

/// The driver.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Driver {
    /// Whether it is loaded; the device is free for a user-mode driver otherwise.
    #[serde(default = "yes")]
    pub load: bool,
    /// Module parameters, as `insmod` takes them.
    pub parameters: String,
}

/// The guest's kernel.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Words of the command line.
    pub command_line: Vec<String>,
    /// The kernel's own modules that are loaded first, in this order, where they are not built in.
    #[serde(default)]
    pub modules: Vec<String>,
}

fn one() -> u32 {
    1
}

fn yes() -> bool {
    true
}

/// Smallest guest RAM in which the stock kernel and the initramfs start.
const LEAST_MEMORY: Size = Size(256 * Size::MIB);

impl Profile {
    /// Reads the profile of that name, or the file at that path.
    ///
    /// # Errors
    /// There is no such profile, or it has an unknown key or a wrong value.
    pub fn load(name: &str) -> Result<Self> {
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

    /// Checks the values, after the command line has had its say.
    ///
    /// # Errors
    /// A value cannot work.
    pub fn check(&self) -> Result<()> {
        let fail = |text: String| Err(Error::Config(text));
        if !(1..=64).contains(&self.cpus) {
            return fail(format!("{} CPUs: use 1 to 64", self.cpus));
        }
        if self.memory < LEAST_MEMORY {
            return fail(format!(
                "{} of guest memory is too little: the kernel needs {LEAST_MEMORY}",
                self.memory
            ));
        }
        if !self.memory.0.is_multiple_of(Size::MIB) {
            return fail(format!(
                "guest memory of {} is no whole number of MiB",
                self.memory
            ));
        }
        let nodes = u64::from(self.nodes);
        if nodes == 0
            || !u64::from(self.cpus).is_multiple_of(nodes)
            || !self.memory.0.is_multiple_of(Size::MIB * nodes)
        {
            return fail(format!(
                "{} CPUs and {} of guest memory do not divide into {nodes} NUMA nodes",
                self.cpus, self.memory
            ));
        }
        if !(1..=8).contains(&self.device.count) {
            return fail(format!("{} devices: use 1 to 8", self.device.count));
        }
        if !(1..=16).contains(&self.device.copy_queues) {
            return fail(format!(
                "{} copy queues: use 1 to 16",
                self.device.copy_queues
            ));
        }
        if !self.device.queue_size.is_power_of_two() || self.device.queue_size > 1024 {
            return fail(format!(
                "a queue size of {}: use a power of two up to 1024",
                self.device.queue_size
            ));
        }
        Ok(())
    }
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
    toml::from_str(&text).map_err(|error| {
        let before = error
            .span()
            .and_then(|span| text.get(..span.start))
            .unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        Error::Config(format!("{}:{line}: {}", path.display(), error.message()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile_with(change: impl Fn(String) -> String) -> Result<Profile> {
        let default = paths::checkout().join("qemu-configs/default.toml");
        let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        fs::write(file.path(), change(fs::read_to_string(default).unwrap())).unwrap();
        Profile::load(file.path().to_str().unwrap())
    }

    #[test]
    fn every_profile_of_the_checkout_is_valid() {
        let directory = paths::checkout().join("qemu-configs");
        let names = known_profiles(&directory).unwrap();
        assert!(names.contains("default"), "{names}");
        for name in names.split(", ") {
            Profile::load(name).unwrap().check().unwrap();
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
        let text = Profile::load("nonesuch").unwrap_err().to_string();
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
