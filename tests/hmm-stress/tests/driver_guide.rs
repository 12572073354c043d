//! The tests that the driver's guide names for the kernel's rules are there.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

use hmm_stress::{contract, neighbours, scenario};

/// First and last column of the rows whose first is like "A1", "C5–C8" or "D".
fn rules(guide: &str) -> impl Iterator<Item = (&str, &str)> {
    guide.lines().filter_map(|line| {
        let mut columns = line.strip_prefix("| ")?.strip_suffix(" |")?.split(" | ");
        let (rule, tests) = (columns.next()?, columns.last()?);
        let number = rule.strip_prefix(['A', 'C', 'D', 'E', 'S'])?;
        let is_one = number.is_empty() || number.starts_with(|c: char| c.is_ascii_digit());
        is_one.then_some((rule, tests))
    })
}

#[test]
fn tests_of_the_guide_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let guide = fs::read_to_string(root.join("docs/driver.md")).unwrap();
    let mut in_the_vm = String::new();
    for entry in fs::read_dir(root.join("tests/e2e/tests")).unwrap() {
        in_the_vm += &fs::read_to_string(entry.unwrap().path()).unwrap();
    }
    let names = [&contract::NAMES[..], &neighbours::NAMES, &scenario::NAMES].concat();
    let mut number = 0;
    for (rule, tests) in rules(&guide) {
        number += 1;
        // Every other piece is between backquotes.
        for name in tests.split('`').skip(1).step_by(2) {
            let known = match name.strip_suffix('*') {
                Some(start) => names.iter().any(|known| known.starts_with(start)),
                None => names.contains(&name) || in_the_vm.contains(&format!("\"{name}\"")),
            };
            assert!(known, "{rule}: there is no test {name}");
        }
    }
    assert!(number > 60, "only {number} rules were found");
}
