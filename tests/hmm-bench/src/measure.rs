//! How the works are timed.

use std::fs;
use std::hint::black_box;
use std::ops::Range;
use std::ptr;
use std::sync::Barrier;
use std::sync::atomic::Ordering;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use fastrand::Rng;
use hmm_stress::failure::Failure;
use hmm_stress::pagemap;
use hmm_stress::region::{PMD_PAGES, PageSize, Region};
use hmm_stress::require;
use virtio_hmm_client::PAGE_SIZE;

use crate::contender::{Part, Session};
use crate::contents;
use crate::work::{Memory, Pages, Step};

/// Pages that are read when faults are measured, at most.
pub const FAULTS: usize = 1024;

/// Memory of so many pages goes out once in a round, for all works together.
const ROOMY: usize = 16 * FAULTS;

/// So many pages go out at a time, of all threads together.
const AT_A_TIME: usize = ROOMY;

/// After which no more pages go out.
const LONG_ENOUGH: Duration = Duration::from_secs(3);

/// Isolated faults of one round, and as many after a pause: both together need no more huge
/// pages than 64 MiB have.
const ISOLATED_FAULTS: usize = 16;

/// Pages between isolated faults: what the kernel reads ahead does not come near the next, nor
/// does a huge page.
const fn apart(pages: Pages) -> usize {
    match pages {
        Pages::Small => PMD_PAGES / 4,
        Pages::Huge => PMD_PAGES,
    }
}

/// A pause in which everything that polls goes to sleep.
const PAUSE: Duration = Duration::from_millis(15);

/// Memory that is worked on in one round, at least: smaller memory is worked on again.
const ENOUGH: usize = 256 << 10;

/// Calls after which all pages have to have moved. Migration and reclaim are best effort.
const CALLS: u32 = 50;

/// Steps in which pages fault one after the other.
const FAULTED: [Step; 2] = [Step::SequentialFaults, Step::RandomFaults];

/// What was measured of one work in one round.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Time for each page, in nanoseconds; one of them unless it is about isolated faults.
    pub page_ns: Vec<f64>,
}

impl Sample {
    fn of(time: Duration, pages: usize) -> Self {
        Self {
            page_ns: vec![time.as_nanos() as f64 / pages as f64],
        }
    }
}

/// Memory of one work, filled.
struct Subject<'a> {
    session: &'a dyn Session,
    memory: Memory,
    region: Region,
    generation: u64,
}

/// Measures the steps with this memory, which `steps` are among.
///
/// # Errors
/// A call fails, pages do not move, or do not hold what they should.
pub fn measure(
    session: &dyn Session,
    memory: Memory,
    steps: &[Step],
    rng: &mut Rng,
) -> Result<Vec<(Step, Sample)>, Failure> {
    let mut samples = Vec::new();
    let transferred = steps.iter().any(|step| step.is_transfer());
    let faulted = steps.iter().any(|step| FAULTED.contains(step));
    let roomy = memory.page_count() >= ROOMY;
    if roomy && (transferred || faulted) {
        samples.extend(transfers_and_faults(session, memory, rng)?);
    }
    if !roomy && transferred {
        samples.extend(transfers(session, memory, rng)?);
    }
    if !roomy && faulted {
        samples.extend(faults(session, memory, rng)?);
    }
    if steps.iter().any(|step| step.is_isolated()) {
        samples.extend(isolated(session, memory, rng)?);
    }
    samples.retain(|(step, _)| steps.contains(step));
    Ok(samples)
}

fn transfers(
    session: &dyn Session,
    memory: Memory,
    rng: &mut Rng,
) -> Result<Vec<(Step, Sample)>, Failure> {
    let turns = (ENOUGH / memory.bytes).max(1);
    let (mut out, mut besides, mut back) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    for _ in 0..turns {
        let subject = Subject::new(session, memory, rng)?;
        let (time, gone) = subject.send_out()?;
        out += time;
        besides += subject.besides(&gone)?;
        back += subject.come_back(&gone)?;
        subject.check()?;
    }
    let pages = turns * memory.page_count();
    let mut samples = sent(out, besides, pages);
    samples.push((Step::Back, Sample::of(back, pages)));
    Ok(samples)
}

