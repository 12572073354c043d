//! Rules for faults on purpose: what goes wrong, with which requests, how often.
//!
//! A rule is `FAULT[=VALUE][,CONDITION=VALUE]…`; `docs/fault-injection.md` lists
//! both.

use std::{collections::BTreeSet, fmt, str::FromStr, time::Duration};

use serde::{Serialize, Serializer};

use crate::{
    abi::{
        VIRTIO_HMM_QUEUE_CONTROL, VIRTIO_HMM_QUEUE_COPY, VIRTIO_HMM_S_INVALID,
        VIRTIO_HMM_S_PARTIAL, VIRTIO_HMM_S_RANGE, VIRTIO_HMM_S_UNSUPPORTED,
    },
    request::Operation,
    units::parse_time,
};

/// How long a reordered request waits for one that overtakes it.
const REORDER: Duration = Duration::from_millis(10);

/// Why a text is no rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no such fault.
    #[error(
        "unknown fault {0:?}: delay, reorder, error, status, short, drop, lose, double, stall, \
        poison or dead"
    )]
    Fault(String),
    /// There is no such condition.
    #[error("unknown condition {0:?}: op, queue, probability, after or count")]
    Condition(String),
    /// A fault or condition has a value that it cannot have.
    #[error("{name} needs {expected}")]
    Value {
        /// Name of the fault or condition.
        name: &'static str,
        /// What it needs.
        expected: &'static str,
    },
    /// A condition is there twice.
    #[error("{0} is given twice")]
    Twice(&'static str),
    /// The fault concerns frames, and the operation has no status for them.
    #[error("{fault} is a fault of copies, not of {operation}")]
    NotACopy {
        /// Name of the fault.
        fault: &'static str,
        /// Name of the operation.
        operation: &'static str,
    },
    /// There are too many rules already.
    #[error("there are {0} rules already, which is the most")]
    TooMany(usize),
    /// No request can be of the operation and on the queue.
    #[error("no request for {operation} is ever on queue {queue}")]
    Never {
        /// Name of the operation, or "copies".
        operation: &'static str,
        /// Number of the queue.
        queue: u32,
    },
}

/// How much of a request is done before it is forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// Nothing.
    None,
    /// The first half of its frames.
    Half,
    /// Everything but the answer.
    All,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The request is executed, and answered, so much later.
    Delay(Duration),
    /// The request is executed after the one that follows it, or at the end of
    /// this time.
    Reorder(Duration),
    /// So many frames of the request fail.
    Error(u32),
    /// The request is answered with this status; nothing is done.
    Status(u32),
    /// Only so many frames of the request are done, half of them if not said.
    Short(Option<u32>),
    /// The request is never answered.
    Drop(Share),
    /// The request is answered as if it had been done; nothing is done, and
    /// nothing counted.
    Lose,
    /// The request is done, and counted, twice.
    Double,
    /// The queue takes no more requests until it is reset.
    Stall,
    /// So many frames of the request lose their contents.
    Poison(u32),
    /// The device does nothing any more.
    Dead,
}

