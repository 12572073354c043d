//! Why a scenario or a test ended early.

use std::io;

use thiserror::Error;
use virtio_hmm_client::counters::CountersError;
use virtio_hmm_client::{Error, MigrateError, OpenError, ReleaseError};

use crate::pattern::Mismatch;

/// Why a scenario or a test did not pass.
#[derive(Debug, Error)]
pub enum Failure {
    /// It cannot run here.
    #[error("{0}")]
    Skip(String),
    /// Memory does not hold what was written to it.
    #[error("{0}")]
    Mismatch(Mismatch),
    /// Memory is lost, and the kernel has said so.
    #[error("page {page} (at {address:#x}) is lost, by SIGBUS")]
    Lost {
        /// Page in its region.
        page: u64,
        /// Its address at that moment.
        address: usize,
    },
    /// The system did not behave as it must.
    #[error("{0}")]
    Broken(String),
    /// A call to the driver failed.
    #[error(transparent)]
    Driver(#[from] Error),
    /// A migration failed.
    #[error(transparent)]
    Migrate(Box<MigrateError>),
    /// Pages did not come home.
    #[error(transparent)]
    Release(Box<ReleaseError>),
    /// The device could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Counters could not be read.
    #[error(transparent)]
    Counters(#[from] CountersError),
    /// A system call of the program itself failed.
    #[error("{call} failed")]
    System {
        /// Its name.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl From<MigrateError> for Failure {
    fn from(error: MigrateError) -> Self {
        Self::Migrate(Box::new(error))
    }
}

impl From<ReleaseError> for Failure {
    fn from(error: ReleaseError) -> Self {
        Self::Release(Box::new(error))
    }
}

impl Failure {
    /// The failure of system call `call`, from errno.
    #[must_use]
    pub fn system(call: &'static str) -> Self {
        Self::System {
            call,
            source: io::Error::last_os_error(),
        }
    }

    /// The message with those of its causes.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }
}

/// Fail with the formatted message unless the condition holds.
#[macro_export]
macro_rules! require {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err($crate::failure::Failure::Broken(format!($($message)+)));
        }
    };
}
