//! What `hmm-stress --json` tells of its cases, and a test for each of them out of one boot.

use std::sync::OnceLock;

use hmm_stress::report::{Case, Line, Summary, Verdict};
use libtest_mimic::{Completion, Failed, Trial};

use crate::{Failure, Finished, NEEDS_VM, Result};

/// All that a run told.
#[derive(Clone, Debug)]
pub struct Told {
    /// How each case ended, in order.
    pub cases: Vec<Case>,
    /// Its last line.
    pub summary: Summary,
}

impl Told {
    /// Reads what the run printed.
    ///
    /// # Errors
    /// It did not come to its end, or printed something else.
    pub fn by(run: &Finished) -> Result<Self> {
        let (mut cases, mut summary) = (Vec::new(), None);
        for line in run.text().lines() {
            match serde_json::from_str(line)? {
                Line::Begin { .. } => {}
                Line::Scenario(case) | Line::Test { case, .. } => cases.push(case),
                Line::Summary(line) => summary = Some(*line),
            }
        }
        let summary = summary.ok_or_else(|| Failure(format!("no summary: {}", run.errors())))?;
        Ok(Self { cases, summary })
    }
}

/// What a boot came to, or why it failed: found out once, for several tests.
pub type Shared<T> = OnceLock<Result<T, String>>;

/// Boots unless another test has done so.
///
/// # Errors
/// That boot failed.
pub fn shared<T>(boot: &'static Shared<T>, make: impl FnOnce() -> Result<T>) -> Result<&'static T> {
    boot.get_or_init(|| make().map_err(|Failure(text)| text))
        .as_ref()
        .map_err(|text| Failure(text.clone()))
}

/// A test that has the verdict of one case of a boot.
#[must_use]
pub fn case_trial(
    group: &str,
    name: &'static str,
    cases: impl FnOnce() -> Result<&'static [Case]> + Send + 'static,
) -> Trial {
    let body = move || {
        let cases = cases().map_err(|Failure(text)| text)?;
        let case = cases.iter().find(|case| case.name == name);
        let case = case.ok_or("it did not run")?;
        let reason = || case.reason.clone().unwrap_or_default();
        match case.result {
            Verdict::Pass => Ok(Completion::Completed),
            Verdict::Skip => Ok(Completion::ignored_with(reason())),
            Verdict::Fail => Err(Failed::from(reason())),
        }
    };
    Trial::ignorable_test(format!("{group}::{name}"), body)
        .with_kind(NEEDS_VM)
        .with_ignored_flag(true)
}