impl Fault {
    /// Its name in rules and counters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Delay(_) => "delay",
            Self::Reorder(_) => "reorder",
            Self::Error(_) => "error",
            Self::Status(_) => "status",
            Self::Short(_) => "short",
            Self::Drop(_) => "drop",
            Self::Lose => "lose",
            Self::Double => "double",
            Self::Stall => "stall",
            Self::Poison(_) => "poison",
            Self::Dead => "dead",
        }
    }

    fn parse(name: &str, value: Option<&str>) -> Result<Self, Error> {
        let bad = |name, expected| Error::Value { name, expected };
        let time = |name, expected| move |text| parse_time(text).map_err(|_| bad(name, expected));
        let frames = |name| {
            move |text: &str| {
                let number = text.parse().ok().filter(|frames| *frames > 0);
                number.ok_or(bad(name, "a number of frames, at least 1"))
            }
        };
        match (name, value) {
            ("delay", value) => value
                .ok_or(bad("delay", "a time, such as delay=5ms"))
                .and_then(time("delay", "a time, such as delay=5ms"))
                .map(Self::Delay),
            ("reorder", None) => Ok(Self::Reorder(REORDER)),
            ("reorder", Some(text)) => {
                time("reorder", "a time, such as reorder=5ms")(text).map(Self::Reorder)
            }
            ("error", value) => frames("error")(value.unwrap_or("1")).map(Self::Error),
            ("status", value) => status(value.unwrap_or_default()).map(Self::Status),
            ("short", None) => Ok(Self::Short(None)),
            ("short", Some(text)) => match text.parse() {
                Ok(frames) => Ok(Self::Short(Some(frames))),
                Err(_) => Err(bad("short", "a number of frames")),
            },
            ("drop", None | Some("none")) => Ok(Self::Drop(Share::None)),
            ("drop", Some("half")) => Ok(Self::Drop(Share::Half)),
            ("drop", Some("all")) => Ok(Self::Drop(Share::All)),
            ("drop", _) => Err(bad("drop", "none, half or all")),
            ("lose", None) => Ok(Self::Lose),
            ("lose", _) => Err(bad("lose", "no value")),
            ("double", None) => Ok(Self::Double),
            ("double", _) => Err(bad("double", "no value")),
            ("stall", None) => Ok(Self::Stall),
            ("stall", _) => Err(bad("stall", "no value")),
            ("poison", value) => frames("poison")(value.unwrap_or("1")).map(Self::Poison),
            ("dead", None) => Ok(Self::Dead),
            ("dead", _) => Err(bad("dead", "no value")),
            _ => Err(Error::Fault(name.into())),
        }
    }

    /// How often the request is done, and counted.
    pub fn executions(self) -> u32 {
        match self {
            Self::Lose => 0,
            Self::Double => 2,
            _ => 1,
        }
    }

    /// Whether only copies can have it.
    fn is_of_copies(self) -> bool {
        matches!(
            self,
            Self::Error(_)
                | Self::Short(_)
                | Self::Poison(_)
                | Self::Drop(Share::Half)
                | Self::Lose
                | Self::Double
        )
    }
}

fn status(text: &str) -> Result<u32, Error> {
    match text {
        "invalid" => Ok(VIRTIO_HMM_S_INVALID),
        "unsupported" => Ok(VIRTIO_HMM_S_UNSUPPORTED),
        "range" => Ok(VIRTIO_HMM_S_RANGE),
        // An answer OK or PARTIAL to a request that was not done is no error.
        _ => text
            .parse()
            .ok()
            .filter(|status| *status > VIRTIO_HMM_S_PARTIAL)
            .ok_or(Error::Value {
                name: "status",
                expected: "invalid, unsupported, range or a number above 1",
            }),
    }
}

/// A fault, and the requests that it strikes.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// What goes wrong.
    pub fault: Fault,
    /// Only with this operation; with any copy if not said.
    pub operation: Option<Operation>,
    /// Only on this queue.
    pub queue: Option<u32>,
    /// Probability from 0 to 1 that a request is struck.
    pub probability: f64,
    /// So many requests go before the first that can be struck.
    pub after: u64,
    /// Most requests that are struck.
    pub count: u64,
    text: String,
}

impl Rule {
    /// Whether a request for `operation` on `queue` can be struck.
    pub fn concerns(&self, queue: u32, operation: Operation) -> bool {
        self.operation
            .map_or(operation.is_copy(), |only| only == operation)
            && self.queue.is_none_or(|only| only == queue)
    }

