//! What is measured.

use std::fmt;

use serde::{Deserialize, Serialize};
use virtio_hmm_client::PAGE_SIZE;

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// Sizes of the memory that is worked on.
const SIZES: [usize; 4] = [64 << 10, 2 << 20, 64 << 20, 256 << 20];

/// Threads that share the work.
const THREADS: [usize; 2] = [1, 4];

/// Memory in which isolated faults are.
const ISOLATED: usize = 64 << 20;

/// What memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pages {
    /// Pages of 4 KiB.
    Small,
    /// Huge pages of 2 MiB.
    Huge,
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Small => "4k",
            Self::Huge => "thp",
        })
    }
}

/// The memory of some works, and how many threads share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Memory {
    /// Its size.
    pub bytes: usize,
    /// What it is made of.
    pub pages: Pages,
    /// Threads; each has a part of its own.
    pub threads: usize,
}

impl Memory {
    /// Pages of 4 KiB in it.
    #[must_use]
    pub fn page_count(&self) -> usize {
        self.bytes / PAGE_SIZE
    }

    /// Why there is no such memory, if there is not.
    #[must_use]
    pub fn impossible(&self) -> Option<&'static str> {
        if self.pages == Pages::Small {
            return None;
        }
        if self.bytes < HUGE {
            Some("smaller than a huge page")
        } else if !self.bytes.is_multiple_of(HUGE * self.threads) {
            Some("one huge page for several threads")
        } else {
            None
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, unit) = match self.bytes >> 20 {
            0 => (self.bytes >> 10, "K"),
            mib => (mib, "M"),
        };
        write!(f, "{number}{unit}-{}-{}t", self.pages, self.threads)
    }
}

/// What is done with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// All of it goes out: to the device, or to swap.
    ToDevice,
    /// The same, without the time in which `test_hmm` copies all of it to its caller besides.
    ToDeviceNet,
    /// All of it comes back by request.
    Back,
    /// Pages come back because they are read, one after the other.
    SequentialFaults,
    /// Pages come back because they are read, in random order all over the memory.
    RandomFaults,
    /// One page comes back because it is read, far from others.
    IsolatedFault,
    /// The same after a pause.
    IdleFault,
}

impl Step {
    /// All of them, in their order.
    pub const ALL: [Self; 7] = [
        Self::ToDevice,
        Self::ToDeviceNet,
        Self::Back,
        Self::SequentialFaults,
        Self::RandomFaults,
        Self::IsolatedFault,
        Self::IdleFault,
    ];

    /// Whether it is about bytes a second, and not about the time for a page.
    #[must_use]
    pub fn is_transfer(self) -> bool {
        matches!(self, Self::ToDevice | Self::ToDeviceNet | Self::Back)
    }

    /// Whether it is about single pages that are far from one another.
    #[must_use]
    pub fn is_isolated(self) -> bool {
        matches!(self, Self::IsolatedFault | Self::IdleFault)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ToDevice => "to-device",
            Self::ToDeviceNet => "to-device-net",
            Self::Back => "back",
            Self::SequentialFaults => "sequential-faults",
            Self::RandomFaults => "random-faults",
            Self::IsolatedFault => "isolated-fault",
            Self::IdleFault => "idle-fault",
        })
    }
}

/// A step with some memory. Its name is like `64M-4k-1t-to-device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Work {
    /// The memory.
    #[serde(flatten)]
    pub memory: Memory,
    /// The step.
    pub step: Step,
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.memory, self.step)
    }
}

/// All works, in the order in which they are shown.
pub fn all() -> impl Iterator<Item = Work> {
    let memories = THREADS.into_iter().flat_map(|threads| {
        [Pages::Small, Pages::Huge]
            .into_iter()
            .flat_map(move |pages| {
                SIZES.into_iter().map(move |bytes| Memory {
                    bytes,
                    pages,
                    threads,
                })
            })
    });
    memories.flat_map(|memory| {
        Step::ALL
            .into_iter()
            .filter(move |&step| {
                !step.is_isolated() || (memory.bytes == ISOLATED && memory.threads == 1)
            })
            .map(move |step| Work { memory, step })
    })
}

/// The works whose name has one of the patterns in it; all if there is no pattern.
///
/// # Errors
/// No work's name has this pattern in it.
pub fn matching(patterns: &[String]) -> Result<Vec<Work>, String> {
    for pattern in patterns {
        if !all().any(|work| work.to_string().contains(pattern)) {
            return Err(format!(
                "no work's name has {pattern:?} in it; they are like 64M-4k-1t-to-device"
            ));
        }
    }
    let wanted = |work: &Work| {
        let name = work.to_string();
        patterns.is_empty() || patterns.iter().any(|pattern| name.contains(pattern))
    };
    Ok(all().filter(wanted).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn works_are_chosen_by_their_names() {
        let works = |patterns: &[&str]| {
            let patterns: Vec<_> = patterns.iter().map(ToString::to_string).collect();
            matching(&patterns)
        };
        assert_eq!(works(&[]).unwrap().len(), all().count());
        assert_eq!(works(&["64M-4k-1t-isolated"]).unwrap().len(), 1);
        let two = works(&["256M-thp-4t-back", "2M-4k-1t-random"]).unwrap();
        assert_eq!(two.len(), 2);
        assert!(works(&["back", "nonesuch"]).is_err());
    }

    #[test]
    fn huge_pages_are_not_divided() {
        let memory = |bytes, threads| Memory {
            bytes,
            pages: Pages::Huge,
            threads,
        };
        assert!(memory(64 << 10, 1).impossible().is_some());
        assert!(memory(2 << 20, 4).impossible().is_some());
        assert!(memory(2 << 20, 1).impossible().is_none());
        assert!(memory(64 << 20, 4).impossible().is_none());
    }
}
