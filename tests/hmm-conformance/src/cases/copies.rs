//! What the operations do, however their requests are split.

use vhost_device_hmm::abi::{
    VIRTIO_HMM_FRAME_FAULT, VIRTIO_HMM_OP_DEVICE_TO_DEVICE, VIRTIO_HMM_OP_DISCARD,
    VIRTIO_HMM_OP_FILL, VIRTIO_HMM_OP_FROM_DEVICE, VIRTIO_HMM_OP_TO_DEVICE, VIRTIO_HMM_S_INVALID,
    VIRTIO_HMM_S_OK, VIRTIO_HMM_S_PARTIAL, VIRTIO_HMM_S_UNSUPPORTED, virtio_hmm_op_counters,
};

use super::OUTSIDE;
use crate::driver::{
    Buffer, CONTROL, COPY, Driver, INDIRECT, NEXT, UNTOUCHED, chain, count, descriptor,
};
use crate::failure::{Failure, Result};
use crate::memory::PAGE;
use crate::request::{Request, Response};
use crate::require;
use crate::transport::PAUSE;

super::cases! {
    d2_requests_are_split_between_any_bytes,
    d2_requests_are_split_in_indirect_tables,
    d2_descriptors_may_precede_an_indirect_table,
    d2_1024_descriptors_are_accepted,
    d2_1024_indirect_descriptors_are_accepted,
    d2_empty_descriptors_are_accepted,
    d8_pages_outside_memory_are_not_read,
    d8_pages_outside_memory_are_not_written,
    d9_frames_hold_their_pages_and_no_other_changes,
    d9_the_largest_request_is_copied,
    d10_pages_hold_their_frames_and_no_other_byte_changes,
    d11_filled_frames_are_zero_and_no_other_changes,
    d12_frames_are_copied_to_frames,
    d13_counters_are_exact,
    d14_discarded_frames_are_zero_and_no_other_changes,
    d19_responses_are_as_long_as_they_say,
    r3_what_is_complete_is_written_no_more,
    r6_frames_named_twice_harm_no_others,
    r6_requests_for_the_same_frames_harm_no_others,
}

/// Frames that a case fills with bytes of its own.
const FRAMES: usize = 64;

/// Divides buffers into `pieces`, at any bytes; some are empty.
fn split(driver: &mut Driver, buffers: &[Buffer], pieces: usize) -> Vec<Buffer> {
    let total: usize = buffers.iter().map(|(_, len)| len).sum();
    let mut cuts: Vec<_> = (0..pieces.saturating_sub(buffers.len()))
        .map(|_| driver.random.usize(..=total))
        .collect();
    cuts.sort_unstable();
    let mut cuts = cuts.into_iter().peekable();
    let (mut split, mut before) = (Vec::new(), 0);
    for &(at, len) in buffers {
        let mut done = 0;
        while let Some(cut) = cuts.next_if(|cut| *cut <= before + len) {
            split.push((at + done as u64, cut - before - done));
            done = cut - before;
        }
        split.push((at + done as u64, len - done));
        before += len;
    }
    split
}

/// Copies noise to three frames and back by requests of `pieces` descriptors.
fn copies_in_pieces(
    driver: &mut Driver,
    pieces: usize,
    run: fn(&mut Driver, u16, &[Buffer], &[Buffer]) -> Result<usize>,
) -> Result {
    let mark = driver.memory.mark();
    let bytes = driver.noise(3);
    let extents = [(9, 1), (30, 2)];
    let request = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &extents);
    let head = driver.memory.place(&request.bytes())?;
    let data = driver.memory.place(&bytes)?;
    let response = driver.response_buffer(&request)?;
    let readable = split(driver, &[head, data], pieces - 1);
    let written = run(driver, COPY, &readable, &[response])?;
    let answer = driver.response(response, written)?;
    require!(answer == Response::ok(3, 0), "{pieces} pieces: {answer:?}");

    let request = Request::new(VIRTIO_HMM_OP_FROM_DEVICE, &extents);
    let head = driver.memory.place(&request.bytes())?;
    let response = driver.response_buffer(&request)?;
    let data = driver.memory.place(&vec![UNTOUCHED; bytes.len()])?;
    let writable = split(driver, &[response, data], pieces - 1);
    let written = run(driver, COPY, &[head], &writable)?;
    let answer = driver.response(response, written)?;
    require!(
        answer == Response::ok(3, data.1),
        "{pieces} pieces: {answer:?}"
    );
    require!(
        driver.memory.read(data.0, data.1)? == bytes,
        "{pieces} pieces: other bytes"
    );
    driver.memory.release(mark);
    Ok(())
}

