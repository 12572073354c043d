//! Complaints in the kernel's log.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use crate::failure::Failure;

/// What the kernel prints when something is wrong with it.
const COMPLAINTS: &[&str] = &[
    "WARNING:",
    "BUG:",
    "Oops",
    "KASAN:",
    "UBSAN:",
    "kernel BUG",
    "general protection fault",
    "unable to handle",
    "Bad page",
    "Bad rss-counter",
    "possible circular locking",
    "possible recursive locking",
    "inconsistent lock state",
    "suspicious RCU usage",
    "blocked for more than",
    "refcount_t:",
];

/// A reader of /dev/kmsg that starts at its end.
#[derive(Debug)]
pub struct KernelLog {
    file: File,
}

impl KernelLog {
    /// Open the log; lines that are there already are not looked at.
    ///
    /// # Errors
    /// /dev/kmsg cannot be opened, as when the user is not root.
    pub fn open() -> Result<Self, Failure> {
        let open = || {
            let mut file = File::options()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open("/dev/kmsg")?;
            file.seek(SeekFrom::End(0))?;
            Ok(file)
        };
        let file = open().map_err(|source| Failure::System {
            call: "opening /dev/kmsg",
            source,
        })?;
        Ok(Self { file })
    }

    /// The complaints since the last call.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn complaints(&mut self) -> Result<Vec<String>, Failure> {
        let mut found = Vec::new();
        let mut record = [0; 8192];
        loop {
            match self.file.read(&mut record) {
                Ok(0) => return Ok(found),
                Ok(length) => {
                    let text = String::from_utf8_lossy(&record[..length]);
                    found.extend(complaint(&text).map(str::to_owned));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(found),
                // EPIPE: records were overwritten before they were read.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(Failure::System {
                        call: "reading /dev/kmsg",
                        source,
                    });
                }
            }
        }
    }
}

/// The message of a record of /dev/kmsg, if it is a complaint.
fn complaint(record: &str) -> Option<&str> {
    let (_, message) = record.split_once(';')?;
    let message = message.lines().next()?;
    COMPLAINTS
        .iter()
        .any(|pattern| message.contains(pattern))
        .then_some(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_told_from_the_rest() {
        let bad = "4,1234,5678,-;WARNING: CPU: 0 PID: 1 at mm/memory.c:1\n SUBSYSTEM=x\n";
        assert_eq!(
            complaint(bad),
            Some("WARNING: CPU: 0 PID: 1 at mm/memory.c:1")
        );
        assert_eq!(complaint("6,1,2,-;virtio_hmm: 64 MiB\n BUG: no\n"), None);
        assert_eq!(complaint("not a record"), None);
        assert!(complaint("3,1,2,-;INFO: task x blocked for more than 120 seconds.").is_some());
    }
}
