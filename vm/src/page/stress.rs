//! The page of a stress.

use std::collections::BTreeSet;

use maud::{Markup, html};

use super::{Head, devices, page, table};
use crate::chart::{Axis, Chart, nanoseconds};
use crate::reconcile::{self, differs, grouped};
use crate::sampler::Distribution;
use crate::stress::{Failure, Stress, Turn};

pub(super) fn page_of(stress: &Stress) -> Markup {
    let time = Axis::time(end(stress));
    let names = stress.timeline.iter().map(|turn| turn.name.chars().count());
    let left = names.max().unwrap_or(0);
    let histories = &stress.histories;
    let body = html! {
        section {
            h2 { "Over the time" }
            div.charts {
                @for history in histories { (devices::bandwidth(history, &time, left)) }
                (turns(&stress.timeline, &time))
                @if stress.timeline.iter().any(Turn::has_faults) {
                    (faults(&stress.timeline, &time, left))
                }
            }
        }
        (failures(&stress.failures))
        @for history in histories {
            (devices::details(history, &time, &fault_latency(&stress.devices, &history.device)))
        }
        (sides(&stress.devices))
        (skipped(&stress.skipped_names))
    };
    let head = Head {
        title: "virtio-hmm: stress",
        well: stress.passed(),
        verdict: verdict(stress),
        facts: facts(stress),
    };
    page(&head, &stress.environment, stress.seed, &body)
}

/// When the last thing happened that is shown.
fn end(stress: &Stress) -> f64 {
    let turns = stress.timeline.iter().map(|turn| turn.at + turn.seconds);
    turns.fold(devices::end(&stress.histories), f64::max)
}

fn verdict(stress: &Stress) -> String {
    if stress.passed() {
        return "passed".into();
    }
    let mut reasons = Vec::new();
    match stress.failures.len() {
        0 => {}
        1 => reasons.push("1 case failed".to_owned()),
        count => reasons.push(format!("{} cases failed", grouped(count as u64))),
    }
    for (is_so, reason) in [
        (stress.mismatches > 0, "pages did not hold what they should"),
        (stress.devices.is_empty(), "counters were not compared"),
        (!stress.reconciled, "counters do not reconcile"),
        (stress.frames_lost != Some(0), "device memory may be lost"),
        (stress.kmemleak.unwrap_or(0) > 0, "kernel memory is lost"),
        (!stress.unloaded, "the module stays"),
    ] {
        reasons.extend(is_so.then(|| reason.to_owned()));
    }
    reasons.extend(stress.ended_by.clone());
    format!("FAILED: {}", reasons.join("; "))
}

fn facts(stress: &Stress) -> Vec<(&'static str, String)> {
    let all = |wanted: &str| {
        let operations = stress
            .histories
            .iter()
            .map(|history| history.operations.get(wanted));
        let bytes = operations.map(|each| each.map_or(0, |operation| operation.bytes));
        format!("{} MiB", grouped(bytes.sum::<u64>() >> 20))
    };
    let or_not = |count: Option<u64>| count.map_or("not looked at".into(), grouped);
    let kmemleak = match (stress.kmemleak, stress.frames_lost) {
        (None, Some(_)) => "not built in".into(),
        (count, _) => or_not(count),
    };
    vec![
        (
            "counters",
            if stress.reconciled {
                "reconcile"
            } else {
                "do not reconcile"
            }
            .into(),
        ),
        ("time", format!("{:.0} s", stress.seconds)),
        ("turns", grouped(stress.turns)),
        ("cases passed", grouped(stress.passed)),
        ("cases failed", grouped(stress.failed)),
        ("cases skipped", grouped(stress.skipped)),
        ("wrong pages", grouped(stress.mismatches)),
        ("to the device", all("to_device")),
        ("from the device", all("from_device")),
        ("filled", all("fill")),
        ("frames lost", or_not(stress.frames_lost)),
        ("kmemleak", kmemleak),
        (
            "module",
            if stress.unloaded { "unloaded" } else { "stays" }.into(),
        ),
    ]
}

/// What failed, by the command that repeats it.
fn failures(failures: &[Failure]) -> Markup {
    html! {
        @if !failures.is_empty() {
            section {
                h2 { "Failures" }
                @for turn in failures.chunk_by(|one, next| one.command == next.command) {
                    @for failure in turn { p { strong { (failure.name) } ": " (failure.reason) } }
                    @for failure in turn.iter().take(1) { pre { (failure.command) } }
                }
            }
        }
    }
}

