//! Resets while the device is at work.

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use vhost_device_hmm::abi::{VIRTIO_HMM_OP_FROM_DEVICE, VIRTIO_HMM_OP_TO_DEVICE};

use crate::driver::{Buffer, COPY, Driver, FEATURES, NEXT, UNTOUCHED, chain, count, descriptor};
use crate::failure::Result;
use crate::memory::PAGE;
use crate::request::{Request, Response};
use crate::require;
use crate::transport::{PAUSE, wait};

super::cases! {
    d16_after_a_reset_no_memory_is_written,
    d16_requests_are_complete_or_had_no_effect,
    d16_resets_at_any_time_are_confirmed,
    d16_a_reset_sets_a_stopped_queue_going,
    r4_a_request_that_is_never_answered_ends_with_a_reset,
}

/// The heads of the chains that were used.
fn used(driver: &mut Driver, queue: u16) -> Result<BTreeSet<u32>> {
    let number = driver.used(queue)?;
    (0..number)
        .map(|_| Ok(driver.next_used(queue)?.0))
        .collect()
}

fn d16_after_a_reset_no_memory_is_written(driver: &mut Driver) -> Result {
    let most = u32::from(driver.config.max_frames) as usize;
    let bytes = driver.noise(most);
    driver.store(0, &bytes)?;
    let request = Request::new(VIRTIO_HMM_OP_FROM_DEVICE, &[(0, count(most))]);
    let head = driver.memory.place(&request.bytes())?;
    let response = driver.response_buffer(&request)?;
    let data = driver.memory.alloc(most * PAGE)?;
    let (clean, queues) = (vec![UNTOUCHED; most * PAGE], driver.copy_queues());
    for round in 0..8 {
        driver.start(FEATURES)?;
        let total = driver.size(COPY) / 4;
        for queue in queues.clone() {
            for number in 0..total {
                let buffers = [response, (data, most * PAGE)];
                driver.offer_chain(queue, 4 * number, &chain(4 * number, &[head], &buffers))?;
            }
            driver.kick(queue);
        }
        wait("first used buffer", || Ok(driver.used(COPY)? > 0))?;
        driver.transport.reset()?;
        let before = queues
            .clone()
            .map(|queue| driver.used(queue))
            .collect::<Result<Vec<_>>>()?;
        driver.memory.write(data, &clean)?;
        driver.memory.write(response.0, &[UNTOUCHED; 8])?;
        thread::sleep(PAUSE);
        let now = queues
            .clone()
            .map(|queue| driver.used(queue))
            .collect::<Result<Vec<_>>>()?;
        require!(
            now == before,
            "round {round}: a buffer was used after the reset"
        );
        let same = driver.memory.read(data, most * PAGE)? == clean
            && driver.memory.read(response.0, 8)? == [UNTOUCHED; 8];
        require!(same, "round {round}: memory was written after the reset");
    }
    driver.start(FEATURES)?;
    require!(driver.load(0, most)? == bytes, "device memory changed");
    Ok(())
}

