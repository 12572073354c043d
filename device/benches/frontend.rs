//! The device behind its socket, driven as a VMM and a guest drive it: bytes and requests a
//! second at several sizes beside a plain copy, how they grow with the copy queues, and what
//! of a CPU the device takes when it has nothing to do.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../tests/cpu_time/mod.rs"]
mod cpu_time;
#[allow(
    dead_code,
    unreachable_pub,
    clippy::indexing_slicing,
    reason = "the protocol's tests use more of it"
)]
#[path = "../tests/protocol/harness.rs"]
mod harness;

use std::{
    hint::black_box,
    os::fd::{AsRawFd, BorrowedFd},
    thread,
    time::{Duration, Instant},
};

use cpu_time::cpu_time;
use harness::{Buffer, COPY, Device, PAGE, RAM, Request, Shape, Vm};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost_device_hmm::{
    abi::{VIRTIO_HMM_OP_FROM_DEVICE, VIRTIO_HMM_OP_TO_DEVICE},
    link,
};

/// Pages of a request, and requests that a queue is given at once.
const SIZES: [(usize, u16); 3] = [(1, 64), (16, 64), (512, 8)];
/// Copy queues.
const QUEUES: [u32; 4] = [1, 2, 4, 8];
/// How long each figure is measured, several times.
const TIME: Duration = Duration::from_millis(200);
const ROUNDS: usize = 5;
/// Windows after the last request, in milliseconds, in which CPU time is looked at.
const IDLE: [u64; 3] = [10, 100, 1000];

fn main() {
    let cpus = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    println!(
        "{cpus} CPUs, which the copy queues share with the VMM that drives them; median of \
         {ROUNDS} rounds\n(lowest-highest), in each of which one thread copies as much with \
         memcpy beside the device\n"
    );
    for (pages, batch) in SIZES {
        let bytes = pages * PAGE;
        println!(
            "{} KiB a request, {batch} at once for each queue",
            bytes >> 10
        );
        let mut plain = copies(bytes, batch);
        for (name, op) in [
            ("to the device", VIRTIO_HMM_OP_TO_DEVICE),
            ("from the device", VIRTIO_HMM_OP_FROM_DEVICE),
        ] {
            let mut one = None;
            for queues in QUEUES {
                let mut setup = Setup::new(queues, op, pages, batch);
                let [figure, plain] = Figure::of([&mut || setup.run(), &mut plain]);
                let one = *one.get_or_insert(figure.median);
                println!(
                    "  {name:<16}{queues} queue{:<3}{}  {:.2} of memcpy, {:.2} of one queue",
                    if queues == 1 { "" } else { "s" },
                    figure.text(bytes),
                    figure.median / plain.median,
                    figure.median / one,
                );
                println!("  {:<26}{}", "memcpy beside it", plain.text(bytes));
            }
        }
        println!();
    }
    idle();
}

/// Requests a second.
struct Figure {
    median: f64,
    low: f64,
    high: f64,
}

impl Figure {
    /// Of works that do some requests and say how many, one after the other in every round.
    fn of<const N: usize>(mut works: [&mut dyn FnMut() -> u64; N]) -> [Self; N] {
        let mut rates = [[0.0; ROUNDS]; N];
        for round in 0..ROUNDS {
            for (work, rates) in works.iter_mut().zip(&mut rates) {
                work();
                let (start, mut done) = (Instant::now(), 0);
                while start.elapsed() < TIME {
                    done += work();
                }
                if let Some(rate) = rates.get_mut(round) {
                    *rate = done as f64 / start.elapsed().as_secs_f64();
                }
            }
        }
        rates.map(|mut rates| {
            rates.sort_by(f64::total_cmp);
            Self {
                median: rates[ROUNDS / 2],
                low: rates[0],
                high: rates[ROUNDS - 1],
            }
        })
    }

    fn text(&self, bytes: usize) -> String {
        let rate = |requests: f64| requests * bytes as f64 / 1e9;
        format!(
            "{:>6.2} GB/s ({:.2}-{:.2}) {:>9.0} requests/s",
            rate(self.median),
            rate(self.low),
            rate(self.high),
            self.median
        )
    }
}

