//! Chains and rings that are broken, and stop their queue.

use std::thread;

use vhost_device_hmm::abi::VIRTIO_HMM_OP_FILL;

use super::OUTSIDE;
use crate::driver::{
    CONTROL, COPY, Driver, FEATURES, INDIRECT, NEXT, UNTOUCHED, WRITE, chain, descriptor,
};
use crate::failure::Result;
use crate::memory::PAGE;
use crate::request::{Request, Response};
use crate::require;
use crate::transport::PAUSE;

super::cases! {
    d15_a_loop_stops_the_queue,
    d15_a_descriptor_that_follows_itself_stops_the_queue,
    d15_a_loop_in_an_indirect_table_stops_the_queue,
    d15_a_next_descriptor_outside_the_table_stops_the_queue,
    d15_a_next_descriptor_outside_an_indirect_table_stops_the_queue,
    d15_a_head_outside_the_table_stops_the_queue,
    d15_an_available_index_far_ahead_stops_the_queue,
    d15_an_available_index_that_goes_back_stops_the_queue,
    d15_an_indirect_table_in_an_indirect_table_stops_the_queue,
    d15_an_indirect_table_of_odd_length_stops_the_queue,
    d15_an_empty_indirect_table_stops_the_queue,
    d15_an_indirect_table_outside_memory_stops_the_queue,
    d15_a_chain_of_more_than_4_gib_stops_the_queue,
    d15_a_chain_of_more_than_1024_descriptors_stops_the_queue,
    d15_no_room_for_a_response_stops_the_queue,
    d15_a_response_outside_memory_stops_the_queue,
    d15_a_response_that_leaves_memory_stops_the_queue,
    d15_a_broken_chain_stops_the_control_queue,
}

fn fill() -> Request {
    Request::new(VIRTIO_HMM_OP_FILL, &[(0, 1)])
}

/// The address of a request, and of room for its response.
fn place_fill(driver: &mut Driver) -> Result<(u64, u64)> {
    let (at, _) = driver.memory.place(&fill().bytes())?;
    let (response, _) = driver.memory.place(&[UNTOUCHED; PAGE])?;
    Ok((at, response))
}

/// The device stops a queue that is given something broken, and serves the others. That it
/// serves this one after a reset is tested after each case.
///
/// What is given has all of a request and room for its response before what is broken, if it
/// can, so that a device which makes do with that is noticed.
fn stops(driver: &mut Driver, give: impl FnOnce(&mut Driver) -> Result) -> Result {
    stops_queue(driver, COPY, give)
}

fn stops_queue(
    driver: &mut Driver,
    queue: u16,
    give: impl FnOnce(&mut Driver) -> Result,
) -> Result {
    give(driver)?;
    driver.kick(queue);
    thread::sleep(PAUSE);
    require!(driver.used(queue)? == 0, "the broken chain was used");

    let request = driver.memory.place(&fill().bytes())?;
    let response = driver.memory.place(&[UNTOUCHED; 9])?;
    let head = driver.size(queue) / 2;
    driver.offer_chain(queue, head, &chain(head, &[request], &[response]))?;
    driver.kick(queue);
    thread::sleep(PAUSE);
    require!(driver.used(queue)? == 0, "the queue went on");
    let written = driver.memory.read(response.0, response.1)?;
    require!(written == [UNTOUCHED; 9], "the queue went on in secret");

    for other in driver.copy_queues().filter(|other| *other != queue) {
        let answer = driver.request(other, &fill(), &[], &[])?;
        require!(answer == Response::ok(1, 0), "queue {other}: {answer:?}");
    }
    if queue != CONTROL {
        driver.counters()?;
    }
    Ok(())
}

fn d15_a_loop_stops_the_queue(driver: &mut Driver) -> Result {
    stops(driver, |driver| {
        let (at, response) = place_fill(driver)?;
        let there = descriptor((at, 48), NEXT, 1);
        let back = descriptor((response, 9), WRITE | NEXT, 0);
        driver.offer_chain(COPY, 0, &[there, back])
    })
}

fn d15_a_descriptor_that_follows_itself_stops_the_queue(driver: &mut Driver) -> Result {
    stops(driver, |driver| {
        // Empty, so that the length of the chain never grows.
        let (at, _) = place_fill(driver)?;
        driver.offer_chain(COPY, 0, &[descriptor((at, 0), NEXT, 0)])
    })
}

/// Offers a chain that is one indirect table of these descriptors and this length in bytes.
fn offer_table(
    driver: &mut Driver,
    table: &[virtio_queue::desc::split::Descriptor],
    len: usize,
) -> Result {
    let at = driver.memory.alloc(16 * table.len())?;
    driver.write_table(at, 0, table)?;
    driver.offer_chain(COPY, 0, &[descriptor((at, len), INDIRECT, 0)])
}

fn d15_a_loop_in_an_indirect_table_stops_the_queue(driver: &mut Driver) -> Result {
    stops(driver, |driver| {
        let (at, response) = place_fill(driver)?;
        let table = [
            descriptor((at, 48), NEXT, 1),
            descriptor((response, 9), WRITE | NEXT, 0),
        ];
        offer_table(driver, &table, 32)
    })
}

fn d15_a_next_descriptor_outside_the_table_stops_the_queue(driver: &mut Driver) -> Result {
    stops(driver, |driver| {
        let (at, response) = place_fill(driver)?;
        let outside = driver.size(COPY);
        let last = descriptor((response, 9), WRITE | NEXT, outside);
        driver.offer_chain(COPY, 0, &[descriptor((at, 48), NEXT, 1), last])
    })
}

