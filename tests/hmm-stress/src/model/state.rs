//! What the memory of a process must be.

use std::fmt;
use std::ops::Range;

use virtio_hmm_client::Residency;

use super::operation::{Operation, PAGES};
use crate::pattern::{Pattern, UNTOUCHED, WORDS, mix};
use crate::region::Access;

/// The word that [`Operation::Poke`] changes.
pub(super) const POKED: usize = WORDS / 2;

/// What a page holds: what was last written to all of it, and to its one word since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Contents {
    /// The page to which it was written; it may have moved since.
    page: u64,
    generation: u64,
    poked: Option<u64>,
}

impl Contents {
    const ZERO: Self = Self {
        page: 0,
        generation: UNTOUCHED,
        poked: None,
    };

    /// Every word of the page.
    pub(super) fn words(self) -> impl Iterator<Item = u64> {
        let pattern = Pattern::new(0, self.page, self.generation);
        pattern.words().enumerate().map(move |(index, word)| {
            let poked = self.poked.filter(|_| index == POKED);
            poked.map_or(word, poke)
        })
    }
}

impl fmt::Display for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.generation {
            UNTOUCHED => write!(f, "zeroes")?,
            generation => write!(f, "generation {generation} of page {}", self.page)?,
        }
        let poked = self.poked;
        poked.map_or(Ok(()), |poked| write!(f, " with {poked} in one word"))
    }
}

/// The word that a poke of this generation writes.
pub(super) fn poke(generation: u64) -> u64 {
    mix(!generation)
}

/// A mapped page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Page {
    pub(super) contents: Contents,
    access: Access,
    /// Nothing can have put memory there since it was mapped or discarded.
    fresh: bool,
}

impl Page {
    const FRESH: Self = Self {
        contents: Contents::ZERO,
        access: Access::Write,
        fresh: true,
    };
}

/// The memory of one process.
#[derive(Clone, Debug)]
pub(super) struct State {
    pages: Vec<Option<Page>>,
    /// Huge pages may be anywhere, and with them memory that nothing asked for.
    huge: bool,
}

impl State {
    pub(super) fn new() -> Self {
        Self {
            pages: vec![Some(Page::FRESH); PAGES],
            huge: false,
        }
    }

    pub(super) fn page(&self, page: usize) -> Option<Page> {
        self.pages[page]
    }

    /// Those of `pages` that may be read, or written.
    pub(super) fn accessible(&self, pages: Range<usize>, write: bool) -> Vec<usize> {
        pages
            .filter(|&page| match self.pages[page] {
                Some(Page { access, .. }) if write => access == Access::Write,
                Some(Page { access, .. }) => access != Access::None,
                None => false,
            })
            .collect()
    }

