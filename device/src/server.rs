//! Serves one VM after another.

use std::{
    io,
    net::SocketAddr,
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::net::UnixListener,
    },
    panic::resume_unwind,
    path::PathBuf,
    sync::Arc,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use tracing::{info, warn};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::{
    backend::Backend,
    control::{self, Control},
    engine::Engine,
    hardware::Events,
    inject::Injector,
    link,
    memory::{self, Backing, Memory},
    rule::{self, Rule},
    sandbox, scrape,
    seccomp::Mode,
    session::Shared,
    socket::{self, SocketFile},
    stop::Stop,
};

/// Most copy queues of a device.
pub const MAX_COPY_QUEUES: u16 = 16;

/// Where VMs connect.
#[derive(Clone, Debug)]
pub enum Endpoint {
    /// A path to listen on.
    Path(PathBuf),
    /// A descriptor of a socket that listens already.
    Fd(RawFd),
}

/// What to serve, and where.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where VMs connect.
    pub endpoint: Endpoint,
    /// Bytes of device memory, a multiple of 2 MiB.
    pub memory_size: u64,
    /// Number of copy queues, 1 to [`MAX_COPY_QUEUES`].
    pub copy_queues: u16,
    /// Path of the control socket.
    pub control_socket: Option<PathBuf>,
    /// Path of the metrics socket.
    pub metrics_socket: Option<PathBuf>,
    /// Address on which metrics are served over TCP. Whoever can connect may read them.
    pub metrics_tcp: Option<SocketAddr>,
    /// What the memory is made of.
    pub backing: Backing,
    /// Whether to have the processor count what the workers do.
    pub hardware_counters: bool,
    /// The link to the device that is modelled.
    pub link: link::Config,
    /// Faults on purpose.
    pub inject: Vec<Rule>,
    /// What decides where they strike.
    pub inject_seed: u64,
}

