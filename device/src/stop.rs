//! The request to end the daemon.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use nix::sys::eventfd::{EfdFlags, EventFd};
use tracing::error;
use vhost_user_backend::ShutdownHandle;

/// Tells all threads of a server to end. It cannot be taken back.
pub struct Stop {
    requested: AtomicBool,
    event: EventFd,
    connection: Mutex<Option<ShutdownHandle>>,
}

impl Stop {
    /// A stop that is not requested yet.
    ///
    /// # Errors
    /// If the event for it cannot be made.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            requested: AtomicBool::new(false),
            event: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            connection: Mutex::new(None),
        })
    }

    /// Requests the stop: wakes who waits for [`Self::as_fd`] and ends the
    /// connection to the VMM.
    pub fn request(&self) {
        let connection = self.connection();
        self.requested.store(true, Ordering::Relaxed);
        if let Err(e) = self.event.write(1) {
            error!("cannot signal the stop: {e}");
        }
        if let Some(connection) = &*connection {
            connection.shutdown();
        }
    }

    /// Whether the stop was requested.
    pub fn requested(&self) -> bool {
        self.requested.load(Ordering::Relaxed)
    }

    /// Sets the connection that a stop ends, which is at once if it has been
    /// requested already.
    pub fn set_connection(&self, handle: Option<ShutdownHandle>) {
        let mut connection = self.connection();
        *connection = handle;
        if let (true, Some(connection)) = (self.requested(), &*connection) {
            connection.shutdown();
        }
    }

    fn connection(&self) -> MutexGuard<'_, Option<ShutdownHandle>> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Readable once the stop was requested.
impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl AsRawFd for Stop {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.event.as_raw_fd()
    }
}
