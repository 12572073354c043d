//! The rings: broken chains, notifications, reset.

use std::{thread, time::Duration};

use vhost_device_hmm::abi::*;

use crate::harness::*;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Long enough for a device to do what it must not do.
const PAUSE: Duration = Duration::from_millis(50);

fn fill() -> Request {
    Request::new(VIRTIO_HMM_OP_FILL, &[(0, 1)])
}

/// The device stops the queue that has been given something broken, serves the
/// others, and this one again once it has been set up anew.
fn stops_the_queue(give: impl FnOnce(&mut Vm)) {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    give(&mut vm);
    vm.kick(COPY);
    thread::sleep(PAUSE);
    assert_eq!(vm.used(COPY), 0, "the broken chain was used");

    let head = vm.place(&fill().encode());
    let response = vm.place(&[0xee; 9]);
    vm.offer_buffers(COPY, 900, &[head], &[response]);
    vm.kick(COPY);
    thread::sleep(PAUSE);
    assert_eq!(vm.used(COPY), 0, "the queue went on");
    assert_eq!(vm.read(response.0, 9), [0xee; 9]);

    assert_eq!(vm.request(COPY + 1, &fill(), &[], &[]), Response::ok(1, 0));
    assert_eq!(u64::from(vm.counters().fill.requests), 1);
    vm.stop(COPY);
    vm.set_up(COPY);
    assert_eq!(vm.request(COPY, &fill(), &[], &[]), Response::ok(1, 0));
}

fn give_chain(vm: &mut Vm, head: u16, chain: &[Descriptor]) {
    vm.write_descriptors(vm.table(COPY), head, chain);
    vm.offer(COPY, head);
}

#[test]
fn d15_a_loop_stops_the_queue() {
    stops_the_queue(|vm| {
        let (at, _) = vm.place(&fill().encode());
        give_chain(vm, 0, &[(at, 48, NEXT, 1), (at, 48, NEXT, 0)]);
    });
}

#[test]
fn d15_a_next_descriptor_outside_the_table_stops_the_queue() {
    stops_the_queue(|vm| {
        let (at, _) = vm.place(&fill().encode());
        let (response, _) = vm.place(&[0; 9]);
        give_chain(
            vm,
            0,
            &[(at, 48, NEXT, 1), (response, 9, WRITE | NEXT, QUEUE_SIZE)],
        );
    });
}

#[test]
fn d15_a_head_outside_the_table_stops_the_queue() {
    stops_the_queue(|vm| vm.offer(COPY, QUEUE_SIZE));
}

#[test]
fn d15_too_many_chains_at_once_stop_the_queue() {
    stops_the_queue(|vm| {
        for _ in 0..=QUEUE_SIZE {
            vm.offer(COPY, 0);
        }
    });
}

#[test]
fn d15_an_indirect_table_in_an_indirect_table_stops_the_queue() {
    stops_the_queue(|vm| {
        let (at, _) = vm.place(&fill().encode());
        let (response, _) = vm.place(&[0; 9]);
        let inner = vm.alloc(64);
        vm.write_descriptors(inner, 0, &[(at, 48, NEXT, 1), (response, 9, WRITE, 0)]);
        let outer = vm.alloc(64);
        vm.write_descriptors(outer, 0, &[(at, 0, NEXT, 1), (inner, 32, INDIRECT, 0)]);
        give_chain(vm, 0, &[(outer, 32, INDIRECT, 0)]);
    });
}

#[test]
fn d15_an_indirect_table_of_odd_length_stops_the_queue() {
    stops_the_queue(|vm| {
        let table = vm.alloc(64);
        vm.write_descriptors(table, 0, &[(table, 48, 0, 0)]);
        give_chain(vm, 0, &[(table, 17, INDIRECT, 0)]);
    });
}

#[test]
fn d15_an_indirect_table_outside_guest_memory_stops_the_queue() {
    stops_the_queue(|vm| give_chain(vm, 0, &[(RAM_END, 32, INDIRECT, 0)]));
}

#[test]
fn d15_a_chain_of_more_than_4_gib_stops_the_queue() {
    stops_the_queue(|vm| {
        let (response, _) = vm.place(&[0; 9]);
        let huge = u32::MAX - 7;
        give_chain(vm, 0, &[(RAM[0].0, huge, NEXT, 1), (response, 9, WRITE, 0)]);
    });
}

#[test]
fn d15_a_chain_of_more_than_1024_descriptors_stops_the_queue() {
    stops_the_queue(|vm| {
        let (response, _) = vm.place(&[0; 9]);
        let table = vm.alloc(16 * 1025);
        let mut chain: Vec<_> = (1..=1024).map(|next| (RAM[0].0, 0, NEXT, next)).collect();
        chain.push((response, 9, WRITE, 0));
        vm.write_descriptors(table, 0, &chain);
        give_chain(vm, 0, &[(table, 16 * 1025, INDIRECT, 0)]);
    });
}

