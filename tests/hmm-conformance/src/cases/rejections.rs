//! Requests that are answered with an error, and change nothing.

use vhost_device_hmm::abi::{
    VIRTIO_HMM_OP_COUNTERS, VIRTIO_HMM_OP_DEVICE_TO_DEVICE, VIRTIO_HMM_OP_DISCARD,
    VIRTIO_HMM_OP_FILL, VIRTIO_HMM_OP_FROM_DEVICE, VIRTIO_HMM_OP_TO_DEVICE, VIRTIO_HMM_S_INVALID,
    VIRTIO_HMM_S_OK, VIRTIO_HMM_S_RANGE, VIRTIO_HMM_S_UNSUPPORTED, virtio_hmm_counters,
};

use super::OUTSIDE;
use crate::driver::{Buffer, CONTROL, COPY, Driver, NEXT, UNTOUCHED, WRITE, chain, descriptor};
use crate::failure::Result;
use crate::memory::PAGE;
use crate::request::{Frames, Request};
use crate::require;
use crate::transport::wait;

super::cases! {
    d3_the_last_error_is_found_before_anything_is_done,
    d3_what_was_checked_is_what_is_done,
    d4_the_first_error_in_order_is_reported,
    d5_operations_unknown_to_a_copy_queue_are_unsupported,
    d5_operations_unknown_to_the_control_queue_are_unsupported,
    d6_flags_and_reserved_fields_must_be_zero,
    d6_counts_must_add_up,
    d6_counts_of_zero_and_the_greatest_are_invalid,
    d6_source_extents_belong_to_device_to_device_only,
    d6_lengths_must_fit_exactly,
    d6_requests_shorter_than_they_say_are_invalid,
    d6_lengths_of_almost_4_gib_are_invalid,
    d6_requests_outside_memory_are_invalid,
    d6_statuses_outside_memory_are_invalid,
    d6_readable_buffers_after_writable_ones_are_invalid,
    d6_control_requests_are_checked_too,
    d6_counters_outside_memory_are_invalid,
    d7_frames_outside_device_memory_are_out_of_range,
    d7_source_frames_outside_device_memory_are_out_of_range,
    d7_discarded_frames_outside_device_memory_are_out_of_range,
}

/// Frames and pages that must stay as they are.
struct Scene {
    frames: Vec<u8>,
    pages: Vec<u8>,
    data: Buffer,
}

/// How many of each.
const NUMBER: usize = 16;

/// Operations whose frames are those of the extents alone.
const COPIES: [u32; 3] = [
    VIRTIO_HMM_OP_TO_DEVICE,
    VIRTIO_HMM_OP_FROM_DEVICE,
    VIRTIO_HMM_OP_FILL,
];

impl Scene {
    fn new(driver: &mut Driver) -> Result<Self> {
        let (frames, pages) = (driver.noise(NUMBER), driver.noise(NUMBER));
        driver.store(0, &frames)?;
        let data = driver.memory.place(&pages)?;
        Ok(Self {
            frames,
            pages,
            data,
        })
    }

    /// The device answers a request in these buffers, the first writable of which holds the
    /// head of the response, with `status`.
    fn expect(
        &self,
        driver: &mut Driver,
        queue: u16,
        readable: &[Buffer],
        writable: &[Buffer],
        status: u32,
    ) -> Result {
        self.expect_chain(
            driver,
            queue,
            &chain(0, readable, writable),
            writable[0],
            status,
        )
    }

    fn expect_chain(
        &self,
        driver: &mut Driver,
        queue: u16,
        chain: &[virtio_queue::desc::split::Descriptor],
        response: Buffer,
        status: u32,
    ) -> Result {
        driver
            .memory
            .write(response.0, &vec![UNTOUCHED; response.1])?;
        let written = driver.run_chain(queue, 0, chain)?;
        let answer = driver.response(response, written)?;
        let found = (answer.status, answer.frames_done, written);
        require!(
            found == (status, 0, 8),
            "status, frames done and used length are {found:?}, not {:?}",
            (status, 0, 8)
        );
        let untouched = answer.statuses.iter().all(|byte| *byte == UNTOUCHED);
        require!(untouched, "more than the head was written");
        self.check(driver)
    }