    /// Checks that a device of `copy_queues` copy queues can have a request
    /// that the rule concerns.
    ///
    /// # Errors
    /// If it cannot.
    pub fn check(&self, copy_queues: u32) -> Result<(), Error> {
        let copies = VIRTIO_HMM_QUEUE_COPY..VIRTIO_HMM_QUEUE_COPY + copy_queues;
        let of_copies = self.operation.is_none_or(Operation::is_copy);
        match self.queue {
            Some(queue)
                if of_copies != copies.contains(&queue)
                    || !of_copies && queue != VIRTIO_HMM_QUEUE_CONTROL =>
            {
                let operation = self.operation.map_or("copies", Operation::name);
                Err(Error::Never { operation, queue })
            }
            _ => Ok(()),
        }
    }

    fn set(&mut self, name: &'static str, text: &str) -> Result<(), Error> {
        let needs = |expected| Error::Value { name, expected };
        match name {
            "op" => {
                let operation = Operation::from_name(text);
                self.operation = Some(operation.ok_or(needs(
                    "to_device, from_device, fill, device_to_device, counters or discard",
                ))?);
            }
            "queue" => {
                let queue = text.parse().map_err(|_| needs("the number of a queue"))?;
                self.queue = Some(queue);
            }
            "probability" => {
                let probability = text.parse().ok().filter(|p| (0.0..=1.0).contains(p));
                self.probability = probability.ok_or(needs("a number from 0 to 1"))?;
            }
            "after" => self.after = text.parse().map_err(|_| needs("a number of requests"))?,
            _ => self.count = text.parse().map_err(|_| needs("a number of requests"))?,
        }
        Ok(())
    }
}

impl FromStr for Rule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut parts = text.split(',').map(|part| match part.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (part, None),
        });
        let (name, value) = parts.next().unwrap_or_default();
        let mut rule = Self {
            fault: Fault::parse(name, value)?,
            operation: None,
            queue: None,
            probability: 1.0,
            after: 0,
            count: u64::MAX,
            text: text.into(),
        };
        let mut given = BTreeSet::new();
        for (name, value) in parts {
            let name = ["op", "queue", "probability", "after", "count"]
                .into_iter()
                .find(|known| *known == name)
                .ok_or_else(|| Error::Condition(name.into()))?;
            if !given.insert(name) {
                return Err(Error::Twice(name));
            }
            rule.set(name, value.unwrap_or_default())?;
        }
        match rule.operation {
            Some(operation) if rule.fault.is_of_copies() && !operation.is_copy() => {
                Err(Error::NotACopy {
                    fault: rule.fault.name(),
                    operation: operation.name(),
                })
            }
            _ => Ok(rule),
        }
    }
}