fn d2_requests_are_split_between_any_bytes(driver: &mut Driver) -> Result {
    let most = usize::from(driver.size(COPY)).min(300);
    for _ in 0..16 {
        let pieces = driver.random.usize(4..=most);
        copies_in_pieces(driver, pieces, Driver::run)?;
    }
    Ok(())
}

fn d2_requests_are_split_in_indirect_tables(driver: &mut Driver) -> Result {
    for _ in 0..16 {
        let pieces = driver.random.usize(4..=300);
        copies_in_pieces(driver, pieces, Driver::run_indirect)?;
    }
    Ok(())
}

fn d2_descriptors_may_precede_an_indirect_table(driver: &mut Driver) -> Result {
    let request = Request::new(VIRTIO_HMM_OP_FILL, &[(3, 1)]);
    let (head, len) = driver.memory.place(&request.bytes())?;
    let response = driver.response_buffer(&request)?;
    let rest = chain(0, &[(head + 20, len - 20)], &[response]);
    let table = driver.memory.alloc(16 * rest.len())?;
    driver.write_table(table, 0, &rest)?;
    let direct = [
        descriptor((head, 20), NEXT, 1),
        descriptor((table, 16 * rest.len()), INDIRECT, 0),
    ];
    let written = driver.run_chain(COPY, 0, &direct)?;
    let answer = driver.response(response, written)?;
    require!(answer == Response::ok(1, 0), "{answer:?}");
    Ok(())
}

fn d2_1024_descriptors_are_accepted(driver: &mut Driver) -> Result {
    let size = driver.size(COPY);
    if size < 1024 {
        return Err(Failure::Skip(format!("the queue has {size} descriptors")));
    }
    copies_in_pieces(driver, 1024, Driver::run)
}

fn d2_1024_indirect_descriptors_are_accepted(driver: &mut Driver) -> Result {
    copies_in_pieces(driver, 1024, Driver::run_indirect)
}

fn d2_empty_descriptors_are_accepted(driver: &mut Driver) -> Result {
    let request = Request::new(VIRTIO_HMM_OP_FILL, &[(3, 1)]);
    let (head, len) = driver.memory.place(&request.bytes())?;
    let (response, room) = driver.response_buffer(&request)?;
    // Wherever they are, nothing of them is accessed.
    let readable = [
        (head, 0),
        (head, 32),
        (OUTSIDE[0], 0),
        (head + 32, len - 32),
        (head, 0),
    ];
    let writable = [
        (response, 0),
        (response, 3),
        (OUTSIDE[1], 0),
        (response + 3, room - 3),
    ];
    let written = driver.run(COPY, &readable, &writable)?;
    let answer = driver.response((response, room), written)?;
    require!(answer == Response::ok(1, 0), "{answer:?}");
    Ok(())
}

/// Six pages: good, outside, good, half outside, beyond all addresses, good.
fn some_outside((data, _): Buffer) -> [Buffer; 7] {
    let page = |index: u64| (data + index * PAGE as u64, PAGE);
    let half = PAGE / 2;
    [
        page(0),
        (OUTSIDE[0], PAGE),
        page(1),
        (page(2).0, half),
        (OUTSIDE[1], half),
        (u64::MAX - 100, PAGE),
        page(3),
    ]
}

