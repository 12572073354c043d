//! System calls whose buffers are device pages.
//!
//! The kernel copies from and to them with page faults off in many places, and must then
//! fetch the page and try again: a program never sees EFAULT, or a short transfer, because
//! its buffer is on the device.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use super::counted::counted;
use super::fault_around;
use super::meanwhile::meanwhile;
use super::refused::memory_file;
use crate::context::Context;
use crate::failure::Failure;
use crate::process::pipe;
use crate::region::Region;
use crate::require;

/// Pages of a buffer: what fits into a pipe or a socket's queue.
const PAGES: usize = 16;
const BYTES: usize = PAGES * PAGE_SIZE;

/// How long transfers race with migration.
const RACE: Duration = Duration::from_secs(3);

/// Moves all bytes of one buffer to another, both of [`BYTES`].
type Transfer = fn(&mut Channels, from: usize, to: usize) -> Result<(), Failure>;

/// Ways to have the kernel copy.
const TRANSFERS: &[(&str, Transfer)] = &[
    ("write and read of a pipe", Channels::pipe),
    ("writev and readv of a pipe", Channels::pipe_vectors),
    ("pwrite and pread of a file", Channels::file),
    (
        "sendmsg and recvmsg of a datagram socket",
        Channels::datagram,
    ),
    ("send and recv of a stream socket", Channels::stream),
    ("write and read of an io_uring", Channels::ring),
];

/// What bytes go through.
struct Channels {
    pipe: (File, File),
    file: File,
    datagram: [OwnedFd; 2],
    stream: [OwnedFd; 2],
    ring: Option<IoUring>,
}

