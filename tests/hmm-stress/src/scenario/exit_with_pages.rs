//! Processes end with pages on the device.
//!
//! Shows that their frames are free afterwards, whether they exit, are killed, or are
//! killed in the middle of a migration.

use std::thread;
use std::time::{Duration, Instant};

use virtio_hmm_client::Direction;

use crate::context::Context;
use crate::failure::Failure;
use crate::process::{self, Child};
use crate::require;

/// How long a child may take to put a page onto the device.
const ARRIVAL: Duration = Duration::from_secs(30);

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let mut random = context.random(0);
    let end = context.end();
    loop {
        let free = context.free()?;

        exit(context)?.wait()?;
        context.wait_free(free)?;

        let child = idle(context)?;
        arrived(context, free)?;
        child.kill()?;
        context.wait_free(free)?;

        let child = travel(context)?;
        arrived(context, free)?;
        thread::sleep(Duration::from_micros(random.u64(0..20_000)));
        child.kill()?;
        context.wait_free(free)?;

        if Instant::now() >= end {
            return Ok(());
        }
    }
}

fn arrived(context: &Context, free: u64) -> Result<(), Failure> {
    let end = Instant::now() + ARRIVAL;
    while context.free()? == free {
        require!(
            Instant::now() < end,
            "a child put nothing onto the device in {ARRIVAL:?}"
        );
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// A child that exits at once when its pages are on the device.
fn exit(context: &Context) -> Result<Child, Failure> {
    process::fork(context, |context| {
        let region = context.region(context.pages, 0)?;
        region.fill_all(1);
        context.migrate(region.all(), Direction::ToDevice)?;
        std::mem::forget(region);
        Ok(())
    })
}

/// A child that waits with its pages on the device.
fn idle(context: &Context) -> Result<Child, Failure> {
    process::fork(context, |context| {
        let region = context.region(context.pages, 0)?;
        region.fill_all(1);
        context.migrate(region.all(), Direction::ToDevice)?;
        loop {
            thread::park();
        }
    })
}

/// A child that migrates for ever.
fn travel(context: &Context) -> Result<Child, Failure> {
    process::fork(context, |context| {
        let region = context.region(context.pages, 0)?;
        region.fill_all(1);
        loop {
            context.migrate(region.all(), Direction::ToDevice)?;
            context.migrate(region.all(), Direction::ToSystem)?;
        }
    })
}
