//! `hmm-stat` beside a device.
#![allow(clippy::unwrap_used)]

mod device;

use std::{
    io::{BufRead, BufReader, Read},
    os::unix::net::UnixListener,
    path::Path,
    process::{Command, Output, Stdio},
};

use device::Device;

fn stat(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hmm-stat"));
    command.arg(socket).args(arguments);
    command
}

fn output(socket: &Path, arguments: &[&str]) -> Output {
    stat(socket, arguments).output().unwrap()
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

/// It ends with one line that says these words.
fn fails(socket: &Path, words: &str) {
    let output = output(socket, &["-s", "0.01", "-n", "1"]);
    assert_eq!(output.status.code(), Some(1));
    let text = text(output.stderr);
    assert!(text.starts_with("hmm-stat: "), "{text}");
    assert!(text.contains(words), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn a_line_comes_for_each_interval_and_a_head_for_each_page() {
    let device = Device::start();
    let lines = output(&device.control(), &["-s", "0.01", "-n", "21"]);
    assert!(lines.status.success(), "{lines:?}");
    let lines = text(lines.stdout);
    let heads = lines
        .lines()
        .enumerate()
        .filter(|(_, line)| line.contains("wait50"));
    let heads: Vec<usize> = heads.map(|(at, _)| at).collect();
    assert_eq!(heads, [0, 22], "{lines}");
    assert_eq!(lines.lines().count(), 2 * 2 + 21, "{lines}");
}

#[test]
fn lines_are_json_when_asked() {
    let device = Device::start();
    for flag in ["-J", "--json"] {
        let lines = output(&device.control(), &["-s", "0.05", "-n", "2", flag]);
        let lines = text(lines.stdout);
        assert_eq!(lines.lines().count(), 2, "{lines}");
        for line in lines.lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(line["requests"], 0.0);
            assert_eq!(line["memory_used"], 0);
            assert_eq!(line["memory_size"], 4 << 20);
            // Control, events, and two for copies.
            assert_eq!(line["queues"].as_array().unwrap().len(), 4);
            assert_eq!(line["queues"][3]["copy_p999"], 0);
        }
    }
}

#[test]
fn it_ends_when_nobody_reads_it() {
    let device = Device::start();
    let mut child = stat(&device.control(), &["-s", "0.01"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    lines.read_line(&mut String::new()).unwrap();
    drop(lines);
    assert!(child.wait().unwrap().success());
}

#[test]
fn it_ends_when_the_device_goes_away() {
    let device = Device::start();
    let mut child = stat(&device.control(), &["-s", "0.01"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    lines.read_line(&mut String::new()).unwrap();
    drop(device);
    lines.read_to_end(&mut Vec::new()).unwrap();
    let end = child.wait_with_output().unwrap();
    assert_eq!(end.status.code(), Some(1));
    let text = text(end.stderr);
    assert!(text.starts_with("hmm-stat: "), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn what_cannot_be_read_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("control");
    fails(&socket, "cannot ask the device at ");
    std::fs::write(&socket, "").unwrap();
    fails(&socket, "Connection refused");
    std::fs::remove_file(&socket).unwrap();
    // Somebody who hangs up.
    let listener = UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let output = output(&socket, &["-n", "1"]);
    server.join().unwrap();
    assert!(text(output.stderr).starts_with("hmm-stat: "));
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn unusable_options_are_refused() {
    for interval in ["0", "-1", "x", "1e9", "NaN"] {
        let end = output(Path::new("x"), &[&format!("--interval={interval}")]);
        assert_eq!(end.status.code(), Some(2), "{interval}");
    }
    assert_eq!(output(Path::new("x"), &["-n", "0"]).status.code(), Some(2));
}
