//! `hmm-top` on the user's terminal, beside a running guest.

use std::fs::File;
use std::io::{self, IsTerminal, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use rustix::process::Signal;
use rustix::stdio::{dup2_stderr, dup2_stdout};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::error::{Error, FileContext, Result};
use crate::process::Guarded;

/// How long it may take to give the terminal back.
const PATIENCE: Duration = Duration::from_secs(2);
/// What does so in its place if it was killed: to the usual screen, and the cursor shows.
const GIVE_BACK: &[u8] = b"\x1b[?1049l\x1b[?25h";

/// Says whether there is a terminal for it.
///
/// # Errors
/// There is none.
pub fn check_terminal() -> Result<()> {
    if io::stdin().is_terminal() && io::stdout().is_terminal() {
        return Ok(());
    }
    let text = "--top needs a terminal as standard input and output";
    Err(Error::Config(text.into()))
}

/// `hmm-top`, which has the terminal until it ends or this is dropped. What is written to
/// standard output meanwhile comes once this is dropped.
#[derive(Debug)]
pub(crate) struct View {
    top: Guarded,
    before: Termios,
    held: Held,
}

impl View {
    /// Shows the devices behind these control sockets.
    pub(crate) fn start(program: &Path, control: &[PathBuf]) -> Result<Self> {
        let before = tcgetattr(io::stdin()).at("use", "the terminal")?;
        let held = Held::begin().at("hold back", "standard output")?;
        let terminal = held.stdout.try_clone().at("use", "the terminal")?;
        let mut command = Command::new(program);
        command.args(control).stdout(terminal);
        let top = Guarded::start_in_foreground(&mut command, Signal::TERM, PATIENCE)?;
        Ok(Self { top, before, held })
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.top.ended()
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // Nobody can be told of a terminal that is gone.
        if self.top.end().is_none_or(|end| end.code().is_none()) {
            let _ = self.held.stdout.write_all(GIVE_BACK);
        }
        // Keys that it has not read are not for the shell.
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.before);
    }
}

/// Standard output, and standard error if that is a terminal as well, are a file until this is
/// dropped; what is in it goes where they went before.
#[derive(Debug)]
struct Held {
    stdout: File,
    stderr: Option<OwnedFd>,
    file: File,
}

impl Held {
    fn begin() -> io::Result<Self> {
        io::stdout().flush()?;
        let stdout = io::stdout().as_fd().try_clone_to_owned()?.into();
        let stderr = io::stderr();
        let stderr = stderr
            .is_terminal()
            .then(|| stderr.as_fd().try_clone_to_owned());
        let held = Self {
            stdout,
            stderr: stderr.transpose()?,
            file: tempfile::tempfile()?,
        };
        dup2_stdout(&held.file)?;
        if held.stderr.is_some() {
            dup2_stderr(&held.file)?;
        }
        Ok(held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = io::stdout().flush();
        let _ = dup2_stdout(&self.stdout);
        if let Some(stderr) = &self.stderr {
            let _ = dup2_stderr(stderr);
        }
        let _ = self.file.rewind();
        let _ = io::copy(&mut self.file, &mut self.stdout);
    }
}
