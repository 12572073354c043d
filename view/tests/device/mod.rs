//! A device in this process.

use std::{path::PathBuf, sync::Arc, thread};

use tempfile::TempDir;
use vhost_device_hmm::{
    link,
    memory::Backing,
    server::{Config, Endpoint, Server},
    stop::Stop,
};

/// A device that serves until it is dropped.
pub struct Device {
    directory: TempDir,
    stop: Arc<Stop>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Device {
    /// A device of 4 MiB and two copy queues, which no VM uses.
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::new(&Config {
            endpoint: Endpoint::Path(directory.path().join("device")),
            memory_size: 4 << 20,
            copy_queues: 2,
            control_socket: Some(directory.path().join("control")),
            metrics_socket: None,
            metrics_tcp: None,
            backing: Backing::Sparse,
            hardware_counters: true,
            link: link::Config::default(),
            inject: Vec::new(),
            inject_seed: 0,
        })
        .unwrap();
        let stop = server.stop();
        let thread = Some(thread::spawn(|| server.run().unwrap()));
        Self {
            directory,
            stop,
            thread,
        }
    }

    /// Its control socket.
    pub fn control(&self) -> PathBuf {
        self.directory.path().join("control")
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.stop.request();
        self.thread.take().unwrap().join().unwrap();
    }
}
