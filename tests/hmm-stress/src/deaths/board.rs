//! What a worker tells the one that started it, while it works.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::failure::Failure;
use crate::region::Region;

/// A page that both can write, of one word for each thing to tell.
#[derive(Debug)]
pub(super) struct Board(Region);

/// What there is to tell.
#[derive(Clone, Copy, Debug)]
pub(super) enum Word {
    /// The worker has seen that its device is dead.
    Dead,
    /// The worker has come to its end, well or not.
    Ended,
    /// The worker shall look at all its pages and end.
    Finish,
    /// Pages that it has compared.
    Checked,
    /// Pages that it found lost, by SIGBUS.
    Lost,
    /// Pages that did not hold what they should.
    Wrong,
}

impl Board {
    pub(super) fn new() -> Result<Self, Failure> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        Region::of_kind(1, flags, None, 0).map(Self)
    }

    fn word(&self, word: Word) -> &AtomicU64 {
        &self.0.words(0)[word as usize]
    }

    pub(super) fn add(&self, word: Word, number: u64) {
        self.word(word).fetch_add(number, Ordering::Release);
    }

    pub(super) fn get(&self, word: Word) -> u64 {
        self.word(word).load(Ordering::Acquire)
    }

    pub(super) fn is_set(&self, word: Word) -> bool {
        self.get(word) > 0
    }
}
