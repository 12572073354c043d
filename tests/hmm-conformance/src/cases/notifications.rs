//! Notifications each way, and the event queue.

use std::thread;

use vhost_device_hmm::abi::VIRTIO_HMM_OP_FILL;

use crate::driver::{
    Buffer, COPY, Driver, EVENT, EVENT_IDX, FEATURES, INDIRECT_DESC, UNTOUCHED, VERSION_1, chain,
};
use crate::failure::Result;
use crate::request::Request;
use crate::require;
use crate::transport::{PAUSE, wait};

super::cases! {
    d18_with_event_idx_the_device_notifies_when_asked,
    d18_without_event_idx_the_device_notifies_each_time,
    d18_a_notification_is_an_interrupt,
    d18_all_is_processed_after_one_notification,
    d20_the_event_queue_keeps_its_buffers,
}

/// Buffers of a request for one frame.
fn fill(driver: &mut Driver) -> Result<[Buffer; 2]> {
    let request = Request::new(VIRTIO_HMM_OP_FILL, &[(0, 1)]);
    let head = driver.memory.place(&request.bytes())?;
    Ok([head, driver.response_buffer(&request)?])
}

fn d18_with_event_idx_the_device_notifies_when_asked(driver: &mut Driver) -> Result {
    let [head, response] = fill(driver)?;
    // Of four, the third alone is wanted.
    driver.set_used_event(COPY, 2)?;
    for number in 0..4 {
        driver.run(COPY, &[head], &[response])?;
        if number == 2 {
            wait("notification", || Ok(driver.transport.notified()))?;
        }
        thread::sleep(PAUSE);
        let notified = driver.transport.notified();
        require!(!notified, "a notification of used buffer {number}");
    }
    Ok(())
}

fn d18_without_event_idx_the_device_notifies_each_time(driver: &mut Driver) -> Result {
    driver.start(VERSION_1 | INDIRECT_DESC)?;
    let [head, response] = fill(driver)?;
    for _ in 0..4 {
        driver.run(COPY, &[head], &[response])?;
        wait("notification", || Ok(driver.transport.notified()))?;
    }
    Ok(())
}

fn d18_a_notification_is_an_interrupt(driver: &mut Driver) -> Result {
    driver.start(VERSION_1)?;
    let [head, response] = fill(driver)?;
    driver.transport.enable_interrupt()?;
    let result = driver.run(COPY, &[head], &[response]).and_then(|_| {
        wait("interrupt", || Ok(driver.transport.interrupts() > 0))?;
        require!(
            driver.transport.notified(),
            "an interrupt without a notification"
        );
        Ok(())
    });
    driver.transport.disable_interrupt()?;
    result
}

fn d18_all_is_processed_after_one_notification(driver: &mut Driver) -> Result {
    for features in [VERSION_1, VERSION_1 | EVENT_IDX, FEATURES] {
        driver.start(features)?;
        let [head, response] = fill(driver)?;
        let number = driver.size(COPY) / 2;
        // More than once around the rings.
        for _ in 0..3 {
            for at in 0..number {
                driver.offer_chain(COPY, 2 * at, &chain(2 * at, &[head], &[response]))?;
            }
            driver.kick(COPY);
            let mut seen = vec![0_u32; usize::from(number)];
            for _ in 0..number {
                let (head, written) = driver.next_used(COPY)?;
                require!(written == 9, "a used length of {written}");
                let times = seen.get_mut(head as usize / 2);
                require!(
                    head.is_multiple_of(2) && times.is_some(),
                    "chain {head} is used"
                );
                times.into_iter().for_each(|times| *times += 1);
            }
            require!(
                seen.iter().all(|times| *times == 1),
                "chains used: {seen:?}"
            );
        }
    }
    Ok(())
}

fn d20_the_event_queue_keeps_its_buffers(driver: &mut Driver) -> Result {
    let (at, len) = driver.memory.place(&[UNTOUCHED; 64])?;
    for number in 0..4 {
        driver.offer_chain(EVENT, number, &chain(number, &[], &[(at, len)]))?;
    }
    driver.kick(EVENT);
    // With something else to do in between.
    let bytes = driver.noise(1);
    driver.store(0, &bytes)?;
    thread::sleep(PAUSE);
    require!(
        driver.used(EVENT)? == 0,
        "a buffer of the event queue was used"
    );
    let found = driver.memory.read(at, len)?;
    require!(
        found == [UNTOUCHED; 64],
        "a buffer of the event queue was written"
    );
    Ok(())
}
