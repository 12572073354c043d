//! The memory of one process, on which steps are carried out and compared with the model.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency, Skip};

use super::operation::{Operation, PAGES};
use super::state::{POKED, State, poke};
use crate::context::Context;
use crate::failure::Failure;
use crate::pattern::{WORDS, first_difference};
use crate::region::Access;
use crate::require;
use crate::shared::counts;

/// Where the memory is in every process: at a multiple of 2 MiB, far from what the kernel
/// places itself, so that nothing gets into its holes.
const BASE: usize = 0x1000_0000_0000;

/// The memory of this process, and what it must be. There is one in a process.
#[derive(Debug)]
pub(super) struct Memory {
    state: State,
}

impl Memory {
    /// Map fresh memory.
    ///
    /// # Errors
    /// The mapping fails.
    pub(super) fn new() -> Result<Self, Failure> {
        map(0..PAGES)?;
        Ok(Self {
            state: State::new(),
        })
    }

    /// Carry out `operation`, and compare what it shows with the model. Without a device
    /// nothing migrates.
    ///
    /// # Errors
    /// A call fails, or memory is not what it must be.
    pub(super) fn perform(
        &mut self,
        context: Option<&Context>,
        operation: Operation,
        pages: Range<usize>,
    ) -> Result<(), Failure> {
        match operation {
            Operation::Write(_) | Operation::Poke(_) => {
                let written = self.state.accessible(pages.clone(), true);
                self.state.apply(operation, pages);
                for &page in &written {
                    self.write(page, operation);
                }
                return self.compare(&written);
            }
            Operation::Read => self.compare(&self.state.accessible(pages.clone(), false))?,
            Operation::ToDevice => self.migrate(context, pages.clone(), Direction::ToDevice)?,
            Operation::ToRam => self.migrate(context, pages.clone(), Direction::ToSystem)?,
            Operation::Release => release(context, &pages)?,
            Operation::ReleaseAll => release_all(context)?,
            Operation::Limit(pages) => limit(context, pages)?,
            Operation::Query => self.query(context, pages.clone())?,
            Operation::Protect(access) => {
                let protection = match access {
                    Access::None => libc::PROT_NONE,
                    Access::Read => libc::PROT_READ,
                    Access::Write => libc::PROT_READ | libc::PROT_WRITE,
                };
                self.each_mapped(pages.clone(), |start, length| {
                    // SAFETY: the range is mapped memory of the model, which only this type
                    // accesses, and only where the model allows it.
                    let result = unsafe { libc::mprotect(start, length, protection) };
                    done("mprotect", result)
                })?;
            }
            Operation::Unmap => unmap(pages.clone())?,
            Operation::Map => {
                for run in self.state.runs(pages.clone(), false) {
                    map(run)?;
                }
            }
            Operation::Move(to) => {
                unmap(to..to + pages.len())?;
                for run in self.state.runs(pages.clone(), true) {
                    let to = to + run.start - pages.start;
                    relocate(run, to)?;
                }
            }
            Operation::Discard => self.advise(pages.clone(), libc::MADV_DONTNEED)?,
            // Advice that the kernel is free not to take, and may not know.
            Operation::SwapOut => _ = self.advise(pages.clone(), libc::MADV_PAGEOUT),
            Operation::Huge => _ = self.advise(pages.clone(), libc::MADV_HUGEPAGE),
            Operation::Small => _ = self.advise(pages.clone(), libc::MADV_NOHUGEPAGE),
            Operation::Collapse => _ = self.advise(pages.clone(), libc::MADV_COLLAPSE),
            Operation::Fork(_) | Operation::Exit => {}
        }
        self.state.apply(operation, pages);
        Ok(())
    }

    fn write(&self, page: usize, operation: Operation) {
        match operation {
            Operation::Poke(generation) => {
                words(page)[POKED].store(poke(generation), Ordering::Relaxed);
            }
            _ => {
                if let Some(model) = self.state.page(page) {
                    for (word, value) in words(page).iter().zip(model.contents.words()) {
                        word.store(value, Ordering::Relaxed);
                    }
                }
            }
        }
    }

    /// Compare every byte of `pages`, which may be read.
    fn compare(&self, pages: &[usize]) -> Result<(), Failure> {
        counts()
            .operations
            .fetch_add(pages.len() as u64, Ordering::Relaxed);
        for &page in pages {
            let Some(model) = self.state.page(page) else {
                continue;
            };
            for (index, (word, expected)) in
                words(page).iter().zip(model.contents.words()).enumerate()
            {
                let seen = word.load(Ordering::Relaxed);
                if let Some((offset, expected, seen)) = first_difference(expected, seen) {
                    counts().mismatches.fetch_add(1, Ordering::Relaxed);
                    return Err(Failure::Broken(format!(
                        "mismatch in page {page}, byte {}: expected {expected:#04x} of {}, saw \
                         {seen:#04x}",
                        index * 8 + offset,
                        model.contents,
                    )));
                }
            }
        }
        Ok(())
    }

    fn migrate(
        &self,
        context: Option<&Context>,
        pages: Range<usize>,
        direction: Direction,
    ) -> Result<(), Failure> {
        let Some(context) = context else {
            return Ok(());
        };
        let outcome = context.migrate_mapped(addresses(&pages), direction)?;
        let holes = self.state.runs(pages.clone(), false);
        let unmapped = holes.iter().map(Range::len).sum::<usize>() as u64;
        require!(
            outcome.skipped(Skip::Unmapped) == unmapped,
            "{unmapped} pages are not mapped: {outcome:?}"
        );
        let fillable = match direction {
            Direction::ToDevice => self.state.fillable(pages),
            Direction::ToSystem => 0,
        };
        require!(
            outcome.filled <= fillable,
            "at most {fillable} pages are zero: {outcome:?}"
        );
        Ok(())
    }

