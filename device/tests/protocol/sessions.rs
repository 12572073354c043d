//! One VM after another, and the control socket.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
};

use crate::harness::*;

#[test]
fn d17_memory_is_cleared_and_its_generation_changes_between_vms() {
    let device = Device::start();
    assert_eq!(device.counters()["session"], 0);
    let mut vm = Vm::connect(&device);
    vm.store(0, &pattern(1, 512));
    vm.store(1536, &pattern(2, 512));
    let uuid = vm.config(24, 16);
    assert_eq!(vm.config(40, 8), 1_u64.to_le_bytes());
    let status = device.counters();
    assert_eq!(status["session"], 1);
    assert_eq!(status["connected"], true);
    assert_eq!(status["generation"], 1);
    assert_eq!(status["memory_size"], MEMORY_SIZE);
    assert_eq!(status["copy_queues"], COPY_QUEUES);
    drop(vm);
    device.wait_for_disconnect();

    // Gone, but what it did can still be read.
    let status = device.counters();
    assert_eq!(status["session"], 1);
    assert_eq!(status["counters"]["to_device"]["frames"], 1024);

    let mut vm = Vm::connect(&device);
    let status = device.counters();
    assert_eq!(status["session"], 2);
    assert_eq!(status["generation"], 2);
    assert_eq!(status["counters"]["to_device"]["frames"], 0);
    assert_eq!(vm.config(40, 8), 2_u64.to_le_bytes());
    assert_eq!(vm.config(24, 16), uuid);
    for frame in [0, 512, 1024, 1536] {
        assert!(
            vm.load(frame, 512).iter().all(|byte| *byte == 0),
            "frame {frame}"
        );
    }
}

#[test]
fn sessions_leave_no_descriptors_behind() {
    let device = Device::start();
    let open = || fs::read_dir("/proc/self/fd").unwrap().count();
    let session = || {
        drop(Vm::connect(&device));
        device.wait_for_disconnect();
    };
    session();
    // Other tests of this process open and close descriptors meanwhile.
    let before = open();
    for _ in 0..100 {
        session();
    }
    assert!(
        open() < before + 100,
        "{before} descriptors have become {}",
        open()
    );
}

#[test]
fn a_peer_that_does_not_speak_vhost_user_ends_only_its_own_session() {
    let device = Device::start();
    for bytes in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 4096]] {
        let mut peer = UnixStream::connect(device.socket()).unwrap();
        peer.write_all(bytes).ok();
        drop(peer);
    }
    let mut vm = Vm::connect(&device);
    vm.store(0, &pattern(1, 1));
    assert!(vm.load(0, 1) == pattern(1, 1));
}

#[test]
fn the_control_socket_answers_line_by_line() {
    let device = Device::start();
    let info = device.ask(r#"{"command":"info"}"#);
    assert_eq!(info["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(info["pid"], std::process::id());
    assert_eq!(info["memory_size"], MEMORY_SIZE);

    let mut stream = device.control();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut next = || serde_json::from_str::<serde_json::Value>(&lines.next().unwrap().unwrap());
    stream.write_all(b"{\"command\":\"coun").unwrap();
    stream
        .write_all(b"ters\"}\nnonsense\n{\"command\":\"dance\"}\n{\"command\":\"info\"}\n")
        .unwrap();
    assert_eq!(next().unwrap()["session"], 0);
    assert!(next().unwrap()["error"].is_string());
    assert!(next().unwrap()["error"].is_string());
    assert_eq!(next().unwrap()["pid"], std::process::id());
}

#[test]
fn a_long_line_is_refused_however_it_arrives() {
    let device = Device::start();
    let line = [&[b' '; 5000][..], b"\n"].concat();
    for piece in [2500, 5001] {
        let mut stream = device.control();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        for bytes in line.chunks(piece) {
            stream.write_all(bytes).ok();
        }
        let mut reply = String::new();
        stream.read_to_string(&mut reply).ok();
        assert!(reply.contains("too long"), "{piece}: {reply}");
    }
}

#[test]
fn an_endless_line_ends_the_control_connection() {
    let device = Device::start();
    let mut stream = device.control();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(&[b'x'; 5000]).unwrap();
    let mut reply = String::new();
    // The rest of the line may reset the connection after the reply.
    stream.read_to_string(&mut reply).ok();
    assert!(reply.contains("too long"), "{reply}");
    assert_eq!(device.counters()["session"], 0, "others are served");
}

#[test]
fn clients_that_say_nothing_keep_nobody_from_the_control_socket() {
    let device = Device::start();
    let silent: Vec<_> = (0..100).map(|_| device.control()).collect();
    assert_eq!(device.counters()["session"], 0);
    drop(silent);
    assert_eq!(device.counters()["session"], 0);
}
