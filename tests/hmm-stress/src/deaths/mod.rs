//! Device daemons are killed at random moments, while processes use their devices.
//!
//! Each device has two processes, of small and of huge pages. When its daemon is killed, each of
//! their pages is as it was or lost, which SIGBUS tells, and only pages that may have been on the
//! device are. A new device takes the place of the dead one, before or after its processes have
//! looked, and the others go on all the while.

mod board;
mod worker;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use board::{Board, Word};

use crate::context::Context;
use crate::failure::Failure;
use crate::kernel_log::KernelLog;
use crate::pattern::mix;
use crate::process::{self, Child};
use crate::region::PageSize;
use crate::require;

/// Pages of each process.
const PAGES: usize = 2048;
/// Longest pause before a kill, in microseconds.
const PAUSE: u64 = 1_000_000;
/// How long a request may take before its device is broken, in milliseconds.
const TIMEOUT: &str = "3000";
/// How long anything else may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often the boards are looked at.
const GLANCE: Duration = Duration::from_millis(2);

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Toll {
    /// Seed of the run.
    pub seed: u64,
    /// Daemons killed.
    pub kills: u64,
    /// Pages compared.
    pub checked: u64,
    /// Pages that were lost, each told by SIGBUS.
    pub lost: u64,
    /// Pages that did not hold what they should.
    pub wrong: u64,
    /// Complaints of the kernel.
    pub complaints: u64,
}

/// Where a device is plugged, and those who use it.
struct Slot {
    number: usize,
    /// The directory of the port in sysfs.
    port: PathBuf,
    workers: Vec<Worker>,
}

struct Worker {
    child: Child,
    board: Board,
}

/// Kill as many daemons, each device's in turn, and add up what that did.
///
/// # Errors
/// A process saw what it must not see, a device died that nobody killed, or does not come back.
pub fn run(seed: u64, kills: u64, toll: &mut Toll) -> Result<(), Failure> {
    let mut log = KernelLog::open()?;
    let timeout = "/sys/module/virtio_hmm/parameters/timeout_ms";
    fs::write(timeout, TIMEOUT).map_err(|source| Failure::System {
        call: "setting the driver's timeout",
        source,
    })?;
    toll.seed = seed;
    let mut random = fastrand::Rng::with_seed(mix(seed));
    let mut slots = slots(seed, toll)?;
    let mut result = Ok(());
    while toll.kills < kills && result.is_ok() {
        random.shuffle(&mut slots);
        result = round(&mut slots, seed, kills, &mut random, toll);
    }
    // A process that failed says why.
    let mut ends = Ok(());
    for slot in slots {
        result = result.and(slot.is_well());
        ends = ends.and(finish(slot.workers, toll));
    }
    for complaint in log.complaints()? {
        eprintln!("the kernel complained: {complaint}");
        toll.complaints += 1;
    }
    ends.and(result)
}

/// Kill each device's daemon, one after the other, until there were so many kills; then put new
/// devices in their places.
fn round(
    slots: &mut [Slot],
    seed: u64,
    kills: u64,
    random: &mut fastrand::Rng,
    toll: &mut Toll,
) -> Result<(), Failure> {
    let left = usize::try_from(kills - toll.kills).unwrap_or(usize::MAX);
    let number = slots.len().min(left);
    for index in 0..number {
        thread::sleep(Duration::from_micros(random.u64(0..PAUSE)));
        slots[index..].iter().try_for_each(Slot::is_well)?;
        slots[index].host("kill")?;
        toll.kills += 1;
    }
    for slot in &mut slots[..number] {
        slot.replace(seed, random.bool(), toll)?;
    }
    Ok(())
}

/// The devices that there are, each with its processes.
fn slots(seed: u64, toll: &Toll) -> Result<Vec<Slot>, Failure> {
    let mut slots = Vec::new();
    loop {
        let number = slots.len();
        let device = PathBuf::from(format!("/dev/hmm{number}"));
        if !device.exists() {
            require!(number > 0, "there is no {}", device.display());
            return Ok(slots);
        }
        let function = fs::canonicalize(format!("/sys/class/misc/hmm{number}/device"));
        let port = function.ok().and_then(|path| {
            let port = path.parent()?.parent()?;
            Some(port.to_owned())
        });
        let port = port.ok_or_else(|| Failure::Broken(format!("hmm{number} is on no port")))?;
        let workers = workers(&device, seed, toll)?;
        slots.push(Slot {
            number,
            port,
            workers,
        });
    }
}

