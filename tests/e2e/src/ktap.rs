//! What `hmm-conformance` prints.

use std::collections::BTreeMap;
use std::mem;

use crate::{Result, check};

/// How a case ended, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The device conforms.
    Passed,
    /// Not tried.
    Skipped(String),
    /// The device does not conform.
    Failed(String),
}

/// How cases ended.
#[derive(Clone, Debug, Default)]
pub struct Ends {
    /// By name.
    pub by_name: BTreeMap<String, End>,
    /// How many there were to be.
    pub planned: usize,
}

impl Ends {
    /// Reads it from KTAP.
    ///
    /// # Errors
    /// The cases are not numbered one after another.
    pub fn read(text: &str) -> Result<Self> {
        let (mut ends, mut told) = (Self::default(), String::new());
        for line in text.lines() {
            if let Some(text) = line.strip_prefix("# ") {
                told = format!("{told}{text}; ");
            } else if let Some(number) = line.strip_prefix("1..") {
                ends.planned = number.parse()?;
                told.clear();
            } else if let Some((number, name)) = line
                .split_once("ok ")
                .and_then(|(_, rest)| rest.split_once(' '))
            {
                let told = mem::take(&mut told);
                let (name, end) = match name.split_once(" # SKIP ") {
                    Some((name, reason)) => (name, End::Skipped(reason.to_owned())),
                    None if line.starts_with("not ") => (name, End::Failed(told)),
                    None => (name, End::Passed),
                };
                check(number.parse() == Ok(ends.by_name.len() + 1), || {
                    line.to_owned()
                })?;
                ends.by_name.insert(name.to_owned(), end);
            }
        }
        Ok(ends)
    }
}