    fn check(&self, driver: &mut Driver) -> Result {
        require!(
            driver.load(0, NUMBER)? == self.frames,
            "device memory changed"
        );
        let pages = driver.memory.read(self.data.0, self.data.1)?;
        require!(pages == self.pages, "the pages changed");
        Ok(())
    }

    /// The device answers `request` with `status`, in buffers as if it were right.
    fn reject(&self, driver: &mut Driver, queue: u16, request: &Request, status: u32) -> Result {
        let mark = driver.memory.mark();
        let head = driver.memory.place(&request.bytes())?;
        let response = driver.response_buffer(request)?;
        let data = (self.data.0, (request.statuses() * PAGE).min(self.data.1));
        let (readable, writable) = match u32::from(request.head.op) {
            VIRTIO_HMM_OP_TO_DEVICE => (vec![head, data], vec![response]),
            VIRTIO_HMM_OP_FROM_DEVICE => (vec![head], vec![response, data]),
            _ => (vec![head], vec![response]),
        };
        let result = self.expect(driver, queue, &readable, &writable, status);
        driver.memory.release(mark);
        result
    }
}

fn d3_the_last_error_is_found_before_anything_is_done(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    let good: Vec<Frames> = (0..15).map(|frame| (frame, 1)).collect();
    for op in COPIES {
        let outside = [&good[..], &[(driver.frames(), 1)]].concat();
        scene.reject(
            driver,
            COPY,
            &Request::new(op, &outside),
            VIRTIO_HMM_S_RANGE,
        )?;
        let mut wrong = Request::new(op, &[&good[..], &[(15, 1)]].concat());
        wrong.extents[15].reserved = 1.into();
        scene.reject(driver, COPY, &wrong, VIRTIO_HMM_S_INVALID)?;
    }
    let discard = [&good[..], &[(driver.frames(), 1)]].concat();
    let discard = Request::new(VIRTIO_HMM_OP_DISCARD, &discard);
    scene.reject(driver, CONTROL, &discard, VIRTIO_HMM_S_RANGE)
}

/// The driver changes an extent while the device looks at it: it is one or the other.
fn d3_what_was_checked_is_what_is_done(driver: &mut Driver) -> Result {
    let bytes = driver.noise(2);
    let (inside, outside) = (40_u64, driver.frames());
    // Others keep the device busy between a first look at that one and a second.
    let most = u64::from(u32::from(driver.config.max_frames)).min(256);
    let mut extents = vec![(inside, 1)];
    extents.extend((64..63 + most).map(|frame| (frame, 1)));
    let request = Request::new(VIRTIO_HMM_OP_FILL, &extents);
    let head = driver.memory.place(&request.bytes())?;
    let number = driver.size(COPY).min(128) / 2;
    let responses = (0..number)
        .map(|_| driver.response_buffer(&request))
        .collect::<Result<Vec<_>>>()?;
    let frame = head.0 + 32;
    for round in 0..40 {
        driver.store(inside, &bytes)?;
        let all = driver.used(COPY)?.wrapping_add(number);
        for (at, response) in (0..).step_by(2).zip(&responses) {
            driver.offer_chain(COPY, at, &chain(at, &[head], &[*response]))?;
        }
        driver.kick(COPY);
        wait("last used buffer", || {
            // Between two looks at the ring the driver rests.
            for _ in 0..100 {
                driver.memory.write(frame, &outside.to_le_bytes())?;
                driver.memory.write(frame, &inside.to_le_bytes())?;
            }
            Ok(driver.used(COPY)? == all)
        })?;
        let mut done = false;
        for response in &responses {
            let (_, written) = driver.next_used(COPY)?;
            let status = driver.response(*response, written)?.status;
            require!(
                matches!(status, VIRTIO_HMM_S_OK | VIRTIO_HMM_S_RANGE),
                "round {round}: status {status}"
            );
            done |= status == VIRTIO_HMM_S_OK;
        }
        let found = driver.load(inside, 2)?;
        let expected = if done { &[0; PAGE] } else { &bytes[..PAGE] };
        require!(
            found[..PAGE] == *expected && found[PAGE..] == bytes[PAGE..],
            "round {round}: other bytes; one request was done: {done}"
        );
    }
    Ok(())
}

