//! A device over the time of a run.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use maud::{Markup, html};

use super::table;
use crate::chart::{Axis, Chart, nanoseconds};
use crate::reconcile::grouped;
use crate::sampler::{Distribution, History, Operations, Sample};

/// An operation that copies or fills.
struct Copy {
    name: &'static str,
    /// Of its marks.
    class: &'static str,
    label: &'static str,
    bytes: fn(&Sample) -> u64,
}

const COPIES: [Copy; 3] = [
    Copy {
        name: "to_device",
        class: "s1",
        label: "to the device",
        bytes: |sample| sample.to_device,
    },
    Copy {
        name: "from_device",
        class: "s2",
        label: "from the device",
        bytes: |sample| sample.from_device,
    },
    Copy {
        name: "fill",
        class: "s3",
        label: "filled with zeroes",
        bytes: |sample| sample.fill,
    },
];

/// Where a bucket of times begins, as a part of its bound, or a little before.
const BUCKET: f64 = 8.0 / 9.0;
/// An axis of whole numbers goes this far at least.
const FEW: u64 = 5;
const MIB: f64 = (1 << 20) as f64;

/// When the last sample ended.
pub(super) fn end(histories: &[History]) -> f64 {
    let samples = histories.iter().flat_map(|history| &history.samples);
    samples.map(Sample::end).fold(0.0, f64::max)
}

/// The bandwidth of a device over the time.
pub(super) fn bandwidth(history: &History, time: &Axis, left: usize) -> Markup {
    let rate =
        |sample: &Sample, copy: &Copy| (copy.bytes)(sample) as f64 / sample.seconds.max(1e-3) / 1e6;
    let rates = |copy| {
        history
            .samples
            .iter()
            .map(move |sample| (sample, rate(sample, copy)))
    };
    let most = COPIES
        .each_ref()
        .map(|copy| rates(copy).map(|(_, rate)| rate).fold(0.0, f64::max));
    let summary = COPIES
        .iter()
        .zip(most)
        .map(|(copy, most)| format!("{}: {most:.0} MB/s", copy.label));
    let chart = Chart {
        id: format!("{}-bandwidth", history.device),
        title: format!("Bandwidth of {}", history.device),
        caption: "MB/s, over the time of the run",
        summary: format!("At most {}", summary.collect::<Vec<_>>().join(", ")),
        x: time.clone(),
        y: Axis::linear(most.into_iter().fold(0.0, f64::max)),
        legend: &COPIES.each_ref().map(|copy| (copy.class, copy.label)),
        left,
        height: 220,
        wide: true,
    };
    let titles = history.samples.iter().map(|sample| {
        let mut text = format!("{:.1} s", sample.at);
        for copy in &COPIES {
            let _ = write!(text, ", {} {:.0} MB/s", copy.label, rate(sample, copy));
        }
        (sample.at, sample.end(), text)
    });
    chart.draw(&html! {
        @for copy in &COPIES {
            (chart.steps(copy.class, rates(copy).map(|(sample, rate)| (sample.at, sample.end(), rate))))
        }
        (chart.titles(titles))
    })
}

/// Everything else of it, and the times of the CPU faults on its pages, if the driver told them.
pub(super) fn details(history: &History, time: &Axis, faults: &Distribution) -> Markup {
    let device = &history.device;
    let memory = format!(
        "MiB of the device's {:.0} that the host has allocated",
        history.memory_size as f64 / MIB
    );
    let occupancy = format!(
        "requests that waited in the rings when some came; at most {} ever waited in one",
        grouped(history.occupancy_max)
    );
    let plain = [
        Gauge {
            id: "occupancy",
            title: "Ring occupancy",
            caption: &occupancy,
            unit: "requests",
            least: FEW as f64,
            value: |sample| sample.occupancy as f64,
        },
        Gauge {
            id: "busy",
            title: "Workers busy",
            caption: "% of the time; 100 % is one worker all the time",
            unit: "%",
            least: 1.0,
            value: |sample| sample.busy_ns as f64 / sample.seconds.max(1e-3) / 1e7,
        },
        Gauge {
            id: "memory",
            title: "Device memory in use",
            caption: &memory,
            unit: "MiB",
            least: 1.0,
            value: |sample| sample.memory_used as f64 / MIB,
        },
    ];
    html! {
        section {
            h2 { "Device " (device) }
            div.charts {
                (latency(history, "wait", "Wait in the ring", |operation| &operation.wait))
                (latency(history, "copy", "Time of a request", |operation| &operation.copy))
                @if !faults.is_empty() { (fault_latency(device, faults)) }
                @for gauge in plain { (gauge.draw(history, time)) }
                (failures(history, time))
            }
            (percentiles(history))
            (failure_table(history))
        }
    }
}

