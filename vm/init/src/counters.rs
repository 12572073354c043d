//! What the driver has counted, read when nobody uses its devices any more.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use hmm_init::Event;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, wait};

/// A directory for each device.
const DIRECTORY: &str = "/sys/kernel/debug/virtio_hmm";
/// How long what the command has left behind may take to end.
const LAST_BREATH: Duration = Duration::from_secs(10);
/// How long its frames may then take to become free; those of a broken device never do.
const LAST_FRAMES: Duration = Duration::from_secs(1);

/// The devices that the driver has, each with what tells it from a later one of its name.
pub(crate) struct Devices(BTreeMap<String, u64>);

impl Devices {
    pub(crate) fn now() -> Self {
        let entries = fs::read_dir(DIRECTORY).into_iter().flatten().flatten();
        let devices = entries.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some((name, entry.metadata().ok()?.ino()))
        });
        Self(devices.collect())
    }

    /// The counters of each device that the driver has had without interruption.
    pub(crate) fn counters(&self) -> Vec<Event> {
        let now = Self::now();
        let same = now
            .0
            .iter()
            .filter(|(name, id)| self.0.get(*name) == Some(id));
        same.filter_map(|(name, _)| {
            let directory = Path::new(DIRECTORY).join(name);
            Some(Event::Counters {
                device: name.clone(),
                counters: read_when_free(&directory.join("counters")).ok()?,
                fault_latency: fs::read_to_string(directory.join("fault_latency")).ok()?,
            })
        })
        .collect()
    }
}

/// The counters once no frame of the device is in use any more, or as they are in the end.
fn read_when_free(path: &Path) -> io::Result<String> {
    let deadline = Instant::now() + LAST_FRAMES;
    loop {
        let text = fs::read_to_string(path)?;
        let value = |name| text.lines().find_map(|line| line.strip_prefix(name));
        if value("frames_free") == value("frames_total") || Instant::now() > deadline {
            return Ok(text);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Ends all other processes: they may move pages after the counters were read, and what they
/// have on a device would come home when the machine powers off.
pub(crate) fn end_processes() {
    let deadline = Instant::now() + LAST_BREATH;
    while Instant::now() < deadline {
        for pid in processes() {
            let _ = kill_process(pid, Signal::KILL);
        }
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some(_)) | Err(Errno::INTR) => {}
                Ok(None) => break,
                // Every process descends from this one.
                Err(_) => return,
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn processes() -> impl Iterator<Item = Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let number: i32 = entry.file_name().to_str()?.parse().ok()?;
        Pid::from_raw(number).filter(|pid| !pid.is_init())
    })
}
