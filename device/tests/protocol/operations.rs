//! Each operation, byte by byte.

use vhost_device_hmm::abi::*;

use crate::harness::*;

#[test]
fn d1_configuration_is_as_specified_and_zero_padded() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    let bytes = vm.config(0, 256);
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert_eq!(
        (word(0), word(4)),
        (VIRTIO_HMM_VERSION, VIRTIO_HMM_FRAME_SIZE)
    );
    assert_eq!(long(8), MEMORY_SIZE);
    assert_eq!((word(16), word(20)), (COPY_QUEUES, VIRTIO_HMM_MAX_FRAMES));
    let info = device.ask(r#"{"command":"info"}"#);
    let uuid: String = bytes[24..40]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(info["uuid"].as_str().unwrap().replace('-', ""), uuid);
    assert_eq!(long(40), 1);
    assert!(bytes[48..].iter().all(|byte| *byte == 0));

    assert_eq!(vm.config(8, 8), &bytes[8..16]);
    assert_eq!(vm.config(44, 12), &bytes[44..56]);
}

#[test]
fn d22_writes_to_the_configuration_change_nothing() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    let before = vm.config(0, 256);
    for (offset, len) in [(0, 256), (0, 1), (8, 8), (255, 1)] {
        vm.set_config(offset, &vec![0xa5; len]);
    }
    assert_eq!(vm.config(0, 256), before);
    vm.store(0, &pattern(1, 1));
}

#[test]
fn d9_to_device_and_d10_from_device_move_every_byte() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    let bytes = pattern(1, 512);
    vm.store(512, &bytes);
    assert!(vm.load(512, 512) == bytes);
    assert!(
        vm.load(511, 1).iter().all(|byte| *byte == 0),
        "the frame before"
    );
    assert!(
        vm.load(1024, 1).iter().all(|byte| *byte == 0),
        "the frame after"
    );
}

#[test]
fn d9_extents_take_the_data_in_order() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    let bytes = pattern(2, 6);
    let data = vm.place(&bytes);
    let request = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(9, 1), (100, 3), (3, 2)]);
    assert_eq!(vm.request(COPY, &request, &[data], &[]), Response::ok(6, 0));
    assert!(vm.load(9, 1) == bytes[..PAGE]);
    assert!(vm.load(100, 3) == bytes[PAGE..4 * PAGE]);
    assert!(vm.load(3, 2) == bytes[4 * PAGE..]);
}

#[test]
fn d11_fill_sets_frames_to_zero() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    let bytes = pattern(3, 8);
    vm.store(0, &bytes);
    let request = Request::new(VIRTIO_HMM_OP_FILL, &[(1, 2), (6, 1)]);
    assert_eq!(vm.request(COPY, &request, &[], &[]), Response::ok(3, 0));
    let mut expected = bytes;
    expected[PAGE..3 * PAGE].fill(0);
    expected[6 * PAGE..7 * PAGE].fill(0);
    assert!(vm.load(0, 8) == expected);
}

#[test]
fn d12_device_to_device_pairs_frames_across_extents() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    let bytes = pattern(4, 6);
    vm.store(10, &bytes);
    let op = VIRTIO_HMM_OP_DEVICE_TO_DEVICE;
    let request = Request::with_sources(op, &[(100, 4), (200, 2)], &[(15, 1), (10, 5)]);
    assert_eq!(vm.request(COPY, &request, &[], &[]), Response::ok(6, 0));
    assert!(vm.load(100, 1) == bytes[5 * PAGE..]);
    assert!(vm.load(101, 3) == bytes[..3 * PAGE]);
    assert!(vm.load(200, 2) == bytes[3 * PAGE..5 * PAGE]);
    assert!(vm.load(10, 6) == bytes, "the source");
}

#[test]
fn d14_discarded_frames_read_as_zero() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    let bytes = pattern(5, 64);
    vm.store(0, &bytes);
    let request = Request::new(VIRTIO_HMM_OP_DISCARD, &[(1, 1), (32, 16)]);
    let response = vm.request(CONTROL, &request, &[], &[]);
    assert_eq!(
        (response.status, response.frames_done, response.written),
        (0, 17, 8)
    );
    let mut expected = bytes;
    expected[PAGE..2 * PAGE].fill(0);
    expected[32 * PAGE..48 * PAGE].fill(0);
    assert!(vm.load(0, 64) == expected);
    // All of the memory at once, more than a copy may name.
    let frames = (MEMORY_SIZE / PAGE as u64) as u32;
    let request = Request::new(VIRTIO_HMM_OP_DISCARD, &[(0, frames)]);
    let response = vm.request(CONTROL, &request, &[], &[]);
    assert_eq!((response.status, response.frames_done), (0, frames));
    assert!(vm.load(0, 64).iter().all(|byte| *byte == 0));
}

