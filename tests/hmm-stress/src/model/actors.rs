//! Processes that carry out the steps of a script, one at a time.
//!
//! This process tells each actor by a pipe what to do, and hears from all of them by
//! another; it is the parent of them all. An actor that forks copies its model with its
//! memory, and so each knows by itself what its memory must be.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::generate::read_all;
use super::memory::Memory;
use super::operation::{Operation, PROCESSES, Step};
use crate::context::Context;
use crate::failure::Failure;
use crate::process::pipe;
use crate::require;
use crate::shared::counts;

/// How long a step may take.
const STEP_DEADLINE: Duration = Duration::from_secs(60);

/// How often to look whether the actor still lives, in milliseconds.
const LOOK_EVERY: libc::c_int = 50;

/// Longest line that a pipe takes and gives whole.
const LONGEST_LINE: usize = libc::PIPE_BUF;

/// What a script failed with.
#[derive(Debug)]
pub(super) struct Found {
    /// The index of the step at which it failed, and the step; past the script's own ones
    /// for the comparisons at the end, and without one for what is left over.
    pub(super) index: usize,
    pub(super) step: Option<Step>,
    pub(super) failure: Failure,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.step {
            Some(step) => write!(f, "step {} ({step}): ", self.index + 1)?,
            None => write!(f, "without a step: ")?,
        }
        write!(f, "{}", self.failure.describe())
    }
}

/// Run a script, and let every process that lives at its end compare all its memory.
/// Steps of processes that do not live are left out. Without a device nothing migrates.
///
/// # Errors
/// The first step that fails, or that leaves memory other than it must be; or device
/// memory is not all free afterwards.
pub(super) fn run(context: Option<&Context>, script: &[Step]) -> Result<(), Found> {
    let other = |failure| Found {
        index: script.len(),
        step: None,
        failure,
    };
    let free = context.map(Context::free).transpose().map_err(other)?;
    let mut actors = Actors::start(context).map_err(other)?;
    let last: Vec<Step> = (0..PROCESSES).map(read_all).collect();
    for (index, step) in script.iter().chain(&last).enumerate() {
        actors.perform(step).map_err(|failure| Found {
            index,
            step: Some(step.clone()),
            failure,
        })?;
    }
    drop(actors);
    match (context, free) {
        (Some(context), Some(free)) => context.wait_free(free).map_err(other),
        _ => Ok(()),
    }
}

/// The processes; those that live are killed when this is dropped.
struct Actors {
    pids: [Option<libc::pid_t>; PROCESSES],
    commands: Vec<File>,
    replies: File,
}

impl Actors {
    /// Start process 0.
    fn start(context: Option<&Context>) -> Result<Self, Failure> {
        // Children inherit both ends of all pipes: whatever number a process gets, its
        // pipe is there.
        let mut listeners = Vec::new();
        let mut commands = Vec::new();
        for _ in 0..PROCESSES {
            let (read, write) = pipe()?;
            listeners.push(read);
            commands.push(write);
        }
        let (replies, reply) = pipe()?;
        let mut actors = Self {
            pids: [None; PROCESSES],
            commands,
            replies,
        };
        // SAFETY: the child runs only code of this crate, ends with _exit, and needs no
        // lock but the allocator's, which the C library makes usable after fork.
        match unsafe { libc::fork() } {
            -1 => return Err(Failure::system("fork")),
            0 => {
                let mut actor = Actor {
                    number: 0,
                    listeners,
                    reply,
                };
                actor.live(context)
            }
            pid => actors.pids[0] = Some(pid),
        }
        actors.hear(0)?;
        Ok(actors)
    }

    fn perform(&mut self, step: &Step) -> Result<(), Failure> {
        if self.pids[step.process].is_none() {
            return Ok(());
        }
        match step.operation {
            Operation::Fork(child) if self.pids[child].is_some() => return Ok(()),
            Operation::Exit => {
                self.tell(step)?;
                return self.bury(step.process);
            }
            _ => self.tell(step)?,
        }
        let reply = self.hear(step.process)?;
        if let Operation::Fork(child) = step.operation {
            self.pids[child] = reply.parse().ok();
        }
        Ok(())
    }