fn skipped(names: &BTreeSet<String>) -> Markup {
    html! {
        @if !names.is_empty() {
            section {
                h2 { "Cases that could not run here" }
                ul { @for name in names { li { (name) } } }
            }
        }
    }
}

/// Which turn was taken when.
fn turns(timeline: &[Turn], time: &Axis) -> Markup {
    let mut names: Vec<&str> = Vec::new();
    for turn in timeline {
        if !names.contains(&turn.name.as_str()) {
            names.push(&turn.name);
        }
    }
    let rows = Axis::rows(names.iter().copied());
    let failed = timeline.iter().filter(|turn| turn.failed > 0).count();
    let chart = Chart {
        id: "turns".into(),
        title: "Turns".into(),
        caption: "which ran when, over the time of the run",
        summary: format!(
            "{} turns of {} kinds, {failed} failed",
            timeline.len(),
            names.len()
        ),
        x: time.clone(),
        y: rows.clone(),
        legend: &[
            ("s3", "passed"),
            ("s5", "nothing but skipped"),
            ("s4", "failed"),
        ],
        left: 0,
        height: 16 * names.len().max(2),
        wide: true,
    };
    chart.draw(&html! {
        @for turn in timeline {
            @let class = match (turn.failed, turn.passed) { (0, 0) => "s5", (0, _) => "s3", _ => "s4" };
            @let row = names.iter().position(|name| *name == turn.name).unwrap_or(0);
            @let title = format!(
                "{} seed {}: {} passed, {} failed, {} skipped; {:.1} s to {:.1} s",
                turn.name, turn.seed, turn.passed, turn.failed, turn.skipped, turn.at, turn.at + turn.seconds
            );
            (chart.bar(class, (turn.at, turn.at + turn.seconds), (rows.row(row), 0.8), &title))
        }
    })
}

/// How long CPU faults on device pages took in the guest, turn by turn.
fn faults(timeline: &[Turn], time: &Axis, left: usize) -> Markup {
    let turns = || {
        timeline
            .iter()
            .filter(|turn| turn.fault_latency_ns.count > 0)
    };
    let medians = turns().map(|turn| turn.fault_latency_ns.p50);
    let tails = turns().map(|turn| turn.fault_latency_ns.p99);
    let (least, most) = (medians.min().unwrap_or(1000), tails.max().unwrap_or(1000));
    let [fastest, slowest] = [least, most].map(|ns| nanoseconds(ns as f64));
    let chart = Chart {
        id: "faults".into(),
        title: "CPU faults on device pages".into(),
        caption: "time that a fault took in the guest, by turn",
        summary: format!("Medians from {fastest}, 99th percentiles up to {slowest}"),
        x: time.clone(),
        y: Axis::duration(least as f64, most as f64),
        legend: &[("s1", "median"), ("s2", "99th percentile")],
        left,
        height: 160,
        wide: true,
    };
    let middle = |turn: &Turn| turn.at + turn.seconds / 2.0;
    let titles = turns().map(|turn| {
        let latency = turn.fault_latency_ns;
        let [median, tail, most] =
            [latency.p50, latency.p99, latency.max].map(|ns| nanoseconds(ns as f64));
        let text = format!(
            "{}: {} faults, median {median}, 99th percentile {tail}, longest {most}",
            turn.name,
            grouped(latency.count)
        );
        (turn.at, turn.at + turn.seconds, text)
    });
    chart.draw(&html! {
        (chart.dots("s1", turns().map(|turn| (middle(turn), turn.fault_latency_ns.p50 as f64))))
        (chart.dots("s2", turns().map(|turn| (middle(turn), turn.fault_latency_ns.p99 as f64))))
        (chart.titles(titles))
    })
}

/// The times of the CPU faults on a device's pages; none if the run had no good end.
fn fault_latency(devices: &[reconcile::Device], name: &str) -> Distribution {
    let found = devices.iter().find(|device| device.device == name);
    found.map_or_else(Vec::new, |device| device.driver.fault_latency.clone())
}

