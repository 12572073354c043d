//! Child processes that do not outlive the tool.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

use crate::error::{Error, Result};

/// Has the kernel send `signal` to the child when the tool dies, however it dies.
pub(crate) fn die_with_parent(command: &mut Command, signal: Signal) -> &mut Command {
    // SAFETY: the closure runs between fork and exec and makes one system
    // call, which is async-signal-safe; it neither allocates nor locks.
    unsafe { command.pre_exec(move || Ok(set_parent_process_death_signal(Some(signal))?)) }
}

/// Runs a command to its end and returns what it wrote to standard output.
///
/// # Errors
/// It cannot be started or fails; the error holds the end of its output.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    let output = run(command)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = [output.stdout, output.stderr].concat();
    Err(Error::Command {
        program: name(command),
        status: output.status,
        output: tail(&String::from_utf8_lossy(&text), 30),
    })
}

/// Runs a command to its end, whatever that is.
///
/// # Errors
/// It cannot be started.
pub(crate) fn run(command: &mut Command) -> Result<Output> {
    let program = name(command);
    die_with_parent(command, Signal::KILL)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::Start { program, source })
}

/// The name of a command's program, for messages.
pub(crate) fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

/// The last lines of a text.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.trim_end().lines().collect();
    all.get(all.len().saturating_sub(lines)..)
        .unwrap_or_default()
        .join("\n")
}

/// "exited with status 1", "was killed by signal 9".
pub(crate) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// The command as one could type it into a shell.
#[must_use]
pub fn shell_line(command: &Command) -> String {
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| shell_word(&word.to_string_lossy()))
        .collect();
    words.join(" ")
}

/// A word as one could type it into a shell.
#[must_use]
pub fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+,./:@%".contains(c);
    if word.chars().all(plain) && !word.is_empty() {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// A child that is asked to end, and then made to, when it is dropped.
#[derive(Debug)]
pub(crate) struct Guarded {
    child: Child,
    patience: Duration,
}

impl Guarded {
    /// Starts a command in a process group of its own, so that a Ctrl-C on the
    /// terminal reaches the tool alone. On drop it gets SIGTERM, and SIGKILL
    /// after `patience`.
    pub(crate) fn start(
        command: &mut Command,
        on_parent_death: Signal,
        patience: Duration,
    ) -> Result<Self> {
        Self::start_in_foreground(command.process_group(0), on_parent_death, patience)
    }

    /// Starts a command that shares the tool's process group, and so its terminal.
    pub(crate) fn start_in_foreground(
        command: &mut Command,
        on_parent_death: Signal,
        patience: Duration,
    ) -> Result<Self> {
        let program = name(command);
        let child = die_with_parent(command, on_parent_death)
            .spawn()
            .map_err(|source| Error::Start { program, source })?;
        Ok(Self { child, patience })
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Sends it a signal, unless it has ended.
    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, signal);
        }
    }

    /// Ends it, unless it has ended, and says how it did.
    pub(crate) fn end(&mut self) -> Option<ExitStatus> {
        if self.ended().is_none() {
            self.signal(Signal::TERM);
            if !self.ends_within(self.patience) {
                let _ = self.child.kill();
                return self.child.wait().ok();
            }
        }
        self.ended()
    }

    fn ends_within(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while self.ended().is_none() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_shows_its_output() {
        let error = capture(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]));
        let text = error.unwrap_err().to_string();
        assert!(text.contains("out\nerr") && text.contains('3'), "{text}");
    }

    #[test]
    fn a_line_can_be_pasted_into_a_shell() {
        let mut command = Command::new("printf");
        command.args(["%s|", "it's", "", "a b", "x=1,y"]);
        let output = Command::new("sh")
            .args(["-c", &shell_line(&command)])
            .output()
            .unwrap();
        assert_eq!(output.stdout, b"it's||a b|x=1,y|");
    }

    #[test]
    fn a_child_that_ignores_sigterm_is_killed() {
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' TERM; echo; while :; do sleep 0.05; done"]);
        command.stdout(Stdio::piped());
        let mut guarded =
            Guarded::start(&mut command, Signal::KILL, Duration::from_millis(50)).unwrap();
        let mut ready = [0];
        std::io::Read::read_exact(guarded.child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let pid = guarded.child.id();
        drop(guarded);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
}
