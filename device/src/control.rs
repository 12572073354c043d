//! The control plane: the control socket and the signals, on an event loop of
//! its own thread.
//!
//! The control socket is a UNIX stream. Each line is a request, a JSON object
//! whose member `command` is `counters`, `statistics`, `info` or `inject`, and gets
//! one line in reply: a JSON object, which has a member `error` if there is no other answer.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    process,
    sync::Arc,
    thread::{self, JoinHandle},
};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tracing::{debug, error, info};

use crate::{
    abi::{VIRTIO_HMM_FRAME_SIZE, VIRTIO_HMM_VERSION},
    inject::{Injector, Report},
    memory::Memory,
    metrics::Metrics,
    rule::{self, Rule},
    scrape::{Listener, Scrape},
    session::{Session, Shared},
    statistics::statistics,
    stop::Stop,
};

/// Most bytes of a request, and most connections at a time.
const MAX_LINE: usize = 4096;
const MAX_CONNECTIONS: usize = 16;

/// Why there is no control plane.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refuses a resource.
    #[error("cannot set up the control plane")]
    Io(#[from] io::Error),
    /// The event loop cannot be made, or fails.
    #[error("the event loop of the control plane fails")]
    Loop(#[from] event_manager::Error),
}

/// The control plane of one server.
pub struct Control {
    shared: Arc<Shared>,
    memory: Arc<Memory>,
    injector: Arc<Injector>,
    stop: Arc<Stop>,
    listener: Option<UnixListener>,
    signals: Option<SignalFd>,
    scrapes: Vec<Scrape>,
    connections: HashMap<RawFd, Connection>,
    accepted: u64,
}

struct Connection {
    stream: UnixStream,
    /// Connections are counted, so that the oldest can be found.
    number: u64,
    /// The beginning of a request.
    line: Vec<u8>,
}

#[derive(Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
enum Command {
    Counters,
    Statistics,
    Info,
    /// Changes what goes wrong on purpose, and says what does.
    Inject {
        /// A rule to add.
        rule: Option<String>,
        /// Whether the device is made well before.
        #[serde(default)]
        clear: bool,
    },
}

impl Control {
    /// A control plane without a control socket.
    pub fn new(
        shared: Arc<Shared>,
        memory: Arc<Memory>,
        injector: Arc<Injector>,
        stop: Arc<Stop>,
    ) -> Self {
        Self {
            shared,
            memory,
            injector,
            stop,
            listener: None,
            signals: None,
            scrapes: Vec::new(),
            connections: HashMap::new(),
            accepted: 0,
        }
    }

    /// Takes commands from those who connect to `listener`.
    ///
    /// # Errors
    /// If the socket cannot be made non-blocking.
    pub fn listen(&mut self, listener: UnixListener) -> Result<(), Error> {
        listener.set_nonblocking(true)?;
        self.listener = Some(listener);
        Ok(())
    }

    /// Serves metrics to those who connect to `listener`; can be repeated.
    ///
    /// # Errors
    /// If the socket cannot be made non-blocking.
    pub fn serve_metrics(&mut self, listener: Listener) -> Result<(), Error> {
        let metrics = Metrics::new(Arc::clone(&self.shared), Arc::clone(&self.memory));
        self.scrapes.push(Scrape::new(listener, metrics)?);
        Ok(())
    }

    /// Makes SIGTERM and SIGINT request the stop, in this thread and those that
    /// it starts later.
    ///
    /// # Errors
    /// If the signals cannot be had.
    pub fn handle_signals(&mut self) -> Result<(), Error> {
        let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
        signals.thread_block().map_err(io::Error::from)?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        self.signals = Some(SignalFd::with_flags(&signals, flags).map_err(io::Error::from)?);
        Ok(())
    }

    /// Starts the thread, which ends once the stop is requested, or requests it
    /// itself if it fails.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(mut self) -> Result<JoinHandle<Result<(), Error>>, Error> {
        let mut manager = EventManager::<Box<dyn MutEventSubscriber + Send>>::new()?;
        let stop = Arc::clone(&self.stop);
        for scrape in self.scrapes.drain(..) {
            manager.add_subscriber(Box::new(scrape));
        }
        manager.add_subscriber(Box::new(self));
        let run = move || {
            while !stop.requested() {
                if let Err(e) = manager.run() {
                    stop.request();
                    return Err(e.into());
                }
            }
            Ok(())
        };
        Ok(thread::Builder::new().name("control".into()).spawn(run)?)
    }

    fn accept(&mut self, ops: &mut EventOps) {
        let Some(listener) = &self.listener else {
            return;
        };
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
            Err(e) => {
                // The event would come again and again.
                error!("the control socket fails: {e}");
                remove(ops, listener.as_raw_fd());
                return;
            }
        };
        if let Err(e) = stream.set_nonblocking(true) {
            debug!("cannot serve a control connection: {e}");
            return;
        }
        // One that says nothing must not keep others away.
        if self.connections.len() >= MAX_CONNECTIONS {
            let oldest = self.connections.iter().min_by_key(|(_, c)| c.number);
            if let Some(fd) = oldest.map(|(fd, _)| *fd) {
                debug!("too many control connections");
                remove(ops, fd);
                self.connections.remove(&fd);
            }
        }
        if add(ops, stream.as_raw_fd()) {
            self.accepted += 1;
            let connection = Connection {
                stream,
                number: self.accepted,
                line: Vec::new(),
            };
            self.connections
                .insert(connection.stream.as_raw_fd(), connection);
        }
    }

    fn reply(&self, line: &[u8]) -> Vec<u8> {
        match serde_json::from_slice(line) {
            Ok(Command::Counters) => to_line(&self.shared.session()),
            Ok(Command::Statistics) => to_line(&statistics(&self.shared.session(), &self.memory)),
            Ok(Command::Info) => {
                let Session {
                    memory_size,
                    copy_queues,
                    ..
                } = self.shared.session();
                to_line(&json!({
                    "version": env!("CARGO_PKG_VERSION"),
                    "interface_version": VIRTIO_HMM_VERSION,
                    "pid": process::id(),
                    "uuid": self.shared.uuid().to_string(),
                    "frame_size": VIRTIO_HMM_FRAME_SIZE,
                    "memory_size": memory_size,
                    "copy_queues": copy_queues,
                }))
            }
            Ok(Command::Inject { rule, clear }) => match self.inject(rule, clear) {
                Ok(report) => to_line(&report),
                Err(e) => to_line(&json!({ "error": e.to_string() })),
            },
            Err(e) => to_line(&json!({ "error": e.to_string() })),
        }
    }

    fn inject(&self, rule: Option<String>, clear: bool) -> Result<Report, rule::Error> {
        let rule: Option<Rule> = rule.map(|rule| rule.parse()).transpose()?;
        if clear {
            self.injector.clear();
        }
        if let Some(rule) = rule {
            self.injector.add(rule)?;
        }
        Ok(self.injector.report())
    }

    /// Answers what has arrived on `connection`. Returns whether to keep it.
    fn serve(&self, connection: &mut Connection) -> io::Result<bool> {
        let mut bytes = [0; MAX_LINE];
        let received = match connection.stream.read(&mut bytes) {
            Ok(0) => return Ok(false),
            Ok(received) => bytes.get(..received).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(e) => return Err(e),
        };
        self.answer(&mut connection.line, received, &mut connection.stream)
    }

    /// Answers the requests that `received` completes, the first of which begins
    /// with `line`, and leaves the beginning of the next there. Returns whether
    /// there can be more.
    ///
    /// # Errors
    /// If an answer cannot be written at once.
    pub fn answer(
        &self,
        line: &mut Vec<u8>,
        received: &[u8],
        replies: &mut impl Write,
    ) -> io::Result<bool> {
        for part in received.split_inclusive(|b| *b == b'\n') {
            line.extend_from_slice(part);
            if line.len() > MAX_LINE {
                replies.write_all(&to_line(&json!({ "error": "request too long" })))?;
                return Ok(false);
            }
            if part.ends_with(b"\n") {
                // A peer that does not read its replies is given up.
                replies.write_all(&self.reply(line))?;
                line.clear();
            }
        }
        Ok(true)
    }
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        add(ops, self.stop.as_raw_fd());
        if let Some(listener) = &self.listener {
            add(ops, listener.as_raw_fd());
        }
        if let Some(signals) = &self.signals {
            add(ops, signals.as_raw_fd());
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if let Some(mut connection) = self.connections.remove(&fd) {
            match self.serve(&mut connection) {
                Ok(true) => {
                    self.connections.insert(fd, connection);
                    return;
                }
                Ok(false) => {}
                Err(e) => debug!("a control connection fails: {e}"),
            }
            remove(ops, fd);
        } else if self
            .signals
            .as_ref()
            .is_some_and(|signals| signals.as_raw_fd() == fd)
        {
            if let Some(Ok(Some(signal))) = self.signals.as_mut().map(|s| s.read_signal()) {
                info!("stopping on signal {}", signal.ssi_signo);
                self.stop.request();
            }
        } else if fd != self.stop.as_raw_fd() {
            self.accept(ops);
        }
    }
}

fn add(ops: &mut EventOps, fd: RawFd) -> bool {
    let added = ops.add(Events::new_raw(fd, EventSet::IN));
    if let Err(e) = &added {
        error!("the control plane cannot watch a descriptor: {e}");
    }
    added.is_ok()
}

fn remove(ops: &mut EventOps, fd: RawFd) {
    if let Err(e) = ops.remove(Events::empty_raw(fd)) {
        error!("the control plane cannot forget a descriptor: {e}");
    }
}

fn to_line(reply: &impl Serialize) -> Vec<u8> {
    // Replies are plain structures, which always serialize.
    let mut line = serde_json::to_vec(reply).unwrap_or_default();
    line.push(b'\n');
    line
}
