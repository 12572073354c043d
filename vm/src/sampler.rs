//! What the devices do over the time of a run: their statistics, asked for several times a
//! second, as what happened in between.

use std::collections::BTreeMap;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::daemon;

/// Time between two readings.
const INTERVAL: Duration = Duration::from_millis(200);
/// How long a reading may take; a daemon that is stopped does not answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// Most samples of a device; there are at least half as many once the run is long enough.
const MOST: usize = 600;

/// What the daemon tells of itself, as far as it is kept.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Statistics {
    session: u64,
    time_ns: u64,
    memory: Memory,
    injected: BTreeMap<String, u64>,
    queues: Vec<Queue>,
}

#[derive(Clone, Debug, Deserialize)]
struct Memory {
    size: u64,
    used: u64,
}

#[derive(Clone, Debug, Deserialize)]
struct Queue {
    busy_ns: u64,
    operations: BTreeMap<String, Operation>,
    failures: BTreeMap<String, u64>,
    ring: Ring,
}

#[derive(Clone, Debug, Deserialize)]
struct Operation {
    errors: u64,
    sizes: BTreeMap<String, Size>,
}

#[derive(Clone, Debug, Deserialize)]
struct Size {
    requests: u64,
    frames: u64,
    bytes: u64,
    wait: Times,
    copy: Times,
}

#[derive(Clone, Debug, Deserialize)]
struct Times {
    buckets: Vec<(u64, u64)>,
}

#[derive(Clone, Debug, Deserialize)]
struct Ring {
    occupancy: u64,
    occupancy_max: u64,
}

/// What is counted, by what.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    /// Requests of an operation.
    Requests(String),
    /// Bytes that they copied or filled.
    Bytes(String),
    /// Requests of an operation that waited less than so many nanoseconds.
    Wait(String, u64),
    /// Those that took less.
    Copy(String, u64),
    /// Nanoseconds that the workers were busy with requests.
    Busy,
    /// Requests and frames that failed, by how.
    Failure(String),
    /// Faults on purpose.
    Injected(String),
}

#[derive(Clone, Debug, Default)]
struct Counts(BTreeMap<Key, u64>);

impl Counts {
    fn add(&mut self, key: Key, count: u64) {
        *self.0.entry(key).or_default() += count;
    }

    fn add_all(&mut self, counts: &Self) {
        for (key, count) in &counts.0 {
            self.add(key.clone(), *count);
        }
    }

    /// What came to those that were there before.
    fn since(&self, before: &Self) -> Self {
        let passed = self.0.iter().map(|(key, count)| {
            let before = before.0.get(key).copied().unwrap_or(0);
            (key.clone(), count.saturating_sub(before))
        });
        Self(passed.filter(|(_, count)| *count > 0).collect())
    }

    fn sum(&self, of: impl Fn(&Key) -> bool) -> u64 {
        let wanted = self.0.iter().filter(|(key, _)| of(key));
        wanted.map(|(_, count)| count).sum()
    }
}

impl Statistics {
    /// Requests that met a fault on purpose.
    pub(crate) fn injected(&self) -> u64 {
        self.injected.values().sum()
    }

    fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for (fault, count) in &self.injected {
            counts.add(Key::Injected(fault.clone()), *count);
        }
        for queue in &self.queues {
            counts.add(Key::Busy, queue.busy_ns);
            for (failure, count) in &queue.failures {
                counts.add(Key::Failure(failure.clone()), *count);
            }
            for (name, operation) in &queue.operations {
                for size in operation.sizes.values() {
                    counts.add(Key::Requests(name.clone()), size.requests);
                    counts.add(Key::Bytes(name.clone()), size.bytes);
                    for (bound, count) in &size.wait.buckets {
                        counts.add(Key::Wait(name.clone(), *bound), *count);
                    }
                    for (bound, count) in &size.copy.buckets {
                        counts.add(Key::Copy(name.clone(), *bound), *count);
                    }
                }
            }
        }
        counts
    }

    /// The sum over all queues and sizes for one operation.
    pub(crate) fn sum(&self, operation: &str) -> daemon::Operation {
        let mut sum = daemon::Operation::default();
        for operation in self
            .queues
            .iter()
            .filter_map(|queue| queue.operations.get(operation))
        {
            sum.errors += operation.errors;
            for size in operation.sizes.values() {
                sum.requests += size.requests;
                sum.frames += size.frames;
                sum.bytes += size.bytes;
            }
        }
        sum
    }

    /// Whether these counters go on from the earlier ones: another session's and another
    /// daemon's begin at zero.
    fn continues(&self, earlier: &Self) -> bool {
        self.session == earlier.session && self.time_ns >= earlier.time_ns
    }
}