    fn tell(&mut self, step: &Step) -> Result<(), Failure> {
        let line = format!("{step}\n");
        self.commands[step.process]
            .write_all(line.as_bytes())
            .map_err(pipe_failure)
    }

    /// Wait until `process` has done a step, and return what it says.
    fn hear(&mut self, process: usize) -> Result<String, Failure> {
        let end = Instant::now() + STEP_DEADLINE;
        loop {
            if readable(&self.replies)? {
                let reply = read_line(&mut self.replies)?;
                return match reply.strip_prefix("ok ") {
                    Some(reply) => Ok(reply.to_owned()),
                    None => Err(Failure::Broken(reply)),
                };
            }
            if let Some(status) = self.reap(process, libc::WNOHANG)? {
                return Err(ended(status));
            }
            require!(Instant::now() < end, "not done after {STEP_DEADLINE:?}");
        }
    }

    /// Wait until `process` has ended.
    fn bury(&mut self, process: usize) -> Result<(), Failure> {
        match self.reap(process, 0)? {
            Some(status) if status != 0 => Err(ended(status)),
            _ => Ok(()),
        }
    }

    /// The status of `process`, if it has ended.
    fn reap(&mut self, process: usize, flags: libc::c_int) -> Result<Option<i32>, Failure> {
        let Some(pid) = self.pids[process] else {
            return Ok(None);
        };
        let mut status = 0;
        loop {
            // SAFETY: `status` lives for the call.
            match unsafe { libc::waitpid(pid, &raw mut status, flags) } {
                0 => return Ok(None),
                -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                -1 => return Err(Failure::system("waitpid")),
                _ => {
                    self.pids[process] = None;
                    return Ok(Some(status));
                }
            }
        }
    }
}

impl Drop for Actors {
    fn drop(&mut self) {
        for pid in self.pids.into_iter().flatten() {
            // SAFETY: the child was not reaped yet, so the pid is still its own.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        for process in 0..PROCESSES {
            // Nobody is left to tell of a failure.
            let _ = self.reap(process, 0);
        }
    }
}

fn ended(status: libc::c_int) -> Failure {
    Failure::Broken(if libc::WIFSIGNALED(status) {
        format!("ended by signal {}", libc::WTERMSIG(status))
    } else {
        format!("ended with status {}", libc::WEXITSTATUS(status))
    })
}

fn pipe_failure(source: io::Error) -> Failure {
    Failure::System {
        call: "a pipe",
        source,
    }
}

fn readable(file: &File) -> Result<bool, Failure> {
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: the one pollfd lives for the call.
    match unsafe { libc::poll(&raw mut poll, 1, LOOK_EVERY) } {
        -1 if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted => {
            Err(Failure::system("poll"))
        }
        // A pipe without writers is ready and has nothing to read.
        ready => Ok(ready > 0 && poll.revents & libc::POLLIN != 0),
    }
}

/// Read one line. Since everybody takes turns, no more than one is there.
fn read_line(file: &mut File) -> Result<String, Failure> {
    let mut line = [0; LONGEST_LINE];
    let length = file.read(&mut line).map_err(pipe_failure)?;
    Ok(String::from_utf8_lossy(&line[..length])
        .trim_end()
        .to_owned())
}

/// What an actor has beside its memory.
struct Actor {
    number: usize,
    listeners: Vec<File>,
    reply: File,
}

impl Actor {
    /// The life of process 0.
    fn live(&mut self, context: Option<&Context>) -> ! {
        let born = self.settle_in(context).and_then(|context| {
            let memory = Memory::new()?;
            Ok((context, memory))
        });
        match born {
            Ok((context, memory)) => {
                self.say(Ok(0));
                self.serve(context, memory)
            }
            Err(failure) => self.give_up(failure),
        }
    }

    /// Say why this process cannot live, and end.
    fn give_up(&mut self, failure: Failure) -> ! {
        self.say(Err(failure));
        exit()
    }

