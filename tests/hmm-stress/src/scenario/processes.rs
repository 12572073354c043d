//! Several processes use the device at once, each in its own way.
//!
//! Shows that none sees another's bytes and that none keeps another from its work.

use std::time::Instant;

use virtio_hmm_client::Direction;

use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::Region;

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let processes = context.threads + 1;
    let pages = (context.pages / processes).max(16);
    let children = (0..processes)
        .map(|number| {
            process::fork(context, |context| {
                let region = context.region(pages, number as u64)?;
                churn(context, &region, &mut context.random(number as u64))
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    children.into_iter().try_for_each(process::Child::wait)
}

/// Write, read, discard, fork and migrate at random.
fn churn(context: &Context, region: &Region, random: &mut fastrand::Rng) -> Result<(), Failure> {
    let pages = region.pages();
    let mut generations = vec![0; pages];
    let end = context.end();
    let mut generation = 0;
    while generation == 0 || Instant::now() < end {
        generation += 1;
        let first = random.usize(0..pages);
        let some = first..random.usize(first..pages.min(first + 512)) + 1;
        match random.u8(0..16) {
            0..4 => {
                context.migrate(region.range(some), Direction::ToDevice)?;
            }
            4..6 => {
                context.migrate(region.range(some), Direction::ToSystem)?;
            }
            6..10 => {
                for page in some {
                    region.fill(page, generation);
                    generations[page] = generation;
                }
            }
            10..14 => context.check(region, some, |page| generations[page])?,
            14 => {
                region.discard(some.clone())?;
                generations[some].fill(0);
            }
            _ => process::fork(context, |context| {
                context.check(region, some, |page| generations[page])
            })?
            .wait()?,
        }
    }
    context.check(region, 0..pages, |page| generations[page])
}