fn d4_the_first_error_in_order_is_reported(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    let outside = driver.frames();
    let mut request = Request::new(99, &[(outside, 1)]);
    request.head.flags = 1.into();
    scene.reject(driver, COPY, &request, VIRTIO_HMM_S_UNSUPPORTED)?;
    let mut request = Request::new(VIRTIO_HMM_OP_FILL, &[(outside, 1)]);
    request.head.flags = 1.into();
    scene.reject(driver, COPY, &request, VIRTIO_HMM_S_INVALID)?;
    let mut request = Request::new(VIRTIO_HMM_OP_FILL, &[(outside, 1), (0, 1)]);
    request.extents[1].reserved = 1.into();
    scene.reject(driver, COPY, &request, VIRTIO_HMM_S_INVALID)?;
    let request = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(outside, 1)]);
    let head = driver.memory.place(&request.bytes())?;
    let response = driver.response_buffer(&request)?;
    let readable = [head, (OUTSIDE[0], PAGE)];
    scene.expect(driver, COPY, &readable, &[response], VIRTIO_HMM_S_RANGE)
}

fn d5_operations_unknown_to_a_copy_queue_are_unsupported(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    let control = [VIRTIO_HMM_OP_COUNTERS, VIRTIO_HMM_OP_DISCARD];
    for op in [0, 5, 0xff, 0x102, u32::MAX].into_iter().chain(control) {
        let request = Request::new(op, &[(0, 1)]);
        scene.reject(driver, COPY, &request, VIRTIO_HMM_S_UNSUPPORTED)?;
    }
    Ok(())
}

fn d5_operations_unknown_to_the_control_queue_are_unsupported(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    for op in [0, 0x102, 0x1ff, u32::MAX, VIRTIO_HMM_OP_DEVICE_TO_DEVICE]
        .into_iter()
        .chain(COPIES)
    {
        let request = Request::new(op, &[(0, 1)]);
        scene.reject(driver, CONTROL, &request, VIRTIO_HMM_S_UNSUPPORTED)?;
    }
    Ok(())
}

fn d6_flags_and_reserved_fields_must_be_zero(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    for op in COPIES {
        for bit in [1_u32, 1 << 31] {
            let right = Request::new(op, &[(0, 1), (1, 1)]);
            let mut wrong = [right.clone(), right.clone(), right];
            wrong[0].head.flags = bit.into();
            wrong[1].head.reserved = bit.into();
            wrong[2].extents[1].reserved = bit.into();
            for request in wrong {
                scene.reject(driver, COPY, &request, VIRTIO_HMM_S_INVALID)?;
            }
        }
    }
    Ok(())
}

fn d6_counts_must_add_up(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    for op in COPIES {
        for (extents, frames) in [
            (&[(0, 2), (4, 1)][..], 4_u32),
            (&[(0, 2), (4, 3)], 4),
            (&[(0, 2), (4, 0)], 2),
            (&[(0, 1), (1, 1), (2, 1)], 2),
            (&[(0, 1)], 0),
            (&[], 1),
            (&[], 0),
        ] {
            let mut request = Request::new(op, extents);
            request.head.nr_frames = frames.into();
            scene.reject(driver, COPY, &request, VIRTIO_HMM_S_INVALID)?;
        }
    }
    Ok(())
}

fn d6_counts_of_zero_and_the_greatest_are_invalid(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    let most = u32::from(driver.config.max_frames);
    for op in COPIES {
        let right = Request::new(op, &[(0, 1)]);
        for number in [0, most + 1, u32::MAX] {
            let mut wrong = vec![right.clone(); 4];
            wrong[0].head.nr_frames = number.into();
            wrong[1].head.nr_extents = number.into();
            wrong[2].extents[0].count = number.into();
            // Sums that are right again in 32 bits.
            wrong[3] = Request::new(op, &[(0, u32::MAX), (4, 3)]);
            wrong[3].head.nr_frames = 2.into();
            for request in &wrong {
                scene.reject(driver, COPY, request, VIRTIO_HMM_S_INVALID)?;
            }
        }
        let mut wrong = right;
        wrong.head.nr_src_extents = u32::MAX.into();
        scene.reject(driver, COPY, &wrong, VIRTIO_HMM_S_INVALID)?;
    }
    Ok(())
}

