//! Shows what running devices do, on the whole terminal, until it is told to end.

use std::{
    io::{self, IsTerminal, Write},
    path::PathBuf,
    process::{self, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use hmm_view::{
    interval::parse_interval,
    reading::{self, Reading},
    screen::{Device, Screen},
};
use ratatui::{
    DefaultTerminal,
    crossterm::{
        event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
        terminal::disable_raw_mode,
    },
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};
use vhost_device_hmm::ErrorChain;

/// How often keys, signals and readings are looked at.
const GLANCE: Duration = Duration::from_millis(50);
/// How much later than expected a reading may come before that is shown.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long the main thread may take to end after a signal.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Status when Ctrl-C ends it, as if by the signal of that name.
const INTERRUPTED: u8 = 130;

/// Show what running devices do, on the whole terminal; q ends it
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Control sockets of the devices
    #[arg(required = true, value_name = "SOCKET")]
    sockets: Vec<PathBuf>,
    /// Seconds between two readings
    #[arg(short = 's', long, value_name = "SECONDS", default_value = "1", value_parser = parse_interval)]
    interval: Duration,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("standard output is no terminal; hmm-stat prints lines")]
    NoTerminal,
    #[error(transparent)]
    Reading(#[from] reading::Error),
    #[error("cannot use the terminal")]
    Terminal(#[from] io::Error),
}

/// The signal that is to end this, once one has come. On a terminal that is gone
/// the main thread never looks: crossterm reads it again and again.
fn watch_signals() -> io::Result<Arc<AtomicI32>> {
    let signal = Arc::new(AtomicI32::new(0));
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    let to_main = Arc::clone(&signal);
    thread::spawn(move || {
        if let Some(number) = signals.forever().next() {
            to_main.store(number, Ordering::Relaxed);
            thread::sleep(LAST_WORDS);
            let _ = disable_raw_mode();
            process::exit(128 + number);
        }
    });
    Ok(signal)
}

/// Gives the terminal back, whatever happens; after a panic ratatui does.
struct Restore;

impl Drop for Restore {
    fn drop(&mut self) {
        // It fails if the terminal is gone, where nobody can be told.
        let _ = ratatui::try_restore();
    }
}

/// The readings of one device, one for each interval.
struct Readings {
    from_device: Receiver<Result<Reading, reading::Error>>,
    last: Instant,
}

impl Readings {
    /// Begins to read, in a thread, since a device may take its time to answer.
    fn begin(socket: PathBuf, interval: Duration) -> Self {
        let (to_screen, from_device) = mpsc::channel();
        thread::spawn(move || {
            while to_screen.send(Reading::take(&socket)).is_ok() {
                thread::sleep(interval);
            }
        });
        Self {
            from_device,
            last: Instant::now(),
        }
    }

    /// Takes what has come into `device`. Returns whether it has changed.
    fn take_in(&mut self, device: &mut Device, interval: Duration) -> bool {
        let mut changed = false;
        for reading in self.from_device.try_iter() {
            device.read(reading);
            self.last = Instant::now();
            changed = true;
        }
        let late = self.last.elapsed();
        if late > interval + PATIENCE {
            device.overdue(late.as_secs());
            changed = true;
        }
        changed
    }
}

fn run(args: Args) -> Result<ExitCode, Error> {
    if !io::stdout().is_terminal() {
        return Err(Error::NoTerminal);
    }
    // One that is not there is told before the terminal is taken.
    for socket in &args.sockets {
        Reading::take(socket)?;
    }
    let signal = watch_signals()?;
    let names = args
        .sockets
        .iter()
        .map(|socket| socket.display().to_string());
    let mut screen = Screen::new(names.map(Device::new).collect());
    let sockets = args.sockets.into_iter();
    let mut readings: Vec<_> = sockets
        .map(|socket| Readings::begin(socket, args.interval))
        .collect();
    let _restore = Restore;
    let mut terminal = ratatui::try_init()?;
    loop {
        let devices = screen.devices.iter_mut().zip(&mut readings);
        let changed = devices.fold(false, |changed, (device, readings)| {
            readings.take_in(device, args.interval) || changed
        });
        if changed {
            draw(&mut terminal, &screen)?;
        }
        match signal.load(Ordering::Relaxed) {
            0 => {}
            signal => return Ok(ExitCode::from(u8::try_from(128 + signal).unwrap_or(1))),
        }
        if !event::poll(GLANCE)? {
            continue;
        }
        if let Event::Key(key) = event::read()?
            && key.kind != KeyEventKind::Release
        {
            let control = key.modifiers.contains(KeyModifiers::CONTROL);
            match key.code {
                KeyCode::Char('c') if control => return Ok(ExitCode::from(INTERRUPTED)),
                KeyCode::Char('q') | KeyCode::Esc => return Ok(ExitCode::SUCCESS),
                KeyCode::Tab => screen.next(),
                _ => {}
            }
        }
        draw(&mut terminal, &screen)?;
    }
}

fn draw(terminal: &mut DefaultTerminal, screen: &Screen) -> io::Result<()> {
    terminal.draw(|frame| frame.render_widget(screen, frame.area()))?;
    Ok(())
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(status) => status,
        Err(e) => {
            let _ = writeln!(io::stderr(), "hmm-top: {}", ErrorChain(&e));
            ExitCode::FAILURE
        }
    }
}