fn page_count(parts: &[Part]) -> usize {
    parts.iter().map(|part| part.pages.len()).sum()
}

/// What it took to send pages out, and what that did besides.
fn sent(out: Duration, besides: Duration, pages: usize) -> Vec<(Step, Sample)> {
    let mut samples = vec![(Step::ToDevice, Sample::of(out, pages))];
    // On a busy machine the one can take longer by itself than it did within the other.
    if out > besides {
        samples.push((Step::ToDeviceNet, Sample::of(out - besides, pages)));
    }
    samples
}

/// Sends memory out once; then faults are in the first half of what has gone of each thread's
/// part, and the other half comes back by request.
fn transfers_and_faults(
    session: &dyn Session,
    memory: Memory,
    rng: &mut Rng,
) -> Result<Vec<(Step, Sample)>, Failure> {
    let subject = Subject::new(session, memory, rng)?;
    let middle = |part: &Part| part.pages.start + part.pages.len() / 2;
    let (out, gone) = subject.send_out()?;
    let besides = subject.besides(&gone)?;
    let mut samples = sent(out, besides, page_count(&gone));
    for (step, skipped) in FAULTED.into_iter().zip([0, subject.fault_limit()]) {
        let among = |part: &Part| part.pages.start + skipped..middle(part);
        let (time, count) = subject.read(step, gone.iter().map(among), rng)?;
        samples.push((step, Sample::of(time, count)));
    }
    let rest = |part| subject.part(middle(part)..part.pages.end);
    let rest: Vec<Part> = gone.iter().map(rest).collect();
    let back = subject.come_back(&rest)?;
    samples.push((Step::Back, Sample::of(back, page_count(&rest))));
    subject.check()?;
    Ok(samples)
}

/// Reads all pages, in order and then in random order; they go out before each.
fn faults(
    session: &dyn Session,
    memory: Memory,
    rng: &mut Rng,
) -> Result<Vec<(Step, Sample)>, Failure> {
    let turns = (ENOUGH / memory.bytes).max(1);
    let mut samples = Vec::new();
    for step in FAULTED {
        let (mut times, mut counts) = (Duration::ZERO, 0);
        for _ in 0..turns {
            let subject = Subject::new(session, memory, rng)?;
            let (_, gone) = subject.send_out()?;
            let among = gone.into_iter().map(|part| part.pages);
            let (time, count) = subject.read(step, among, rng)?;
            subject.check()?;
            times += time;
            counts += count;
        }
        samples.push((step, Sample::of(times, counts)));
    }
    Ok(samples)
}

/// Reads pages that are far from one another: at once, and then with a pause before each.
fn isolated(
    session: &dyn Session,
    memory: Memory,
    rng: &mut Rng,
) -> Result<Vec<(Step, Sample)>, Failure> {
    let pauses = [
        (Step::IsolatedFault, Duration::ZERO),
        (Step::IdleFault, PAUSE),
    ];
    let apart = apart(memory.pages);
    // No more than these need.
    let memory = Memory {
        bytes: pauses.len() * ISOLATED_FAULTS * apart * PAGE_SIZE,
        ..memory
    };
    let subject = Subject::new(session, memory, rng)?;
    let mut pages: Vec<usize> = (0..memory.page_count()).step_by(apart).collect();
    rng.shuffle(&mut pages);
    subject.send_out()?;
    let mut samples = Vec::new();
    for ((step, pause), pages) in pauses.into_iter().zip(pages.chunks(ISOLATED_FAULTS)) {
        let mut page_ns = Vec::new();
        for &page in pages {
            thread::sleep(pause);
            let start = Instant::now();
            subject.touch(page);
            page_ns.push(start.elapsed().as_nanos() as f64);
        }
        samples.push((step, Sample { page_ns }));
    }
    subject.check()?;
    Ok(samples)
}

