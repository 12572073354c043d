//! What the end-to-end tests are written with: the tool as a user runs it, and
//! a device daemon of the test's own.

pub mod cases;
pub mod ktap;
pub mod patch;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fs};

use hmm_vm::build::Programs;
use hmm_vm::daemon::{Counted, Counters, counted, counters};
use hmm_vm::error::with_sources;
use hmm_vm::process::shell_line;
use hmm_vm::testing::{KERNELS_VARIABLE, TOOL_VARIABLE};
use libtest_mimic::{Completion, Failed, Trial};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Why plain `cargo test` does not run a test.
pub const NEEDS_VM: &str = "boots a VM: cargo vm test";

/// Result of a test's step; the text says what went wrong.
pub type Result<T = (), E = Failure> = std::result::Result<T, E>;

/// No step of a test takes this long.
const PATIENCE: Duration = Duration::from_secs(180);
/// What a terminal shows once the tool has ended, if it is then as it was before.
const AS_BEFORE: &str = "the terminal is as before";

/// Why a test failed.
#[derive(Debug)]
pub struct Failure(pub String);

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(with_sources(&error))
    }
}

/// A test that boots a VM.
#[must_use]
pub fn trial(name: &str, body: impl FnOnce() -> Result + Send + 'static) -> Trial {
    Trial::test(name, move || {
        body().map_err(|Failure(text)| Failed::from(text))
    })
    .with_kind(NEEDS_VM)
    .with_ignored_flag(true)
}

/// A test that boots a VM, and says what is missing if it cannot run on this kernel.
#[must_use]
pub fn skippable_trial(
    name: &str,
    body: impl FnOnce() -> Result<Option<String>> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || match body() {
        Ok(None) => Ok(Completion::Completed),
        Ok(Some(missing)) => Ok(Completion::ignored_with(missing)),
        Err(Failure(text)) => Err(Failed::from(text)),
    })
    .with_kind(NEEDS_VM)
    .with_ignored_flag(true)
}

/// Whether `cargo vm test` has made this kernel.
#[must_use]
pub fn kernel_is_made(kernel: &str) -> bool {
    let made = env::var(KERNELS_VARIABLE).unwrap_or_default();
    made.split(' ').any(|name| name == kernel)
}

/// Fails with a message unless the condition holds.
///
/// # Errors
/// The condition does not hold.
pub fn check(condition: bool, message: impl FnOnce() -> String) -> Result {
    if condition {
        Ok(())
    } else {
        Err(Failure(message()))
    }
}

/// Waits until `condition` holds.
///
/// # Errors
/// It does not within the time any step may take.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) -> Result {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        check(Instant::now() < deadline, || {
            format!("never happened: {what}")
        })?;
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// `cargo vm`, with a directory for its temporary files that the test can look into.
#[derive(Debug)]
pub struct Tool {
    command: Command,
    temporary: TempDir,
}

