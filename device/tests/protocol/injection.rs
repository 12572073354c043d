//! Faults on purpose: each does what `docs/fault-injection.md` says, and nothing
//! else.

use std::{
    thread,
    time::{Duration, Instant},
};

use vhost_device_hmm::abi::*;

use crate::harness::*;

/// Long enough for a device to do what it must not do.
const PAUSE: Duration = Duration::from_millis(50);
/// Longer than any test.
const FOREVER: &str = "1000s";

const OK: u8 = VIRTIO_HMM_FRAME_OK;
const FAULT: u8 = VIRTIO_HMM_FRAME_FAULT;
const NOT_DONE: u8 = VIRTIO_HMM_FRAME_NOT_DONE;
const POISONED: u8 = VIRTIO_HMM_FRAME_POISONED;

fn fill(frame: u64, count: u32) -> Request {
    Request::new(VIRTIO_HMM_OP_FILL, &[(frame, count)])
}

/// Copies frames from the device over bytes 0xee.
fn read(vm: &mut Vm, frame: u64, frames: u32) -> (Response, Vec<u8>) {
    let data = vm.place(&vec![0xee; frames as usize * PAGE]);
    let request = Request::new(VIRTIO_HMM_OP_FROM_DEVICE, &[(frame, frames)]);
    let response = vm.request(COPY, &request, &[], &[data]);
    (response, vm.read(data.0, data.1))
}

/// A request that copies frames to `data`, made available and not waited for.
fn begin_read(vm: &mut Vm, head: u16, frames: u32) -> Buffer {
    let request = Request::new(VIRTIO_HMM_OP_FROM_DEVICE, &[(0, frames)]);
    let request = vm.place(&request.encode());
    let response = vm.place(&vec![0xee; 8 + frames as usize]);
    let data = vm.place(&vec![0xee; frames as usize * PAGE]);
    vm.offer_buffers(COPY, head, &[request], &[response, data]);
    vm.kick(COPY);
    data
}

/// Nothing more is used on the queue, nor written to `data`.
fn nothing_happens(vm: &Vm, data: Buffer) {
    let (used, bytes) = (vm.used(COPY), vec![0x77; data.1]);
    vm.write(data.0, &bytes);
    thread::sleep(PAUSE);
    assert_eq!(vm.used(COPY), used);
    assert!(vm.read(data.0, data.1) == bytes, "written too late");
}

/// What the whole of a request with these statuses says.
fn partial(statuses: &[u8]) -> Response {
    Response {
        status: VIRTIO_HMM_S_PARTIAL,
        frames_done: statuses.iter().filter(|status| **status == OK).count() as u32,
        statuses: statuses.to_vec(),
        written: 8 + statuses.len(),
    }
}

/// Each page of `bytes` is that of `done` if its status is OK, else that of `not`.
fn check_pages(bytes: &[u8], statuses: &[u8], done: &[u8], not: &[u8]) {
    assert_eq!(bytes.len(), statuses.len() * PAGE);
    for (page, status) in statuses.iter().enumerate() {
        let range = page * PAGE..(page + 1) * PAGE;
        let expected = if *status == OK { done } else { not };
        assert!(bytes[range.clone()] == expected[range], "page {page}");
    }
}

#[test]
fn delay_lets_other_requests_pass() {
    let device = Device::start_with(&["delay=200ms,op=from_device,count=1"]);
    let mut vm = Vm::connect(&device);
    vm.store(0, &pattern(1, 4));
    let start = Instant::now();
    let data = begin_read(&mut vm, 100, 4);
    assert_eq!(vm.request(COPY, &fill(9, 1), &[], &[]), Response::ok(1, 0));
    assert!(vm.read(data.0, data.1).iter().all(|byte| *byte == 0xee));
    assert_eq!(vm.next_used(COPY), (100, 8 + 4 + 4 * PAGE));
    assert!(start.elapsed() >= Duration::from_millis(200));
    assert!(vm.read(data.0, data.1) == pattern(1, 4));
    assert_eq!(device.struck("delay"), 1);
}

