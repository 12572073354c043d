//! What a program in the guest has the host do: with the device daemons, and by QEMU's monitor.

use std::io::{self, BufReader};
use std::os::unix::net::UnixListener;
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use hmm_init::{Action, Answer, Request, receive, send};
use rustix::process::Signal;
use serde_json::json;

use crate::devices::Devices;
use crate::error::{Error, Result, with_sources};
use crate::machine;
use crate::profile::Device;
use crate::qmp::Qmp;
use crate::report::Report;

/// How long the guest may take to let go of a device: all its pages come home first.
const UNPLUG: Duration = Duration::from_secs(120);
/// How long the guest may take to suspend after it has asked to be woken up.
const SUSPEND: Duration = Duration::from_secs(120);

/// The host's side of the actions.
#[derive(Debug)]
pub(crate) struct Host {
    /// Where QEMU's monitor connects.
    pub(crate) monitor: UnixListener,
    /// Where the guest's port connects.
    pub(crate) port: UnixListener,
    /// The devices, as long as the run lasts.
    pub(crate) devices: Weak<Mutex<Devices>>,
    /// How a device is made.
    pub(crate) settings: Device,
}

/// Devices as they are, even if a thread has died over them.
pub(crate) fn lock(devices: &Mutex<Devices>) -> MutexGuard<'_, Devices> {
    devices.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    /// Serves the guest until QEMU is gone.
    pub(crate) fn start(self) {
        thread::spawn(move || {
            if let Err(error) = self.serve() {
                Report.line(&format!("no more actions: {}", with_sources(&error)));
            }
            // The daemons that it has started would get the signal for a parent's death.
            loop {
                thread::park();
            }
        });
    }

    fn serve(&self) -> Result<()> {
        let (monitor, _) = self.monitor.accept().map_err(Error::Monitor)?;
        let mut qmp = Qmp::start(monitor)?;
        let (mut to_guest, _) = self.port.accept().map_err(Error::Protocol)?;
        let mut guest = BufReader::new(to_guest.try_clone().map_err(Error::Protocol)?);
        loop {
            let request: Request = match receive(&mut guest) {
                Ok(Some(request)) => request,
                Ok(None) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => return Err(Error::Protocol(error)),
            };
            let result = self.perform(&mut qmp, &request.action);
            let answer = Answer {
                id: request.id,
                error: result.err().map(|error| with_sources(&error)),
            };
            // It would reach whoever asks first in the next boot.
            if request.action == Action::Reset && answer.error.is_none() {
                continue;
            }
            // A guest that is gone needs no answer.
            if send(&mut to_guest, &answer).is_err() {
                return Ok(());
            }
            if request.action == Action::Wake && answer.error.is_none() {
                wake(&mut qmp)?;
            }
        }
    }

    fn perform(&self, qmp: &mut Qmp, action: &Action) -> Result<()> {
        // It is gone when the run is over, and this is its last action.
        let Some(devices) = self.devices.upgrade() else {
            return Ok(());
        };
        match *action {
            Action::Unplug { device } => {
                let id = machine::device_id(device);
                qmp.execute("device_del", json!({"id": id}))?;
                qmp.wait_for("DEVICE_DELETED", Some(("device", &id)), UNPLUG)
                    .map_err(Error::StillPlugged)?;
                qmp.execute("chardev-remove", json!({"id": id}))?;
                lock(&devices).end(device)
            }
            Action::Plug { device } => {
                let socket = lock(&devices).renew(device)?;
                let address = json!({"type": "unix", "data": {"path": socket}});
                let backend = json!({"addr": address, "server": false});
                qmp.execute(
                    "chardev-add",
                    json!({
                        "id": machine::device_id(device),
                        "backend": {"type": "socket", "data": backend}
                    }),
                )?;
                let properties = machine::device_properties(device, &self.settings);
                qmp.execute("device_add", properties.into())
            }
            Action::Kill { device } => lock(&devices).kill(device),
            Action::Pause { device, seconds } => {
                lock(&devices).signal(device, Signal::STOP)?;
                let devices = Weak::clone(&self.devices);
                // The guest may stand still until then, so this cannot wait for its word.
                thread::spawn(move || {
                    thread::sleep(Duration::from_secs(seconds.into()));
                    if let Some(devices) = devices.upgrade() {
                        let _ = lock(&devices).signal(device, Signal::CONT);
                    }
                });
                Ok(())
            }
            Action::Wake => {
                qmp.forget_events();
                Ok(())
            }
            Action::Reset => {
                // QEMU was started to end with the guest.
                qmp.execute("set-action", json!({"reboot": "reset"}))?;
                qmp.execute("system_reset", json!({}))
            }
        }
    }
}

fn wake(qmp: &mut Qmp) -> Result<()> {
    match qmp.wait_for("SUSPEND", None, SUSPEND) {
        Ok(()) => qmp.execute("system_wakeup", json!({})),
        // It has thought better of it.
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(()),
        Err(error) => Err(Error::Monitor(error)),
    }
}
