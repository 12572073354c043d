//! What this machine has itself of the things that are in the toolbox.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::with_sources;
use crate::kernel::{Kernel, OLDEST, Settings, Version};
use crate::process::capture;

/// The first QEMU in which a user can create the device.
const OLDEST_QEMU: Version = Version(10, 2);
const QEMU_DEVICE: &str = "vhost-user-test-device-pci";
pub(crate) const QEMU: &str = "qemu-system-x86_64";

/// One thing: its version or place, or why it does not fit.
pub type Found = Result<String, String>;

/// This machine's own, as far as it fits.
#[derive(Clone, Debug)]
pub struct Host {
    qemu: Found,
    gcc: Found,
    make: Found,
    kernel: Result<Kernel, String>,
    busybox: Result<PathBuf, String>,
}

/// All of it fits.
#[derive(Clone, Debug)]
pub struct Fitting {
    /// Version of QEMU.
    pub qemu: String,
    /// The kernel.
    pub kernel: Kernel,
    /// A static busybox.
    pub busybox: PathBuf,
}

impl Host {
    /// Looks at all of it.
    #[must_use]
    pub fn survey() -> Self {
        let gcc = first_line(Command::new("gcc").arg("-dumpfullversion"));
        let gcc_release = gcc.as_deref().ok().and_then(Version::parse);
        Self {
            qemu: first_line(Command::new(QEMU).arg("--version")).and_then(|version| {
                let devices = capture(Command::new(QEMU).args(["-device", "help"]));
                fitting_qemu(version, &devices.unwrap_or_default())
            }),
            kernel: newest_kernel(Path::new("/"), gcc_release.map(|version| version.0)),
            gcc,
            make: first_line(Command::new("make").arg("--version")),
            busybox: static_busybox(),
        }
    }

