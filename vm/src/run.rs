//! One run: the daemon, the machine, and what the guest says, to an end.

use std::fs;
use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use hmm_init::{Bytes, Event, Input, Stream, receive, send};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::Signal;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::actions::{Host, lock};
use crate::console::Follower;
use crate::daemon::Sockets;
use crate::devices::Devices;
use crate::error::{Error, FileContext, Result};
use crate::machine::{Machine, RunFiles};
use crate::process::{Guarded, describe, tail};
use crate::reconcile::{self, Guest};
use crate::report::Report;
use crate::sampler::Sampler;
use crate::terminal;
use crate::view::View;

/// How long a guest whose command has ended may take to power off.
const POWER_OFF: Duration = Duration::from_secs(30);
/// How often the console, the children and the signals are looked at.
const GLANCE: Duration = Duration::from_millis(20);
/// How long the kernel may go on after its first complaint, so that the log holds the rest of it.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Where the device of a run is.
#[derive(Clone, Debug)]
pub enum DeviceAt {
    /// No device at all.
    Nowhere,
    /// In daemons that the run starts and ends, as many as the profile says.
    Own(PathBuf),
    /// In a daemon of the user's, which goes on afterwards.
    Others(Sockets),
}

/// Limits of a run.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For the whole run.
    pub total: Option<Duration>,
    /// Without a sign of life from the guest.
    pub silence: Duration,
    /// Whether the run goes on when the daemon dies.
    pub device_may_die: bool,
}

/// How the guest's command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With this status.
    Status(i32),
    /// By this signal.
    Signal(i32),
}

impl End {
    /// As a shell has it: the status, or 128 and the signal.
    #[must_use]
    pub fn exit_status(self) -> u8 {
        let status = match self {
            Self::Status(status) => status,
            Self::Signal(signal) => 128 + signal,
        };
        u8::try_from(status & 0xff).unwrap_or(u8::MAX)
    }
}

/// A run that came to its end.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The command's end.
    pub end: End,
    /// The guest's kernel.
    pub kernel: String,
    /// From QEMU's start to the guest's first line.
    pub boot: Duration,
    /// What both sides of each device have counted, once the guest has gone.
    pub devices: Vec<reconcile::Device>,
    /// Whether the driver could be unloaded, if it was to be.
    pub unloaded: bool,
}

/// What a run is made of.
#[derive(Debug)]
pub struct Run<'a> {
    /// The machine; its `devices` are filled in from `device` here.
    pub machine: Machine<'a>,
    /// The device.
    pub device: DeviceAt,
    /// Limits.
    pub limits: Limits,
    /// Directory of the logs, which stay.
    pub logs: &'a Path,
    /// Whether the command reads this process's standard input.
    pub forward_input: bool,
    /// `hmm-top`, if it is to have the terminal once the guest is up.
    pub top: Option<PathBuf>,
    /// What watches the devices.
    pub sampler: Option<&'a Sampler>,
}

/// A directory for sockets, short enough for their names, removed on drop.
///
/// # Errors
/// It cannot be made.
pub fn scratch_directory() -> Result<tempfile::TempDir> {
    let parent = std::env::temp_dir();
    tempfile::Builder::new()
        .prefix("virtio-hmm-")
        .tempdir_in(&parent)
        .at("write", &parent)
}

/// Names the files of a run in its scratch and log directories.
#[must_use]
pub fn run_files(scratch: &Path, logs: &Path) -> RunFiles {
    RunFiles {
        initramfs: scratch.join("initramfs"),
        results: scratch.join("results"),
        terminal: scratch.join("console"),
        monitor: scratch.join("monitor"),
        actions: scratch.join("actions"),
        gdb: scratch.join("gdb"),
        disk: scratch.join("disk"),
        console_log: logs.join("console.log"),
    }
}