fn d6_source_extents_belong_to_device_to_device_only(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    for op in COPIES {
        let request = Request::from_to(op, &[(1, 1)], &[(0, 1)]);
        scene.reject(driver, COPY, &request, VIRTIO_HMM_S_INVALID)?;
    }
    for from in [&[][..], &[(20, 1)], &[(20, 3)], &[(20, 2), (30, 0)]] {
        let request = Request::from_to(VIRTIO_HMM_OP_DEVICE_TO_DEVICE, from, &[(0, 2)]);
        scene.reject(driver, COPY, &request, VIRTIO_HMM_S_INVALID)?;
    }
    Ok(())
}

fn d6_lengths_must_fit_exactly(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    let (at, invalid) = (scene.data.0, VIRTIO_HMM_S_INVALID);
    let (response, _) = driver.memory.place(&[0; 32])?;
    for (op, data_in, data_out) in [
        (VIRTIO_HMM_OP_TO_DEVICE, 2 * PAGE, 0),
        (VIRTIO_HMM_OP_FROM_DEVICE, 0, 2 * PAGE),
        (VIRTIO_HMM_OP_FILL, 0, 0),
    ] {
        let request = Request::new(op, &[(0, 1), (3, 1)]);
        let head = driver.memory.place(&request.bytes())?;
        let response = (response, 8 + 2);
        for wrong in [-1, 1] {
            if let Some(len) = data_in.checked_add_signed(wrong) {
                let (readable, writable) = ([head, (at, len)], [response, (at, data_out)]);
                scene.expect(driver, COPY, &readable, &writable, invalid)?;
            }
            if let Some(len) = data_out.checked_add_signed(wrong) {
                let (readable, writable) = ([head, (at, data_in)], [response, (at, len)]);
                scene.expect(driver, COPY, &readable, &writable, invalid)?;
            }
        }
        // No room for the status bytes.
        let writable = [(response.0, 9)];
        scene.expect(driver, COPY, &[head, (at, data_in)], &writable, invalid)?;
    }
    Ok(())
}

fn d6_requests_shorter_than_they_say_are_invalid(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    let request = Request::new(VIRTIO_HMM_OP_FILL, &[(0, 1), (2, 1)]);
    let (head, _) = driver.memory.place(&request.bytes())?;
    let response = driver.response_buffer(&request)?;
    for len in [0, 1, 31, 32, 48, 63] {
        scene.expect(
            driver,
            COPY,
            &[(head, len)],
            &[response],
            VIRTIO_HMM_S_INVALID,
        )?;
    }
    // Nothing to read at all.
    scene.expect(driver, COPY, &[], &[response], VIRTIO_HMM_S_INVALID)
}

fn d6_lengths_of_almost_4_gib_are_invalid(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    let huge = u32::MAX as usize - 256;
    for op in COPIES {
        let request = Request::new(op, &[(0, 1)]);
        let head = driver.memory.place(&request.bytes())?;
        let response = driver.response_buffer(&request)?;
        for at in [scene.data.0, OUTSIDE[0]] {
            let (huge, invalid) = ((at, huge), VIRTIO_HMM_S_INVALID);
            scene.expect(driver, COPY, &[head, huge], &[response], invalid)?;
            scene.expect(driver, COPY, &[head], &[response, huge], invalid)?;
        }
    }
    Ok(())
}

fn d6_requests_outside_memory_are_invalid(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    let request = Request::new(VIRTIO_HMM_OP_FILL, &[(0, 1)]);
    let head = driver.memory.place(&request.bytes())?;
    let response = driver.response_buffer(&request)?;
    for at in OUTSIDE {
        let invalid = VIRTIO_HMM_S_INVALID;
        scene.expect(driver, COPY, &[(at, 48)], &[response], invalid)?;
        // The head is there, the extents are not.
        let readable = [(head.0, 32), (at, 16)];
        scene.expect(driver, COPY, &readable, &[response], invalid)?;
    }
    Ok(())
}

fn d6_statuses_outside_memory_are_invalid(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    let request = Request::new(VIRTIO_HMM_OP_FILL, &[(0, 2)]);
    let head = driver.memory.place(&request.bytes())?;
    let response = (driver.response_buffer(&request)?.0, 8);
    for at in OUTSIDE {
        let writable = [response, (at, 2)];
        scene.expect(driver, COPY, &[head], &writable, VIRTIO_HMM_S_INVALID)?;
        let writable = [response, (scene.data.0, 1), (at, 1)];
        scene.expect(driver, COPY, &[head], &writable, VIRTIO_HMM_S_INVALID)?;
    }
    Ok(())
}