#[test]
fn d16_a_delayed_request_is_complete_when_its_queue_has_stopped() {
    let device = Device::start_with(&[&format!("delay={FOREVER},op=from_device")]);
    let mut vm = Vm::connect(&device);
    vm.store(0, &pattern(1, 4));
    for round in 1..=2 {
        let data = begin_read(&mut vm, 0, 4);
        wait("the fault", || device.struck("delay") == round);
        let before = vm.used(COPY);
        vm.stop(COPY);
        assert_eq!(vm.used(COPY), before + 1);
        assert!(vm.read(data.0, data.1) == pattern(1, 4));
        nothing_happens(&vm, data);
        vm.set_up(COPY);
        assert_eq!(vm.request(COPY, &fill(9, 1), &[], &[]), Response::ok(1, 0));
    }
}

#[test]
fn a_reordered_request_comes_after_the_next_one() {
    let device = Device::start_with(&[&format!("reorder={FOREVER}")]);
    let mut vm = Vm::connect(&device);
    let head = vm.place(&fill(0, 1).encode());
    let response = vm.place(&[0; 9]);
    for chain in 0..6 {
        vm.offer_buffers(COPY, 2 * chain, &[head], &[response]);
    }
    vm.kick(COPY);
    let order: Vec<_> = (0..6).map(|_| vm.next_used(COPY).0 / 2).collect();
    assert_eq!(order, [1, 0, 3, 2, 5, 4]);
    assert_eq!(device.struck("reorder"), 3);
}

#[test]
fn a_reordered_request_without_a_next_one_comes_nevertheless() {
    let device = Device::start_with(&["reorder"]);
    let mut vm = Vm::connect(&device);
    vm.store(0, &pattern(1, 3));
    assert!(vm.load(0, 3) == pattern(1, 3));
    assert_eq!(device.struck("reorder"), 2);
}

#[test]
fn frames_in_error_are_not_touched_and_the_others_done() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    let (old, new) = (pattern(1, 32), pattern(2, 32));
    vm.store(0, &old);
    device.inject("error=5");

    let data = vm.place(&new);
    let request = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(0, 32)]);
    let to = vm.request(COPY, &request, &[data], &[]);
    assert_eq!(
        to.statuses
            .iter()
            .filter(|status| **status == FAULT)
            .count(),
        5
    );
    assert_eq!(to, partial(&to.statuses));
    let (from, bytes) = read(&mut vm, 0, 32);
    assert_eq!(from, partial(&from.statuses));
    assert_ne!(from.statuses, to.statuses, "chosen anew");
    let filled = vm.request(COPY, &fill(0, 32), &[], &[]);
    assert_eq!(filled, partial(&filled.statuses));
    device.cure();

    // What it read, and what was left after it was filled.
    let mut expected = new.clone();
    for (page, status) in to.statuses.iter().enumerate() {
        if *status != OK {
            expected[page * PAGE..][..PAGE].copy_from_slice(&old[page * PAGE..][..PAGE]);
        }
    }
    check_pages(&bytes, &from.statuses, &expected, &[0xee; 32 * PAGE]);
    check_pages(
        &vm.load(0, 32),
        &filled.statuses,
        &[0; 32 * PAGE],
        &expected,
    );
    assert_eq!(device.struck("error"), 3);
    let counters = vm.counters();
    assert_eq!(u64::from(counters.fill.frames), 27);
    assert_eq!(u64::from(counters.fill.errors), 1);
}

#[test]
fn more_errors_than_frames_are_all_frames() {
    let device = Device::start_with(&["error=99"]);
    let mut vm = Vm::connect(&device);
    let response = vm.request(COPY, &fill(0, 4), &[], &[]);
    assert_eq!(response, partial(&[FAULT; 4]));
}

#[test]
fn an_error_status_comes_alone() {
    for (name, number) in [
        ("invalid", VIRTIO_HMM_S_INVALID),
        ("unsupported", VIRTIO_HMM_S_UNSUPPORTED),
        ("range", VIRTIO_HMM_S_RANGE),
        ("12345", 12345),
    ] {
        let device = Device::start();
        let mut vm = Vm::connect(&device);
        vm.store(0, &pattern(1, 2));
        device.inject(&format!("status={name}"));
        let refused = Response {
            status: number,
            frames_done: 0,
            statuses: Vec::new(),
            written: 8,
        };
        assert_eq!(vm.request(COPY, &fill(0, 2), &[], &[]), refused);
        assert_eq!(read(&mut vm, 0, 2), (refused, vec![0xee; 2 * PAGE]));
        assert_eq!(device.struck("status"), 2);
        device.cure();
        assert!(vm.load(0, 2) == pattern(1, 2));
        assert_eq!(u64::from(vm.counters().fill.errors), 1);
    }
}

