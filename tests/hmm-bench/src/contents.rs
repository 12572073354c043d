//! What the pages hold: a third of words that all differ, and one word over and over, so that they
//! can be compressed as most memory can, to about a third, and in the least time.

use std::sync::atomic::{AtomicU64, Ordering};

use hmm_stress::pattern::WORDS;
use hmm_stress::region::Region;

/// Words that differ.
const DIFFERENT: usize = WORDS / 3;

/// Deals with all words of `page`, each beside what it should hold, as long as that succeeds.
fn all_words(
    region: &Region,
    page: usize,
    generation: u64,
    deal: impl Fn(&AtomicU64, u64) -> bool,
) -> bool {
    let (different, repeated) = region.words(page).split_at(DIFFERENT);
    let mut values = region.pattern(page, generation).words();
    let value = values.next().unwrap_or_default();
    let mut different = different.iter().zip(values);
    different.all(|(word, value)| deal(word, value))
        && repeated.iter().all(|word| deal(word, value))
}

/// Write all bytes of `page`.
pub fn write(region: &Region, page: usize, generation: u64) {
    all_words(region, page, generation, |word, value| {
        word.store(value, Ordering::Relaxed);
        true
    });
}

/// Whether `page` holds what was written.
#[must_use]
pub fn holds(region: &Region, page: usize, generation: u64) -> bool {
    all_words(region, page, generation, |word, value| {
        word.load(Ordering::Relaxed) == value
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use hmm_stress::region::PageSize;

    #[test]
    fn a_changed_byte_is_noticed() {
        let region = Region::new(2, PageSize::Small, 5).unwrap();
        write(&region, 1, 3);
        assert!(holds(&region, 1, 3));
        assert!(!holds(&region, 1, 4) && !holds(&region, 0, 3));
        region.words(1)[511].fetch_xor(1 << 63, Ordering::Relaxed);
        assert!(!holds(&region, 1, 3));
    }
}
