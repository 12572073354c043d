//! What the daemon gives up once it has started: privileges, files, and system
//! calls.

use std::path::Path;

use caps::{CapSet, Capability, errors::CapsError};
use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, PathFdError, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use nix::{
    errno::Errno,
    sys::prctl::{set_dumpable, set_no_new_privs},
    unistd::geteuid,
};
use tracing::{info, warn};

use crate::seccomp::{self, Mode};

/// The newest Landlock that is known. An older kernel's restricts less.
const LANDLOCK: ABI = ABI::V10;

/// Why the daemon cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel does not take back what it allows.
    #[error("cannot give up privileges")]
    Privileges(#[from] Errno),
    /// The capabilities stay.
    #[error("cannot drop capabilities")]
    Capabilities(#[from] CapsError),
    /// The directory of a socket cannot be opened.
    #[error("cannot open the directory of a socket")]
    Directory(#[from] PathFdError),
    /// The files stay accessible.
    #[error("cannot restrict the access to files")]
    Files(#[from] RulesetError),
    /// The system calls stay.
    #[error(transparent)]
    Seccomp(#[from] seccomp::Error),
}

/// Gives up what a daemon with these sockets does not need any more, for this
/// thread and those that it starts later, see [`seccomp::filter`]. The process is
/// no longer dumpable.
///
/// # Errors
/// If the kernel refuses; some of it is given up then. That it has no Landlock
/// is no error.
pub fn enter<'a>(
    mode: Mode,
    counting: bool,
    sockets: impl Iterator<Item = &'a Path>,
) -> Result<(), Error> {
    // What the guest has in memory is not to be found in a core file, and other
    // processes of the same user do not trace this one.
    set_dumpable(false)?;
    set_no_new_privs()?;
    drop_capabilities()?;
    restrict_files(sockets)?;
    Ok(seccomp::filter(mode, counting)?)
}

fn drop_capabilities() -> Result<(), CapsError> {
    if geteuid().is_root() {
        info!("running as root, which is not needed; all capabilities are dropped");
    }
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding)?;
    }
    caps::clear(None, CapSet::Inheritable)?;
    caps::clear(None, CapSet::Effective)?;
    caps::clear(None, CapSet::Permitted)
}

/// Leaves nothing of the file system but that sockets can be removed, and
/// nothing of the network and of other processes but open connections.
fn restrict_files<'a>(sockets: impl Iterator<Item = &'a Path>) -> Result<(), Error> {
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?;
    for socket in sockets {
        let parent = socket.parent().filter(|path| !path.as_os_str().is_empty());
        let directory = PathFd::new(parent.unwrap_or(Path::new(".")))?;
        ruleset = ruleset.add_rule(PathBeneath::new(directory, AccessFs::RemoveFile))?;
    }
    if ruleset.restrict_self()?.ruleset == RulesetStatus::NotEnforced {
        warn!("this kernel has no Landlock; only the filter of system calls keeps files away");
    }
    Ok(())
}
