//! A browser without a screen, in a root directory of its own: the tests look at reports with it.

use std::path::Path;

use crate::error::Result;
use crate::paths::{self, Cache};
use crate::process::capture;
use crate::profile::read_toml;
use crate::report::Report;
use crate::root::Root;

/// The program, in a network namespace where there is nothing, and the options without which
/// it looks for more than there is here.
const PROGRAM: &str = "unshare --net chromium-headless-shell --no-sandbox --disable-gpu \
    --disable-quic --no-first-run --disable-background-networking --disable-component-update \
    --disable-sync --hide-scrollbars";
/// Longest time that it may take for a page, in seconds.
const PATIENCE: u64 = 120;

/// The browser.
#[derive(Debug)]
pub struct Browser(Root);

impl Browser {
    /// Makes it if it is not there.
    ///
    /// # Errors
    /// apt or its mirror fails, or the cache cannot be written.
    pub fn make(cache: &Cache, mirror: Option<&str>, report: Report) -> Result<Self> {
        let recipe = read_toml(&paths::checkout().join("images/browser.toml"))?;
        let root = Root::place(
            "the browser that the tests look at reports with",
            recipe,
            cache,
        );
        root.make(cache, mirror, report)?;
        Ok(Self(root))
    }

    /// Opens the page `name` of `directory` in a window of `width` and `height` pixels, with
    /// further options, and returns what it prints. What it writes is in `directory`.
    ///
    /// # Errors
    /// It cannot be run, or fails.
    pub fn open(
        &self,
        directory: &Path,
        name: &str,
        (width, height): (u32, u32),
        options: &str,
    ) -> Result<String> {
        let script = format!(
            "profile=$(mktemp -d); trap 'rm -rf $profile' EXIT
            timeout {PATIENCE} {PROGRAM} --user-data-dir=$profile --window-size={width},{height} \
            {options} file:///mnt/{name}"
        );
        capture(&mut self.0.enter(directory, &script))
    }
}
