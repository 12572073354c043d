//! The page of a benchmark.

use std::collections::BTreeSet;

use hmm_bench::contender::Contender;
use hmm_bench::report::{Cell, entry, heading, name};
use hmm_bench::statistics::Spread;
use hmm_bench::work::{Memory, Step};
use maud::{Markup, html};

use super::{Head, devices, page, table};
use crate::bench::Bench;
use crate::chart::{Axis, Chart};

/// Classes of the contenders' bars, in their order.
const CLASSES: [&str; 4] = ["s1", "s2", "s3", "s5"];
/// Pixels of a bar.
const BAR: usize = 12;

pub(super) fn page_of(bench: &Bench) -> Markup {
    let time = Axis::time(devices::end(&bench.histories));
    let threads: BTreeSet<usize> = cells(bench).map(|cell| cell.work.memory.threads).collect();
    let body = html! {
        section {
            h2 { "Side by side" }
            p { "Medians of the rounds; a line goes from the lowest to the highest." }
            div.charts {
                @for step in Step::ALL { @for threads in &threads { (bars(bench, step, *threads)) } }
            }
        }
        section {
            h2 { "Ratios" }
            p {
                "Median (lowest-highest), or the 99th percentile of isolated faults; after it "
                "virtio-hmm's speed divided by this one's, of the rounds' geometric means: above 1 "
                "virtio-hmm is the faster."
            }
            (ratios(bench))
            (missing(bench))
        }
        section {
            h2 { "Over the time" }
            div.charts {
                @for history in &bench.histories { (devices::bandwidth(history, &time, 0)) }
            }
        }
        @for history in &bench.histories { (devices::details(history, &time, &Vec::new())) }
    };
    let verdict = match bench.passed() {
        true => "all was measured that can be",
        false => "FAILED: not all was measured, or bytes were wrong",
    };
    let head = Head {
        title: "virtio-hmm: benchmark",
        well: bench.passed(),
        verdict: verdict.to_owned(),
        facts: vec![
            ("rounds", bench.rounds.to_string()),
            ("boot", format!("{:.1} s", bench.boot_seconds)),
            ("measurement", format!("{:.0} s", bench.bench_seconds)),
            ("all", format!("{:.0} s", bench.seconds)),
        ],
    };
    page(&head, &bench.environment, bench.seed, &body)
}

/// Those that have a figure.
fn cells(bench: &Bench) -> impl Iterator<Item = &Cell> {
    bench.cells.iter().filter(|cell| cell.page_ns.is_some())
}

/// In MB/s, or in microseconds for a page.
fn figure(cell: &Cell) -> Option<Spread> {
    let micro = |time: Spread| Spread {
        median: time.median / 1e3,
        low: time.low / 1e3,
        high: time.high / 1e3,
    };
    cell.megabytes().or_else(|| cell.page_ns.map(micro))
}

/// All contenders at a step, for each memory.
fn bars(bench: &Bench, step: Step, threads: usize) -> Markup {
    let figures: Vec<(&Cell, Spread)> = cells(bench)
        .filter(|cell| cell.work.step == step && cell.work.memory.threads == threads)
        .filter_map(|cell| Some((cell, figure(cell)?)))
        .collect();
    if figures.is_empty() {
        return html! {};
    }
    let mut memories: Vec<Memory> = figures.iter().map(|(cell, _)| cell.work.memory).collect();
    memories.dedup();
    let contenders: BTreeSet<Contender> = figures.iter().map(|(cell, _)| cell.contender).collect();
    let class = |contender: Contender| {
        let classes = Contender::ALL.into_iter().zip(CLASSES);
        let mut found = classes.filter(|(other, _)| *other == contender);
        found.next().map_or("s5", |(_, class)| class)
    };
    let labels: Vec<String> = contenders.iter().map(ToString::to_string).collect();
    let legend: Vec<_> = contenders
        .iter()
        .zip(&labels)
        .map(|(contender, label)| (class(*contender), label.as_str()))
        .collect();
    let names: Vec<String> = memories
        .iter()
        .map(|memory| format!("{} {}", size(*memory), memory.pages))
        .collect();
    let rows = Axis::rows(names.iter().map(String::as_str));
    let most = figures.iter().map(|(_, figure)| figure.high);
    let thickness = 0.8 / contenders.len() as f64;
    let better = match step.is_transfer() {
        true => "more is better",
        false => "less is better",
    };
    let what = name(step).trim();
    let chart = Chart {
        id: format!("{step}-{threads}t"),
        title: format!(
            "{what}, {threads} {}",
            if threads == 1 { "thread" } else { "threads" }
        ),
        caption: better,
        summary: format!("{what}: {} bars, in the table below", figures.len()),
        x: Axis::linear(most.fold(0.0, f64::max)),
        y: rows.clone(),
        legend: &legend,
        left: 0,
        height: BAR * memories.len() * (contenders.len() + 1),
        wide: false,
    };
    chart.draw(&html! {
        @for (cell, figure) in &figures {
            @let row = memories.iter().position(|memory| *memory == cell.work.memory).unwrap_or(0);
            @let place = contenders.iter().position(|other| *other == cell.contender).unwrap_or(0);
            @let y = rows.row(row) + 0.4 - thickness * (place as f64 + 0.5);
            @let title = format!("{}, {}: {}", cell.contender, heading(cell.work.memory), entry(cell));
            (chart.bar(class(cell.contender), (0.0, figure.median), (y, thickness * 0.85), &title))
            (chart.line("s0", [(figure.low, y), (figure.high, y)]))
        }
    })
}

