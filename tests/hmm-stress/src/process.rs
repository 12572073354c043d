//! Child processes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};

use crate::context::Context;
use crate::failure::Failure;

/// Seconds after which a child ends itself, should it hang.
const CHILD_DEADLINE: libc::c_uint = 100;

/// A forked child, killed if nobody waits for it.
#[derive(Debug)]
#[must_use]
pub struct Child {
    pid: Option<libc::pid_t>,
    report: File,
}

/// A pipe: its read end and its write end.
pub(crate) fn pipe() -> Result<(File, File), Failure> {
    let mut ends = [0; 2];
    // SAFETY: the array has room for the two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(Failure::system("pipe2"));
    }
    // SAFETY: both descriptors are new and belong to nobody else.
    let [read, write] = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
    Ok((read.into(), write.into()))
}

/// Run `body` in a forked child, which opens the device itself: a file that it
/// inherits acts on its parent's memory only.
///
/// # Errors
/// There can be no pipe or no child.
pub fn fork(
    context: &Context,
    body: impl FnOnce(&Context) -> Result<(), Failure>,
) -> Result<Child, Failure> {
    let (report, mut out) = pipe()?;
    // SAFETY: the child runs only code of this crate, ends with _exit, and needs no
    // lock but the allocator's, which the C library makes usable after fork.
    match unsafe { libc::fork() } {
        -1 => Err(Failure::system("fork")),
        0 => {
            // SAFETY: both calls only set properties of this process.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::alarm(CHILD_DEADLINE);
            }
            let result = context.reopen().and_then(|context| body(&context));
            let status = match result {
                Ok(()) => 0,
                Err(failure) => {
                    // The parent may be gone; the status tells the rest.
                    let _ = out.write_all(failure.describe().as_bytes());
                    1
                }
            };
            // SAFETY: _exit ends the process without running the parent's destructors.
            unsafe { libc::_exit(status) }
        }
        pid => Ok(Child {
            pid: Some(pid),
            report,
        }),
    }
}

impl Child {
    /// Wait until the child ends by itself.
    ///
    /// # Errors
    /// What made it fail, or the signal that ended it.
    pub fn wait(mut self) -> Result<(), Failure> {
        let mut text = String::new();
        // The report ends when the child does, or when it closes the pipe.
        let _ = self.report.read_to_string(&mut text);
        let status = self.reap()?;
        if libc::WIFSIGNALED(status) {
            let signal = libc::WTERMSIG(status);
            return Err(Failure::Broken(format!(
                "a child was ended by signal {signal}"
            )));
        }
        match libc::WEXITSTATUS(status) {
            0 => Ok(()),
            _ => Err(Failure::Broken(format!("in a child: {text}"))),
        }
    }

    /// Its process id, until it was waited for.
    #[must_use]
    pub fn pid(&self) -> libc::pid_t {
        self.pid.unwrap_or(-1)
    }

    /// Wait until the child ends by `signal`, and tell whether it left a core dump.
    ///
    /// # Errors
    /// It ended otherwise.
    pub fn wait_signal(mut self, signal: libc::c_int) -> Result<bool, Failure> {
        let status = self.reap()?;
        if !libc::WIFSIGNALED(status) || libc::WTERMSIG(status) != signal {
            let mut text = String::new();
            // The report ends when the child does, which it has.
            let _ = self.report.read_to_string(&mut text);
            return Err(Failure::Broken(format!(
                "a child ended with status {status:#x} instead of signal {signal}: {text}"
            )));
        }
        Ok(libc::WCOREDUMP(status))
    }

    /// Wait until the child stops, as a tracee does.
    ///
    /// # Errors
    /// It ended.
    pub fn wait_stopped(&self) -> Result<(), Failure> {
        let mut status = 0;
        // SAFETY: `status` lives for the call.
        let pid = unsafe { libc::waitpid(self.pid(), &raw mut status, libc::WUNTRACED) };
        if pid != self.pid() || !libc::WIFSTOPPED(status) {
            return Err(Failure::Broken(format!(
                "a child did not stop: status {status:#x}"
            )));
        }
        Ok(())
    }

    /// End the child with SIGKILL.
    ///
    /// # Errors
    /// It had failed already.
    pub fn kill(mut self) -> Result<(), Failure> {
        self.send_kill();
        let status = self.reap()?;
        if libc::WIFEXITED(status) {
            return Err(Failure::Broken("a child ended before it was killed".into()));
        }
        Ok(())
    }

    fn send_kill(&self) {
        if let Some(pid) = self.pid {
            // SAFETY: the child was not reaped yet, so the pid is still its own.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }

    /// Wait for the end of the child and return its status.
    fn reap(&mut self) -> Result<libc::c_int, Failure> {
        let mut status = 0;
        while let Some(pid) = self.pid {
            // SAFETY: `status` lives for the call.
            if unsafe { libc::waitpid(pid, &raw mut status, 0) } == pid {
                self.pid = None;
            } else if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return Err(Failure::system("waitpid"));
            }
        }
        Ok(status)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.send_kill();
        // Nobody is left to tell of a failure.
        let _ = self.reap();
    }
}
