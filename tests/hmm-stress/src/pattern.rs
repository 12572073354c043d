//! What a page holds: a function of its region, its place there and its generation.

use std::fmt;

use virtio_hmm_client::PAGE_SIZE;

/// Words of eight bytes in a page.
pub const WORDS: usize = PAGE_SIZE / 8;

/// The generation of a page that was never written: it reads as zero.
pub const UNTOUCHED: u64 = 0;

/// Spread every bit of `value` over all of the result (the finalizer of splitmix64).
#[must_use]
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The contents of one page: words that rise by a step, which is cheap to write and
/// to check where every instruction is emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    first: u64,
    step: u64,
}

impl Pattern {
    /// The contents of page `page` of the region whose seed is `seed`. The page is
    /// known by its place in the region and not by its address, which mremap changes.
    #[must_use]
    pub fn new(seed: u64, page: u64, generation: u64) -> Self {
        if generation == UNTOUCHED {
            return Self { first: 0, step: 0 };
        }
        Self {
            first: mix(mix(seed ^ mix(page)).wrapping_add(generation)),
            step: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// All words of the page.
    pub fn words(self) -> impl Iterator<Item = u64> {
        std::iter::successors(Some(self.first), move |word| {
            Some(word.wrapping_add(self.step))
        })
        .take(WORDS)
    }

    /// All bytes of the page.
    pub fn bytes(self) -> impl Iterator<Item = u8> {
        self.words().flat_map(u64::to_le_bytes)
    }
}

/// A byte that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Seed of the region.
    pub region: u64,
    /// Page in the region.
    pub page: u64,
    /// Address of the page at that moment.
    pub address: usize,
    /// Byte in the page, the first that differs.
    pub offset: usize,
    /// What should be there.
    pub expected: u8,
    /// What is there.
    pub seen: u8,
    /// Generation that the page should hold.
    pub generation: u64,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "mismatch in region {:#x}, page {} (at {:#x}), byte {}: expected {:#04x} of generation \
             {}, saw {:#04x}",
            self.region,
            self.page,
            self.address,
            self.offset,
            self.expected,
            self.generation,
            self.seen
        )
    }
}

/// The first byte in which two words of a page differ: its offset in the word, and
/// its value in either.
#[must_use]
pub fn first_difference(expected: u64, seen: u64) -> Option<(usize, u8, u8)> {
    if expected == seen {
        return None;
    }
    expected
        .to_le_bytes()
        .into_iter()
        .zip(seen.to_le_bytes())
        .enumerate()
        .find(|(_, (expected, seen))| expected != seen)
        .map(|(offset, (expected, seen))| (offset, expected, seen))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_seeds_and_generations_all_differ() {
        let base = Pattern::new(1, 2, 3);
        for other in [
            Pattern::new(2, 2, 3),
            Pattern::new(1, 3, 3),
            Pattern::new(1, 2, 4),
        ] {
            assert!(base.words().zip(other.words()).all(|(a, b)| a != b));
        }
    }

    #[test]
    fn words_of_a_page_differ() {
        let mut words: Vec<u64> = Pattern::new(7, 0, 1).words().collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), WORDS);
    }

    #[test]
    fn an_untouched_page_is_zero() {
        let page = Pattern::new(7, 9, UNTOUCHED);
        assert!(page.words().eq([0; WORDS]));
    }

    #[test]
    fn the_first_byte_that_differs_is_found() {
        assert_eq!(first_difference(5, 5), None);
        assert_eq!(
            first_difference(0x11_0000, 0x22_0000),
            Some((2, 0x11, 0x22))
        );
        assert_eq!(first_difference(0, 1 << 63), Some((7, 0, 0x80)));
    }
}
