//! The counters as OpenMetrics text, for Prometheus and what reads the same.
//! `docs/counters.md` lists the metrics.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};
use serde_json::Value;

use crate::{
    counters::{Counters, QueueCounters, SizeCounters},
    hardware,
    histogram::{Count, Histogram},
    memory::Memory,
    session::Shared,
};

type Label = (&'static str, String);

/// The metrics of one device.
#[derive(Debug)]
pub struct Metrics(Registry);

impl Metrics {
    /// The metrics of the device with this state and this memory.
    pub fn new(shared: Arc<Shared>, memory: Arc<Memory>) -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Device { shared, memory }));
        Self(registry)
    }

    /// All metrics as they are now.
    ///
    /// # Errors
    /// If a value cannot be written as text.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.0)?;
        Ok(out)
    }
}

#[derive(Debug)]
struct Device {
    shared: Arc<Shared>,
    memory: Arc<Memory>,
}

impl Collector for Device {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let session = self.shared.session();
        let usage = self.memory.usage();
        for (name, help, value) in [
            ("hmm_session", "Number of the session", session.number),
            (
                "hmm_connected",
                "1 while a VM uses the device",
                session.connected.into(),
            ),
            (
                "hmm_generation",
                "Generation of the memory",
                session.generation,
            ),
        ] {
            gauge(
                encoder.encode_descriptor(name, help, None, MetricType::Gauge)?,
                value,
            )?;
        }
        for (name, help, value) in [
            ("hmm_memory_size", "Device memory", usage.size),
            (
                "hmm_memory_used",
                "Device memory that the host has allocated",
                usage.used,
            ),
            (
                "hmm_memory_peak",
                "Most of it that was seen in the session",
                usage.peak,
            ),
        ] {
            let unit = Some(&Unit::Bytes);
            gauge(
                encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?,
                value,
            )?;
        }
        let help = "Device memory that was set to zero by discards, and at the end";
        let name = "hmm_memory_cleared";
        let kind = MetricType::Counter;
        let cleared = encoder.encode_descriptor(name, help, Some(&Unit::Bytes), kind)?;
        ConstCounter::new(usage.cleared).encode(cleared)?;
        requests(&mut encoder, &session.counters)?;
        rings(&mut encoder, &session.counters)?;
        injected(&mut encoder, &session.counters)
    }
}

fn gauge(encoder: MetricEncoder, value: u64) -> fmt::Result {
    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(encoder)
}

/// The counters of each kind of request that there was, with their labels.
fn series(counters: &Counters) -> impl Iterator<Item = ([Label; 3], &SizeCounters)> {
    (0..)
        .zip(counters.queues())
        .flat_map(|(index, queue): (u32, &QueueCounters)| {
            queue.operations().flat_map(move |(operation, counters)| {
                let sizes = counters.sizes();
                let used = sizes.filter(|(_, size)| size.requests.get() > 0);
                used.map(move |(size, counters)| {
                    let labels = [
                        ("queue", index.to_string()),
                        ("operation", operation.name().into()),
                        ("size", size.name().into()),
                    ];
                    (labels, counters)
                })
            })
        })
}

fn requests(encoder: &mut DescriptorEncoder, counters: &Counters) -> fmt::Result {
    type Value = fn(&SizeCounters) -> u64;
    for (name, help, unit, value) in [
        (
            "hmm_requests",
            "Requests completed",
            None,
            (|c| c.requests.get()) as Value,
        ),
        ("hmm_frames", "Frames that succeeded", None, |c| {
            c.frames.get()
        }),
        (
            "hmm_moved",
            "Bytes of these",
            Some(&Unit::Bytes),
            SizeCounters::bytes,
        ),
    ] {
        let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
        for (labels, counters) in series(counters) {
            ConstCounter::new(value(counters)).encode(family.encode_family(&labels)?)?;
        }
    }
    type Times = fn(&SizeCounters) -> &Histogram;
    for (name, help, times) in [
        (
            "hmm_request_wait",
            "Time in the ring",
            (|c| &c.wait) as Times,
        ),
        ("hmm_request_copy", "Time that the worker took", |c| &c.copy),
    ] {
        let unit = Some(&Unit::Seconds);
        let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Histogram)?;
        for (labels, counters) in series(counters) {
            histogram(family.encode_family(&labels)?, times(counters))?;
        }
    }
    Ok(())
}