/// What copies so many blocks from one place to another, without a device.
fn copies(bytes: usize, blocks: u16) -> impl FnMut() -> u64 {
    let from = vec![1_u8; bytes * usize::from(blocks)];
    let mut to = vec![2_u8; from.len()];
    move || {
        for (from, to) in from.chunks_exact(bytes).zip(to.chunks_exact_mut(bytes)) {
            to.copy_from_slice(black_box(from));
        }
        black_box(&to);
        blocks.into()
    }
}

/// A device, and rings on which the same requests are made again and again.
struct Setup {
    vm: Vm,
    queues: u32,
    batch: u16,
    done: u16,
    _device: Device,
}

impl Setup {
    fn new(queues: u32, op: u32, pages: usize, batch: u16) -> Self {
        let used = queues as usize * usize::from(batch) * pages * PAGE;
        let shape = Shape {
            memory_size: used.next_multiple_of(harness::MEMORY_SIZE as usize) as u64,
            copy_queues: queues,
            second_ram: used,
        };
        let device = Device::start_all(shape, &[], link::Config::default());
        let mut vm = Vm::connect(&device);
        let mut places = (0..used).step_by(pages * PAGE);
        for queue in COPY..COPY + queues {
            for slot in 0..batch {
                let place = places.next().unwrap();
                let frame = (place / PAGE) as u64;
                let data: Buffer = (RAM[1].0 + place as u64, pages * PAGE);
                let request = Request::new(op, &[(frame, pages as u32)]);
                let head = vm.place(&request.encode());
                let response = vm.place(&vec![0; 8 + pages]);
                let (readable, writable): (&[Buffer], &[Buffer]) = match op {
                    VIRTIO_HMM_OP_TO_DEVICE => (&[head, data], &[response]),
                    _ => (&[head], &[response, data]),
                };
                vm.describe(queue, 3 * slot, readable, writable);
            }
        }
        Self {
            vm,
            queues,
            batch,
            done: 0,
            _device: device,
        }
    }

    /// Gives every queue its requests, and sleeps until all of them are done.
    fn run(&mut self) -> u64 {
        let heads: Vec<u16> = (0..self.batch).map(|slot| 3 * slot).collect();
        self.done = self.done.wrapping_add(self.batch);
        for queue in COPY..COPY + self.queues {
            self.vm.set_used_event(queue, self.done.wrapping_sub(1));
            self.vm.offer_at_once(queue, &heads);
            self.vm.kick(queue);
        }
        for queue in COPY..COPY + self.queues {
            while self.vm.used(queue) != self.done {
                self.sleep(queue);
            }
        }
        u64::from(self.batch) * u64::from(self.queues)
    }

    /// Sleeps until the device calls.
    fn sleep(&self, queue: u32) {
        let call = self.vm.call(queue);
        // SAFETY: the descriptor is that of the eventfd, which is borrowed for as long.
        let fd = unsafe { BorrowedFd::borrow_raw(call.as_raw_fd()) };
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::NONE).unwrap();
        call.read().unwrap();
    }
}

/// The CPU time of the device's threads after its last request.
fn idle() {
    let mut setup = Setup::new(2, VIRTIO_HMM_OP_TO_DEVICE, 16, 64);
    let busy = |setup: &mut Setup| {
        let start = Instant::now();
        while start.elapsed() < TIME {
            setup.run();
        }
    };
    println!("CPU time of all threads of the device, 2 queues, after its last request");
    busy(&mut setup);
    let mut at = 0;
    for window in IDLE {
        let before = cpu_time();
        thread::sleep(Duration::from_millis(window));
        let used = cpu_time().saturating_sub(before);
        println!(
            "  from {at} to {} ms: {:.3} ms, {:.2} % of a CPU",
            at + window,
            used.as_secs_f64() * 1e3,
            used.as_secs_f64() * 1e5 / window as f64
        );
        at += window;
    }
}