#[test]
fn a_short_copy_does_the_first_frames() {
    for (rule, frames, done) in [
        ("short", 8, 4),
        ("short", 1, 0),
        ("short=3", 8, 3),
        ("short=0", 8, 0),
    ] {
        let device = Device::start();
        let mut vm = Vm::connect(&device);
        vm.store(0, &pattern(1, 8));
        device.inject(rule);
        let (response, bytes) = read(&mut vm, 0, frames);
        let mut statuses = vec![NOT_DONE; frames as usize];
        statuses[..done].fill(OK);
        assert_eq!(response, partial(&statuses));
        check_pages(&bytes, &statuses, &pattern(1, 8), &[0xee; 8 * PAGE]);
    }
}

#[test]
fn a_short_copy_that_is_long_enough_is_whole() {
    let device = Device::start_with(&["short=8"]);
    let mut vm = Vm::connect(&device);
    vm.store(0, &pattern(1, 8));
    assert!(vm.load(0, 8) == pattern(1, 8));
    assert_eq!(device.struck("short"), 2);
}

#[test]
fn a_dropped_request_is_done_in_part_and_never_answered() {
    for (share, done) in [("none", 0), ("half", 4), ("all", 8)] {
        let device = Device::start();
        let mut vm = Vm::connect(&device);
        vm.store(0, &pattern(1, 8));
        let before = vm.used(COPY);
        device.inject(&format!("drop={share},op=from_device,count=1"));
        let data = begin_read(&mut vm, 100, 8);
        wait("the fault", || device.struck("drop") == 1);
        // Others are answered.
        assert_eq!(vm.request(COPY, &fill(9, 1), &[], &[]), Response::ok(1, 0));
        assert_eq!(vm.used(COPY), before + 1);
        let bytes = vm.read(data.0, data.1);
        assert!(bytes[..done * PAGE] == pattern(1, 8)[..done * PAGE]);
        assert!(bytes[done * PAGE..].iter().all(|byte| *byte == 0xee));
        assert_eq!(u64::from(vm.counters().from_device.requests), 0);
        vm.stop(COPY);
        nothing_happens(&vm, data);
        assert_eq!(vm.used(COPY), before + 1);
    }
}

