//! The guest's file system: a cpio archive ("newc"), as the kernel unpacks it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use hmm_init::{ACTION_COMMAND, ORDER_PATH, Order};
use serde::Deserialize;

use crate::build::{INIT, Programs};
use crate::error::{Error, FileContext, Result};
use crate::paths;
use crate::profile::read_toml;

/// Where the guest finds the module.
pub const MODULE_PATH: &str = "/lib/modules/virtio_hmm.ko";

/// Where the guest finds a module of the kernel's own.
#[must_use]
pub(crate) fn guest_path(module: &Path) -> String {
    let name = module.file_name().unwrap_or_default();
    format!("/lib/modules/{}", name.to_string_lossy())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipe {
    directories: Vec<String>,
    programs: Vec<String>,
    applets: Vec<String>,
    left_out: Vec<PathBuf>,
}

fn recipe() -> Result<Recipe> {
    read_toml(&paths::checkout().join("images/initramfs.toml"))
}

/// The Rust programs that go into the guest.
pub(crate) fn programs() -> Result<Vec<String>> {
    Ok(recipe()?.programs)
}

/// What the archive of one run holds, beside what its recipe says.
#[derive(Debug)]
pub struct Contents<'a> {
    /// Where the programs are.
    pub programs: &'a Programs,
    /// The guest's shell and tools, linked statically.
    pub busybox: &'a Path,
    /// The driver.
    pub module: Option<&'a Path>,
    /// The kernel's own modules.
    pub kernel_modules: &'a [PathBuf],
    /// A root directory with Debian packages; what is in it has the same place in the guest.
    pub packages: Option<&'a Path>,
    /// The user's, which land in the guest's `/root` under their own names.
    pub files: &'a [PathBuf],
    /// What the guest is to do.
    pub order: &'a Order,
}

impl Contents<'_> {
    /// Writes the archive.
    ///
    /// # Errors
    /// A file cannot be read or the archive cannot be written.
    pub fn write(&self, archive: &Path) -> Result<()> {
        let recipe = recipe()?;
        let failed = |source| Error::File {
            action: "write",
            path: archive.to_path_buf(),
            source,
        };
        let mut cpio = Cpio::new(io::BufWriter::new(
            fs::File::create(archive).map_err(failed)?,
        ));
        let mut directory = PathBuf::new();
        for name in &recipe.directories {
            directory.clear();
            for part in Path::new(name) {
                directory.push(part);
                cpio.directory(&directory).map_err(failed)?;
            }
        }
        cpio.copy("init", &self.programs.path(INIT))?;
        cpio.link(&format!("bin/{ACTION_COMMAND}"), "../init")
            .map_err(failed)?;
        cpio.copy("bin/busybox", self.busybox)?;
        for applet in &recipe.applets {
            cpio.link(&format!("bin/{applet}"), "busybox")
                .map_err(failed)?;
        }
        for program in &recipe.programs {
            cpio.copy(&format!("bin/{program}"), &self.programs.path(program))?;
        }
        if let Some(module) = self.module {
            cpio.copy(MODULE_PATH.trim_start_matches('/'), module)?;
        }
        for module in self.kernel_modules {
            cpio.copy(guest_path(module).trim_start_matches('/'), module)?;
        }
        if let Some(packages) = self.packages {
            cpio.copy_root(Path::new(""), packages, &recipe.left_out)?;
        }
        let mut names = BTreeSet::new();
        for file in self.files {
            let full = file.canonicalize().at("read", file)?;
            let name = full
                .file_name()
                .ok_or_else(|| Error::SameName { path: file.clone() })?;
            if !names.insert(name.to_owned()) {
                return Err(Error::SameName { path: file.clone() });
            }
            cpio.copy_tree(&Path::new("root").join(name), &full)?;
        }
        let order = serde_json::to_vec(self.order).map_err(|error| failed(error.into()))?;
        cpio.file(Path::new(ORDER_PATH.trim_start_matches('/')), 0o644, &order)
            .map_err(failed)?;
        cpio.end().map_err(failed)
    }
}

struct Cpio<W> {
    to: W,
    inode: u32,
    directories: BTreeSet<PathBuf>,
}

const DIRECTORY: u32 = 0o040_755;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_777;

impl<W: Write> Cpio<W> {
    fn new(to: W) -> Self {
        Self {
            to,
            inode: 0,
            directories: BTreeSet::new(),
        }
    }

    fn entry(&mut self, name: &Path, mode: u32, links: u32, data: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let name = name.as_os_str().as_encoded_bytes();
        let size = u32::try_from(data.len())
            .map_err(|_| io::Error::other("a file of 4 GiB or more does not fit an initramfs"))?;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        // inode, mode, uid, gid, links, mtime, size, device, rdev, name size, checksum.
        let fields = [
            self.inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0,
        ]
        .map(|f| format!("{f:08x}"));
        write!(self.to, "070701{}", fields.concat())?;
        self.to.write_all(name)?;
        // The name ends in at least one zero, and header and name fill words of four.
        pad(&mut self.to, 110 + name.len() + 1, 1)?;
        self.to.write_all(data)?;
        pad(&mut self.to, data.len(), 0)
    }

