//! The daemon's command line.

use std::{os::fd::RawFd, path::PathBuf, process::ExitCode};

use clap::{ArgGroup, Parser};
use tracing::level_filters::LevelFilter;
use vhost_device_hmm::{
    ErrorChain,
    server::{Config, Endpoint, Error, MAX_COPY_QUEUES, Server},
};

const NAME: &str = env!("CARGO_PKG_NAME");

/// vhost-user device with private memory and a DMA copy engine
#[derive(Debug, Parser)]
#[command(version)]
#[command(group = ArgGroup::new("endpoint").required(true)
    .args(["socket_path", "fd", "print_capabilities"]))]
struct Args {
    /// Listen for VMMs on this UNIX socket
    #[arg(short, long, value_name = "PATH")]
    socket_path: Option<PathBuf>,
    /// Listen for VMMs on this inherited socket, which listens already
    #[arg(long, value_name = "FD")]
    fd: Option<RawFd>,
    /// Bytes of device memory, a multiple of 2M; suffixes K, M, G, T
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_size)]
    memory_size: u64,
    /// Number of copy queues
    #[arg(long, value_name = "N", default_value_t = 2,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_COPY_QUEUES)))]
    copy_queues: u16,
    /// Answer questions about the device on this UNIX socket
    #[arg(long, value_name = "PATH")]
    control_socket: Option<PathBuf>,
    /// Allocate device memory at the start, not on first use
    #[arg(long)]
    prefault: bool,
    /// Least important messages to log: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: LevelFilter,
    /// Print the backend's capabilities as JSON and exit
    #[arg(long)]
    print_capabilities: bool,
}

/// Bytes in `text`, a number with an optional suffix K, M, G or T.
fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (text.get(..at), 10),
        Some((at, 'm' | 'M')) => (text.get(..at), 20),
        Some((at, 'g' | 'G')) => (text.get(..at), 30),
        Some((at, 't' | 'T')) => (text.get(..at), 40),
        _ => (Some(text), 0),
    };
    let number: u64 = digits
        .unwrap_or_default()
        .parse()
        .map_err(|_| "not a size")?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "too large".into())
}

fn serve(args: Args) -> Result<(), Error> {
    let endpoint = match (args.fd, args.socket_path) {
        (Some(fd), _) => Endpoint::Fd(fd),
        (None, path) => Endpoint::Path(path.unwrap_or_default()),
    };
    let mut server = Server::new(&Config {
        endpoint,
        memory_size: args.memory_size,
        copy_queues: args.copy_queues,
        control_socket: args.control_socket,
        prefault: args.prefault,
    })?;
    server.handle_signals()?;
    server.run()
}

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(e) if !e.use_stderr() => e.exit(),
        Err(e) => {
            let text = e.to_string();
            let line = text.lines().next().unwrap_or_default();
            eprintln!("{NAME}: {}", line.trim_start_matches("error: "));
            return ExitCode::from(2);
        }
    };
    if args.print_capabilities {
        println!("{}", serde_json::json!({ "type": "misc", "features": [] }));
        return ExitCode::SUCCESS;
    }
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(args.log_level)
        .init();
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{NAME}: {}", ErrorChain(&e));
            ExitCode::FAILURE
        }
    }
}
