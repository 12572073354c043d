//! Random scripts.

use std::ops::Range;

use fastrand::Rng;

use super::operation::{Operation, PAGES, PROCESSES, Step, may_move};
use crate::region::{Access, PMD_PAGES};

/// Where many short ranges lie, so that they meet: on both sides of a 2 MiB boundary.
const HOT: Range<usize> = PMD_PAGES - 16..PMD_PAGES + 16;

/// Steps after which all processes compare all their memory.
const CHECK_EVERY: usize = 128;

/// A script of `steps` steps, beside those that compare everything; the same for the same
/// seed. Half of all seeds have huge pages from the start.
pub(super) fn generate(seed: u64, steps: usize) -> Vec<Step> {
    let mut random = Rng::with_seed(seed);
    let mut alive = [false; PROCESSES];
    alive[0] = true;
    let mut script = Vec::new();
    // Later there is hardly a mapping left that is large enough.
    if random.bool() {
        script.push(Step {
            process: 0,
            operation: Operation::Huge,
            pages: 0..PAGES,
        });
    }
    for number in 1..=steps {
        let living: Vec<usize> = (0..PROCESSES).filter(|&p| alive[p]).collect();
        let process = living[random.usize(0..living.len())];
        let step = step(&mut random, process, number, &alive);
        match step.operation {
            Operation::Fork(child) => alive[child] = true,
            Operation::Exit => alive[process] = false,
            _ => {}
        }
        script.push(step);
        if number % CHECK_EVERY == 0 {
            script.extend((0..PROCESSES).filter(|&p| alive[p]).map(read_all));
        }
    }
    script
}

/// The step in which `process` compares all its memory.
pub(super) fn read_all(process: usize) -> Step {
    Step {
        process,
        operation: Operation::Read,
        pages: 0..PAGES,
    }
}

fn step(random: &mut Rng, process: usize, number: usize, alive: &[bool; PROCESSES]) -> Step {
    let pages = range(random);
    let generation = number as u64;
    let operation = match random.u8(0..100) {
        0..12 => Operation::Read,
        12..24 => Operation::Write(generation),
        24..32 => Operation::Poke(generation),
        32..54 => Operation::ToDevice,
        54..59 => Operation::ToRam,
        59..61 => Operation::Release,
        61 => Operation::ReleaseAll,
        62..66 => Operation::Query,
        66 => Operation::Limit([0, 8, 64, 600][random.usize(0..4)]),
        67..74 => Operation::Protect(match random.u8(0..6) {
            0 => Access::None,
            1 | 2 => Access::Read,
            _ => Access::Write,
        }),
        74..77 => Operation::Unmap,
        77..82 => Operation::Map,
        82..86 => {
            let to = random.usize(0..PAGES);
            // Half of them keep their place in a page table, so that it can move whole.
            let other = (pages.start + PMD_PAGES) % PAGES;
            match [to, other][random.usize(0..2)] {
                to if may_move(&pages, to) => Operation::Move(to),
                _ => Operation::Query,
            }
        }
        86..90 => Operation::Discard,
        90..92 => Operation::SwapOut,
        92..94 => Operation::Huge,
        94 => Operation::Small,
        95 => Operation::Collapse,
        96..98 => match alive.iter().position(|alive| !alive) {
            Some(child) => Operation::Fork(child),
            None => Operation::Read,
        },
        _ if alive.iter().filter(|&&alive| alive).count() > 1 => Operation::Exit,
        _ => Operation::Read,
    };
    let pages = match operation {
        _ if operation.is_of_all() => 0..0,
        // No other range can become a huge page.
        Operation::Huge | Operation::Collapse => pmd(random),
        _ => pages,
    };
    Step {
        process,
        operation,
        pages,
    }
}

fn range(random: &mut Rng) -> Range<usize> {
    let (within, longest) = match random.u8(0..16) {
        0..9 => (HOT, 8),
        9..12 => (HOT, HOT.len()),
        12..14 => (0..PAGES, 64),
        14 => (0..PAGES, PAGES),
        _ => return pmd(random),
    };
    let length = random.usize(1..=longest);
    let start = random.usize(within.start..=within.end - length);
    start..start + length
}

/// The pages of one page table.
fn pmd(random: &mut Rng) -> Range<usize> {
    let start = random.usize(0..PAGES / PMD_PAGES) * PMD_PAGES;
    start..start + PMD_PAGES
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::operation::read_script;

    #[test]
    fn a_seed_makes_one_script() {
        assert_eq!(generate(5, 500), generate(5, 500));
        assert_ne!(generate(5, 500), generate(6, 500));
    }

    #[test]
    fn scripts_are_valid_and_have_every_operation() {
        let script = generate(1, 5000);
        let text: String = script.iter().map(|step| format!("{step}\n")).collect();
        assert_eq!(read_script(&text).unwrap(), script);
        for verb in [
            "read",
            "write",
            "poke",
            "to-device",
            "to-ram",
            "query",
            "protect",
            "unmap",
            "map",
            "move",
            "discard",
            "swap-out",
            "huge",
            "small",
            "collapse",
            "fork",
            "exit",
        ] {
            let found = |line: &str| line.split(' ').nth(1) == Some(verb);
            assert!(text.lines().any(found), "{verb}");
        }
    }
}