/// The answer to a request for these pages.
fn some_failed() -> Response {
    let fault = VIRTIO_HMM_FRAME_FAULT;
    Response {
        status: VIRTIO_HMM_S_PARTIAL,
        frames_done: 3,
        statuses: vec![0, fault, 0, fault, fault, 0],
        written: 8 + 6,
    }
}

fn d8_pages_outside_memory_are_not_read(driver: &mut Driver) -> Result {
    let (old, new) = (driver.noise(6), driver.noise(4));
    driver.store(0, &old)?;
    let data = driver.memory.place(&new)?;
    let request = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(0, 6)]);
    let answer = driver.request(COPY, &request, &some_outside(data), &[])?;
    require!(answer == some_failed(), "{answer:?}");
    let frames = [
        (&new, 0),
        (&old, 1),
        (&new, 1),
        (&old, 3),
        (&old, 4),
        (&new, 3),
    ];
    let expected: Vec<u8> = frames
        .iter()
        .flat_map(|(from, index)| frame(from, *index))
        .copied()
        .collect();
    require!(
        driver.load(0, 6)? == expected,
        "the frames hold other bytes"
    );
    Ok(())
}

fn d8_pages_outside_memory_are_not_written(driver: &mut Driver) -> Result {
    let (frames, pages) = (driver.noise(6), driver.noise(4));
    driver.store(0, &frames)?;
    let data = driver.memory.place(&pages)?;
    let request = Request::new(VIRTIO_HMM_OP_FROM_DEVICE, &[(0, 6)]);
    let answer = driver.request(COPY, &request, &[], &some_outside(data))?;
    require!(answer == some_failed(), "{answer:?}");
    let expected = [
        frame(&frames, 0),
        frame(&frames, 2),
        frame(&pages, 2),
        frame(&frames, 5),
    ];
    let found = driver.memory.read(data.0, data.1)?;
    require!(found == expected.concat(), "the pages hold other bytes");
    Ok(())
}

/// The bytes of frame or page `index`.
fn frame(bytes: &[u8], index: usize) -> &[u8] {
    &bytes[index * PAGE..][..PAGE]
}

/// Fills frames with noise, and returns it.
fn fill_with_noise(driver: &mut Driver) -> Result<Vec<u8>> {
    let bytes = driver.noise(FRAMES);
    driver.store(0, &bytes)?;
    Ok(bytes)
}

/// The frames are as expected, where `expected` says of each its bytes.
fn check_frames(driver: &mut Driver, expected: &[u8]) -> Result {
    let found = driver.load(0, FRAMES)?;
    let wrong = (0..FRAMES).find(|index| frame(&found, *index) != frame(expected, *index));
    require!(wrong.is_none(), "frame {wrong:?} holds other bytes");
    Ok(())
}

fn put(bytes: &mut [u8], index: usize, new: &[u8]) {
    bytes[index * PAGE..][..new.len()].copy_from_slice(new);
}

fn d9_frames_hold_their_pages_and_no_other_changes(driver: &mut Driver) -> Result {
    let mut expected = fill_with_noise(driver)?;
    let new = driver.noise(6);
    let data = driver.memory.place(&new)?;
    let request = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(3, 2), (40, 1), (10, 3)]);
    let answer = driver.request(COPY, &request, &[data], &[])?;
    require!(answer == Response::ok(6, 0), "{answer:?}");
    put(&mut expected, 3, &new[..2 * PAGE]);
    put(&mut expected, 40, frame(&new, 2));
    put(&mut expected, 10, &new[3 * PAGE..]);
    check_frames(driver, &expected)
}

