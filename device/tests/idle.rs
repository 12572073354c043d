//! A device that has nothing to do takes no time of its host, though its workers poll while
//! requests come. A program of its own, for it looks at the CPU time of all its threads.
#![allow(clippy::unwrap_used)]

mod cpu_time;
#[allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "the protocol's tests use more of it"
)]
#[path = "protocol/harness.rs"]
mod harness;

use std::{thread, time::Duration};

use cpu_time::cpu_time;
use harness::{COPY, Device, PAGE, Request, Vm, pattern};
use vhost_device_hmm::abi::VIRTIO_HMM_OP_FROM_DEVICE;

/// When it must be asleep after its last request.
const ASLEEP: Duration = Duration::from_millis(10);
/// How long is then looked at. It polls no longer than 1 ms when it is woken.
const WINDOW: Duration = Duration::from_millis(500);
const LEAST: Duration = Duration::from_millis(1);

#[test]
fn takes_no_cpu_time_when_idle() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    let before = cpu_time();
    vm.store(0, &pattern(1, 1));
    let request = vm.place(&Request::new(VIRTIO_HMM_OP_FROM_DEVICE, &[(0, 1)]).encode());
    let (response, data) = (vm.place(&[0; 9]), vm.place(&[0; PAGE]));
    vm.describe(COPY + 1, 0, &[request], &[response, data]);
    for done in 1..=2000 {
        vm.offer(COPY + 1, 0);
        vm.kick(COPY + 1);
        // The harness's way to wait would sleep, and the worker then as well.
        while vm.used(COPY + 1) != done {
            thread::yield_now();
        }
    }
    assert!(cpu_time().saturating_sub(before) > LEAST, "it did nothing");
    thread::sleep(ASLEEP);
    let before = cpu_time();
    thread::sleep(WINDOW);
    let used = cpu_time().saturating_sub(before);
    assert!(used < LEAST, "{used:?} of CPU time in {WINDOW:?}");
    assert_eq!(vm.load(0, 1), pattern(1, 1), "it does not wake up");
}
