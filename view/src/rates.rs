//! What a device did between two readings.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::reading::{Memory, Operation, Queue, Reading, Ring, Times};

/// What happened between two readings, as `hmm-stat --json` prints it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Activity {
    /// Number of the VM's session.
    pub session: u64,
    /// Whether the VM is there.
    pub connected: bool,
    /// All queues together.
    #[serde(flatten)]
    pub total: Rates,
    /// Bytes of device memory that the host has allocated.
    pub memory_used: u64,
    /// The most that it had allocated.
    pub memory_peak: u64,
    /// Bytes of device memory.
    pub memory_size: u64,
    /// Each queue.
    pub queues: Vec<Rates>,
}

/// What happened on one queue, or on all of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Rates {
    /// Bytes a second, by operation.
    pub to_device: f64,
    /// See `to_device`.
    pub from_device: f64,
    /// See `to_device`.
    pub fill: f64,
    /// See `to_device`.
    pub device_to_device: f64,
    /// Copy requests a second.
    pub requests: f64,
    /// Those that failed.
    pub errors: f64,
    /// Part of the time that the worker was busy; with several, their sum.
    pub busy: f64,
    /// Half of the requests waited for less than so many nanoseconds; 0 if there was none.
    pub wait_p50: u64,
    /// 99 % of them.
    pub wait_p99: u64,
    /// 99.9 % of them.
    pub wait_p999: u64,
    /// The same of the time from then until they were done.
    pub copy_p50: u64,
    /// See `copy_p50`.
    pub copy_p99: u64,
    /// See `copy_p50`.
    pub copy_p999: u64,
    /// Requests that waited when some last came.
    pub occupancy: u64,
    /// Times a second that a ring was full.
    pub ring_full: f64,
    /// Notifications by the driver, a second.
    pub kicks: f64,
    /// Notifications of the driver, a second.
    pub calls: f64,
    /// Those that it did not want, a second.
    pub calls_suppressed: f64,
    /// What the processor counted of the worker a second, by name, as far as it does.
    pub hardware: BTreeMap<String, f64>,
    /// The same for each byte that was moved, if any was.
    pub hardware_per_byte: BTreeMap<String, f64>,
}

impl Rates {
    /// Bytes a second, whatever the operation.
    pub fn moved(&self) -> f64 {
        self.to_device + self.from_device + self.fill + self.device_to_device
    }
}

/// What was counted up to a reading.
#[derive(Debug, Default)]
struct Sums {
    bytes: BTreeMap<String, u64>,
    requests: u64,
    errors: u64,
    busy_ns: u64,
    wait: Distribution,
    copy: Distribution,
    ring: Ring,
    hardware: BTreeMap<String, u64>,
}

impl Sums {
    fn of<'a>(queues: impl IntoIterator<Item = &'a Queue>) -> Self {
        let mut sums = Self::default();
        for queue in queues {
            sums.busy_ns += queue.busy_ns;
            sums.ring.occupancy += queue.ring.occupancy;
            sums.ring.full += queue.ring.full;
            sums.ring.kicks += queue.ring.kicks;
            sums.ring.calls += queue.ring.calls;
            sums.ring.calls_suppressed += queue.ring.calls_suppressed;
            for (name, count) in &queue.hardware {
                *sums.hardware.entry(name.clone()).or_default() += count;
            }
            let operations = queue.operations.iter();
            for (name, operation) in operations.filter(|(name, _)| !Operation::is_control(name)) {
                sums.errors += operation.errors;
                for size in operation.sizes.values() {
                    *sums.bytes.entry(name.clone()).or_default() += size.bytes;
                    sums.requests += size.requests;
                    sums.wait.add(&size.wait);
                    sums.copy.add(&size.copy);
                }
            }
        }
        sums
    }

    fn since(&self, before: &Self, ns: u64) -> Rates {
        let ns = ns.max(1) as f64;
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 * 1e9 / ns;
        let bytes = |name: &str| {
            let sum = |sums: &Self| sums.bytes.get(name).copied().unwrap_or(0);
            rate(sum(self), sum(before))
        };
        let counted = self.hardware.iter().map(|(name, count)| {
            let before = before.hardware.get(name).copied().unwrap_or(0);
            (name.clone(), count.saturating_sub(before) as f64)
        });
        let counted: BTreeMap<_, _> = counted.collect();
        let all_bytes = |sums: &Self| sums.bytes.values().sum::<u64>();
        let moved = all_bytes(self).saturating_sub(all_bytes(before)) as f64;
        let hardware = |each: f64| {
            counted
                .iter()
                .map(move |(name, n)| (name.clone(), n / each))
        };
        let (wait, copy) = (self.wait.since(&before.wait), self.copy.since(&before.copy));
        Rates {
            to_device: bytes("to_device"),
            from_device: bytes("from_device"),
            fill: bytes("fill"),
            device_to_device: bytes("device_to_device"),
            requests: rate(self.requests, before.requests),
            errors: rate(self.errors, before.errors),
            busy: self.busy_ns.saturating_sub(before.busy_ns) as f64 / ns,
            wait_p50: wait.quantile(500),
            wait_p99: wait.quantile(990),
            wait_p999: wait.quantile(999),
            copy_p50: copy.quantile(500),
            copy_p99: copy.quantile(990),
            copy_p999: copy.quantile(999),
            occupancy: self.ring.occupancy,
            ring_full: rate(self.ring.full, before.ring.full),
            kicks: rate(self.ring.kicks, before.ring.kicks),
            calls: rate(self.ring.calls, before.ring.calls),
            calls_suppressed: rate(self.ring.calls_suppressed, before.ring.calls_suppressed),
            hardware: hardware(ns / 1e9).collect(),
            hardware_per_byte: hardware(moved).filter(|_| moved > 0.0).collect(),
        }
    }
}

