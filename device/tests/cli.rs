//! The daemon as a program: options, errors, signals.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{MetadataExt, PermissionsExt, chown},
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::{
        signal::{Signal, kill},
        stat::{Mode, umask},
    },
    unistd::{Pid, dup2_raw, geteuid},
};
use seccompiler::{SeccompAction, SeccompFilter, TargetArch, apply_filter};
use vhost::{VhostBackend, vhost_user::Frontend};
use vhost_device_hmm::hardware::Events;

const DEADLINE: Duration = Duration::from_secs(20);

fn daemon(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-device-hmm"));
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Waits for the end of a daemon, or ends it in anger.
fn finish(mut child: Child) -> Output {
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > DEADLINE {
            child.kill().unwrap();
            panic!("still running: {:?}", child.wait_with_output());
        }
        thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

fn run(arguments: &[&str]) -> Output {
    finish(daemon(arguments).spawn().unwrap())
}

/// The daemon ends with one line that says all of `words`.
fn fails(arguments: &[&str], words: &[&str]) {
    let output = run(arguments);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{arguments:?}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("vhost-device-hmm: "), "{text}");
    for word in words {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
}

fn connect(path: &Path) -> UnixStream {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(e) => assert!(start.elapsed() < DEADLINE, "{e}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
}

#[test]
fn capabilities_are_json() {
    let output = run(&["--print-capabilities"]);
    assert!(output.status.success());
    let capabilities: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(capabilities["type"], "misc");
    assert!(capabilities["features"].is_array());
}

#[test]
fn unusable_sizes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let socket = socket.to_str().unwrap();
    for size in ["0", "1M", "3M", "4097", "2T"] {
        fails(
            &["-s", socket, "--memory-size", size],
            &["memory size", "multiple of 2M"],
        );
    }
    for size in ["", "M", "-2M", "two", "2Mi", "99999999999T"] {
        fails(
            &["-s", socket, &format!("--memory-size={size}")],
            &["--memory-size"],
        );
    }
    fails(&["-s", socket, "--memory-size", "1T"], &["available"]);
    assert!(!Path::new(socket).exists());
}

#[test]
fn other_options_are_checked_too() {
    fails(&[], &["required"]);
    fails(&["-s", "/tmp/x", "--fd", "3"], &["cannot be used with"]);
    fails(&["-s", "/tmp/x", "--copy-queues", "0"], &["--copy-queues"]);
    fails(&["-s", "/tmp/x", "--copy-queues", "17"], &["--copy-queues"]);
    fails(&["-s", "/tmp/x", "--log-level", "loud"], &["--log-level"]);
    fails(&["-s", "/tmp/x", "--seccomp", "trap"], &["--seccomp"]);
    fails(
        &["-s", "/tmp/x", "--bandwidth", "1023K"],
        &["--bandwidth", "less than 1M"],
    );
    fails(
        &["-s", "/tmp/x", "--latency", "10"],
        &["--latency", "not a time"],
    );
    fails(
        &["-s", "/tmp/x", "--inject", "explode"],
        &["--inject", "unknown fault", "delay, reorder"],
    );
    fails(
        &["-s", "/tmp/x", "--inject", "drop,probability=2"],
        &["--inject", "probability needs a number from 0 to 1"],
    );
    fails(
        &["-s", "/proc/socket", "--inject-seed", "x"],
        &["--inject-seed"],
    );
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    fails(
        &["-s", socket.to_str().unwrap(), "--inject", "drop,queue=4"],
        &["no request for copies is ever on queue 4"],
    );
}

#[test]
fn help_and_documentation_name_every_fault() {
    let output = run(&["--help"]);
    let help = String::from_utf8(output.stdout).unwrap();
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/fault-injection.md");
    let page = fs::read_to_string(page).unwrap();
    let faults = "delay reorder error status short drop lose double stall poison dead";
    let conditions = "op queue probability after count";
    for word in faults.split(' ').chain(conditions.split(' ')) {
        let lines = |mut text: std::str::Lines, start: &str| text.any(|l| l.starts_with(start));
        assert!(
            help.lines().any(|l| l.trim_start().starts_with(word)),
            "{word}"
        );
        assert!(lines(page.lines(), &format!("| `{word}")), "{word}");
    }
}

#[test]
fn the_seed_of_faults_is_logged() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let mut command = daemon(&["-s", socket.to_str().unwrap(), "--inject", "stall"]);
    let child = command.args(["--inject-seed", "4711"]).spawn().unwrap();
    connect(&socket);
    signal(&child, Signal::SIGTERM);
    let output = finish(child);
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(log.contains("injecting stall, seed 4711"), "{log}");
}

#[test]
fn unusable_sockets_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let socket = path.to_str().unwrap();
    fails(&["-s", "/proc/socket"], &["cannot listen on /proc/socket"]);
    fails(
        &["-s", &format!("{socket}/below/nothing")],
        &["cannot listen on", "No such file"],
    );
    let listener = UnixListener::bind(&path).unwrap();
    fails(&["-s", socket], &["in use"]);
    let other = dir.path().join("other");
    let other = other.to_str().unwrap();
    fails(&["-s", other, "--control-socket", socket], &["in use"]);
    assert!(
        !Path::new(other).exists(),
        "the socket that could be made stayed"
    );
    drop(listener);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    fails(&["-s", socket], &["not a socket"]);
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[test]
fn hardware_counters_that_are_missing_are_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, control) = (dir.path().join("socket"), dir.path().join("control"));
    let (_, missing) = Events::all().available();
    for (flag, told) in [(None, missing), (Some("--no-hardware-counters"), None)] {
        let mut command = daemon(&["-s", socket.to_str().unwrap(), "--control-socket"]);
        let child = command.arg(&control).args(flag).spawn().unwrap();
        // Who answers has started.
        let mut stream = connect(&control);
        stream.write_all(b"{\"command\":\"info\"}\n").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        signal(&child, Signal::SIGTERM);
        let log = String::from_utf8(finish(child).stderr).unwrap();
        let lines = log.lines().filter(|line| line.contains("no counters of"));
        let lines: Vec<_> = lines.collect();
        assert_eq!(lines.len(), usize::from(told.is_some()), "{log}");
        assert!(told.is_none_or(|told| lines[0].ends_with(&told)), "{log}");
    }
}