fn size(memory: Memory) -> String {
    let name = memory.to_string();
    name.split('-').next().unwrap_or_default().to_owned()
}

/// Every figure, work by work, and how much faster virtio-hmm is.
fn ratios(bench: &Bench) -> Markup {
    let contenders: BTreeSet<Contender> = bench.cells.iter().map(|cell| cell.contender).collect();
    let labels: Vec<String> = contenders.iter().map(ToString::to_string).collect();
    let mut head = vec!["work"];
    head.extend(labels.iter().map(String::as_str));
    let works = bench
        .cells
        .chunk_by(|one, other| one.work == other.work)
        .filter(|row| row.iter().any(|cell| cell.missing.is_none()));
    let rows: Vec<Vec<String>> = works
        .map(|row| {
            let work = row.iter().take(1).map(|cell| {
                let (memory, step) = (heading(cell.work.memory), name(cell.work.step).trim());
                format!("{memory}: {step}")
            });
            let entries = row.iter().map(|cell| match cell.missing {
                None => entry(cell),
                Some(_) => "-".to_owned(),
            });
            work.chain(entries).collect()
        })
        .collect();
    table(&head, &rows)
}

/// Why there are figures missing.
fn missing(bench: &Bench) -> Markup {
    let reasons: BTreeSet<String> = bench
        .cells
        .iter()
        .filter_map(|cell| Some(format!("{}: {}", cell.contender, cell.missing.as_ref()?)))
        .collect();
    html! {
        @if !reasons.is_empty() {
            p { "There is no figure where there is nothing to measure:" }
            ul { @for reason in &reasons { li { (reason) } } }
        }
    }
}

#[cfg(test)]
mod tests {
    use hmm_bench::work::{Pages, Work};

    use super::*;
    use crate::environment::tests::environment;
    use crate::sampler::tests::history;

    fn cell(contender: Contender, step: Step, median: f64) -> Cell {
        let memory = Memory {
            bytes: 64 << 20,
            pages: Pages::Small,
            threads: 1,
        };
        Cell {
            contender,
            work: Work { memory, step },
            page_ns: Spread::of(&[median * 0.9, median, median * 1.2]),
            p99_ns: None,
            ratio: Some(1.5),
            rounds_ns: vec![median],
            missing: None,
        }
    }

    fn bench() -> Bench {
        let mut nothing = cell(Contender::Zram, Step::Back, 1.0);
        nothing.page_ns = None;
        nothing.missing = Some("it has <no> way back".into());
        Bench {
            environment: environment(),
            seed: 7,
            rounds: 3,
            cells: vec![
                cell(Contender::VirtioHmm, Step::Back, 4096.0),
                cell(Contender::TestHmm, Step::Back, 8192.0),
                nothing,
                cell(Contender::VirtioHmm, Step::SequentialFaults, 20_000.0),
                cell(Contender::TestHmm, Step::SequentialFaults, 30_000.0),
                cell(Contender::Zram, Step::SequentialFaults, 90_000.0),
            ],
            failed: false,
            boot_seconds: 5.0,
            bench_seconds: 30.0,
            seconds: 40.0,
            histories: vec![history("hmm0")],
        }
    }

    #[test]
    fn each_step_has_a_bar_for_each_figure() {
        let page = page_of(&bench()).into_string();
        for (id, bars) in [("back-1t", 2), ("sequential-faults-1t", 3)] {
            let figure = page
                .split("<figure ")
                .find(|figure| figure.contains(&format!("id=\"{id}\"")))
                .unwrap_or_else(|| panic!("no {id}"));
            let marks = figure.split("class=\"marks\"").nth(1).unwrap();
            assert_eq!(marks.matches(" mark\"").count(), bars, "{id}");
        }
        assert!(!page.contains("id=\"to-device-1t\""));
        assert!(page.contains("id=\"hmm0-bandwidth\""));
    }

    #[test]
    fn ratios_are_in_the_table_and_reasons_below() {
        let page = page_of(&bench()).into_string();
        assert!(
            page.contains("1000 (833-1111)") && page.contains("500 (417-556)"),
            "{page}"
        );
        assert!(page.contains("1.50x"));
        assert!(page.contains("zram: it has &lt;no&gt; way back"));
    }
}
