//! What the pages hold: every word four times, so that they can be compressed as most memory
//! can, to about a third.

use std::sync::atomic::Ordering;

use hmm_stress::region::Region;

/// How often a word is repeated.
const TIMES: usize = 4;

/// Write all bytes of `page`.
pub fn write(region: &Region, page: usize, generation: u64) {
    let words = region.words(page).chunks_exact(TIMES);
    for (words, value) in words.zip(region.pattern(page, generation).words()) {
        for word in words {
            word.store(value, Ordering::Relaxed);
        }
    }
}

/// Whether `page` holds what was written.
#[must_use]
pub fn holds(region: &Region, page: usize, generation: u64) -> bool {
    let words = region.words(page).chunks_exact(TIMES);
    words
        .zip(region.pattern(page, generation).words())
        .all(|(words, value)| {
            words
                .iter()
                .all(|word| word.load(Ordering::Relaxed) == value)
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
