//! Requests that are answered with an error. None moves a byte.

use vhost_device_hmm::abi::*;

use crate::harness::*;

const FRAMES: u64 = MEMORY_SIZE / PAGE as u64;

/// A device whose frames 0 to 15 hold a pattern, and data to overwrite them.
struct Case {
    vm: Vm,
    data: Buffer,
    _device: Device,
}

impl Case {
    fn new() -> Self {
        let device = Device::start();
        let mut vm = Vm::connect(&device);
        vm.store(0, &pattern(1, 16));
        let data = vm.place(&pattern(0x80, 16));
        Self {
            vm,
            data,
            _device: device,
        }
    }

    /// The device answers with `status`, having changed nothing.
    fn expect(&mut self, queue: u32, readable: &[Buffer], writable: &[Buffer], status: u32) {
        let response = writable[0].0;
        let written = self.vm.run(queue, readable, writable);
        let response = self.vm.response(response, 0, written);
        assert_eq!(
            (response.status, response.frames_done, written),
            (status, 0, 8)
        );
        assert!(
            self.vm.load(0, 16) == pattern(1, 16),
            "device memory changed"
        );
        assert!(
            self.vm.read(self.data.0, self.data.1) == pattern(0x80, 16),
            "guest changed"
        );
    }

    /// The device rejects `request`, with buffers as if it were right.
    fn reject(&mut self, queue: u32, request: &Request, status: u32) {
        let head = self.vm.place(&request.encode());
        let response = self.vm.place(&vec![0; 8 + request.statuses()]);
        let data = (self.data.0, (request.statuses() * PAGE).min(self.data.1));
        match u32::from(request.head.op) {
            VIRTIO_HMM_OP_TO_DEVICE => self.expect(queue, &[head, data], &[response], status),
            VIRTIO_HMM_OP_FROM_DEVICE => self.expect(queue, &[head], &[response, data], status),
            _ => self.expect(queue, &[head], &[response], status),
        }
    }
}

const COPIES: [u32; 3] = [
    VIRTIO_HMM_OP_TO_DEVICE,
    VIRTIO_HMM_OP_FROM_DEVICE,
    VIRTIO_HMM_OP_FILL,
];

#[test]
fn d5_operations_unknown_to_the_queue_are_unsupported() {
    let mut case = Case::new();
    for op in [
        0,
        5,
        VIRTIO_HMM_OP_COUNTERS,
        VIRTIO_HMM_OP_DISCARD,
        u32::MAX,
    ] {
        case.reject(COPY, &Request::new(op, &[(0, 1)]), VIRTIO_HMM_S_UNSUPPORTED);
    }
    for op in COPIES {
        case.reject(
            CONTROL,
            &Request::new(op, &[(0, 1)]),
            VIRTIO_HMM_S_UNSUPPORTED,
        );
    }
}

#[test]
fn d6_flags_and_reserved_fields_must_be_zero() {
    let mut case = Case::new();
    for op in COPIES {
        let mut request = Request::new(op, &[(0, 1), (1, 1)]);
        request.head.flags = 1.into();
        case.reject(COPY, &request, VIRTIO_HMM_S_INVALID);
        let mut request = Request::new(op, &[(0, 1), (1, 1)]);
        request.head.reserved = 0x8000_0000.into();
        case.reject(COPY, &request, VIRTIO_HMM_S_INVALID);
        let mut request = Request::new(op, &[(0, 1), (1, 1)]);
        request.extents[1].reserved = 1.into();
        case.reject(COPY, &request, VIRTIO_HMM_S_INVALID);
    }
}

#[test]
fn d6_counts_must_add_up() {
    let mut case = Case::new();
    for op in COPIES {
        for (extents, frames) in [
            (&[(0, 2), (4, 1)][..], 4),
            (&[(0, 2), (4, 3)], 4),
            (&[(0, 2), (4, 0)], 2),
            (&[(0, u32::MAX), (4, 3)], 2),
            (&[(0, 1), (1, 1), (2, 1)], 2),
            (&[(0, 1)], 0),
            (&[], 1),
            (&[], 0),
            (&[(0, 513)], 513),
        ] {
            let mut request = Request::new(op, extents);
            request.head.nr_frames = frames.into();
            case.reject(COPY, &request, VIRTIO_HMM_S_INVALID);
        }
    }
    // Counts that would need gigabytes of extents.
    let mut request = Request::new(VIRTIO_HMM_OP_FILL, &[(0, 1)]);
    request.head.nr_extents = u32::MAX.into();
    request.head.nr_src_extents = u32::MAX.into();
    case.reject(COPY, &request, VIRTIO_HMM_S_INVALID);
}