/// `cargo vm` with these arguments.
///
/// # Errors
/// The test was not started by `cargo vm test`.
pub fn vm(arguments: &[&str]) -> Result<Tool> {
    let tool = env::var_os(TOOL_VARIABLE)
        .ok_or_else(|| Failure("this boots a VM: run it with `cargo vm test`".into()))?;
    let temporary = tempfile::Builder::new().prefix("e2e").tempdir()?;
    let mut command = Command::new(tool);
    command
        .args(arguments)
        .env("TMPDIR", temporary.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Ok(Tool { command, temporary })
}

impl Tool {
    /// Adds arguments.
    #[must_use]
    pub fn with<S: AsRef<std::ffi::OsStr>>(
        mut self,
        arguments: impl IntoIterator<Item = S>,
    ) -> Self {
        self.command.args(arguments);
        self
    }

    /// Runs it to its end, with these bytes on its standard input.
    ///
    /// # Errors
    /// It cannot be started, or does not end.
    pub fn finish_with_input(mut self, input: &[u8]) -> Result<Finished> {
        self.command.stdin(Stdio::piped());
        let mut running = self.launch()?;
        running.say(input)?;
        running.finish()
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// It cannot be started, or does not end.
    pub fn finish(self) -> Result<Finished> {
        self.launch()?.finish()
    }

    /// Runs it to its end, which may take as long as this.
    ///
    /// # Errors
    /// It cannot be started, or does not end.
    pub fn finish_within(self, patience: Duration) -> Result<Finished> {
        self.launch()?.finish_within(patience)
    }

    /// Starts it; its standard input stays open if `finish_with_input` or `listening` opened it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch(mut self) -> Result<Running> {
        let mut child = self.command.spawn()?;
        let stderr = child
            .stderr
            .take()
            .ok_or_else(|| Failure("no stderr".into()))?;
        let stdout = child
            .stdout
            .take()
            .ok_or_else(|| Failure("no stdout".into()))?;
        Ok(Running {
            stderr: Some(thread::spawn(move || read_all(stderr))),
            stdout: BufReader::new(stdout),
            child,
            temporary: self.temporary,
        })
    }

    /// Runs it where each of these directories is a disk of its own that is soon full, and holds
    /// an old `report.json`; status 99 says that this did not stay. Where this user may not mount
    /// anything, the reason why.
    ///
    /// # Errors
    /// There is no `unshare`.
    pub fn on_full_disks(mut self, directories: &[&Path]) -> Result<Result<Self, String>> {
        const SCRIPT: &str = r#"
            reports=
            while [ "$1" != -- ]; do
                mount -t tmpfs -o size=24k tmpfs "$1" && echo old > "$1/report.json" || exit 77
                reports="$reports $1/report.json"
                shift
            done
            shift
            "$@"
            status=$?
            for report in $reports; do [ "$(cat "$report")" = old ] || exit 99; done
            exit $status"#;
        let mut unshare = vec!["--mount"];
        if !rustix::process::geteuid().is_root() {
            unshare.extend(["--user", "--map-root-user"]);
        }
        let may_mount = Command::new("unshare")
            .args(&unshare)
            .args(["sh", "-c", SCRIPT, "sh"])
            .args(directories)
            .args(["--", "true"])
            .output()?;
        if !may_mount.status.success() {
            let reason = String::from_utf8_lossy(&may_mount.stderr);
            return Ok(Err(format!("nothing can be mounted: {}", reason.trim())));
        }
        let mut command = Command::new("unshare");
        command
            .args(&unshare)
            .args(["sh", "-c", SCRIPT, "sh"])
            .args(directories)
            .arg("--")
            .arg(self.command.get_program())
            .args(self.command.get_args())
            .env("TMPDIR", self.temporary.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        self.command = command;
        Ok(Ok(self))
    }

    /// Starts it on a terminal.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn on_a_terminal(self) -> Result<Terminal> {
        let script = format!(
            "trap : INT; stty rows 24 columns 80; before=$(stty -g); {}; status=$?
            [ \"$(stty -g)\" != \"$before\" ] || echo {AS_BEFORE}; exit $status",
            shell_line(&self.command)
        );
        let mut child = Command::new("script")
            .args(["--quiet", "--return", "--command", &script, "/dev/null"])
            .env("SHELL", "/bin/sh")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take();
        let mut stdout = stdout.ok_or_else(|| Failure("no stdout".into()))?;
        let (to_test, written) = mpsc::channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = stdout.read(&mut bytes)
                && to_test
                    .send(bytes.get(..count).unwrap_or_default().to_vec())
                    .is_ok()
            {}
        });
        Ok(Terminal {
            child,
            written,
            screen: vt100::Parser::default(),
        })
    }

    /// Keeps its standard input open for [`Running::say`].
    #[must_use]
    pub fn listening(mut self) -> Self {
        self.command.stdin(Stdio::piped());
        self
    }
}

/// `cargo vm` on a terminal of its own, which script(1), of util-linux, makes.
pub struct Terminal {
    child: Child,
    written: Receiver<Vec<u8>>,
    screen: vt100::Parser,
}

impl Terminal {
    /// Waits until what is on the screen is as wanted.
    ///
    /// # Errors
    /// It is not within the time any step may take.
    pub fn wait_for(&mut self, wanted: impl Fn(&vt100::Screen) -> bool) -> Result {
        while !wanted(self.screen.screen()) {
            let bytes = self.written.recv_timeout(PATIENCE).map_err(|error| {
                let shown = self.screen.screen().contents();
                Failure(format!("{error}, and the screen shows\n{shown}"))
            })?;
            self.screen.process(&bytes);
        }
        Ok(())
    }

