//! The driver: a device with its rings, and requests over them.

use std::sync::atomic::{Ordering, fence};

use fastrand::Rng;
use vhost_device_hmm::abi::{
    VIRTIO_HMM_FRAME_SIZE, VIRTIO_HMM_OP_COUNTERS, VIRTIO_HMM_OP_FROM_DEVICE,
    VIRTIO_HMM_OP_TO_DEVICE, VIRTIO_HMM_QUEUE_CONTROL, VIRTIO_HMM_QUEUE_COPY,
    VIRTIO_HMM_QUEUE_EVENT, VIRTIO_HMM_S_OK, VIRTIO_HMM_VERSION, virtio_hmm_config,
    virtio_hmm_counters, virtio_hmm_resp,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::binding::Binding;
use crate::failure::{Failure, Result};
use crate::memory::{Memory, PAGE};
use crate::request::{Request, Response};
use crate::require;
use crate::transport::{Transport, status, wait};

/// Feature bit of VIRTIO 1.0 and later.
pub const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// Feature bit of indirect descriptors.
pub const INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// Feature bit of notifications on request.
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// All that a driver can accept.
pub const FEATURES: u64 = VERSION_1 | INDIRECT_DESC | EVENT_IDX;

/// Flag of a descriptor that another follows.
pub const NEXT: u16 = short(VRING_DESC_F_NEXT);
/// Flag of a descriptor that the device writes.
pub const WRITE: u16 = short(VRING_DESC_F_WRITE);
/// Flag of a descriptor that stands for a table of others.
pub const INDIRECT: u16 = short(VRING_DESC_F_INDIRECT);

/// The control queue.
pub const CONTROL: u16 = short(VIRTIO_HMM_QUEUE_CONTROL);
/// The event queue.
pub const EVENT: u16 = short(VIRTIO_HMM_QUEUE_EVENT);
/// The first copy queue.
pub const COPY: u16 = short(VIRTIO_HMM_QUEUE_COPY);

/// What memory holds where a device is to write.
pub const UNTOUCHED: u8 = 0xee;

/// Largest queue that is set up, and most descriptors in a chain.
const MAX_SIZE: u16 = 1024;
/// Bytes of the memory that holds a ring, and what begins where in it.
const RING: usize = 0x1_0000;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0xa000;

/// Part of a chain: address and length.
pub type Buffer = (u64, usize);

/// Where a queue's rings are, and how far the driver is in them.
#[derive(Clone, Copy, Debug)]
struct Ring {
    /// Number of descriptors.
    size: u16,
    /// The descriptor table; the two rings follow.
    table: u64,
    /// Where the device is notified.
    notify: u64,
    /// Chains made available.
    available: u16,
    /// Used chains that were looked at.
    seen: u16,
}

impl Drop for Driver {
    fn drop(&mut self) {
        // It must be still before its memory goes; one that does not answer is cut off by vfio.
        let _ = self.transport.reset();
    }
}

/// A device in the hands of a driver.
#[derive(Debug)]
pub struct Driver {
    // Closed before the memory and the binding go.
    /// Its registers.
    pub transport: Transport,
    /// Rings and buffers.
    pub memory: Memory,
    /// Its configuration when it was found.
    pub config: virtio_hmm_config,
    /// What decides where frames and splits fall.
    pub random: Rng,
    /// Whether nobody has used the device since the VM was connected to it.
    pub fresh: bool,
    rings: Vec<Ring>,
    _binding: Binding,
}

impl Driver {
    /// Takes the device at this PCI address. `seed` decides what is left to chance.
    ///
    /// # Errors
    /// The device, the IOMMU or memory cannot be had, or this is another device.
    pub fn open(bdf: &str, seed: u64, fresh: bool) -> Result<Self> {
        let binding = Binding::take(bdf)?;
        let transport = Transport::open(&binding.path())?;
        let mut memory = Memory::new()?;
        transport.map(&memory)?;
        transport.reset()?;
        let mut rings = Vec::new();
        for queue in 0..transport.queues() {
            let notify = transport.notify_offset(queue);
            let size = transport.common_u16(crate::transport::common::QUEUE_SIZE);
            rings.push(Ring {
                size: size.min(MAX_SIZE),
                table: memory.alloc(RING)?,
                notify,
                available: 0,
                seen: 0,
            });
        }
        let mut driver = Self {
            transport,
            memory,
            config: virtio_hmm_config::default(),
            random: Rng::with_seed(seed),
            fresh,
            rings,
            _binding: binding,
        };
        driver.config = driver.read_config();
        let (version, size) = (
            driver.config.version.into(),
            driver.config.frame_size.into(),
        );
        if (version, size) != (VIRTIO_HMM_VERSION, VIRTIO_HMM_FRAME_SIZE) {
            return Err(Failure::Unfit(format!(
                "a device of version {version} with frames of {size} bytes; this program knows \
                 version {VIRTIO_HMM_VERSION} with {VIRTIO_HMM_FRAME_SIZE} only"
            )));
        }
        Ok(driver)
    }

    /// The configuration as the device shows it now.
    #[must_use]
    pub fn read_config(&self) -> virtio_hmm_config {
        let bytes = self.config_bytes(size_of::<virtio_hmm_config>());
        let mut config = virtio_hmm_config::default();
        config.as_mut_slice().copy_from_slice(&bytes);
        config
    }

    /// The first bytes of the configuration, read four at a time.
    #[must_use]
    pub fn config_bytes(&self, len: usize) -> Vec<u8> {
        let words = (0..len as u64).step_by(4);
        words
            .flat_map(|at| self.transport.read::<4>(self.transport.device, at))
            .collect()
    }

    /// Number of frames of device memory.
    #[must_use]
    pub fn frames(&self) -> u64 {
        u64::from(self.config.memory_size) / PAGE as u64
    }

    /// The copy queues.
    #[must_use]
    pub fn copy_queues(&self) -> std::ops::Range<u16> {
        let number = u32::from(self.config.copy_queues);
        COPY..COPY.saturating_add(number.try_into().unwrap_or(0))
    }

    /// Number of descriptors of a queue.
    #[must_use]
    pub fn size(&self, queue: u16) -> u16 {
        self.ring(queue).size
    }

    fn ring(&self, queue: u16) -> &Ring {
        &self.rings[usize::from(queue)]
    }

    /// Resets the device, sets all queues up and starts it.
    ///
    /// # Errors
    /// It does not accept these features.
    pub fn start(&mut self, features: u64) -> Result {
        self.begin(features)?;
        for queue in 0..self.transport.queues() {
            self.set_up(queue)?;
        }
        self.go();
        Ok(())
    }

    /// Resets the device and accepts features; then queues can be set up.
    ///
    /// # Errors
    /// It does not accept them.
    pub fn begin(&mut self, features: u64) -> Result {
        self.transport.reset()?;
        let mut bits = status::ACKNOWLEDGE;
        self.transport.set_status(bits);
        bits |= status::DRIVER;
        self.transport.set_status(bits);
        let offered = self.transport.features();
        require!(
            offered & features == features,
            "the device offers features {offered:#x}, which lack some of {features:#x}"
        );
        self.transport.accept(features);
        bits |= status::FEATURES_OK;
        self.transport.set_status(bits);
        let now = self.transport.status();
        require!(
            now == bits,
            "the device's status is {now:#x}, not {bits:#x}"
        );
        Ok(())
    }

    /// Sets a queue up, at the beginning of its rings.
    ///
    /// # Errors
    /// Its memory cannot be accessed.
    pub fn set_up(&mut self, queue: u16) -> Result {
        let addresses = self.addresses(queue);
        self.set_up_at(queue, addresses)
    }

    /// Sets a queue up with its table and its rings elsewhere.
    ///
    /// # Errors
    /// The memory where they usually are cannot be accessed.
    pub fn set_up_at(&mut self, queue: u16, addresses: [u64; 3]) -> Result {
        let ring = &mut self.rings[usize::from(queue)];
        (ring.available, ring.seen) = (0, 0);
        self.memory.write(ring.table, &[0; RING])?;
        self.transport.select(queue);
        self.transport.set_size(ring.size);
        self.transport.set_addresses(addresses);
        self.transport.enable();
        Ok(())
    }

    /// Where a queue's descriptor table, available and used ring are.
    #[must_use]
    pub fn addresses(&self, queue: u16) -> [u64; 3] {
        let table = self.ring(queue).table;
        [table, table + AVAILABLE, table + USED]
    }

    /// Starts the device, whose queues are set up.
    pub fn go(&self) {
        let bits = self.transport.status();
        self.transport.set_status(bits | status::DRIVER_OK);
    }

    /// The device still works: after a reset it is what it was, answers, and copies right on
    /// every queue.
    ///
    /// # Errors
    /// It does not.
    pub fn check_works(&mut self) -> Result {
        self.start(FEATURES)?;
        let same = self.read_config().as_slice() == self.config.as_slice();
        require!(same, "the configuration is another one");
        for queue in self.copy_queues() {
            let frame = self.random.u64(..self.frames().min(512) - 1);
            let bytes = self.noise(2);
            self.store_by(queue, frame, &bytes)?;
            let found = self.load_by(queue, frame, 2)?;
            require!(found == bytes, "queue {queue} copies wrong bytes");
        }
        self.counters().map(drop)
    }

    /// Frames of random bytes.
    pub fn noise(&mut self, frames: usize) -> Vec<u8> {
        let mut bytes = vec![0; frames * PAGE];
        self.random.fill(&mut bytes);
        bytes
    }

    /// Writes descriptors into the table at `table`, from number `first` on.
    ///
    /// # Errors
    /// The table is not in the program's memory.
    pub fn write_table(&self, table: u64, first: u16, descriptors: &[Descriptor]) -> Result {
        for (number, descriptor) in (u64::from(first)..).zip(descriptors) {
            let at = GuestAddress(table + 16 * number);
            self.memory.pages.write_obj(*descriptor, at)?;
        }
        Ok(())
    }

    /// Makes the chain that begins at descriptor `head` available.
    ///
    /// # Errors
    /// The ring cannot be accessed.
    pub fn offer(&mut self, queue: u16, head: u16) -> Result {
        let ring = &mut self.rings[usize::from(queue)];
        let slot = ring.table + AVAILABLE + 4 + 2 * u64::from(ring.available % ring.size);
        ring.available = ring.available.wrapping_add(1);
        self.memory.pages.write_obj(head, GuestAddress(slot))?;
        let available = ring.available;
        self.set_available(queue, available)
    }

    /// Sets the available index.
    ///
    /// # Errors
    /// The ring cannot be accessed.
    pub fn set_available(&self, queue: u16, index: u16) -> Result {
        let at = GuestAddress(self.ring(queue).table + AVAILABLE + 2);
        Ok(self.memory.pages.store(index, at, Ordering::Release)?)
    }

    /// Writes a chain into the table from number `head` on, and makes it available.
    ///
    /// # Errors
    /// The ring cannot be accessed.
    pub fn offer_chain(&mut self, queue: u16, head: u16, chain: &[Descriptor]) -> Result {
        self.write_table(self.ring(queue).table, head, chain)?;
        self.offer(queue, head)
    }

    /// Notifies the device of a queue.
    pub fn kick(&self, queue: u16) {
        fence(Ordering::SeqCst);
        self.transport.notify(self.ring(queue).notify, queue);
    }

    /// Number of chains that the device has used.
    ///
    /// # Errors
    /// The ring cannot be accessed.
    pub fn used(&self, queue: u16) -> Result<u16> {
        let at = GuestAddress(self.ring(queue).table + USED + 2);
        Ok(self.memory.pages.load(at, Ordering::Acquire)?)
    }

    /// Says after which used chain a notification is wanted.
    ///
    /// # Errors
    /// The ring cannot be accessed.
    pub fn set_used_event(&self, queue: u16, after: u16) -> Result {
        let ring = self.ring(queue);
        let at = ring.table + AVAILABLE + 4 + 2 * u64::from(ring.size);
        let at = GuestAddress(at);
        self.memory.pages.store(after, at, Ordering::Release)?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Waits for the next used chain: its head, and the used length.
    ///
    /// # Errors
    /// The device uses none in time.
    pub fn next_used(&mut self, queue: u16) -> Result<(u32, usize)> {
        let seen = self.ring(queue).seen;
        wait("used buffer", || Ok(self.used(queue)? != seen))?;
        let ring = &mut self.rings[usize::from(queue)];
        ring.seen = seen.wrapping_add(1);
        let at = ring.table + USED + 4 + 8 * u64::from(seen % ring.size);
        let head = self.memory.pages.read_obj(GuestAddress(at))?;
        let len: u32 = self.memory.pages.read_obj(GuestAddress(at + 4))?;
        Ok((head, len as usize))
    }

    /// Has the device use a chain. Returns the used length.
    ///
    /// # Errors
    /// It does not in time, or uses another one.
    pub fn run_chain(&mut self, queue: u16, head: u16, chain: &[Descriptor]) -> Result<usize> {
        self.offer_chain(queue, head, chain)?;
        self.kick(queue);
        let (used, len) = self.next_used(queue)?;
        require!(used == u32::from(head), "chain {used} is used, not {head}");
        Ok(len)
    }

    /// Has the device use a chain of these buffers. Returns the used length.
    ///
    /// # Errors
    /// As for [`Self::run_chain`].
    pub fn run(&mut self, queue: u16, readable: &[Buffer], writable: &[Buffer]) -> Result<usize> {
        self.run_chain(queue, 0, &chain(0, readable, writable))
    }

    /// Like [`Self::run`], by way of an indirect table.
    ///
    /// # Errors
    /// As for [`Self::run_chain`].
    pub fn run_indirect(
        &mut self,
        queue: u16,
        readable: &[Buffer],
        writable: &[Buffer],
    ) -> Result<usize> {
        let chain = chain(0, readable, writable);
        let table = self.memory.alloc(16 * chain.len())?;
        self.write_table(table, 0, &chain)?;
        let indirect = descriptor((table, 16 * chain.len()), INDIRECT, 0);
        self.run_chain(queue, 1, &[indirect])
    }

    /// Sends a request whose response is one buffer, and the data others.
    ///
    /// # Errors
    /// The device does not answer in time.
    pub fn request(
        &mut self,
        queue: u16,
        request: &Request,
        data_in: &[Buffer],
        data_out: &[Buffer],
    ) -> Result<Response> {
        let head = self.memory.place(&request.bytes())?;
        let response = self.response_buffer(request)?;
        let readable = [&[head], data_in].concat();
        let writable = [&[response], data_out].concat();
        let written = self.run(queue, &readable, &writable)?;
        self.response(response, written)
    }

    /// A place for the response of `request`, without its data.
    ///
    /// # Errors
    /// There is no memory left.
    pub fn response_buffer(&mut self, request: &Request) -> Result<Buffer> {
        self.memory.place(&vec![UNTOUCHED; 8 + request.statuses()])
    }

    /// The response in this buffer.
    ///
    /// # Errors
    /// It is not in the program's memory.
    pub fn response(&self, (at, len): Buffer, written: usize) -> Result<Response> {
        let head: virtio_hmm_resp = self.memory.pages.read_obj(GuestAddress(at))?;
        Ok(Response {
            status: head.status.into(),
            frames_done: head.frames_done.into(),
            statuses: self.memory.read(at + 8, len - 8)?,
            written,
        })
    }

    /// Copies `bytes` to the device, from frame `frame` on.
    ///
    /// # Errors
    /// It fails.
    pub fn store(&mut self, frame: u64, bytes: &[u8]) -> Result {
        self.store_by(COPY, frame, bytes)
    }

    fn store_by(&mut self, queue: u16, frame: u64, bytes: &[u8]) -> Result {
        let mark = self.memory.mark();
        let data = self.memory.place(bytes)?;
        let frames = bytes.len() / PAGE;
        let request = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(frame, count(frames))]);
        let response = self.request(queue, &request, &[data], &[])?;
        require!(
            response == Response::ok(frames, 0),
            "a copy to the device ends with {response:?}"
        );
        self.memory.release(mark);
        Ok(())
    }

    /// Copies frames from the device.
    ///
    /// # Errors
    /// It fails.
    pub fn load(&mut self, frame: u64, frames: usize) -> Result<Vec<u8>> {
        self.load_by(COPY, frame, frames)
    }

    fn load_by(&mut self, queue: u16, frame: u64, frames: usize) -> Result<Vec<u8>> {
        let mark = self.memory.mark();
        let data = self.memory.place(&vec![UNTOUCHED; frames * PAGE])?;
        let request = Request::new(VIRTIO_HMM_OP_FROM_DEVICE, &[(frame, count(frames))]);
        let response = self.request(queue, &request, &[], &[data])?;
        require!(
            response == Response::ok(frames, data.1),
            "a copy from the device ends with {response:?}"
        );
        self.memory.release(mark);
        self.memory.read(data.0, data.1)
    }

    /// The device's counters.
    ///
    /// # Errors
    /// It does not tell them.
    pub fn counters(&mut self) -> Result<virtio_hmm_counters> {
        let mark = self.memory.mark();
        let len = size_of::<virtio_hmm_counters>();
        let body = self.memory.place(&vec![UNTOUCHED; len])?;
        let request = Request::new(VIRTIO_HMM_OP_COUNTERS, &[]);
        let response = self.request(CONTROL, &request, &[], &[body])?;
        require!(
            (response.status, response.written) == (VIRTIO_HMM_S_OK, 8 + len),
            "the counters are answered with {response:?}"
        );
        self.memory.release(mark);
        Ok(self.memory.pages.read_obj(GuestAddress(body.0))?)
    }
}

/// The lower half of a number, which is all of it.
const fn short(number: u32) -> u16 {
    let [a, b, ..] = number.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// A descriptor of this buffer.
#[must_use]
pub fn descriptor((at, len): Buffer, flags: u16, next: u16) -> Descriptor {
    Descriptor::new(at, count(len), flags, next)
}

/// The descriptors of a chain of these buffers, numbered from `first` on.
#[must_use]
pub fn chain(first: u16, readable: &[Buffer], writable: &[Buffer]) -> Vec<Descriptor> {
    let total = readable.len() + writable.len();
    let readable = readable.iter().map(|buffer| (*buffer, 0));
    let writable = writable.iter().map(|buffer| (*buffer, WRITE));
    let buffers = readable.chain(writable).zip(1..);
    (first.wrapping_add(1)..)
        .zip(buffers)
        .map(|(next, ((buffer, flags), number))| match number == total {
            true => descriptor(buffer, flags, 0),
            false => descriptor(buffer, flags | NEXT, next),
        })
        .collect()
}

/// A number as descriptors and extents have it.
#[must_use]
pub fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