#[test]
fn d6_source_extents_belong_to_device_to_device_only() {
    let mut case = Case::new();
    for op in COPIES {
        let request = Request::with_sources(op, &[(0, 1)], &[(1, 1)]);
        case.reject(COPY, &request, VIRTIO_HMM_S_INVALID);
    }
    let op = VIRTIO_HMM_OP_DEVICE_TO_DEVICE;
    for sources in [&[][..], &[(20, 1)], &[(20, 3)], &[(20, 2), (30, 0)]] {
        let request = Request::with_sources(op, &[(0, 2)], sources);
        case.reject(COPY, &request, VIRTIO_HMM_S_INVALID);
    }
}

#[test]
fn d6_control_requests_are_checked_too() {
    let mut case = Case::new();
    let request = Request::new(VIRTIO_HMM_OP_DISCARD, &[(0, 1), (1, 0)]);
    case.reject(CONTROL, &request, VIRTIO_HMM_S_INVALID);
    case.reject(
        CONTROL,
        &Request::new(VIRTIO_HMM_OP_DISCARD, &[]),
        VIRTIO_HMM_S_INVALID,
    );
    // No room for the counters, and counters of frames.
    case.reject(
        CONTROL,
        &Request::new(VIRTIO_HMM_OP_COUNTERS, &[]),
        VIRTIO_HMM_S_INVALID,
    );
    case.reject(
        CONTROL,
        &Request::new(VIRTIO_HMM_OP_COUNTERS, &[(0, 1)]),
        VIRTIO_HMM_S_INVALID,
    );
    let request = Request::new(VIRTIO_HMM_OP_DISCARD, &[(FRAMES - 1, 2)]);
    case.reject(CONTROL, &request, VIRTIO_HMM_S_RANGE);
}

#[test]
fn d7_frames_outside_device_memory_are_out_of_range() {
    let mut case = Case::new();
    let outside = [
        (FRAMES, 1),
        (FRAMES - 1, 2),
        (u64::MAX, 1),
        (u64::MAX - 1, 2),
        (1 << 52, 1),
    ];
    for extent in outside {
        for op in COPIES {
            // The good extents before and after it are not touched either.
            let request = Request::new(op, &[(0, 1), extent, (2, 1)]);
            case.reject(COPY, &request, VIRTIO_HMM_S_RANGE);
        }
        let op = VIRTIO_HMM_OP_DEVICE_TO_DEVICE;
        let request = Request::with_sources(op, &[extent], &[(20, extent.1)]);
        case.reject(COPY, &request, VIRTIO_HMM_S_RANGE);
        let request = Request::with_sources(op, &[(0, extent.1)], &[extent]);
        case.reject(COPY, &request, VIRTIO_HMM_S_RANGE);
    }
}

#[test]
fn d6_lengths_must_fit_exactly() {
    let mut case = Case::new();
    let (at, _) = case.data;
    let response = case.vm.place(&[0; 32]).0;
    for (op, data_in, data_out) in [
        (VIRTIO_HMM_OP_TO_DEVICE, 2 * PAGE, 0),
        (VIRTIO_HMM_OP_FROM_DEVICE, 0, 2 * PAGE),
        (VIRTIO_HMM_OP_FILL, 0, 0),
    ] {
        let head = case.vm.place(&Request::new(op, &[(0, 1), (3, 1)]).encode());
        for wrong in [-1, 1] {
            let add = |len: usize| len.saturating_add_signed(wrong);
            let status = (response, 8 + 2);
            let (readable, writable) = ([head, (at, add(data_in))], [status, (at, data_out)]);
            if wrong > 0 || data_in > 0 {
                case.expect(COPY, &readable, &writable, VIRTIO_HMM_S_INVALID);
            }
            let (readable, writable) = ([head, (at, data_in)], [status, (at, add(data_out))]);
            if wrong > 0 || data_out > 0 {
                case.expect(COPY, &readable, &writable, VIRTIO_HMM_S_INVALID);
            }
        }
        // No room for the statuses.
        let (readable, writable) = ([head, (at, data_in)], [(response, 9)]);
        case.expect(COPY, &readable, &writable, VIRTIO_HMM_S_INVALID);
    }
}

#[test]
fn d6_requests_shorter_than_they_say_are_invalid() {
    let mut case = Case::new();
    let head = case
        .vm
        .place(&Request::new(VIRTIO_HMM_OP_FILL, &[(0, 1), (2, 1)]).encode());
    let response = case.vm.place(&[0; 10]);
    for len in [0, 1, 31, 32, 48, 63] {
        case.expect(COPY, &[(head.0, len)], &[response], VIRTIO_HMM_S_INVALID);
    }
}