fn d6_readable_buffers_after_writable_ones_are_invalid(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    let request = Request::new(VIRTIO_HMM_OP_FILL, &[(0, 1)]);
    let (head, _) = driver.memory.place(&request.bytes())?;
    let response = driver.response_buffer(&request)?;
    let invalid = VIRTIO_HMM_S_INVALID;
    let last = descriptor((head + 32, 16), 0, 0);
    let mixed = [
        descriptor((head, 32), NEXT, 1),
        descriptor(response, NEXT | WRITE, 2),
        last,
    ];
    scene.expect_chain(driver, COPY, &mixed, response, invalid)?;
    let reversed = [
        descriptor(response, NEXT | WRITE, 1),
        descriptor((head, 48), 0, 0),
    ];
    scene.expect_chain(driver, COPY, &reversed, response, invalid)
}

fn d6_control_requests_are_checked_too(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    let mut wrong = vec![
        Request::new(VIRTIO_HMM_OP_DISCARD, &[(0, 1), (1, 0)]),
        Request::new(VIRTIO_HMM_OP_DISCARD, &[]),
        Request::from_to(VIRTIO_HMM_OP_DISCARD, &[(1, 1)], &[(0, 1)]),
        // No room for the counters, and counters of frames.
        Request::new(VIRTIO_HMM_OP_COUNTERS, &[]),
        Request::new(VIRTIO_HMM_OP_COUNTERS, &[(0, 1)]),
    ];
    let right = Request::new(VIRTIO_HMM_OP_DISCARD, &[(0, 2)]);
    for number in [0, 1, 3, u32::MAX] {
        let mut request = right.clone();
        request.head.nr_frames = number.into();
        wrong.push(request);
    }
    for number in [0, 2, u32::MAX] {
        let mut request = right.clone();
        request.head.nr_extents = number.into();
        wrong.push(request);
    }
    for request in wrong {
        scene.reject(driver, CONTROL, &request, VIRTIO_HMM_S_INVALID)?;
    }
    Ok(())
}

fn d6_counters_outside_memory_are_invalid(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    let request = Request::new(VIRTIO_HMM_OP_COUNTERS, &[]);
    let head = driver.memory.place(&request.bytes())?;
    let response = driver.response_buffer(&request)?;
    let len = size_of::<virtio_hmm_counters>();
    for at in OUTSIDE {
        let writable = [response, (at, len)];
        scene.expect(driver, CONTROL, &[head], &writable, VIRTIO_HMM_S_INVALID)?;
    }
    Ok(())
}

/// Extents that are not, or not wholly, in device memory.
fn outside(driver: &Driver) -> [Frames; 6] {
    let end = driver.frames();
    [
        (end, 1),
        (end - 1, 2),
        (end + 1000, 1),
        (1 << 52, 1),
        (u64::MAX, 1),
        (u64::MAX - 1, 2),
    ]
}

fn d7_frames_outside_device_memory_are_out_of_range(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    for extent in outside(driver) {
        for op in COPIES {
            // The good extents before and after it are not touched either.
            let request = Request::new(op, &[(0, 1), extent, (2, 1)]);
            scene.reject(driver, COPY, &request, VIRTIO_HMM_S_RANGE)?;
        }
    }
    Ok(())
}

fn d7_source_frames_outside_device_memory_are_out_of_range(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    let op = VIRTIO_HMM_OP_DEVICE_TO_DEVICE;
    for extent in outside(driver) {
        let inside = (0, extent.1);
        for request in [
            Request::from_to(op, &[extent], &[inside]),
            Request::from_to(op, &[inside], &[extent]),
        ] {
            scene.reject(driver, COPY, &request, VIRTIO_HMM_S_RANGE)?;
        }
    }
    Ok(())
}

fn d7_discarded_frames_outside_device_memory_are_out_of_range(driver: &mut Driver) -> Result {
    let scene = Scene::new(driver)?;
    let all = [(0, u32::MAX)];
    for extents in outside(driver)
        .map(|extent| [extent])
        .into_iter()
        .chain([all])
    {
        let request = Request::new(VIRTIO_HMM_OP_DISCARD, &extents);
        scene.reject(driver, CONTROL, &request, VIRTIO_HMM_S_RANGE)?;
    }
    Ok(())
}
