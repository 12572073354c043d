//! Why a case, or the program, ended early.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a case did not pass, or none can run.
#[derive(Debug, Error)]
pub enum Failure {
    /// It cannot be tried on this device.
    #[error("{0}")]
    Skip(String),
    /// The device did not behave as it must.
    #[error("{0}")]
    Broken(String),
    /// The device did not do something in time.
    #[error("no {0} in time")]
    Late(&'static str),
    /// The machine lacks something.
    #[error("{0}")]
    Unfit(String),
    /// A file of the kernel's cannot be used.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was to be done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// vfio failed.
    #[error("vfio failed")]
    Vfio(#[from] vfio_ioctls::VfioError),
    /// Memory of the program's own failed.
    #[error("cannot access memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// How a case or a step of it ends.
pub type Result<T = (), E = Failure> = std::result::Result<T, E>;

/// Fail with the formatted message unless the condition holds.
#[macro_export]
macro_rules! require {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err($crate::failure::Failure::Broken(format!($($message)+)));
        }
    };
}
