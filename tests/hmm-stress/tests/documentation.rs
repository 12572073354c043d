//! The tests that the documentation names are there.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use hmm_stress::{contract, neighbours, scenario, tenants};

/// First and last column of the rows of tables.
fn rows(page: &str) -> impl Iterator<Item = (&str, &str)> {
    page.lines().filter_map(|line| {
        let mut columns = line.strip_prefix("| ")?.strip_suffix(" |")?.split(" | ");
        Some((columns.next()?, columns.last()?))
    })
}

/// Whether it is like "A1", "C5–C8" or "D".
fn is_rule(column: &str) -> bool {
    column
        .strip_prefix(['A', 'C', 'D', 'E', 'S'])
        .is_some_and(|number| number.is_empty() || number.starts_with(|c: char| c.is_ascii_digit()))
}

fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The Rust files in a directory and below, one after the other.
fn sources(directory: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            text += &sources(&path);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text += &fs::read_to_string(path).unwrap();
        }
    }
    text
}

/// Checks what is between backquotes.
fn check(place: &str, tests: &str, sources: &str) {
    let names = [
        &contract::NAMES[..],
        &neighbours::NAMES,
        &scenario::NAMES,
        &tenants::NAMES,
    ]
    .concat();
    for name in tests.split('`').skip(1).step_by(2) {
        let known = match (name.strip_prefix('*'), name.strip_suffix('*')) {
            (Some(end), _) => names.iter().any(|known| known.ends_with(end)),
            (None, Some(start)) => names.iter().any(|known| known.starts_with(start)),
            (None, None) => {
                names.contains(&name)
                    || sources.contains(&format!("\"{name}\""))
                    || sources.contains(&format!("fn {name}("))
            }
        };
        assert!(known, "{place}: there is no test {name}");
    }
}

#[test]
fn tests_of_the_guide_exist() {
    let guide = fs::read_to_string(checkout().join("docs/driver.md")).unwrap();
    let in_the_vm = sources(&checkout().join("tests/e2e/tests"));
    let mut number = 0;
    for (rule, tests) in rows(&guide).filter(|(rule, _)| is_rule(rule)) {
        number += 1;
        check(rule, tests, &in_the_vm);
    }
    assert!(number > 60, "only {number} rules were found");
}

#[test]
fn tests_of_the_neighbours_exist() {
    let page = fs::read_to_string(checkout().join("docs/neighbours.md")).unwrap();
    let mut number = 0;
    for (neighbour, tests) in rows(&page).filter(|(_, tests)| tests.contains('`')) {
        number += 1;
        check(neighbour, tests, "");
    }
    assert!(number > 20, "only {number} neighbours were found");
}

#[test]
fn tests_of_the_threat_model_exist() {
    let page = fs::read_to_string(checkout().join("docs/threat-model.md")).unwrap();
    let places = ["tests/e2e/tests", "device/tests", "device/src"];
    let mut sources: String = places
        .iter()
        .map(|place| sources(&checkout().join(place)))
        .collect();
    // The names of the fuzz targets.
    sources += &fs::read_to_string(checkout().join("vm/src/fuzz.rs")).unwrap();
    let mut number = 0;
    for (promise, tests) in rows(&page).filter(|(_, tests)| tests.contains('`')) {
        number += 1;
        check(promise, tests, &sources);
    }
    assert!(number > 20, "only {number} promises were found");
}