impl Run<'_> {
    /// Starts everything, hands the command's output to `output`, and ends everything.
    ///
    /// # Errors
    /// Anything but the command's own end.
    pub fn go(
        mut self,
        scratch: &Path,
        output: &mut dyn FnMut(Stream, &[u8]) -> io::Result<()>,
    ) -> Result<Finished> {
        let signals = Signals::register()?;
        let mut files = run_files(scratch, self.logs);
        let disk = self.machine.profile.disk;
        let disk = disk.map(|size| in_ram("disk", size.0)).transpose()?;
        if let Some(disk) = &disk {
            files.disk = path_of(disk);
        }
        // On a full disk QEMU would lose what the kernel complains of.
        let console = in_ram("console", 0)?;
        let log = fs::File::create(&files.console_log).at("write", &files.console_log)?;
        files.console_log = path_of(&console);
        let bind = |socket: &Path| UnixListener::bind(socket).at("listen on", socket);
        let results = bind(&files.results)?;
        let settings = self.machine.profile.device.clone();
        let devices = Devices::start(&self.device, &settings, scratch, self.logs)?;
        self.machine.devices = devices.sockets();
        let control = devices.control_sockets();
        let devices = Arc::new(Mutex::new(devices));
        let sampling = self.sampler.map(|sampler| sampler.start(&control));
        let top = self.top.take().map(|program| (program, control));
        let host = Host {
            monitor: bind(&files.monitor)?,
            port: bind(&files.actions)?,
            devices: Arc::downgrade(&devices),
            settings,
        };

        let qemu_log = self.logs.join("qemu.log");
        let mut command = self.machine.command(&files);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&qemu_log).at("create", &qemu_log)?);
        let interactive = self.machine.interactive;
        let terminal = interactive.then(|| bind(&files.terminal)).transpose()?;
        let started = Instant::now();
        let mut qemu = Guarded::start(&mut command, Signal::KILL, Duration::from_secs(2))?;
        if self.machine.gdb {
            eprintln!(
                "virtio-hmm: the machine waits for a debugger: gdb -ex 'target remote {}'",
                files.gdb.display()
            );
        }
        let (to_self, guest) = mpsc::channel();
        let forward_input = self.forward_input;
        thread::spawn(move || read_guest(&results, forward_input, &to_self));
        host.start();
        let terminal = terminal.map(terminal::Session::start).transpose()?;

        let mut watch = Watch {
            limits: self.limits,
            started,
            heard: started,
            console: Follower::new(console, log),
            signals,
            guest,
            counted: Guest::default(),
            top,
            view: None,
        };
        let finished = watch.follow(&mut qemu, &devices, &qemu_log, terminal.as_ref(), output);
        drop(terminal);
        drop(watch.view.take());
        drop(qemu);
        drop(disk);
        drop(sampling);
        let mut finished = finished?;
        finished.devices = reconcile::devices(&watch.counted, &lock(&devices).counts()?);
        Ok(finished)
    }
}

/// A file of zeros in RAM, which ends with this process at the latest.
fn in_ram(name: &str, length: u64) -> Result<fs::File> {
    let create = || {
        let name = format!("virtio-hmm-{name}");
        let file = fs::File::from(memfd_create(name, MemfdFlags::CLOEXEC)?);
        file.set_len(length).map(|()| file)
    };
    create().at("make a file in RAM for", name)
}

/// Where another process of this user finds a file that has no name.
fn path_of(file: &fs::File) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
}

/// The signals that end a run.
struct Signals {
    last: Arc<AtomicUsize>,
}

impl Signals {
    fn register() -> Result<Self> {
        let last = Arc::new(AtomicUsize::new(0));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            let number = usize::try_from(signal).unwrap_or_default();
            signal_hook::flag::register_usize(signal, Arc::clone(&last), number)
                .at("handle signals of", "this process")?;
        }
        Ok(Self { last })
    }

    fn check(&self) -> Result<()> {
        match i32::try_from(self.last.load(Ordering::Relaxed)) {
            Ok(0) => Ok(()),
            Ok(signal) => Err(Error::Interrupted(signal)),
            Err(_) => Err(Error::Interrupted(SIGTERM)),
        }
    }
}

struct Watch {
    limits: Limits,
    started: Instant,
    heard: Instant,
    console: Follower,
    signals: Signals,
    guest: Receiver<io::Result<Event>>,
    counted: Guest,
    /// What shows the devices behind these control sockets, until it does.
    top: Option<(PathBuf, Vec<PathBuf>)>,
    view: Option<View>,
}