fn d9_the_largest_request_is_copied(driver: &mut Driver) -> Result {
    let most = u32::from(driver.config.max_frames) as usize;
    let bytes = driver.noise(most);
    driver.store(0, &bytes)?;
    require!(
        driver.load(0, most)? == bytes,
        "{most} frames hold other bytes"
    );
    Ok(())
}

fn d10_pages_hold_their_frames_and_no_other_byte_changes(driver: &mut Driver) -> Result {
    let frames = fill_with_noise(driver)?;
    let mut expected = driver.noise(FRAMES);
    let (area, len) = driver.memory.place(&expected)?;
    let page = |index: u64| (area + index * PAGE as u64, PAGE);
    // The last page begins in the middle of one.
    let pages = [page(20), page(4), page(5), (page(50).0 + 100, PAGE)];
    let request = Request::new(VIRTIO_HMM_OP_FROM_DEVICE, &[(60, 2), (0, 1), (7, 1)]);
    let answer = driver.request(COPY, &request, &[], &pages)?;
    require!(answer == Response::ok(4, 4 * PAGE), "{answer:?}");
    for (to, from) in [(20, 60), (4, 61), (5, 0)] {
        put(&mut expected, to, frame(&frames, from));
    }
    expected[50 * PAGE + 100..][..PAGE].copy_from_slice(frame(&frames, 7));
    require!(
        driver.memory.read(area, len)? == expected,
        "memory holds other bytes"
    );
    check_frames(driver, &frames)
}

fn d11_filled_frames_are_zero_and_no_other_changes(driver: &mut Driver) -> Result {
    let mut expected = fill_with_noise(driver)?;
    let request = Request::new(VIRTIO_HMM_OP_FILL, &[(20, 1), (5, 4)]);
    let answer = driver.request(COPY, &request, &[], &[])?;
    require!(answer == Response::ok(5, 0), "{answer:?}");
    put(&mut expected, 20, &[0; PAGE]);
    put(&mut expected, 5, &[0; 4 * PAGE]);
    check_frames(driver, &expected)
}

fn d12_frames_are_copied_to_frames(driver: &mut Driver) -> Result {
    let old = fill_with_noise(driver)?;
    let (from, to) = ([(50, 1), (30, 3), (0, 1)], [(10, 2), (20, 3)]);
    let request = Request::from_to(VIRTIO_HMM_OP_DEVICE_TO_DEVICE, &from, &to);
    let answer = driver.request(COPY, &request, &[], &[])?;
    require!(answer == Response::ok(5, 0), "{answer:?}");
    let mut expected = old.clone();
    for (to, from) in [(10, 50), (11, 30), (20, 31), (21, 32), (22, 0)] {
        put(&mut expected, to, frame(&old, from));
    }
    check_frames(driver, &expected)
}