    fn directory(&mut self, name: &Path) -> io::Result<()> {
        if self.directories.insert(name.to_path_buf()) {
            self.entry(name, DIRECTORY, 2, &[])?;
        }
        Ok(())
    }

    fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.entry(Path::new(name), SYMLINK, 1, target.as_bytes())
    }

    fn file(&mut self, name: &Path, permissions: u32, data: &[u8]) -> io::Result<()> {
        self.entry(name, REGULAR | permissions, 1, data)
    }

    fn copy(&mut self, name: &str, from: &Path) -> Result<()> {
        self.copy_tree(Path::new(name), from)
    }

    /// A file with its permissions, or a directory with what is in it.
    fn copy_tree(&mut self, name: &Path, from: &Path) -> Result<()> {
        let metadata = fs::metadata(from).at("read", from)?;
        if metadata.is_dir() {
            self.directory(name).at("archive", from)?;
            return entries(from)?.iter().try_for_each(|entry| {
                self.copy_tree(&name.join(entry.file_name()), &entry.path())
            });
        }
        if !metadata.is_file() {
            return Err(io::Error::other("not a file or directory")).at("copy", from);
        }
        let data = fs::read(from).at("read", from)?;
        self.file(name, metadata.permissions().mode() & 0o777, &data)
            .at("archive", from)
    }

    /// What is in the directory `name` of `root`, links as they are.
    fn copy_root(&mut self, name: &Path, root: &Path, left_out: &[PathBuf]) -> Result<()> {
        for entry in entries(&root.join(name))? {
            let (name, from) = (name.join(entry.file_name()), entry.path());
            let kind = entry.file_type().at("read", &from)?;
            if left_out.contains(&name) {
                continue;
            }
            if kind.is_dir() {
                self.directory(&name).at("archive", &from)?;
                self.copy_root(&name, root, left_out)?;
            } else if kind.is_symlink() {
                let target = fs::read_link(&from).at("read", &from)?;
                let target = target.as_os_str().as_encoded_bytes();
                self.entry(&name, SYMLINK, 1, target).at("archive", &from)?;
            } else {
                self.copy_tree(&name, &from)?;
            }
        }
        Ok(())
    }

    fn end(mut self) -> io::Result<()> {
        self.entry(Path::new("TRAILER!!!"), 0, 1, &[])?;
        self.to.flush()
    }
}

/// What is in a directory, by name.
fn entries(directory: &Path) -> Result<Vec<fs::DirEntry>> {
    let entries = fs::read_dir(directory).at("read", directory)?;
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    Ok(entries)
}

fn pad(to: &mut impl Write, length: usize, least: usize) -> io::Result<()> {
    let zeros = length.next_multiple_of(4) - length + least;
    to.write_all([0; 4].get(..zeros).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// cpio(1) is not everywhere, so this reads the headers itself.
    #[test]
    fn names_modes_and_data_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("script");
        fs::write(&script, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o750)).unwrap();

        let mut bytes = Vec::new();
        let mut cpio = Cpio::new(&mut bytes);
        cpio.directory(Path::new("root")).unwrap();
        cpio.link("root/link", "target").unwrap();
        cpio.copy_tree(Path::new("root/dir"), directory.path())
            .unwrap();
        cpio.end().unwrap();

        let mut found = Vec::new();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            assert_eq!(&rest[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&rest[6 + 8 * n..14 + 8 * n]).unwrap();
                usize::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let data = (110 + name_size).next_multiple_of(4);
            let name = std::str::from_utf8(&rest[110..110 + name_size - 1]).unwrap();
            assert_eq!(rest[110 + name_size - 1], 0);
            found.push((name.to_owned(), mode, rest[data..data + size].to_vec()));
            rest = &rest[(data + size).next_multiple_of(4)..];
        }
        let names: Vec<_> = found.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "root",
                "root/link",
                "root/dir",
                "root/dir/script",
                "TRAILER!!!"
            ]
        );
        assert_eq!(found[0].1, 0o040_755);
        assert_eq!(
            (found[1].1, found[1].2.as_slice()),
            (0o120_777, b"target".as_slice())
        );
        assert_eq!(
            (found[3].1, found[3].2.as_slice()),
            (0o100_750, b"#!/bin/sh\n".as_slice())
        );
    }

    #[test]
    fn every_applet_of_the_recipe_has_its_directory() {
        let recipe = recipe().unwrap();
        assert!(recipe.directories.contains(&"bin".to_owned()));
        let mut applets = recipe.applets.clone();
        applets.sort();
        applets.dedup();
        assert_eq!(applets.len(), recipe.applets.len());
    }
}
