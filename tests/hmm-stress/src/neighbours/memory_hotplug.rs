//! A block of memory goes offline while its pages migrate to the device and back.
//!
//! The kernel moves what is in the block elsewhere, one page after another, and goes on
//! until nothing is left; migration to the device only makes it try again.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use super::meanwhile::meanwhile;
use super::numa::prefer;
use crate::context::Context;
use crate::failure::Failure;
use crate::pagemap::entries;
use crate::region::Region;
use crate::require;

const PAGES: usize = 2048;

/// How many regions are filled until one lies in the block.
const REGIONS: u64 = 40;

const MEMORY: &str = "/sys/devices/system/memory";

/// A block of memory from which everything can be moved away.
struct Block {
    path: PathBuf,
    number: u64,
    /// Page frames in a block.
    frames: u64,
    node: usize,
}

/// Puts the block back, into the zone that it was in.
struct Offline<'a>(&'a Block);

impl Drop for Offline<'_> {
    fn drop(&mut self) {
        // The test sees by the state whether it worked.
        let _ = fs::write(self.0.path.join("state"), "online_movable");
    }
}

impl Block {
    /// One that does go offline.
    fn find() -> Result<Self, Failure> {
        let hexadecimal = |text: String| u64::from_str_radix(text.trim(), 16).ok();
        let size = fs::read_to_string(Path::new(MEMORY).join("block_size_bytes"));
        let Some(size) = size.ok().and_then(hexadecimal) else {
            return Err(Failure::Skip("the kernel has no memory hot-plug".into()));
        };
        let mut refused = Vec::new();
        for entry in fs::read_dir(MEMORY).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            let number = name.strip_prefix("memory").map(str::parse);
            let (Some(Ok(number)), true) = (number, only_movable(&path)) else {
                continue;
            };
            let block = Self {
                node: node(&path),
                path,
                number,
                frames: size / PAGE_SIZE as u64,
            };
            match block.offline().map(drop) {
                Ok(()) => return Ok(block),
                // Its firmware or the boot left something in it that has to stay.
                Err(error) => refused.push(format!("{name}: {error}")),
            }
        }
        Err(Failure::Skip(if refused.is_empty() {
            "the machine has no block of memory only for what can move".into()
        } else {
            format!("no block of memory goes offline: {}", refused.join(", "))
        }))
    }

    fn offline(&self) -> io::Result<Offline<'_>> {
        fs::write(self.path.join("state"), "offline")?;
        Ok(Offline(self))
    }

    /// How many pages of the region it has.
    fn pages(&self, region: &Region) -> Result<usize, Failure> {
        let entries = entries(region.all())?;
        let here = |frame| frame / self.frames == self.number;
        let entries = entries.into_iter();
        Ok(entries
            .filter(|entry| entry.present() && here(entry.frame()))
            .count())
    }

    fn require_state(&self, expected: &str) -> Result<(), Failure> {
        let seen = fs::read_to_string(self.path.join("state")).unwrap_or_default();
        require!(
            seen.trim() == expected,
            "memory{} is {seen:?} instead of {expected}",
            self.number
        );
        Ok(())
    }
}

fn only_movable(block: &Path) -> bool {
    fs::read_to_string(block.join("valid_zones")).is_ok_and(|zones| zones.trim() == "Movable")
}

/// The node of a block, which has a link to it.
fn node(block: &Path) -> usize {
    let entries = fs::read_dir(block).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            name.strip_prefix("node")?.parse().ok()
        })
        .next()
        .unwrap_or(0)
}

/// A region, come home from the device, most of whose pages are in the block.
fn place(context: &Context, block: &Block) -> Result<Region, Failure> {
    let mut elsewhere = Vec::new();
    for number in 0..REGIONS {
        let region = context.region(PAGES, number)?;
        prefer(region.all(), block.node)?;
        region.fill_all(1);
        context.settle(region.all(), Direction::ToDevice, 0)?;
        context.settle(region.all(), Direction::ToSystem, 0)?;
        if block.pages(&region)? > PAGES / 2 {
            return Ok(region);
        }
        elsewhere.push(region);
    }
    Err(Failure::Skip(format!(
        "the kernel gives no pages of memory{}",
        block.number
    )))
}

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let block = Block::find()?;
    let region = place(context, &block)?;
    let both = [Direction::ToDevice, Direction::ToSystem];
    let offline = meanwhile(context, &[&region], &both, || {
        block.offline().map_err(|source| Failure::System {
            call: "taking memory offline",
            source,
        })
    })?;
    block.require_state("offline")?;
    for _ in 0..3 {
        context.settle(region.all(), Direction::ToSystem, 0)?;
        let left = block.pages(&region)?;
        require!(left == 0, "{left} pages are in memory that is offline");
        context.check(&region, 0..PAGES, |_| 1)?;
        context.settle(region.all(), Direction::ToDevice, 0)?;
        context.expect(&region, 0..PAGES, |_| Residency::Device)?;
    }
    drop(offline);
    block.require_state("online")?;
    context.check(&region, 0..PAGES, |_| 1)
}