    /// Each thing by its name.
    pub fn things(&self) -> [(&'static str, Found); 5] {
        [
            ("QEMU", self.qemu.clone()),
            ("gcc", self.gcc.clone()),
            ("make", self.make.clone()),
            (
                "kernel with headers",
                self.kernel.clone().map(|kernel| kernel.release),
            ),
            (
                "static busybox",
                self.busybox.clone().map(|path| path.display().to_string()),
            ),
        ]
    }

    /// All of it, if all of it fits; otherwise what does not.
    ///
    /// # Errors
    /// The reasons, on one line.
    pub fn fitting(self) -> Result<Fitting, String> {
        let reasons: Vec<String> = self
            .things()
            .into_iter()
            .filter_map(|(name, found)| Some(format!("{name}: {}", found.err()?)))
            .collect();
        match self {
            Self {
                qemu: Ok(qemu),
                kernel: Ok(kernel),
                busybox: Ok(busybox),
                ..
            } if reasons.is_empty() => Ok(Fitting {
                qemu,
                kernel,
                busybox,
            }),
            _ => Err(reasons.join("; ")),
        }
    }
}

fn first_line(command: &mut Command) -> Found {
    match capture(command) {
        Ok(text) => Ok(text.lines().next().unwrap_or_default().to_owned()),
        Err(_) => Err("not in PATH".into()),
    }
}

/// Judges by `--version` and by the list of devices.
fn fitting_qemu(version: String, devices: &str) -> Found {
    let number = version
        .split_once("version ")
        .and_then(|(_, number)| Version::parse(number));
    match number {
        Some(number) if number < OLDEST_QEMU => {
            Err(format!("{number} is too old, {OLDEST_QEMU} is needed"))
        }
        Some(_) if devices.contains(&format!("\"{QEMU_DEVICE}\"")) => Ok(version),
        Some(_) => Err(format!("it has no {QEMU_DEVICE}")),
        None => Err(format!("its version is unclear: {version}")),
    }
}

/// The newest kernel of the modules in `root` that fits, or what is wrong with the newest.
fn newest_kernel(root: &Path, gcc: Option<u32>) -> Result<Kernel, String> {
    let mut releases: Vec<(Version, String)> = fs::read_dir(root.join("usr/lib/modules"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter_map(|release| Some((Version::parse(&release)?, release)))
        .collect();
    releases.sort();
    let mut unfit = "none is installed".to_owned();
    // From the oldest on, so that what is left is about the newest.
    let mut fitting = None;
    for (version, release) in releases {
        match installed_kernel(root, version, &release, gcc) {
            Ok(kernel) => fitting = Some(kernel),
            Err(reason) => unfit = format!("{release}: {reason}"),
        }
    }
    fitting.ok_or(unfit)
}

fn installed_kernel(
    root: &Path,
    version: Version,
    release: &str,
    gcc: Option<u32>,
) -> Result<Kernel, String> {
    if version < OLDEST {
        return Err(format!("too old, {OLDEST} is needed"));
    }
    let modules = root.join("usr/lib/modules").join(release);
    let build = modules.join("build");
    let settings = Settings::read(&build)
        .map_err(|error| format!("its headers are not there: {}", with_sources(&error)))?;
    if let Some(reason) = settings.unfit(gcc) {
        return Err(reason);
    }
    let image = [
        modules.join("vmlinuz"),
        root.join(format!("boot/vmlinuz-{release}")),
    ]
    .into_iter()
    .find(|path| fs::File::open(path).is_ok())
    .ok_or("its vmlinuz cannot be read")?;
    Ok(Kernel {
        release: release.to_owned(),
        image,
        modules: modules.join("kernel"),
        build,
        root: None,
    })
}

fn static_busybox() -> Result<PathBuf, String> {
    let path = env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .map(|directory| directory.join("busybox"))
        .find(|path| path.is_file())
        .ok_or("not in PATH")?;
    let program = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    match has_interpreter(&program) {
        Some(false) => Ok(path),
        Some(true) => Err(format!("{} is not linked statically", path.display())),
        None => Err(format!("{} is no 64-bit program", path.display())),
    }
}

/// Whether a 64-bit ELF program names a dynamic linker.
fn has_interpreter(program: &[u8]) -> Option<bool> {
    const PT_INTERP: u16 = 3;
    let short = |at: usize| Some(u16::from_le_bytes(*program.get(at..)?.first_chunk()?));
    if !program.starts_with(b"\x7fELF\x02") {
        return None;
    }
    let headers = usize::from(short(0x20)?);
    let (size, count) = (usize::from(short(0x36)?), usize::from(short(0x38)?));
    let mut kinds = (0..count).map(|n| short(headers + n * size));
    Some(kinds.any(|kind| kind == Some(PT_INTERP)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::NEEDED;
    use std::os::unix::fs::symlink;

    #[test]
    fn qemu_is_judged_by_its_version_and_its_devices() {
        let devices = "name \"vhost-user-test-device-pci\", bus PCI\n";
        let version = |number: &str| format!("QEMU emulator version {number} (Debian)");
        assert!(fitting_qemu(version("10.2.0"), devices).is_ok());
        assert!(fitting_qemu(version("11.1.3"), devices).is_ok());
        for (version, devices, reason) in [
            (version("10.1.0"), devices, "too old"),
            (version("7.2.17"), "", "too old"),
            (version("10.2.0"), "name \"virtio-net-pci\"", "has no"),
            ("QEMU".into(), devices, "unclear"),
        ] {
            let text = fitting_qemu(version, devices).unwrap_err();
            assert!(text.contains(reason), "{text}");
        }
    }

    #[test]
    fn the_newest_fitting_kernel_is_taken() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert_eq!(
            newest_kernel(root, Some(14)).unwrap_err(),
            "none is installed"
        );
        let headers = root.join("usr/src/headers/include/config");
        fs::create_dir_all(&headers).unwrap();
        let settings = NEEDED.map(|name| format!("CONFIG_{name}=y\n")).concat();
        fs::write(headers.join("auto.conf"), settings).unwrap();
        fs::create_dir_all(root.join("boot")).unwrap();
        let install = |release: &str, headers: bool| {
            let modules = root.join("usr/lib/modules").join(release);
            fs::create_dir_all(&modules).unwrap();
            if headers {
                symlink(root.join("usr/src/headers"), modules.join("build")).unwrap();
            }
        };
        let reason = || newest_kernel(root, Some(14)).unwrap_err();
        install("6.12.9-amd64", true);
        assert!(reason().contains("6.12.9-amd64: too old"), "{}", reason());
        install("7.3.4-amd64", true);
        assert!(reason().contains("vmlinuz"), "{}", reason());
        fs::write(root.join("boot/vmlinuz-7.3.4-amd64"), "").unwrap();
        install("7.12.1-amd64", false);
        let kernel = newest_kernel(root, Some(14)).unwrap();
        assert_eq!(kernel.release, "7.3.4-amd64");
        assert!(kernel.image.ends_with("boot/vmlinuz-7.3.4-amd64"));
        fs::remove_file(&kernel.image).unwrap();
        assert!(reason().contains("headers"), "{}", reason());
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let host = Host {
            qemu: Ok("QEMU emulator version 11.1.3".into()),
            gcc: Ok("14.2.0".into()),
            make: Err("not in PATH".into()),
            kernel: Err("none is installed".into()),
            busybox: Ok("/bin/busybox".into()),
        };
        assert_eq!(
            host.fitting().unwrap_err(),
            "make: not in PATH; kernel with headers: none is installed"
        );
    }

    #[test]
    fn a_dynamic_program_is_told_from_others() {
        let this = fs::read(env::current_exe().unwrap()).unwrap();
        assert_eq!(has_interpreter(&this), Some(true));
        assert_eq!(has_interpreter(b"#!/bin/sh\n"), None);
        let mut header = this[..64].to_vec();
        header[0x38] = 0;
        header[0x39] = 0;
        assert_eq!(has_interpreter(&header), Some(false));
    }
}
