//! The daemon's command line.

use std::{net::SocketAddr, os::fd::RawFd, path::PathBuf, process::ExitCode, time::Duration};

use clap::{ArgGroup, Parser};
use tracing::level_filters::LevelFilter;
use vhost_device_hmm::{
    ErrorChain,
    link::{self, LEAST_BANDWIDTH},
    memory::Backing,
    rule::Rule,
    seccomp::Mode,
    server::{Config, Endpoint, Error, MAX_COPY_QUEUES, Server},
    units::{parse_size, parse_time},
};

const NAME: &str = env!("CARGO_PKG_NAME");

/// The short form of `docs/fault-injection.md`.
const INJECT_HELP: &str = "\
Let something go wrong on purpose; can be repeated

A rule is FAULT[=VALUE][,CONDITION=VALUE]... The faults:
  delay=TIME        executed and answered so much later, such as delay=5ms
  reorder[=TIME]    executed after the next request, or after TIME [10ms]
  error[=N]         N frames of the request fail [1]
  status=STATUS     refused: invalid, unsupported, range or a number above 1
  short[=N]         only the first N frames are done [half]
  drop[=SHARE]      never answered, after none, half or all was done [none]
  lose              answered as if done; nothing is done, and nothing counted
  double            done, and counted, twice
  stall             the queue takes no more requests until it is reset
  poison[=N]        N frames lose their contents [1]
  dead              the device does nothing any more
The conditions:
  op=OPERATION      to_device, from_device, fill, device_to_device, counters
                    or discard; if not given, any but the last two
  queue=N           only on this queue, of which 2 is the first for copies
  probability=P     from 0 to 1 [1]
  after=N           the first N such requests are spared [0]
  count=N           at most N requests are struck";

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
    /// Serve metrics on this UNIX socket, as OpenMetrics text over HTTP
    #[arg(long, value_name = "PATH")]
    metrics_socket: Option<PathBuf>,
    /// Serve metrics over TCP as well, on a loopback address such as 127.0.0.1:9464
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics_tcp: Option<SocketAddr>,
    /// Allocate device memory at the start, not on first use
    #[arg(long)]
    prefault: bool,
    /// Take device memory from the host's huge pages (vm.nr_hugepages), at the start
    #[arg(long, conflicts_with = "prefault")]
    huge_pages: bool,
    /// Do not have the processor count what the workers do
    #[arg(long)]
    no_hardware_counters: bool,
    /// Bytes a second that copies take each way, at least 1M; suffixes K, M, G, T
    #[arg(long, value_name = "SIZE", value_parser = parse_bandwidth)]
    bandwidth: Option<u64>,
    /// Time that each copy request takes besides, such as 10us
    #[arg(long, value_name = "TIME", default_value = "0us", value_parser = parse_time)]
    latency: Duration,
    /// Let something go wrong on purpose; can be repeated
    #[arg(long, value_name = "RULE", long_help = INJECT_HELP)]
    inject: Vec<Rule>,
    /// Repeat the choices of an earlier run, instead of random ones
    #[arg(long, value_name = "N")]
    inject_seed: Option<u64>,
    /// What becomes of a system call that the daemon has no use for
    #[arg(long, value_enum, value_name = "MODE", default_value_t = Mode::Kill)]
    seccomp: Mode,
    /// Least important messages to log: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: LevelFilter,
    /// Print the backend's capabilities as JSON and exit
    #[arg(long)]
    print_capabilities: bool,
}

fn parse_bandwidth(text: &str) -> Result<u64, String> {
    let bandwidth = parse_size(text)?;
    if bandwidth < LEAST_BANDWIDTH {
        return Err("less than 1M".into());
    }
    Ok(bandwidth)
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
        metrics_socket: args.metrics_socket,
        metrics_tcp: args.metrics_tcp,
        backing: match (args.huge_pages, args.prefault) {
            (true, _) => Backing::HugePages,
            (false, true) => Backing::Prefault,
            (false, false) => Backing::Sparse,
        },
        hardware_counters: !args.no_hardware_counters,
        link: link::Config {
            bandwidth: args.bandwidth,
            latency: args.latency,
        },
        inject: args.inject,
        inject_seed: args.inject_seed.unwrap_or_else(|| fastrand::u64(..)),
    })?;
    server.handle_signals()?;
    server.confine(args.seccomp)?;
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
        // To report a log that cannot be written would panic, since that goes there too.
        .log_internal_errors(false)
        .init();
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{NAME}: {}", ErrorChain(&e));
            ExitCode::FAILURE
        }
    }
}
