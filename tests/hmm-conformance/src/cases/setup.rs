//! Set-ups that are incomplete, repeated or wrong.

use std::thread;

use vhost_device_hmm::abi::VIRTIO_HMM_OP_FILL;

use super::OUTSIDE;
use crate::driver::{CONTROL, COPY, Driver, FEATURES, VERSION_1, chain};
use crate::failure::Result;
use crate::request::{Request, Response};
use crate::require;
use crate::transport::{PAUSE, common, status};

super::cases! {
    d24_queues_that_are_not_set_up_are_not_served,
    d24_notifications_before_the_start_do_no_harm,
    d24_notifications_of_queues_that_do_not_exist_do_no_harm,
    d24_a_queue_enabled_twice_goes_on,
    d25_a_start_without_queues_does_no_harm,
    d25_a_start_without_features_does_no_harm,
    d25_features_that_are_not_offered_do_no_harm,
    d25_statuses_in_any_order_do_no_harm,
    d25_queue_numbers_out_of_range_do_no_harm,
    d25_queue_sizes_out_of_range_do_no_harm,
    d25_fields_of_odd_widths_do_no_harm,
    d25_addresses_that_change_under_way_do_no_harm,
    d25_descriptor_tables_outside_memory_do_no_harm,
    d25_available_rings_outside_memory_do_no_harm
        ends QEMU by "QEMU hands on an address of its own for the ring, the vhost-user library ends the session at it, and QEMU aborts",
    d25_used_rings_outside_memory_do_no_harm,
    d25_rings_that_are_not_aligned_do_no_harm
        ends QEMU by "the vhost-user library ends the session at such a ring, and QEMU aborts",
    d25_rings_in_registers_do_no_harm
        ends QEMU by "QEMU hands on an address of its own for the ring, the vhost-user library ends the session at it, and QEMU aborts",
    d25_rings_that_overlap_do_no_harm,
}

fn fill() -> Request {
    Request::new(VIRTIO_HMM_OP_FILL, &[(0, 1)])
}

fn check_serves(driver: &mut Driver, queue: u16) -> Result {
    let answer = driver.request(queue, &fill(), &[], &[])?;
    require!(answer == Response::ok(1, 0), "queue {queue}: {answer:?}");
    Ok(())
}

fn d24_queues_that_are_not_set_up_are_not_served(driver: &mut Driver) -> Result {
    driver.begin(FEATURES)?;
    driver.set_up(COPY)?;
    driver.go();
    let queues = driver.transport.queues();
    for queue in (0..queues).filter(|queue| *queue != COPY) {
        driver.kick(queue);
    }
    check_serves(driver, COPY)?;
    for queue in (0..queues).filter(|queue| *queue != COPY) {
        require!(driver.used(queue)? == 0, "queue {queue} was served");
        driver.kick(queue);
    }
    check_serves(driver, COPY)
}

fn d24_notifications_before_the_start_do_no_harm(driver: &mut Driver) -> Result {
    driver.transport.reset()?;
    let queues = driver.transport.queues();
    for queue in 0..queues {
        driver.kick(queue);
    }
    driver.begin(FEATURES)?;
    for queue in 0..queues {
        driver.kick(queue);
        driver.set_up(queue)?;
        driver.kick(queue);
    }
    driver.go();
    driver
        .copy_queues()
        .try_for_each(|queue| check_serves(driver, queue))
}

fn d24_notifications_of_queues_that_do_not_exist_do_no_harm(driver: &mut Driver) -> Result {
    let transport = &driver.transport;
    let (queues, end) = (transport.queues(), transport.notify.length);
    let place = transport.notify_offset(COPY);
    for number in [queues, queues + 1, 1024, u16::MAX] {
        transport.notify(place, number);
    }
    let last = transport.notify_offset(queues - 1);
    for at in [last + 4, last + 2, 0x100, end / 2, end - 2]
        .into_iter()
        .filter(|at| *at < end)
    {
        transport.notify(at, queues);
    }
    transport.write(transport.notify, 0, &[0; 1]);
    transport.write(transport.notify, 0, &[0xff; 4]);
    transport.write(transport.notify, 0, &[0xff; 8]);
    driver
        .copy_queues()
        .try_for_each(|queue| check_serves(driver, queue))?;
    driver.counters().map(drop)
}

fn d24_a_queue_enabled_twice_goes_on(driver: &mut Driver) -> Result {
    for queue in driver.copy_queues() {
        for _ in 0..3 {
            check_serves(driver, queue)?;
            driver.transport.select(queue);
            driver.transport.enable();
        }
        check_serves(driver, queue)?;
    }
    // And before the start.
    driver.begin(FEATURES)?;
    for queue in 0..driver.transport.queues() {
        driver.set_up(queue)?;
        driver.transport.enable();
    }
    driver.go();
    driver
        .copy_queues()
        .try_for_each(|queue| check_serves(driver, queue))
}

fn d25_a_start_without_queues_does_no_harm(driver: &mut Driver) -> Result {
    driver.begin(FEATURES)?;
    driver.go();
    for queue in 0..driver.transport.queues() {
        driver.kick(queue);
    }
    Ok(())
}

fn d25_a_start_without_features_does_no_harm(driver: &mut Driver) -> Result {
    driver.transport.reset()?;
    for queue in 0..driver.transport.queues() {
        driver.set_up(queue)?;
    }
    driver.go();
    driver.kick(COPY);
    driver.begin(VERSION_1)?;
    driver.go();
    Ok(())
}

