//! What a device is for the VM that has just been connected.

use vm_memory::ByteValued;

use crate::driver::{Driver, FEATURES};
use crate::failure::{Failure, Result};
use crate::require;

super::cases! {
    d17_memory_and_counters_are_zero_for_a_new_vm,
    d17_contents_and_generation_outlive_a_reset,
}

fn d17_memory_and_counters_are_zero_for_a_new_vm(driver: &mut Driver) -> Result {
    if !driver.fresh {
        return Err(Failure::Skip(
            "the device may have been used: no --fresh".into(),
        ));
    }
    let counters = driver.counters()?;
    let all = counters.as_slice();
    require!(
        all.iter().all(|byte| *byte == 0),
        "a new VM finds counters {counters:?}"
    );
    let at_once = u32::from(driver.config.max_frames);
    for first in (0..driver.frames()).step_by(at_once as usize) {
        let number = u64::from(at_once).min(driver.frames() - first);
        let bytes = driver.load(first, usize::try_from(number).unwrap_or(0))?;
        let dirty = bytes.iter().position(|byte| *byte != 0);
        require!(
            dirty.is_none(),
            "a new VM finds another byte than 0 in frames from {first} on, at {dirty:?}"
        );
    }
    Ok(())
}

fn d17_contents_and_generation_outlive_a_reset(driver: &mut Driver) -> Result {
    let bytes = driver.noise(4);
    driver.store(100, &bytes)?;
    let generation = u64::from(driver.read_config().generation);
    let before = driver.counters()?;
    driver.start(FEATURES)?;
    let after = driver.counters()?;
    require!(
        u64::from(after.to_device.requests) == u64::from(before.to_device.requests),
        "a reset changed the counters"
    );
    let now = u64::from(driver.read_config().generation);
    require!(
        driver.load(100, 4)? == bytes,
        "a reset changed device memory"
    );
    require!(now == generation, "a reset changed the generation");
    Ok(())
}
