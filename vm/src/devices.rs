//! The devices of one run: a daemon each, and the slot where it is plugged.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use rustix::process::Signal;

use crate::daemon::{self, Counted, Sockets};
use crate::error::{Error, Result};
use crate::process::Guarded;
use crate::profile::Device;
use crate::run::DeviceAt;

/// The devices of a run, by their slots.
#[derive(Debug)]
pub(crate) struct Devices {
    slots: Vec<Slot>,
    settings: Device,
}

#[derive(Debug)]
struct Slot {
    sockets: Sockets,
    log: PathBuf,
    daemon: Daemon,
    /// Whether it is not what it was when the machine started.
    changed: bool,
}

/// What the host has counted of a device.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Counts {
    /// Since the machine started.
    All(Counted),
    /// Its daemon has ended by itself.
    Gone,
    /// The guest had it unplugged or killed.
    Changed,
}

#[derive(Debug)]
enum Daemon {
    /// Of the run.
    Own(PathBuf, Guarded),
    /// Of the run, and ended as the guest has asked.
    Ended(PathBuf),
    /// Of the user.
    Others,
}

/// Names the sockets of a run's own daemon.
#[must_use]
pub(crate) fn own_sockets(scratch: &Path, slot: u32) -> Sockets {
    let name = |name: &str| match slot {
        0 => scratch.join(name),
        _ => scratch.join(format!("{name}{slot}")),
    };
    Sockets {
        device: name("device"),
        control: name("control"),
    }
}

impl Devices {
    /// Starts the daemons that the run needs.
    pub(crate) fn start(
        at: &DeviceAt,
        settings: &Device,
        scratch: &Path,
        logs: &Path,
    ) -> Result<Self> {
        let log = |slot: u32| match slot {
            0 => logs.join("daemon.log"),
            _ => logs.join(format!("daemon{slot}.log")),
        };
        let slots = match at {
            DeviceAt::Nowhere => Vec::new(),
            DeviceAt::Own(program) => (0..settings.count)
                .map(|slot| {
                    let (sockets, log) = (own_sockets(scratch, slot), log(slot));
                    let daemon = daemon::start(program, settings, &sockets, &log)?;
                    let daemon = Daemon::Own(program.clone(), daemon);
                    Ok(Slot {
                        sockets,
                        log,
                        daemon,
                        changed: false,
                    })
                })
                .collect::<Result<_>>()?,
            DeviceAt::Others(sockets) => vec![Slot {
                sockets: sockets.clone(),
                log: log(0),
                daemon: Daemon::Others,
                changed: false,
            }],
        };
        Ok(Self {
            slots,
            settings: settings.clone(),
        })
    }

    /// The vhost-user sockets, by slot.
    pub(crate) fn sockets(&self) -> Vec<PathBuf> {
        let sockets = self.slots.iter().map(|slot| slot.sockets.device.clone());
        sockets.collect()
    }

    /// The control sockets, by slot. One whose daemon is renewed keeps its place.
    pub(crate) fn control_sockets(&self) -> Vec<PathBuf> {
        let sockets = self.slots.iter().map(|slot| slot.sockets.control.clone());
        sockets.collect()
    }

    /// How a daemon ended that nobody has asked to end.
    pub(crate) fn died(&mut self) -> Option<ExitStatus> {
        self.slots
            .iter_mut()
            .find_map(|slot| match &mut slot.daemon {
                Daemon::Own(_, daemon) => daemon.ended(),
                Daemon::Ended(_) | Daemon::Others => None,
            })
    }

    /// What was counted of every device, by slot.
    pub(crate) fn counts(&mut self) -> Result<Vec<Counts>> {
        self.slots
            .iter_mut()
            .map(|slot| {
                if slot.changed {
                    return Ok(Counts::Changed);
                }
                if let Daemon::Own(_, daemon) = &mut slot.daemon
                    && daemon.ended().is_some()
                {
                    return Ok(Counts::Gone);
                }
                daemon::counted(&slot.sockets.control).map(Counts::All)
            })
            .collect()
    }

    /// Ends the daemon of a device, by SIGTERM.
    pub(crate) fn end(&mut self, slot: u32) -> Result<()> {
        let slot = self.slot(slot)?;
        slot.changed = true;
        if let Daemon::Own(program, _) = &slot.daemon {
            slot.daemon = Daemon::Ended(program.clone());
        }
        Ok(())
    }

    /// Kills the daemon of a device.
    pub(crate) fn kill(&mut self, slot: u32) -> Result<()> {
        self.signal(slot, Signal::KILL)?;
        self.end(slot)
    }

    /// Sends a signal to the daemon of a device.
    pub(crate) fn signal(&mut self, slot: u32, signal: Signal) -> Result<()> {
        match &self.slot(slot)?.daemon {
            Daemon::Own(_, daemon) => {
                daemon.signal(signal);
                Ok(())
            }
            Daemon::Ended(_) => Err(Error::Config("its daemon has ended".into())),
            Daemon::Others => Err(Error::Config("its daemon is the user's".into())),
        }
    }

    /// Starts a new daemon for a device, and names its vhost-user socket.
    pub(crate) fn renew(&mut self, slot: u32) -> Result<PathBuf> {
        let settings = self.settings.clone();
        let slot = self.slot(slot)?;
        let Daemon::Ended(program) = &slot.daemon else {
            return Err(Error::Config("there is a device already".into()));
        };
        let Sockets { device, control } = &slot.sockets;
        // One that was killed has left them.
        for socket in [device, control] {
            let _ = fs::remove_file(socket);
        }
        let daemon = daemon::start(program, &settings, &slot.sockets, &slot.log)?;
        slot.daemon = Daemon::Own(program.clone(), daemon);
        Ok(slot.sockets.device.clone())
    }

    fn slot(&mut self, slot: u32) -> Result<&mut Slot> {
        let found = usize::try_from(slot).ok();
        let found = found.and_then(|index| self.slots.get_mut(index));
        found.ok_or_else(|| Error::Config(format!("there is no device {slot}")))
    }
}
