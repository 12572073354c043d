//! Virtio over PCI as VIRTIO 1.3, section 4.1 has it, on top of vfio.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vfio_bindings::bindings::vfio::{VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX};
use vfio_ioctls::{VfioContainer, VfioDevice};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::failure::{Failure, Result};
use crate::memory::Memory;

/// Nothing takes longer, unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Long enough for a device to do what it must not do.
pub const PAUSE: Duration = Duration::from_millis(50);

/// Bits of the device's status.
pub mod status {
    /// The driver has found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed upon.
    pub const FEATURES_OK: u8 = 8;
}

/// Fields of the common configuration.
pub mod common {
    /// Which half of the device's features is shown.
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    /// Features of the device.
    pub const DEVICE_FEATURE: u64 = 4;
    /// Which half of the driver's features is written.
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    /// Features that the driver accepts.
    pub const DRIVER_FEATURE: u64 = 12;
    /// Number of queues.
    pub const NUM_QUEUES: u64 = 18;
    /// The status.
    pub const DEVICE_STATUS: u64 = 20;
    /// The queue that the fields below are about.
    pub const QUEUE_SELECT: u64 = 22;
    /// Number of descriptors.
    pub const QUEUE_SIZE: u64 = 24;
    /// Whether the queue is in use.
    pub const QUEUE_ENABLE: u64 = 28;
    /// Where the queue is notified.
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    /// Address of the descriptor table.
    pub const QUEUE_DESC: u64 = 32;
    /// Address of the available ring.
    pub const QUEUE_DRIVER: u64 = 40;
    /// Address of the used ring.
    pub const QUEUE_DEVICE: u64 = 48;
    /// All of it.
    pub const BYTES: u64 = 56;
}

/// Registers and capabilities of a PCI device.
mod pci {
    pub const COMMAND: u64 = 4;
    pub const COMMAND_MEMORY: u16 = 2;
    pub const COMMAND_MASTER: u16 = 4;
    pub const STATUS: u64 = 6;
    pub const STATUS_CAPABILITIES: u16 = 0x10;
    pub const CAPABILITIES: u64 = 0x34;
    pub const VENDOR_SPECIFIC: u8 = 9;
}

/// What a vendor-specific capability of a virtio device is about.
mod kind {
    pub const COMMON: u8 = 1;
    pub const NOTIFY: u8 = 2;
    pub const ISR: u8 = 3;
    pub const DEVICE: u8 = 4;
    pub const PCI: u8 = 5;
}

/// Part of a region of the device.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    region: u32,
    offset: u64,
    /// Bytes.
    pub length: u64,
}

/// A device as its registers show it.
pub struct Transport {
    vfio: VfioDevice,
    container: Arc<VfioContainer>,
    interrupt: EventFd,
    /// The common configuration.
    pub common: Window,
    /// Where queues are notified.
    pub notify: Window,
    /// The device's own configuration.
    pub device: Window,
    isr: Window,
    notify_multiplier: u64,
    /// Where in PCI configuration space is the capability that gives access to the others.
    pci_access: Option<u64>,
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transport")
            .field("common", &self.common)
            .field("notify", &self.notify)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl Transport {
    /// Opens the device at this path of sysfs, which is bound to vfio-pci.
    ///
    /// # Errors
    /// It cannot be opened, or is no virtio device of version 1 or later.
    pub fn open(path: &Path) -> Result<Self> {
        let container = Arc::new(VfioContainer::new(None)?);
        let vfio = VfioDevice::new(path, Arc::clone(&container) as _, false)?;
        let config = Window {
            region: VFIO_PCI_CONFIG_REGION_INDEX,
            offset: 0,
            length: 256,
        };
        let byte = |at: u64| u8::from_le_bytes(read(&vfio, config, at));
        let word = |at: u64| u32::from_le_bytes(read(&vfio, config, at));

        let mut found: [Option<Window>; 6] = [None; 6];
        let (mut notify_multiplier, mut pci_access) = (0, None);
        let listed = u16::from_le_bytes(read(&vfio, config, pci::STATUS));
        let mut at = match listed & pci::STATUS_CAPABILITIES {
            0 => 0,
            _ => byte(pci::CAPABILITIES),
        };
        // No more fit into 256 bytes, whatever the links say.
        for _ in 0..48 {
            let here = u64::from(at & !3);
            if here == 0 {
                break;
            }
            let (of, bar) = (byte(here + 3), byte(here + 4));
            if byte(here) == pci::VENDOR_SPECIFIC {
                let window = Window {
                    region: bar.into(),
                    offset: word(here + 8).into(),
                    length: word(here + 12).into(),
                };
                match of {
                    kind::NOTIFY if found[2].is_none() => {
                        notify_multiplier = word(here + 16).into();
                    }
                    kind::PCI => pci_access = Some(here),
                    _ => {}
                }
                // The first of a kind is the one that the device prefers.
                if let Some(place) = found.get_mut(usize::from(of)) {
                    place.get_or_insert(window);
                }
            }
            at = byte(here + 1);
        }
        let window = |of: u8, name: &str| {
            found[usize::from(of)]
                .ok_or_else(|| Failure::Unfit(format!("the device shows no {name}")))
        };
        let transport = Self {
            common: window(kind::COMMON, "common configuration")?,
            notify: window(kind::NOTIFY, "notifications")?,
            isr: window(kind::ISR, "interrupt status")?,
            device: window(kind::DEVICE, "configuration of its own")?,
            notify_multiplier,
            pci_access,
            vfio,
            container,
            interrupt: EventFd::new(EFD_NONBLOCK)
                .map_err(|error| Failure::Unfit(format!("no event: {error}")))?,
        };
        let command = u16::from_le_bytes(read(&transport.vfio, config, pci::COMMAND));
        let command = command | pci::COMMAND_MEMORY | pci::COMMAND_MASTER;
        transport.write(config, pci::COMMAND, &command.to_le_bytes());
        Ok(transport)
    }

    /// Lets the device access `memory` at the addresses that it has there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn map(&self, memory: &Memory) -> Result {
        // SAFETY: `memory.pages` is accessed through vm-memory alone, whose accesses are volatile
        // and which gives out no references; and the device is reset, and its file closed, before
        // the pages are unmapped, since `Driver` drops its transport first.
        unsafe { self.container.vfio_map_guest_memory(&memory.pages) }?;
        memory.check_addresses()
    }

