//! What `--report` writes, as a browser shows it.

#![allow(
    missing_docs,
    reason = "the names of the tests say what they are about"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::BufReader;
use std::path::Path;

use hmm_e2e::{Failure, Result, check, skippable_trial, trial, vm};
use hmm_vm::Error;
use hmm_vm::apt::MIRROR_VARIABLE;
use hmm_vm::browser::Browser;
use hmm_vm::paths::Cache;
use hmm_vm::report::Report;
use libtest_mimic::Arguments;
use serde::Deserialize;
use serde_json::Value;

/// The charts of one device.
const CHARTS: [&str; 7] = [
    "hmm0-bandwidth",
    "hmm0-wait",
    "hmm0-copy",
    "hmm0-occupancy",
    "hmm0-busy",
    "hmm0-memory",
    "hmm0-failures",
];
/// Those that a stress has besides, and those of a benchmark on one thread.
const STRESS_CHARTS: [&str; 3] = ["turns", "faults", "hmm0-fault-latency"];
const BENCH_CHARTS: [&str; 5] = [
    "to-device-1t",
    "to-device-net-1t",
    "back-1t",
    "sequential-faults-1t",
    "random-faults-1t",
];

/// What makes the chart of failures rise, however few requests there are, and wants a directory.
const OPTIONS: [&str; 3] = ["--inject", "delay=1ms,count=50", "--report"];

/// Widths of a window on a desk and in a hand, in pixels.
const WIDE: u32 = 1280;
const NARROW: u32 = 400;

