//! This project's device.

use std::path::Path;

use hmm_stress::failure::Failure;
use virtio_hmm_client::{self as client, Direction};

use super::{Part, Session};

pub(super) struct Device(client::Device);

impl Device {
    pub(super) fn open(path: &Path) -> Result<Self, Failure> {
        if !path.exists() {
            return Err(Failure::Skip(format!("there is no {}", path.display())));
        }
        Ok(Self(client::Device::open(path)?))
    }

    fn migrate(&self, part: &Part, direction: Direction) -> Result<(), Failure> {
        self.0.migrate_all(part.addresses.clone(), direction)?;
        Ok(())
    }
}

impl Session for Device {
    fn out(&self, part: &Part) -> Result<(), Failure> {
        self.migrate(part, Direction::ToDevice)
    }

    fn back(&self, part: &Part) -> Result<(), Failure> {
        self.migrate(part, Direction::ToSystem)
    }
}
