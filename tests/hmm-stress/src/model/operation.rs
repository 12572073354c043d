//! One step of a script, and how it is written down: `0 write 3..9 7` has process 0
//! write generation 7 to its pages 3 to 8.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::region::{Access, PMD_PAGES};

/// Pages of memory that each process has.
pub const PAGES: usize = 2 * PMD_PAGES;

/// Processes that may live at once, numbered from 0. Process 0 is the first.
pub const PROCESSES: usize = 4;

/// What a process does, mostly with a range of its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read and compare every byte that may be read.
    Read,
    /// Write this generation to every byte that may be written.
    Write(u64),
    /// Change one word of each page that may be written.
    Poke(u64),
    /// Migrate to the device.
    ToDevice,
    /// Migrate to RAM.
    ToRam,
    /// Bring home whatever is on the device.
    Release,
    /// Bring home all that this process has brought to the device.
    ReleaseAll,
    /// Let this process have so many pages on the device, 0 for as many as it likes.
    Limit(u64),
    /// Compare where the pages are with where they may be.
    Query,
    /// Change what may be done with mapped pages.
    Protect(Access),
    /// Unmap.
    Unmap,
    /// Map fresh memory wherever none is.
    Map,
    /// Move to the pages that start with this one, in place of what is there.
    Move(usize),
    /// Throw the contents away.
    Discard,
    /// Ask the kernel to swap the pages out.
    SwapOut,
    /// Allow huge pages.
    Huge,
    /// Forbid new huge pages.
    Small,
    /// Ask for huge pages now.
    Collapse,
    /// Fork the process of this number.
    Fork(usize),
    /// End, with whatever is on the device.
    Exit,
}

impl Operation {
    /// Whether it concerns the whole process, and has no pages of its own.
    #[must_use]
    pub fn is_of_all(self) -> bool {
        matches!(
            self,
            Self::ReleaseAll | Self::Limit(_) | Self::Fork(_) | Self::Exit
        )
    }
}

/// One operation of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Who does it.
    pub process: usize,
    /// What is done.
    pub operation: Operation,
    /// Pages that it is done with; empty for those that concern the whole process.
    pub pages: Range<usize>,
}

impl Step {
    /// The same step for `pages`, a part of its pages; what moves then moves to where it
    /// did before.
    #[must_use]
    pub fn narrowed(&self, pages: Range<usize>) -> Self {
        let operation = match self.operation {
            Operation::Move(to) => Operation::Move(to + pages.start - self.pages.start),
            operation => operation,
        };
        Self {
            process: self.process,
            operation,
            pages,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (verb, argument) = match self.operation {
            Operation::Read => ("read", None),
            Operation::Write(generation) => ("write", Some(generation.to_string())),
            Operation::Poke(generation) => ("poke", Some(generation.to_string())),
            Operation::ToDevice => ("to-device", None),
            Operation::ToRam => ("to-ram", None),
            Operation::Release => ("release", None),
            Operation::ReleaseAll => ("release-all", None),
            Operation::Limit(pages) => ("limit", Some(pages.to_string())),
            Operation::Query => ("query", None),
            Operation::Protect(Access::None) => ("protect", Some("none".into())),
            Operation::Protect(Access::Read) => ("protect", Some("read".into())),
            Operation::Protect(Access::Write) => ("protect", Some("write".into())),
            Operation::Unmap => ("unmap", None),
            Operation::Map => ("map", None),
            Operation::Move(to) => ("move", Some(to.to_string())),
            Operation::Discard => ("discard", None),
            Operation::SwapOut => ("swap-out", None),
            Operation::Huge => ("huge", None),
            Operation::Small => ("small", None),
            Operation::Collapse => ("collapse", None),
            Operation::Fork(child) => ("fork", Some(child.to_string())),
            Operation::Exit => ("exit", None),
        };
        write!(f, "{} {verb}", self.process)?;
        if !self.pages.is_empty() {
            write!(f, " {}..{}", self.pages.start, self.pages.end)?;
        }
        argument.map_or(Ok(()), |argument| write!(f, " {argument}"))
    }
}

impl FromStr for Step {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        parse(line).ok_or_else(|| format!("not a step: {line:?}"))
    }
}