/// Something that is seen at each reading.
struct Gauge<'a> {
    id: &'a str,
    title: &'a str,
    caption: &'a str,
    unit: &'a str,
    /// The axis goes this far at least.
    least: f64,
    value: fn(&Sample) -> f64,
}

impl Gauge<'_> {
    fn draw(&self, history: &History, time: &Axis) -> Markup {
        let values = || {
            let samples = history.samples.iter();
            samples.map(|sample| (sample.at, sample.end(), (self.value)(sample)))
        };
        let most = values().map(|(.., value)| value).fold(0.0, f64::max);
        let chart = Chart {
            id: format!("{}-{}", history.device, self.id),
            title: self.title.to_owned(),
            caption: self.caption,
            summary: format!("At most {most:.0} {}", self.unit),
            x: time.clone(),
            y: Axis::linear(most.max(self.least)),
            legend: &[],
            left: 0,
            height: 160,
            wide: false,
        };
        let titles = values()
            .map(|(from, to, value)| (from, to, format!("{from:.1} s: {value:.0} {}", self.unit)));
        chart.draw(&html! { (chart.steps("s1", values())) (chart.titles(titles)) })
    }
}

/// Failed requests and faults on purpose, since the run began.
fn failures(history: &History, time: &Axis) -> Markup {
    let sums = |of: fn(&Sample) -> u64| {
        history.samples.iter().scan(0, move |sum, sample| {
            *sum += of(sample);
            Some((sample.at, sample.end(), *sum as f64))
        })
    };
    let total = |of: fn(&Sample) -> u64| history.samples.iter().map(of).sum::<u64>();
    let (failed, injected) = (
        total(|sample| sample.failed),
        total(|sample| sample.injected),
    );
    let chart = Chart {
        id: format!("{}-failures", history.device),
        title: "Failures".to_owned(),
        caption: "requests since the run began",
        summary: format!("{failed} requests failed, {injected} met a fault on purpose"),
        x: time.clone(),
        y: Axis::linear(failed.max(injected).max(FEW) as f64),
        legend: &[("s4", "failed requests"), ("s3", "met a fault on purpose")],
        left: 0,
        height: 160,
        wide: false,
    };
    let titles = sums(|sample| sample.failed)
        .zip(sums(|sample| sample.injected))
        .map(|((from, to, failed), (.., injected))| {
            let text = format!("{from:.1} s: {failed:.0} failed, {injected:.0} on purpose");
            (from, to, text)
        });
    // From nothing, even if the first sample has all of them.
    let nothing = history
        .samples
        .first()
        .map(|first| (first.at, first.at, 0.0));
    let steps = |of| nothing.into_iter().chain(sums(of));
    chart.draw(&html! {
        (chart.steps("s3", steps(|sample| sample.injected)))
        (chart.steps("s4", steps(|sample| sample.failed)))
        (chart.titles(titles))
    })
}

/// Times, with the class of their marks and what they are.
type Series<'a> = (&'a str, &'a str, &'a Distribution);

/// Which part of the CPU faults took less than a time.
fn fault_latency(device: &str, faults: &Distribution) -> Markup {
    let id = format!("{device}-fault-latency");
    let caption = "% of the faults that took less than a time, by the driver's count";
    let series = [("s2", "CPU faults", faults)];
    distribution(id, "Time of a CPU fault", caption, &series)
}

/// Which part of the requests took less than a time.
fn latency(
    history: &History,
    id: &str,
    title: &str,
    of: fn(&Operations) -> &Distribution,
) -> Markup {
    let series: Vec<_> = COPIES
        .iter()
        .filter_map(|copy| {
            let times = of(history.operations.get(copy.name)?);
            (!times.is_empty()).then_some((copy.class, copy.label, times))
        })
        .collect();
    let caption = "% of the requests that took less than a time";
    distribution(format!("{}-{id}", history.device), title, caption, &series)
}

