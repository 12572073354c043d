//! Listening sockets.

use std::{
    fs, io,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsRawFd, FromRawFd, RawFd},
        unix::{
            fs::FileTypeExt,
            net::{UnixDatagram, UnixListener},
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr, getsockopt,
            sockopt::AcceptConn,
        },
        stat::{Mode, fchmod},
    },
};
use tracing::warn;

/// Why there is no socket to listen on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process listens on the path.
    #[error("socket {0} is in use")]
    InUse(PathBuf),
    /// The path is something else than a socket, which is left alone.
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// The path cannot be used.
    #[error("cannot listen on {0}")]
    Bind(PathBuf, #[source] io::Error),
    /// The address cannot be used.
    #[error("cannot listen on {0}")]
    Address(SocketAddr, #[source] io::Error),
    /// The address can be reached from other hosts.
    #[error("{0} is not a loopback address, and metrics are served to whoever asks")]
    NotLoopback(SocketAddr),
    /// The file descriptor cannot be used.
    #[error("cannot use file descriptor {0}")]
    Fd(RawFd, #[source] io::Error),
    /// The file descriptor is a socket, or none, but does not listen.
    #[error("file descriptor {0} is not a listening socket")]
    NotListening(RawFd),
}

/// A socket in the file system, removed when dropped.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl SocketFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_file(&self.0) {
            warn!("cannot remove {}: {e}", self.0.display());
        }
    }
}

/// Listens on `path`, which only this user can connect to. A socket that nobody
/// listens on any more is replaced.
///
/// # Errors
/// If another process listens there, or the path cannot be used.
pub fn listen(path: &Path) -> Result<(UnixListener, SocketFile), Error> {
    let bind = |source| Error::Bind(path.into(), source);
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(bind(e)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(Error::NotASocket(path.into()));
        }
        Ok(_) if is_bound(path).map_err(bind)? => return Err(Error::InUse(path.into())),
        Ok(_) => fs::remove_file(path).map_err(bind)?,
    }
    let listener = listen_privately(path).map_err(|e| bind(e.into()))?;
    Ok((listener, SocketFile(path.into())))
}

/// Listens on an address that only this host can reach; port 0 is any free one.
///
/// # Errors
/// If the address is another one, or cannot be used.
pub fn listen_tcp(address: SocketAddr) -> Result<TcpListener, Error> {
    if !address.ip().is_loopback() {
        return Err(Error::NotLoopback(address));
    }
    TcpListener::bind(address).map_err(|source| Error::Address(address, source))
}

/// The file has the mode that the socket has when it is bound, less the umask, so
/// that there is no moment at which others can connect.
fn listen_privately(path: &Path) -> nix::Result<UnixListener> {
    let (family, kind) = (AddressFamily::Unix, SockType::Stream);
    let listener = socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
    fchmod(&listener, Mode::S_IRUSR | Mode::S_IWUSR)?;
    socket::bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&listener, Backlog::MAXCONN)?;
    Ok(listener.into())
}

/// Whether the socket at `path` belongs to a process. To ask with a datagram
/// socket does not disturb one that listens for streams: the kernel refuses the
/// type after it has found the owner.
fn is_bound(path: &Path) -> io::Result<bool> {
    match UnixDatagram::unbound()?.connect(path) {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(Errno::EPROTOTYPE as i32) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(false),
        Err(e) => Err(e),
    }
}

/// Takes over `fd`, a UNIX socket that listens already.
///
/// # Errors
/// If it is none.
pub fn inherit(fd: RawFd) -> Result<UnixListener, Error> {
    let unusable = |source| Error::Fd(fd, source);
    // Of 0 to 2 the program itself makes other use.
    if fd <= 2 {
        return Err(Error::NotListening(fd));
    }
    fs::symlink_metadata(format!("/proc/self/fd/{fd}"))
        .map_err(|_| unusable(Errno::EBADF.into()))?;
    // SAFETY: the descriptor is open, as just seen, and the caller's to give
    // away: it came with the process, which has no other use for it.
    let listener = unsafe { UnixListener::from_raw_fd(fd) };
    match getsockopt(&listener, AcceptConn) {
        Ok(true) => {}
        Ok(false) | Err(Errno::ENOTSOCK) => return Err(Error::NotListening(fd)),
        Err(e) => return Err(unusable(e.into())),
    }
    listener.local_addr().map_err(unusable)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_without_an_owner_is_replaced_and_removed_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (listener, file) = listen(&path).unwrap();
        assert!(matches!(listen(&path), Err(Error::InUse(_))));
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "the owner was disturbed");
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn other_files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(listen(&path), Err(Error::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn only_listening_sockets_are_inherited() {
        assert!(matches!(inherit(0), Err(Error::NotListening(0))));
        assert!(matches!(inherit(99_999), Err(Error::Fd(99_999, _))));
    }
}
