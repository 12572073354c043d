//! `cargo vm doctor`: what is there, what is missing, what would be done.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use rustix::fs::statvfs;

use crate::accelerator::remembered_kvm;
use crate::apt::{KEYRING, host_mirror};
use crate::error::{Result, with_sources};
use crate::host::Host;
use crate::named_kernel::{self, NamedKernel};
use crate::paths::Cache;
use crate::process::capture;
use crate::root::{Root, check_namespaces};
use crate::toolbox::{Choice, Toolbox};

/// Free space that a toolbox, its packages and the checks of the module need.
const NEEDED_SPACE: u64 = 2 << 30;

/// Prints one line for each thing; false if something necessary is missing.
///
/// # Errors
/// There is no place for a cache, the recipe cannot be read, or the machine's own tools are
/// asked for and do not fit.
pub fn run(choice: Choice, mirror: Option<&str>) -> Result<bool> {
    let cache = Cache::locate()?;
    let mut complete = true;
    let mut line = |what: &str, found: Result<String, String>| match found {
        Ok(text) => println!("ok       {what}: {text}"),
        Err(text) => {
            complete = false;
            println!("missing  {what}: {text}");
        }
    };

    line(
        "machine",
        match env::consts::ARCH {
            "x86_64" => Ok("Linux x86_64".into()),
            other => Err(format!("{other}; only x86_64 is supported")),
        },
    );
    line(
        "C compiler for Rust's linking",
        version("cc", "install gcc"),
    );
    for (name, found) in Host::survey().things() {
        match found {
            Ok(text) => println!("info     this machine's {name} fits: {text}"),
            Err(reason) => println!("info     this machine's {name} does not fit: {reason}"),
        }
    }
    let toolbox = Toolbox::place(choice, &cache)?;
    if let Toolbox::Debian(_) = toolbox {
        line("util-linux", version("unshare", "install util-linux"));
        line(
            "namespaces",
            match check_namespaces() {
                Ok(()) if rustix::process::geteuid().is_root() => Ok("as root".into()),
                Ok(()) => Ok("user namespaces, no root needed".into()),
                Err(error) => Err(with_sources(&error)),
            },
        );
    }
    match &toolbox {
        Toolbox::Host(_) => line(
            "toolbox",
            Ok("this machine's own; nothing to download".into()),
        ),
        Toolbox::Debian(root) if root.is_made() => line(
            "toolbox",
            toolbox
                .kernel()
                .map_err(|error| with_sources(&error))
                .map(|kernel| {
                    let (path, release) = (root.path().display(), kernel.release);
                    format!("{path}, kernel {release}; nothing to download")
                }),
        ),
        Toolbox::Debian(root) => to_be_made(root, mirror, &mut line),
    }
    for name in named_kernel::names()? {
        let kernel = NamedKernel::find(&name, &cache)?;
        let state = match kernel.made()? {
            Some(kernel) => format!("{} is made", kernel.release),
            None => "it will be made when it is asked for".into(),
        };
        println!(
            "info     kernel {name}: {state}, in {}",
            kernel.path().display()
        );
    }
    line("space for the cache", space(cache.root()));
    println!(
        "info     accelerator: {}",
        match remembered_kvm(&cache, &toolbox.identity()) {
            Some(None) => "kvm, a guest ran on it".into(),
            Some(Some(reason)) => format!("tcg, because {reason}"),
            None if Path::new("/dev/kvm").exists() => "the first run tries a guest on KVM".into(),
            None => "tcg, because there is no /dev/kvm".to_owned(),
        }
    );
    Ok(complete)
}

fn version(program: &str, otherwise: &str) -> Result<String, String> {
    match capture(Command::new(program).arg("--version")) {
        Ok(text) => Ok(text.lines().next().unwrap_or_default().to_owned()),
        Err(_) => Err(otherwise.to_owned()),
    }
}

fn space(cache: &Path) -> Result<String, String> {
    let there = cache
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    let writable = tempfile::tempfile_in(there).map(drop);
    writable.map_err(|error| format!("cannot write {}: {error}", there.display()))?;
    let stat = statvfs(there).map_err(|errno| format!("{}: {errno}", there.display()))?;
    let free = stat.f_bavail * stat.f_frsize;
    let text = format!("{} MB free in {}", free >> 20, cache.display());
    let used = fs::exists(cache).unwrap_or(false);
    if free >= NEEDED_SPACE || used {
        Ok(text)
    } else {
        Err(text + ", 2048 MB are needed")
    }
}

fn to_be_made(
    root: &Root,
    mirror: Option<&str>,
    line: &mut dyn FnMut(&str, Result<String, String>),
) {
    for (tool, package) in [("apt-get", "apt"), ("dpkg-deb", "dpkg")] {
        line(
            tool,
            version(tool, &format!("it comes with {package}, on Debian")),
        );
    }
    line(
        "Debian's keys",
        match Path::new(KEYRING).exists() {
            true => Ok(KEYRING.into()),
            false => Err("install debian-archive-keyring".into()),
        },
    );
    let found = mirror.map_or_else(host_mirror, |mirror| Ok(mirror.to_owned()));
    line("Debian mirror", found.map_err(|error| with_sources(&error)));
    let root = root.path().display();
    println!("would do download 250 MB of packages and unpack them in {root}");
}
