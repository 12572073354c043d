//! A server in this process, and a VMM with a guest for it.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc,
        atomic::{Ordering, fence},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::Value;
use tempfile::TempDir;
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures},
    },
};
use vhost_device_hmm::{
    abi::*,
    link,
    memory::Backing,
    seccomp::Mode,
    server::{Config, Endpoint, Server},
    stop::Stop,
};
use vm_memory::{ByteValued, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Nothing takes longer, unless it hangs.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// Bytes of a page and of a frame.
pub const PAGE: usize = 4096;
/// Size of every queue.
pub const QUEUE_SIZE: u16 = 1024;
/// Number of copy queues.
pub const COPY_QUEUES: u32 = 2;
/// The first copy queue.
pub const COPY: u32 = VIRTIO_HMM_QUEUE_COPY;
/// The control queue.
pub const CONTROL: u32 = VIRTIO_HMM_QUEUE_CONTROL;
/// Bytes of device memory.
pub const MEMORY_SIZE: u64 = 8 << 20;
/// Guest memory: two mappings that follow one another.
pub const RAM: [(u64, usize); 2] = [(0x10_0000, 8 << 20), (0x90_0000, 8 << 20)];
/// Decides where injected faults strike.
pub const SEED: u64 = 2017;
/// The first address beyond guest memory.
pub const RAM_END: u64 = 0x110_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Features of the rings, and the one that brings the protocol features.
pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT_DESC: u64 = 1 << 28;
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

/// How large a device and its guest are.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Bytes of device memory.
    pub memory_size: u64,
    /// Number of copy queues.
    pub copy_queues: u32,
    /// Bytes of the second mapping of guest memory.
    pub second_ram: usize,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            memory_size: MEMORY_SIZE,
            copy_queues: COPY_QUEUES,
            second_ram: RAM[1].1,
        }
    }
}

/// Ends the process if it is not dropped in time.
struct Watchdog {
    _alive: mpsc::Sender<()>,
}

impl Watchdog {
    fn new() -> Self {
        let (alive, dropped) = mpsc::channel::<()>();
        thread::spawn(move || {
            if dropped.recv_timeout(DEADLINE) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("a test hangs");
                process::abort();
            }
        });
        Self { _alive: alive }
    }
}

/// A running server.
pub struct Device {
    shape: Shape,
    dir: TempDir,
    stop: Arc<Stop>,
    thread: Option<thread::JoinHandle<()>>,
    _watchdog: Watchdog,
}

impl Device {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// A server that injects faults.
    pub fn start_with(rules: &[&str]) -> Self {
        Self::start_all(Shape::default(), rules, link::Config::default())
    }

    /// A server behind a link.
    pub fn start_behind(link: link::Config) -> Self {
        Self::start_all(Shape::default(), &[], link)
    }

    pub fn start_all(shape: Shape, rules: &[&str], link: link::Config) -> Self {
        let watchdog = Watchdog::new();
        let dir = tempfile::tempdir().unwrap();
        let server = Server::new(&Config {
            endpoint: Endpoint::Path(dir.path().join("vhost")),
            memory_size: shape.memory_size,
            copy_queues: shape.copy_queues as u16,
            control_socket: Some(dir.path().join("control")),
            metrics_socket: Some(dir.path().join("metrics")),
            metrics_tcp: None,
            backing: Backing::Sparse,
            hardware_counters: true,
            link,
            inject: rules.iter().map(|rule| rule.parse().unwrap()).collect(),
            inject_seed: SEED,
        })
        .unwrap();
        let stop = server.stop();
        let thread = Some(thread::spawn(|| {
            // As the daemon does. A forbidden call kills all tests.
            server.confine(Mode::Kill).unwrap();
            server.run().unwrap();
        }));
        Self {
            shape,
            dir,
            stop,
            thread,
            _watchdog: watchdog,
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("vhost")
    }

    pub fn control(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("control")).unwrap()
    }