fn d13_counters_are_exact(driver: &mut Driver) -> Result {
    let numbers = |counters: &virtio_hmm_op_counters| {
        [
            counters.requests,
            counters.frames,
            counters.bytes,
            counters.errors,
        ]
        .map(u64::from)
    };
    let before = driver.counters()?;
    let bytes = driver.noise(3);
    driver.store(0, &bytes)?;
    driver.load(0, 2)?;
    let fill = Request::new(VIRTIO_HMM_OP_FILL, &[(0, 4)]);
    driver.request(COPY, &fill, &[], &[])?;
    let copy = Request::from_to(VIRTIO_HMM_OP_DEVICE_TO_DEVICE, &[(0, 1)], &[(9, 1)]);
    driver.request(COPY, &copy, &[], &[])?;
    let discard = Request::new(VIRTIO_HMM_OP_DISCARD, &[(0, 2), (9, 1)]);
    driver.request(CONTROL, &discard, &[], &[])?;
    // One frame of two fails, one request does, and one is not known.
    let data = driver.memory.place(&bytes)?;
    let partial = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(0, 2)]);
    let answer = driver.request(COPY, &partial, &[(data.0, PAGE), (OUTSIDE[0], PAGE)], &[])?;
    require!(answer.status == VIRTIO_HMM_S_PARTIAL, "{answer:?}");
    let mut wrong = fill.clone();
    wrong.head.flags = 1.into();
    let answer = driver.request(COPY, &wrong, &[], &[])?;
    require!(answer.status == VIRTIO_HMM_S_INVALID, "{answer:?}");
    let answer = driver.request(COPY, &Request::new(77, &[(0, 1)]), &[], &[])?;
    require!(answer.status == VIRTIO_HMM_S_UNSUPPORTED, "{answer:?}");

    let after = driver.counters()?;
    let page = PAGE as u64;
    for (name, before, after, expected) in [
        (
            "to_device",
            before.to_device,
            after.to_device,
            [2, 4, 4 * page, 1],
        ),
        (
            "from_device",
            before.from_device,
            after.from_device,
            [1, 2, 2 * page, 0],
        ),
        ("fill", before.fill, after.fill, [2, 4, 4 * page, 1]),
        (
            "device_to_device",
            before.device_to_device,
            after.device_to_device,
            [1, 1, page, 0],
        ),
        (
            "discard",
            before.discard,
            after.discard,
            [1, 3, 3 * page, 0],
        ),
    ] {
        let (before, after) = (numbers(&before), numbers(&after));
        let change: Vec<_> = before
            .iter()
            .zip(after)
            .map(|(a, b)| b.wrapping_sub(*a))
            .collect();
        require!(
            change == expected,
            "{name} changed by {change:?}, not {expected:?}"
        );
    }
    let unknown = u64::from(after.unsupported).wrapping_sub(before.unsupported.into());
    require!(unknown == 1, "unsupported changed by {unknown}");
    Ok(())
}

fn d14_discarded_frames_are_zero_and_no_other_changes(driver: &mut Driver) -> Result {
    let mut expected = fill_with_noise(driver)?;
    let request = Request::new(VIRTIO_HMM_OP_DISCARD, &[(8, 1), (30, 9)]);
    let answer = driver.request(CONTROL, &request, &[], &[])?;
    require!(
        (answer.status, answer.written) == (VIRTIO_HMM_S_OK, 8),
        "{answer:?}"
    );
    put(&mut expected, 8, &[0; PAGE]);
    put(&mut expected, 30, &[0; 9 * PAGE]);
    check_frames(driver, &expected)
}

fn d19_responses_are_as_long_as_they_say(driver: &mut Driver) -> Result {
    // More room than a response needs is no response of this request: it is INVALID, and all
    // but the head stays as it was. What is right is in the cases of the operations.
    let request = Request::new(VIRTIO_HMM_OP_FILL, &[(0, 2)]);
    let head = driver.memory.place(&request.bytes())?;
    let room = driver.memory.place(&[UNTOUCHED; 64])?;
    let written = driver.run(COPY, &[head], &[room])?;
    let answer = driver.response(room, written)?;
    require!(
        (answer.status, answer.written) == (VIRTIO_HMM_S_INVALID, 8),
        "{answer:?}"
    );
    require!(
        answer.statuses == [UNTOUCHED; 56],
        "more than the head was written: {answer:?}"
    );
    // The status bytes are written for PARTIAL, and no byte of the page that failed.
    let bytes = driver.noise(2);
    driver.store(0, &bytes)?;
    let request = Request::new(VIRTIO_HMM_OP_FROM_DEVICE, &[(0, 2)]);
    let data = driver.memory.place(&[UNTOUCHED; 2 * PAGE])?;
    let pages = [(OUTSIDE[0], PAGE), (data.0, PAGE)];
    let answer = driver.request(COPY, &request, &[], &pages)?;
    let expected = Response {
        status: VIRTIO_HMM_S_PARTIAL,
        frames_done: 1,
        statuses: vec![VIRTIO_HMM_FRAME_FAULT, 0],
        written: 8 + 2,
    };
    require!(answer == expected, "{answer:?}");
    Ok(())
}