fn main() {
    let mut arguments = Arguments::from_args();
    // Each boots a machine with as many CPUs as this one has.
    arguments.test_threads.get_or_insert(1);
    let trials = vec![
        skippable_trial("stress_report_shows_its_charts_in_a_browser", || {
            in_a_browser(stress)
        }),
        skippable_trial("bench_report_shows_its_charts_in_a_browser", || {
            in_a_browser(bench)
        }),
        trial(
            "report_that_cannot_be_written_fails_a_run_with_a_result",
            late_refusal,
        ),
        trial("report_is_refused_before_the_boot", early_refusal),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}

/// What [`PROBE`] finds in the page.
#[derive(Debug, Deserialize)]
struct Page {
    /// Its size in pixels.
    width: u32,
    height: u32,
    /// What it has loaded.
    resources: Vec<String>,
    /// Labels that lie on one another.
    overlaps: Vec<String>,
    /// By id.
    charts: BTreeMap<String, Chart>,
}

#[derive(Debug, Deserialize)]
struct Chart {
    left: usize,
    top: usize,
    width: usize,
    height: usize,
    marks: Vec<Mark>,
}

/// What shows data in a chart.
#[derive(Debug, Deserialize)]
struct Mark {
    height: f64,
    color: [u8; 3],
}

/// Measures the page in the browser. The report itself has no script.
const PROBE: &str = r#"<pre id="probe"></pre><script>
const box = (element) => element.getBoundingClientRect();
const whole = (number) => Math.round(number);
const rgb = (color) => color.match(/\d+/g).slice(0, 3).map(Number);
const charts = {}, overlaps = [];
for (const figure of document.querySelectorAll("figure")) {
    const area = box(figure.querySelector(".marks"));
    const marks = [...figure.querySelectorAll(".marks :is(.line, .dots, .mark)")].map((mark) => ({
        height: box(mark).height, color: rgb(getComputedStyle(mark).color),
    }));
    charts[figure.id] = {
        left: whole(area.left), top: whole(area.top),
        width: whole(area.width), height: whole(area.height), marks,
    };
    const labels = [...figure.querySelectorAll("text, figcaption, .legend")];
    labels.forEach((one, index) => labels.slice(index + 1).forEach((other) => {
        const [a, b] = [box(one), box(other)];
        if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
            overlaps.push(`${figure.id}: ${one.textContent} and ${other.textContent}`);
    }));
}
document.getElementById("probe").textContent = JSON.stringify({
    charts, overlaps,
    width: document.documentElement.scrollWidth,
    height: document.documentElement.scrollHeight,
    resources: performance.getEntriesByType("resource").map((entry) => entry.name),
});
</script>"#;

fn probe(browser: &Browser, directory: &Path, width: u32) -> Result<Page> {
    let page = fs::read_to_string(directory.join("report.html"))?;
    fs::write(directory.join("probe.html"), page + PROBE)?;
    let dom = browser.open(directory, "probe.html", (width, 1000), "--dump-dom")?;
    let found = dom.split_once("<pre id=\"probe\">").map(|(_, rest)| rest);
    let found = found.and_then(|rest| rest.split_once("</pre>"));
    let (json, _) = found.ok_or_else(|| Failure(format!("no result of the probe:\n{dom}")))?;
    let json = json
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&");
    Ok(serde_json::from_str(&json)?)
}

fn in_a_browser(test: fn(&Browser, &Path) -> Result) -> Result<Option<String>> {
    let mirror = std::env::var(MIRROR_VARIABLE).ok();
    let browser = match Browser::make(&Cache::locate()?, mirror.as_deref(), Report) {
        Err(error @ (Error::NotDebian(_) | Error::NoMirror | Error::NoPackage { .. })) => {
            return Ok(Some(error.to_string()));
        }
        other => other?,
    };
    let directory = tempfile::tempdir()?;
    test(&browser, directory.path()).map(|()| None)
}

fn bench(browser: &Browser, directory: &Path) -> Result {
    let only = ["--rounds", "1", "--only", "64K-4k-1t", "--against", "zram"];
    let run = vm(&["bench"])?.with(only).with(OPTIONS);
    run.with([directory]).finish()?.expect_status(0)?;
    charts_are_shown(browser, directory, &BENCH_CHARTS)
}

fn stress(browser: &Browser, directory: &Path) -> Result {
    let run = vm(&["stress", "--turn", "fault-storm", "--seed", "7", "--json"])?
        .with(OPTIONS)
        .with([directory])
        .finish()?;
    run.expect_status(0)?;
    let data = json(&directory.join("report.json"))?;
    same_bytes(&data)?;
    check(data.get("schema_version") == Some(&1.into()), || {
        data.to_string()
    })?;
    let printed: Value = serde_json::from_slice(run.stdout())?;
    check(data.get("result") == Some(&printed), || {
        "--json prints another result".into()
    })?;
    charts_are_shown(browser, directory, &STRESS_CHARTS)
}

/// The page has the charts of a device and these, at any width, and they can be seen.
fn charts_are_shown(browser: &Browser, directory: &Path, others: &[&str]) -> Result {
    let mut wanted = [&CHARTS[..], others].concat();
    wanted.sort_unstable();
    for width in [WIDE, NARROW] {
        let page = probe(browser, directory, width)?;
        let ids: Vec<&str> = page.charts.keys().map(String::as_str).collect();
        check(ids == wanted, || {
            format!("other charts at {width}: {ids:?}")
        })?;
        check(page.resources.is_empty(), || {
            format!("it loads {:?}", page.resources)
        })?;
        check(page.overlaps.is_empty(), || {
            format!("labels overlap at {width}: {:#?}", page.overlaps)
        })?;
        check(page.width <= width, || {
            format!("it is {} wide, in a window of {width}", page.width)
        })?;
        for (id, chart) in &page.charts {
            check(!chart.marks.is_empty(), || format!("{id} is empty"))?;
            let may_be_flat = match id.as_str() {
                // One turn is a dot, and nothing may have waited whenever the rings were looked at.
                "faults" | "hmm0-occupancy" => true,
                // A benchmark has all memory from the start.
                "hmm0-memory" => others == BENCH_CHARTS,
                _ => false,
            };
            check(
                may_be_flat || !chart.marks.iter().all(|mark| mark.height < 1.0),
                || format!("all of {id} is flat at {width}: {:?}", chart.marks),
            )?;
        }
        if width == WIDE {
            colors_are_seen(browser, directory, &page)?;
        }
    }
    Ok(())
}

/// What the browser paints has in each chart the colours of its marks.
fn colors_are_seen(browser: &Browser, directory: &Path, page: &Page) -> Result {
    browser.open(
        directory,
        "report.html",
        (WIDE, page.height),
        "--screenshot=/mnt/page.png",
    )?;
    let file = BufReader::new(File::open(directory.join("page.png"))?);
    let mut reader = png::Decoder::new(file).read_info()?;
    let mut pixels = vec![0; reader.output_buffer_size().unwrap_or(0)];
    let info = reader.next_frame(&mut pixels)?;
    let samples = info.color_type.samples();
    for (id, chart) in &page.charts {
        let rows = pixels.chunks_exact(info.line_size);
        let rows = rows.skip(chart.top).take(chart.height);
        let inside: Vec<&[u8]> = rows
            .flat_map(|row| {
                let row = row.chunks_exact(samples);
                row.skip(chart.left).take(chart.width)
            })
            .collect();
        // A line may lie under another, so not every colour has to be there.
        let colors: BTreeSet<_> = chart.marks.iter().map(|mark| mark.color).collect();
        let is_mark = |pixel: &&&[u8]| colors.iter().any(|color| is_near(pixel, color));
        let seen = inside.iter().filter(is_mark).count();
        check(seen >= 10, || {
            format!("{seen} pixels of {colors:?} in {id}")
        })?;
    }
    Ok(())
}

/// The edges of a thin line are mixed with what is behind it, from which every colour is farther.
fn is_near(pixel: &[u8], color: &[u8; 3]) -> bool {
    let mut channels = pixel.iter().zip(color);
    channels.all(|(one, other)| one.abs_diff(*other) < 60)
}

/// The samples have every byte that the daemon counted.
fn same_bytes(data: &Value) -> Result {
    let number = |path: &str| data.pointer(path).and_then(Value::as_u64);
    for operation in ["to_device", "from_device", "fill"] {
        let counted = number(&format!(
            "/result/devices/0/counters/{operation}/host/bytes"
        ));
        let samples = data.pointer("/devices/0/samples").and_then(Value::as_array);
        let bytes = |sample: &Value| sample.get(operation).and_then(Value::as_u64);
        let sampled: Option<u64> = samples.into_iter().flatten().map(bytes).sum();
        check(sampled.is_some() && sampled == counted, || {
            format!("{operation}: {sampled:?} in the samples, {counted:?} counted")
        })?;
    }
    check(
        number("/devices/0/operations/to_device/bytes") > Some(0),
        || "nothing was copied".into(),
    )
}

fn json(path: &Path) -> Result<Value> {
    Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
}

/// The device dies, so that the stress fails, and the page's place is taken.
fn late_refusal() -> Result {
    let directory = tempfile::tempdir()?;
    let directory = directory.path();
    fs::create_dir(directory.join("report.html"))?;
    let run = vm(&["stress", "--turn", "ping-pong", "--seed", "7", "--json"])?
        .with(["--inject", "dead,after=20", "--report"])
        .with([directory])
        .finish()?;
    run.expect_status(125)?;
    run.expect_error("report.html")?;
    let printed: Value = serde_json::from_slice(run.stdout())?;
    let data = json(&directory.join("report.json"))?;
    check(data.get("result") == Some(&printed), || {
        "another result".into()
    })?;
    let repeat = data
        .pointer("/result/failures/0/command")
        .and_then(Value::as_str);
    let wanted = "cargo vm stress --inject dead,after=20 --turn ping-pong --seed 7";
    check(repeat == Some(wanted), || format!("{repeat:?}"))
}

fn early_refusal() -> Result {
    let file = tempfile::NamedTempFile::new()?;
    let run = vm(&["stress", "--report"])?.with([file.path()]).finish()?;
    run.expect_status(125)?;
    run.expect_error("report's directory")?;
    check(!run.errors().contains("booting"), || run.errors())
}
