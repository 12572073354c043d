//! Kernels beside the stock one: Debian's build of another release, or Debian's source with
//! a configuration of this checkout, which is built here.
//!
//! Each is in a root directory of its own, with what compiled it and compiles modules for it.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde::Deserialize;

use crate::error::{Error, FileContext, Result};
use crate::kernel::Kernel;
use crate::paths::{self, Cache, lock, remove_all};
use crate::process::{capture, die_with_parent, tail};
use crate::profile::read_toml;
use crate::report::Report;
use crate::root::{Recipe, Root, kernel_source};

/// Lies in a tree once it is built.
const DONE: &str = "virtio-hmm-built";
/// make's messages, in the tree.
const LOG: &str = "virtio-hmm-build.log";
/// How often the progress is told where there is no terminal for a bar.
const TELL: Duration = Duration::from_secs(60);

/// `images/kernels.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipes {
    root: Recipe,
    kernels: BTreeMap<String, KernelRecipe>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KernelRecipe {
    packages: Vec<String>,
    #[serde(default)]
    config: Vec<String>,
    #[serde(default)]
    edits: Vec<Edit>,
}

/// Something wrong in the source.
#[derive(Clone, Debug, Hash, Deserialize)]
#[serde(deny_unknown_fields)]
struct Edit {
    file: PathBuf,
    /// What is wrong, once in the file; a source that is right does not have it.
    from: String,
    to: String,
}

fn recipes() -> Result<Recipes> {
    read_toml(&paths::checkout().join("images/kernels.toml"))
}

/// The names that there are.
///
/// # Errors
/// The recipes cannot be read.
pub fn names() -> Result<BTreeSet<String>> {
    Ok(recipes()?.kernels.into_keys().collect())
}

/// A kernel of `images/kernels.toml`.
#[derive(Debug)]
pub struct NamedKernel {
    name: String,
    root: Root,
    /// What has to be built; a package of the root has the kernel otherwise.
    build: Option<Build>,
}

/// A kernel that is built from its source.
#[derive(Debug)]
struct Build {
    config: String,
    edits: Vec<Edit>,
    /// The tree on the host. The root holds one version of the source, and a tree for each
    /// configuration.
    tree: PathBuf,
    /// The same in the root directory.
    inside: PathBuf,
}

impl NamedKernel {
    /// Where it is, or will be.
    ///
    /// # Errors
    /// It has no recipe, or that cannot be read.
    pub fn find(name: &str, cache: &Cache) -> Result<Self> {
        let Recipes { mut root, kernels } = recipes()?;
        let known = kernels.keys().cloned().collect::<Vec<_>>().join(", ");
        let Some(recipe) = kernels.into_iter().find(|(other, _)| other == name) else {
            return Err(Error::Config(format!(
                "no kernel {name}; there are: stock, {known}"
            )));
        };
        let KernelRecipe {
            packages,
            config,
            edits,
        } = recipe.1;
        root.packages.extend(packages);
        let what = format!("the place of kernel {name}");
        let root = Root::place(&what, root, cache);
        let directory = paths::checkout().join("images/kernels");
        let fragments = config
            .iter()
            .map(|file| directory.join(file))
            .map(|path| fs::read_to_string(&path).at("read", &path))
            .collect::<Result<Vec<_>>>()?;
        let build =
            (!fragments.is_empty()).then(|| Build::place(name, fragments.concat(), edits, &root));
        Ok(Self {
            name: name.to_owned(),
            root,
            build,
        })
    }

    /// Directory that has it, or will have.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.build
            .as_ref()
            .map_or(self.root.path(), |build| &build.tree)
    }

    /// The kernel, if it has been made.
    ///
    /// # Errors
    /// It is not as it was left.
    pub fn made(&self) -> Result<Option<Kernel>> {
        let made = match &self.build {
            Some(build) => build.done().exists(),
            None => self.root.is_made(),
        };
        made.then(|| self.kernel()).transpose()
    }

    /// Makes it if it is not there. A build that was interrupted goes on where it was.
    ///
    /// # Errors
    /// Its packages cannot be fetched, or the build fails.
    pub fn make(&self, cache: &Cache, mirror: Option<&str>, report: Report) -> Result<Kernel> {
        self.root.make(cache, mirror, report)?;
        if let Some(build) = &self.build
            && !build.done().exists()
        {
            // Not the cache's: other runs need not wait for this long build.
            let _lock = lock(&build.tree.with_extension("lock"), report)?;
            if !build.done().exists() {
                build.make(&self.name, &self.root, report)?;
            }
        }
        self.kernel()
    }

    fn kernel(&self) -> Result<Kernel> {
        let Some(build) = &self.build else {
            return Kernel::of_root(&self.root);
        };
        let mut kernel = Kernel::of_tree(&build.tree)?;
        kernel.build.clone_from(&build.inside);
        kernel.root = Some(self.root.clone());
        Ok(kernel)
    }
}

impl Build {
    fn place(name: &str, config: String, edits: Vec<Edit>, root: &Root) -> Self {
        let mut hasher = DefaultHasher::new();
        config.hash(&mut hasher);
        for edit in &edits {
            edit.hash(&mut hasher);
        }
        let tree = format!("usr/src/{name}-{:016x}", hasher.finish());
        Self {
            config,
            edits,
            tree: root.path().join(&tree),
            inside: Path::new("/").join(&tree),
        }
    }