fn r3_what_is_complete_is_written_no_more(driver: &mut Driver) -> Result {
    let most = u32::from(driver.config.max_frames) as usize;
    let bytes = driver.noise(most);
    driver.store(0, &bytes)?;
    let request = Request::new(VIRTIO_HMM_OP_FROM_DEVICE, &[(0, count(most))]);
    let head = driver.memory.place(&request.bytes())?;
    let response = driver.response_buffer(&request)?;
    let data = driver.memory.place(&bytes)?;
    let others = driver.noise(most);
    driver.run(COPY, &[head], &[response, data])?;
    // Now it is somebody else's.
    driver.memory.write(data.0, &others)?;
    std::thread::sleep(PAUSE);
    require!(
        driver.memory.read(data.0, data.1)? == others,
        "a page was written later"
    );
    Ok(())
}

/// Frames that are written twice hold anything, all others what they held.
fn check_others(driver: &mut Driver, old: &[u8], written: std::ops::Range<usize>) -> Result {
    let found = driver.load(0, FRAMES)?;
    let others = (0..FRAMES).filter(|index| !written.contains(index));
    let wrong = others
        .into_iter()
        .find(|index| frame(&found, *index) != frame(old, *index));
    require!(wrong.is_none(), "frame {wrong:?} changed");
    Ok(())
}

fn r6_frames_named_twice_harm_no_others(driver: &mut Driver) -> Result {
    let old = fill_with_noise(driver)?;
    let new = driver.noise(6);
    let data = driver.memory.place(&new)?;
    for extents in [[(10, 1), (10, 5)], [(10, 3), (11, 3)], [(12, 3), (10, 3)]] {
        for op in [VIRTIO_HMM_OP_TO_DEVICE, VIRTIO_HMM_OP_FILL] {
            let request = Request::new(op, &extents);
            let data: &[Buffer] = if op == VIRTIO_HMM_OP_FILL {
                &[]
            } else {
                &[data]
            };
            let answer = driver.request(COPY, &request, data, &[])?;
            require!(answer == Response::ok(6, 0), "{answer:?}");
            check_others(driver, &old, 10..16)?;
        }
        // A source that is a destination too.
        let op = VIRTIO_HMM_OP_DEVICE_TO_DEVICE;
        for (from, to) in [([(10, 6)], extents), ([(9, 6)], [(10, 3), (13, 3)])] {
            let answer = driver.request(COPY, &Request::from_to(op, &from, &to), &[], &[])?;
            require!(answer == Response::ok(6, 0), "{answer:?}");
            check_others(driver, &old, 10..16)?;
        }
    }
    Ok(())
}

fn r6_requests_for_the_same_frames_harm_no_others(driver: &mut Driver) -> Result {
    let old = fill_with_noise(driver)?;
    let new = driver.noise(8);
    let data = driver.memory.place(&new)?;
    let request = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(20, 8)]);
    let to = (
        driver.memory.place(&request.bytes())?,
        driver.response_buffer(&request)?,
    );
    let request = Request::new(VIRTIO_HMM_OP_FILL, &[(20, 8)]);
    let fill = (
        driver.memory.place(&request.bytes())?,
        driver.response_buffer(&request)?,
    );
    let queues: Vec<_> = driver.copy_queues().collect();
    for round in 0..20 {
        for queue in &queues {
            driver.offer_chain(*queue, 0, &chain(0, &[to.0, data], &[to.1]))?;
            driver.offer_chain(*queue, 8, &chain(8, &[fill.0], &[fill.1]))?;
        }
        for queue in &queues {
            driver.kick(*queue);
        }
        for queue in &queues {
            for _ in 0..2 {
                let (_, written) = driver.next_used(*queue)?;
                require!(written == 16, "round {round}: a used length of {written}");
            }
        }
    }
    check_others(driver, &old, 20..28)
}