fn sockets(kind: libc::c_int) -> Result<[OwnedFd; 2], Failure> {
    let mut fds = [0; 2];
    let kind = kind | libc::SOCK_CLOEXEC;
    // SAFETY: the array has room for the two descriptors.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) } != 0 {
        return Err(Failure::system("socketpair"));
    }
    // SAFETY: both descriptors are new and belong to nobody else.
    Ok(fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Require that a call moved all bytes.
fn whole(call: &'static str, length: isize) -> Result<(), Failure> {
    if length < 0 {
        return Err(Failure::system(call));
    }
    require!(
        usize::try_from(length) == Ok(BYTES),
        "{call} moved {length} of {BYTES} bytes"
    );
    Ok(())
}

/// Slices of sizes that have nothing to do with pages, which make up the buffer.
fn slices(mut place: usize) -> Vec<libc::iovec> {
    let end = place + BYTES;
    let mut slices = Vec::new();
    for length in [1, 8, 4095, 4097, 100, 12_289, 3].into_iter().cycle() {
        if place == end {
            break;
        }
        let length = length.min(end - place);
        slices.push(libc::iovec {
            iov_base: place as *mut _,
            iov_len: length,
        });
        place += length;
    }
    slices
}

// SAFETY of all of them: both buffers are mapped for the time of the call, and their
// words are only seen as atomics; descriptors are open.
impl Channels {
    fn new() -> Result<Self, Failure> {
        Ok(Self {
            pipe: pipe()?,
            file: memory_file(PAGES)?,
            datagram: sockets(libc::SOCK_DGRAM)?,
            stream: sockets(libc::SOCK_STREAM)?,
            ring: IoUring::new(2).ok(),
        })
    }

    fn pipe(&mut self, from: usize, to: usize) -> Result<(), Failure> {
        let (read, write) = (self.pipe.0.as_raw_fd(), self.pipe.1.as_raw_fd());
        // SAFETY: see above.
        whole("write", unsafe {
            libc::write(write, from as *const _, BYTES)
        })?;
        // SAFETY: see above.
        whole("read", unsafe { libc::read(read, to as *mut _, BYTES) })
    }

    fn pipe_vectors(&mut self, from: usize, to: usize) -> Result<(), Failure> {
        let (read, write) = (self.pipe.0.as_raw_fd(), self.pipe.1.as_raw_fd());
        let (from, to) = (slices(from), slices(to));
        // There are a few dozen.
        let count = i32::try_from(from.len()).unwrap_or(0);
        // SAFETY: see above.
        whole("writev", unsafe {
            libc::writev(write, from.as_ptr(), count)
        })?;
        // SAFETY: see above.
        whole("readv", unsafe { libc::readv(read, to.as_ptr(), count) })
    }

    fn file(&mut self, from: usize, to: usize) -> Result<(), Failure> {
        let file = self.file.as_raw_fd();
        // SAFETY: see above.
        whole("pwrite", unsafe {
            libc::pwrite(file, from as *const _, BYTES, 0)
        })?;
        // SAFETY: see above.
        whole("pread", unsafe {
            libc::pread(file, to as *mut _, BYTES, 0)
        })
    }

    fn datagram(&mut self, from: usize, to: usize) -> Result<(), Failure> {
        let [sender, receiver] = self.datagram.each_ref().map(AsRawFd::as_raw_fd);
        let (mut from, mut to) = (slices(from), slices(to));
        let message = |slices: &mut Vec<libc::iovec>| {
            // SAFETY: an all-zero message is valid: no name, no control data.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = slices.as_mut_ptr();
            message.msg_iovlen = slices.len();
            message
        };
        let (from, mut to) = (message(&mut from), message(&mut to));
        // SAFETY: see above.
        whole("sendmsg", unsafe {
            libc::sendmsg(sender, &raw const from, 0)
        })?;
        // SAFETY: see above.
        whole("recvmsg", unsafe {
            libc::recvmsg(receiver, &raw mut to, 0)
        })
    }

    fn stream(&mut self, from: usize, to: usize) -> Result<(), Failure> {
        let [sender, receiver] = self.stream.each_ref().map(AsRawFd::as_raw_fd);
        // SAFETY: see above.
        whole("send", unsafe {
            libc::send(sender, from as *const _, BYTES, 0)
        })?;
        // SAFETY: see above.
        whole("recv", unsafe {
            libc::recv(receiver, to as *mut _, BYTES, libc::MSG_WAITALL)
        })
    }

    /// With IOSQE_ASYNC a worker of the kernel copies, which only borrows the process's
    /// address space.
    fn ring(&mut self, from: usize, to: usize) -> Result<(), Failure> {
        let Some(ring) = &mut self.ring else {
            return Ok(());
        };
        // BYTES fits into 32 bits.
        #[allow(clippy::cast_possible_truncation)]
        let length = BYTES as u32;
        let file = types::Fd(self.file.as_raw_fd());
        for entry in [
            opcode::Write::new(file, from as *const u8, length).build(),
            opcode::Read::new(file, to as *mut u8, length).build(),
        ] {
            // SAFETY: see above; the completion is waited for.
            unsafe { ring.submission().push(&entry.flags(squeue::Flags::ASYNC)) }
                .map_err(|_| Failure::Broken("the submission queue is full".into()))?;
            ring.submit_and_wait(1).map_err(|source| Failure::System {
                call: "io_uring_enter",
                source,
            })?;
            let result = ring.completion().next().map_or(0, |entry| entry.result());
            require!(
                usize::try_from(result) == Ok(BYTES),
                "an io_uring moved {result} of {BYTES} bytes"
            );
        }
        Ok(())
    }
}

/// All transfers from device pages to device pages, first in peace and then with pages
/// that migrate meanwhile.
pub(super) fn buffers(context: &Context) -> Result<(), Failure> {
    let mut channels = Channels::new()?;
    // With the same patterns.
    let (from, to) = (context.region(PAGES, 0)?, context.region(PAGES, 0)?);
    let mut generation = 1;
    for &(name, transfer) in TRANSFERS {
        if channels.ring.is_none() && name.contains("io_uring") {
            continue;
        }
        to.fill_all(generation);
        generation += 1;
        from.fill_all(generation);
        for region in [&from, &to] {
            context.settle(region.all(), Direction::ToDevice, 0)?;
            context.expect(region, 0..PAGES, |_| Residency::Device)?;
        }
        counted(context, &[("pages_faulted", 2 * PAGES)], || {
            transfer(&mut channels, from.all().start, to.all().start)
        })
        .map_err(|failure| Failure::Broken(format!("{name}: {}", failure.describe())))?;
        for region in [&from, &to] {
            context.expect(region, 0..PAGES, |_| Residency::Ram)?;
            context.check(region, 0..PAGES, |_| generation)?;
        }
    }
    race(context, &mut channels, &from, &to)
}

fn race(
    context: &Context,
    channels: &mut Channels,
    from: &Region,
    to: &Region,
) -> Result<(), Failure> {
    let mut random = context.random(0);
    let mut generation = 100;
    let end = Instant::now() + RACE;
    meanwhile(context, &[from, to], &[Direction::ToDevice], || {
        while Instant::now() < end {
            generation += 1;
            from.fill_all(generation);
            let (name, transfer) = TRANSFERS[random.usize(0..TRANSFERS.len())];
            if channels.ring.is_none() && name.contains("io_uring") {
                continue;
            }
            transfer(channels, from.all().start, to.all().start)
                .map_err(|failure| Failure::Broken(format!("{name}: {}", failure.describe())))?;
            context.check(to, 0..PAGES, |_| generation)?;
        }
        Ok(())
    })
}

/// Arguments that are no buffers: a path, a structure to fill, an array in both directions.
pub(super) fn arguments(context: &Context) -> Result<(), Failure> {
    let _tunable = fault_around::off()?;
    let region = context.region(3, 0)?;
    let page = |page: usize| region.range(page..page).start;
    // The end of the path is in the next page.
    let path = c"/proc/self/status";
    let start = page(1) - 8;
    put(start, path);
    context.settle(region.all(), Direction::ToDevice, 0)?;
    let opened = counted(context, &[("pages_faulted", 2)], || {
        // SAFETY: the string is mapped and ends in a zero.
        let fd = unsafe { libc::open(start as *const _, libc::O_RDONLY | libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(Failure::system("open"));
        }
        // SAFETY: the descriptor is new and belongs to nobody else.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    })?;

    let stat = page(1) as *mut libc::stat;
    let polled = page(2) as *mut libc::pollfd;
    // SAFETY: both places are mapped, aligned, and seen by this thread only.
    unsafe {
        polled.write_volatile(libc::pollfd {
            fd: opened.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        });
    }
    context.settle(region.all(), Direction::ToDevice, 0)?;
    // SAFETY: as above.
    let (stated, ready) = unsafe {
        (
            libc::fstat(opened.as_raw_fd(), stat),
            libc::poll(polled, 1, 0),
        )
    };
    require!(
        stated == 0 && ready == 1,
        "fstat gave {stated} and poll {ready}: {}",
        io::Error::last_os_error()
    );
    context.expect(&region, 1..3, |_| Residency::Ram)?;
    // SAFETY: as above.
    let (mode, events) = unsafe { (stat.read_volatile().st_mode, polled.read_volatile().revents) };
    require!(
        mode & libc::S_IFMT == libc::S_IFREG && events & libc::POLLIN != 0,
        "fstat says mode {mode:#o} and poll events {events:#x}"
    );
    Ok(())
}

/// Put a string at an address of a region.
fn put(place: usize, text: &CStr) {
    for (offset, &byte) in text.to_bytes_with_nul().iter().enumerate() {
        // SAFETY: callers give a place in a region of theirs that has room for it.
        unsafe { ((place + offset) as *mut u8).write_volatile(byte) };
    }
}
