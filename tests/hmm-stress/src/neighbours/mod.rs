//! What the rest of the kernel's memory management does to device pages, and what
//! migration does to its pages.
//!
//! Each test needs one of these neighbours; where the kernel or the machine does not have
//! it, the test is skipped. The tests only need root.

mod counted;
mod soft_dirty;

use crate::suite::{self, Test, tests};

/// All of them, in the order in which they run.
pub const ALL: &[Test] = tests! {
    soft_dirty::survives: "soft_dirty_survives_migration",
        "a page written since clear_refs stays so on the device and back, others stay clean";
};

/// The names of all of them.
pub const NAMES: [&str; ALL.len()] = suite::names(ALL);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        suite::assert_unique(ALL);
    }
}