    fn done(&self) -> PathBuf {
        self.tree.join(DONE)
    }

    fn make(&self, name: &str, root: &Root, report: Report) -> Result<()> {
        if !self.tree.exists() {
            self.unpack(name, root, report)?;
        }
        self.edit()?;
        self.configure(root)?;
        report.line(&format!(
            "building kernel {name}, which takes minutes, once (its log: {})",
            self.tree.join(LOG).display()
        ));
        let started = Instant::now();
        self.compile(root, report)?;
        fs::write(self.done(), "").at("write", self.done())?;
        report.line(&format!(
            "kernel {name} is ready, after {} s",
            started.elapsed().as_secs()
        ));
        Ok(())
    }

    fn unpack(&self, name: &str, root: &Root, report: Report) -> Result<()> {
        report.line(&format!("unpacking the source of kernel {name}"));
        let spinner = report.spinner();
        let partial = self.tree.with_extension("partial");
        remove_all(&partial)?;
        fs::create_dir_all(&partial).at("create", &partial)?;
        capture(
            Command::new("tar")
                .arg("--extract")
                .arg("--file")
                .arg(kernel_source(root.path())?)
                .arg("--directory")
                .arg(&partial)
                .arg("--strip-components=1")
                // A third of the source, and none of it is built here.
                .arg("--exclude=*/drivers/gpu/drm/amd/include"),
        )?;
        spinner.finish_and_clear();
        fs::rename(&partial, &self.tree).at("create", &self.tree)
    }

    fn edit(&self) -> Result<()> {
        for Edit { file, from, to } in &self.edits {
            let path = self.tree.join(file);
            let text = fs::read_to_string(&path).at("read", &path)?;
            if text.contains(from) {
                fs::write(&path, text.replacen(from, to, 1)).at("write", &path)?;
            }
        }
        Ok(())
    }

    /// The smallest configuration and the fragments, all of which have to have their way.
    fn configure(&self, root: &Root) -> Result<()> {
        let path = self.tree.join(".config");
        let run = |script: &str| capture(&mut root.enter(&self.tree, script));
        let read = || fs::read_to_string(&path).at("read", &path);
        run("make --silent tinyconfig")?;
        fs::write(&path, format!("{}\n{}", read()?, self.config)).at("write", &path)?;
        run("make --silent olddefconfig")?;
        let result = read()?;
        let refused = refused(&self.config, &result);
        if refused.is_empty() {
            Ok(())
        } else {
            Err(Error::Config(format!(
                "the kernel's configuration refuses {}",
                refused.join(", ")
            )))
        }
    }

    fn compile(&self, root: &Root, report: Report) -> Result<()> {
        let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let script = format!("make -j{jobs} bzImage modules 2>&1");
        let failed = |source| Error::Start {
            program: "unshare".into(),
            source,
        };
        let mut child = die_with_parent(&mut root.enter(&self.tree, &script), Signal::KILL)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let path = self.tree.join(LOG);
        let mut log = fs::File::create(&path).at("create", &path)?;
        let mut told = Instant::now();
        let mut lines = 0_u64;
        let spinner = report.spinner();
        for line in child
            .stdout
            .take()
            .map(BufReader::new)
            .into_iter()
            .flat_map(BufRead::lines)
        {
            let line = line.at("read from", "make")?;
            writeln!(log, "{line}").at("write", &path)?;
            lines += 1;
            spinner.set_message(format!("{lines} {}", line.trim()));
            if spinner.is_hidden() && told.elapsed() > TELL {
                report.line(&format!("{lines} steps of the build are done"));
                told = Instant::now();
            }
        }
        spinner.finish_and_clear();
        let status = child.wait().map_err(failed)?;
        if status.success() {
            return Ok(());
        }
        let text = fs::read_to_string(&path).unwrap_or_default();
        Err(Error::Command {
            program: "make".into(),
            status,
            output: format!("{}\n(all of it: {})", tail(&text, 30), path.display()),
        })
    }
}

/// Lines of the fragments that are not so in the whole configuration.
fn refused<'a>(fragments: &'a str, config: &str) -> Vec<&'a str> {
    let set: BTreeSet<&str> = config.lines().collect();
    let is_set = |name: &str| {
        set.iter().any(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with('='))
        })
    };
    fragments
        .lines()
        .filter(|line| line.starts_with("CONFIG_"))
        .filter(|line| match line.strip_suffix("=n") {
            Some(name) => is_set(name),
            None => !set.contains(line),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_that_the_kernel_drops_is_found() {
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=m\nCONFIG_DD=y\n";
        assert!(refused("# why\nCONFIG_A=y\nCONFIG_B=n\nCONFIG_D=n\n", config).is_empty());
        assert_eq!(
            refused("CONFIG_A=n\nCONFIG_B=y\nCONFIG_C=y\n", config),
            ["CONFIG_A=n", "CONFIG_B=y", "CONFIG_C=y"]
        );
    }

    #[test]
    fn every_recipe_of_the_checkout_is_valid() {
        let cache = Cache::locate().unwrap();
        for name in names().unwrap() {
            NamedKernel::find(&name, &cache).unwrap();
        }
        let error = NamedKernel::find("nonesuch", &cache).unwrap_err();
        assert!(error.to_string().contains("debug"), "{error}");
    }
}
