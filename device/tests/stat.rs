//! `hmm-stat` beside a running daemon.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn daemon(directory: &Path) -> Daemon {
    let child = Command::new(env!("CARGO_BIN_EXE_vhost-device-hmm"))
        .arg("--socket-path")
        .arg(directory.join("device"))
        .arg("--control-socket")
        .arg(directory.join("control"))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let daemon = Daemon(child);
    let start = Instant::now();
    while !directory.join("control").exists() {
        assert!(start.elapsed() < Duration::from_secs(20), "no daemon");
        thread::sleep(Duration::from_millis(5));
    }
    daemon
}

fn stat(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hmm-stat"))
        .arg(directory.join("control"))
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn a_line_comes_for_each_interval() {
    let directory = tempfile::tempdir().unwrap();
    let _daemon = daemon(directory.path());
    let output = stat(directory.path(), &["-s", "0.05", "-n", "3"]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), 2 + 3, "{text}");
    assert!(text.contains("wait50"));

    let output = stat(directory.path(), &["-s", "0.05", "-n", "2", "--json"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), 2, "{text}");
    for line in text.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["requests"], 0.0);
        assert_eq!(line["memory_used"], 0);
    }
}

#[test]
fn what_cannot_be_read_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let output = stat(directory.path(), &["-n", "1"]);
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.starts_with("hmm-stat: cannot ask the device at "),
        "{text}"
    );
    assert_eq!(text.lines().count(), 1, "{text}");
    for interval in ["0", "-1", "x", "1e9"] {
        let output = stat(directory.path(), &[&format!("--interval={interval}")]);
        assert_eq!(output.status.code(), Some(2), "{interval}");
    }
}