    pub fn metrics(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("metrics")).unwrap()
    }

    /// Sends a line to the control socket and returns the reply.
    pub fn ask(&self, line: &str) -> Value {
        let mut stream = self.control();
        stream.write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut reply = String::new();
        BufReader::new(stream).read_line(&mut reply).unwrap();
        serde_json::from_str(&reply).unwrap()
    }

    pub fn counters(&self) -> Value {
        self.ask(r#"{"command":"counters"}"#)
    }

    /// Adds a rule for faults.
    pub fn inject(&self, rule: &str) -> Value {
        self.ask(&serde_json::json!({ "command": "inject", "rule": rule }).to_string())
    }

    /// Makes the device well.
    pub fn cure(&self) -> Value {
        self.ask(r#"{"command":"inject","clear":true}"#)
    }

    /// How often a fault struck.
    pub fn struck(&self, fault: &str) -> u64 {
        self.counters()["counters"]["injected"][fault]
            .as_u64()
            .unwrap()
    }

    pub fn wait_for_disconnect(&self) {
        wait("the end of the session", || {
            self.counters()["connected"] == false
        });
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.stop.request();
        let result = self.thread.take().unwrap().join();
        if !thread::panicking() {
            result.unwrap();
        }
    }
}

/// Waits until `done`.
pub fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "no sign of {what}"
        );
        thread::sleep(Duration::from_micros(200));
    }
}

/// A piece of a chain: address, length.
pub type Buffer = (u64, usize);

/// A descriptor: address, length, flags, next.
pub type Descriptor = (u64, u32, u16, u16);

struct Ring {
    index: u32,
    avail: u16,
    seen: u16,
    kick: EventFd,
    call: EventFd,
}

impl Ring {
    fn desc(&self) -> u64 {
        RAM[0].0 + u64::from(self.index) * 0x1_0000
    }

    fn avail(&self) -> u64 {
        self.desc() + 0x8000
    }

    fn used(&self) -> u64 {
        self.desc() + 0xa000
    }
}

/// A VMM and its guest.
pub struct Vm {
    pub frontend: Frontend,
    pub mem: GuestMemoryMmap,
    rings: Vec<Ring>,
    next_free: u64,
}

/// What a response says.
#[derive(Debug, PartialEq, Eq)]
pub struct Response {
    pub status: u32,
    pub frames_done: u32,
    pub statuses: Vec<u8>,
    pub written: usize,
}

impl Response {
    /// The response of a request that did all its frames and wrote `data` bytes.
    pub fn ok(frames: usize, data: usize) -> Self {
        Self {
            status: VIRTIO_HMM_S_OK,
            frames_done: frames as u32,
            statuses: vec![VIRTIO_HMM_FRAME_OK; frames],
            written: 8 + frames + data,
        }
    }
}

impl Vm {
    pub fn connect(device: &Device) -> Self {
        Self::connect_with(device, VERSION_1 | EVENT_IDX | INDIRECT_DESC)
    }

    pub fn connect_with(device: &Device, features: u64) -> Self {
        Self::connect_to(&device.socket(), device.shape, features)
    }

