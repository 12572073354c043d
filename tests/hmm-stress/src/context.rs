//! What every scenario and test is given: the device, amounts, a seed, and checks.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use virtio_hmm_client::counters::Counters;
use virtio_hmm_client::{
    Device, Direction, MigrateError, Outcome, PAGE_SIZE, Residency, Skip, WhenFull,
    debugfs_directory,
};

use crate::failure::Failure;
use crate::pattern::{Mismatch, mix};
use crate::region::{PageSize, Region};
use crate::report::Transfer;
use crate::require;
use crate::shared::counts;

/// How long freed device frames may take to be free.
const FREE_DEADLINE: Duration = Duration::from_secs(10);

/// How often a migration is asked for again while pages are busy.
const SETTLE_ATTEMPTS: u32 = 50;

/// Pages that [`Context::soil`] writes at a time.
const SOIL_PIECE: usize = 4096;

/// Figures collected over a run.
#[derive(Debug, Default)]
pub struct Measurements {
    /// Bulk migration to the device.
    pub to_device: Transfer,
    /// Bulk migration to RAM.
    pub to_system: Transfer,
}

/// What a scenario or test is given.
#[derive(Debug)]
pub struct Context {
    /// The device, opened by this process.
    pub device: Device,
    path: PathBuf,
    /// Seed of this scenario or test.
    pub seed: u64,
    /// Threads that access memory at once, at least 1.
    pub threads: usize,
    /// Pages of an ordinary region, at least 16.
    pub pages: usize,
    /// Pages that ping-pong moves each way at least.
    pub pages_each_way: u64,
    /// How long to go on.
    pub duration: Duration,
    measurements: Arc<Mutex<Measurements>>,
}

impl Context {
    /// Open the device at `path` for scenarios of these dimensions.
    ///
    /// # Errors
    /// The device cannot be opened.
    pub fn new(
        path: PathBuf,
        seed: u64,
        threads: usize,
        pages: usize,
        pages_each_way: u64,
    ) -> Result<Self, Failure> {
        Ok(Self {
            device: Device::open(&path)?,
            path,
            seed,
            threads: threads.max(1),
            pages: pages.max(16),
            pages_each_way,
            duration: Duration::ZERO,
            measurements: Arc::default(),
        })
    }

    /// The same for a forked child, with the device opened by itself.
    pub(crate) fn reopen(&self) -> Result<Self, Failure> {
        Ok(Self {
            device: Device::open(&self.path)?,
            path: self.path.clone(),
            measurements: Arc::default(),
            ..*self
        })
    }

