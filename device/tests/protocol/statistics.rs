//! What the device counts for itself.

use serde_json::Value;
use vhost_device_hmm::{abi::*, link::Config};

use crate::harness::*;

fn statistics(device: &Device) -> Value {
    device.ask(r#"{"command":"statistics"}"#)
}

fn number(value: &Value, pointer: &str) -> u64 {
    let number = value.pointer(pointer).and_then(Value::as_u64);
    number.unwrap_or_else(|| panic!("no {pointer} in {value}"))
}

fn fill(vm: &mut Vm, queue: u32, frames: u32) -> Response {
    let request = Request::new(VIRTIO_HMM_OP_FILL, &[(0, frames)]);
    vm.request(queue, &request, &[], &[])
}

#[test]
fn requests_are_counted_by_queue_operation_and_size() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    for frames in [1, 1, 2, 16, 17, 512] {
        fill(&mut vm, COPY, frames);
    }
    fill(&mut vm, COPY + 1, 3);
    vm.store(0, &pattern(1, 1));
    let seen = statistics(&device);
    for (queue, operation, size, requests, frames) in [
        (2, "fill", "4K", 2, 2),
        (2, "fill", "64K", 2, 18),
        (2, "fill", "2M", 2, 529),
        (3, "fill", "64K", 1, 3),
        (2, "to_device", "4K", 1, 1),
    ] {
        let at = format!("/queues/{queue}/operations/{operation}/sizes/{size}");
        assert_eq!(number(&seen, &format!("{at}/requests")), requests, "{at}");
        assert_eq!(number(&seen, &format!("{at}/frames")), frames, "{at}");
        // Each came alone, and so was timed.
        for distribution in ["wait", "copy"] {
            let buckets = seen
                .pointer(&format!("{at}/{distribution}/buckets"))
                .unwrap();
            let times: u64 = buckets
                .as_array()
                .unwrap()
                .iter()
                .map(|b| number(b, "/1"))
                .sum();
            assert_eq!(times, requests, "{at}");
        }
        assert!(number(&seen, &format!("{at}/copy/sum_ns")) > 0);
    }
    assert_eq!(seen.pointer("/queues/3/operations/to_device"), None);
    assert_eq!(number(&seen, "/queues/2/ring/occupancy_max"), 1);
    assert_eq!(number(&seen, "/queues/2/ring/full"), 0);
    let kicks = number(&seen, "/queues/2/ring/kicks");
    assert!((1..=8).contains(&kicks), "{kicks}");
    // The driver wanted to be called after the first, and never said so again.
    assert_eq!(number(&seen, "/queues/2/ring/calls"), 1);
    assert_eq!(number(&seen, "/queues/2/ring/calls_suppressed"), 6);
}

#[test]
fn small_requests_in_a_row_are_counted_one_by_one_and_timed_now_and_then() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    let head = vm.place(&Request::new(VIRTIO_HMM_OP_FILL, &[(0, 1)]).encode());
    let response = vm.place(&[0; 9]);
    for chain in 0..QUEUE_SIZE {
        vm.offer_buffers(COPY, chain & !1, &[head], &[response]);
    }
    vm.kick(COPY);
    wait("the requests", || vm.used(COPY) == QUEUE_SIZE);
    let seen = statistics(&device);
    let at = "/queues/2/operations/fill/sizes/4K";
    assert_eq!(
        number(&seen, &format!("{at}/requests")),
        u64::from(QUEUE_SIZE)
    );
    let buckets = seen.pointer(&format!("{at}/copy/buckets")).unwrap();
    let times: u64 = buckets
        .as_array()
        .unwrap()
        .iter()
        .map(|b| number(b, "/1"))
        .sum();
    // The first for itself, then one of 64 for all of them.
    assert_eq!(times, 1 + 64 * ((u64::from(QUEUE_SIZE) - 1) / 64));
    assert_eq!(
        number(&seen, "/queues/2/ring/occupancy_max"),
        u64::from(QUEUE_SIZE)
    );
    assert_eq!(number(&seen, "/queues/2/ring/full"), 1);
}

#[test]
fn failures_are_counted_by_what_the_status_says() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    fill(&mut vm, COPY, 0);
    fill(&mut vm, COPY, 513);
    vm.request(COPY, &Request::new(99, &[(0, 1)]), &[], &[]);
    vm.request(
        COPY,
        &Request::new(VIRTIO_HMM_OP_FILL, &[(1 << 40, 1)]),
        &[],
        &[],
    );
    let request = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(0, 3)]);
    vm.request(COPY, &request, &[(RAM_END - PAGE as u64, 3 * PAGE)], &[]);
    device.inject("short=1");
    fill(&mut vm, COPY, 4);
    device.cure();
    device.inject("status=77");
    fill(&mut vm, COPY, 4);
    let seen = statistics(&device);
    for (failure, count) in [
        ("invalid", 2),
        ("unsupported", 1),
        ("range", 1),
        ("partial", 2),
        ("other", 1),
        ("frames_fault", 2),
        ("frames_not_done", 3),
        ("frames_poisoned", 0),
    ] {
        let at = format!("/queues/2/failures/{failure}");
        assert_eq!(number(&seen, &at), count, "{failure}");
    }
    assert_eq!(number(&seen, "/injected/short"), 1);
}

#[test]
fn waiting_and_copying_are_told_apart() {
    let device = Device::start_with(&["delay=500ms,count=1"]);
    let mut vm = Vm::connect(&device);
    fill(&mut vm, COPY, 1);
    let seen = statistics(&device);
    let at = "/queues/2/operations/fill/sizes/4K";
    // An injected delay is neither: the device was not at work.
    assert!(number(&seen, &format!("{at}/copy/max_ns")) < 500_000_000);
    drop(vm);
    drop(device);

    // Nor is the time on a modelled link.
    let latency = std::time::Duration::from_millis(500);
    let device = Device::start_behind(Config {
        bandwidth: None,
        latency,
    });
    let mut vm = Vm::connect(&device);
    fill(&mut vm, COPY, 1);
    assert!(number(&statistics(&device), &format!("{at}/copy/max_ns")) < 500_000_000);
}

#[test]
fn memory_in_use_is_told_and_begins_anew_with_each_vm() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    assert_eq!(number(&statistics(&device), "/memory/used"), 0);
    vm.store(0, &pattern(1, 512));
    let seen = statistics(&device);
    assert_eq!(number(&seen, "/memory/size"), MEMORY_SIZE);
    assert_eq!(number(&seen, "/memory/used"), 2 << 20);
    let request = Request::new(VIRTIO_HMM_OP_DISCARD, &[(0, 256)]);
    vm.request(CONTROL, &request, &[], &[]);
    let seen = statistics(&device);
    assert_eq!(number(&seen, "/memory/used"), 1 << 20);
    assert_eq!(number(&seen, "/memory/peak"), 2 << 20);
    assert_eq!(number(&seen, "/memory/cleared"), 1 << 20);
    assert!(number(&seen, "/time_ns") > 0);
    drop(vm);
    device.wait_for_disconnect();
    let _vm = Vm::connect(&device);
    let seen = statistics(&device);
    assert_eq!(number(&seen, "/session"), 2);
    assert_eq!(number(&seen, "/memory/peak"), 0);
    assert_eq!(seen["queues"][2]["operations"], serde_json::json!({}));
}
