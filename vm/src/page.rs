//! The page that shows a result: one file with everything in it, for a browser without network.

mod bench;
mod devices;
mod stress;

use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde::Serialize;

use crate::bench::Bench;
use crate::environment::Environment;
use crate::sampler::History;
use crate::stress::Stress;

/// Version of what is in `report.json`; another number where a program that reads it has to be
/// changed.
const SCHEMA_VERSION: u32 = 1;

/// `report.json`.
#[derive(Debug, Serialize)]
struct Data<'a, T> {
    schema_version: u32,
    /// The command.
    kind: &'a str,
    result: &'a T,
    /// The devices over the time.
    devices: &'a [History],
}

/// A result as a page, and as JSON.
#[derive(Debug)]
pub struct Pages {
    /// The page.
    pub html: String,
    /// The JSON.
    pub json: String,
}

impl Pages {
    /// Those of a stress.
    #[must_use]
    pub fn of_stress(stress: &Stress) -> Self {
        Self::new("stress", stress, &stress.histories, stress::page_of(stress))
    }

    /// Those of a benchmark.
    #[must_use]
    pub fn of_bench(bench: &Bench) -> Self {
        Self::new("bench", bench, &bench.histories, bench::page_of(bench))
    }

    fn new<T: Serialize>(kind: &str, result: &T, devices: &[History], page: Markup) -> Self {
        let data = Data {
            schema_version: SCHEMA_VERSION,
            kind,
            result,
            devices,
        };
        Self {
            html: page.into_string(),
            // Plain structures always serialize.
            json: serde_json::to_string_pretty(&data).unwrap_or_default() + "\n",
        }
    }
}

/// What is said before everything else.
struct Head<'a> {
    title: &'a str,
    well: bool,
    verdict: String,
    facts: Vec<(&'a str, String)>,
}

fn page(head: &Head, environment: &Environment, seed: u64, body: &Markup) -> Markup {
    let Head {
        title,
        well,
        verdict,
        facts,
    } = head;
    let cpus = format!("{} ({} used)", environment.cpu, environment.cpus);
    let guest = format!(
        "Linux {} with {} CPUs",
        environment.kernel, environment.guest_cpus
    );
    let environment = [
        ("Command", environment.command.clone()),
        ("Date", environment.date.clone()),
        ("Commit", environment.commit.clone()),
        ("Seed", seed.to_string()),
        ("Guest", guest),
        ("Accelerator", environment.accelerator.to_string()),
        ("QEMU", environment.qemu.clone()),
        ("Host's CPU", cpus),
    ];
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(include_str!("page/style.css"))) }
            }
            body {
                header {
                    h1 { (title) }
                    p.verdict.well[*well].ill[!well] { (verdict) }
                    dl.facts {
                        @for (name, value) in facts { div { dt { (name) } dd { (value) } } }
                    }
                }
                main { (body) }
                footer {
                    h2 { "Environment" }
                    dl.environment {
                        @for (name, value) in &environment { dt { (name) } dd { (value) } }
                    }
                    p { a href="report.json" { "report.json" } " beside this page has the same data for programs." }
                }
            }
        }
    }
}

/// A table whose first column names the rows, and whose others are numbers.
fn table(head: &[&str], rows: &[Vec<String>]) -> Markup {
    html! {
        div.scroll { table {
            thead { tr { @for cell in head { th scope="col" { (cell) } } } }
            tbody {
                @for row in rows {
                    tr {
                        @for (column, cell) in row.iter().enumerate() {
                            @if column == 0 { th scope="row" { (cell) } } @else { td { (cell) } }
                        }
                    }
                }
            }
        } }
    }
}
