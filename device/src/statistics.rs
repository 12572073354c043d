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