    /// The parts of `pages` that are mapped, or those that are not.
    pub(super) fn runs(&self, pages: Range<usize>, mapped: bool) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for page in pages.filter(|&page| self.pages[page].is_some() == mapped) {
            match runs.last_mut() {
                Some(run) if run.end == page => run.end += 1,
                _ => runs.push(page..page + 1),
            }
        }
        runs
    }

    /// Whether `page` may be at `residency`.
    pub(super) fn may_be(&self, page: usize, residency: Residency) -> bool {
        match (self.pages[page], residency) {
            (_, Residency::OtherDevice) => false,
            (None, residency) => residency == Residency::None,
            (Some(page), Residency::None | Residency::Zero) if page.contents != Contents::ZERO => {
                false
            }
            (Some(page), residency) if page.fresh && !self.huge => residency == Residency::None,
            _ => true,
        }
    }

    /// The most of `pages` that a migration to the device may fill with zeroes.
    pub(super) fn fillable(&self, pages: Range<usize>) -> u64 {
        let zero = |page: &&Option<Page>| page.is_some_and(|p| p.contents == Contents::ZERO);
        self.pages[pages].iter().filter(zero).count() as u64
    }

    /// Do what `operation` does to memory.
    pub(super) fn apply(&mut self, operation: Operation, pages: Range<usize>) {
        match operation {
            Operation::Read => self.change(self.accessible(pages, false), |_, page| {
                page.fresh = false;
            }),
            Operation::Write(generation) => {
                self.change(self.accessible(pages, true), |number, page| {
                    page.fresh = false;
                    page.contents = Contents {
                        page: number as u64,
                        generation,
                        poked: None,
                    };
                });
            }
            Operation::Poke(generation) => self.change(self.accessible(pages, true), |_, page| {
                page.fresh = false;
                page.contents.poked = Some(generation);
            }),
            Operation::ToDevice => self.change(pages, |_, page| page.fresh = false),
            Operation::Protect(access) => self.change(pages, |_, page| page.access = access),
            Operation::Unmap => self.pages[pages].fill(None),
            Operation::Map => {
                for page in &mut self.pages[pages] {
                    page.get_or_insert(Page::FRESH);
                }
            }
            Operation::Move(to) => {
                for (offset, page) in pages.enumerate() {
                    self.pages[to + offset] = self.pages[page].take();
                }
            }
            Operation::Discard => self.change(pages, |_, page| {
                page.contents = Contents::ZERO;
                page.fresh = true;
            }),
            Operation::Huge | Operation::Collapse => self.huge = true,
            Operation::ToRam
            | Operation::Release
            | Operation::ReleaseAll
            | Operation::Limit(_)
            | Operation::Query
            | Operation::SwapOut
            | Operation::Small
            | Operation::Fork(_)
            | Operation::Exit => {}
        }
    }

    fn change(&mut self, pages: impl IntoIterator<Item = usize>, f: impl Fn(usize, &mut Page)) {
        for number in pages {
            if let Some(page) = &mut self.pages[number] {
                f(number, page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::operation::read_script;

    fn after(script: &str) -> State {
        let mut state = State::new();
        for step in read_script(script).unwrap() {
            state.apply(step.operation, step.pages);
        }
        state
    }

    fn first(state: &State, page: usize) -> u64 {
        state.page(page).unwrap().contents.words().next().unwrap()
    }

    #[test]
    fn contents_move_with_their_pages() {
        let written = first(&after("0 write 0..4 1"), 2);
        let state = after("0 write 0..4 1\n0 unmap 1..2\n0 move 0..4 8");
        assert_eq!(first(&state, 10), written);
        assert_eq!(state.runs(0..16, true), [4..9, 10..16]);
    }

    #[test]
    fn a_poke_changes_one_word() {
        let whole = after("0 write 0..1 1");
        let poked = after("0 write 0..1 1\n0 poke 0..1 2");
        let words = |state: &State| state.page(0).unwrap().contents.words();
        let differ = words(&whole).zip(words(&poked)).filter(|(a, b)| a != b);
        assert_eq!(differ.count(), 1);
    }

    #[test]
    fn what_is_not_allowed_does_not_happen() {
        let state = after("0 protect 0..1 read\n0 protect 1..2 none\n0 write 0..3 1");
        assert_eq!((first(&state, 0), first(&state, 1)), (0, 0));
        assert_ne!(first(&state, 2), 0);
        assert_eq!(state.accessible(0..3, false), [0, 2]);
    }

    #[test]
    fn discarded_and_new_pages_are_zero_and_nowhere() {
        let state = after("0 write 0..3 1\n0 discard 0..1\n0 unmap 1..2\n0 map 0..3");
        for (page, nowhere) in [true, true, false].into_iter().enumerate() {
            assert_eq!(first(&state, page) == 0, nowhere);
            assert_eq!(state.may_be(page, Residency::None), nowhere);
            assert_eq!(state.may_be(page, Residency::Device), !nowhere);
        }
        assert_eq!(state.fillable(0..3), 2);
    }
}
