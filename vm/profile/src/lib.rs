//! Machine profiles, the files of `qemu-configs/`: what they hold, and what of it makes sense.

use serde::Deserialize;
use serde::de::DeserializeOwned;

pub mod units;

use units::Size;

/// Why a profile is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It has an unknown key or a value of the wrong kind.
    #[error("{line}: {message}")]
    Syntax {
        /// Where, counted from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A value cannot work.
    #[error("{0}")]
    Value(String),
}

/// Reads TOML.
///
/// # Errors
/// It does not hold what it should.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, Error> {
    toml::from_str(text).map_err(|error| {
        let before = error
            .span()
            .and_then(|span| text.get(..span.start))
            .unwrap_or_default();
        Error::Syntax {
            line: before.matches('\n').count() + 1,
            message: error.message().to_owned(),
        }
    })
}

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
    /// Whether the guest's RAM is allocated at the start.
    #[serde(default)]
    pub prefault: bool,
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
    /// Checks the values, after the command line has had its say.
    ///
    /// # Errors
    /// A value cannot work.
    pub fn check(&self) -> Result<(), Error> {
        let fail = |text: String| Err(Error::Value(text));
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