/// One request for each of many frames, and a reset among them.
fn d16_requests_are_complete_or_had_no_effect(driver: &mut Driver) -> Result {
    let number = driver.size(COPY).min(512) / 4;
    let frames = usize::from(number);
    let requests: Vec<(Buffer, Buffer)> = (0..number)
        .map(|frame| {
            let request = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(frame.into(), 1)]);
            let head = driver.memory.place(&request.bytes())?;
            Ok((head, driver.response_buffer(&request)?))
        })
        .collect::<Result<_>>()?;
    for round in 0..8 {
        driver.start(FEATURES)?;
        let (old, new) = (driver.noise(frames), driver.noise(frames));
        driver.store(0, &old)?;
        // The rings begin anew.
        driver.start(FEATURES)?;
        let mark = driver.memory.mark();
        let (data, _) = driver.memory.place(&new)?;
        for (at, (head, response)) in (0..).step_by(4).zip(&requests) {
            driver
                .memory
                .write(response.0, &vec![UNTOUCHED; response.1])?;
            let page = (data + u64::from(at / 4) * PAGE as u64, PAGE);
            driver.offer_chain(COPY, at, &chain(at, &[*head, page], &[*response]))?;
        }
        driver.kick(COPY);
        wait("first used buffer", || Ok(driver.used(COPY)? > round))?;
        driver.transport.reset()?;
        let used = used(driver, COPY)?;
        driver.memory.release(mark);
        for (at, (_, response)) in (0_u32..).step_by(4).zip(&requests) {
            let answer = driver.response(*response, 9)?;
            let complete = answer == Response::ok(1, 0);
            require!(
                complete == used.contains(&at),
                "round {round}: request {} is answered with {answer:?}, and used is {}",
                at / 4,
                !complete
            );
        }
        driver.start(FEATURES)?;
        let found = driver.load(0, frames)?;
        for index in 0..frames {
            let frame = index * PAGE..(index + 1) * PAGE;
            let done = used.contains(&count(4 * index));
            let expected = if done { &new } else { &old };
            require!(
                found[frame.clone()] == expected[frame],
                "round {round}: frame {index} holds other bytes; its request is complete: {done}"
            );
        }
    }
    Ok(())
}

fn d16_resets_at_any_time_are_confirmed(driver: &mut Driver) -> Result {
    let bytes = driver.noise(64);
    driver.store(0, &bytes)?;
    let request = Request::new(VIRTIO_HMM_OP_FROM_DEVICE, &[(0, 64)]);
    let head = driver.memory.place(&request.bytes())?;
    let response = driver.response_buffer(&request)?;
    let data = (driver.memory.alloc(64 * PAGE)?, 64 * PAGE);
    for _ in 0..40 {
        driver.start(FEATURES)?;
        for queue in driver.copy_queues() {
            for at in (0..64).step_by(4) {
                driver.offer_chain(queue, at, &chain(at, &[head], &[response, data]))?;
            }
            driver.kick(queue);
        }
        thread::sleep(Duration::from_micros(driver.random.u64(..3000)));
        driver.transport.reset()?;
    }
    driver.start(FEATURES)?;
    require!(driver.load(0, 64)? == bytes, "device memory changed");
    Ok(())
}

/// A chain that stops the queue.
fn stop(driver: &mut Driver) -> Result {
    let at = driver.memory.alloc(64)?;
    driver.offer_chain(COPY, 0, &[descriptor((at, 48), NEXT, 0)])?;
    driver.kick(COPY);
    Ok(())
}

fn d16_a_reset_sets_a_stopped_queue_going(driver: &mut Driver) -> Result {
    let bytes = driver.noise(2);
    for _ in 0..10 {
        driver.start(FEATURES)?;
        stop(driver)?;
        driver.start(FEATURES)?;
        driver.store(3, &bytes)?;
        require!(driver.load(3, 2)? == bytes, "other bytes after the reset");
    }
    Ok(())
}

fn r4_a_request_that_is_never_answered_ends_with_a_reset(driver: &mut Driver) -> Result {
    let old = driver.noise(1);
    driver.store(5, &old)?;
    stop(driver)?;
    // It waits behind the broken chain.
    let new = driver.noise(1);
    let page = driver.memory.place(&new)?;
    let request = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(5, 1)]);
    let head = driver.memory.place(&request.bytes())?;
    let response = driver.response_buffer(&request)?;
    driver.offer_chain(COPY, 8, &chain(8, &[head, page], &[response]))?;
    driver.kick(COPY);
    thread::sleep(PAUSE);
    driver.transport.reset()?;
    let answer = driver.memory.read(response.0, response.1)?;
    require!(
        answer == [UNTOUCHED; 9],
        "the request was answered: {answer:?}"
    );
    driver.start(FEATURES)?;
    require!(driver.load(5, 1)? == old, "the request had an effect");
    Ok(())
}
