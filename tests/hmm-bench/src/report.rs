//! The lines that the program prints, and the table that is made of them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use virtio_hmm_client::PAGE_SIZE;

use crate::contender::Contender;
use crate::statistics::{Spread, geometric_mean, quantile};
use crate::work::{Memory, Pages, Step, Work};

/// Why a cell is empty of which no round says why.
const NOTHING: &str = "no round gave a figure";

/// One line of `--json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Line {
    /// The first.
    Begin {
        /// Seed of the run; it reproduces the choices made.
        seed: u64,
        /// Rounds.
        rounds: u32,
        /// Who takes part, in their order.
        contenders: Vec<Contender>,
    },
    /// A contender did a work in one round.
    Sample {
        /// Who.
        contender: Contender,
        /// What.
        #[serde(flatten)]
        work: Work,
        /// The round, from 1.
        round: u32,
        /// Nanoseconds for each page of 4 KiB: one value, or one for each isolated fault.
        page_ns: Vec<f64>,
    },
    /// A contender could not do a work.
    Missing {
        /// Who.
        contender: Contender,
        /// What.
        #[serde(flatten)]
        work: Work,
        /// Whether it tried, and it went wrong.
        failed: bool,
        /// Why.
        reason: String,
    },
    /// The last.
    End {
        /// How long it took, in seconds.
        seconds: f64,
    },
}

/// What one contender did in one work, all rounds together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Who.
    pub contender: Contender,
    /// What.
    #[serde(flatten)]
    pub work: Work,
    /// Nanoseconds for each page of 4 KiB, over the rounds: the median round, the fastest and
    /// the slowest. Of isolated faults a round counts with its median.
    pub page_ns: Option<Spread>,
    /// The 99th percentile of all isolated faults, in nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p99_ns: Option<f64>,
    /// The geometric mean of the contender's rounds divided by that of virtio-hmm's: above 1
    /// where virtio-hmm is the faster. Medians of a few rounds jump where the machine has two
    /// speeds.
    pub ratio: Option<f64>,
    /// Each round, as in `page_ns`.
    pub rounds_ns: Vec<f64>,
    /// Why there is nothing of the above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing: Option<String>,
}

impl Cell {
    /// Millions of bytes a second, where the work is about that.
    #[must_use]
    pub fn megabytes(&self) -> Option<Spread> {
        let rate = |page_ns: f64| PAGE_SIZE as f64 * 1e3 / page_ns;
        let time = self.page_ns.filter(|_| self.work.step.is_transfer())?;
        Some(Spread {
            median: rate(time.median),
            low: rate(time.high),
            high: rate(time.low),
        })
    }
}

/// Collects the lines of one run.
#[derive(Clone, Debug, Default)]
pub struct Results {
    /// Seed of the run.
    pub seed: u64,
    /// Rounds that were asked for.
    pub rounds: u32,
    /// How long it took, in seconds; `None` if it did not come to its end.
    pub seconds: Option<f64>,
    contenders: Vec<Contender>,
    samples: BTreeMap<(Work, Contender), Vec<Vec<f64>>>,
    missing: BTreeMap<(Work, Contender), String>,
    failed: bool,
}

impl Results {
    /// Adds a line.
    pub fn add(&mut self, line: Line) {
        match line {
            Line::Begin {
                seed,
                rounds,
                contenders,
            } => {
                self.seed = seed;
                self.rounds = rounds;
                self.contenders = contenders;
            }
            Line::Sample {
                contender,
                work,
                page_ns,
                ..
            } => {
                let samples = self.samples.entry((work, contender)).or_default();
                samples.push(page_ns);
            }
            Line::Missing {
                contender,
                work,
                failed,
                reason,
            } => {
                self.failed |= failed && contender == Contender::VirtioHmm;
                self.missing.entry((work, contender)).or_insert(reason);
            }
            Line::End { seconds } => self.seconds = Some(seconds),
        }
    }