#[test]
fn d13_counters_are_exact_in_band_and_on_the_control_socket() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    vm.store(0, &pattern(6, 5));
    vm.load(0, 3);
    vm.load(1, 4);
    vm.request(COPY, &Request::new(VIRTIO_HMM_OP_FILL, &[(0, 2)]), &[], &[]);
    let op = VIRTIO_HMM_OP_DEVICE_TO_DEVICE;
    vm.request(
        COPY + 1,
        &Request::with_sources(op, &[(0, 1)], &[(9, 1)]),
        &[],
        &[],
    );
    vm.request(
        CONTROL,
        &Request::new(VIRTIO_HMM_OP_DISCARD, &[(0, 7)]),
        &[],
        &[],
    );
    vm.request(
        COPY,
        &Request::new(VIRTIO_HMM_OP_FILL, &[(u64::MAX, 2)]),
        &[],
        &[],
    );
    vm.request(COPY, &Request::new(77, &[(0, 1)]), &[], &[]);

    let counters = vm.counters();
    let json = device.counters();
    let names = [
        "to_device",
        "from_device",
        "fill",
        "device_to_device",
        "discard",
    ];
    let expected = [[1, 5, 0], [2, 7, 0], [2, 2, 1], [1, 1, 0], [1, 7, 0]];
    let in_band = [
        counters.to_device,
        counters.from_device,
        counters.fill,
        counters.device_to_device,
        counters.discard,
    ];
    for ((name, [requests, frames, errors]), wire) in names.iter().zip(expected).zip(in_band) {
        let bytes = frames * PAGE as u64;
        let values = [wire.requests, wire.frames, wire.bytes, wire.errors].map(u64::from);
        assert_eq!(values, [requests, frames, bytes, errors], "{name}");
        let members = ["requests", "frames", "bytes", "errors"];
        let values = members.map(|member| json["counters"][name][member].as_u64().unwrap());
        assert_eq!(values, [requests, frames, bytes, errors], "{name}");
    }
    assert_eq!(u64::from(counters.unsupported), 1);
    assert_eq!(json["counters"]["unsupported"], 1);
}

#[test]
fn d2_a_request_may_be_split_over_descriptors_in_any_way() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    let bytes = pattern(7, 3);
    let data = vm.place(&bytes);
    let request = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(2, 1), (5, 2)]);
    let head = vm.place(&request.encode());
    // Head and data in one stream, cut at odd places, empty pieces among them.
    let readable = [
        (head.0, 1),
        (head.0 + 1, 30),
        (head.0 + 31, 0),
        (head.0 + 31, head.1 - 31),
        (data.0, 1),
        (data.0 + 1, 4094),
        (data.0 + 4095, 5000),
        (data.0 + 9095, data.1 - 9095),
    ];
    let response = vm.place(&[0xee; 11]).0;
    let writable = [(response, 3), (response + 3, 6), (response + 9, 2)];
    let written = vm.run(COPY, &readable, &writable);
    assert_eq!(vm.response(response, 3, written), Response::ok(3, 0));
    assert!(vm.load(2, 1) == bytes[..PAGE]);
    assert!(vm.load(5, 2) == bytes[PAGE..]);

    // Back, with the statuses and the data in the same descriptors.
    let request = Request::new(VIRTIO_HMM_OP_FROM_DEVICE, &[(2, 1), (5, 2)]);
    let head = vm.place(&request.encode());
    let out = vm.place(&[0xee; 11 + 3 * PAGE]);
    let writable = [
        (out.0, 7),
        (out.0 + 7, 100),
        (out.0 + 107, 4096),
        (out.0 + 4203, out.1 - 4203),
    ];
    for indirect in [false, true] {
        vm.write(out.0, &vec![0xee; out.1]);
        let written = match indirect {
            false => vm.run(COPY, &[head], &writable),
            true => vm.run_indirect(COPY, &[head], &writable),
        };
        assert_eq!(vm.response(out.0, 3, written), Response::ok(3, 3 * PAGE));
        assert!(vm.read(out.0 + 11, 3 * PAGE) == bytes);
    }
}

#[test]
fn d2_512_scattered_pages_are_one_request() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    let bytes = pattern(8, 512);
    let data = vm.place(&bytes);
    // Page by page, backwards.
    let pages: Vec<_> = (0..512)
        .rev()
        .map(|page| (data.0 + page * PAGE as u64, PAGE))
        .collect();
    let request = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(0, 512)]);
    let head = vm.place(&request.encode());
    let response = vm.place(&[0xee; 8 + 512]);
    let readable: Vec<_> = [head].into_iter().chain(pages).collect();
    for indirect in [false, true] {
        let written = match indirect {
            false => vm.run(COPY, &readable, &[response]),
            true => vm.run_indirect(COPY + 1, &readable, &[response]),
        };
        assert_eq!(vm.response(response.0, 512, written), Response::ok(512, 0));
        let frames: Vec<_> = vm.load(0, 512).chunks(PAGE).map(<[u8]>::to_vec).collect();
        assert!(frames.iter().rev().flatten().eq(&bytes));
    }
}

#[test]
fn d2_data_may_cross_from_one_memory_region_into_the_next() {
    let device = Device::start();
    let mut vm = Vm::connect(&device);
    let bytes = pattern(9, 4);
    let start = RAM[1].0 - PAGE as u64 - 100;
    vm.write(start, &bytes);
    let request = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(0, 4)]);
    let response = vm.request(COPY, &request, &[(start, bytes.len())], &[]);
    assert_eq!(response, Response::ok(4, 0));
    vm.write(start, &vec![0; bytes.len()]);
    let request = Request::new(VIRTIO_HMM_OP_FROM_DEVICE, &[(0, 4)]);
    let response = vm.request(COPY, &request, &[], &[(start, bytes.len())]);
    assert_eq!(response, Response::ok(4, bytes.len()));
    assert!(vm.read(start, bytes.len()) == bytes);
}
