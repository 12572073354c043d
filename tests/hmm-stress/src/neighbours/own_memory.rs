//! All of a process's own memory: program, data, heap and stack, while it runs on it.

use std::hint;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency, Skip};

use super::mappings::mappings;
use crate::context::Context;
use crate::failure::Failure;
use crate::pattern::{Pattern, WORDS};
use crate::process;
use crate::require;

/// What the child's heap and stack hold.
const BOXES: usize = 600;
const BOX_WORDS: usize = 128;
const DEPTH: u64 = 200;

/// In the program's data, which is written and then its own.
static DATA: AtomicU64 = AtomicU64::new(0);

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    process::fork(context, child)?.wait()
}

fn child(context: &Context) -> Result<(), Failure> {
    let heap: Vec<Box<[u64; BOX_WORDS]>> = (0..BOXES as u64)
        .map(|number| Box::new(words(number)))
        .collect();
    for round in 0..6 {
        DATA.store(round, Ordering::SeqCst);
        let sum = deep(DEPTH, &mut || everywhere(context, round))?;
        require!(sum == DEPTH * (DEPTH + 1) / 2, "the stack holds {sum}");
        require!(
            DATA.load(Ordering::SeqCst) == round,
            "the program's data changed"
        );
        for (number, words_of_box) in heap.iter().enumerate() {
            require!(
                **words_of_box == words(number as u64),
                "box {number} of the heap changed"
            );
        }
    }
    Ok(())
}

fn words(number: u64) -> [u64; BOX_WORDS] {
    let mut pattern = Pattern::new(1, number, 1).words();
    std::array::from_fn(|_| pattern.next().unwrap_or(0))
}

/// Call `body` from deep down on the stack, all of which is looked at on the way back.
fn deep(depth: u64, body: &mut dyn FnMut() -> Result<(), Failure>) -> Result<u64, Failure> {
    let frame = hint::black_box([depth; WORDS / 4]);
    let below = if depth == 0 {
        body()?;
        0
    } else {
        deep(depth - 1, body)?
    };
    let frame = hint::black_box(frame);
    require!(
        frame.iter().all(|&word| word == depth),
        "a frame of the stack changed at depth {depth}"
    );
    Ok(below + depth)
}

/// Migrate every mapping of the process, whatever it is.
fn everywhere(context: &Context, round: u64) -> Result<(), Failure> {
    let mut moved = 0;
    for mapping in mappings()? {
        // The vsyscall page is in no process's part of the address space. What may not be
        // touched is reserved for later, and would fill device memory.
        if mapping.name == "[vsyscall]" || mapping.permissions.starts_with("---") {
            continue;
        }
        let direction = if round % 3 == 2 {
            Direction::ToSystem
        } else {
            Direction::ToDevice
        };
        // The list of mappings may have changed since.
        let outcome = context.migrate_mapped(mapping.range.clone(), direction)?;
        moved += outcome.moved;
        let own = ["[heap]", "[stack]"].contains(&&*mapping.name);
        if own && direction == Direction::ToDevice {
            let pages = (mapping.range.len() / PAGE_SIZE) as u64;
            let on_device = outcome.moved + outcome.filled + outcome.skipped(Skip::Already);
            let residency = context.device.query(mapping.range)?;
            let seen = residency
                .iter()
                .filter(|&&seen| seen == Residency::Device)
                .count() as u64;
            // What runs here fetches some of them back at once.
            require!(
                on_device * 4 > pages * 3 && seen * 4 > pages * 3,
                "{}: {seen} of {pages} pages are on the device: {outcome:?}",
                mapping.name
            );
        }
    }
    require!(moved > 0, "nothing of the process moved");
    Ok(())
}