/// Processes at the device, with other choices than all before.
fn workers(device: &Path, seed: u64, toll: &Toll) -> Result<Vec<Worker>, Failure> {
    let seed = device
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(mix(seed ^ toll.kills), |seed, byte| {
            mix(seed ^ u64::from(*byte))
        });
    let context = Context::new(device.to_owned(), seed, 1, PAGES, 0)?;
    [PageSize::Small, PageSize::Huge]
        .into_iter()
        .map(|page_size| {
            let board = Board::new()?;
            let child = process::fork(&context, |context| {
                let end = worker::work(context, &board, page_size);
                board.add(Word::Ended, 1);
                end
            })?;
            Ok(Worker { child, board })
        })
        .collect()
}

impl Slot {
    /// Put a new device in the place of the dead one, early or when its processes have looked at
    /// their pages, and start the next ones.
    fn replace(&mut self, seed: u64, early: bool, toll: &mut Toll) -> Result<(), Failure> {
        let end = Instant::now() + PATIENCE;
        for Worker { board, .. } in &self.workers {
            while !board.is_set(Word::Dead) && !board.is_set(Word::Ended) {
                require!(
                    Instant::now() < end,
                    "nobody noticed that device {} is dead",
                    self.number
                );
                thread::sleep(GLANCE);
            }
        }
        if early {
            self.renew()?;
        }
        finish(std::mem::take(&mut self.workers), toll)?;
        if !early {
            self.renew()?;
        }
        self.workers = workers(&self.device()?, seed, toll)?;
        Ok(())
    }

    fn renew(&self) -> Result<(), Failure> {
        self.host("unplug")?;
        self.host("plug")
    }

    /// Have the host do something with the device.
    fn host(&self, action: &'static str) -> Result<(), Failure> {
        let number = self.number.to_string();
        let status = Command::new("hmm-host").args([action, &number]).status();
        let status = status.map_err(|source| Failure::System {
            call: "starting hmm-host",
            source,
        })?;
        require!(status.success(), "hmm-host {action} {number}: {status}");
        Ok(())
    }

    /// The file of the device that is behind the port now.
    fn device(&self) -> Result<PathBuf, Failure> {
        let end = Instant::now() + PATIENCE;
        loop {
            let entries = fs::read_dir("/sys/class/misc")
                .into_iter()
                .flatten()
                .flatten();
            let found = entries
                .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"hmm"))
                .find(|entry| {
                    let device = fs::canonicalize(entry.path().join("device"));
                    device.is_ok_and(|device| device.starts_with(&self.port))
                })
                .map(|entry| Path::new("/dev").join(entry.file_name()));
            if let Some(device) = found.filter(|device| device.exists()) {
                return Ok(device);
            }
            require!(
                Instant::now() < end,
                "device {} does not come back",
                self.number
            );
            thread::sleep(GLANCE);
        }
    }

    /// Its processes work.
    fn is_well(&self) -> Result<(), Failure> {
        let ended =
            |worker: &Worker| worker.board.is_set(Word::Dead) || worker.board.is_set(Word::Ended);
        require!(
            !self.workers.iter().any(ended),
            "the processes of device {} stopped, and nobody has killed its daemon",
            self.number
        );
        Ok(())
    }
}

/// Have the processes look at all their pages, and add up what they saw.
fn finish(workers: Vec<Worker>, toll: &mut Toll) -> Result<(), Failure> {
    let mut result = Ok(());
    for worker in &workers {
        worker.board.add(Word::Finish, 1);
    }
    for Worker { child, board } in workers {
        result = result.and(child.wait());
        toll.checked += board.get(Word::Checked);
        toll.lost += board.get(Word::Lost);
        toll.wrong += board.get(Word::Wrong);
    }
    result
}