impl Watch {
    fn follow(
        &mut self,
        qemu: &mut Guarded,
        devices: &Mutex<Devices>,
        qemu_log: &Path,
        terminal: Option<&terminal::Session>,
        output: &mut dyn FnMut(Stream, &[u8]) -> io::Result<()>,
    ) -> Result<Finished> {
        let mut kernel = String::new();
        let mut boot = Duration::ZERO;
        let mut end = None;
        let mut again = false;
        let mut unloaded = false;
        let mut complained = None;
        loop {
            // The guest's last words come before QEMU's end.
            let qemu_end = qemu.ended();
            let mut message = match qemu_end {
                None => self.guest.recv_timeout(GLANCE),
                Some(_) => self.guest.recv_timeout(Duration::from_secs(1)),
            };
            while let Ok(event) = message {
                self.heard = Instant::now();
                match event.map_err(Error::Protocol)? {
                    Event::Boot {
                        kernel: release, ..
                    } => {
                        again = !kernel.is_empty();
                        kernel = release;
                        boot = self.started.elapsed();
                        if let Some((program, control)) = self.top.take() {
                            self.view = Some(View::start(&program, &control)?);
                        }
                    }
                    Event::Driver | Event::Alive => {}
                    Event::Counters {
                        device,
                        counters,
                        fault_latency,
                    } => {
                        // The daemon has counted what another kernel's driver did as well.
                        if !again {
                            let added = self.counted.add(device, &counters, &fault_latency);
                            added.map_err(Error::Counters)?;
                        }
                    }
                    Event::Unloaded { error } => {
                        unloaded = error.is_none();
                        if let Some(error) = error {
                            Report.line(&format!("the driver cannot be unloaded: {error}"));
                        }
                    }
                    Event::Output {
                        stream,
                        data: Bytes(data),
                    } => {
                        output(stream, &data).at("write to", "standard output")?;
                    }
                    Event::Exit {
                        status: Some(status),
                        ..
                    } => end = Some(End::Status(status)),
                    Event::Exit { signal, .. } => end = Some(End::Signal(signal.unwrap_or(0))),
                    Event::Error { message } => return Err(Error::Init(message)),
                }
                message = self.guest.try_recv().map_err(|_| RecvTimeoutError::Timeout);
            }

            self.signals.check()?;
            if let Some(end) = self.view.as_mut().and_then(View::ended) {
                self.view = None;
                // A Ctrl-C on its screen is for the run.
                if end.code() == Some(128 + SIGINT) {
                    return Err(Error::Interrupted(SIGINT));
                }
            }
            let log = Path::new("the console's log");
            let (grown, complaint) = self.console.advance().at("read", log)?;
            if let Some(complaint) = complaint {
                complained.get_or_insert((complaint, Instant::now()));
            }
            // A person at the console sees it, and may want to look around.
            if let Some((complaint, since)) = &complained
                && (qemu_end.is_some() || terminal.is_none() && since.elapsed() > LAST_WORDS)
            {
                let complaint = complaint.clone();
                return Err(if kernel.is_empty() {
                    Error::Boot(complaint)
                } else {
                    Error::Kernel(complaint)
                });
            }
            if grown {
                self.heard = Instant::now();
            }
            if let Some(status) = qemu_end {
                return match end {
                    _ if !status.success() => Err(Error::QemuDied {
                        end: describe(status),
                        log: tail(&fs::read_to_string(qemu_log).unwrap_or_default(), 3),
                    }),
                    Some(end) => Ok(Finished {
                        end,
                        kernel,
                        boot,
                        devices: Vec::new(),
                        unloaded,
                    }),
                    None => Err(Error::PoweredOff),
                };
            }
            if terminal.is_some_and(terminal::Session::quit) {
                return Ok(Finished {
                    end: End::Status(0),
                    kernel,
                    boot,
                    devices: Vec::new(),
                    unloaded,
                });
            }
            if !self.limits.device_may_die
                && let Some(status) = lock(devices).died()
            {
                return Err(Error::DaemonDied(describe(status)));
            }
            self.check_time(end.is_some())?;
        }
    }

    fn check_time(&self, ended: bool) -> Result<()> {
        if let Some(total) = self.limits.total
            && self.started.elapsed() > total
        {
            return Err(Error::Timeout(total.as_secs()));
        }
        let silence = if ended {
            POWER_OFF
        } else {
            self.limits.silence
        };
        if self.heard.elapsed() > silence {
            return Err(Error::Silent(silence.as_secs()));
        }
        Ok(())
    }
}

fn read_guest(listener: &UnixListener, forward_input: bool, to_self: &Sender<io::Result<Event>>) {
    let stream = listener.accept().and_then(|(stream, _)| {
        let input = stream.try_clone()?;
        thread::spawn(move || write_input(input, forward_input));
        Ok(stream)
    });
    let mut guest = match stream {
        Ok(stream) => BufReader::new(stream),
        Err(error) => {
            let _ = to_self.send(Err(error));
            return;
        }
    };
    loop {
        let event: io::Result<Event> = match receive(&mut guest) {
            Ok(Some(event)) => Ok(event),
            // QEMU is gone; how is seen from its exit status.
            Ok(None) => return,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return,
            Err(error) => Err(error),
        };
        let last = matches!(event, Err(_) | Ok(Event::Exit { .. } | Event::Error { .. }));
        if to_self.send(event).is_err() || last {
            break;
        }
    }
    // The guest waits for this before it powers off.
    let _ = guest.get_ref().shutdown(Shutdown::Both);
}

/// Sends standard input to the guest; the guest's end of the socket going away ends it.
fn write_input(mut guest: UnixStream, forward: bool) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let count = if forward {
            io::stdin().lock().read(&mut buffer)
        } else {
            Ok(0)
        };
        let data = match count {
            Ok(count) => buffer.get(..count).unwrap_or_default().to_vec(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => Vec::new(),
        };
        let last = data.is_empty();
        if send(&mut guest, &Input { data: Bytes(data) }).is_err() || last {
            return;
        }
    }
}

/// Writes the command's output where this process's own goes.
///
/// # Errors
/// The stream cannot be written.
pub fn pass_on(stream: Stream, data: &[u8]) -> io::Result<()> {
    match stream {
        Stream::Stdout => {
            let mut out = io::stdout().lock();
            out.write_all(data)?;
            out.flush()
        }
        Stream::Stderr => io::stderr().lock().write_all(data),
    }
}
