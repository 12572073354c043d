//! Everything that is counted, in one piece of JSON.

use std::sync::LazyLock;
use std::time::Instant;

use serde_json::{Map, Value, json};

use crate::{
    counters::{OperationCounters, QueueCounters},
    memory::Memory,
    session::Session,
};

/// What the clock of statistics counts from.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The statistics of `session`, whose device has `memory`. Operations and sizes
/// without a request are left out.
pub fn statistics(session: &Session, memory: &Memory) -> Value {
    let now = START.elapsed().as_nanos();
    json!({
        "session": session.number,
        "connected": session.connected,
        "generation": session.generation,
        "time_ns": u64::try_from(now).unwrap_or(u64::MAX),
        "memory": memory.usage(),
        "injected": session.counters.injected,
        "queues": session.counters.queues().iter().map(queue).collect::<Vec<_>>(),
    })
}

fn queue(counters: &QueueCounters) -> Value {
    let operations: Map<String, Value> = counters
        .operations()
        .map(|(kind, counters)| (kind.name().into(), operation(counters)))
        .filter(|(_, value)| value != &Value::Null)
        .collect();
    json!({
        "busy_ns": counters.busy(),
        "operations": operations,
        "failures": counters.failures,
        "ring": counters.ring,
        "hardware": counters.hardware(),
    })
}

fn operation(counters: &OperationCounters) -> Value {
    let sizes: Map<String, Value> = counters
        .sizes()
        .filter(|(_, counters)| counters.requests.get() > 0)
        .map(|(size, counters)| (size.name().into(), json!(counters)))
        .collect();
    if sizes.is_empty() {
        return Value::Null;
    }
    json!({ "errors": counters.errors, "sizes": sizes })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        hardware::{NAMES, tests::events_of_any_machine},
        memory::Backing,
        metrics::Metrics,
        session::Shared,
    };

    #[test]
    fn what_the_processor_counts_is_told_only_where_it_counts() {
        let Some(events) = events_of_any_machine() else {
            return;
        };
        let memory = Arc::new(Memory::new(2 << 20, Backing::Sparse).unwrap());
        let shared = Arc::new(Shared::new(2 << 20, 1, events));
        let counters = shared.begin().counters;
        // This thread is the worker of queue 2.
        counters.count_hardware(2);
        counters.count_hardware(9);
        let statistics = statistics(&shared.session(), &memory);
        assert_eq!(statistics["queues"][1]["hardware"], json!({}));
        let text = Metrics::new(Arc::clone(&shared), memory).encode().unwrap();
        for name in NAMES {
            let count = &statistics["queues"][2]["hardware"][name];
            assert!(count.as_u64().unwrap() > 0, "{statistics}");
            let metric = format!("hmm_worker_{name}_total{{queue=");
            let values = text.lines().filter_map(|line| line.strip_prefix(&metric));
            let values: Vec<_> = values.collect();
            assert!(
                values.len() == 1 && values[0].starts_with("\"2\"} "),
                "{text}"
            );
        }
        // The next VM's workers are other threads.
        assert_eq!(shared.begin().counters.queues()[2].hardware(), [].into());
    }
}
