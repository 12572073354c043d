//! The lines of `--json`: one object on each line of stdout.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Line {
    /// The first.
    Begin {
        /// Seed of the run; it reproduces the choices made.
        seed: u64,
        /// Bytes of a region.
        size: u64,
        /// Threads that access memory at once.
        threads: usize,
    },
    /// A scenario ended.
    Scenario(Case),
    /// A test ended.
    Test {
        /// The clause of the contract that a contract test is about, "S1" to "S6".
        #[serde(default, skip_serializing_if = "Option::is_none")]
        clause: Option<String>,
        /// The rest.
        #[serde(flatten)]
        case: Case,
    },
    /// The last.
    Summary(Box<Summary>),
}

/// How a scenario or a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It passed.
    Pass,
    /// It failed.
    Fail,
    /// It could not run here.
    Skip,
}

/// A scenario or a test.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Case {
    /// Its name.
    pub name: String,
    /// How it ended.
    pub result: Verdict,
    /// Why, unless it passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Pages that did not hold what they should.
    pub mismatches: u64,
    /// Pages that the kernel said are lost, by SIGBUS.
    #[serde(default)]
    pub lost: u64,
    /// Pages checked and calls made.
    pub operations: u64,
}

/// Times of CPU faults on device pages, in nanoseconds, as the driver counts them: from
/// when the kernel asks it for the page until it has it, at most an eighth too much.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Latency {
    /// Faults measured.
    pub count: u64,
    /// Median.
    pub p50: u64,
    /// 99th percentile.
    pub p99: u64,
    /// Longest.
    pub max: u64,
}

impl Latency {
    /// The times of which so many each were less than a bound.
    pub fn of_buckets(buckets: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let buckets: BTreeMap<u64, u64> = buckets.into_iter().filter(|(_, n)| *n > 0).collect();
        let count = buckets.values().copied().fold(0, u64::saturating_add);
        let quantile = |percent: u64| {
            let mut left = count.saturating_mul(percent).div_ceil(100);
            buckets.iter().find_map(|(bound, number)| {
                let found = *number >= left;
                left = left.saturating_sub(*number);
                found.then_some(*bound)
            })
        };
        Self {
            count,
            p50: quantile(50).unwrap_or(0),
            p99: quantile(99).unwrap_or(0),
            max: buckets.last_key_value().map_or(0, |(bound, _)| *bound),
        }
    }
}

/// What was moved in one direction, measured around the calls that moved it.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Transfer {
    /// Bytes moved.
    pub bytes: u64,
    /// Nanoseconds that it took.
    pub ns: u64,
}

/// The whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Summary {
    /// Seed of the run.
    pub seed: u64,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Scenarios or tests that passed.
    pub passed: u64,
    /// Those that failed.
    pub failed: u64,
    /// Those that could not run.
    pub skipped: u64,
    /// Pages that did not hold what they should.
    pub mismatches: u64,
    /// CPU faults on device pages.
    pub fault_latency_ns: Latency,
    /// From RAM to the device.
    pub to_device: Transfer,
    /// From the device to RAM.
    pub to_system: Transfer,
    /// How much each counter of the driver changed.
    pub driver: BTreeMap<String, i64>,
    /// How much each counter of the device changed, as it reports them in band.
    pub device: BTreeMap<String, i64>,
}

/// An item of `hmm-stress list --json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listed {
    /// "scenario", "test" (of the contract), "neighbour" or "tenant".
    pub kind: String,
    /// Its name.
    pub name: String,
    /// What it shows.
    pub about: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case() -> Case {
        Case {
            name: "s6_whole_range_never_touched".into(),
            result: Verdict::Pass,
            reason: None,
            seconds: 0.5,
            mismatches: 0,
            lost: 0,
            operations: 7,
        }
    }

    #[test]
    fn a_line_names_its_type_first() {
        let line = serde_json::to_string(&Line::Test {
            clause: Some("S6".into()),
            case: case(),
        })
        .unwrap();
        assert!(line.starts_with(r#"{"type":"test","clause":"S6","name":"s6_whole"#));
        assert!(!line.contains("reason"));
    }

    #[test]
    fn lines_come_back_as_they_were() {
        let lines = [
            r#"{"type":"test","name":"ksm","result":"pass","seconds":1.0,"mismatches":0,"lost":0,"operations":0}"#,
            r#"{"type":"begin","seed":1,"size":4096,"threads":2}"#,
            r#"{"type":"scenario","name":"sparse","result":"skip","reason":"x","seconds":1.0,"mismatches":0,"lost":0,"operations":0}"#,
        ];
        for text in lines {
            let line: Line = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&line).unwrap(), text);
        }
    }

    #[test]
    fn quantiles_are_bounds_of_buckets() {
        let latency = Latency::of_buckets([(30, 1), (10, 98), (20, 1), (40, 0)]);
        let found = (latency.count, latency.p50, latency.p99, latency.max);
        assert_eq!(found, (100, 10, 20, 30));
        assert_eq!(Latency::of_buckets([]).max, 0);
    }
}