    /// Waits until this is on the screen.
    ///
    /// # Errors
    /// It is not within the time any step may take.
    pub fn shows(&mut self, text: &str) -> Result {
        self.wait_for(|screen| screen.contents().contains(text))
    }

    /// Types these keys.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn press(&mut self, keys: &str) -> Result {
        let stdin = self.child.stdin.as_mut();
        let stdin = stdin.ok_or_else(|| Failure("no terminal".into()))?;
        Ok(stdin.write_all(keys.as_bytes())?)
    }

    /// Kills a process that the tool has started.
    ///
    /// # Errors
    /// There is none whose command line has this in it.
    pub fn kill(&self, name: &str) -> Result {
        let tools = children(self.child.id()).into_iter().flat_map(children);
        Ok(kill_process(
            find(tools.flat_map(children), name)?,
            Signal::KILL,
        )?)
    }

    /// Waits for the tool's end, after which the terminal has to be as it was before.
    ///
    /// # Errors
    /// It is not, or the exit status is another one.
    pub fn end(mut self, status: i32) -> Result {
        self.shows(AS_BEFORE)?;
        self.wait_for(|screen| !screen.alternate_screen() && !screen.hide_cursor())?;
        let end = self.child.wait()?.code();
        check(end == Some(status), || format!("exit status {end:?}"))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // script(1) then hangs up on the tool.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Options that bring programs of this workspace into the guest.
///
/// # Errors
/// They cannot be built.
pub fn programs(names: &[&str]) -> Result<Vec<PathBuf>> {
    let programs = Programs::locate()?;
    programs.build_packages(names)?;
    let options = names
        .iter()
        .flat_map(|name| ["--with".into(), programs.path(name)]);
    Ok(options.collect())
}

fn read_all(mut from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).map(|_| bytes)
}

/// `cargo vm` while it runs.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
    stderr: Option<thread::JoinHandle<io::Result<Vec<u8>>>>,
    temporary: TempDir,
}

impl Running {
    /// Waits for the guest to print this line.
    ///
    /// # Errors
    /// Its output ends without it.
    pub fn wait_for_line(&mut self, wanted: &str) -> Result {
        let mut line = String::new();
        while line.trim_end() != wanted {
            line.clear();
            if self.stdout.read_line(&mut line)? == 0 {
                let error = self.stderr_text();
                return Err(Failure(format!("the guest never said {wanted:?}: {error}")));
            }
        }
        Ok(())
    }

    /// Writes a line to its standard input, and returns the next line of its output.
    ///
    /// # Errors
    /// It reads no more, or its output ends.
    pub fn ask(&mut self, question: &str) -> Result<String> {
        let stdin = self.child.stdin.as_mut();
        stdin
            .ok_or_else(|| Failure("standard input is closed".into()))?
            .write_all(format!("{question}\n").as_bytes())?;
        let mut answer = String::new();
        if self.stdout.read_line(&mut answer)? == 0 {
            let error = self.stderr_text();
            return Err(Failure(format!("no answer to {question:?}: {error}")));
        }
        Ok(answer.trim_end().to_owned())
    }

    /// Writes to its standard input, which then ends.
    ///
    /// # Errors
    /// It reads no more.
    pub fn say(&mut self, input: &[u8]) -> Result {
        let stdin = self.child.stdin.take();
        stdin
            .ok_or_else(|| Failure("standard input is closed".into()))?
            .write_all(input)?;
        Ok(())
    }

    /// The process whose command line has this in it, among those that it started.
    ///
    /// # Errors
    /// There is none.
    pub fn child(&self, name: &str) -> Result<Pid> {
        find(children(self.child.id()), name)
    }

    /// Sends a signal to one of its processes.
    ///
    /// # Errors
    /// There is no such process.
    pub fn kill(&self, name: &str, signal: Signal) -> Result {
        Ok(kill_process(self.child(name)?, signal)?)
    }