/// As it was written.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Rule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rule(text: &str) -> Result<Rule, Error> {
        text.parse()
    }

    #[test]
    fn every_fault_can_be_said() {
        for (text, fault) in [
            ("delay=5ms", Fault::Delay(Duration::from_millis(5))),
            ("reorder", Fault::Reorder(REORDER)),
            ("reorder=1s", Fault::Reorder(Duration::from_secs(1))),
            ("error", Fault::Error(1)),
            ("error=7", Fault::Error(7)),
            ("status=invalid", Fault::Status(VIRTIO_HMM_S_INVALID)),
            (
                "status=unsupported",
                Fault::Status(VIRTIO_HMM_S_UNSUPPORTED),
            ),
            ("status=range", Fault::Status(VIRTIO_HMM_S_RANGE)),
            ("status=4294967295", Fault::Status(u32::MAX)),
            ("short", Fault::Short(None)),
            ("short=0", Fault::Short(Some(0))),
            ("drop", Fault::Drop(Share::None)),
            ("drop=half", Fault::Drop(Share::Half)),
            ("drop=all", Fault::Drop(Share::All)),
            ("lose", Fault::Lose),
            ("double", Fault::Double),
            ("stall", Fault::Stall),
            ("poison=3", Fault::Poison(3)),
            ("dead", Fault::Dead),
        ] {
            let rule = rule(text).unwrap();
            assert_eq!(rule.fault, fault);
            assert_eq!(rule.to_string(), text);
            assert_eq!((rule.operation, rule.queue), (None, None));
            assert_eq!((rule.after, rule.count), (0, u64::MAX));
            assert!(text.starts_with(fault.name()));
        }
    }

    #[test]
    fn conditions_come_in_any_order() {
        let rule = rule("error=2,count=3,op=fill,probability=0.25,queue=2,after=9").unwrap();
        assert_eq!(rule.fault, Fault::Error(2));
        assert_eq!(rule.operation, Some(Operation::Fill));
        assert_eq!(rule.queue, Some(2));
        assert_eq!(rule.probability, 0.25);
        assert_eq!((rule.after, rule.count), (9, 3));
        assert!(rule.concerns(2, Operation::Fill));
        assert!(!rule.concerns(3, Operation::Fill));
        assert!(!rule.concerns(2, Operation::ToDevice));
    }

    #[test]
    fn without_an_operation_the_control_queue_is_left_alone() {
        let rule = rule("drop").unwrap();
        assert!(rule.concerns(17, Operation::DeviceToDevice));
        assert!(!rule.concerns(0, Operation::Counters));
        assert!(!rule.concerns(0, Operation::Discard));
    }

    #[test]
    fn bad_rules_are_refused_with_the_reason() {
        for (text, reason) in [
            ("", "unknown fault \"\": delay, reorder,"),
            ("explode", "unknown fault \"explode\""),
            ("Delay=1s", "unknown fault"),
            ("delay", "delay needs a time"),
            ("delay=5", "delay needs a time"),
            ("reorder=soon", "reorder needs a time"),
            ("error=0", "error needs a number of frames"),
            ("error=-1", "error needs a number of frames"),
            ("status", "status needs invalid, unsupported, range"),
            ("status=ok", "status needs invalid"),
            ("status=1", "above 1"),
            ("short=x", "short needs a number"),
            ("drop=quarter", "drop needs none, half or all"),
            ("lose=1", "lose needs no value"),
            ("double=2", "double needs no value"),
            ("stall=1", "stall needs no value"),
            ("dead=now", "dead needs no value"),
            ("poison=0", "poison needs a number"),
            ("stall,", "unknown condition \"\""),
            ("stall,when=now", "unknown condition \"when\": op, queue,"),
            ("stall,op", "op needs to_device"),
            ("stall,op=copy", "op needs to_device"),
            ("stall,queue=-1", "queue needs the number"),
            (
                "stall,probability=1.1",
                "probability needs a number from 0 to 1",
            ),
            ("stall,probability=NaN", "probability needs"),
            ("stall,after=", "after needs a number"),
            ("stall,count=many", "count needs a number"),
            ("stall,count=1,count=2", "count is given twice"),
            (
                "error,op=discard",
                "error is a fault of copies, not of discard",
            ),
            ("drop=half,op=counters", "drop is a fault of copies"),
            ("lose,op=discard", "lose is a fault of copies"),
        ] {
            let error = rule(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn queues_that_cannot_have_the_request_are_refused() {
        for (text, ok) in [
            ("stall", true),
            ("stall,queue=2", true),
            ("stall,queue=3", true),
            ("stall,queue=4", false),
            ("stall,queue=0", false),
            ("stall,queue=1", false),
            ("stall,queue=0,op=discard", true),
            ("stall,queue=2,op=discard", false),
            ("stall,queue=1,op=counters", false),
            ("stall,queue=4294967295,op=fill", false),
        ] {
            assert_eq!(rule(text).unwrap().check(2).is_ok(), ok, "{text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        /// Whatever the text, it is a rule that says the same again, or refused.
        #[test]
        fn any_text_is_a_rule_or_refused(
            text in "(delay|reorder|error|status|short|drop|lose|double|stall|poison|dead|x)?(=[a-z0-9.]{0,4})?(,(op|queue|probability|after|count|y)?(=[a-z0-9._]{0,6})?){0,3}"
        ) {
            if let Ok(rule) = rule(&text) {
                prop_assert_eq!(rule.to_string(), text);
                prop_assert!((0.0..=1.0).contains(&rule.probability));
            }
        }
    }
}
