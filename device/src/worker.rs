//! Takes requests from one ring and answers them: at once, unless a link is
//! modelled or something is wrong on purpose.

use std::{
    collections::BTreeMap,
    hint, io, mem,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use tracing::{debug, error, warn};
use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::timerfd::TimerFd;

use crate::{
    ErrorChain,
    arrivals::Arrivals,
    counters::Counters,
    inject::{Injector, Strike},
    link::Link,
    polling::Polling,
    processor::{self, Answer, Flaws, Processor, Timing},
    rule::{Fault, Share},
};

/// How often a worker that may do nothing looks whether it may again.
const LOOK: Duration = Duration::from_millis(10);

/// Of small requests in a row, one of so many is timed.
const SAMPLE: u64 = 64;

/// How long before its time a worker waits awake for the end of a modelled
/// transfer. To be woken takes about as long.
const AWAKE: Duration = Duration::from_micros(60);

/// Why a queue stops until it is set up anew.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A request cannot be answered.
    #[error(transparent)]
    Request(#[from] processor::Error),
    /// The ring is broken.
    #[error("cannot access the ring")]
    Ring(#[from] virtio_queue::Error),
    /// The ring lies partly outside guest memory.
    #[error("an available ring entry lies outside guest memory")]
    Entry,
}

type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

/// What is done later.
enum Held {
    /// All of a request.
    Request(Chain),
    /// The answer to one that is executed, whose chain begins at this head.
    Answer(u16, Answer),
}

/// Serves one queue.
pub struct Worker {
    queue: u32,
    mem: GuestMemoryAtomic<GuestMemoryMmap>,
    processor: Processor,
    counters: Arc<Counters>,
    injector: Arc<Injector>,
    link: Option<Arc<Link>>,
    arrivals: Arrivals,
    /// When the one arrived that was taken last, if it was taken from the ring.
    arrived: Option<Instant>,
    /// The time, if it was just found out.
    now: Option<Instant>,
    /// Whether the next request is the first after a while.
    first: bool,
    polling: Polling,
    /// Requests of a row since one was timed.
    untimed: u64,
    /// A broken ring.
    stopped: bool,
    /// The number of cures when the queue was stalled.
    stalled: Option<u64>,
    /// What is done later, by time and order.
    held: BTreeMap<(Instant, u64), Held>,
    holds: u64,
    /// The one that waits for another to overtake it, and how long.
    overtaken: Option<(Instant, Chain)>,
    timer: TimerFd,
    armed: bool,
}

impl Worker {
    /// A worker for the queue of this number, whose guest has memory `mem`.
    ///
    /// # Errors
    /// If there is no timer for it.
    pub fn new(
        queue: u32,
        mem: GuestMemoryAtomic<GuestMemoryMmap>,
        processor: Processor,
        counters: Arc<Counters>,
        injector: Arc<Injector>,
        link: Option<Arc<Link>>,
    ) -> io::Result<Self> {
        Ok(Self {
            queue,
            mem,
            processor,
            counters,
            injector,
            link,
            arrivals: Arrivals::default(),
            arrived: None,
            now: None,
            first: true,
            polling: Polling::default(),
            untimed: 0,
            stopped: false,
            stalled: None,
            held: BTreeMap::new(),
            holds: 0,
            overtaken: None,
            timer: TimerFd::new()?,
            armed: false,
        })
    }

    /// The timer that says when to serve the queue though nobody kicked.
    pub fn timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Counts a notification by the driver.
    pub fn kicked(&mut self) {
        if let Some(counters) = self.counters.queues().get(self.queue as usize) {
            counters.ring.kicks.add(1);
        }
    }

    /// Processes what is available in the ring and what is due.
    pub fn drain(&mut self, vring: &VringMutex, stop: impl Fn() -> bool) {
        self.counters.count_hardware(self.queue as usize);
        self.now = None;
        self.first = true;
        loop {
            // A frontend that stops the queue takes this lock: once it has it,
            // no request is in flight and none is begun.
            let mut state = vring.get_mut();
            let running = state.is_enabled() && state.get_queue().ready();
            if !running || self.stopped || stop() {
                break;
            }
            let poll = !self.may_hold() && self.polling.is_due(Instant::now);
            match self.step(&mut state, poll) {
                Ok(true) => {}
                Ok(false) => {
                    drop(state);
                    if poll {
                        if self.polling.yields() {
                            // To whoever has something to do, the driver above all.
                            let begun = Instant::now();
                            thread::yield_now();
                            self.polling.note_yield(begun, Instant::now());
                        } else {
                            hint::spin_loop();
                        }
                        self.now = None;
                    } else if !self.wait_awake() {
                        break;
                    }
                }
                Err(e) => self.break_off(&e),
            }
        }
        if self.armed || self.may_hold() {
            self.arm();
        }
    }

    /// Ends what is in flight, for a queue that is stopped: what was held is
    /// executed now, since the queue's memory must not be touched later.
    pub fn stop(&mut self, vring: &VringMutex) {
        self.now = None;
        let mut state = vring.get_mut();
        if !self.stopped
            && !self.injector.dead()
            && let Err(e) = self.release(&mut state, None)
        {
            self.break_off(&e);
        }
        self.held.clear();
        self.arrivals = Arrivals::default();
        self.overtaken = None;
        self.stopped = false;
        self.stalled = None;
    }

    fn break_off(&mut self, error: &Error) {
        self.stopped = true;
        error!("queue {} stops: {}", self.queue, ErrorChain(error));
    }

    /// Processes the next request. Returns whether there may be another. If there
    /// is none, the driver has to notify of the next one, unless `poll`.
    fn step(&mut self, state: &mut VringState, poll: bool) -> Result<bool, Error> {
        let flawed = self.injector.active();
        if flawed && self.idle() {
            return Ok(false);
        }
        if flawed || self.link.is_some() {
            self.release(state, Some(Instant::now()))?;
        }
        let mem = self.mem.memory();
        let queue = state.get_queue_mut();
        let queue_size = queue.size();
        let (available, next) = (
            queue.avail_idx(&*mem, Ordering::Acquire)?.0,
            queue.next_avail(),
        );
        let now = &mut self.now;
        let clock = || *now.get_or_insert_with(Instant::now);
        if self.arrivals.note(available, next, clock) {
            self.count_arrivals(available.wrapping_sub(next), queue_size);
        }
        self.arrived = self.arrivals.next();
        if available == next {
            self.polling.note_empty(Instant::now);
            if poll {
                return Ok(false);
            }
            // Until now the driver need not have notified; this also looks
            // whether it made something available just before.
            return Ok(state.enable_notification()?);
        }
        if self.polling.note_request(Instant::now) {
            self.first = true;
        }
        // Asked again, since a request must not miss a fault that was set before it came.
        let flawed = flawed || self.injector.active();
        state.disable_notification()?;
        let chain = state
            .get_queue_mut()
            .iter(mem)?
            .next()
            .ok_or(Error::Entry)?;
        if flawed {
            return self.take(state, chain);
        }
        self.execute(state, chain, None)?;
        Ok(true)
    }

    fn count_arrivals(&self, waiting: u16, size: u16) {
        if let Some(counters) = self.counters.queues().get(self.queue as usize) {
            counters.ring.occupancy.set(waiting.into());
            counters.ring.occupancy_max.raise(waiting.into());
            counters.ring.full.add(u64::from(waiting == size));
        }
    }

    /// Whether anything is ever done later.
    fn may_hold(&self) -> bool {
        self.link.is_some() || self.injector.active()
    }

    /// Waits for what is due very soon. Returns whether there was any.
    fn wait_awake(&mut self) -> bool {
        let first = self.held.first_key_value();
        let Some(((due, _), Held::Answer(..))) = first else {
            return false;
        };
        if due.saturating_duration_since(Instant::now()) > AWAKE {
            return false;
        }
        while Instant::now() < *due {
            hint::spin_loop();
        }
        self.now = None;
        true
    }

    /// Whether the queue may not be served.
    fn idle(&mut self) -> bool {
        if self
            .stalled
            .is_some_and(|cures| cures != self.injector.cures())
        {
            self.stalled = None;
        }
        self.stalled.is_some() || self.injector.dead()
    }

    /// Decides about a request. Returns whether there may be another.
    fn take(&mut self, state: &mut VringState, chain: Chain) -> Result<bool, Error> {
        let strike = self
            .processor
            .look(chain.memory(), chain.clone())
            .and_then(|operation| {
                let holding = self.overtaken.is_some();
                self.injector.decide(self.queue, operation, holding)
            });
        let Some(strike) = strike else {
            self.complete(state, chain, None)?;
            return Ok(true);
        };
        let fault = strike.fault;
        self.counters.injected.record(fault);
        debug!("queue {}: {} injected", self.queue, fault.name());
        match fault {
            Fault::Delay(time) => {
                self.hold(Instant::now() + time, Held::Request(chain));
            }
            Fault::Reorder(time) => self.overtaken = Some((Instant::now() + time, chain)),
            Fault::Stall | Fault::Dead => {
                // The request is not taken.
                let queue = state.get_queue_mut();
                queue.set_next_avail(queue.next_avail().wrapping_sub(1));
                if fault == Fault::Dead {
                    warn!("the device is dead on purpose");
                    self.injector.kill();
                } else {
                    warn!("queue {} is stalled on purpose", self.queue);
                    self.stalled = Some(self.injector.cures());
                }
                return Ok(false);
            }
            Fault::Drop(Share::None) => {}
            _ => self.complete(state, chain, Some(strike))?,
        }
        Ok(true)
    }

    /// Executes a request, and that which waited for it.
    fn complete(
        &mut self,
        state: &mut VringState,
        chain: Chain,
        strike: Option<Strike>,
    ) -> Result<(), Error> {
        self.execute(state, chain, Some(strike))?;
        self.arrived = None;
        match self.overtaken.take() {
            Some((_, chain)) => self.execute(state, chain, Some(None)),
            None => Ok(()),
        }
    }

    /// Executes what is due at this time, or all.
    fn release(&mut self, state: &mut VringState, now: Option<Instant>) -> Result<(), Error> {
        let is_due = |due: Instant| now.is_none_or(|now| due <= now);
        while let Some(first) = self
            .held
            .first_entry()
            .filter(|first| is_due(first.key().0))
        {
            match first.remove() {
                Held::Request(chain) => {
                    self.arrived = None;
                    self.complete(state, chain, None)?;
                }
                Held::Answer(head, answer) => self.answer(state, head, answer)?,
            }
        }
        match self.overtaken.take_if(|(due, _)| is_due(*due)) {
            Some((_, chain)) => self.execute(state, chain, Some(None)),
            None => Ok(()),
        }
    }

    /// Executes a request, with flaws if `flaws` is given, and answers it.
    fn execute(
        &mut self,
        state: &mut VringState,
        chain: Chain,
        flaws: Option<Option<Strike>>,
    ) -> Result<(), Error> {
        let head = chain.head_index();
        let mem = self.mem.memory();
        let timing = self.timing();
        let flaws = flaws.map(|strike| Flaws {
            injector: &self.injector,
            strike,
        });
        let Some(answer) = self.processor.process(&mem, chain, timing, flaws)? else {
            return Ok(());
        };
        self.now = answer.done;
        if let Some(link) = &self.link
            && let Some(operation) = answer.operation.filter(|operation| operation.is_copy())
        {
            let arrived = timing.arrived.or(timing.begun).unwrap_or_else(Instant::now);
            let due = link.done(operation, answer.frames, arrived);
            self.hold(due, Held::Answer(head, answer));
            return Ok(());
        }
        self.answer(state, head, answer)
    }

    /// Whether to time the request that is begun now. The first after a while
    /// is, and some of those that come in a row.
    fn timing(&mut self) -> Timing {
        let weight = if self.first || self.link.is_some() {
            Some(1)
        } else {
            self.untimed += 1;
            (self.untimed == SAMPLE).then(|| mem::take(&mut self.untimed))
        };
        self.first = false;
        let now = self.now.take();
        Timing {
            arrived: self.arrived,
            begun: weight.map(|_| now.unwrap_or_else(Instant::now)),
            weight: weight.unwrap_or(1),
        }
    }

    fn hold(&mut self, due: Instant, held: Held) {
        self.held.insert((due, self.holds), held);
        self.holds += 1;
    }

    fn answer(&mut self, state: &mut VringState, head: u16, answer: Answer) -> Result<(), Error> {
        state.add_used(head, answer.written)?;
        let notify = state.needs_notification()?;
        if let Some(counters) = self.counters.queues().get(self.queue as usize) {
            let ring = &counters.ring;
            let counter = if notify {
                &ring.calls
            } else {
                &ring.calls_suppressed
            };
            counter.add(1);
        }
        if notify {
            if let Err(e) = state.signal_used_queue() {
                debug!("cannot notify the driver: {e}");
            }
            // That took a while.
            self.now = None;
        }
        Ok(())
    }

    /// Sets the timer to when something is due.
    fn arm(&mut self) {
        let next = if self.idle() {
            Some(LOOK)
        } else {
            let held = self
                .held
                .first_key_value()
                .map(|((due, _), held)| match held {
                    Held::Request(_) => *due,
                    // To wait awake for the rest of the time.
                    Held::Answer(..) => due.checked_sub(AWAKE).unwrap_or(*due),
                });
            let overtaken = self.overtaken.as_ref().map(|(due, _)| *due);
            let due = held.into_iter().chain(overtaken).min();
            // Zero would disarm it.
            due.map(|due| {
                due.saturating_duration_since(Instant::now())
                    .max(Duration::from_nanos(1))
            })
        };
        // This also takes back that it has expired.
        let set = match next {
            Some(time) => self.timer.reset(time, None),
            None => self.timer.clear(),
        };
        self.armed = next.is_some();
        if let Err(e) = set {
            error!("queue {}: cannot set the timer: {e}", self.queue);
        }
    }
}