    /// Sends a signal to the tool itself.
    ///
    /// # Errors
    /// It is gone.
    pub fn signal(&self, signal: Signal) -> Result {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        Ok(kill_process(
            pid.ok_or_else(|| Failure("no process".into()))?,
            signal,
        )?)
    }

    /// The control sockets of its devices.
    ///
    /// # Errors
    /// The directory of its temporary files cannot be read.
    pub fn controls(&self) -> Result<Vec<PathBuf>> {
        Ok(fs::read_dir(self.temporary.path())?
            .flatten()
            .map(|entry| entry.path().join("control"))
            .filter(|control| control.exists())
            .collect())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It does not end; it is killed then.
    pub fn finish(self) -> Result<Finished> {
        self.finish_within(PATIENCE)
    }

    fn finish_within(mut self, patience: Duration) -> Result<Finished> {
        let mut stdout = self.stdout;
        let reader = thread::spawn(move || read_all(&mut stdout));
        let deadline = Instant::now() + patience;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                self.child.kill()?;
                return Err(Failure("cargo vm does not end".into()));
            }
            thread::sleep(Duration::from_millis(10));
        };
        let join = |thread: thread::JoinHandle<io::Result<Vec<u8>>>| {
            thread
                .join()
                .map_err(|_| Failure("a reader ended early".into()))
        };
        let stderr = match self.stderr.take() {
            Some(thread) => join(thread)??,
            None => Vec::new(),
        };
        let left_over = fs::read_dir(self.temporary.path())?.count();
        Ok(Finished {
            output: Output {
                status,
                stdout: join(reader)??,
                stderr,
            },
            left_over,
        })
    }

    fn stderr_text(&mut self) -> String {
        let bytes = self
            .stderr
            .take()
            .and_then(|thread| thread.join().ok()?.ok());
        String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned()
    }
}

/// The process whose command line has this in it.
fn find(processes: impl IntoIterator<Item = Pid>, name: &str) -> Result<Pid> {
    let is_named = |pid: &Pid| {
        let path = format!("/proc/{pid}/cmdline");
        fs::read(path).is_ok_and(|line| String::from_utf8_lossy(&line).contains(name))
    };
    let mut processes = processes.into_iter();
    let found = processes.find(is_named);
    found.ok_or_else(|| Failure(format!("no process {name} runs")))
}

/// The processes that process `parent` has started.
#[must_use]
pub fn children(parent: impl std::fmt::Display) -> Vec<Pid> {
    let tasks = fs::read_dir(format!("/proc/{parent}/task"))
        .into_iter()
        .flatten()
        .flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| {
            let pids = list
                .split_whitespace()
                .filter_map(|pid| Pid::from_raw(pid.parse().ok()?));
            pids.collect::<Vec<_>>()
        })
        .collect()
}

/// `cargo vm` after its end.
#[derive(Debug)]
pub struct Finished {
    output: Output,
    /// Temporary files that it left behind.
    pub left_over: usize,
}

impl Finished {
    /// Its exit status; -1 if a signal ended it.
    #[must_use]
    pub fn status(&self) -> i32 {
        self.output.status.code().unwrap_or(-1)
    }

    /// What it wrote to standard output.
    #[must_use]
    pub fn stdout(&self) -> &[u8] {
        &self.output.stdout
    }

    /// What it wrote to standard output, as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned()
    }

    /// What it wrote to standard error.
    #[must_use]
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }

    /// The guest's kernel log, of a run that failed.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn console(&self) -> Result<String> {
        let errors = self.errors();
        let path = errors
            .split_once("(all of it: ")
            .and_then(|(_, rest)| rest.split_once(')'));
        let (path, _) = path.ok_or_else(|| Failure(format!("no log in {errors}")))?;
        Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())
    }

    /// Checks its exit status.
    ///
    /// # Errors
    /// It is another one; the message holds what it wrote.
    pub fn expect_status(&self, wanted: i32) -> Result {
        check(self.status() == wanted, || {
            let (status, out, errors) = (self.status(), self.text(), self.errors());
            format!("exit status {status}, not {wanted}\n--- stdout\n{out}\n--- stderr\n{errors}")
        })
    }

    /// Checks that standard error has this text in it.
    ///
    /// # Errors
    /// It does not.
    pub fn expect_error(&self, wanted: &str) -> Result {
        check(self.errors().contains(wanted), || {
            format!("no {wanted:?} in standard error:\n{}", self.errors())
        })
    }
}