fn d25_features_that_are_not_offered_do_no_harm(driver: &mut Driver) -> Result {
    let transport = &driver.transport;
    let missing = !transport.features();
    transport.reset()?;
    transport.set_status(status::ACKNOWLEDGE | status::DRIVER);
    transport.accept(FEATURES | missing);
    transport.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
    driver.set_up(COPY)?;
    driver.go();
    driver.kick(COPY);
    Ok(())
}

fn d25_statuses_in_any_order_do_no_harm(driver: &mut Driver) -> Result {
    for _ in 0..60 {
        let bits = driver.random.u8(..);
        driver.transport.set_status(bits);
        if driver.random.bool() {
            let queue = driver.random.u16(..driver.transport.queues());
            driver.kick(queue);
        }
        if driver.random.u8(..8) == 0 {
            driver.transport.reset()?;
        }
    }
    Ok(())
}

fn d25_queue_numbers_out_of_range_do_no_harm(driver: &mut Driver) -> Result {
    let transport = &driver.transport;
    let addresses = driver.addresses(COPY);
    for queue in [transport.queues(), 64, 1023, 1024, 0x8000, u16::MAX] {
        transport.select(queue);
        let size = transport.common_u16(common::QUEUE_SIZE);
        require!(
            size == 0,
            "queue {queue}, which does not exist, has {size} descriptors"
        );
        transport.set_size(16);
        transport.set_addresses(addresses);
        transport.enable();
    }
    check_serves(driver, COPY)
}

fn d25_queue_sizes_out_of_range_do_no_harm(driver: &mut Driver) -> Result {
    for size in [0, 1, 3, 1000, 1025, 2048, 0x8000, u16::MAX] {
        driver.begin(FEATURES)?;
        for queue in [CONTROL, COPY] {
            let addresses = driver.addresses(queue);
            driver.transport.select(queue);
            driver.transport.set_size(size);
            driver.transport.set_addresses(addresses);
            driver.transport.enable();
        }
        driver.go();
        driver.kick(COPY);
        thread::sleep(PAUSE / 10);
    }
    Ok(())
}

fn d25_fields_of_odd_widths_do_no_harm(driver: &mut Driver) -> Result {
    let transport = &driver.transport;
    transport.reset()?;
    for at in 0..transport.common.length.min(2 * common::BYTES) {
        // Not what lets a queue or the device start, of which other cases are.
        if (common::DEVICE_STATUS..common::QUEUE_SELECT).contains(&at) {
            continue;
        }
        let _ = transport.read::<1>(transport.common, at);
        let _ = transport.read::<8>(transport.common, at);
        transport.write(transport.common, at, &[0xff]);
        if at.is_multiple_of(2) {
            transport.write(transport.common, at, &[0x55; 2]);
        }
        if at.is_multiple_of(8) && at != common::NUM_QUEUES - 2 {
            transport.write(transport.common, at, &[0xaa; 8]);
        }
    }
    Ok(())
}

fn d25_addresses_that_change_under_way_do_no_harm(driver: &mut Driver) -> Result {
    let request = driver.memory.place(&fill().bytes())?;
    let response = driver.response_buffer(&fill())?;
    for address in [0, 8, OUTSIDE[0], u64::MAX] {
        driver.start(FEATURES)?;
        driver.offer_chain(COPY, 0, &chain(0, &[request], &[response]))?;
        driver.transport.select(COPY);
        driver.transport.set_addresses([address; 3]);
        driver.kick(COPY);
        thread::sleep(PAUSE / 10);
    }
    Ok(())
}

/// Starts with the copy queue's table and rings there.
fn start_at(driver: &mut Driver, addresses: [u64; 3]) -> Result {
    driver.begin(FEATURES)?;
    for queue in (0..driver.transport.queues()).filter(|queue| *queue != COPY) {
        driver.set_up(queue)?;
    }
    driver.set_up_at(COPY, addresses)?;
    driver.go();
    driver.kick(COPY);
    thread::sleep(PAUSE / 5);
    Ok(())
}

fn start_outside(driver: &mut Driver, part: usize) -> Result {
    for outside in [OUTSIDE[0], u64::MAX - 0xfff] {
        let mut addresses = driver.addresses(COPY);
        addresses[part] = outside;
        start_at(driver, addresses)?;
    }
    Ok(())
}

fn d25_descriptor_tables_outside_memory_do_no_harm(driver: &mut Driver) -> Result {
    start_outside(driver, 0)
}

fn d25_available_rings_outside_memory_do_no_harm(driver: &mut Driver) -> Result {
    start_outside(driver, 1)
}

fn d25_used_rings_outside_memory_do_no_harm(driver: &mut Driver) -> Result {
    start_outside(driver, 2)
}

fn d25_rings_in_registers_do_no_harm(driver: &mut Driver) -> Result {
    for part in 0..3 {
        let mut addresses = driver.addresses(COPY);
        addresses[part] = OUTSIDE[1];
        start_at(driver, addresses)?;
    }
    Ok(())
}

fn d25_rings_that_are_not_aligned_do_no_harm(driver: &mut Driver) -> Result {
    for part in 0..3 {
        let mut addresses = driver.addresses(COPY);
        addresses[part] += 1;
        start_at(driver, addresses)?;
    }
    Ok(())
}

fn d25_rings_that_overlap_do_no_harm(driver: &mut Driver) -> Result {
    let [table, ..] = driver.addresses(COPY);
    start_at(driver, [table; 3])?;
    driver.offer_chain(COPY, 0, &chain(0, &[(table, 48)], &[(table, 9)]))?;
    driver.kick(COPY);
    thread::sleep(PAUSE);
    Ok(())
}