    /// The same at another device.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(crate) fn at(&self, path: PathBuf) -> Result<Self, Failure> {
        Ok(Self {
            device: Device::open(&path)?,
            path,
            measurements: Arc::clone(&self.measurements),
            ..*self
        })
    }

    /// The device's path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The same with the device opened once more; when its memory is used up,
    /// pages that are to go there stay where they are.
    ///
    /// # Errors
    /// The device cannot be opened.
    pub(crate) fn without_eviction(&self) -> Result<Self, Failure> {
        Ok(Self {
            device: Device::open(&self.path)?.when_full(WhenFull::Leave),
            path: self.path.clone(),
            measurements: Arc::clone(&self.measurements),
            ..*self
        })
    }

    /// The figures of the run.
    pub fn measurements(&self) -> MutexGuard<'_, Measurements> {
        self.measurements
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A random generator of its own for each `stream` of this scenario.
    #[must_use]
    pub fn random(&self, stream: u64) -> fastrand::Rng {
        fastrand::Rng::with_seed(mix(self.seed ^ mix(stream)))
    }

    /// A new region of small pages; `number` tells the regions of a scenario apart.
    ///
    /// # Errors
    /// There is no memory to map.
    pub fn region(&self, pages: usize, number: u64) -> Result<Region, Failure> {
        Region::new(pages, PageSize::Small, self.region_seed(number))
    }

    /// The seed of region `number`.
    #[must_use]
    pub fn region_seed(&self, number: u64) -> u64 {
        mix(self.seed.wrapping_add(number))
    }

    /// The moment at which this scenario's time is over.
    #[must_use]
    pub fn end(&self) -> Instant {
        Instant::now() + self.duration
    }

    /// Migrate addresses, resuming after signals, and check that the outcome adds up.
    ///
    /// # Errors
    /// The call fails, or its counts do not add up to the range.
    pub fn migrate(&self, range: Range<usize>, direction: Direction) -> Result<Outcome, Failure> {
        counts().operations.fetch_add(1, Ordering::Relaxed);
        let length = range.len() as u64;
        let outcome = match self.device.migrate_all(range, direction) {
            Ok(outcome) => outcome,
            Err(error) => {
                adds_up(&error.outcome)?;
                return Err(error.into());
            }
        };
        adds_up(&outcome)?;
        require!(
            outcome.done == length,
            "a migration of {length} bytes succeeded after {}",
            outcome.done
        );
        Ok(outcome)
    }

    /// Migrate addresses of which some may not be mapped.
    ///
    /// # Errors
    /// As for [`Context::migrate`], unless the error is that pages are not mapped.
    pub fn migrate_mapped(
        &self,
        range: Range<usize>,
        direction: Direction,
    ) -> Result<Outcome, Failure> {
        match self.migrate(range, direction) {
            Err(Failure::Migrate(error))
                if matches!(error.source, virtio_hmm_client::Error::Unmapped) =>
            {
                let MigrateError { outcome, .. } = *error;
                Ok(outcome)
            }
            result => result,
        }
    }

    /// Migrate until no page is busy any more, except `held` pages that are known to
    /// stay. The result has the pages moved and filled by all calls, and the pages
    /// skipped by the last one.
    ///
    /// # Errors
    /// As for [`Context::migrate`]; or more pages stay busy.
    pub fn settle(
        &self,
        range: Range<usize>,
        direction: Direction,
        held: u64,
    ) -> Result<Settled, Failure> {
        let mut settled = Settled::default();
        for _ in 0..SETTLE_ATTEMPTS {
            let outcome = self.migrate(range.clone(), direction)?;
            settled.moved += outcome.moved;
            settled.filled += outcome.filled;
            settled.last = outcome;
            let busy = outcome.skipped(Skip::Busy) + outcome.skipped(Skip::Pinned);
            if busy <= held {
                return Ok(settled);
            }
            thread::sleep(Duration::from_millis(2));
        }
        Err(Failure::Broken(format!(
            "pages stay busy: {:?}, where {held} should",
            settled.last
        )))
    }

    /// Compare every byte of `pages` with the generation that each should hold.
    ///
    /// # Errors
    /// The first mismatch; all are counted but those of pages that were lost.
    pub fn check(
        &self,
        region: &Region,
        pages: Range<usize>,
        generation: impl Fn(usize) -> u64,
    ) -> Result<(), Failure> {
        counts()
            .operations
            .fetch_add(pages.len() as u64, Ordering::Relaxed);
        let mut first: Option<Failure> = None;
        for page in pages {
            let Err(mismatch) = region.check(page, generation(page)) else {
                continue;
            };
            if region.is_lost(page) {
                let Mismatch { page, address, .. } = mismatch;
                first.get_or_insert(Failure::Lost { page, address });
            } else {
                counts().mismatches.fetch_add(1, Ordering::Relaxed);
                first.get_or_insert(Failure::Mismatch(mismatch));
            }
        }
        first.map_or(Ok(()), Err)
    }

    /// Require that each of `pages` is where `expected` says.
    ///
    /// # Errors
    /// One is elsewhere.
    pub fn expect(
        &self,
        region: &Region,
        pages: Range<usize>,
        mut expected: impl FnMut(usize) -> Residency,
    ) -> Result<(), Failure> {
        let seen = self.device.query(region.range(pages.clone()))?;
        for (page, seen) in pages.zip(seen) {
            let expected = expected(page);
            require!(
                seen == expected,
                "page {page} should be {expected:?} and is {seen:?}"
            );
        }
        Ok(())
    }

    /// Bytes of free device memory.
    ///
    /// # Errors
    /// The call fails.
    pub fn free(&self) -> Result<u64, Failure> {
        Ok(self.device.info()?.memory_free)
    }

    /// Wait until `free` bytes of device memory are free.
    ///
    /// # Errors
    /// They are not in time: frames were leaked, or freed twice.
    pub fn wait_free(&self, free: u64) -> Result<(), Failure> {
        let end = Instant::now() + FREE_DEADLINE;
        loop {
            let now = self.free()?;
            if now == free {
                return Ok(());
            }
            require!(
                Instant::now() < end,
                "device memory leaked: {now} bytes are free, {free} should be"
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The driver's counters.
    ///
    /// # Errors
    /// debugfs cannot be read.
    pub fn driver_counters(&self) -> Result<Counters, Failure> {
        Ok(Counters::of_driver(&debugfs_directory(&self.path))?)
    }

    /// The device's own counters.
    ///
    /// # Errors
    /// debugfs cannot be read.
    pub fn device_counters(&self) -> Result<Counters, Failure> {
        Ok(Counters::of_device(&debugfs_directory(&self.path))?)
    }

    /// How many CPU faults took how long.
    ///
    /// # Errors
    /// debugfs cannot be read.
    pub fn fault_latency(&self) -> Result<Counters, Failure> {
        Ok(Counters::of_fault_latency(&debugfs_directory(&self.path))?)
    }

    /// Write a pattern to `pages` frames of device memory and free them, so that a
    /// frame given out without being cleared does not happen to be zero.
    ///
    /// # Errors
    /// The migration fails.
    pub fn soil(&self, pages: usize) -> Result<(), Failure> {
        // A piece at a time, so that little RAM is needed for much device memory.
        let mut pieces = Vec::new();
        for first in (0..pages).step_by(SOIL_PIECE) {
            let region = self.region(SOIL_PIECE.min(pages - first), u64::MAX)?;
            region.fill_all(1);
            self.migrate(region.all(), Direction::ToDevice)?;
            pieces.push(region);
        }
        Ok(())
    }
}

/// What calls moved until nothing was busy.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settled {
    /// Pages moved by all calls.
    pub moved: u64,
    /// Pages filled by all calls.
    pub filled: u64,
    /// The last call's outcome.
    pub last: Outcome,
}

fn adds_up(outcome: &Outcome) -> Result<(), Failure> {
    require!(
        outcome.pages() * PAGE_SIZE as u64 == outcome.done,
        "an outcome does not add up: {outcome:?}"
    );
    Ok(())
}
