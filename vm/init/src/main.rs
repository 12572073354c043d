//! First program of the guest.

mod action;
mod counters;

use std::env;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use hmm_init::{
    ACTION_COMMAND, ALIVE_SECONDS, Bytes, Driver, Event, Input, ORDER_PATH, Order, PORT, Stream,
    Terminal, receive, send,
};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, WaitOptions};
use rustix::system::{RebootCommand, delete_module, finit_module, reboot};

use crate::counters::{Devices, end_processes};

/// How long output may be missing after the program's end before it counts
/// as complete: a child of the program may hold the pipe open for ever.
const LAST_OUTPUT: Duration = Duration::from_millis(300);
/// The user's files come first, those of Debian packages last.
const PATH: &str = "/root:/bin:/usr/bin:/usr/sbin";
const DEVICE_WAIT: Duration = Duration::from_secs(10);
/// The kernel's `MODULE_INIT_COMPRESSED_FILE`.
const COMPRESSED: i32 = 4;
/// How long the driver may take to be unloaded.
const UNLOAD: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot mount {0}")]
    Mount(&'static str, #[source] rustix::io::Errno),
    #[error("cannot read {0}")]
    Read(&'static str, #[source] io::Error),
    #[error("no virtio port named {0}")]
    NoPort(&'static str),
    #[error("cannot load {0}")]
    Load(String, #[source] io::Error),
    #[error("the driver is loaded but {0} does not appear")]
    NoDevice(String),
    #[error("cannot start {0}")]
    Start(String, #[source] io::Error),
    #[error("there is no command to run")]
    NoCommand,
    #[error("cannot wait for the command")]
    Wait(#[source] io::Error),
    #[error("the port to the host failed")]
    Port(#[source] io::Error),
}

fn main() -> ExitCode {
    let mut words = env::args();
    let name = words.next().unwrap_or_default();
    if Path::new(&name).file_name() == Some(ACTION_COMMAND.as_ref()) {
        return action::ask(&words.collect::<Vec<_>>());
    }
    if let Err(error) = guest() {
        // The console is the last way to the host.
        eprintln!("hmm-init: {}", with_sources(&error));
    }
    // Pages of the file systems are in memory only, there is nothing to sync.
    let _ = reboot(RebootCommand::PowerOff);
    ExitCode::FAILURE
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

fn guest() -> Result<(), Error> {
    for (kind, target) in [
        ("devtmpfs", "/dev"),
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("tmpfs", "/tmp"),
        ("debugfs", "/sys/kernel/debug"),
        ("tracefs", "/sys/kernel/tracing"),
    ] {
        mount(
            kind,
            target,
            kind,
            MountFlags::empty(),
            None::<&std::ffi::CStr>,
        )
        .map_err(|source| Error::Mount(target, source))?;
    }
    // The boot was quiet to be quick; from here on the host reads the log.
    let _ = fs::write("/proc/sys/kernel/printk", "8");

    let port = open_port(PORT)?;
    let mut to_host = port.try_clone().map_err(Error::Port)?;
    let (input, from_host) = mpsc::sync_channel(1);
    let (told, host_knows) = mpsc::channel::<()>();
    thread::spawn(move || {
        read_host(port, &input);
        drop(told);
    });
    if let Err(error) = session(&mut to_host, from_host) {
        let message = with_sources(&error);
        send(&mut to_host, &Event::Error { message }).map_err(Error::Port)?;
    }
    // What was written to the port may still be on its way: the host closes its
    // end when it has the last event.
    let _ = host_knows.recv_timeout(DEVICE_WAIT);
    Ok(())
}

fn session(to_host: &mut File, from_host: Receiver<Vec<u8>>) -> Result<(), Error> {
    let (events, queue) = mpsc::channel();
    let order: Order = serde_json::from_slice(
        &fs::read(ORDER_PATH).map_err(|source| Error::Read(ORDER_PATH, source))?,
    )
    .map_err(|source| Error::Read(ORDER_PATH, source.into()))?;

    send(to_host, &boot_event()?).map_err(Error::Port)?;
    for module in &order.modules {
        load(module, "")?;
    }
    if let Some(driver) = &order.driver {
        load_driver(driver)?;
        send(to_host, &Event::Driver).map_err(Error::Port)?;
    }
    let devices = Devices::now();

    let pid = match start(&order, from_host, &events) {
        Ok(child) => child.id(),
        // As a shell does: 127 for a program that is not there, 126 for one that cannot run.
        Err(Error::Start(program, source)) => {
            let status = if source.kind() == io::ErrorKind::NotFound {
                127
            } else {
                126
            };
            let data = Bytes(format!("hmm-init: {program}: {source}\n").into_bytes());
            send(
                to_host,
                &Event::Output {
                    stream: Stream::Stderr,
                    data,
                },
            )
            .map_err(Error::Port)?;
            return send(
                to_host,
                &Event::Exit {
                    status: Some(status),
                    signal: None,
                },
            )
            .map_err(Error::Port);
        }
        Err(error) => return Err(error),
    };
    thread::spawn(move || {
        let end = wait(pid).unwrap_or_else(|error| Event::Error {
            message: with_sources(&error),
        });
        let _ = events.send(end);
    });

    let mut end = None;
    let mut alive = Instant::now();
    loop {
        let patience = if end.is_some() {
            LAST_OUTPUT
        } else {
            Duration::from_secs(ALIVE_SECONDS)
        };
        match queue.recv_timeout(patience) {
            Ok(event @ Event::Output { .. }) => send(to_host, &event).map_err(Error::Port)?,
            Ok(event) => end = Some(event),
            Err(RecvTimeoutError::Timeout) if end.is_none() => {}
            Err(_) => break,
        }
        if alive.elapsed().as_secs() >= ALIVE_SECONDS {
            send(to_host, &Event::Alive).map_err(Error::Port)?;
            alive = Instant::now();
        }
    }
    if let Some(driver) = &order.driver {
        end_processes();
        for event in devices.counters() {
            send(to_host, &event).map_err(Error::Port)?;
        }
        if driver.unload {
            let error = unload(driver, to_host)?;
            send(to_host, &Event::Unloaded { error }).map_err(Error::Port)?;
        }
    }
    send(
        to_host,
        &end.unwrap_or(Event::Error {
            message: "the command is lost".into(),
        }),
    )
    .map_err(Error::Port)
}

fn boot_event() -> Result<Event, Error> {
    let uptime =
        fs::read_to_string("/proc/uptime").map_err(|source| Error::Read("/proc/uptime", source))?;
    // "4.52 3.10": seconds with two decimals.
    let centiseconds: u64 = uptime
        .split(' ')
        .next()
        .unwrap_or_default()
        .replace('.', "")
        .parse()
        .unwrap_or(0);
    Ok(Event::Boot {
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        uptime_ms: centiseconds * 10,
    })
}

fn open_port(wanted: &'static str) -> Result<File, Error> {
    let deadline = Instant::now() + DEVICE_WAIT;
    while Instant::now() < deadline {
        for entry in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim_end() == wanted {
                return OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(Path::new("/dev").join(entry.file_name()))
                    .map_err(Error::Port);
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    Err(Error::NoPort(wanted))
}

fn load(module: &str, parameters: &str) -> Result<(), Error> {
    let failed = |source| Error::Load(module.to_owned(), source);
    let file = File::open(module).map_err(failed)?;
    let parameters = CString::new(parameters)
        .map_err(|source| failed(io::Error::new(io::ErrorKind::InvalidInput, source)))?;
    let compressed = Path::new(module).extension() == Some("xz".as_ref());
    let flags = if compressed { COMPRESSED } else { 0 };
    finit_module(file, &parameters, flags).map_err(|errno| failed(errno.into()))
}

fn load_driver(driver: &Driver) -> Result<(), Error> {
    load(&driver.path, &driver.parameters)?;
    let deadline = Instant::now() + DEVICE_WAIT;
    for node in &driver.nodes {
        while !Path::new(node).exists() {
            if Instant::now() > deadline {
                return Err(Error::NoDevice(node.clone()));
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
    Ok(())
}

/// Unloads the driver; what speaks against it if that cannot be done.
fn unload(driver: &Driver, to_host: &mut File) -> Result<Option<String>, Error> {
    let name = Path::new(&driver.path).file_stem().unwrap_or_default();
    let name = CString::new(name.as_bytes()).unwrap_or_default();
    let (done, ended) = mpsc::channel();
    // It does not come back while a page is in use.
    thread::spawn(move || done.send(delete_module(&name, 0)));
    let deadline = Instant::now() + UNLOAD;
    while Instant::now() < deadline {
        if let Ok(end) = ended.recv_timeout(Duration::from_secs(ALIVE_SECONDS)) {
            return Ok(end.err().map(|error| error.to_string()));
        }
        send(to_host, &Event::Alive).map_err(Error::Port)?;
    }
    Ok(Some(format!("not within {} s", UNLOAD.as_secs())))
}

fn start(
    order: &Order,
    from_host: Receiver<Vec<u8>>,
    events: &Sender<Event>,
) -> Result<Child, Error> {
    let (program, arguments) = order.command.split_first().ok_or(Error::NoCommand)?;
    let mut command = match order.terminal {
        // A shell needs a controlling terminal for its job control.
        Some(terminal) => {
            let mut command = Command::new("setsid");
            command.arg("-c").arg(program);
            let [stdin, stdout, stderr] = console(terminal)?;
            command.stdin(stdin).stdout(stdout).stderr(stderr);
            command
        }
        None => {
            let mut command = Command::new(program);
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            command
        }
    };
    let mut child = command
        .args(arguments)
        .env("HOME", "/root")
        .env("PATH", PATH)
        .envs(&order.environment)
        .current_dir("/root")
        .spawn()
        .map_err(|source| Error::Start(program.clone(), source))?;

    if let Some(stdin) = child.stdin.take() {
        thread::spawn(move || copy_input(&from_host, stdin));
    }
    if let Some(stdout) = child.stdout.take() {
        let events = events.clone();
        thread::spawn(move || copy_output(stdout, Stream::Stdout, &events));
    }
    if let Some(stderr) = child.stderr.take() {
        let events = events.clone();
        thread::spawn(move || copy_output(stderr, Stream::Stderr, &events));
    }
    Ok(child)
}

fn console(terminal: Terminal) -> Result<[File; 3], Error> {
    const PATH: &str = "/dev/ttyS0";
    let failed = |source| Error::Read(PATH, source);
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(PATH)
            .map_err(failed)
    };
    let file = open()?;
    let mut size = rustix::termios::tcgetwinsize(&file).map_err(|errno| failed(errno.into()))?;
    size.ws_row = terminal.rows;
    size.ws_col = terminal.columns;
    rustix::termios::tcsetwinsize(&file, size).map_err(|errno| failed(errno.into()))?;
    Ok([file, open()?, open()?])
}

/// Hands on the host's input until the host closes its end of the port.
fn read_host(port: File, input: &SyncSender<Vec<u8>>) {
    let mut port = BufReader::new(port);
    while let Ok(Some(Input { data: Bytes(data) })) = receive(&mut port) {
        // A command that has ended takes no more input, and misses none.
        let _ = input.send(data);
    }
}

fn copy_input(from_host: &Receiver<Vec<u8>>, mut stdin: impl Write) {
    while let Ok(data) = from_host.recv() {
        if data.is_empty() || stdin.write_all(&data).is_err() {
            return;
        }
    }
}

fn copy_output(mut pipe: impl Read, stream: Stream, events: &Sender<Event>) {
    let mut buffer = vec![0; 32 * 1024];
    loop {
        match pipe.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                let data = Bytes(buffer.get(..count).unwrap_or_default().to_vec());
                if events.send(Event::Output { stream, data }).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Waits for the command, and reaps every orphan meanwhile, as process 1 has to.
fn wait(command: u32) -> Result<Event, Error> {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if Pid::as_raw(Some(pid)).cast_unsigned() == command => {
                return Ok(Event::Exit {
                    status: status.exit_status(),
                    signal: status.terminating_signal(),
                });
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Error::Wait(errno.into())),
        }
    }
}