fn parse(line: &str) -> Option<Step> {
    let mut words = line.split_whitespace();
    let process = words.next()?.parse().ok().filter(|&n| n < PROCESSES)?;
    let verb = words.next()?;
    let pages = match verb {
        "fork" | "exit" | "release-all" | "limit" => 0..0,
        _ => {
            let (start, end) = words.next()?.split_once("..")?;
            start.parse().ok()?..end.parse().ok()?
        }
    };
    let operation = match verb {
        "read" => Operation::Read,
        "write" => Operation::Write(words.next()?.parse().ok()?),
        "poke" => Operation::Poke(words.next()?.parse().ok()?),
        "to-device" => Operation::ToDevice,
        "to-ram" => Operation::ToRam,
        "release" => Operation::Release,
        "release-all" => Operation::ReleaseAll,
        "limit" => Operation::Limit(words.next()?.parse().ok()?),
        "query" => Operation::Query,
        "protect" => Operation::Protect(match words.next()? {
            "none" => Access::None,
            "read" => Access::Read,
            "write" => Access::Write,
            _ => return None,
        }),
        "unmap" => Operation::Unmap,
        "map" => Operation::Map,
        "move" => Operation::Move(
            words
                .next()?
                .parse()
                .ok()
                .filter(|&to| may_move(&pages, to))?,
        ),
        "discard" => Operation::Discard,
        "swap-out" => Operation::SwapOut,
        "huge" => Operation::Huge,
        "small" => Operation::Small,
        "collapse" => Operation::Collapse,
        "fork" => Operation::Fork(
            words
                .next()?
                .parse()
                .ok()
                .filter(|&child| child < PROCESSES)?,
        ),
        "exit" => Operation::Exit,
        _ => return None,
    };
    let complete = words.next().is_none();
    let in_memory = operation.is_of_all() || (pages.start < pages.end && pages.end <= PAGES);
    (complete && in_memory).then_some(Step {
        process,
        operation,
        pages,
    })
}

/// Whether `pages` can move to those that start with `to`: not over themselves, and not
/// beyond the end.
pub(super) fn may_move(pages: &Range<usize>, to: usize) -> bool {
    let Some(end) = to.checked_add(pages.len()) else {
        return false;
    };
    end <= PAGES && (end <= pages.start || pages.end <= to)
}

/// Read a script: one step a line. Empty lines and those that start with # are left out.
///
/// # Errors
/// The first line that is no step.
pub fn read_script(text: &str) -> Result<Vec<Step>, String> {
    text.lines()
        .filter(|line| !line.trim().is_empty() && !line.starts_with('#'))
        .map(str::parse)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_come_back_as_they_were() {
        let text = "0 write 3..9 7\n1 poke 0..1 8\n0 to-device 0..1024\n0 to-ram 1..2\n\
                    0 protect 1..2 none\n0 protect 1..2 read\n0 protect 1..2 write\n\
                    0 unmap 5..6\n0 map 5..6\n0 move 0..512 512\n0 discard 1..2\n\
                    0 swap-out 1..2\n0 huge 1..2\n0 small 1..2\n0 collapse 1..2\n\
                    0 query 1..2\n3 fork 1\n1 exit\n0 read 0..1024\n\
                    0 release 1..2\n0 release-all\n0 limit 600";
        let script = read_script(&format!("# a comment\n\n{text}\n")).unwrap();
        let lines: Vec<String> = script.iter().map(Step::to_string).collect();
        assert_eq!(lines.join("\n"), text);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in [
            "",
            "0",
            "4 exit",
            "0 read",
            "0 read 1",
            "0 read 2..2",
            "0 read 3..2",
            "0 read 0..1025",
            "0 read 0..1 2",
            "0 write 0..1",
            "0 write 0..1 -1",
            "0 protect 0..1 exec",
            "0 move 0..2 1",
            "0 move 0..2 1023",
            "0 move 0..2 18446744073709551615",
            "0 fork 4",
            "0 fork 1 2",
            "0 exit 1",
            "0 release",
            "0 release-all 0..1",
            "0 limit",
            "0 limit -1",
            "0 jump 0..1",
        ] {
            assert!(line.parse::<Step>().is_err(), "{line}");
        }
    }

    #[test]
    fn a_narrowed_move_moves_to_the_same_places() {
        let step: Step = "0 move 4..8 40".parse().unwrap();
        assert_eq!(step.narrowed(6..7).to_string(), "0 move 6..7 42");
    }
}