#[test]
fn d6_requests_outside_guest_memory_are_invalid() {
    let mut case = Case::new();
    let head = case
        .vm
        .place(&Request::new(VIRTIO_HMM_OP_FILL, &[(0, 1)]).encode());
    let response = case.vm.place(&[0; 9]);
    for addr in [0, RAM_END, RAM_END - 8, u64::MAX - 8] {
        case.expect(COPY, &[(addr, 48)], &[response], VIRTIO_HMM_S_INVALID);
        // The head is there, the extents are not.
        case.expect(
            COPY,
            &[(head.0, 32), (addr, 16)],
            &[response],
            VIRTIO_HMM_S_INVALID,
        );
    }
    // The head of the response is there, the statuses are not.
    let writable = [(response.0, 8), (RAM_END, 1)];
    case.expect(COPY, &[head], &writable, VIRTIO_HMM_S_INVALID);
}

#[test]
fn d6_readable_buffers_after_writable_ones_are_invalid() {
    let mut case = Case::new();
    let head = case
        .vm
        .place(&Request::new(VIRTIO_HMM_OP_FILL, &[(0, 1)]).encode());
    let response = case.vm.place(&[0; 9]);
    let table = case.vm.table(COPY);
    let chain = [
        (head.0, 32, 1, 1),
        (response.0, 9, 3, 2),
        (head.0 + 32, 16, 0, 0),
    ];
    case.vm.write_descriptors(table, 0, &chain);
    case.vm.offer(COPY, 0);
    case.vm.kick(COPY);
    assert_eq!(case.vm.next_used(COPY), (0, 8));
    assert_eq!(
        case.vm.response(response.0, 0, 8).status,
        VIRTIO_HMM_S_INVALID
    );
    assert!(case.vm.load(0, 16) == pattern(1, 16));
}

#[test]
fn d4_the_first_error_in_order_is_reported() {
    let mut case = Case::new();
    // Unknown before invalid before out of range.
    let mut request = Request::new(99, &[(FRAMES, 1)]);
    request.head.flags = 1.into();
    case.reject(COPY, &request, VIRTIO_HMM_S_UNSUPPORTED);
    let mut request = Request::new(VIRTIO_HMM_OP_FILL, &[(FRAMES, 1)]);
    request.head.flags = 1.into();
    case.reject(COPY, &request, VIRTIO_HMM_S_INVALID);
    let mut request = Request::new(VIRTIO_HMM_OP_FILL, &[(FRAMES, 1), (0, 1)]);
    request.extents[1].reserved = 1.into();
    case.reject(COPY, &request, VIRTIO_HMM_S_INVALID);
    // Out of range before a page that cannot be accessed.
    let head = case
        .vm
        .place(&Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(FRAMES, 1)]).encode());
    let response = case.vm.place(&[0; 9]);
    case.expect(
        COPY,
        &[head, (RAM_END, PAGE)],
        &[response],
        VIRTIO_HMM_S_RANGE,
    );
}

#[test]
fn d8_pages_outside_guest_memory_fail_alone() {
    let mut case = Case::new();
    let page = |index: u64| (case.data.0 + index * PAGE as u64, PAGE);
    let half = PAGE / 2;
    // Good, outside, good, half outside, beyond all addresses, good.
    let pages = [
        page(0),
        (RAM_END, PAGE),
        page(1),
        (page(2).0, half),
        (RAM_END - 10, half),
        (u64::MAX - 100, PAGE),
        page(3),
    ];
    let fault = VIRTIO_HMM_FRAME_FAULT;
    let partial = Response {
        status: VIRTIO_HMM_S_PARTIAL,
        frames_done: 3,
        statuses: vec![0, fault, 0, fault, fault, 0],
        written: 8 + 6,
    };
    let request = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(0, 6)]);
    assert_eq!(case.vm.request(COPY, &request, &pages, &[]), partial);
    let (old, new) = (pattern(1, 16), pattern(0x80, 16));
    let frame = |bytes: &[u8], index: usize| bytes[index * PAGE..][..PAGE].to_vec();
    let expected = [
        frame(&new, 0),
        frame(&old, 1),
        frame(&new, 1),
        frame(&old, 3),
        frame(&old, 4),
        frame(&new, 3),
    ]
    .concat();
    assert!(case.vm.load(0, 6) == expected);

    let request = Request::new(VIRTIO_HMM_OP_FROM_DEVICE, &[(6, 6)]);
    assert_eq!(case.vm.request(COPY, &request, &[], &pages), partial);
    assert!(case.vm.read(page(0).0, PAGE) == frame(&old, 6));
    assert!(case.vm.read(page(1).0, PAGE) == frame(&old, 8));
    assert!(
        case.vm.read(page(2).0, PAGE) == frame(&new, 2),
        "half a page was written"
    );
    assert!(case.vm.read(page(3).0, PAGE) == frame(&old, 11));

    let counters = case.vm.counters().to_device;
    let counted = [counters.requests, counters.frames, counters.errors].map(u64::from);
    assert_eq!(counted, [2, 16 + 3, 1]);
}