    pub fn connect_to(socket: &Path, shape: Shape, features: u64) -> Self {
        let queues = VIRTIO_HMM_QUEUE_COPY + shape.copy_queues;
        let mut frontend = Frontend::connect(socket, u64::from(queues)).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        assert_eq!(
            offered,
            VERSION_1 | EVENT_IDX | INDIRECT_DESC | PROTOCOL_FEATURES
        );
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(protocol.contains(
            VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::REPLY_ACK
        ));
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_features(features | PROTOCOL_FEATURES).unwrap();
        assert_eq!(frontend.get_queue_num().unwrap(), u64::from(queues));

        let ram = [RAM[0], (RAM[1].0, shape.second_ram)];
        let ranges = ram.map(|(start, len)| {
            let file = File::from(memfd_create("guest", MFdFlags::empty()).unwrap());
            file.set_len(len as u64).unwrap();
            (GuestAddress(start), len, Some(FileOffset::new(file, 0)))
        });
        let mem = GuestMemoryMmap::from_ranges_with_files(&ranges).unwrap();
        let regions: Vec<_> = mem
            .iter()
            .map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap())
            .collect();
        frontend.set_mem_table(&regions).unwrap();
        let rings = (0..queues).map(|index| Ring {
            index,
            avail: 0,
            seen: 0,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
        });
        let mut vm = Self {
            frontend,
            mem,
            rings: rings.collect(),
            next_free: RAM[0].0 + 0x10_0000,
        };
        for queue in 0..queues {
            vm.set_up(queue);
        }
        vm
    }

    /// Sets up a queue, as after a reset of the device.
    pub fn set_up(&mut self, queue: u32) {
        let ring = &mut self.rings[queue as usize];
        (ring.avail, ring.seen) = (0, 0);
        ring.call.read().ok();
        for (addr, len) in [(ring.avail(), 0x1000), (ring.used(), 0x4000)] {
            self.mem
                .write_slice(&vec![0; len], GuestAddress(addr))
                .unwrap();
        }
        let host = |addr| self.mem.get_host_address(GuestAddress(addr)).unwrap() as u64;
        let config = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: host(ring.desc()),
            used_ring_addr: host(ring.used()),
            avail_ring_addr: host(ring.avail()),
            log_addr: None,
        };
        let index = queue as usize;
        self.frontend.set_vring_num(index, QUEUE_SIZE).unwrap();
        self.frontend.set_vring_addr(index, &config).unwrap();
        self.frontend.set_vring_base(index, 0).unwrap();
        self.frontend.set_vring_call(index, &ring.call).unwrap();
        self.frontend.set_vring_kick(index, &ring.kick).unwrap();
        self.frontend.set_vring_enable(index, true).unwrap();
    }

    /// Stops a queue, as a reset of the device does. Returns how many chains
    /// the device had taken.
    pub fn stop(&mut self, queue: u32) -> u16 {
        self.frontend.get_vring_base(queue as usize).unwrap() as u16
    }

    /// Reads `len` bytes of the configuration space.
    pub fn config(&mut self, offset: u32, len: usize) -> Vec<u8> {
        let flags = VhostUserConfigFlags::empty();
        self.frontend
            .get_config(offset, len as u32, flags, &vec![0; len])
            .unwrap()
            .1
    }

    /// Writes to the configuration space.
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) {
        self.frontend
            .set_config(offset, VhostUserConfigFlags::WRITABLE, bytes)
            .unwrap();
    }

    /// Unused guest memory from a page boundary on.
    pub fn alloc(&mut self, len: usize) -> u64 {
        let at = self.next_free;
        self.next_free += len.next_multiple_of(PAGE) as u64;
        assert!(self.next_free <= RAM[1].0);
        at
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    /// Puts `bytes` somewhere into guest memory.
    pub fn place(&mut self, bytes: &[u8]) -> Buffer {
        let at = self.alloc(bytes.len());
        self.write(at, bytes);
        (at, bytes.len())
    }

    /// Writes descriptors from `first` on, in the table at `table`.
    pub fn write_descriptors(&self, table: u64, first: u16, descriptors: &[Descriptor]) {
        for (at, (addr, len, flags, next)) in (u64::from(first)..).zip(descriptors) {
            let mut bytes = addr.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            self.write(table + 16 * at, &bytes);
        }
    }

    /// Address of the descriptor table of a queue.
    pub fn table(&self, queue: u32) -> u64 {
        self.rings[queue as usize].desc()
    }

    /// Makes the chain that starts at `head` available, without a kick.
    pub fn offer(&mut self, queue: u32, head: u16) {
        self.offer_at_once(queue, &[head]);
    }

    /// Makes the chains that start at `heads` available, all at the same time.
    pub fn offer_at_once(&mut self, queue: u32, heads: &[u16]) {
        let ring = &mut self.rings[queue as usize];
        for head in heads {
            let slot = ring.avail() + 4 + 2 * u64::from(ring.avail % QUEUE_SIZE);
            ring.avail = ring.avail.wrapping_add(1);
            self.mem.write_obj(*head, GuestAddress(slot)).unwrap();
        }
        let (idx, avail) = (ring.avail() + 2, ring.avail);
        self.mem
            .store(avail, GuestAddress(idx), Ordering::Release)
            .unwrap();
    }

    pub fn kick(&self, queue: u32) {
        self.rings[queue as usize].kick.write(1).unwrap();
    }

    /// Number of chains that the device has used.
    pub fn used(&self, queue: u32) -> u16 {
        let idx = self.rings[queue as usize].used() + 2;
        self.mem.load(GuestAddress(idx), Ordering::Acquire).unwrap()
    }

    /// Where the driver says after which chain it wants a call.
    pub fn set_used_event(&self, queue: u32, after: u16) {
        let ring = &self.rings[queue as usize];
        let at = ring.avail() + 4 + 2 * u64::from(QUEUE_SIZE);
        self.mem
            .store(after, GuestAddress(at), Ordering::Release)
            .unwrap();
        fence(Ordering::SeqCst);
    }

    /// How often the device has called since this was last asked.
    pub fn calls(&self, queue: u32) -> u64 {
        self.call(queue).read().unwrap_or(0)
    }

    /// What the device calls with.
    pub fn call(&self, queue: u32) -> &EventFd {
        &self.rings[queue as usize].call
    }

    /// Waits for the next used chain. Returns its head and the length written.
    pub fn next_used(&mut self, queue: u32) -> (u32, usize) {
        let seen = self.rings[queue as usize].seen;
        wait("a used buffer", || self.used(queue) != seen);
        let ring = &mut self.rings[queue as usize];
        let at = ring.used() + 4 + 8 * u64::from(seen % QUEUE_SIZE);
        ring.seen = seen.wrapping_add(1);
        let head: u32 = self.mem.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = self.mem.read_obj(GuestAddress(at + 4)).unwrap();
        (head, len as usize)
    }

    /// Makes a chain of these buffers available from descriptor `head` on.
    pub fn offer_buffers(
        &mut self,
        queue: u32,
        head: u16,
        readable: &[Buffer],
        writable: &[Buffer],
    ) {
        self.describe(queue, head, readable, writable);
        self.offer(queue, head);
    }

    /// Makes a chain of these buffers from descriptor `head` on.
    pub fn describe(&self, queue: u32, head: u16, readable: &[Buffer], writable: &[Buffer]) {
        let chain = descriptors(head, readable, writable);
        self.write_descriptors(self.table(queue), head, &chain);
    }

    /// Has the device process one chain. Returns the length written.
    pub fn run(&mut self, queue: u32, readable: &[Buffer], writable: &[Buffer]) -> usize {
        self.offer_buffers(queue, 0, readable, writable);
        self.kick(queue);
        let (head, len) = self.next_used(queue);
        assert_eq!(head, 0);
        len
    }

    /// Like [`Self::run`], by way of an indirect table.
    pub fn run_indirect(&mut self, queue: u32, readable: &[Buffer], writable: &[Buffer]) -> usize {
        let chain = descriptors(0, readable, writable);
        let table = self.alloc(16 * chain.len());
        self.write_descriptors(table, 0, &chain);
        let indirect = (table, 16 * chain.len() as u32, INDIRECT, 0);
        self.write_descriptors(self.table(queue), 7, &[indirect]);
        self.offer(queue, 7);
        self.kick(queue);
        let (head, len) = self.next_used(queue);
        assert_eq!(head, 7);
        len
    }

    /// Sends a request with a response of the usual form to a queue.
    pub fn request(
        &mut self,
        queue: u32,
        request: &Request,
        data_in: &[Buffer],
        data_out: &[Buffer],
    ) -> Response {
        let frames = request.statuses();
        let head = self.place(&request.encode());
        let response = self.place(&vec![0xee; 8 + frames]);
        let readable = [&[head], data_in].concat();
        let writable = [&[response], data_out].concat();
        let written = self.run(queue, &readable, &writable);
        self.response(response.0, frames, written)
    }

    /// The response at `addr`, of a request with `frames` statuses.
    pub fn response(&self, addr: u64, frames: usize, written: usize) -> Response {
        let head: virtio_hmm_resp = self.mem.read_obj(GuestAddress(addr)).unwrap();
        let statuses = if written > 8 {
            self.read(addr + 8, frames)
        } else {
            Vec::new()
        };
        Response {
            status: head.status.into(),
            frames_done: head.frames_done.into(),
            statuses,
            written,
        }
    }

    /// Copies `bytes` to the device, which succeeds.
    pub fn store(&mut self, frame: u64, bytes: &[u8]) {
        let data = self.place(bytes);
        let frames = bytes.len() / PAGE;
        let request = Request::new(VIRTIO_HMM_OP_TO_DEVICE, &[(frame, frames as u32)]);
        assert_eq!(
            self.request(COPY, &request, &[data], &[]),
            Response::ok(frames, 0)
        );
        self.next_free = data.0;
    }

    /// Copies frames from the device, which succeeds.
    pub fn load(&mut self, frame: u64, frames: usize) -> Vec<u8> {
        let len = frames * PAGE;
        let data = self.place(&vec![0xee; len]);
        let request = Request::new(VIRTIO_HMM_OP_FROM_DEVICE, &[(frame, frames as u32)]);
        assert_eq!(
            self.request(COPY, &request, &[], &[data]),
            Response::ok(frames, len)
        );
        self.next_free = data.0;
        self.read(data.0, len)
    }

    /// The counters, asked in band.
    pub fn counters(&mut self) -> virtio_hmm_counters {
        let request = Request::new(VIRTIO_HMM_OP_COUNTERS, &[]);
        let len = size_of::<virtio_hmm_counters>();
        let body = self.place(&vec![0xee; len]);
        let response = self.request(CONTROL, &request, &[], &[body]);
        assert_eq!(
            (response.status, response.written),
            (VIRTIO_HMM_S_OK, 8 + len)
        );
        self.mem.read_obj(GuestAddress(body.0)).unwrap()
    }
}

