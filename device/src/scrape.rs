//! Serves the metrics to those who ask for them on a socket, over HTTP, on the
//! event loop of the control plane.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::{debug, error};

use crate::metrics::Metrics;

/// Most bytes of a request, and most connections at a time.
const MAX_REQUEST: usize = 4096;
const MAX_CONNECTIONS: usize = 16;

/// A socket on which to serve.
#[derive(Debug)]
pub enum Listener {
    /// In the file system.
    Unix(UnixListener),
    /// On an address of this host.
    Tcp(TcpListener),
}

impl Listener {
    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Unix(listener) => listener.set_nonblocking(true),
            Self::Tcp(listener) => listener.set_nonblocking(true),
        }
    }

    /// The next connection, non-blocking.
    fn accept(&self) -> io::Result<Box<dyn Stream>> {
        match self {
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok(Box::new(stream))
            }
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok(Box::new(stream))
            }
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Unix(listener) => listener.as_raw_fd(),
            Self::Tcp(listener) => listener.as_raw_fd(),
        }
    }
}

trait Stream: Read + Write + AsRawFd + Send {}

impl Stream for UnixStream {}
impl Stream for TcpStream {}

/// The metrics endpoint.
pub struct Scrape {
    listener: Listener,
    metrics: Metrics,
    connections: BTreeMap<RawFd, Connection>,
    accepted: u64,
}

struct Connection {
    stream: Box<dyn Stream>,
    /// Connections are counted, so that the oldest can be found.
    number: u64,
    request: Vec<u8>,
    /// What is to be sent, once the request is complete.
    reply: Option<Vec<u8>>,
    sent: usize,
}

impl Scrape {
    /// Serves `metrics` to those who connect to `listener`.
    ///
    /// # Errors
    /// If the socket cannot be made non-blocking.
    pub fn new(listener: Listener, metrics: Metrics) -> io::Result<Self> {
        listener.set_nonblocking()?;
        Ok(Self {
            listener,
            metrics,
            connections: BTreeMap::new(),
            accepted: 0,
        })
    }

    fn accept(&mut self, ops: &mut EventOps) {
        let stream = match self.listener.accept() {
            Ok(stream) => stream,
            // A peer over TCP may be gone again.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted
                ) =>
            {
                return;
            }
            Err(e) => {
                // The event would come again and again.
                error!("the metrics socket fails: {e}");
                watch(ops.remove(Events::empty_raw(self.listener.as_raw_fd())));
                return;
            }
        };
        // One that never reads must not keep others away.
        if self.connections.len() >= MAX_CONNECTIONS {
            let oldest = self.connections.values().min_by_key(|c| c.number);
            if let Some(fd) = oldest.map(|connection| connection.stream.as_raw_fd()) {
                self.close(fd, ops);
            }
        }
        let fd = stream.as_raw_fd();
        if watch(ops.add(Events::new_raw(fd, EventSet::IN))) {
            self.accepted += 1;
            let connection = Connection {
                stream,
                number: self.accepted,
                request: Vec::new(),
                reply: None,
                sent: 0,
            };
            self.connections.insert(fd, connection);
        }
    }

    fn close(&mut self, fd: RawFd, ops: &mut EventOps) {
        watch(ops.remove(Events::empty_raw(fd)));
        self.connections.remove(&fd);
    }
}

impl Connection {
    /// Receives and sends what can be. Returns whether to go on later.
    fn serve(&mut self, metrics: &Metrics) -> io::Result<bool> {
        if self.reply.is_none() {
            let mut bytes = [0; MAX_REQUEST];
            let received = self.stream.read(&mut bytes)?;
            self.request
                .extend_from_slice(bytes.get(..received).unwrap_or_default());
            let complete = self.request.windows(4).any(|end| end == b"\r\n\r\n");
            if !complete {
                return Ok(received > 0 && self.request.len() < MAX_REQUEST);
            }
            self.reply = Some(reply(&self.request, metrics));
        }
        let rest = self
            .reply
            .as_deref()
            .and_then(|reply| reply.get(self.sent..));
        let rest = rest.unwrap_or_default();
        let sent = self.stream.write(rest)?;
        self.sent += sent;
        Ok(sent < rest.len())
    }
}

fn reply(request: &[u8], metrics: &Metrics) -> Vec<u8> {
    let (status, kind, body) = match metrics.encode() {
        _ if !request.starts_with(b"GET /metrics ") && !request.starts_with(b"GET / ") => (
            "404 Not Found",
            "text/plain",
            "the metrics are at /metrics\n".into(),
        ),
        Ok(text) => (
            "200 OK",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            text,
        ),
        Err(e) => ("500 Internal Server Error", "text/plain", format!("{e}\n")),
    };
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

impl MutEventSubscriber for Scrape {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops.add(Events::new_raw(self.listener.as_raw_fd(), EventSet::IN)));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        let Some(connection) = self.connections.get_mut(&fd) else {
            self.accept(ops);
            return;
        };
        let go_on = match connection.serve(&self.metrics) {
            Ok(go_on) => go_on,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => true,
            Err(e) => {
                debug!("a metrics connection fails: {e}");
                false
            }
        };
        if !go_on {
            self.close(fd, ops);
        } else if connection.reply.is_some() {
            watch(ops.modify(Events::new_raw(fd, EventSet::OUT)));
        }
    }
}

fn watch(done: Result<(), event_manager::Error>) -> bool {
    if let Err(e) = &done {
        error!("the metrics endpoint cannot watch a descriptor: {e}");
    }
    done.is_ok()
}
