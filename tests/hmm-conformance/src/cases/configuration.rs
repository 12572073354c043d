//! The configuration space.

use vhost_device_hmm::abi::{
    VIRTIO_HMM_FRAME_SIZE, VIRTIO_HMM_MAX_FRAMES, VIRTIO_HMM_QUEUE_COPY, virtio_hmm_config,
};
use vm_memory::ByteValued;

use crate::driver::{Driver, FEATURES};
use crate::failure::Result;
use crate::require;

super::cases! {
    d1_the_layout_is_right,
    d1_bytes_behind_the_layout_are_zero,
    d1_reads_of_every_width_agree,
    d1_reads_out_of_range_do_no_harm,
    d1_nothing_changes_with_a_reset,
    d22_writes_change_nothing,
    d22_access_by_pci_configuration_changes_nothing,
    d23_no_reserved_feature_is_offered,
}

/// Bytes of configuration space that a VMM shows at most.
const SPACE: u64 = 256;
/// Bytes that the layout describes.
const LAYOUT: usize = size_of::<virtio_hmm_config>();

fn space(driver: &Driver) -> Vec<u8> {
    let shown = driver.transport.device.length.min(SPACE);
    driver.config_bytes(usize::try_from(shown).unwrap_or(0))
}

fn d1_the_layout_is_right(driver: &mut Driver) -> Result {
    let config = driver.read_config();
    let size = u64::from(config.memory_size);
    let (queues, most) = (u32::from(config.copy_queues), u32::from(config.max_frames));
    require!(
        u32::from(config.frame_size) == VIRTIO_HMM_FRAME_SIZE,
        "{config:?}"
    );
    require!(
        size > 0 && size.is_multiple_of(2 << 20),
        "a memory of {size} bytes"
    );
    require!((1..=16).contains(&queues), "{queues} copy queues");
    require!(
        (1..=VIRTIO_HMM_MAX_FRAMES).contains(&most),
        "{most} frames at most"
    );
    require!(config.uuid != [0; 16], "no uuid");
    let all = u32::from(driver.transport.queues());
    require!(
        all >= VIRTIO_HMM_QUEUE_COPY + queues,
        "{all} queues, of which {queues} are to copy"
    );
    Ok(())
}

fn d1_bytes_behind_the_layout_are_zero(driver: &mut Driver) -> Result {
    let behind = &space(driver)[LAYOUT..];
    require!(behind.iter().all(|byte| *byte == 0), "{behind:x?}");
    Ok(())
}

fn d1_reads_of_every_width_agree(driver: &mut Driver) -> Result {
    let by_four = space(driver);
    let (transport, window) = (&driver.transport, driver.transport.device);
    for at in 0..by_four.len() as u64 {
        let from = &by_four[usize::try_from(at).unwrap_or(0)..];
        require!(
            from.starts_with(&transport.read::<1>(window, at)),
            "byte {at}"
        );
        if at.is_multiple_of(2) {
            require!(
                from.starts_with(&transport.read::<2>(window, at)),
                "two at {at}"
            );
        }
        if at.is_multiple_of(8) {
            require!(
                from.starts_with(&transport.read::<8>(window, at)),
                "eight at {at}"
            );
        }
    }
    Ok(())
}

fn d1_reads_out_of_range_do_no_harm(driver: &mut Driver) -> Result {
    let before = space(driver);
    let (transport, window) = (&driver.transport, driver.transport.device);
    for at in (SPACE - 8..window.length)
        .step_by(61)
        .chain([window.length - 1])
    {
        // What is there is not the device's to say.
        let _ = transport.read::<1>(window, at);
        let _ = transport.read::<2>(window, at);
        let _ = transport.read::<4>(window, at);
        let _ = transport.read::<8>(window, at);
    }
    require!(space(driver) == before, "reading changed the configuration");
    Ok(())
}

fn d1_nothing_changes_with_a_reset(driver: &mut Driver) -> Result {
    let before = space(driver);
    driver.transport.reset()?;
    require!(space(driver) == before, "a reset changed the configuration");
    driver.start(FEATURES)?;
    require!(space(driver) == before, "a start changed the configuration");
    Ok(())
}

fn d22_writes_change_nothing(driver: &mut Driver) -> Result {
    let before = space(driver);
    let (transport, window) = (&driver.transport, driver.transport.device);
    for at in (0..SPACE + 16).chain([window.length - 1]) {
        transport.write(window, at, &[0xa5]);
        if at.is_multiple_of(8) {
            transport.write(window, at, &[0x5a; 2]);
            transport.write(window, at, &[0xa5; 4]);
            transport.write(window, at, &[0xff; 8]);
        }
    }
    require!(space(driver) == before, "writing changed the configuration");
    // The device works on, without a reset.
    let bytes = driver.noise(1);
    driver.store(7, &bytes)?;
    require!(driver.load(7, 1)? == bytes, "writing changed more");
    Ok(())
}

fn d22_access_by_pci_configuration_changes_nothing(driver: &mut Driver) -> Result {
    let before = space(driver);
    let transport = &driver.transport;
    let (bar, offset) = transport.device_place();
    let bytes = transport.read_by_pci(bar, offset, 4)?;
    require!(
        before.starts_with(&bytes),
        "{bytes:x?} by PCI configuration"
    );
    for length in [0, 1, 2, 3, 4, 5, 8, u32::MAX] {
        for at in [0, 1, 47, 48, 252, 255, 256, 0xfff, u32::MAX - offset] {
            transport.read_by_pci(bar, offset + at, length)?;
            transport.write_by_pci(bar, offset + at, length, [0xa5; 4])?;
        }
        for bar in [0, 1, 2, 3, 5, 6, 7, u8::MAX] {
            transport.read_by_pci(bar, u32::MAX - 3, length)?;
            transport.write_by_pci(bar, u32::MAX - 3, length, [0; 4])?;
        }
    }
    require!(space(driver) == before, "writing changed the configuration");
    Ok(())
}

fn d23_no_reserved_feature_is_offered(driver: &mut Driver) -> Result {
    let offered = driver.transport.features();
    require!(offered & 0b111 == 0, "features {offered:#x}");
    require!(offered & FEATURES == FEATURES, "features {offered:#x}");
    let same = driver.read_config().as_slice() == driver.config.as_slice();
    require!(same, "asking for features changed the configuration");
    Ok(())
}
