//! Who does the work.

mod swap;
mod test_hmm;
mod virtio_hmm;

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;

use hmm_stress::failure::Failure;
use serde::{Deserialize, Serialize};

use crate::work::Memory;

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contender {
    /// This project's device.
    VirtioHmm,
    /// The kernel's module for tests of the same interfaces, which copies with the CPU.
    TestHmm,
    /// Swap to a virtio disk in the host's RAM.
    Swap,
    /// Swap to compressed memory.
    Zram,
}

impl Contender {
    /// All of them, in their order.
    pub const ALL: [Self; 4] = [Self::VirtioHmm, Self::TestHmm, Self::Swap, Self::Zram];
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::VirtioHmm => "virtio-hmm",
            Self::TestHmm => "test_hmm",
            Self::Swap => "swap",
            Self::Zram => "zram",
        })
    }
}

impl FromStr for Contender {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|one| one.to_string() == text);
        found.ok_or_else(|| "the contenders are virtio-hmm, test_hmm, swap and zram".into())
    }
}

/// The devices of the contenders.
#[derive(Clone, Debug)]
pub struct Devices {
    /// `/dev/hmmN`.
    pub virtio_hmm: PathBuf,
    /// `/dev/hmm_dmirrorN`.
    pub test_hmm: PathBuf,
    /// A disk with a swap signature.
    pub swap: PathBuf,
    /// A zram disk with a swap signature.
    pub zram: PathBuf,
}

/// Part of the memory: of one thread, or all of it.
#[derive(Clone, Debug)]
pub struct Part {
    /// Its pages, from the memory's start.
    pub pages: Range<usize>,
    /// Its addresses, in bytes.
    pub addresses: Range<usize>,
}

/// A contender at work. Nothing of it is there before and after.
pub trait Session: Sync {
    /// Sends a part out, as a user would. Pages may stay behind.
    ///
    /// # Errors
    /// A call fails.
    fn out(&self, part: &Part) -> Result<(), Failure>;

    /// After all has gone out, and not timed: forgets copies of it that are still in RAM.
    ///
    /// # Errors
    /// They are not forgotten.
    fn settle(&self, _part: &Part) -> Result<(), Failure> {
        Ok(())
    }

    /// Repeats what [`Session::out`] does besides sending a part out, if it does.
    ///
    /// # Errors
    /// A call fails.
    fn besides(&self, _part: &Part) -> Result<(), Failure> {
        Ok(())
    }

    /// Fetches a part back, as a user would. Pages may stay behind.
    ///
    /// # Errors
    /// A call fails.
    fn back(&self, part: &Part) -> Result<(), Failure>;
}

/// Starts one, for works with this memory.
///
/// # Errors
/// [`Failure::Skip`] where there is none.
pub fn start(
    contender: Contender,
    devices: &Devices,
    memory: Memory,
) -> Result<Box<dyn Session>, Failure> {
    Ok(match contender {
        Contender::VirtioHmm => Box::new(virtio_hmm::Device::open(&devices.virtio_hmm)?),
        Contender::TestHmm => Box::new(test_hmm::Mirror::open(&devices.test_hmm, memory)?),
        Contender::Swap => Box::new(swap::Swap::on(&devices.swap)?),
        Contender::Zram => Box::new(swap::Swap::on(&devices.zram)?),
    })
}