    /// Whether something of virtio-hmm went wrong.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.failed
    }

    /// Every work of every contender, work by work.
    #[must_use]
    pub fn cells(&self) -> Vec<Cell> {
        let mut works: Vec<Work> = self.samples.keys().map(|&(work, _)| work).collect();
        works.extend(self.missing.keys().map(|&(work, _)| work));
        works.sort_by_key(|work| {
            let Memory {
                bytes,
                pages,
                threads,
            } = work.memory;
            (threads, pages, bytes, work.step)
        });
        works.dedup();
        let mut cells = Vec::new();
        for work in works {
            let ours = geometric_mean(&self.cell(work, Contender::VirtioHmm).rounds_ns);
            for &contender in &self.contenders {
                let mut cell = self.cell(work, contender);
                let theirs = geometric_mean(&cell.rounds_ns);
                cell.ratio = theirs.zip(ours).map(|(theirs, ours)| theirs / ours);
                cells.push(cell);
            }
        }
        cells
    }

    fn cell(&self, work: Work, contender: Contender) -> Cell {
        let samples = self.samples.get(&(work, contender));
        let samples = samples.map(Vec::as_slice).unwrap_or_default();
        let missing = self.missing.get(&(work, contender)).cloned();
        let rounds_ns: Vec<f64> = match missing {
            Some(_) => Vec::new(),
            None => samples
                .iter()
                .filter_map(|round| quantile(round, 0.5))
                .collect(),
        };
        let isolated = work.step.is_isolated() && missing.is_none();
        Cell {
            contender,
            work,
            page_ns: Spread::of(&rounds_ns),
            p99_ns: isolated
                .then(|| quantile(&samples.concat(), 0.99))
                .flatten(),
            ratio: None,
            missing: missing.or_else(|| rounds_ns.is_empty().then(|| NOTHING.to_owned())),
            rounds_ns,
        }
    }
}

/// The cells as a table for people: a line for each work, and below why what is missing.
#[must_use]
pub fn table(cells: &[Cell]) -> String {
    let mut text = String::new();
    let mut reasons: Vec<&str> = Vec::new();
    let mut memory = None;
    let mut contenders: Vec<Contender> = cells.iter().map(|cell| cell.contender).collect();
    contenders.sort();
    contenders.dedup();
    for row in cells.chunk_by(|one, other| one.work == other.work) {
        let Some(work) = row.first().map(|cell| cell.work) else {
            continue;
        };
        if memory != Some(work.memory) {
            let separator = if memory.is_some() { "\n" } else { "" };
            let _ = write!(text, "{separator}{:<26}", heading(work.memory));
            for contender in &contenders {
                let _ = write!(text, "{:>26}", contender.to_string());
            }
            text.push('\n');
            memory = Some(work.memory);
        }
        let _ = write!(text, "  {:<24}", name(work.step));
        for cell in row {
            let entry = match &cell.missing {
                None => entry(cell),
                Some(reason) => {
                    let known = reasons.iter().position(|known| known == reason);
                    let number = known.unwrap_or_else(|| {
                        reasons.push(reason);
                        reasons.len() - 1
                    });
                    format!("[{}]", number + 1)
                }
            };
            let _ = write!(text, "{entry:>26}");
        }
        text.push('\n');
    }
    for (number, reason) in (1..).zip(reasons) {
        let _ = write!(text, "\n[{number}] {reason}");
    }
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

/// Says to a person what memory it is.
#[must_use]
pub fn heading(memory: Memory) -> String {
    let name = memory.to_string();
    let size = name.split('-').next().unwrap_or_default();
    let pages = match memory.pages {
        Pages::Small => "4 KiB pages",
        Pages::Huge => "THP",
    };
    let threads = match memory.threads {
        1 => "1 thread".to_owned(),
        threads => format!("{threads} threads"),
    };
    format!("{size} {pages}, {threads}")
}

/// Says to a person what is done, and in which unit its figures are.
#[must_use]
pub fn name(step: Step) -> &'static str {
    match step {
        Step::ToDevice => "to the device, MB/s",
        Step::ToDeviceNet => "  net of copies, MB/s",
        Step::Back => "back, MB/s",
        Step::SequentialFaults => "sequential, us a page",
        Step::RandomFaults => "random, us a page",
        Step::IsolatedFault => "isolated fault, us",
        Step::IdleFault => "isolated after pause, us",
    }
}

