//! The device daemon of one run, and its control socket.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, FileContext, Result};
use crate::process::{Guarded, describe, tail};
use crate::profile::Device;
use crate::sampler::Statistics;

/// How long a daemon may take to open its socket, and to end when asked.
const PATIENCE: Duration = Duration::from_secs(10);

/// Counters of one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Operation {
    /// Requests completed.
    pub requests: u64,
    /// Frames that were copied or filled.
    pub frames: u64,
    /// Bytes in these frames.
    pub bytes: u64,
    /// Requests whose status was not `OK`.
    pub errors: u64,
}

/// The daemon's counters of the VM session at hand, or of the last one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Counters {
    /// Guest RAM to device memory.
    pub to_device: Operation,
    /// Device memory to guest RAM.
    pub from_device: Operation,
    /// Zeroing of device memory.
    pub fill: Operation,
}

/// Both ways in which the daemon tells what it has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// The counters.
    pub counters: Counters,
    /// The sums of the statistics of all its queues.
    pub queues: Counters,
    /// Requests that met a fault on purpose.
    pub injected: u64,
}

#[derive(Deserialize)]
struct Answer {
    counters: Counters,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Reply<T> {
    Answer(T),
    Error { error: String },
}

/// Asks the daemon behind this control socket for its counters.
///
/// # Errors
/// Nobody answers, or the answer is an error.
pub fn counters(socket: &Path) -> Result<Counters> {
    ask(socket, "counters", PATIENCE).map(|Answer { counters }| counters)
}

/// Asks it for all that it counts.
///
/// # Errors
/// Nobody answers in this time, or the answer is an error.
pub(crate) fn statistics(socket: &Path, patience: Duration) -> Result<Statistics> {
    ask(socket, "statistics", patience)
}

fn ask<T: DeserializeOwned>(socket: &Path, command: &str, patience: Duration) -> Result<T> {
    let mut stream = UnixStream::connect(socket).at("connect to", socket)?;
    stream.set_read_timeout(Some(patience)).at("use", socket)?;
    writeln!(stream, "{{\"command\":\"{command}\"}}").at("write to", socket)?;
    let mut line = String::new();
    BufReader::new(stream)
        .read_line(&mut line)
        .at("read", socket)?;
    match serde_json::from_str(&line) {
        Ok(Reply::Answer(answer)) => Ok(answer),
        Ok(Reply::Error { error }) => Err(Error::Control(error)),
        Err(_) => Err(Error::Control(line)),
    }
}

/// Asks the daemon behind this control socket for its counters and its statistics; they can
/// only be compared while no VM uses it.
///
/// # Errors
/// Nobody answers, or the answer is an error.
pub fn counted(socket: &Path) -> Result<Counted> {
    let statistics = statistics(socket, PATIENCE)?;
    Ok(Counted {
        counters: counters(socket)?,
        queues: Counters {
            to_device: statistics.sum("to_device"),
            from_device: statistics.sum("from_device"),
            fill: statistics.sum("fill"),
        },
        injected: statistics.injected(),
    })
}

/// Where the sockets of a device are.
#[derive(Clone, Debug)]
pub struct Sockets {
    /// vhost-user.
    pub device: PathBuf,
    /// Control.
    pub control: PathBuf,
}

/// The command that starts the daemon.
#[must_use]
pub fn command(program: &Path, device: &Device, sockets: &Sockets) -> Command {
    let mut command = Command::new(program);
    command
        .arg("--socket-path")
        .arg(&sockets.device)
        .arg("--control-socket")
        .arg(&sockets.control)
        .arg("--memory-size")
        .arg(device.memory.to_string())
        .arg("--copy-queues")
        .arg(device.copy_queues.to_string());
    if device.prefault {
        command.arg("--prefault");
    }
    if device.huge_pages {
        command.arg("--huge-pages");
    }
    if let Some(bandwidth) = device.bandwidth {
        command.arg("--bandwidth").arg(bandwidth.to_string());
    }
    if let Some(latency) = &device.latency {
        command.arg("--latency").arg(latency);
    }
    for rule in &device.inject {
        command.arg("--inject").arg(rule);
    }
    if let Some(seed) = device.inject_seed {
        command.arg("--inject-seed").arg(seed.to_string());
    }
    command
}

/// Starts the daemon and waits until it listens.
pub(crate) fn start(
    program: &Path,
    device: &Device,
    sockets: &Sockets,
    log: &Path,
) -> Result<Guarded> {
    // A device that is plugged in anew has the log of its predecessor.
    let mut options = File::options();
    let file = options
        .create(true)
        .append(true)
        .open(log)
        .at("create", log)?;
    let mut command = command(program, device, sockets);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(file);
    // SIGTERM also when the tool is killed: the daemon then removes its sockets.
    let mut daemon = Guarded::start(&mut command, Signal::TERM, PATIENCE)?;
    let deadline = Instant::now() + PATIENCE;
    while !(sockets.device.exists() && sockets.control.exists()) {
        if let Some(status) = daemon.ended() {
            let log = std::fs::read_to_string(log).unwrap_or_default();
            return Err(Error::DaemonStart {
                end: describe(status),
                log: tail(&log, 3),
            });
        }
        if Instant::now() > deadline {
            return Err(Error::DaemonSilent {
                socket: sockets.device.clone(),
                seconds: PATIENCE.as_secs(),
            });
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(daemon)
}
