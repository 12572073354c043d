//! The model checker: random operations of several processes, and a plain model of what
//! every byte must be.
//!
//! A script is made from a seed, and run. One that fails is made short by running parts of
//! it in fresh processes, and written down so that it can be run again.

mod actors;
mod generate;
mod memory;
mod operation;
mod shrink;
mod state;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use virtio_hmm_client::PAGE_SIZE;

pub use operation::{Operation, PAGES, PROCESSES, Step, read_script};

use actors::{Found, run};
use generate::generate;
use shrink::shrink;

use crate::context::Context;
use crate::failure::Failure;

/// How long a script that fails may be made shorter.
pub const SHRINK_TIME: Duration = Duration::from_secs(60);

/// Run scripts of `steps` steps until the context's duration is over, at least one: the
/// first from `seed`, each other from the next number.
///
/// # Errors
/// What the first script that fails ends with when it was made short.
pub fn explore(context: &Context, seed: u64, steps: usize) -> Result<(), Failure> {
    soil(context)?;
    let end = context.end();
    let mut seed = seed;
    loop {
        let script = generate(seed, steps);
        if let Err(found) = run(Some(context), &script) {
            return Err(shortened(context, seed, script, found));
        }
        seed = seed.wrapping_add(1);
        if Instant::now() >= end {
            return Ok(());
        }
    }
}

/// Run `script` once, as it is.
///
/// # Errors
/// What it ends with.
pub fn replay(context: &Context, script: &[Step]) -> Result<(), Failure> {
    soil(context)?;
    run(Some(context), script).map_err(|found| Failure::Broken(found.to_string()))
}

/// Leave other bytes in all of device memory, so that what is not cleared is not zero.
fn soil(context: &Context) -> Result<(), Failure> {
    let frames = context.free()? / PAGE_SIZE as u64;
    context.soil(usize::try_from(frames).unwrap_or(0))
}

/// Make a script that failed short, print it and write it to a file.
fn shortened(context: &Context, seed: u64, mut script: Vec<Step>, found: Found) -> Failure {
    eprintln!("seed {seed}: {found}; making it shorter");
    script.truncate(found.index + 1);
    let mut last = found;
    let script = shrink(script, Instant::now() + SHRINK_TIME, |candidate| match run(
        Some(context),
        candidate,
    ) {
        Ok(()) => false,
        Err(found) => {
            last = found;
            true
        }
    });
    let mut text = format!("# seed {seed}: {last}\n");
    for step in &script {
        text += &format!("{step}\n");
    }
    eprint!("{text}");
    let path = PathBuf::from(format!("hmm-model-{seed}"));
    let place = match fs::write(&path, text) {
        Ok(()) => format!("in {}", path.display()),
        Err(error) => format!("not written to {}: {error}", path.display()),
    };
    Failure::Broken(format!(
        "seed {seed}: {last}; script of {} steps {place}",
        script.len()
    ))
}