/// "412 (390-430) 1.30x"; an isolated fault has its 99th percentile instead of the spread.
#[must_use]
pub fn entry(cell: &Cell) -> String {
    let text = match (cell.megabytes(), cell.page_ns, cell.p99_ns) {
        (Some(rate), ..) => format!("{:.0} ({:.0}-{:.0})", rate.median, rate.low, rate.high),
        (None, Some(time), Some(p99)) => {
            format!("{} (p99 {})", microseconds(time.median), microseconds(p99))
        }
        (None, Some(time), None) => format!(
            "{} ({}-{})",
            microseconds(time.median),
            microseconds(time.low),
            microseconds(time.high)
        ),
        (None, None, _) => String::new(),
    };
    match cell.ratio {
        Some(ratio) if cell.contender != Contender::VirtioHmm => format!("{text} {ratio:>5.2}x"),
        _ => text,
    }
}

/// Three digits, where there are as many.
fn microseconds(ns: f64) -> String {
    let decimals = usize::from(ns < 100e3);
    format!("{:.decimals$}", ns / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(step: Step) -> Work {
        Work {
            memory: Memory {
                bytes: 64 << 20,
                pages: Pages::Small,
                threads: 1,
            },
            step,
        }
    }

    fn results(lines: impl IntoIterator<Item = Line>) -> Results {
        let mut results = Results::default();
        results.add(Line::Begin {
            seed: 7,
            rounds: 3,
            contenders: vec![Contender::VirtioHmm, Contender::TestHmm],
        });
        lines.into_iter().for_each(|line| results.add(line));
        results
    }

    fn samples(contender: Contender, step: Step, rounds: &[&[f64]]) -> Vec<Line> {
        let line = |(round, page_ns): (u32, &&[f64])| Line::Sample {
            contender,
            work: work(step),
            round,
            page_ns: page_ns.to_vec(),
        };
        (1..).zip(rounds).map(line).collect()
    }

    #[test]
    fn a_ratio_above_one_says_that_this_driver_is_faster() {
        let mut lines = samples(
            Contender::VirtioHmm,
            Step::Back,
            &[&[4096.0], &[4096.0], &[512.0]],
        );
        lines.extend(samples(Contender::TestHmm, Step::Back, &[&[8192.0]]));
        let cells = results(lines).cells();
        assert_eq!(cells.len(), 2);
        let rate = cells[0].megabytes().unwrap();
        assert_eq!((rate.low, rate.median, rate.high), (1000.0, 1000.0, 8000.0));
        assert_eq!(cells[0].ratio, Some(1.0));
        let ratio = cells[1].ratio.unwrap();
        assert!(
            (ratio - 4.0).abs() < 1e-9,
            "of the means, not the medians: {ratio}"
        );
        let text = table(&cells);
        assert!(text.contains("1000 (1000-8000)"), "{text}");
        assert!(text.contains("500 (500-500)  4.00x"), "{text}");
    }

    #[test]
    fn isolated_faults_have_the_percentile_of_all_rounds() {
        let step = Step::IsolatedFault;
        let rounds: [&[f64]; 2] = [&[1000.0, 3000.0, 2000.0], &[4000.0, 6000.0, 9000.0]];
        let cells = results(samples(Contender::VirtioHmm, step, &rounds)).cells();
        assert_eq!(cells[0].page_ns.unwrap().median, 4000.0);
        assert!(cells[0].p99_ns.unwrap() > 8000.0);
        assert_eq!(cells[1].missing.as_deref(), Some(NOTHING));
    }

    #[test]
    fn what_is_missing_says_why_even_after_samples() {
        let mut lines = samples(Contender::TestHmm, Step::Back, &[&[1.0]]);
        lines.push(Line::Missing {
            contender: Contender::TestHmm,
            work: work(Step::Back),
            failed: true,
            reason: "no device".into(),
        });
        let cells = results(lines).cells();
        assert!(cells[1].page_ns.is_none() && cells[1].rounds_ns.is_empty());
        let text = table(&cells);
        assert!(
            text.contains("[2]\n") && text.contains("[2] no device"),
            "{text}"
        );
    }

    #[test]
    fn lines_and_cells_come_back_as_they_were() {
        let line = &samples(Contender::TestHmm, Step::RandomFaults, &[&[1.5]])[0];
        let text = serde_json::to_string(line).unwrap();
        assert!(text.contains(r#""contender":"test-hmm","bytes":67108864,"pages":"small""#));
        let again: Line = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&again).unwrap(), text);
        for cell in results([again]).cells() {
            let text = serde_json::to_string(&cell).unwrap();
            assert_eq!(serde_json::from_str::<Cell>(&text).unwrap(), cell);
        }
    }
}
