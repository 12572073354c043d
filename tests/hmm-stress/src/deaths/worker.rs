//! A process that uses its device until that dies.

use std::ops::Range;
use std::thread;
use std::time::Duration;

use virtio_hmm_client::{Direction, Error};

use super::board::{Board, Word};
use crate::context::Context;
use crate::failure::Failure;
use crate::pattern::UNTOUCHED;
use crate::region::{PMD_PAGES, PageSize, Region};
use crate::require;
use crate::shared::own_signals;

/// How often it looks whether it shall finish.
const GLANCE: Duration = Duration::from_millis(2);

/// What is known of a page.
#[derive(Clone, Copy, Debug)]
struct Page {
    generation: u64,
    /// Whether it may be in device memory alone.
    away: bool,
}

struct Worker<'a> {
    context: &'a Context,
    board: &'a Board,
    region: Region,
    pages: Vec<Page>,
    generation: u64,
    dead: bool,
}

/// Write, compare, discard and migrate at random until the device is dead or the board says so;
/// then look at all that is left.
pub(super) fn work(context: &Context, board: &Board, page_size: PageSize) -> Result<(), Failure> {
    let stream = page_size as u64;
    let region = Region::new(context.pages, page_size, context.region_seed(stream))?;
    let fresh = Page {
        generation: UNTOUCHED,
        away: false,
    };
    let mut worker = Worker {
        context,
        board,
        pages: vec![fresh; region.pages()],
        region,
        generation: UNTOUCHED,
        dead: false,
    };
    let mut random = context.random(stream);
    while !worker.dead && !board.is_set(Word::Finish) {
        worker.step(&mut random)?;
    }
    if worker.dead {
        board.add(Word::Dead, 1);
        while !board.is_set(Word::Finish) {
            thread::sleep(GLANCE);
        }
    }
    let all = 0..worker.pages.len();
    worker.check(all.clone())?;
    if worker.dead {
        // Nothing goes there any more, and nothing is lost twice.
        worker.write(all.clone())?;
        let end = worker
            .context
            .migrate(worker.region.all(), Direction::ToDevice);
        require!(is_death(&end), "a dead device took pages: {end:?}");
        let lost = board.get(Word::Lost);
        worker.check(all)?;
        let again = board.get(Word::Lost) - lost;
        require!(again == 0, "{again} pages were lost after the death");
    }
    Ok(())
}

/// Whether a call ended because the device is dead.
fn is_death<T>(result: &Result<T, Failure>) -> bool {
    matches!(result, Err(Failure::Migrate(error))
        if matches!(error.source, Error::Broken | Error::Gone))
}

impl Worker<'_> {
    fn step(&mut self, random: &mut fastrand::Rng) -> Result<(), Failure> {
        let first = random.usize(0..self.pages.len());
        let last = random.usize(first..self.pages.len().min(first + PMD_PAGES));
        let some = first..last + 1;
        match random.u8(0..16) {
            0..6 => self.migrate(some, Direction::ToDevice),
            6..8 => self.migrate(some, Direction::ToSystem),
            8..11 => self.write(some),
            11..15 => self.check(some),
            _ => {
                self.region.discard(some.clone())?;
                self.pages[some].fill(Page {
                    generation: UNTOUCHED,
                    away: false,
                });
                Ok(())
            }
        }
    }

    fn migrate(&mut self, some: Range<usize>, direction: Direction) -> Result<(), Failure> {
        let range = self.region.range(some.clone());
        if direction == Direction::ToDevice {
            self.pages[some]
                .iter_mut()
                .for_each(|page| page.away = true);
        }
        let end = self.context.migrate(range, direction);
        if is_death(&end) {
            self.dead = true;
            return Ok(());
        }
        end.map(drop)
    }

    fn write(&mut self, some: Range<usize>) -> Result<(), Failure> {
        self.generation += 1;
        for page in some {
            let signals = own_signals();
            self.region.fill(page, self.generation);
            if own_signals() > signals {
                self.lost(page)?;
            }
            self.pages[page] = Page {
                generation: self.generation,
                away: false,
            };
        }
        Ok(())
    }

    fn check(&mut self, some: Range<usize>) -> Result<(), Failure> {
        self.board.add(Word::Checked, some.len() as u64);
        for page in some {
            let signals = own_signals();
            let seen = self.region.check(page, self.pages[page].generation);
            if own_signals() > signals && self.region.is_lost(page) {
                self.lost(page)?;
                self.write(page..page + 1)?;
            } else if let Err(mismatch) = seen {
                self.board.add(Word::Wrong, 1);
                return Err(Failure::Mismatch(mismatch));
            }
            self.pages[page].away = false;
        }
        Ok(())
    }

    /// The page was lost, which can only happen to those on the device.
    fn lost(&mut self, page: usize) -> Result<(), Failure> {
        self.dead = true;
        self.board.add(Word::Lost, 1);
        require!(
            self.pages[page].away,
            "page {page} was lost, and was in RAM"
        );
        Ok(())
    }
}
