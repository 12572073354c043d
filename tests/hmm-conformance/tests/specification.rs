//! Cases and statements of the specification belong together.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use hmm_conformance::cases::{self, NOT_TESTED};

/// The numbers of the statements, like D15, each of which begins an item of a list.
fn statements() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let text = fs::read_to_string(root.join("docs/device-specification.md")).unwrap();
    let item = |line: &str| {
        let (number, _) = line.strip_prefix("- **")?.split_once("** ")?;
        Some(number.to_owned())
    };
    text.lines().filter_map(item).collect()
}

#[test]
fn statements_are_numbered_once() {
    let all = statements();
    let unique: BTreeSet<_> = all.iter().collect();
    assert_eq!(all.len(), unique.len(), "{all:?}");
    assert!(all.len() > 30, "only {} statements were found", all.len());
}

#[test]
fn each_statement_has_a_case_or_a_reason_and_no_more() {
    let stated: BTreeSet<_> = statements().into_iter().collect();
    let tested: BTreeSet<_> = cases::all().map(cases::Case::statement).collect();
    let not_tested: BTreeSet<_> = NOT_TESTED
        .iter()
        .map(|(name, _)| (*name).to_owned())
        .collect();
    assert!(tested.is_disjoint(&not_tested), "{NOT_TESTED:?}");
    assert_eq!(stated, &tested | &not_tested);
}

#[test]
fn names_are_unique() {
    let names: BTreeSet<_> = cases::all().map(|case| case.name).collect();
    assert_eq!(names.len(), cases::all().count());
}