impl<'a> Subject<'a> {
    fn new(session: &'a dyn Session, memory: Memory, rng: &mut Rng) -> Result<Self, Failure> {
        let page_size = match memory.pages {
            Pages::Small => PageSize::Small,
            Pages::Huge => PageSize::Huge,
        };
        let region = Region::new(memory.page_count(), page_size, rng.u64(..))?;
        let subject = Self {
            session,
            memory,
            region,
            generation: rng.u64(1..),
        };
        let huge = huge_pages()?;
        subject.for_each_part(|pages| {
            // At once, which takes less than a fault for each page.
            let advice = libc::MADV_POPULATE_WRITE;
            subject.region.advise(pages.clone(), advice)?;
            for page in pages {
                contents::write(&subject.region, page, subject.generation);
            }
            Ok(())
        })?;
        drain()?;
        if memory.pages == Pages::Huge {
            let (got, wanted) = (huge_pages()? - huge, memory.page_count() / PMD_PAGES);
            require!(got >= wanted, "{got} huge pages of {wanted}");
        }
        Ok(subject)
    }

    fn part(&self, pages: Range<usize>) -> Part {
        Part {
            addresses: self.region.range(pages.clone()),
            pages,
        }
    }

    /// Pages of each thread.
    fn each(&self) -> usize {
        self.memory.page_count() / self.memory.threads
    }

    /// The same piece of the pages of each thread.
    fn pieces(&self, of_each: Range<usize>) -> impl Iterator<Item = Part> {
        (0..self.memory.threads).map(move |thread| {
            let first = thread * self.each();
            self.part(first + of_each.start..first + of_each.end)
        })
    }

    /// Those of the threads.
    fn parts(&self) -> impl Iterator<Item = Part> {
        self.pieces(0..self.each())
    }