/// What driver and daemon counted.
fn sides(devices: &[reconcile::Device]) -> Markup {
    let rows: Vec<Vec<String>> = devices
        .iter()
        .flat_map(|device| device.counters.iter().map(move |each| (device, each)))
        .flat_map(|(device, (name, sides))| {
            sides.rows().map(|(what, numbers)| {
                let name = format!("{} {} {what}", device.device, name.replace('_', " "));
                let [guest, host, queues] = numbers.map(grouped);
                vec![name, guest, host, queues, differs(numbers).into()]
            })
        })
        .collect();
    html! {
        @if !rows.is_empty() {
            section {
                h2 { "Both sides" }
                (table(&["", "guest", "host", "its queues", ""], &rows))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Counts;
    use crate::environment::tests::environment;
    use crate::sampler::History;
    use crate::sampler::tests::history;
    use hmm_stress::report::Latency;

    fn turn(number: u32, name: &str) -> Turn {
        Turn {
            name: name.into(),
            seed: 7,
            at: f64::from(number) * 3.0,
            seconds: 2.5,
            passed: 1,
            failed: u64::from(number == 4),
            skipped: 0,
            fault_latency_ns: Latency {
                count: 100,
                p50: 80_000 + 1000 * u64::from(number),
                p99: 2_000_000,
                max: 9_000_000,
            },
        }
    }

    fn stress() -> Stress {
        let (guest, host) = reconcile::tests::agreeing();
        let names = ["ping-pong", "model", "oversubscribed"].into_iter().cycle();
        Stress {
            environment: environment(),
            seed: 7,
            seconds: 29.0,
            turns: 10,
            passed: 9,
            failed: 1,
            skipped: 1,
            skipped_names: BTreeSet::from(["ksm: <none>".to_owned()]),
            mismatches: 0,
            operations: 5,
            failures: vec![Failure {
                name: "model".into(),
                seed: 7,
                reason: "<script>alert(1)</script>".into(),
                command: "cargo vm stress --turn model --seed 7".into(),
            }],
            timeline: (0..10)
                .zip(names)
                .map(|(number, name)| turn(number, name))
                .collect(),
            devices: reconcile::devices(&guest, &[Counts::All(host)]),
            reconciled: true,
            frames_lost: Some(0),
            kmemleak: None,
            unloaded: true,
            ended_by: None,
            histories: vec![history("hmm0"), history("hmm1")],
            status: 1,
        }
    }

    #[test]
    fn every_chart_is_there_and_has_marks() {
        let page = page_of(&stress()).into_string();
        // Of the other device the driver has told nothing.
        let mut ids = vec![
            "turns".to_owned(),
            "faults".into(),
            "hmm0-fault-latency".into(),
        ];
        for device in ["hmm0", "hmm1"] {
            for chart in [
                "bandwidth",
                "wait",
                "copy",
                "occupancy",
                "busy",
                "memory",
                "failures",
            ] {
                ids.push(format!("{device}-{chart}"));
            }
        }
        for id in &ids {
            let figure = page
                .split("<figure ")
                .find(|figure| figure.contains(&format!("id=\"{id}\"")));
            let figure = figure.unwrap_or_else(|| panic!("no {id}"));
            assert!(
                figure.contains("d=\"M") || figure.contains("<rect class=\"s"),
                "{id}"
            );
        }
        assert_eq!(page.matches("<figure ").count(), ids.len());
    }

    #[test]
    fn nothing_from_outside_is_taken_for_markup() {
        let page = page_of(&stress()).into_string();
        assert!(!page.contains("<script") && page.contains("&lt;script&gt;alert(1)"));
        assert!(page.contains("ksm: &lt;none&gt;"));
    }

    #[test]
    fn a_page_refers_to_nothing_but_its_data() {
        let page = page_of(&stress()).into_string();
        let links: Vec<&str> = page.split("href=").skip(1).collect();
        assert!(
            links.len() == 1 && links[0].starts_with("\"report.json\""),
            "{links:?}"
        );
        assert!(!page.contains("src=") && !page.contains("url(") && !page.contains("@import"));
    }

    #[test]
    fn a_failure_and_what_repeats_it_are_shown() {
        let page = page_of(&stress()).into_string();
        assert!(page.contains("FAILED: 1 case failed"));
        assert!(page.contains("cargo vm stress --turn model --seed 7"));
        let mut stress = stress();
        stress.failures.clear();
        assert!(page_of(&stress).into_string().contains("passed"));
    }

    #[test]
    fn a_run_without_a_turn_or_a_sample_has_a_page() {
        let mut stress = stress();
        stress.timeline.clear();
        stress.histories = vec![History::default()];
        stress.devices.clear();
        let page = page_of(&stress).into_string();
        assert!(page.contains("id=\"turns\"") && !page.contains("NaN") && !page.contains("inf"));
    }
}