impl Activity {
    /// What happened from one reading to the next, or since the session began if
    /// that was in between.
    pub fn between(earlier: &Reading, now: &Reading) -> Self {
        let before: &[Queue] = if earlier.session == now.session {
            &earlier.queues
        } else {
            &[]
        };
        let ns = now.time_ns.saturating_sub(earlier.time_ns);
        let queues = now.queues.iter().enumerate().map(|(index, queue)| {
            let before = Sums::of(before.get(index));
            Sums::of([queue]).since(&before, ns)
        });
        let Memory { size, used, peak } = now.memory;
        Self {
            session: now.session,
            connected: now.connected,
            total: Sums::of(&now.queues).since(&Sums::of(before), ns),
            memory_used: used,
            memory_peak: peak,
            memory_size: size,
            queues: queues.collect(),
        }
    }
}

/// By what times are less than, their number.
#[derive(Debug, Default)]
struct Distribution(BTreeMap<u64, u64>);

impl Distribution {
    fn add(&mut self, times: &Times) {
        for (bound, count) in &times.buckets {
            *self.0.entry(*bound).or_default() += count;
        }
    }

    /// The times that came to those that were there before.
    fn since(&self, before: &Self) -> Self {
        let new = self.0.iter().map(|(bound, count)| {
            let before = before.0.get(bound).copied().unwrap_or(0);
            (*bound, count.saturating_sub(before))
        });
        Self(new.collect())
    }

    /// What so many of a thousand times are less than; 0 if there are none.
    fn quantile(&self, of_thousand: u64) -> u64 {
        let total: u64 = self.0.values().sum();
        let wanted = (total * of_thousand).div_ceil(1000);
        let mut seen = 0;
        for (bound, count) in &self.0 {
            seen += count;
            if seen >= wanted && total > 0 {
                return *bound;
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A copy queue with so many requests of two frames.
    fn reading(session: u64, time_ns: u64, requests: u64) -> Reading {
        let times = |bound| json!({ "sum_ns": 1000 * requests, "max_ns": 1, "buckets": [[bound, requests]] });
        let size = json!({
            "requests": requests, "frames": 2 * requests, "bytes": 8192 * requests,
            "wait": times(2000), "copy": times(4000),
        });
        let operations = json!({
            "to_device": { "errors": requests / 2, "sizes": { "64K": size } },
            "discard": { "errors": 9, "sizes": {} },
        });
        let ring = json!({
            "occupancy": 3, "occupancy_max": 4, "full": requests, "kicks": 2 * requests,
            "calls": 0, "calls_suppressed": requests,
        });
        let queue = |operations, busy_ns: u64| {
            let hardware = if busy_ns > 0 {
                json!({ "cycles": busy_ns })
            } else {
                json!({})
            };
            json!({
                "operations": operations, "busy_ns": busy_ns, "failures": {}, "ring": ring,
                "hardware": hardware,
            })
        };
        serde_json::from_value(json!({
            "session": session, "connected": true, "time_ns": time_ns,
            "memory": { "size": 9 << 20, "used": 5 << 20, "peak": 6 << 20, "cleared": 0 },
            "queues": [queue(json!({}), 0), queue(operations, 1000 * requests)],
        }))
        .unwrap()
    }

    #[test]
    fn rates_are_what_happened_in_between() {
        let activity = Activity::between(
            &reading(1, 1_000_000_000, 10),
            &reading(1, 3_000_000_000, 30),
        );
        let copies = Rates {
            to_device: 20.0 * 4096.0,
            requests: 10.0,
            errors: 5.0,
            busy: 20_000.0 / 2e9,
            wait_p50: 2000,
            wait_p99: 2000,
            wait_p999: 2000,
            copy_p50: 4000,
            copy_p99: 4000,
            copy_p999: 4000,
            occupancy: 3,
            ring_full: 10.0,
            kicks: 20.0,
            calls_suppressed: 10.0,
            hardware: [("cycles".into(), 10_000.0)].into(),
            hardware_per_byte: [("cycles".into(), 20_000.0 / 163_840.0)].into(),
            ..Rates::default()
        };
        assert_eq!(activity.queues[1], copies);
        assert_eq!(activity.queues[0].requests, 0.0);
        assert!(activity.queues[0].hardware.is_empty());
        let both = Rates {
            occupancy: 6,
            ring_full: 20.0,
            kicks: 40.0,
            calls_suppressed: 20.0,
            ..copies
        };
        assert_eq!(activity.total, both);
        assert_eq!(
            [
                activity.memory_used,
                activity.memory_peak,
                activity.memory_size
            ],
            [5 << 20, 6 << 20, 9 << 20]
        );
        // Another session began at zero.
        let earlier = reading(1, 1_000_000_000, 90);
        let activity = Activity::between(&earlier, &reading(2, 3_000_000_000, 30));
        assert_eq!(activity.total.requests, 15.0);
        // Nothing happened.
        let idle = Activity::between(&reading(1, 2, 30), &reading(1, 4, 30)).total;
        assert_eq!((idle.requests, idle.copy_p99), (0.0, 0));
        assert!(idle.hardware_per_byte.is_empty());
        // A clock that stands still, which none does, divides nothing by zero.
        let still = Activity::between(&reading(1, 2, 3), &reading(1, 2, 3)).total;
        assert_eq!(still.busy, 0.0);
    }

    #[test]
    fn quantiles_are_bounds() {
        let times = Distribution(BTreeMap::from([(10, 980), (20, 10), (30, 9), (40, 1)]));
        assert_eq!(
            [500, 980, 990, 999, 1000].map(|q| times.quantile(q)),
            [10, 10, 20, 30, 40]
        );
        assert_eq!(Distribution::default().quantile(500), 0);
    }
}