/// What happened in a part of the run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Sample {
    /// When it began, in seconds of the run; there is nothing before zero.
    pub at: f64,
    /// How long it was, in seconds.
    pub seconds: f64,
    /// Bytes copied to the device.
    pub to_device: u64,
    /// Bytes copied from the device.
    pub from_device: u64,
    /// Bytes of device memory filled with zeroes.
    pub fill: u64,
    /// Requests completed.
    pub requests: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that met a fault on purpose.
    pub injected: u64,
    /// Nanoseconds that workers were busy with requests, all queues together.
    pub busy_ns: u64,
    /// The most requests that waited in the rings when some came, all queues together, of those
    /// that a reading saw.
    pub occupancy: u64,
    /// The most device memory that the host had allocated at a reading, in bytes.
    pub memory_used: u64,
}

impl Sample {
    /// When it ended, in seconds of the run.
    #[must_use]
    pub fn end(&self) -> f64 {
        self.at + self.seconds
    }

    /// Adds one that comes later. What lies between the two was not seen, and stays out.
    fn extend(&mut self, later: &Self) {
        self.seconds = later.end() - self.at;
        self.to_device += later.to_device;
        self.from_device += later.from_device;
        self.fill += later.fill;
        self.requests += later.requests;
        self.failed += later.failed;
        self.injected += later.injected;
        self.busy_ns += later.busy_ns;
        self.occupancy = self.occupancy.max(later.occupancy);
        self.memory_used = self.memory_used.max(later.memory_used);
    }
}

/// Pairs of a bound and a number: so many requests took less than so many nanoseconds, and no
/// less than the bound before.
pub type Distribution = Vec<(u64, u64)>;

/// The requests for one operation.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Operations {
    /// Requests completed.
    pub requests: u64,
    /// Bytes copied or filled.
    pub bytes: u64,
    /// How long they waited in the ring.
    pub wait: Distribution,
    /// How long the worker took for each.
    pub copy: Distribution,
}

/// A device over the time of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct History {
    /// The driver's name for it.
    pub device: String,
    /// Bytes of device memory.
    pub memory_size: u64,
    /// Most requests that ever waited in one ring.
    pub occupancy_max: u64,
    /// By operation.
    pub operations: BTreeMap<String, Operations>,
    /// Requests and frames that failed, by their status.
    pub failures: BTreeMap<String, u64>,
    /// Requests that met a fault on purpose, by fault.
    pub injected: BTreeMap<String, u64>,
    /// In the order of time, at most 600.
    pub samples: Vec<Sample>,
}

/// Makes a history of readings. A device that does not answer for a while has one sample for all
/// of it.
#[derive(Debug)]
struct Recorder {
    last: Option<(f64, Statistics)>,
    total: Counts,
    /// Seconds of a sample; twice as many whenever there are too many samples.
    width: f64,
    history: History,
}

impl Recorder {
    fn new(device: String) -> Self {
        let history = History {
            device,
            ..History::default()
        };
        Self {
            last: None,
            total: Counts::default(),
            width: INTERVAL.as_secs_f64(),
            history,
        }
    }

    /// Adds a reading at a time in seconds. From the first one on it counts.
    fn add(&mut self, now: f64, reading: Statistics) {
        let rings = || reading.queues.iter().map(|queue| &queue.ring);
        let history = &mut self.history;
        history.memory_size = reading.memory.size;
        let most = rings().map(|ring| ring.occupancy_max).max();
        history.occupancy_max = history.occupancy_max.max(most.unwrap_or(0));
        if let Some((then, last)) = &self.last {
            let before = if reading.continues(last) {
                last.counts()
            } else {
                Counts::default()
            };
            let passed = reading.counts().since(&before);
            let bytes = |operation: &str| {
                passed.sum(|key| matches!(key, Key::Bytes(name) if name == operation))
            };
            let requests = passed.sum(|key| matches!(key, Key::Requests(_)));
            let waiting: u64 = rings().map(|ring| ring.occupancy).sum();
            let sample = Sample {
                at: *then,
                seconds: now - then,
                to_device: bytes("to_device"),
                from_device: bytes("from_device"),
                fill: bytes("fill"),
                requests,
                failed: passed
                    .sum(|key| matches!(key, Key::Failure(name) if !name.starts_with("frames_"))),
                injected: passed.sum(|key| matches!(key, Key::Injected(_))),
                busy_ns: passed.sum(|key| matches!(key, Key::Busy)),
                // It was counted when requests last came.
                occupancy: if requests > 0 { waiting } else { 0 },
                memory_used: reading.memory.used,
            };
            self.total.add_all(&passed);
            self.push(sample);
        }
        self.last = Some((now, reading));
    }

    fn push(&mut self, sample: Sample) {
        let samples = &mut self.history.samples;
        join(samples, sample, self.width);
        if samples.len() > MOST {
            self.width *= 2.0;
            for sample in mem::take(samples) {
                join(samples, sample, self.width);
            }
        }
    }