    /// Reads from a window. What lies outside its region reads as ones.
    #[must_use]
    pub fn read<const N: usize>(&self, window: Window, at: u64) -> [u8; N] {
        read(&self.vfio, window, at)
    }

    /// Writes to a window. What lies outside its region is not written.
    pub fn write(&self, window: Window, at: u64, bytes: &[u8]) {
        self.vfio
            .region_write(window.region, bytes, window.offset + at);
    }

    /// A 16-bit field of the common configuration.
    #[must_use]
    pub fn common_u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(self.common, at))
    }

    fn set_u16(&self, at: u64, value: u16) {
        self.write(self.common, at, &value.to_le_bytes());
    }

    fn set_u32(&self, at: u64, value: u32) {
        self.write(self.common, at, &value.to_le_bytes());
    }

    /// The status.
    #[must_use]
    pub fn status(&self) -> u8 {
        u8::from_le_bytes(self.read(self.common, common::DEVICE_STATUS))
    }

    /// Writes the status.
    pub fn set_status(&self, status: u8) {
        self.write(self.common, common::DEVICE_STATUS, &[status]);
    }

    /// Resets the device and waits until it confirms.
    ///
    /// # Errors
    /// It does not.
    pub fn reset(&self) -> Result {
        self.set_status(0);
        wait("confirmed reset", || Ok(self.status() == 0))?;
        // It takes back an interrupt that was on its way.
        self.isr();
        self.interrupt.read().ok();
        Ok(())
    }

    /// Features that the device offers.
    #[must_use]
    pub fn features(&self) -> u64 {
        let half = |select: u32| -> u64 {
            self.set_u32(common::DEVICE_FEATURE_SELECT, select);
            u32::from_le_bytes(self.read(self.common, common::DEVICE_FEATURE)).into()
        };
        half(0) | half(1) << 32
    }

    /// Accepts features.
    pub fn accept(&self, features: u64) {
        for (select, half) in [features, features >> 32].into_iter().enumerate() {
            self.set_u32(common::DRIVER_FEATURE_SELECT, u32::from(select != 0));
            self.set_u32(common::DRIVER_FEATURE, low(half));
        }
    }

    /// Number of queues.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.common_u16(common::NUM_QUEUES)
    }

    /// Chooses the queue that the fields of the common configuration are about.
    pub fn select(&self, queue: u16) {
        self.set_u16(common::QUEUE_SELECT, queue);
    }

    /// Sets the size of the selected queue.
    pub fn set_size(&self, size: u16) {
        self.set_u16(common::QUEUE_SIZE, size);
    }

    /// Sets the addresses of the selected queue's descriptor table, available and used ring.
    pub fn set_addresses(&self, addresses: [u64; 3]) {
        let fields = [
            common::QUEUE_DESC,
            common::QUEUE_DRIVER,
            common::QUEUE_DEVICE,
        ];
        for (at, address) in fields.into_iter().zip(addresses) {
            self.set_u32(at, low(address));
            self.set_u32(at + 4, low(address >> 32));
        }
    }

    /// Puts the selected queue into use.
    pub fn enable(&self) {
        self.set_u16(common::QUEUE_ENABLE, 1);
    }

    /// Where the queue is notified, from the start of the window on.
    #[must_use]
    pub fn notify_offset(&self, queue: u16) -> u64 {
        self.select(queue);
        u64::from(self.common_u16(common::QUEUE_NOTIFY_OFF)) * self.notify_multiplier
    }

    /// Notifies the device of a queue, at this place.
    pub fn notify(&self, at: u64, queue: u16) {
        self.write(self.notify, at, &queue.to_le_bytes());
    }

    /// Whether the device has notified the driver since this was last asked. This also takes the
    /// interrupt back.
    #[must_use]
    pub fn notified(&self) -> bool {
        self.isr() & 1 != 0
    }

    fn isr(&self) -> u8 {
        u8::from_le_bytes(self.read(self.isr, 0))
    }

    /// Has the interrupt, if it comes, counted by [`Self::interrupts`].
    ///
    /// # Errors
    /// The device has no interrupt line, or the kernel refuses.
    pub fn enable_interrupt(&self) -> Result {
        let line = self.vfio.get_irq_info(VFIO_PCI_INTX_IRQ_INDEX);
        if line.is_none_or(|line| line.count == 0) {
            return Err(Failure::Skip("the device has no interrupt line".into()));
        }
        let events = vec![&self.interrupt];
        Ok(self.vfio.enable_irq(VFIO_PCI_INTX_IRQ_INDEX, events)?)
    }

    /// No more interrupts.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn disable_interrupt(&self) -> Result {
        Ok(self.vfio.disable_irq(VFIO_PCI_INTX_IRQ_INDEX)?)
    }

    /// How many interrupts came since this was last asked.
    #[must_use]
    pub fn interrupts(&self) -> u64 {
        self.interrupt.read().unwrap_or(0)
    }

    /// Reads four bytes of a BAR by way of PCI configuration space, having set which, from where
    /// and how many.
    ///
    /// # Errors
    /// The device has no such capability.
    pub fn read_by_pci(&self, bar: u8, offset: u32, length: u32) -> Result<[u8; 4]> {
        let at = self.set_pci_access(bar, offset, length)?;
        Ok(self.read(self.pci_config(), at + 16))
    }

    /// Writes four bytes in the same way.
    ///
    /// # Errors
    /// The device has no such capability.
    pub fn write_by_pci(&self, bar: u8, offset: u32, length: u32, bytes: [u8; 4]) -> Result {
        let at = self.set_pci_access(bar, offset, length)?;
        self.write(self.pci_config(), at + 16, &bytes);
        Ok(())
    }

    fn set_pci_access(&self, bar: u8, offset: u32, length: u32) -> Result<u64> {
        let missing = || Failure::Skip("the device gives no access by PCI configuration".into());
        let at = self.pci_access.ok_or_else(missing)?;
        self.write(self.pci_config(), at + 4, &[bar]);
        self.write(self.pci_config(), at + 8, &offset.to_le_bytes());
        self.write(self.pci_config(), at + 12, &length.to_le_bytes());
        Ok(at)
    }

    fn pci_config(&self) -> Window {
        Window {
            region: VFIO_PCI_CONFIG_REGION_INDEX,
            offset: 0,
            length: 256,
        }
    }

    /// BAR and offset of the device's own configuration.
    #[must_use]
    pub fn device_place(&self) -> (u8, u32) {
        let bar = u8::try_from(self.device.region).unwrap_or(u8::MAX);
        (bar, low(self.device.offset))
    }
}

/// Waits until `condition` holds.
///
/// # Errors
/// It does not in time, or cannot be found out.
pub fn wait(what: &'static str, mut condition: impl FnMut() -> Result<bool>) -> Result {
    let start = Instant::now();
    while !condition()? {
        if start.elapsed() > PATIENCE {
            return Err(Failure::Late(what));
        }
        thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}

fn read<const N: usize>(vfio: &VfioDevice, window: Window, at: u64) -> [u8; N] {
    let mut bytes = [0xff; N];
    vfio.region_read(window.region, &mut bytes, window.offset + at);
    bytes
}

/// The lower half.
fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}
