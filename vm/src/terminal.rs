//! The user's terminal as the guest's console.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::error::{FileContext, Result};

/// Ctrl-A, as QEMU's own console and screen(1) have it.
const ESCAPE: u8 = 1;

/// A session between the terminal and the guest's console; it gives the
/// terminal back as it was when it is dropped.
#[derive(Debug)]
pub(crate) struct Session {
    before: Termios,
    quit: Arc<AtomicBool>,
}

impl Session {
    /// Takes the terminal over, and connects it to whoever connects to the socket.
    pub(crate) fn start(listener: UnixListener) -> Result<Self> {
        let before = tcgetattr(io::stdin()).at("use", "the terminal")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).at("use", "the terminal")?;
        let session = Self {
            before,
            quit: Arc::new(AtomicBool::new(false)),
        };
        let quit = Arc::clone(&session.quit);
        thread::spawn(move || {
            if let Ok((guest, _)) = listener.accept()
                && let Ok(to_guest) = guest.try_clone()
            {
                thread::spawn(move || from_user(to_guest, &quit));
                to_user(guest);
            }
        });
        Ok(session)
    }

    /// Whether the user has typed Ctrl-A x.
    pub(crate) fn quit(&self) -> bool {
        self.quit.load(Ordering::Relaxed)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// The size of the user's terminal; the usual one if it does not tell.
pub(crate) fn size() -> hmm_init::Terminal {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => hmm_init::Terminal {
            rows: size.ws_row,
            columns: size.ws_col,
        },
        _ => hmm_init::Terminal {
            rows: 24,
            columns: 80,
        },
    }
}

fn to_user(mut guest: UnixStream) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = guest.read(&mut buffer) {
        let mut out = io::stdout().lock();
        let data = buffer.get(..count).unwrap_or_default();
        if out.write_all(data).and_then(|()| out.flush()).is_err() {
            return;
        }
    }
}

fn from_user(mut guest: UnixStream, quit: &AtomicBool) {
    let mut keys = Keys::default();
    let mut buffer = [0; 256];
    while let Ok(count @ 1..) = io::stdin().lock().read(&mut buffer) {
        let data = keys.translate(buffer.get(..count).unwrap_or_default());
        if keys.quit {
            quit.store(true, Ordering::Relaxed);
            return;
        }
        if guest.write_all(&data).is_err() {
            return;
        }
    }
}

/// Ctrl-A x ends the session, Ctrl-A Ctrl-A is one Ctrl-A.
#[derive(Default)]
struct Keys {
    escaped: bool,
    quit: bool,
}

impl Keys {
    fn translate(&mut self, typed: &[u8]) -> Vec<u8> {
        let mut sent = Vec::with_capacity(typed.len());
        for &key in typed {
            match (std::mem::take(&mut self.escaped), key) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'x') => self.quit = true,
                (_, key) => sent.push(key),
            }
        }
        sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_is_the_escape() {
        let mut keys = Keys::default();
        assert_eq!(keys.translate(b"ax\x01\x01b\x01"), b"ax\x01b");
        assert!(!keys.quit);
        keys.translate(b"x");
        assert!(keys.quit);
    }
}
