//! The mappings of this process, from /proc/self/maps.

use std::fs;
use std::ops::Range;

use crate::failure::Failure;

/// A line of /proc/self/maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    /// Its addresses.
    pub range: Range<usize>,
    /// "rw-p" and the like.
    pub permissions: String,
    /// The file, or a name in brackets, or nothing.
    pub name: String,
}

/// All mappings, in the order of their addresses.
pub(super) fn mappings() -> Result<Vec<Mapping>, Failure> {
    let text = fs::read_to_string("/proc/self/maps").map_err(|source| Failure::System {
        call: "reading /proc/self/maps",
        source,
    })?;
    text.lines()
        .map(|line| parse(line).ok_or_else(|| Failure::Broken(format!("not a mapping: {line:?}"))))
        .collect()
}

fn parse(line: &str) -> Option<Mapping> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let start = usize::from_str_radix(start, 16).ok()?;
    let end = usize::from_str_radix(end, 16).ok()?;
    let permissions = words.next()?.to_owned();
    // Offset, device and inode come before the name.
    let name = words.nth(3).unwrap_or_default().to_owned();
    Some(Mapping {
        range: start..end,
        permissions,
        name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood() {
        let stack = parse("7ffc0000-7ffc2000 rw-p 00000000 00:00 0    [stack]").unwrap();
        assert_eq!(stack.range, 0x7ffc_0000..0x7ffc_2000);
        assert_eq!((&*stack.permissions, &*stack.name), ("rw-p", "[stack]"));
        assert_eq!(parse("1000-2000 r--p 0 00:00 0").unwrap().name, "");
        assert_eq!(parse("1000 r--p"), None);
    }

    #[test]
    fn this_process_has_a_stack() {
        let local = 0u8;
        let here = &raw const local as usize;
        let all = mappings().unwrap();
        assert!(all.iter().any(|mapping| mapping.name == "[stack]"));
        assert!(all.iter().any(|mapping| mapping.range.contains(&here)));
    }
}