    fn history(&self, zero: f64) -> History {
        let mut history = self.history.clone();
        history.samples.retain(|sample| sample.end() > zero);
        for sample in &mut history.samples {
            sample.at = milliseconds((sample.at - zero).max(0.0));
            sample.seconds = milliseconds(sample.seconds);
        }
        let operations = &mut history.operations;
        for (key, &count) in &self.total.0 {
            match key {
                Key::Requests(name) => operations.entry(name.clone()).or_default().requests = count,
                Key::Bytes(name) => operations.entry(name.clone()).or_default().bytes = count,
                Key::Wait(name, bound) => {
                    let operation = operations.entry(name.clone()).or_default();
                    operation.wait.push((*bound, count));
                }
                Key::Copy(name, bound) => {
                    let operation = operations.entry(name.clone()).or_default();
                    operation.copy.push((*bound, count));
                }
                Key::Failure(name) => drop(history.failures.insert(name.clone(), count)),
                Key::Injected(name) => drop(history.injected.insert(name.clone(), count)),
                Key::Busy => {}
            }
        }
        history
    }
}

/// Adds a sample to the last one if both are no longer than `width` together, and it follows
/// at once.
fn join(samples: &mut Vec<Sample>, sample: Sample, width: f64) {
    // Readings do not come exactly in time.
    let slack = INTERVAL.as_secs_f64() / 2.0;
    match samples.last_mut() {
        Some(last) if sample.end() - last.at < width + slack && sample.at - last.end() < slack => {
            last.extend(&sample);
        }
        _ => samples.push(sample),
    }
}

fn milliseconds(seconds: f64) -> f64 {
    (seconds * 1000.0).round() / 1000.0
}

/// Asks devices for their statistics while a run goes on, and keeps what they answered.
#[derive(Clone, Debug)]
pub struct Sampler {
    began: Instant,
    recorders: Arc<Mutex<Vec<Recorder>>>,
}

impl Default for Sampler {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            recorders: Arc::default(),
        }
    }
}

