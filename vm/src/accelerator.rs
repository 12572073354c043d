//! KVM where a guest really runs on it, TCG everywhere else.
//!
//! `/dev/kvm` can open and still be of no use, so the question is settled by a
//! guest: the kernel and init that every run uses. The answer holds until the
//! host boots again.

use std::fmt;
use std::fs;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::error::{FileContext, Result};
use crate::paths::Cache;

/// What the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// KVM if it works, else TCG.
    #[default]
    Auto,
    /// KVM or an error.
    Kvm,
    /// TCG.
    Tcg,
}

/// What a machine runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The host's hardware.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// The remembered answer.
#[derive(Debug, Serialize, Deserialize)]
struct Verdict {
    host_boot: String,
    toolbox: String,
    /// Why KVM does not work; nothing if it does.
    failure: Option<String>,
}

const DEVICE: &str = "/dev/kvm";

/// Why KVM does not work here, `None` if it does; `probe` boots the guest that settles it.
///
/// # Errors
/// The probe was interrupted.
pub fn kvm_failure(
    cache: &Cache,
    toolbox: &str,
    probe: impl FnOnce() -> Result<()>,
) -> Result<Option<String>> {
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open(DEVICE) {
        return Ok(Some(format!("{DEVICE} cannot be opened: {error}")));
    }
    if let Some(verdict) = remembered(cache, toolbox) {
        return Ok(verdict.failure);
    }
    let failure = match probe() {
        Ok(()) => None,
        Err(error) if error.is_interruption() => return Err(error),
        Err(error) => {
            let text = error.to_string();
            Some(format!(
                "no guest runs on it here: {}",
                text.lines().next().unwrap_or("it ended without a word")
            ))
        }
    };
    let verdict = Verdict {
        host_boot: host_boot(),
        toolbox: toolbox.to_owned(),
        failure,
    };
    let path = cache.accelerator();
    let json = serde_json::to_vec(&verdict)
        .map_err(std::io::Error::from)
        .at("write", &path)?;
    fs::write(&path, json).at("write", &path)?;
    Ok(verdict.failure)
}

/// What an earlier probe found on this boot of the host: `None` if there was none.
#[must_use]
pub fn remembered_kvm(cache: &Cache, toolbox: &str) -> Option<Option<String>> {
    remembered(cache, toolbox).map(|verdict| verdict.failure)
}

fn remembered(cache: &Cache, toolbox: &str) -> Option<Verdict> {
    let verdict: Verdict = serde_json::from_slice(&fs::read(cache.accelerator()).ok()?).ok()?;
    (verdict.host_boot == host_boot() && verdict.toolbox == toolbox).then_some(verdict)
}

fn host_boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}
