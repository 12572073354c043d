//! Takes a PCI device from its driver, and gives it back.

use std::fs;
use std::path::{Path, PathBuf};

use vhost_device_hmm::ErrorChain;

use crate::failure::{Failure, Result};

const DEVICES: &str = "/sys/bus/pci/devices";
const PROBE: &str = "/sys/bus/pci/drivers_probe";
const VFIO: &str = "vfio-pci";

/// Virtio's PCI vendor id, and that of the first virtio device.
const VENDOR: u32 = 0x1af4;
const FIRST_DEVICE: u32 = 0x1040;

/// A device that is bound to vfio-pci until this is dropped.
#[derive(Debug)]
pub struct Binding {
    name: String,
    /// The driver that it is taken from, unless it was vfio-pci already.
    former: Option<Option<String>>,
}

/// The addresses of all virtio PCI devices of this virtio id.
///
/// # Errors
/// The machine's devices cannot be listed.
pub fn find(virtio_id: u32) -> Result<Vec<String>> {
    let devices = fs::read_dir(DEVICES).map_err(file("list", DEVICES))?;
    let mut found: Vec<_> = devices
        .flatten()
        .filter(|device| {
            let is = |name: &str, wanted: u32| {
                let text = fs::read_to_string(device.path().join(name)).unwrap_or_default();
                text.trim() == format!("{wanted:#06x}")
            };
            is("vendor", VENDOR) && is("device", FIRST_DEVICE + virtio_id)
        })
        .filter_map(|device| device.file_name().into_string().ok())
        .collect();
    found.sort();
    Ok(found)
}

impl Binding {
    /// Takes the device at this address, like 0000:01:00.0.
    ///
    /// # Errors
    /// There is no such device, it is behind no IOMMU, or vfio-pci does not take it.
    pub fn take(name: &str) -> Result<Self> {
        let path = Path::new(DEVICES).join(name);
        fs::metadata(&path).map_err(file("find", &path))?;
        if !path.join("iommu_group").exists() {
            return Err(Failure::Unfit(format!(
                "{name} is behind no IOMMU: the kernel needs one, and intel_iommu=on or the like"
            )));
        }
        let former = driver(&path);
        if former.as_deref() == Some(VFIO) {
            let (name, former) = (name.to_owned(), None);
            return Ok(Self { name, former });
        }
        // From here on it is given back, whatever happens.
        let binding = Self {
            name: name.to_owned(),
            former: Some(former.clone()),
        };
        write(&path.join("driver_override"), VFIO)?;
        if former.is_some() {
            write(&path.join("driver/unbind"), name)?;
        }
        write(Path::new(PROBE), name)?;
        if driver(&path).as_deref() != Some(VFIO) {
            return Err(Failure::Unfit(format!(
                "{VFIO} does not take {name}: is the module loaded?"
            )));
        }
        Ok(binding)
    }

    /// The device in sysfs.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(DEVICES).join(&self.name)
    }

    fn give_back(&self) -> Result {
        let Some(former) = &self.former else {
            return Ok(());
        };
        let path = self.path();
        if driver(&path).as_deref() == Some(VFIO) {
            write(&path.join("driver/unbind"), &self.name)?;
        }
        // An empty line clears it.
        write(&path.join("driver_override"), "\n")?;
        match former {
            Some(_) => write(Path::new(PROBE), &self.name),
            None => Ok(()),
        }
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        if let Err(failure) = self.give_back() {
            eprintln!(
                "hmm-conformance: {} stays with {VFIO}: {}",
                self.name,
                ErrorChain(&failure)
            );
        }
    }
}

/// The driver that a device is bound to.
fn driver(device: &Path) -> Option<String> {
    let link = fs::read_link(device.join("driver")).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

fn write(path: &Path, text: &str) -> Result {
    fs::write(path, text).map_err(file("write", path))
}

fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Failure {
    let path = path.into();
    move |source| Failure::File {
        action,
        path,
        source,
    }
}