fn distribution(id: String, title: &str, caption: &str, series: &[Series]) -> Markup {
    let bounds = || {
        series
            .iter()
            .flat_map(|(.., times)| times.iter().map(|(bound, _)| *bound))
    };
    let (least, most) = (
        bounds().min().unwrap_or(1000),
        bounds().max().unwrap_or(1000),
    );
    let medians: Vec<String> = series
        .iter()
        .map(|(_, label, times)| {
            let [median, last] = [50.0, 99.0].map(|percent| percentile(times, percent));
            format!("{label}: median {median}, 99th percentile {last}")
        })
        .collect();
    let legend: Vec<_> = series
        .iter()
        .map(|(class, label, _)| (*class, *label))
        .collect();
    let chart = Chart {
        id,
        title: title.to_owned(),
        caption,
        summary: medians.join("; "),
        x: Axis::duration(least as f64 * BUCKET, most as f64),
        y: Axis::linear(100.0),
        legend: &legend,
        left: 0,
        height: 160,
        wide: false,
    };
    let titles = bounds().collect::<BTreeSet<_>>().into_iter().map(|bound| {
        let mut text = format!("less than {}:", nanoseconds(bound as f64));
        for (_, label, times) in series {
            let share = shares(times)
                .take_while(|(other, _)| *other <= bound as f64)
                .last();
            let _ = write!(
                text,
                " {label} {:.1} %",
                share.map_or(0.0, |(_, share)| share)
            );
        }
        (bound as f64 * BUCKET, bound as f64, text)
    });
    chart.draw(&html! {
        @for (class, _, times) in series {
            (chart.line(class, curve(times)))
        }
        (chart.titles(titles))
    })
}

/// For each bound, which part took less, in per cent.
fn shares(times: &Distribution) -> impl Iterator<Item = (f64, f64)> + use<'_> {
    let total: u64 = times.iter().map(|(_, count)| count).sum();
    times.iter().scan(0, move |sum, (bound, count)| {
        *sum += count;
        Some((*bound as f64, 100.0 * *sum as f64 / total.max(1) as f64))
    })
}

/// The line through these parts: it rises within each bucket, and nowhere else.
fn curve(times: &Distribution) -> impl Iterator<Item = (f64, f64)> + use<'_> {
    let mut before = 0.0;
    shares(times).flat_map(move |(bound, share)| {
        let begin = (bound * BUCKET, before);
        before = share;
        [begin, (bound, share)]
    })
}

/// What so many per cent of the times are less than.
fn percentile(times: &Distribution, percent: f64) -> String {
    let bound = shares(times).find(|(_, share)| *share >= percent - 1e-9);
    bound.map_or_else(|| "-".into(), |(bound, _)| nanoseconds(bound))
}

fn percentiles(history: &History) -> Markup {
    let rows: Vec<Vec<String>> = history
        .operations
        .iter()
        .map(|(name, operation)| {
            let mut row = vec![
                name.replace('_', " "),
                grouped(operation.requests),
                grouped(operation.bytes >> 20),
            ];
            for times in [&operation.wait, &operation.copy] {
                row.extend([50.0, 99.0, 99.9].map(|percent| percentile(times, percent)));
            }
            row
        })
        .collect();
    table(
        &[
            "operation",
            "requests",
            "MiB",
            "wait p50",
            "p99",
            "p99.9",
            "copy p50",
            "p99",
            "p99.9",
        ],
        &rows,
    )
}

fn failure_table(history: &History) -> Markup {
    let rows = |what: &str, counts: &BTreeMap<String, u64>| {
        let rows = counts.iter().map(|(name, count)| {
            vec![
                format!("{what} {}", name.replace('_', " ")),
                grouped(*count),
            ]
        });
        rows.collect::<Vec<_>>()
    };
    let mut all = rows("failed:", &history.failures);
    all.extend(rows("on purpose:", &history.injected));
    html! {
        @if !all.is_empty() { (table(&["what went wrong", "requests or frames"], &all)) }
    }
}