    /// End with the controlling process, and open the device: a file that was inherited
    /// acts on another's memory.
    fn settle_in(&self, context: Option<&Context>) -> Result<Option<Context>, Failure> {
        // SAFETY: the call only sets a property of this process.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        context.map(Context::reopen).transpose()
    }

    fn serve(&mut self, mut context: Option<Context>, mut memory: Memory) -> ! {
        loop {
            let line = read_line(&mut self.listeners[self.number]);
            let step = line.and_then(|line| line.parse().map_err(Failure::Broken));
            let result = step.and_then(|step: Step| match step.operation {
                Operation::Exit => exit(),
                Operation::Fork(child) => self.fork(child, &mut context),
                operation => {
                    let sigbus = || counts().sigbus.load(Ordering::Relaxed);
                    let before = sigbus();
                    let result = memory.perform(context.as_ref(), operation, step.pages);
                    require!(sigbus() == before, "SIGBUS");
                    result.map(|()| Some(0))
                }
            });
            match result {
                Ok(Some(pid)) => self.say(Ok(pid)),
                // The child speaks for its parent.
                Ok(None) => {}
                Err(failure) => self.say(Err(failure)),
            }
        }
    }

    /// Fork process `child`, a child of the controlling process. Return its pid in the
    /// child, and nothing in the parent.
    fn fork(
        &mut self,
        child: usize,
        context: &mut Option<Context>,
    ) -> Result<Option<libc::pid_t>, Failure> {
        // SAFETY: without CLONE_VM and a new stack this is fork with another parent. The
        // process has one thread, so no lock is held by another.
        let pid = unsafe {
            libc::syscall(
                libc::SYS_clone,
                libc::CLONE_PARENT | libc::SIGCHLD,
                ptr::null::<u8>(),
                ptr::null::<u8>(),
                ptr::null::<u8>(),
                ptr::null::<u8>(),
            )
        };
        match pid {
            -1 => Err(Failure::system("clone")),
            0 => {
                self.number = child;
                match self.settle_in(context.as_ref()) {
                    Ok(own) => *context = own,
                    Err(failure) => self.give_up(failure),
                }
                // SAFETY: the call has no arguments and cannot fail.
                Ok(Some(unsafe { libc::getpid() }))
            }
            _ => Ok(None),
        }
    }

    fn say(&mut self, result: Result<libc::pid_t, Failure>) {
        let line = match result {
            Ok(pid) => format!("ok {pid}\n"),
            Err(failure) => format!("{}\n", failure.describe()),
        };
        // Nobody listens only when this process is about to be killed.
        let _ = self.reply.write_all(line.as_bytes());
    }
}

/// End without running the destructors of the process that this one was forked from.
fn exit() -> ! {
    // SAFETY: _exit may be called at any time.
    unsafe { libc::_exit(0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::generate::generate;
    use crate::model::operation::read_script;

    fn run_text(text: &str) -> Result<(), Found> {
        run(None, &read_script(text).unwrap())
    }

    #[test]
    fn ordinary_memory_is_as_the_model_says() {
        for seed in 1..=4 {
            let script = generate(seed, 600);
            run(None, &script).unwrap_or_else(|found| panic!("seed {seed}: {found}"));
        }
    }

    #[test]
    fn processes_come_and_go_and_steps_of_the_dead_are_left_out() {
        run_text(
            "0 write 0..9 1\n0 fork 1\n1 poke 3..4 2\n0 fork 1\n1 fork 2\n0 exit\n0 read 0..1\n\
             2 write 0..1 3\n1 exit\n2 fork 0\n0 read 0..9\n0 exit\n2 exit\n2 read 0..1",
        )
        .unwrap();
    }

    #[test]
    fn a_process_that_dies_is_told() {
        let mut actors = Actors::start(None).unwrap();
        // SAFETY: process 0 was not reaped yet, so the pid is still its own.
        unsafe { libc::kill(actors.pids[0].unwrap(), libc::SIGKILL) };
        let failure = actors.perform(&read_all(0)).unwrap_err();
        assert_eq!(failure.to_string(), "ended by signal 9");
    }
}
