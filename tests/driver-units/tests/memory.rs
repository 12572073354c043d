//! Whatever is allocated and freed, and in which order, the driver's frames are those of a model.
#![allow(clippy::indexing_slicing)]

use std::mem::{self, ManuallyDrop};

use driver_units::memory::{Allocation, BLOCK_FRAMES, Context, Folio, Memory};
use proptest::{collection::vec, prelude::*, sample::Index, test_runner::TestCaseResult};

const CONTEXTS: usize = 3;

#[derive(Clone, Debug)]
enum Step {
    Begin(Index),
    End(Index),
    Reserve(Index, u32),
    Frames(Index, u32),
    Large(Index),
    /// Frees so many folios, from one on in the order in which they were given out.
    Free(Index, u32),
    FreeAll,
    Limit(Index, usize),
    Close,
    Open,
    /// The contents of the memory are gone.
    Lost,
}

fn step() -> impl Strategy<Value = Step> {
    let any = any::<Index>;
    prop_oneof![
        3 => any().prop_map(Step::Begin),
        1 => any().prop_map(Step::End),
        2 => (any(), nr()).prop_map(|(at, nr)| Step::Reserve(at, nr)),
        6 => (any(), nr()).prop_map(|(at, nr)| Step::Frames(at, nr)),
        4 => any().prop_map(Step::Large),
        6 => (any(), nr()).prop_map(|(at, nr)| Step::Free(at, nr)),
        1 => Just(Step::FreeAll),
        1 => (any(), limit()).prop_map(|(at, limit)| Step::Limit(at, limit)),
        1 => Just(Step::Close),
        2 => Just(Step::Open),
        1 => Just(Step::Lost),
    ]
}

fn limit() -> impl Strategy<Value = usize> {
    prop_oneof![Just(usize::MAX), nr().prop_map(|nr| nr as usize - 1)]
}

/// Few frames, about a block, and many.
fn nr() -> impl Strategy<Value = u32> {
    prop_oneof![1..8_u32, 511..=513_u32, 1..=1100_u32]
}

/// An open file, and what the model knows of it.
struct File<'m> {
    context: Context<'m>,
    limit: usize,
    frames: usize,
}

/// An allocation that was begun.
struct Begun<'m> {
    allocation: Allocation<'m>,
    file: usize,
    reserved: usize,
}

/// What is in use.
struct InUse<'m> {
    folio: Folio<'m>,
    frames: usize,
    file: usize,
}

struct Model<'m> {
    memory: &'m Memory,
    files: Vec<File<'m>>,
    begun: Vec<Begun<'m>>,
    folios: Vec<InUse<'m>>,
    /// By block.
    used: Vec<[bool; BLOCK_FRAMES]>,
    nr_used: Vec<usize>,
    closed: bool,
    pins_module: bool,
}

impl<'m> Model<'m> {
    fn new(memory: &'m Memory, blocks: usize, limits: [usize; CONTEXTS]) -> Self {
        let file = |limit| File {
            context: memory.context(limit),
            limit,
            frames: 0,
        };
        Self {
            memory,
            files: limits.map(file).into(),
            begun: Vec::new(),
            folios: Vec::new(),
            used: vec![[false; BLOCK_FRAMES]; blocks],
            nr_used: vec![0; blocks],
            closed: false,
            pins_module: false,
        }
    }

    fn is_partial(&self, block: usize) -> bool {
        (1..BLOCK_FRAMES).contains(&self.nr_used[block])
    }

    fn is_whole(&self, block: usize) -> bool {
        self.nr_used[block] == 0
    }

    fn any_block(&self, is: fn(&Self, usize) -> bool) -> bool {
        (0..self.used.len()).any(|block| is(self, block))
    }

    fn in_use(&self) -> usize {
        self.nr_used.iter().sum()
    }

    fn free(&self) -> usize {
        self.used.len() * BLOCK_FRAMES - self.in_use()
    }

    fn reserved(&self) -> usize {
        self.begun.iter().map(|it| it.reserved).sum()
    }

    /// How many frames an allocation can have: its own reserve, and of the rest what nobody was
    /// promised and its limit allows.
    fn left(&self, at: usize) -> usize {
        let own = &self.begun[at];
        let file = &self.files[own.file];
        let same = self.begun.iter().filter(|it| it.file == own.file);
        let has = file.frames + same.map(|it| it.reserved).sum::<usize>();
        let unpromised = self.free() - self.reserved();
        own.reserved + unpromised.min(file.limit.saturating_sub(has))
    }

    /// One frame or a block was given out.
    fn take(&mut self, folio: Folio<'m>, frames: usize, at: usize) -> TestCaseResult {
        let first = folio.frame();
        let (block, offset) = (first / BLOCK_FRAMES, first % BLOCK_FRAMES);
        let partial = self.any_block(Self::is_partial);
        let file = self.begun[at].file;
        self.folios.push(InUse {
            folio,
            frames,
            file,
        });
        prop_assert!(block < self.used.len(), "frame {first} is outside");
        prop_assert!(
            frames == 1 && (!self.is_whole(block) || !partial) || frames == BLOCK_FRAMES,
            "frame {first} breaks a whole block"
        );
        prop_assert!(offset + frames <= BLOCK_FRAMES);
        let used = &mut self.used[block][offset..offset + frames];
        prop_assert!(!used.contains(&true), "frame {first} was in use");
        used.fill(true);
        self.nr_used[block] += frames;
        let own = &mut self.begun[at];
        own.reserved = own.reserved.saturating_sub(frames);
        self.files[file].frames += frames;
        let folio = self.folios.last().map(|it| &it.folio);
        prop_assert!(folio.is_some_and(|it| it.is_new(frames)), "page of {first}");
        Ok(())
    }

