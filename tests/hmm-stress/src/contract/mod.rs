//! One test for each clause of the `migrate_vma` contract, S6 in all its forms.
//!
//! | clause | what the driver owes |
//! |---|---|
//! | S1 | it touches only pages that were locked, unmapped and found free of pins |
//! | S2 | it hands in destination pages locked and with one reference |
//! | S3 | it may leave pages where they are, and then they are as they were |
//! | S4 | no page is lost to SIGBUS while the device works |
//! | S5 | it changes no source entry |
//! | S6 | pages that were never allocated become zero-filled device pages, without a copy |

mod s1;
mod s2;
mod s3;
mod s4;
mod s5;
mod s6;

use crate::context::Context;
use crate::failure::Failure;
use crate::suite::{self, Test, tests};

/// All of them, in the order in which they run.
pub const ALL: &[Test] = tests! {
    s1::referenced: "s1_only_migrating_entries_are_touched",
        "pages that a pipe refers to stay, and nothing is copied for them";
    s1::pinned: "s1_pinned_entries_are_not_touched",
        "pages pinned for DMA stay, and what DMA writes later is seen";
    s2::run: "s2_destination_is_locked_and_referenced_once",
        "migrated pages can be faulted, forked, migrated again and freed";
    s3::touched: "s3_partial_migration_leaves_the_rest",
        "what does not fit into device memory stays in RAM";
    s3::holes: "s3_holes_that_do_not_fit_stay_holes",
        "holes for which there is no device memory stay holes";
    s4::run: "s4_no_sigbus_while_the_device_works",
        "no SIGBUS when faults race with migration, discarding, munmap and fork";
    s5::run: "s5_source_entries_are_unchanged",
        "source entries stay as setup left them, and each page does as it was";
    s6::whole_range: "s6_whole_range_never_touched",
        "a range of small pages that nothing touched";
    s6::every_other: "s6_every_other_page_touched",
        "holes and pages in turn";
    s6::zero_page: "s6_read_only_touched",
        "pages that were only read: the shared zero page";
    s6::huge_hole: "s6_huge_hole",
        "an aligned 2 MiB hole, small and huge pages";
    s6::no_page_table: "s6_huge_hole_without_page_table",
        "holes in an untouched 1 GiB, where there is no page table at all";
    s6::huge_zero_page: "s6_huge_zero_page",
        "an aligned 2 MiB that was only read: the huge zero page";
    s6::batch_start: "s6_hole_at_batch_start",
        "a hole in the first pages of a batch";
    s6::batch_end: "s6_hole_at_batch_end",
        "a hole in the last pages of a batch";
    s6::one_page: "s6_single_hole",
        "one hole by itself";
    s6::read_only_mapping: "s6_hole_in_read_only_mapping",
        "holes where the process may only read";
    s6::fork_before_touch: "s6_fork_before_first_touch",
        "holes that parent and child each migrate after fork";
    s6::fork_after_fill: "s6_fork_after_fill",
        "filled holes that parent and child share";
    s6::holes_on_the_way_back: "s6_holes_on_the_way_back_stay_holes",
        "holes that a migration to RAM meets";
};

/// The names of all contract tests.
pub const NAMES: [&str; ALL.len()] = suite::names(ALL);

/// The clause that a contract test is about, "S1" to "S6".
#[must_use]
pub fn clause(test: &Test) -> String {
    test.name.chars().take(2).collect::<String>().to_uppercase()
}

/// How much each of the counters `names` of the device changed while `body` ran.
pub(crate) fn device_change(
    context: &Context,
    names: &[&str],
    body: impl FnOnce() -> Result<(), Failure>,
) -> Result<Vec<i64>, Failure> {
    let before = context.device_counters()?;
    body()?;
    let change = context.device_counters()?.since(&before);
    names
        .iter()
        .map(|&name| {
            change
                .get(name)
                .copied()
                .ok_or_else(|| Failure::Broken(format!("the device does not count {name}")))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_clause_has_a_test_and_names_are_unique() {
        for clause in ["S1", "S2", "S3", "S4", "S5", "S6"] {
            assert!(
                ALL.iter().any(|test| super::clause(test) == clause),
                "{clause}"
            );
        }
        suite::assert_unique(ALL);
    }
}