/// What the device has counted of copies to it.
fn counted(device: &Device) -> [u64; 2] {
    let reply = device.ask(r#"{"command":"counters"}"#);
    ["requests", "frames"].map(|name| reply["counters"]["to_device"][name].as_u64().unwrap())
}

#[test]
fn a_lost_request_is_answered_and_neither_done_nor_counted() {
    let device = Device::start_with(&["lose,op=to_device,count=1"]);
    let mut vm = Vm::connect(&device);
    vm.store(0, &pattern(1, 4));
    assert!(vm.load(0, 4).iter().all(|&byte| byte == 0));
    assert_eq!(counted(&device), [0, 0]);
    vm.store(0, &pattern(1, 4));
    assert!(vm.load(0, 4) == pattern(1, 4));
    assert_eq!((counted(&device), device.struck("lose")), ([1, 4], 1));
}

#[test]
fn a_doubled_request_is_counted_twice() {
    let device = Device::start_with(&["double,op=to_device,count=1"]);
    let mut vm = Vm::connect(&device);
    vm.store(0, &pattern(1, 4));
    assert!(vm.load(0, 4) == pattern(1, 4));
    assert_eq!((counted(&device), device.struck("double")), ([2, 8], 1));
    vm.store(0, &pattern(2, 4));
    assert_eq!(counted(&device), [3, 12]);
}

#[test]
fn a_stalled_queue_goes_on_after_a_reset() {
    let device = Device::start_with(&["stall,queue=2,count=1,after=1"]);
    let mut vm = Vm::connect(&device);
    vm.store(0, &pattern(1, 4));
    let data = begin_read(&mut vm, 0, 4);
    nothing_happens(&vm, data);
    vm.kick(COPY);
    nothing_happens(&vm, data);
    assert_eq!(
        vm.request(COPY + 1, &fill(9, 1), &[], &[]),
        Response::ok(1, 0)
    );
    vm.stop(COPY);
    nothing_happens(&vm, data);
    vm.set_up(COPY);
    assert!(vm.load(0, 4) == pattern(1, 4));
    assert_eq!(device.struck("stall"), 1);
}

#[test]
fn a_stalled_queue_goes_on_when_the_device_is_well() {
    let device = Device::start_with(&["stall,after=1"]);
    let mut vm = Vm::connect(&device);
    vm.store(0, &pattern(1, 4));
    let data = begin_read(&mut vm, 100, 4);
    nothing_happens(&vm, data);
    device.cure();
    assert_eq!(vm.next_used(COPY).0, 100);
    assert!(vm.read(data.0, data.1) == pattern(1, 4));
}

#[test]
fn d21_poisoned_frames_cannot_be_read_until_they_are_written() {
    let device = Device::start_with(&["poison=3,count=1"]);
    let mut vm = Vm::connect(&device);
    // Writing them succeeds: nobody knows yet.
    vm.store(0, &pattern(1, 16));
    assert_eq!(device.struck("poison"), 1);
    assert_eq!(device.ask(r#"{"command":"inject"}"#)["poisoned_frames"], 3);

    let (response, bytes) = read(&mut vm, 0, 16);
    let statuses = response.statuses.clone();
    assert_eq!(response, partial(&statuses));
    let poisoned: Vec<_> = (0..16).filter(|at| statuses[*at] == POISONED).collect();
    assert_eq!(poisoned.len(), 3);
    check_pages(&bytes, &statuses, &pattern(1, 16), &[0xee; 16 * PAGE]);
    assert_eq!(read(&mut vm, 0, 16).0, response, "they stay so");

    let op = VIRTIO_HMM_OP_DEVICE_TO_DEVICE;
    let request = Request::with_sources(op, &[(100, 16)], &[(0, 16)]);
    assert_eq!(vm.request(COPY, &request, &[], &[]), response);
    let mut expected = pattern(1, 16);
    for frame in &poisoned {
        expected[frame * PAGE..][..PAGE].fill(0);
    }
    assert!(vm.load(100, 16) == expected, "the copy");

    // A copy to the frame, a fill and a discard make each well again.
    vm.store(poisoned[0] as u64, &pattern(2, 1));
    vm.request(COPY, &fill(poisoned[1] as u64, 1), &[], &[]);
    let request = Request::new(VIRTIO_HMM_OP_DISCARD, &[(poisoned[2] as u64, 1)]);
    vm.request(CONTROL, &request, &[], &[]);
    expected[poisoned[0] * PAGE..][..PAGE].copy_from_slice(&pattern(2, 1));
    assert!(vm.load(0, 16) == expected);
}

#[test]
fn frames_can_be_poisoned_when_they_are_read() {
    let device = Device::start_with(&["poison,op=from_device,count=1"]);
    let mut vm = Vm::connect(&device);
    vm.store(0, &pattern(1, 4));
    let (response, _) = read(&mut vm, 0, 4);
    assert_eq!(response.frames_done, 3);
    assert_eq!(read(&mut vm, 0, 4).0, response);
    device.cure();
    assert!(vm.load(0, 4) == pattern(1, 4));
}

#[test]
fn a_dead_device_does_nothing_until_the_next_vm() {
    let device = Device::start_with(&["dead,after=2"]);
    for _ in 0..2 {
        let mut vm = Vm::connect(&device);
        vm.store(0, &pattern(1, 4));
        assert!(vm.load(0, 4) == pattern(1, 4));
        let data = begin_read(&mut vm, 0, 4);
        nothing_happens(&vm, data);
        for queue in [CONTROL, COPY, COPY + 1] {
            vm.stop(queue);
            vm.set_up(queue);
            let request = vm.place(&fill(0, 1).encode());
            let response = vm.place(&[0xee; 9]);
            vm.offer_buffers(queue, 0, &[request], &[response]);
            vm.kick(queue);
        }
        nothing_happens(&vm, data);
        assert_eq!(
            [CONTROL, COPY, COPY + 1].map(|queue| vm.used(queue)),
            [0; 3]
        );
        assert_eq!(device.struck("dead"), 1);
        assert_eq!(device.ask(r#"{"command":"inject"}"#)["dead"], true);
        drop(vm);
        device.wait_for_disconnect();
    }
}

#[test]
fn a_dead_device_lives_when_it_is_well() {
    let device = Device::start_with(&["dead,count=1"]);
    let mut vm = Vm::connect(&device);
    let data = begin_read(&mut vm, 5, 1);
    nothing_happens(&vm, data);
    device.cure();
    assert_eq!(vm.next_used(COPY).0, 5);
}

#[test]
fn control_requests_are_struck_when_named() {
    let device = Device::start_with(&["status=invalid,op=discard"]);
    let mut vm = Vm::connect(&device);
    vm.counters();
    let request = Request::new(VIRTIO_HMM_OP_DISCARD, &[(0, 1)]);
    let response = vm.request(CONTROL, &request, &[], &[]);
    assert_eq!(
        (response.status, response.written),
        (VIRTIO_HMM_S_INVALID, 8)
    );
    assert_eq!(device.struck("status"), 1);
}

#[test]
fn malformed_requests_are_none_of_its_business() {
    let device = Device::start_with(&["status=range"]);
    let mut vm = Vm::connect(&device);
    let mut request = fill(0, 1);
    request.head.flags = 1.into();
    let response = vm.request(COPY, &request, &[], &[]);
    assert_eq!(response.status, VIRTIO_HMM_S_INVALID);
    assert_eq!(device.struck("status"), 0);
}

#[test]
fn the_same_seed_makes_the_same_choices() {
    let rules = ["error=7,probability=0.3", "short=2,probability=0.2"];
    let run = |device: &Device| -> Vec<_> {
        let mut vm = Vm::connect(device);
        let outcome = (0..100)
            .map(|_| vm.request(COPY, &fill(0, 32), &[], &[]).statuses)
            .collect();
        drop(vm);
        device.wait_for_disconnect();
        outcome
    };
    let device = Device::start_with(&rules);
    let first = run(&device);
    let struck = first
        .iter()
        .filter(|statuses| **statuses != [OK; 32])
        .count();
    assert!((20..80).contains(&struck), "{struck} of 100");
    assert_eq!(run(&device), first, "the next VM");
    assert_eq!(run(&Device::start_with(&rules)), first, "another daemon");
}

#[test]
fn the_control_socket_takes_rules_and_refuses_bad_ones() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    for (rule, reason) in [
        ("explode", "unknown fault"),
        ("stall,queue=4", "is ever on queue 4"),
    ] {
        let reply = device.inject(rule);
        assert!(reply["error"].as_str().unwrap().contains(reason), "{reply}");
    }
    vm.store(0, &pattern(1, 1));

    let reply = device.inject("error,after=1");
    assert_eq!(reply["seed"], SEED);
    assert_eq!(reply["rules"][0]["rule"], "error,after=1");
    vm.store(0, &pattern(1, 1));
    assert_eq!(vm.request(COPY, &fill(0, 1), &[], &[]), partial(&[FAULT]));
    let reply = device.ask(r#"{"command":"inject"}"#);
    assert_eq!(reply["rules"][0]["concerned"], 2);
    assert_eq!(reply["rules"][0]["struck"], 1);

    let reply = device.ask(r#"{"command":"inject","clear":true,"rule":"status=range"}"#);
    assert_eq!(reply["rules"].as_array().unwrap().len(), 1);
    let response = vm.request(COPY, &fill(0, 1), &[], &[]);
    assert_eq!(response.status, VIRTIO_HMM_S_RANGE);
    assert_eq!(device.cure()["rules"].as_array().unwrap().len(), 0);
    assert_eq!(vm.request(COPY, &fill(0, 1), &[], &[]), Response::ok(1, 0));
}