fn d15_a_next_descriptor_outside_an_indirect_table_stops_the_queue(driver: &mut Driver) -> Result {
    stops(driver, |driver| {
        let (at, response) = place_fill(driver)?;
        // What would follow is there, but not in the table.
        let table = [
            descriptor((at, 48), NEXT, 1),
            descriptor((response, 9), WRITE | NEXT, 2),
            descriptor((response, 0), WRITE, 0),
        ];
        offer_table(driver, &table, 32)
    })
}

fn d15_a_head_outside_the_table_stops_the_queue(driver: &mut Driver) -> Result {
    stops(driver, |driver| driver.offer(COPY, driver.size(COPY)))
}

fn d15_an_available_index_far_ahead_stops_the_queue(driver: &mut Driver) -> Result {
    stops(driver, |driver| {
        let (at, response) = place_fill(driver)?;
        let [table, ..] = driver.addresses(COPY);
        driver.write_table(table, 0, &chain(0, &[(at, 48)], &[(response, 9)]))?;
        // All at once, as a device may look at any time. Each entry of the ring is 0.
        driver.set_available(COPY, driver.size(COPY) + 1)
    })
}

fn d15_an_available_index_that_goes_back_stops_the_queue(driver: &mut Driver) -> Result {
    stops(driver, |driver| driver.set_available(COPY, u16::MAX))
}

fn d15_an_indirect_table_in_an_indirect_table_stops_the_queue(driver: &mut Driver) -> Result {
    stops(driver, |driver| {
        let (at, response) = place_fill(driver)?;
        let inner = driver.memory.alloc(16)?;
        driver.write_table(inner, 0, &chain(0, &[], &[(response, 0)]))?;
        let table = [
            descriptor((at, 48), NEXT, 1),
            descriptor((response, 9), WRITE | NEXT, 2),
            descriptor((inner, 16), INDIRECT, 0),
        ];
        offer_table(driver, &table, 48)
    })
}

fn d15_an_indirect_table_of_odd_length_stops_the_queue(driver: &mut Driver) -> Result {
    stops(driver, |driver| {
        let (at, response) = place_fill(driver)?;
        offer_table(driver, &chain(0, &[(at, 48)], &[(response, 9)]), 33)
    })
}

fn d15_an_empty_indirect_table_stops_the_queue(driver: &mut Driver) -> Result {
    stops(driver, |driver| {
        let (at, response) = place_fill(driver)?;
        offer_table(driver, &chain(0, &[(at, 48)], &[(response, 9)]), 0)
    })
}

fn d15_an_indirect_table_outside_memory_stops_the_queue(driver: &mut Driver) -> Result {
    for at in OUTSIDE {
        driver.start(FEATURES)?;
        stops(driver, |driver| {
            driver.offer_chain(COPY, 0, &[descriptor((at, 32), INDIRECT, 0)])
        })?;
    }
    Ok(())
}

fn d15_a_chain_of_more_than_4_gib_stops_the_queue(driver: &mut Driver) -> Result {
    for (first, others) in [(u32::MAX, 0), (u32::MAX - 55, 0), (1 << 30, 4)] {
        driver.start(FEATURES)?;
        stops(driver, |driver| {
            let (at, response) = place_fill(driver)?;
            let mut writable = vec![(at, first as usize); 2 + others];
            writable[0] = (response, 9);
            driver.offer_chain(COPY, 0, &chain(0, &[(at, 48)], &writable))
        })?;
    }
    Ok(())
}

fn d15_a_chain_of_more_than_1024_descriptors_stops_the_queue(driver: &mut Driver) -> Result {
    stops(driver, |driver| {
        let (at, response) = place_fill(driver)?;
        let mut writable = vec![(response, 0); 1024];
        writable[0] = (response, 9);
        let table = chain(0, &[(at, 48)], &writable);
        offer_table(driver, &table, 16 * table.len())
    })
}

fn d15_no_room_for_a_response_stops_the_queue(driver: &mut Driver) -> Result {
    for room in [&[][..], &[0], &[7], &[3, 4]] {
        driver.start(FEATURES)?;
        stops(driver, |driver| {
            let (at, response) = place_fill(driver)?;
            let writable: Vec<_> = room.iter().map(|len| (response, *len)).collect();
            driver.offer_chain(COPY, 0, &chain(0, &[(at, 48)], &writable))
        })?;
    }
    Ok(())
}

fn d15_a_response_outside_memory_stops_the_queue(driver: &mut Driver) -> Result {
    for outside in OUTSIDE {
        driver.start(FEATURES)?;
        stops(driver, |driver| {
            let (at, _) = place_fill(driver)?;
            driver.offer_chain(COPY, 0, &chain(0, &[(at, 48)], &[(outside, 9)]))
        })?;
    }
    Ok(())
}

fn d15_a_response_that_leaves_memory_stops_the_queue(driver: &mut Driver) -> Result {
    stops(driver, |driver| {
        let (at, response) = place_fill(driver)?;
        let writable = [(response, 7), (OUTSIDE[0], 2)];
        driver.offer_chain(COPY, 0, &chain(0, &[(at, 48)], &writable))
    })
}

fn d15_a_broken_chain_stops_the_control_queue(driver: &mut Driver) -> Result {
    stops_queue(driver, CONTROL, |driver| {
        let (at, _) = place_fill(driver)?;
        driver.offer_chain(CONTROL, 0, &[descriptor((at, 48), NEXT, 0)])
    })
}
