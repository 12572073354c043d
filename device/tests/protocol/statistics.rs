//! What the device counts for itself.

use std::io::{Read, Write};

use serde_json::Value;
use vhost_device_hmm::{
    abi::*,
    hardware::{Events, NAMES},
    link::Config,
};

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
    for frames in [1, 1, 2, 16, 32, 512] {
        fill(&mut vm, COPY, frames);
    }
    fill(&mut vm, COPY + 1, 3);
    vm.store(0, &pattern(1, 1));
    let mut seen = Value::Null;
    // An answer is there before its call is counted.
    wait("the last call is counted", || {
        seen = statistics(&device);
        let calls = ["calls", "calls_suppressed"];
        let counted = calls.map(|name| number(&seen, &format!("/queues/2/ring/{name}")));
        counted.iter().sum::<u64>() == 7
    });
    for (queue, operation, size, requests, frames) in [
        (2, "fill", "4K", 2, 2),
        (2, "fill", "64K", 2, 18),
        (2, "fill", "2M", 2, 544),
        (3, "fill", "64K", 1, 3),
        (2, "to_device", "4K", 1, 1),
    ] {
        let at = format!("/queues/{queue}/operations/{operation}/sizes/{size}");
        assert_eq!(number(&seen, &format!("{at}/requests")), requests, "{at}");
        assert_eq!(number(&seen, &format!("{at}/frames")), frames, "{at}");
        assert_eq!(number(&seen, &format!("{at}/bytes")), 4096 * frames);
        // A small one is not timed if the worker was still awake when it came.
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
            if size == "2M" {
                assert_eq!(times, requests, "{at}");
            }
            assert!(times <= requests, "{at}");
        }
    }
    // A queue was busy for as long as all its requests took.
    let copied = |at: &str| number(&seen, &format!("{at}/copy/sum_ns"));
    let busy = copied("/queues/3/operations/fill/sizes/64K");
    assert_eq!(number(&seen, "/queues/3/busy_ns"), busy);
    let large = copied("/queues/2/operations/fill/sizes/2M");
    assert!(large > 0 && number(&seen, "/queues/2/busy_ns") >= large);
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
    fill(&mut vm, COPY, 2);
    let head = vm.place(&Request::new(VIRTIO_HMM_OP_FILL, &[(0, 1)]).encode());
    let response = vm.place(&[0; 9]);
    let heads: Vec<u16> = (0..QUEUE_SIZE).map(|chain| chain & !1).collect();
    for chain in heads.iter().step_by(2) {
        vm.describe(COPY, *chain, &[head], &[response]);
    }
    vm.offer_at_once(COPY, &heads);
    vm.kick(COPY);
    wait("the requests", || vm.used(COPY) == QUEUE_SIZE + 1);
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

#[test]
fn the_processor_counts_where_it_can() {
    let (events, _) = Events::all().available();
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    vm.store(0, &pattern(1, 512));
    let seen = statistics(&device);
    let text = scrape(&device, "GET /metrics HTTP/1.1\r\n\r\n");
    for name in NAMES {
        let count = seen.pointer(&format!("/queues/2/hardware/{name}"));
        let metric = format!("hmm_worker_{name}_total{{queue=\"2\"}}");
        if events.names().any(|counted| counted == name) {
            assert!(count.and_then(Value::as_u64).is_some(), "{name} in {seen}");
            assert!(text.contains(&metric), "{text}");
        } else {
            assert_eq!(count, None, "{name}");
            assert!(!text.contains(&metric), "{text}");
        }
    }
}

/// What the metrics socket answers to a request.
fn scrape(device: &Device, request: &str) -> String {
    let mut stream = device.metrics();
    stream.write_all(request.as_bytes()).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    reply
}

#[test]
fn metrics_say_what_the_statistics_say() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    for frames in [1, 1, 3, 512] {
        fill(&mut vm, COPY, frames);
    }
    fill(&mut vm, COPY + 1, 0);
    device.inject("error=2,count=1");
    fill(&mut vm, COPY, 3);
    let reply = scrape(&device, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, text) = reply.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text"));
    assert!(head.contains(&format!("Content-Length: {}\r\n", text.len())));
    for line in [
        r#"hmm_requests_total{queue="2",operation="fill",size="4K"} 2"#,
        r#"hmm_requests_total{queue="2",operation="fill",size="64K"} 2"#,
        r#"hmm_frames_total{queue="2",operation="fill",size="64K"} 4"#,
        r#"hmm_moved_bytes_total{queue="2",operation="fill",size="2M"} 2097152"#,
        r#"hmm_request_copy_seconds_count{queue="2",operation="fill",size="2M"} 1"#,
        r#"hmm_request_copy_seconds_bucket{le="+Inf",queue="2",operation="fill",size="2M"} 1"#,
        r#"hmm_failed_requests_total{queue="3",status="invalid"} 1"#,
        r#"hmm_failed_frames_total{queue="2",status="fault"} 2"#,
        r#"hmm_injected_total{fault="error"} 1"#,
        r#"hmm_ring_occupancy_max{queue="2"} 1"#,
        r#"hmm_busy_seconds_total{queue="1"} 0.0"#,
        "hmm_connected 1",
        "hmm_memory_size_bytes 8388608",
        "# TYPE hmm_request_wait_seconds histogram",
    ] {
        assert!(text.lines().any(|l| l == line), "no {line} in\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
    // Buckets only grow.
    let labels = r#"queue="2",operation="fill",size="4K""#;
    let buckets = text.lines().filter(|line| {
        line.starts_with("hmm_request_copy_seconds_bucket") && line.contains(labels)
    });
    let counts: Vec<u64> = buckets
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    assert!(counts.len() > 20 && counts.is_sorted(), "{counts:?}");
}

#[test]
fn other_requests_to_the_metrics_socket_are_refused() {
    let device = Device::start();
    for request in [
        "GET /secrets HTTP/1.1\r\n\r\n",
        "POST /metrics HTTP/1.1\r\n\r\n",
    ] {
        assert!(scrape(&device, request).starts_with("HTTP/1.1 404 "));
    }
    assert_eq!(scrape(&device, &"x".repeat(4096)), "");
    let half = device.metrics();
    (&half).write_all(b"GET /met").unwrap();
    drop(half);
    assert!(scrape(&device, "GET / HTTP/1.0\r\n\r\n").starts_with("HTTP/1.1 200 "));
}

#[test]
fn clients_that_never_read_keep_nobody_from_the_metrics() {
    let device = Device::start();
    let mut lazy = Vec::new();
    for _ in 0..100 {
        let mut stream = device.metrics();
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        lazy.push(stream);
        let silent = device.metrics();
        lazy.push(silent);
    }
    let reply = scrape(&device, "GET /metrics HTTP/1.1\r\n\r\n");
    assert!(reply.starts_with("HTTP/1.1 200 "));
    assert_eq!(device.counters()["session"], 0);
}