    /// The time from the first thread's start to the last one's end.
    fn together(
        &self,
        work: impl Fn(usize) -> Result<(), Failure> + Sync,
    ) -> Result<Duration, Failure> {
        let timed = |thread| {
            let start = Instant::now();
            work(thread).map(|()| (start, Instant::now()))
        };
        if self.memory.threads == 1 {
            return timed(0).map(|(start, end)| end - start);
        }
        let barrier = Barrier::new(self.memory.threads);
        let times: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..self.memory.threads)
                .map(|thread| {
                    let (barrier, timed) = (&barrier, &timed);
                    scope.spawn(move || {
                        barrier.wait();
                        timed(thread)
                    })
                })
                .collect();
            threads.into_iter().map(joined).collect::<Result<_, _>>()
        })?;
        let first = times.iter().map(|(start, _)| *start).min();
        let last = times.iter().map(|(_, end)| *end).max();
        Ok(last
            .zip(first)
            .map_or(Duration::ZERO, |(last, first)| last - first))
    }

    /// Calls for every part until all its pages have moved, and returns the time of the calls.
    fn until(
        &self,
        parts: &[Part],
        moved: impl Fn(pagemap::Entry) -> bool,
        call: impl Fn(&Part) -> Result<(), Failure> + Sync,
    ) -> Result<Duration, Failure> {
        let mut left = vec![true; parts.len()];
        let mut time = Duration::ZERO;
        for _ in 0..CALLS {
            time += self.together(|thread| match left[thread] {
                true => call(&parts[thread]),
                false => Ok(()),
            })?;
            for (left, part) in left.iter_mut().zip(parts) {
                let entries = pagemap::entries(part.addresses.clone())?;
                *left = !entries.into_iter().all(&moved);
            }
            if !left.contains(&true) {
                return Ok(time);
            }
        }
        Err(Failure::Broken(format!(
            "some pages did not move in {CALLS} calls"
        )))
    }

    fn come_back(&self, parts: &[Part]) -> Result<Duration, Failure> {
        self.until(parts, pagemap::Entry::present, |part| {
            self.session.back(part)
        })
    }

    /// Sends out one piece of each part after the other, until that has taken long enough.
    /// Returns the time that it took, and of each part what has gone.
    fn send_out(&self) -> Result<(Duration, Vec<Part>), Failure> {
        let (mut time, mut gone) = (Duration::ZERO, 0);
        while gone < self.each() && time < LONG_ENOUGH {
            let next = (gone + AT_A_TIME / self.memory.threads).min(self.each());
            let pieces: Vec<Part> = self.pieces(gone..next).collect();
            time += self.until(&pieces, pagemap::Entry::swap, |part| self.session.out(part))?;
            gone = next;
        }
        let parts: Vec<Part> = self.pieces(0..gone).collect();
        parts
            .iter()
            .try_for_each(|part| self.session.settle(part))?;
        Ok((time, parts))
    }

    fn besides(&self, parts: &[Part]) -> Result<Duration, Failure> {
        self.together(|thread| self.session.besides(&parts[thread]))
    }

    /// How many pages each thread reads at most when faults are measured.
    fn fault_limit(&self) -> usize {
        FAULTS / self.memory.threads
    }

    /// Has each thread read pages that are `among` its own, in order or not. Returns the time,
    /// and how many they were.
    fn read(
        &self,
        step: Step,
        among: impl Iterator<Item = Range<usize>>,
        rng: &mut Rng,
    ) -> Result<(Duration, usize), Failure> {
        let orders: Vec<Vec<usize>> = among
            .map(|pages| {
                let mut pages: Vec<usize> = pages.collect();
                if step == Step::RandomFaults {
                    rng.shuffle(&mut pages);
                }
                pages.truncate(self.fault_limit());
                pages
            })
            .collect();
        let time = self.together(|thread| {
            orders[thread].iter().for_each(|&page| self.touch(page));
            Ok(())
        })?;
        Ok((time, orders.iter().map(Vec::len).sum()))
    }

    fn touch(&self, page: usize) {
        black_box(self.region.words(page)[0].load(Ordering::Relaxed));
    }

    /// Looks at all that is not out, so that pages that are nowhere are noticed.
    fn check(&self) -> Result<(), Failure> {
        let entries = pagemap::entries(self.region.range(0..self.memory.page_count()))?;
        self.for_each_part(|pages| {
            for page in pages {
                require!(
                    entries[page].swap() || contents::holds(&self.region, page, self.generation),
                    "page {page} of {} does not hold what was written",
                    self.memory
                );
            }
            Ok(())
        })
    }

    /// Deals with the pages of each part, in the thread that they are measured in: where no
    /// other CPU has seen the memory, none has to be told when it goes.
    fn for_each_part(
        &self,
        deal: impl Fn(Range<usize>) -> Result<(), Failure> + Sync,
    ) -> Result<(), Failure> {
        let parts: Vec<Part> = self.parts().collect();
        let deal_with = |thread: usize| deal(parts[thread].pages.clone());
        self.together(deal_with).map(drop)
    }
}

/// What a thread came to.
fn joined<T>(thread: ScopedJoinHandle<T>) -> T {
    let result = thread.join();
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Has the kernel put new pages, which each CPU keeps to itself for a while, where all CPUs find
/// them, and reclaim does. A call that moves pages among nodes does that first, even if they are
/// none.
pub(crate) fn drain() -> Result<(), Failure> {
    let (nodes, none) = ([0_i32; 0], ptr::null::<libc::c_void>());
    // SAFETY: of zero pages nothing is read or written.
    let status =
        unsafe { libc::syscall(libc::SYS_move_pages, 0, 0, none, nodes.as_ptr(), none, 0) };
    match status {
        0 => Ok(()),
        _ => Err(Failure::system("move_pages")),
    }
}

/// Huge pages that this process has.
fn huge_pages() -> Result<usize, Failure> {
    const FILE: &str = "/proc/self/smaps_rollup";
    let text = fs::read_to_string(FILE).map_err(|source| Failure::System {
        call: "reading /proc/self/smaps_rollup",
        source,
    })?;
    text.lines()
        .find_map(|line| {
            let size = line.strip_prefix("AnonHugePages:")?.trim();
            size.strip_suffix(" kB")?.parse::<usize>().ok()
        })
        .map(|kib| kib * 1024 / PAGE_SIZE / PMD_PAGES)
        .ok_or_else(|| Failure::Broken(format!("{FILE} tells nothing about huge pages")))
}