    fn query(&self, context: Option<&Context>, pages: Range<usize>) -> Result<(), Failure> {
        let Some(context) = context else {
            return Ok(());
        };
        counts().operations.fetch_add(1, Ordering::Relaxed);
        let seen = context.device.query(addresses(&pages))?;
        for (page, seen) in pages.zip(seen) {
            require!(
                self.state.may_be(page, seen),
                "page {page} is at {seen:?}, where it cannot be: {:?}",
                self.state.page(page)
            );
        }
        Ok(())
    }

    fn advise(&self, pages: Range<usize>, advice: libc::c_int) -> Result<(), Failure> {
        self.each_mapped(pages, |start, length| {
            // SAFETY: the range is mapped memory of the model, whose words are only seen
            // as atomics; the model knows what advice does to contents.
            let result = unsafe { libc::madvise(start, length, advice) };
            done("madvise", result)
        })
    }

    /// Call `f` with start and length in bytes of each run of mapped pages.
    fn each_mapped(
        &self,
        pages: Range<usize>,
        f: impl Fn(*mut libc::c_void, usize) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut runs = self.state.runs(pages, true).into_iter();
        runs.try_for_each(|run| f(pointer(run.start), run.len() * PAGE_SIZE))
    }
}

/// Steps follow each other, so nothing brings pages back meanwhile.
fn release(context: Option<&Context>, pages: &Range<usize>) -> Result<(), Failure> {
    let Some(context) = context else {
        return Ok(());
    };
    counts().operations.fetch_add(1, Ordering::Relaxed);
    context.device.release(addresses(pages))?;
    let seen = context.device.query(addresses(pages))?;
    require!(
        !seen.contains(&Residency::Device),
        "released pages are on the device"
    );
    Ok(())
}

fn release_all(context: Option<&Context>) -> Result<(), Failure> {
    let Some(context) = context else {
        return Ok(());
    };
    counts().operations.fetch_add(1, Ordering::Relaxed);
    context.device.release_all()?;
    let used = context.device.limit()?.used;
    require!(used == 0, "{used} bytes are used after all was released");
    Ok(())
}

fn limit(context: Option<&Context>, pages: u64) -> Result<(), Failure> {
    if let Some(context) = context {
        let bytes = (pages > 0).then_some(pages * PAGE_SIZE as u64);
        context.device.set_limit(bytes)?;
    }
    Ok(())
}

fn done(call: &'static str, result: libc::c_int) -> Result<(), Failure> {
    if result != 0 {
        return Err(Failure::system(call));
    }
    Ok(())
}

fn addresses(pages: &Range<usize>) -> Range<usize> {
    BASE + pages.start * PAGE_SIZE..BASE + pages.end * PAGE_SIZE
}

fn pointer(page: usize) -> *mut libc::c_void {
    (BASE + page * PAGE_SIZE) as *mut libc::c_void
}

/// The words of `page`, which the caller knows to be mapped and readable.
fn words(page: usize) -> &'static [AtomicU64; WORDS] {
    // SAFETY: only pages that the model has as accessible are asked for, and the model
    // has those that the calls above made so. Nobody keeps the reference past that. The
    // page is aligned, every bit pattern is valid, and others change it by atomics or by
    // the kernel's hand only.
    unsafe { &*pointer(page).cast() }
}

/// Map fresh small pages where nothing is mapped.
fn map(pages: Range<usize>) -> Result<(), Failure> {
    let length = pages.len() * PAGE_SIZE;
    // SAFETY: the range belongs to the model, and the kernel refuses to replace anything.
    let memory = unsafe {
        libc::mmap(
            pointer(pages.start),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE
                | libc::MAP_ANONYMOUS
                | libc::MAP_NORESERVE
                | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    if memory == libc::MAP_FAILED {
        return Err(Failure::system("mmap"));
    }
    // SAFETY: the range was mapped just now; this advice changes no contents.
    let result = unsafe { libc::madvise(memory, length, libc::MADV_NOHUGEPAGE) };
    done("madvise", result)
}

fn unmap(pages: Range<usize>) -> Result<(), Failure> {
    // SAFETY: the range belongs to the model, which has it as unmapped from here on.
    let result = unsafe { libc::munmap(pointer(pages.start), pages.len() * PAGE_SIZE) };
    done("munmap", result)
}

/// Move mapped pages to those that start with `to`, where nothing is mapped.
fn relocate(pages: Range<usize>, to: usize) -> Result<(), Failure> {
    match mremap(pages.clone(), to) {
        // Several mappings at once do not move on all kernels; a page is never in two.
        Err(Failure::System { source, .. }) if source.raw_os_error() == Some(libc::EFAULT) => pages
            .clone()
            .try_for_each(|page| mremap(page..page + 1, to + page - pages.start)),
        result => result,
    }
}

fn mremap(pages: Range<usize>, to: usize) -> Result<(), Failure> {
    let length = pages.len() * PAGE_SIZE;
    // SAFETY: both ranges belong to the model, which moves its pages likewise, and they
    // do not overlap.
    let moved = unsafe {
        libc::mremap(
            pointer(pages.start),
            length,
            length,
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
            pointer(to),
        )
    };
    if moved == libc::MAP_FAILED {
        return Err(Failure::system("mremap"));
    }
    Ok(())
}
