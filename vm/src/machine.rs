//! The QEMU command line of one run.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use hmm_init::{ACTION_PORT, PORT};
use serde_json::{Map, Value};

use crate::accelerator::Accelerator;
use crate::profile::{Device, Profile};
use crate::toolbox::Toolbox;
use crate::units::Size;

/// Virtio id of the device, see `docs/device-specification.md`.
const VIRTIO_ID: u32 = 6;
/// Bytes of the device's configuration space that QEMU passes through.
const CONFIG_SIZE: u32 = 256;
/// The control and event queues, which come before the copy queues.
const FIRST_COPY_QUEUE: u32 = 2;

/// Files and sockets of one run.
#[derive(Clone, Debug)]
pub struct RunFiles {
    /// The guest's file system.
    pub initramfs: PathBuf,
    /// Socket of the results port; the tool listens on it.
    pub results: PathBuf,
    /// Socket of the serial console, for an interactive run; the tool listens on it.
    pub terminal: PathBuf,
    /// Socket of QEMU's monitor; the tool listens on it.
    pub monitor: PathBuf,
    /// Socket of the port for what the guest has the host do; the tool listens on it.
    pub actions: PathBuf,
    /// Socket of QEMU's gdb stub.
    pub gdb: PathBuf,
    /// The disk, if the profile has one.
    pub disk: PathBuf,
    /// Log of the serial console.
    pub console_log: PathBuf,
}

/// What to start.
#[derive(Clone, Debug)]
pub struct Machine<'a> {
    /// Where QEMU comes from.
    pub toolbox: &'a Toolbox,
    /// What boots, see [`crate::boot_image`].
    pub kernel: &'a Path,
    /// The machine.
    pub profile: &'a Profile,
    /// What it runs on.
    pub accelerator: Accelerator,
    /// Sockets of the device daemons, one for each device.
    pub devices: Vec<PathBuf>,
    /// Whether the console is for a person.
    pub interactive: bool,
    /// Whether to wait for a debugger.
    pub gdb: bool,
}

impl Machine<'_> {
    /// The command that starts QEMU.
    #[must_use]
    pub fn command(&self, files: &RunFiles) -> Command {
        let profile = self.profile;
        let mut command = self.toolbox.qemu();
        // The user's own QEMU configuration stays out of it.
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
        ]);
        let mut option = |name: &str, value: &str| {
            command.arg(name).arg(value);
        };
        match self.accelerator {
            Accelerator::Kvm => {
                option("-accel", "kvm");
                option("-cpu", &profile.cpu.kvm);
            }
            Accelerator::Tcg => {
                option("-accel", "tcg,thread=multi");
                option("-cpu", &profile.cpu.tcg);
            }
        }
        option("-machine", &format!("{},vmport=off", profile.machine));
        // Before the devices, which are then behind it.
        if let Some(iommu) = &profile.iommu {
            option("-device", iommu);
        }
        option("-m", &profile.memory.to_string());
        // A socket's caches cannot be on two nodes.
        let (cpus, nodes) = (profile.cpus, profile.nodes);
        option("-smp", &format!("{cpus},sockets={nodes}"));
        let size = Size(profile.memory.0 / u64::from(nodes));
        let prealloc = if profile.prefault { "on" } else { "off" };
        for node in 0..nodes {
            let (first, last) = (node * cpus / nodes, (node + 1) * cpus / nodes - 1);
            // vhost-user shares the guest's RAM with the daemon.
            option(
                "-object",
                &format!(
                    "memory-backend-memfd,id=ram{node},share=on,size={size},prealloc={prealloc}"
                ),
            );
            option(
                "-numa",
                &format!("node,nodeid={node},cpus={first}-{last},memdev=ram{node}"),
            );
        }
        option("-rtc", "base=utc");

        command.arg("-kernel").arg(self.kernel);
        command.arg("-initrd").arg(&files.initramfs);
        let mut words = profile.kernel.command_line.clone();
        // A debugger looks for the symbols where the linker put them.
        words.extend(self.gdb.then(|| "nokaslr".to_owned()));
        command.arg("-append").arg(words.join(" "));

        let log = escaped(&files.console_log);
        let console = if self.interactive {
            joined([
                "socket,id=console,path=",
                &escaped(&files.terminal),
                ",logfile=",
                &log,
            ])
        } else {
            joined(["file,id=console,path=", &log])
        };
        command
            .arg("-chardev")
            .arg(console)
            .args(["-serial", "chardev:console"]);
        command
            .arg("-chardev")
            .arg(socket("monitor", &files.monitor))
            .args(["-mon", "chardev=monitor,mode=control"])
            .args(["-device", "virtio-serial-pci"]);
        for (id, path, name) in [
            ("results", &files.results, PORT),
            ("actions", &files.actions, ACTION_PORT),
        ] {
            command
                .arg("-chardev")
                .arg(socket(id, path))
                .arg("-device")
                .arg(format!("virtserialport,chardev={id},name={name}"));
        }

        if profile.disk.is_some() {
            let file = joined(["file,node-name=disk,filename=", &escaped(&files.disk)]);
            command
                .arg("-blockdev")
                .arg(file)
                .args(["-device", "virtio-blk-pci,drive=disk"]);
        }

        for (slot, path) in (0..).zip(&self.devices) {
            let properties = device_properties(slot, &profile.device);
            let properties: Vec<String> = properties
                .iter()
                .map(|(name, value)| match value {
                    Value::String(text) => format!("{name}={text}"),
                    other => format!("{name}={other}"),
                })
                .collect();
            let port = port_id(slot);
            command
                .arg("-chardev")
                .arg(socket(&device_id(slot), path))
                // Only behind a port of its own can the device be unplugged.
                .arg("-device")
                .arg(format!("pcie-root-port,id={port},chassis={}", slot + 1))
                .arg("-device")
                .arg(properties.join(","));
        }
        if self.gdb {
            let socket = joined(["unix:", &escaped(&files.gdb), ",server=on,wait=off"]);
            command.arg("-S").arg("-gdb").arg(socket);
        }
        command
    }
}

/// QEMU's name of the device in a slot, and of the character device that leads to its daemon.
pub(crate) fn device_id(slot: u32) -> String {
    format!("hmm{slot}")
}

fn port_id(slot: u32) -> String {
    format!("hmm-port{slot}")
}

/// What QEMU makes a device of, on its command line and in its monitor.
pub(crate) fn device_properties(slot: u32, settings: &Device) -> Map<String, Value> {
    let mut properties = Map::new();
    let mut set = |name: &str, value: Value| properties.insert(name.to_owned(), value);
    set("driver", "vhost-user-test-device-pci".into());
    set("id", device_id(slot).into());
    set("bus", port_id(slot).into());
    set("chardev", device_id(slot).into());
    set("virtio-id", VIRTIO_ID.into());
    let queues = FIRST_COPY_QUEUE + settings.copy_queues;
    set("num_vqs", queues.into());
    set("vq_size", settings.queue_size.into());
    set("config_size", CONFIG_SIZE.into());
    properties
}

fn socket(id: &str, path: &Path) -> OsString {
    joined(["socket,id=", id, ",path=", &escaped(path)])
}

/// A path as a value in QEMU's options, where a comma is written twice.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

fn joined<const N: usize>(parts: [&str; N]) -> OsString {
    parts.concat().into()
}