/// Why a server cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no device memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// There is no socket.
    #[error(transparent)]
    Socket(#[from] socket::Error),
    /// A fault can never strike.
    #[error(transparent)]
    Rule(#[from] rule::Error),
    /// The control plane failed.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// The process cannot be confined.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// The number of copy queues is out of range.
    #[error("{0} copy queues, must be 1 to {MAX_COPY_QUEUES}")]
    CopyQueues(u16),
    /// The host refuses a resource.
    #[error("cannot serve")]
    Io(#[from] io::Error),
    /// The device of a VM cannot be set up.
    #[error("cannot set up a session: {0}")]
    Session(DaemonError),
}

/// A device that VMs can connect to, one at a time.
pub struct Server {
    service: Service,
    control: Control,
    /// Whether the workers have the processor count what they do.
    counting: bool,
    files: Vec<SocketFile>,
}

/// What the thread that serves VMs has.
struct Service {
    listener: UnixListener,
    engine: Engine,
    injector: Arc<Injector>,
    link: link::Config,
    shared: Arc<Shared>,
    stop: Arc<Stop>,
}

impl Server {
    /// Makes the memory and the sockets.
    ///
    /// # Errors
    /// If one of them cannot be had.
    pub fn new(config: &Config) -> Result<Self, Error> {
        let mut files = Vec::new();
        // First, so that an inherited descriptor is not one of our own.
        let listener = match &config.endpoint {
            Endpoint::Fd(fd) => socket::inherit(*fd)?,
            Endpoint::Path(path) => {
                let (listener, file) = socket::listen(path)?;
                files.push(file);
                listener
            }
        };
        if !(1..=MAX_COPY_QUEUES).contains(&config.copy_queues) {
            return Err(Error::CopyQueues(config.copy_queues));
        }
        let injector = Arc::new(Injector::new(
            config.inject_seed,
            &config.inject,
            config.copy_queues.into(),
        )?);
        let memory = Arc::new(Memory::new(config.memory_size, config.backing)?);
        let events = if config.hardware_counters {
            Events::all()
        } else {
            Events::default()
        };
        let (events, uncounted) = events.available();
        let counting = events.names().next().is_some();
        let shared = Shared::new(config.memory_size, config.copy_queues, events);
        let shared = Arc::new(shared);
        let stop = Arc::new(Stop::new()?);
        let mut control = Control::new(
            Arc::clone(&shared),
            Arc::clone(&memory),
            Arc::clone(&injector),
            Arc::clone(&stop),
        );
        if let Some(path) = &config.control_socket {
            let (listener, file) = socket::listen(path)?;
            files.push(file);
            control.listen(listener)?;
        }
        if let Some(path) = &config.metrics_socket {
            let (listener, file) = socket::listen(path)?;
            files.push(file);
            control.serve_metrics(scrape::Listener::Unix(listener))?;
        }
        if let Some(address) = config.metrics_tcp {
            let listener = socket::listen_tcp(address)?;
            info!("metrics at http://{}/metrics", listener.local_addr()?);
            control.serve_metrics(scrape::Listener::Tcp(listener))?;
        }
        if let Some(reason) = uncounted {
            info!("{reason}");
        }
        let engine = Engine::new(memory);
        Ok(Self {
            service: Service {
                listener,
                engine,
                injector,
                link: config.link,
                shared,
                stop,
            },
            control,
            counting,
            files,
        })
    }

    /// Makes SIGTERM and SIGINT end the server cleanly. To be called before the
    /// process starts other threads, which would take the signals.
    ///
    /// # Errors
    /// If the signals cannot be had.
    pub fn handle_signals(&mut self) -> Result<(), Error> {
        Ok(self.control.handle_signals()?)
    }

    /// Gives up what the server does not need to run, for this thread and those
    /// that it starts later, see [`sandbox::enter`].
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn confine(&self, seccomp: Mode) -> Result<(), Error> {
        let sockets = self.files.iter().map(SocketFile::path);
        Ok(sandbox::enter(seccomp, self.counting, sockets)?)
    }

    /// The means to end the server.
    pub fn stop(&self) -> Arc<Stop> {
        Arc::clone(&self.service.stop)
    }

    /// Serves until stopped, and removes the sockets.
    ///
    /// # Errors
    /// If the device can no longer be offered. The failure of a VM is none.
    pub fn run(self) -> Result<(), Error> {
        let control = self.control.start()?;
        let served = self.service.serve();
        self.service.stop.request();
        let controlled = control.join().unwrap_or_else(|panic| resume_unwind(panic));
        served?;
        Ok(controlled?)
    }
}

impl Service {
    /// Serves one VM after another until stopped.
    fn serve(&self) -> Result<(), Error> {
        let mut accept = Listener::from(self.listener.try_clone()?);
        while connection_comes(&self.listener, &self.stop)? {
            self.run_session(&mut accept)?;
            // Before the next VM can see it.
            let memory = self.engine.memory();
            memory.clear(0, memory.size())?;
            self.shared.end();
        }
        Ok(())
    }

    /// Serves the VM that connects next until it disconnects.
    fn run_session(&self, listener: &mut Listener) -> Result<(), Error> {
        let session = self.shared.begin();
        self.injector.begin();
        self.engine.memory().begin_session();
        info!("session {} begins", session.number);
        let mem = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let backend = Arc::new(Backend::new(
            self.shared.config(&session),
            mem.clone(),
            &self.engine,
            &session.counters,
            &self.injector,
            self.link.link(),
            Arc::clone(&self.stop),
        )?);
        // The library never closes the event that it offers for ending workers.
        let ended = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(io::Error::from)?;
        let (stop_token, timer_token) = (backend.stop_token(), backend.timer_token());
        let timers: Vec<_> = backend.timers().collect();
        let mut daemon =
            VhostUserDaemon::new("vhost-user".into(), backend, mem).map_err(Error::Session)?;
        for (worker, timer) in daemon.get_epoll_handlers().iter().zip(timers) {
            let listen = |fd, token| worker.register_listener(fd, EventSet::IN, token);
            let timed = timer.map_or(Ok(()), |timer| listen(timer, timer_token));
            if let Err(e) = timed.and_then(|()| listen(ended.as_raw_fd(), stop_token)) {
                // To drop the daemon would wait for this worker.
                std::mem::forget(daemon);
                return Err(e.into());
            }
        }
        let result = daemon.start(listener).and_then(|()| {
            self.stop.set_connection(daemon.shutdown_handle());
            daemon.wait()
        });
        self.stop.set_connection(None);
        // Dropping the daemon joins the workers.
        ended.write(1).map_err(io::Error::from)?;
        drop(daemon);
        match result {
            Ok(())
            | Err(DaemonError::HandleRequest(
                VhostUserError::Disconnected | VhostUserError::PartialMessage,
            )) => info!("session {} ends", session.number),
            Err(e) => warn!("session {} ends: {e}", session.number),
        }
        Ok(())
    }
}

/// Waits for a connection. False if the server is to stop instead.
fn connection_comes(listener: &UnixListener, stop: &Stop) -> io::Result<bool> {
    loop {
        let mut fds = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) if stop.requested() => return Ok(false),
            Ok(_) => return Ok(true),
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
