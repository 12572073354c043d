//! Suites of tests.

use crate::context::Context;
use crate::failure::Failure;

/// A test.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    /// Its name.
    pub name: &'static str,
    /// What it shows.
    pub about: &'static str,
    /// Run it.
    pub run: fn(&Context) -> Result<(), Failure>,
}

/// A list of tests, each with the function that runs it, its name and what it shows.
macro_rules! tests {
    ($($module:ident :: $function:ident: $name:literal, $about:literal;)+) => {
        &[$($crate::suite::Test {
            name: $name,
            about: $about,
            run: $module::$function,
        },)+]
    };
}
pub(crate) use tests;

/// The names of `tests`, which has `N`.
pub(crate) const fn names<const N: usize>(tests: &[Test]) -> [&'static str; N] {
    let mut names = [""; N];
    let mut index = 0;
    while index < N {
        names[index] = tests[index].name;
        index += 1;
    }
    names
}

#[cfg(test)]
pub(crate) fn assert_unique(tests: &[Test]) {
    let mut names: Vec<_> = tests.iter().map(|test| test.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), tests.len());
}