/// A device daemon of the test's own, which serves one machine after another.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    directory: TempDir,
}

impl Daemon {
    /// Starts it and waits until it listens.
    ///
    /// # Errors
    /// It does not start.
    pub fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    /// Starts it with further options.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_with(options: &[&str]) -> Result<Self> {
        Self::start_sized(&Programs::locate()?.daemon(), "256M", options)
    }

    /// Starts this program in its place.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_program(program: &Path) -> Result<Self> {
        Self::start_sized(program, "256M", &[])
    }

    /// Starts it with little memory, and further options.
    ///
    /// # Errors
    /// It does not start.
    pub fn small(options: &[&str]) -> Result<Self> {
        Self::start_sized(&Programs::locate()?.daemon(), "16M", options)
    }

    fn start_sized(program: &Path, memory: &str, options: &[&str]) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("e2e").tempdir()?;
        let child = Command::new(program)
            .arg("--socket-path")
            .arg(directory.path().join("device"))
            .arg("--control-socket")
            .arg(directory.path().join("control"))
            .arg("--memory-size")
            .arg(memory)
            .arg("--copy-queues=2")
            .args(options)
            .stdin(Stdio::null())
            .stderr(fs::File::create(directory.path().join("log"))?)
            .spawn()?;
        let daemon = Self { child, directory };
        wait_until("the daemon listens", || daemon.control().exists())?;
        Ok(daemon)
    }

    fn control(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    /// The options that connect a machine to it.
    #[must_use]
    pub fn options(&self) -> Vec<String> {
        let device = self.directory.path().join("device");
        vec![
            "--device-socket".into(),
            device.display().to_string(),
            "--control-socket".into(),
            self.control().display().to_string(),
        ]
    }

    /// Its counters.
    ///
    /// # Errors
    /// It does not answer.
    pub fn counters(&self) -> Result<Counters> {
        Ok(counters(&self.control())?)
    }

    /// All that it tells of what it counted.
    ///
    /// # Errors
    /// It does not answer.
    pub fn counted(&self) -> Result<Counted> {
        Ok(counted(&self.control())?)
    }

    /// Sends a request to its control socket and returns the reply.
    ///
    /// # Errors
    /// It does not answer, or with an error.
    pub fn ask(&self, request: &serde_json::Value) -> Result<serde_json::Value> {
        ask(&self.control(), request)
    }

    /// What it wrote to its log.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.directory.path().join("log"))?)
    }

    /// Whether device memory holds these bytes anywhere.
    ///
    /// # Errors
    /// The memory cannot be read.
    pub fn memory_holds(&self, wanted: &[u8]) -> Result<bool> {
        let memory = device_memory(self.child.id())?;
        holds(&memory, wanted)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a request to a daemon's control socket and returns the reply.
///
/// # Errors
/// It does not answer, or with an error.
pub fn ask(control: &Path, request: &serde_json::Value) -> Result<serde_json::Value> {
    let mut stream = UnixStream::connect(control)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{request}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let reply: serde_json::Value = serde_json::from_str(&line)?;
    check(reply.get("error").is_none(), || line)?;
    Ok(reply)
}

/// The file that is the device memory of a daemon.
///
/// # Errors
/// This process has none.
pub fn device_memory(process: u32) -> Result<PathBuf> {
    fs::read_dir(format!("/proc/{process}/fd"))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| {
            let target = fs::read_link(path).unwrap_or_default();
            target.to_string_lossy().contains("memfd:hmm-device-memory")
        })
        .ok_or_else(|| Failure(format!("process {process} has no device memory")))
}

/// Whether a file has these bytes in it, at a multiple of their number.
fn holds(path: &Path, wanted: &[u8]) -> Result<bool> {
    let mut file = fs::File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(false),
            count => {
                let data = buffer.get(..count).unwrap_or_default();
                if data.chunks_exact(wanted.len()).any(|chunk| chunk == wanted) {
                    return Ok(true);
                }
            }
        }
    }
}