/// A bucket for each power of two.
fn histogram(mut encoder: MetricEncoder, times: &Histogram) -> fmt::Result {
    let mut buckets: Vec<(f64, u64)> = Vec::new();
    let mut within = 0;
    let mut total = 0;
    for (bound, count) in times.buckets() {
        within += count;
        total += count;
        if bound.is_power_of_two() {
            buckets.push((seconds(bound), within));
            within = 0;
        }
    }
    // The last bucket of all has no bound.
    if let Some((bound, _)) = buckets.last_mut() {
        *bound = f64::INFINITY;
    }
    encoder.encode_histogram::<[Label; 0]>(seconds(times.sum()), total, &buckets, None)
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

fn rings(encoder: &mut DescriptorEncoder, counters: &Counters) -> fmt::Result {
    type Value = fn(&QueueCounters) -> u64;
    for (name, help, kind, value) in [
        (
            "hmm_ring_occupancy",
            "Requests that waited when some last came",
            MetricType::Gauge,
            (|q| q.ring.occupancy.get()) as Value,
        ),
        (
            "hmm_ring_occupancy_max",
            "Most requests that ever waited",
            MetricType::Gauge,
            |q| q.ring.occupancy_max.get(),
        ),
        (
            "hmm_ring_full",
            "Times that the ring was full",
            MetricType::Counter,
            |q| q.ring.full.get(),
        ),
        (
            "hmm_kicks",
            "Notifications by the driver",
            MetricType::Counter,
            |q| q.ring.kicks.get(),
        ),
        (
            "hmm_calls",
            "Notifications of the driver",
            MetricType::Counter,
            |q| q.ring.calls.get(),
        ),
        (
            "hmm_calls_suppressed",
            "Used buffers of which the driver was not notified",
            MetricType::Counter,
            |q| q.ring.calls_suppressed.get(),
        ),
    ] {
        let mut family = encoder.encode_descriptor(name, help, None, kind)?;
        for (index, queue) in counters.queues().iter().enumerate() {
            let labels: [Label; 1] = [("queue", index.to_string())];
            let metric = family.encode_family(&labels)?;
            match kind {
                MetricType::Counter => ConstCounter::new(value(queue)).encode(metric)?,
                _ => gauge(metric, value(queue))?,
            }
        }
    }
    let help = "Time that the worker was busy with requests";
    let (unit, kind) = (Some(&Unit::Seconds), MetricType::Counter);
    let mut family = encoder.encode_descriptor("hmm_busy", help, unit, kind)?;
    for (index, queue) in counters.queues().iter().enumerate() {
        let labels: [Label; 1] = [("queue", index.to_string())];
        let metric = family.encode_family(&labels)?;
        ConstCounter::new(seconds(queue.busy())).encode(metric)?;
    }
    workers(encoder, counters)?;
    failures(encoder, counters)
}

fn failures(encoder: &mut DescriptorEncoder, counters: &Counters) -> fmt::Result {
    let kind = MetricType::Counter;
    let help = "Requests that failed";
    let mut family = encoder.encode_descriptor("hmm_failed_requests", help, None, kind)?;
    for (index, queue) in counters.queues().iter().enumerate() {
        failed(&mut family, index, &queue.failures.requests())?;
    }
    let help = "Frames that failed, of requests that were done in part";
    let mut family = encoder.encode_descriptor("hmm_failed_frames", help, None, kind)?;
    for (index, queue) in counters.queues().iter().enumerate() {
        failed(&mut family, index, &queue.failures.frames())?;
    }
    Ok(())
}

fn failed(
    family: &mut MetricEncoder,
    queue: usize,
    by_status: &[(&'static str, &Count)],
) -> fmt::Result {
    for (status, count) in by_status {
        let labels: [Label; 2] = [("queue", queue.to_string()), ("status", (*status).into())];
        ConstCounter::new(count.get()).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

/// What the processor counts, without a value where it does not.
fn workers(encoder: &mut DescriptorEncoder, counters: &Counters) -> fmt::Result {
    let counts: Vec<_> = counters
        .queues()
        .iter()
        .map(QueueCounters::hardware)
        .collect();
    for (event, help) in hardware::NAMES.into_iter().zip([
        "Processor cycles of the worker in user mode",
        "Instructions of the worker in user mode",
        "Accesses of the worker that missed the last cache",
        "Loads of the worker that missed the TLB",
    ]) {
        let name = format!("hmm_worker_{event}");
        let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Counter)?;
        for (index, counts) in counts.iter().enumerate() {
            if let Some(count) = counts.get(event) {
                let labels: [Label; 1] = [("queue", index.to_string())];
                ConstCounter::new(*count).encode(family.encode_family(&labels)?)?;
            }
        }
    }
    Ok(())
}

fn injected(encoder: &mut DescriptorEncoder, counters: &Counters) -> fmt::Result {
    let help = "Requests that met a fault on purpose";
    let mut family = encoder.encode_descriptor("hmm_injected", help, None, MetricType::Counter)?;
    let Ok(Value::Object(faults)) = serde_json::to_value(&counters.injected) else {
        return Err(fmt::Error);
    };
    for (fault, count) in faults {
        let labels: [Label; 1] = [("fault", fault)];
        let count = count.as_u64().unwrap_or(0);
        ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}