fn descriptors(first: u16, readable: &[Buffer], writable: &[Buffer]) -> Vec<Descriptor> {
    let readable = readable.iter().map(|buffer| (buffer, 0));
    let writable = writable.iter().map(|buffer| (buffer, WRITE));
    let mut chain: Vec<_> = (first + 1..)
        .zip(readable.chain(writable))
        .map(|(next, ((addr, len), flags))| (*addr, *len as u32, flags | NEXT, next))
        .collect();
    chain.last_mut().unwrap().2 &= !NEXT;
    chain
}

/// A request, possibly a wrong one.
#[derive(Clone, Default)]
pub struct Request {
    pub head: virtio_hmm_req,
    pub extents: Vec<virtio_hmm_extent>,
}

impl Request {
    pub fn new(op: u32, extents: &[(u64, u32)]) -> Self {
        Self::with_sources(op, extents, &[])
    }

    pub fn with_sources(op: u32, extents: &[(u64, u32)], sources: &[(u64, u32)]) -> Self {
        let frames = extents
            .iter()
            .map(|(_, count)| *count)
            .fold(0, u32::wrapping_add);
        let extent = |(frame, count): &(u64, u32)| virtio_hmm_extent {
            frame: (*frame).into(),
            count: (*count).into(),
            reserved: 0.into(),
        };
        Self {
            head: virtio_hmm_req {
                op: op.into(),
                nr_frames: frames.into(),
                nr_extents: (extents.len() as u32).into(),
                nr_src_extents: (sources.len() as u32).into(),
                cookie: 0x1234.into(),
                ..Default::default()
            },
            extents: extents.iter().chain(sources).map(extent).collect(),
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.head.as_slice().to_vec();
        for extent in &self.extents {
            bytes.extend(extent.as_slice());
        }
        bytes
    }

    /// Number of statuses in the response.
    pub fn statuses(&self) -> usize {
        match u32::from(self.head.op) {
            VIRTIO_HMM_OP_COUNTERS | VIRTIO_HMM_OP_DISCARD => 0,
            _ => u32::from(self.head.nr_frames).min(4096) as usize,
        }
    }
}

/// Frames of bytes that tell where they come from.
pub fn pattern(seed: u8, frames: usize) -> Vec<u8> {
    (0..frames * PAGE)
        .map(|at| seed ^ (at % 251) as u8 ^ (at / PAGE) as u8)
        .collect()
}