#[test]
fn metrics_are_served_on_loopback_alone() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let socket = socket.to_str().unwrap();
    let tcp = |address| ["-s", socket, "--metrics-tcp", address];
    for address in [
        "0.0.0.0:0",
        "192.0.2.1:9464",
        "[::]:9464",
        "[2001:db8::1]:1",
    ] {
        fails(&tcp(address), &[address, "not a loopback address"]);
    }
    for address in ["127.0.0.1", "9464", "127.0.0.1:x", "127.0.0.1:65536"] {
        fails(&tcp(address), &["--metrics-tcp", "socket address"]);
    }
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    fails(&tcp(&address), &["cannot listen on", &address, "in use"]);

    let mut child = daemon(&tcp("127.0.0.1:0")).spawn().unwrap();
    let log = BufReader::new(child.stderr.take().unwrap()).lines();
    let address = log.map(Result::unwrap).find_map(|line| {
        let (_, address) = line.split_once("metrics at http://")?;
        Some(address.strip_suffix("/metrics").unwrap().to_owned())
    });
    let mut stream = TcpStream::connect(address.unwrap()).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 200 "), "{reply}");
    assert!(reply.ends_with("# EOF\n"), "{reply}");
    signal(&child, Signal::SIGTERM);
    assert!(finish(child).status.success());
}

#[test]
fn unusable_descriptors_are_refused() {
    fails(&["--fd", "0"], &["not a listening socket"]);
    fails(&["--fd", "77"], &["77", "Bad file descriptor"]);
    fails(&["--fd=-1"], &["not a listening socket"]);
}

#[test]
fn a_stale_socket_is_replaced_and_sigterm_removes_the_sockets() {
    for (number, connected) in [
        (Signal::SIGTERM, false),
        (Signal::SIGTERM, true),
        (Signal::SIGINT, true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (socket, control) = (dir.path().join("socket"), dir.path().join("control"));
        drop(UnixListener::bind(&socket).unwrap());
        let arguments = [
            "-s",
            socket.to_str().unwrap(),
            "--control-socket",
            control.to_str().unwrap(),
        ];
        let child = daemon(&arguments)
            .arg("--prefault")
            .arg("--memory-size=4M")
            .spawn()
            .unwrap();
        // The control socket comes last.
        let _control = connect(&control);
        let vmm = connected.then(|| {
            let vmm = Frontend::connect(&socket, 4).unwrap();
            vmm.set_owner().unwrap();
            // This has an answer, so the session has begun.
            vmm.get_features().unwrap();
            vmm
        });
        signal(&child, number);
        let output = finish(child);
        assert!(output.status.success(), "{output:?}");
        assert!(output.stdout.is_empty());
        assert!(!socket.exists() && !control.exists());
        drop(vmm);
    }
}

#[test]
fn an_inherited_socket_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let fd = listener.as_raw_fd();
    let mut command = daemon(&["--fd", "9", "--memory-size", "2M"]);
    // SAFETY: dup2 is async-signal-safe, and 9 is free or the same socket in
    // the child, which has nothing else of use but its standard streams.
    unsafe {
        command.pre_exec(move || {
            let listener = std::os::fd::BorrowedFd::borrow_raw(fd);
            std::mem::forget(dup2_raw(listener, 9)?);
            Ok(())
        });
    }
    let child = command.spawn().unwrap();
    drop(listener);
    drop(session(&path));
    signal(&child, Signal::SIGTERM);
    let output = finish(child);
    assert!(output.status.success(), "{output:?}");
    assert!(path.exists(), "the socket is its maker's to remove");
}

