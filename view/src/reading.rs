//! The statistics of a running device, asked on its control socket.
//! `docs/counters.md` says what they mean.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;

/// How long a device may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no reading.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody answers there.
    #[error("cannot ask the device at {0}")]
    Socket(PathBuf, #[source] io::Error),
    /// Somebody is there, but no control plane.
    #[error("{0} does not answer as a control socket does")]
    Silent(PathBuf),
    /// The answer is something else.
    #[error("cannot understand the device")]
    Reply(#[from] serde_json::Error),
}

/// The statistics at one time.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Reading {
    /// Number of the VM's session; 0 if there was none yet.
    pub session: u64,
    /// Whether the VM is there.
    pub connected: bool,
    /// Nanoseconds on a clock of the device's.
    pub time_ns: u64,
    /// Device memory.
    pub memory: Memory,
    /// Each queue, in the order of the virtqueues.
    pub queues: Vec<Queue>,
}

/// Device memory, in bytes.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Memory {
    /// There are.
    pub size: u64,
    /// The host has allocated.
    pub used: u64,
    /// It had allocated at most.
    pub peak: u64,
}

/// One queue.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Queue {
    /// Nanoseconds that the worker was busy with requests.
    pub busy_ns: u64,
    /// By name.
    pub operations: BTreeMap<String, Operation>,
    /// Requests and frames that failed, by class.
    pub failures: BTreeMap<String, u64>,
    /// What goes on in the ring.
    pub ring: Ring,
    /// What the processor counted of the worker, by name, as far as it does.
    pub hardware: BTreeMap<String, u64>,
}

/// Requests for one operation.
#[derive(Clone, Debug, Deserialize)]
pub struct Operation {
    /// Those that failed.
    pub errors: u64,
    /// By name.
    pub sizes: BTreeMap<String, Size>,
}

impl Operation {
    /// Whether requests of this name are the control queue's, not copies.
    pub fn is_control(name: &str) -> bool {
        matches!(name, "counters" | "discard")
    }
}

/// Requests of one size.
#[derive(Clone, Debug, Deserialize)]
pub struct Size {
    /// Completed.
    pub requests: u64,
    /// Of the frames that succeeded.
    pub bytes: u64,
    /// In the ring.
    pub wait: Times,
    /// From then until it was done.
    pub copy: Times,
}

/// A distribution: what times are less than, in nanoseconds, and their number.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Times {
    /// The shortest first.
    pub buckets: Vec<(u64, u64)>,
}

/// What goes on in a ring.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Ring {
    /// Requests that waited when some last came.
    pub occupancy: u64,
    /// Times that the ring was full.
    pub full: u64,
    /// Notifications by the driver.
    pub kicks: u64,
    /// Notifications of the driver.
    pub calls: u64,
    /// Those that it did not want.
    pub calls_suppressed: u64,
}

impl Reading {
    /// Asks the device whose control socket this is.
    ///
    /// # Errors
    /// If nobody answers there, or not with statistics.
    pub fn take(socket: &Path) -> Result<Self, Error> {
        let line = ask(socket).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::UnexpectedEof => {
                Error::Silent(socket.into())
            }
            _ => Error::Socket(socket.into(), e),
        })?;
        Ok(serde_json::from_str(&line)?)
    }
}

fn ask(socket: &Path) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"{\"command\":\"statistics\"}\n")?;
    let mut line = String::new();
    if BufReader::new(stream).read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line)
}
