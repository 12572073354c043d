//! The daemon, as a process of its own, under load that it has not asked for.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_possible_truncation
)]

#[expect(dead_code, reason = "the tests of the protocol use the rest of it")]
#[path = "protocol/harness.rs"]
mod harness;

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use harness::*;

/// How long the floods last.
const FLOOD: Duration = Duration::from_secs(3);
/// A driver gives a device up that takes as long for a request.
const TIMEOUT: Duration = Duration::from_secs(5);
/// What any load may add to the daemon's memory.
const ROOM: u64 = 32 << 20;

struct Daemon {
    child: Child,
    dir: TempDir,
}

impl Daemon {
    fn start(memory_size: &str, log: Stdio) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name| dir.path().join(name);
        let child = Command::new(env!("CARGO_BIN_EXE_vhost-device-hmm"))
            .arg("--socket-path")
            .arg(path("vhost"))
            .arg("--control-socket")
            .arg(path("control"))
            .arg("--metrics-socket")
            .arg(path("metrics"))
            .arg(format!("--copy-queues={COPY_QUEUES}"))
            .arg(format!("--memory-size={memory_size}"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        wait("the daemon", || {
            path("control").exists() && path("metrics").exists()
        });
        Self { child, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn connect(&self) -> Vm {
        Vm::connect_to(
            &self.path("vhost"),
            Shape::default(),
            VERSION_1 | EVENT_IDX | INDIRECT_DESC,
        )
    }

    fn descriptors(&self) -> usize {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.child.id()));
        fds.unwrap().count()
    }

    /// The most memory that it has had so far, in bytes.
    fn peak(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
        kib.parse::<u64>().unwrap() << 10
    }

    /// Ends it, which it does well.
    fn end(mut self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Connects and leaves at once.
fn visit(path: &Path) -> io::Result<()> {
    UnixStream::connect(path).map(drop)
}

/// Holds many connections without a word.
fn hold(path: &Path) -> io::Result<()> {
    let silent: io::Result<Vec<_>> = (0..64).map(|_| UnixStream::connect(path)).collect();
    thread::sleep(Duration::from_millis(300));
    silent.map(drop)
}

/// Sends as much as is taken, and reads nothing.
fn pour(path: &Path, piece: &[u8]) -> io::Result<()> {
    let mut stream = UnixStream::connect(path)?;
    // What is not taken fills the socket.
    stream.set_write_timeout(Some(Duration::from_millis(100)))?;
    loop {
        stream.write_all(piece)?;
    }
}

/// Sends lines that are no requests, and reads what comes.
fn chat(path: &Path) -> io::Result<()> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mut bytes = [0; 4096];
    loop {
        stream.write_all(b"\xff\x00{}[[[\"\n{\"command\":\n\n")?;
        if stream.read(&mut bytes)? == 0 {
            return Ok(());
        }
    }
}

/// Clients of both planes that want nothing good, at once, while a guest copies: copies come, and
/// nothing is left of the flood.
#[test]
fn a_flood_of_clients_stops_no_copy() {
    let daemon = Daemon::start("8M", Stdio::null());
    let mut vm = daemon.connect();
    vm.store(0, &pattern(1, 512));
    assert!(vm.load(0, 512) == pattern(1, 512));
    let (control, metrics) = (daemon.path("control"), daemon.path("metrics"));
    let (descriptors, peak) = (daemon.descriptors(), daemon.peak());

    let over = AtomicBool::new(false);
    let flood = |deed: &dyn Fn() -> io::Result<()>| {
        let mut times = 0;
        while !over.load(Ordering::Relaxed) {
            // The daemon ends most of it.
            deed().ok();
            times += 1;
        }
        times
    };
    thread::scope(|scope| {
        let floods = [
            scope.spawn(|| flood(&|| visit(&control))),
            scope.spawn(|| flood(&|| hold(&control))),
            scope.spawn(|| flood(&|| pour(&control, &[b'x'; 4096]))),
            scope.spawn(|| flood(&|| pour(&control, b"no request\n"))),
            scope.spawn(|| flood(&|| chat(&control))),
            scope.spawn(|| flood(&|| pour(&metrics, b"GET /metrics HTTP/1.1\r\n\r\n"))),
            scope.spawn(|| flood(&|| hold(&metrics))),
        ];
        let start = Instant::now();
        let mut copies = 0;
        let mut slowest = Duration::ZERO;
        while start.elapsed() < FLOOD {
            let begun = Instant::now();
            let bytes = pattern(copies as u8, 512);
            vm.store(512, &bytes);
            assert!(vm.load(512, 512) == bytes);
            copies += 1;
            slowest = slowest.max(begun.elapsed());
        }
        over.store(true, Ordering::Relaxed);
        let floods = floods.map(|flood| flood.join().unwrap());
        println!("{copies} copies, the slowest in {slowest:?}; {floods:?}");
        assert!(slowest < TIMEOUT, "a copy took {slowest:?}");
        assert!(floods.iter().all(|times| *times > 0), "{floods:?}");
    });

    wait("the end of what is left of the flood", || {
        daemon.descriptors() <= descriptors
    });
    let mut stream = UnixStream::connect(&control).unwrap();
    stream.write_all(b"{\"command\":\"info\"}\n").unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    assert!(line.contains("interface_version"), "{line}");
    let grown = daemon.peak() - peak;
    assert!(grown < ROOM, "{grown} bytes more");
    drop(vm);
    daemon.end();
}

#[test]
fn device_memory_of_16_gib_takes_what_is_used_of_it() {
    let daemon = Daemon::start("16G", Stdio::null());
    let frames = (16 << 30) / PAGE as u64;
    for seed in 1..3 {
        let mut vm = daemon.connect();
        for frame in [0, frames / 2, frames - 512] {
            assert!(vm.load(frame, 512) == vec![0; 512 * PAGE], "another VM's");
            vm.store(frame, &pattern(seed, 512));
        }
        for frame in [0, frames / 2, frames - 512] {
            assert!(vm.load(frame, 512) == pattern(seed, 512));
        }
    }
    let peak = daemon.peak();
    assert!(peak < 2 * ROOM, "{peak} bytes");
    daemon.end();
}

/// The log goes to a disk that is full.
#[test]
fn a_log_that_cannot_be_written_stops_nothing() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let daemon = Daemon::start("8M", full.into());
    for seed in 1..4 {
        // Ends in a line of the log.
        let mut peer = UnixStream::connect(daemon.path("vhost")).unwrap();
        peer.write_all(&[0xff; 4096]).ok();
        drop(peer);
        let mut vm = daemon.connect();
        vm.store(0, &pattern(seed, 1));
        assert!(vm.load(0, 1) == pattern(seed, 1));
    }
    daemon.end();
}