/// Starts a VM's connection, to which the daemon answers.
fn session(socket: &Path) -> Frontend {
    let vmm = Frontend::connect(socket, 4).unwrap();
    vmm.set_owner().unwrap();
    assert_ne!(vmm.get_features().unwrap(), 0);
    vmm
}

/// What the kernel says of a process.
fn status(child: &Child, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.unwrap().trim_start_matches(':').trim().to_owned()
}

#[test]
fn only_the_user_can_connect_and_no_privilege_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let [socket, control, metrics] = ["socket", "control", "metrics"].map(|n| dir.path().join(n));
    let mut command = daemon(&["--memory-size", "2M"]);
    command.arg("-s").arg(&socket);
    command.arg("--control-socket").arg(&control);
    command.arg("--metrics-socket").arg(&metrics);
    // SAFETY: umask is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            umask(Mode::empty());
            Ok(())
        });
    }
    let child = command.spawn().unwrap();
    connect(&metrics);
    let vmm = session(&socket);
    for path in [&socket, &control, &metrics] {
        let mode = fs::metadata(path).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o600, "{}", path.display());
    }
    assert_eq!(status(&child, "Seccomp"), "2");
    assert_eq!(status(&child, "NoNewPrivs"), "1");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status(&child, set), "0000000000000000", "{set}");
    }
    if geteuid().is_root() {
        assert_eq!(status(&child, "CapBnd"), "0000000000000000");
    }
    drop(vmm);
    signal(&child, Signal::SIGTERM);
    assert!(finish(child).status.success());
    assert!(!socket.exists() && !control.exists() && !metrics.exists());
}

#[test]
fn a_normal_user_can_run_it() {
    const NOBODY: u32 = 65534;
    let dir = tempfile::tempdir().unwrap();
    let mut command = daemon(&[]);
    if geteuid().is_root() {
        // The user may not reach the place where it was built.
        let program = dir.path().join("daemon");
        fs::copy(env!("CARGO_BIN_EXE_vhost-device-hmm"), &program).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        command = Command::new(program);
        command.stderr(Stdio::piped()).uid(NOBODY).gid(NOBODY);
    }
    let socket = dir.path().join("socket");
    command.args(["--prefault", "--memory-size=2M", "-s"]);
    let child = command.arg(&socket).spawn().unwrap();
    connect(&socket);
    if geteuid().is_root() {
        assert_eq!(fs::metadata(&socket).unwrap().uid(), NOBODY);
    }
    drop(session(&socket));
    drop(session(&socket));
    signal(&child, Signal::SIGTERM);
    let output = finish(child);
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{log}");
    assert!(!log.contains("running as root"), "{log}");
    assert!(!socket.exists());
}

#[test]
fn a_kernel_without_landlock_is_told_of_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let mut command = daemon(&["--memory-size", "2M", "-s", socket.to_str().unwrap()]);
    let rules = [(libc::SYS_landlock_create_ruleset, Vec::new())].into();
    let errno = SeccompAction::Errno(libc::ENOSYS as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, errno, TargetArch::x86_64);
    let program: seccompiler::BpfProgram = filter.unwrap().try_into().unwrap();
    // SAFETY: to install a filter takes two system calls and no allocation.
    unsafe {
        command.pre_exec(move || apply_filter(&program).map_err(std::io::Error::other));
    }
    let child = command.spawn().unwrap();
    connect(&socket);
    drop(session(&socket));
    signal(&child, Signal::SIGTERM);
    let output = finish(child);
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{log}");
    assert_eq!(log.matches("no Landlock").count(), 1, "{log}");
}
