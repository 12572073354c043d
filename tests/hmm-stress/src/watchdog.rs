//! An end for whatever hangs.

use std::fs;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Exit status of a program that missed a deadline.
pub const EXIT_DEADLINE: i32 = 3;

/// Ends the process when it is not dropped in time.
#[derive(Debug)]
pub struct Watchdog {
    cancel: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// After `deadline`, call `report`, print where every thread is, and exit with
    /// [`EXIT_DEADLINE`].
    pub fn start(deadline: Duration, report: impl FnOnce() + Send + 'static) -> Self {
        let (cancel, cancelled) = mpsc::channel::<()>();
        let thread = thread::spawn(move || {
            if cancelled.recv_timeout(deadline) == Err(RecvTimeoutError::Timeout) {
                report();
                print_threads();
                // SAFETY: _exit may be called at any time; children die with their parent.
                unsafe { libc::_exit(EXIT_DEADLINE) }
            }
        });
        Self {
            cancel: Some(cancel),
            thread: Some(thread),
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.cancel.take());
        if let Some(thread) = self.thread.take() {
            // A watchdog that panicked has nothing left to guard.
            let _ = thread.join();
        }
    }
}

/// Print on stderr where in the kernel the threads of this process are.
fn print_threads() {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else {
        return;
    };
    for task in tasks.flatten() {
        let stack = fs::read_to_string(task.path().join("stack")).unwrap_or_default();
        eprintln!("thread {}:\n{stack}", task.file_name().display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watchdog_that_is_dropped_in_time_does_nothing() {
        drop(Watchdog::start(
            Duration::from_secs(3600),
            || unreachable!(),
        ));
    }
}