#[test]
fn d15_no_room_for_a_response_stops_the_queue() {
    for room in [0, 7] {
        stops_the_queue(|vm| {
            let (at, _) = vm.place(&fill().encode());
            let (response, _) = vm.place(&[0; 9]);
            give_chain(vm, 0, &[(at, 48, NEXT, 1), (response, room, WRITE, 0)]);
        });
    }
}

#[test]
fn d15_a_response_outside_guest_memory_stops_the_queue() {
    for addr in [0, RAM_END - 7, RAM_END, u64::MAX - 4] {
        stops_the_queue(|vm| {
            let (at, _) = vm.place(&fill().encode());
            give_chain(vm, 0, &[(at, 48, NEXT, 1), (addr, 9, WRITE, 0)]);
        });
    }
}

#[test]
fn d18_with_event_idx_the_device_calls_when_asked() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    let head = vm.place(&fill().encode());
    let response = vm.place(&[0; 9]);
    // Only the third completion is wanted.
    vm.set_used_event(COPY, 2);
    for chain in 0..3 {
        assert_eq!(vm.calls(COPY), 0, "before completion {chain}");
        vm.run(COPY, &[head], &[response]);
    }
    let mut calls = 0;
    wait("a call", || {
        calls += vm.calls(COPY);
        calls > 0
    });
    assert_eq!(calls, 1);
}

#[test]
fn d18_without_event_idx_the_device_calls_every_time() {
    let device = Device::start();
    let mut vm = Vm::connect_with(&device, VERSION_1);
    let head = vm.place(&fill().encode());
    let response = vm.place(&[0; 9]);
    for _ in 0..3 {
        vm.run(COPY, &[head], &[response]);
        wait("a call", || vm.calls(COPY) == 1);
    }
}

#[test]
fn d18_many_chains_are_processed_after_one_kick() {
    for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
        let device = Device::start();
        let mut vm = Vm::connect_with(&device, features);
        let head = vm.place(&fill().encode());
        let response = vm.place(&[0; 9]);
        // More than once around the ring.
        for _ in 0..5 {
            for chain in 0..QUEUE_SIZE / 2 {
                vm.offer_buffers(COPY, 2 * chain, &[head], &[response]);
            }
            vm.kick(COPY);
            for chain in 0..QUEUE_SIZE / 2 {
                assert_eq!(vm.next_used(COPY), (2 * u32::from(chain), 9));
            }
        }
    }
}

#[test]
fn d20_the_event_queue_keeps_its_buffers() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    let buffer = vm.place(&[0xee; 64]);
    vm.offer_buffers(VIRTIO_HMM_QUEUE_EVENT, 0, &[], &[buffer]);
    vm.kick(VIRTIO_HMM_QUEUE_EVENT);
    thread::sleep(PAUSE);
    assert_eq!(vm.used(VIRTIO_HMM_QUEUE_EVENT), 0);
    assert_eq!(vm.read(buffer.0, 64), [0xee; 64]);
    assert_eq!(vm.stop(VIRTIO_HMM_QUEUE_EVENT), 0);
}

#[test]
fn d16_a_stopped_queue_writes_no_guest_memory() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    vm.store(0, &pattern(1, 512));
    let request = Request::new(VIRTIO_HMM_OP_FROM_DEVICE, &[(0, 512)]);
    let head = vm.place(&request.encode());
    let response = vm.place(&[0; 8 + 512]);
    let data = vm.place(&vec![0; 512 * PAGE]);
    let total = QUEUE_SIZE / 4;
    let mut stopped_in_between = 0;
    for _ in 0..10 {
        vm.stop(COPY);
        vm.set_up(COPY);
        for chain in 0..total {
            vm.offer_buffers(COPY, 4 * chain, &[head], &[response, data]);
        }
        vm.kick(COPY);
        wait("the first completion", || vm.used(COPY) > 0);
        let taken = vm.stop(COPY);
        // Every chain that was taken is complete, and nothing follows.
        assert_eq!(vm.used(COPY), taken);
        let clean = vec![0; 512 * PAGE];
        vm.write(data.0, &clean);
        thread::sleep(Duration::from_millis(20));
        assert!(
            vm.read(data.0, 512 * PAGE) == clean,
            "written after the stop"
        );
        assert_eq!(vm.used(COPY), taken);
        stopped_in_between += u32::from(taken < total);
    }
    assert!(stopped_in_between > 0, "no round stopped the queue at work");
    vm.set_up(COPY);
    assert!(vm.load(0, 512) == pattern(1, 512));
}
