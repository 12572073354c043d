//! Reads the guest's kernel log as it grows and finds what the kernel complains of.

use std::fs::File;
use std::io::{self, Read, Write};

use crate::report::Report;

/// Parts of kernel messages that mean the run is lost.
const COMPLAINTS: [&str; 19] = [
    "Kernel panic",
    "BUG:",
    "kernel BUG at",
    "WARNING:",
    "------------[ cut here ]",
    "Oops",
    "general protection fault",
    "KASAN:",
    "KFENCE:",
    "UBSAN:",
    "possible circular locking",
    "possible recursive locking",
    "inconsistent lock state",
    "suspicious RCU usage",
    "blocked for more than",
    "self-detected stall",
    "detected stalls on CPUs",
    "soft lockup",
    "hard LOCKUP",
];

/// What the kernel complains of in this line of the console, if it does.
///
/// Only lines with the kernel's time stamp count: what a program prints on the
/// console is its own affair.
#[must_use]
pub fn complaint(line: &str) -> Option<&str> {
    let message = kernel_message(line)?;
    COMPLAINTS
        .iter()
        .any(|sign| message.contains(sign))
        .then_some(message)
}

/// The text after `[   12.345678] `.
fn kernel_message(line: &str) -> Option<&str> {
    let (stamp, message) = line.trim_end().split_once('[')?.1.split_once("] ")?;
    let (seconds, micros) = stamp.trim_start().split_once('.')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    (digits(seconds) && digits(micros)).then_some(message)
}

/// Follows what another process writes to a file, and keeps a log of it.
#[derive(Debug)]
pub(crate) struct Follower {
    file: File,
    /// None once it could not be written.
    log: Option<File>,
    partial: Vec<u8>,
}

impl Follower {
    pub(crate) fn new(file: File, log: File) -> Self {
        Self {
            file,
            log: Some(log),
            partial: Vec::new(),
        }
    }

    /// Whether the file has grown since the last call, and the first complaint in it.
    pub(crate) fn advance(&mut self) -> io::Result<(bool, Option<String>)> {
        let seen = self.partial.len();
        let grown = self.file.read_to_end(&mut self.partial)? > 0;
        self.keep(seen);
        let Some(end) = self.partial.iter().rposition(|&byte| byte == b'\n') else {
            return Ok((grown, None));
        };
        let rest = self.partial.split_off(end + 1);
        let text = String::from_utf8_lossy(&self.partial).into_owned();
        self.partial = rest;
        Ok((
            grown,
            text.lines().find_map(complaint).map(ToOwned::to_owned),
        ))
    }

    /// Writes to the log what comes after the first `seen` bytes.
    fn keep(&mut self, seen: usize) {
        let new = self.partial.get(seen..).unwrap_or_default();
        let written = self.log.as_mut().map(|log| log.write_all(new));
        if let Some(Err(error)) = written {
            Report.line(&format!("the guest's log is not kept any more: {error}"));
            self.log = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use tempfile::NamedTempFile;

    /// A follower of a file, and its log.
    fn follow(file: &NamedTempFile) -> (Follower, NamedTempFile) {
        let log = NamedTempFile::new().unwrap();
        let follower = Follower::new(file.reopen().unwrap(), log.reopen().unwrap());
        (follower, log)
    }

    #[test]
    fn complaints_of_the_kernel_are_found() {
        for line in [
            "[    9.123456] Kernel panic - not syncing: sysrq triggered crash",
            "[   12.000001] WARNING: CPU: 1 PID: 77 at mm/migrate.c:1 foo+0x1/0x2",
            "[   12.000001] ------------[ cut here ]------------",
            "[  130.5] INFO: task hmm-stress:77 blocked for more than 30 seconds.",
            "[   60.111111] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [sh:9]",
            "[   60.1] rcu: INFO: rcu_preempt self-detected stall on CPU",
            "\r[   60.1] Oops: 0002 [#1] SMP\r",
            "noise without newline[    1.5] BUG: kernel NULL pointer dereference",
        ] {
            assert!(complaint(line).is_some(), "{line}");
        }
    }

    #[test]
    fn other_lines_are_not() {
        for line in [
            "[    0.000000] Linux version 7.3.4",
            "WARNING: printed by a program",
            "[1.2.3] BUG: a version number",
            "~ # echo '[x] BUG:'",
            "[] BUG:",
            "",
        ] {
            assert!(complaint(line).is_none(), "{line}");
        }
    }

    #[test]
    fn a_line_that_arrives_in_pieces_is_seen_once_it_is_whole() {
        let mut file = NamedTempFile::new().unwrap();
        let (mut follower, log) = follow(&file);
        assert_eq!(follower.advance().unwrap(), (false, None));
        write!(file, "[  1.0] fine\n[  1.1] BU").unwrap();
        assert_eq!(follower.advance().unwrap(), (true, None));
        writeln!(file, "G: scheduling while atomic").unwrap();
        let (grown, found) = follower.advance().unwrap();
        assert!(grown);
        assert_eq!(found.as_deref(), Some("BUG: scheduling while atomic"));
        assert_eq!(follower.advance().unwrap(), (false, None));
        let [all, kept] = [&file, &log].map(|file| std::fs::read(file.path()).unwrap());
        assert_eq!(all, kept);
    }

    #[test]
    fn a_full_disk_hides_no_complaint() {
        let mut file = NamedTempFile::new().unwrap();
        let (mut follower, _) = follow(&file);
        follower.log = Some(File::options().write(true).open("/dev/full").unwrap());
        for _ in 0..2 {
            writeln!(file, "[  1.1] BUG: scheduling while atomic").unwrap();
            assert!(follower.advance().unwrap().1.is_some());
        }
    }
}