    fn frames(&mut self, at: usize, nr: u32) -> TestCaseResult {
        let left = if self.closed { 0 } else { self.left(at) };
        let mut folios = self.begun[at].allocation.frames(nr).into_iter();
        let found = folios.len();
        let taken = folios.try_for_each(|folio| self.take(folio, 1, at));
        // Of those after a wrong one, none is freed.
        mem::forget(folios);
        taken?;
        prop_assert_eq!(found, left.min(nr as usize));
        Ok(())
    }

    fn large(&mut self, at: usize) -> TestCaseResult {
        let expected =
            !self.closed && self.any_block(Self::is_whole) && self.left(at) >= BLOCK_FRAMES;
        let folio = self.begun[at].allocation.large();
        prop_assert_eq!(folio.is_some(), expected);
        folio.map_or(Ok(()), |folio| self.take(folio, BLOCK_FRAMES, at))
    }

    fn free_from(&mut self, from: usize, nr: usize) {
        let end = self.folios.len().min(from + nr);
        for it in self.folios.drain(from..end) {
            let first = it.folio.frame();
            let (block, offset) = (first / BLOCK_FRAMES, first % BLOCK_FRAMES);
            self.used[block][offset..offset + it.frames].fill(false);
            self.nr_used[block] -= it.frames;
            self.files[it.file].frames -= it.frames;
        }
        self.pins_module &= self.in_use() > 0;
    }

    fn step(&mut self, step: &Step) -> TestCaseResult {
        let begun = |at: &Index| (!self.begun.is_empty()).then(|| at.index(self.begun.len()));
        match step {
            Step::Begin(at) => {
                let file = at.index(CONTEXTS);
                self.begun.push(Begun {
                    allocation: self.files[file].context.begin(),
                    file,
                    reserved: 0,
                });
            }
            Step::End(at) => drop(begun(at).map(|at| self.begun.swap_remove(at))),
            Step::Reserve(at, nr) => {
                if let Some(at) = begun(at) {
                    let nr = *nr as usize;
                    let more = nr.min(self.left(at));
                    let own = &mut self.begun[at];
                    own.reserved = own.reserved.max(more);
                    let enough = own.reserved >= nr;
                    prop_assert_eq!(own.allocation.reserve(nr), enough);
                }
            }
            Step::Frames(at, nr) => begun(at).map_or(Ok(()), |at| self.frames(at, *nr))?,
            Step::Large(at) => begun(at).map_or(Ok(()), |at| self.large(at))?,
            Step::Free(at, nr) if !self.folios.is_empty() => {
                self.free_from(at.index(self.folios.len()), *nr as usize);
            }
            Step::Free(..) => {}
            Step::FreeAll => self.free_from(0, self.folios.len()),
            Step::Limit(at, limit) => {
                let file = &mut self.files[at.index(CONTEXTS)];
                file.context.limit(*limit);
                file.limit = *limit;
            }
            Step::Close => {
                self.memory.close();
                self.closed = true;
            }
            Step::Open => {
                self.memory.open();
                self.closed = false;
            }
            Step::Lost => {
                self.memory.lost();
                self.closed = true;
                self.pins_module |= self.in_use() > 0;
            }
        }
        self.compare()
    }

    /// What the driver notes is what the model has.
    fn compare(&self) -> TestCaseResult {
        prop_assert_eq!(self.memory.used(), self.in_use());
        prop_assert_eq!(Memory::pins_module(), self.pins_module);
        prop_assert_eq!(self.memory.reserved(), self.reserved());
        prop_assert!(self.reserved() <= self.free(), "promised what is not there");
        for (block, used) in self.used.iter().enumerate() {
            let is = self.memory.block(block);
            prop_assert_eq!(is.in_use as usize, self.nr_used[block]);
            prop_assert_eq!(is.whole, self.is_whole(block));
            prop_assert_eq!(is.partial, self.is_partial(block));
            prop_assert!(is.used == *used, "the bitmap of block {block}");
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn frames_are_those_of_a_model(
        blocks in 1..=4_usize,
        limits in [limit(), limit(), limit()],
        steps in vec(step(), 1..80),
        lost in any::<bool>(),
    ) {
        // What is left when a step fails is not freed: the driver may be in no state to do so.
        let memory = ManuallyDrop::new(Memory::new(blocks));
        let mut model = ManuallyDrop::new(Model::new(&memory, blocks, limits));
        for step in &steps {
            model.step(step)?;
        }
        if lost {
            memory.lost();
            memory.exit();
        }
        drop(ManuallyDrop::into_inner(model));
        drop(ManuallyDrop::into_inner(memory));
        prop_assert!(Memory::all_returned());
    }
}