impl Sampler {
    /// Samples the devices behind these control sockets until the result is dropped, and
    /// forgets what an earlier try has brought.
    pub(crate) fn start(&self, sockets: &[PathBuf]) -> Sampling {
        let devices = (0..sockets.len()).map(|slot| Recorder::new(format!("hmm{slot}")));
        *self.lock() = devices.collect();
        let threads = sockets.iter().cloned().enumerate().map(|(slot, socket)| {
            let sampler = self.clone();
            let (stop, stopped) = mpsc::channel::<()>();
            let thread = thread::spawn(move || {
                loop {
                    sampler.sample(slot, &socket);
                    // The last reading is of the end.
                    if stopped.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout) {
                        return sampler.sample(slot, &socket);
                    }
                }
            });
            (stop, thread)
        });
        Sampling(threads.collect())
    }

    /// A device that does not answer may be gone, or be replaced, and is asked again.
    fn sample(&self, slot: usize, socket: &Path) {
        if let Ok(reading) = daemon::statistics(socket, PATIENCE) {
            let now = self.began.elapsed().as_secs_f64();
            if let Some(recorder) = self.lock().get_mut(slot) {
                recorder.add(now, reading);
            }
        }
    }

    /// What was seen from `zero` on.
    #[must_use]
    pub fn histories(&self, zero: Instant) -> Vec<History> {
        let zero = zero.saturating_duration_since(self.began).as_secs_f64();
        let recorders = self.lock();
        recorders.iter().map(|each| each.history(zero)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Recorder>> {
        self.recorders
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Goes on sampling until it is dropped.
#[derive(Debug)]
pub(crate) struct Sampling(Vec<(Sender<()>, JoinHandle<()>)>);

impl Drop for Sampling {
    fn drop(&mut self) {
        let threads: Vec<_> = self.0.drain(..).map(|(_, thread)| thread).collect();
        for thread in threads {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    /// A reading of a device that has done so many requests of two frames each.
    fn reading(session: u64, seconds: u64, requests: u64) -> Statistics {
        let times = json!({ "sum_ns": 1000 * requests, "buckets": [[2048, requests]] });
        let size = json!({
            "requests": requests, "frames": 2 * requests, "bytes": 8192 * requests,
            "wait": times, "copy": times,
        });
        serde_json::from_value(json!({
            "session": session,
            "time_ns": seconds * 1_000_000_000,
            "memory": { "size": 1 << 28, "used": requests << 12, "peak": 0, "cleared": 0 },
            "injected": { "delay": requests / 2 },
            "queues": [{
                "busy_ns": 1000 * requests,
                "operations": { "to_device": { "errors": 0, "sizes": { "64K": size } } },
                "failures": { "partial": requests / 5, "frames_fault": requests },
                "ring": { "occupancy": requests % 7, "occupancy_max": 9 },
            }],
        }))
        .unwrap()
    }

    #[test]
    fn operations_are_summed_over_queues_and_sizes() {
        let mut reading = reading(1, 1, 5);
        let mut second = reading.queues[0].clone();
        let sizes = &mut second.operations.get_mut("to_device").unwrap().sizes;
        sizes.insert("4K".into(), sizes["64K"].clone());
        reading.queues.push(second);
        let sum = reading.sum("to_device");
        assert_eq!((sum.requests, sum.frames, sum.bytes), (15, 30, 15 * 8192));
        assert_eq!(reading.sum("fill"), daemon::Operation::default());
    }

    fn recorded(readings: &[(f64, Statistics)]) -> History {
        let mut recorder = Recorder::new("hmm0".into());
        for (now, reading) in readings {
            recorder.add(*now, reading.clone());
        }
        recorder.history(0.0)
    }

    /// What a device did in half a minute.
    pub(crate) fn history(device: &str) -> History {
        let mut recorder = Recorder::new(device.into());
        for second in 0..30_u32 {
            recorder.add(
                second.into(),
                reading(1, second.into(), 40 * u64::from(second)),
            );
        }
        recorder.history(0.0)
    }

    #[test]
    fn a_sample_is_what_happened_between_two_readings() {
        let history = recorded(&[(1.0, reading(1, 0, 10)), (3.0, reading(1, 2, 30))]);
        let expected = Sample {
            at: 1.0,
            seconds: 2.0,
            to_device: 20 * 8192,
            requests: 20,
            failed: 4,
            injected: 10,
            busy_ns: 20_000,
            occupancy: 2,
            memory_used: 30 << 12,
            ..Sample::default()
        };
        assert_eq!(history.samples, [expected]);
        assert_eq!((history.memory_size, history.occupancy_max), (1 << 28, 9));
        let operation = &history.operations["to_device"];
        assert_eq!((operation.requests, operation.bytes), (20, 20 * 8192));
        assert_eq!(operation.copy, [(2048, 20)]);
        assert_eq!(history.failures["frames_fault"], 20);
        assert_eq!(history.injected["delay"], 10);
    }

    #[test]
    fn a_new_session_and_a_new_daemon_begin_at_zero() {
        let history = recorded(&[
            (1.0, reading(1, 10, 10)),
            (2.0, reading(1, 11, 15)),
            // Another session.
            (3.0, reading(2, 12, 4)),
            // A daemon that was started after the last reading, in its first session.
            (4.0, reading(2, 0, 3)),
        ]);
        let requests: Vec<u64> = history.samples.iter().map(|each| each.requests).collect();
        assert_eq!(requests, [5, 4, 3]);
        assert_eq!(history.operations["to_device"].requests, 12);
    }

    #[test]
    fn what_was_before_zero_is_cut_off() {
        let mut recorder = Recorder::new("hmm0".into());
        for second in 0..5_u32 {
            recorder.add(second.into(), reading(1, second.into(), 10));
        }
        let history = recorder.history(1.5);
        let starts: Vec<f64> = history.samples.iter().map(|each| each.at).collect();
        assert_eq!(starts, [0.0, 0.5, 1.5]);
    }

    #[test]
    fn a_long_run_keeps_every_byte_in_few_samples() {
        let mut recorder = Recorder::new("hmm0".into());
        let readings = 3_000_u32;
        for number in 0..=readings {
            let now = f64::from(number) * INTERVAL.as_secs_f64();
            recorder.add(now, reading(1, number.into(), number.into()));
        }
        let history = recorder.history(0.0);
        let samples = &history.samples;
        assert!(
            (MOST / 2..=MOST).contains(&samples.len()),
            "{}",
            samples.len()
        );
        let requests: u64 = samples.iter().map(|each| each.requests).sum();
        assert_eq!(requests, u64::from(readings));
        for pair in samples.windows(2) {
            assert!((pair[0].end() - pair[1].at).abs() < 0.01, "{pair:?}");
        }
        let longest = samples.iter().map(|each| each.seconds).fold(0.0, f64::max);
        assert!(
            longest <= recorder.width + INTERVAL.as_secs_f64(),
            "{longest}"
        );
    }

    #[test]
    fn sampling_ends_with_the_run_though_nobody_answers() {
        let directory = tempfile::tempdir().unwrap();
        let sampler = Sampler::default();
        drop(sampler.start(&[directory.path().join("nobody")]));
        let [history] = &sampler.histories(Instant::now())[..] else {
            panic!("one device")
        };
        assert_eq!(
            (history.device.as_str(), history.samples.len()),
            ("hmm0", 0)
        );
    }
}
