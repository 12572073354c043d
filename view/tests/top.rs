//! `hmm-top` on a terminal.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod device;

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsFd,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use device::Device;
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    pty::{OpenptyResult, Winsize, openpty},
    sys::{
        signal::{Signal, kill},
        termios::{Termios, tcgetattr},
    },
    unistd::Pid,
};

const DEADLINE: Duration = Duration::from_secs(20);
/// What a program sends when it takes the whole screen, and when it gives it back.
const TAKE: &str = "\x1b[?1049h";
const GIVE_BACK: &str = "\x1b[?1049l";

/// `hmm-top` on a terminal of its own.
struct Top {
    child: Child,
    pty: OpenptyResult,
    before: Termios,
    written: Receiver<Vec<u8>>,
    screen: String,
}

impl Top {
    fn start(device: &Device) -> Self {
        let size = Winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(&size, None).unwrap();
        let before = tcgetattr(pty.slave.as_fd()).unwrap();
        let terminal = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = Command::new(env!("CARGO_BIN_EXE_hmm-top"))
            .args(["-s", "0.05"])
            .arg(device.control())
            .stdin(terminal())
            .stdout(terminal())
            .stderr(terminal())
            .spawn()
            .unwrap();
        let mut output = File::from(pty.master.try_clone().unwrap());
        let (to_test, written) = mpsc::channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count) = output.read(&mut bytes) {
                if to_test.send(bytes[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            child,
            pty,
            before,
            written,
            screen: String::new(),
        }
    }

    /// Waits until this was written. Between words there may be movements of the cursor.
    fn shows(&mut self, text: &str) {
        let start = Instant::now();
        while !self.screen.contains(text) {
            assert!(start.elapsed() < DEADLINE, "no {text:?}");
            let bytes = self.written.recv_timeout(DEADLINE).unwrap();
            self.screen += &String::from_utf8_lossy(&bytes);
        }
    }

    fn press(&self, keys: &[u8]) {
        File::from(self.pty.master.try_clone().unwrap())
            .write_all(keys)
            .unwrap();
    }

    /// Waits for its end, and sees that it has given the terminal back.
    fn end(mut self) -> ExitStatus {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < DEADLINE, "it goes on");
            thread::sleep(Duration::from_millis(5));
        };
        self.shows(GIVE_BACK);
        assert_eq!(tcgetattr(self.pty.slave.as_fd()).unwrap(), self.before);
        status
    }
}

impl Drop for Top {
    fn drop(&mut self) {
        // It may have ended, but not if a test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn keys_and_signals_end_it_and_the_terminal_is_as_before() {
    let device = Device::start();
    for (keys, status) in [(&b"q"[..], 0), (b"\x03", 130)] {
        let mut top = Top::start(&device);
        top.shows(TAKE);
        top.shows("latency");
        top.shows("p99.9");
        assert_ne!(tcgetattr(top.pty.slave.as_fd()).unwrap(), top.before);
        top.press(b"x\t");
        top.press(keys);
        assert_eq!(top.end().code(), Some(status));
    }
    for (signal, status) in [(Signal::SIGTERM, 143), (Signal::SIGHUP, 129)] {
        let mut top = Top::start(&device);
        top.shows("latency");
        kill(Pid::from_raw(top.child.id().try_into().unwrap()), signal).unwrap();
        assert_eq!(top.end().code(), Some(status));
    }
}

#[test]
fn it_ends_with_its_terminal() {
    let device = Device::start();
    let OpenptyResult { master, slave } = openpty(None, None).unwrap();
    // Otherwise it has the other end as well, and the terminal is never gone.
    fcntl(&master, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_hmm-top"))
        .arg(device.control())
        .stdin(slave.try_clone().unwrap())
        .stdout(slave.try_clone().unwrap())
        .stderr(slave)
        .spawn()
        .unwrap();
    let mut master = File::from(master);
    let mut bytes = [0; 4096];
    let mut screen = String::new();
    while !screen.contains(TAKE) {
        let count = master.read(&mut bytes).unwrap();
        screen += &String::from_utf8_lossy(&bytes[..count]);
    }
    drop(master);
    // What a shell sends to its jobs then.
    kill(
        Pid::from_raw(child.id().try_into().unwrap()),
        Signal::SIGHUP,
    )
    .unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > DEADLINE {
            child.kill().unwrap();
        }
        thread::sleep(Duration::from_millis(5));
    }
    let status = child.wait().unwrap();
    assert!(matches!(status.code(), Some(1 | 129)), "{status}");
}

#[test]
fn it_goes_on_when_the_device_goes_away() {
    let device = Device::start();
    let mut top = Top::start(&device);
    top.shows("latency");
    drop(device);
    top.shows("cannot");
    top.press(b"q");
    assert!(top.end().success());
}

#[test]
fn what_it_cannot_show_is_told_without_taking_the_terminal() {
    let device = Device::start();
    let end = |command: &mut Command| {
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.stdout.is_empty(), "{text}");
        (output.status.code(), text)
    };
    let top = || Command::new(env!("CARGO_BIN_EXE_hmm-top"));
    let (status, text) = end(top().arg(device.control()));
    assert_eq!(status, Some(1));
    assert_eq!(
        text,
        "hmm-top: standard output is no terminal; hmm-stat prints lines\n"
    );
    assert_eq!(end(&mut top()).0, Some(2));
    assert_eq!(end(top().args(["-s", "0", "x"])).0, Some(2));
}
