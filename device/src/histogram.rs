//! Distributions of times, counted by one thread and read by any.

use std::{
    array,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use serde::{Serialize, Serializer, ser::SerializeStruct};

/// A number that one thread at a time changes, and any thread reads. It costs
/// what a plain number costs.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds `number`.
    pub fn add(&self, number: u64) {
        self.set(self.get().wrapping_add(number));
    }

    /// Sets it to `number` if that is more.
    pub fn raise(&self, number: u64) {
        if number > self.get() {
            self.set(number);
        }
    }

    /// Sets it to `number`.
    pub fn set(&self, number: u64) {
        self.0.store(number, Relaxed);
    }

    /// The number.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

impl Serialize for Count {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.get())
    }
}

/// Exponents of two, in nanoseconds, of the first and the last bucket.
const FIRST: u32 = 8;
const LAST: u32 = 34;
/// Buckets to each power of two, as an exponent. A bucket is at most 1/8 wide.
const PARTS: u32 = 3;
const BUCKETS: usize = ((LAST - FIRST + 1) << PARTS) as usize;

/// How long something took, how often. Times from 256 ns to 34 s are told with an
/// error of at most 12.5 %; shorter and longer ones are in the first and last
/// bucket.
#[derive(Debug)]
pub struct Histogram {
    sum: Count,
    max: Count,
    buckets: [Count; BUCKETS],
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            sum: Count::default(),
            max: Count::default(),
            buckets: array::from_fn(|_| Count::default()),
        }
    }
}

impl Histogram {
    /// Counts a time that stands for `weight` times.
    pub fn record(&self, time: Duration, weight: u64) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.sum.add(ns.saturating_mul(weight));
        self.max.raise(ns);
        if let Some(bucket) = self.buckets.get(index(ns)) {
            bucket.add(weight);
        }
    }

    /// Sum of all times, in nanoseconds.
    pub fn sum(&self) -> u64 {
        self.sum.get()
    }

    /// Longest time, in nanoseconds.
    pub fn max(&self) -> u64 {
        self.max.get()
    }

    /// Number of times.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(Count::get).sum()
    }

    /// The buckets, the shortest first: what times in them are less than, in
    /// nanoseconds, and their number. The last has no bound.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> {
        let counts = self.buckets.iter().map(Count::get);
        (0..).map(bound).zip(counts)
    }
}

fn index(ns: u64) -> usize {
    let exponent = ns.max(1).ilog2();
    if exponent < FIRST {
        return 0;
    }
    let part = (ns >> (exponent - PARTS)) & ((1 << PARTS) - 1);
    let index = (u64::from(exponent - FIRST) << PARTS) + part;
    usize::try_from(index).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// What times in the bucket `index` are less than.
fn bound(index: u64) -> u64 {
    let (exponent, part) = (index >> PARTS, index & ((1 << PARTS) - 1));
    ((1 << PARTS) + part + 1) << (exponent + u64::from(FIRST - PARTS))
}

/// Only the buckets that have something in them.
impl Serialize for Histogram {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let used: Vec<_> = self.buckets().filter(|(_, count)| *count > 0).collect();
        let mut out = serializer.serialize_struct("Histogram", 3)?;
        out.serialize_field("sum_ns", &self.sum())?;
        out.serialize_field("max_ns", &self.max())?;
        out.serialize_field("buckets", &used)?;
        out.end()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        /// Each time is in the bucket whose bounds are on either side of it.
        #[test]
        fn times_are_in_their_bucket(ns in prop_oneof![0..5000_u64, 0..40_000_000_000_u64, any::<u64>()]) {
            let at = index(ns) as u64;
            prop_assert!(at < BUCKETS as u64);
            prop_assert!(ns < bound(at) || at == BUCKETS as u64 - 1);
            if at > 0 {
                prop_assert!(bound(at - 1) <= ns);
                // A bucket is at most an eighth of its times wide.
                prop_assert!(bound(at) - bound(at - 1) <= bound(at - 1) / 8 + 1);
            }
        }
    }

    #[test]
    fn everything_is_counted_by_its_weight() {
        let histogram = Histogram::default();
        for ns in [0, 1, 255, 256, 1_000_000, 1 << 40] {
            histogram.record(Duration::from_nanos(ns), 1);
        }
        assert_eq!(histogram.count(), 6);
        assert_eq!(histogram.max(), 1 << 40);
        assert_eq!(histogram.sum(), (1 << 40) + 1_000_512);
        histogram.record(Duration::from_nanos(1 << 40), 3);
        assert_eq!(histogram.sum(), (4 << 40) + 1_000_512);
        let first = histogram.buckets().next();
        assert_eq!(first, Some((288, 4)));
        assert_eq!(histogram.buckets().last().map(|(_, count)| count), Some(4));
    }
}
