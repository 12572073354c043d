//! What `hmm-top` shows.

use std::collections::{BTreeMap, VecDeque};

use ratatui::{
    buffer::Buffer,
    layout::{Constraint, Layout, Rect},
    style::{Color, Style, Stylize},
    text::{Line, Span},
    widgets::{LineGauge, RenderDirection, Sparkline, Widget},
};
use vhost_device_hmm::{
    ErrorChain,
    abi::{VIRTIO_HMM_QUEUE_CONTROL, VIRTIO_HMM_QUEUE_EVENT},
};

use crate::{
    format::{bandwidth, count, memory, percent, small, time},
    rates::{Activity, Rates},
    reading::{Error, Reading},
};

/// Intervals whose bandwidth is kept: as many as the widest screen has columns.
const KEPT: usize = 1000;
/// Width of what stands left of a sparkline or a line.
const LABEL: usize = 14;
/// Least height of a sparkline.
const SPARKLINE: u16 = 2;
/// Lines beside the sparklines and the queues.
const OTHERS: u16 = 7;
/// Least width of the line of a queue, and that from which on it says more.
const NARROW: u16 = 36;
const WIDE: u16 = 76;

/// In place of a number that there is not.
const NONE: &str = "-";

const TO_DEVICE: Color = Color::Cyan;
const FROM_DEVICE: Color = Color::Magenta;

/// One device, as far as it is known.
#[derive(Debug, Default)]
pub struct Device {
    name: String,
    last: Option<Reading>,
    activity: Activity,
    /// Requests and frames that failed in the session, by class.
    failures: BTreeMap<String, u64>,
    /// Bytes a second in each interval, the latest first.
    to_device: VecDeque<u64>,
    from_device: VecDeque<u64>,
    /// Why it cannot be read.
    trouble: Option<String>,
}

impl Device {
    /// A device that is called `name`.
    pub fn new(name: String) -> Self {
        Self {
            name,
            ..Self::default()
        }
    }

    /// Takes in a reading.
    pub fn read(&mut self, reading: Result<Reading, Error>) {
        match reading {
            Ok(reading) => self.take_in(reading),
            Err(e) => {
                // Where it was is in the first line.
                self.trouble = Some(match e {
                    Error::Socket(_, source) => format!("cannot ask the device: {source}"),
                    e => ErrorChain(&e).to_string(),
                });
                // Another device may take its place, and begin at zero.
                self.last = None;
            }
        }
    }

    /// Says that there has been no reading for so many seconds.
    pub fn overdue(&mut self, seconds: u64) {
        self.trouble = Some(format!("the device has not answered for {seconds} s"));
    }

    fn take_in(&mut self, reading: Reading) {
        self.trouble = None;
        self.failures.clear();
        for (class, number) in reading.queues.iter().flat_map(|queue| &queue.failures) {
            *self.failures.entry(class.clone()).or_default() += number;
        }
        self.activity = Activity::between(self.last.as_ref().unwrap_or(&reading), &reading);
        let total = &self.activity.total;
        if self.last.is_some() {
            for (history, rate) in [
                (&mut self.to_device, total.to_device),
                (&mut self.from_device, total.from_device),
            ] {
                // It is never negative, and a fraction of a byte is nothing.
                #[allow(clippy::cast_possible_truncation)]
                history.push_front(rate as u64);
                history.truncate(KEPT);
            }
        }
        self.last = Some(reading);
    }

    /// The queues that have a worker, with their names.
    fn queues(&self) -> Vec<(String, &Rates)> {
        let name = |queue| match queue {
            VIRTIO_HMM_QUEUE_CONTROL => Some("control".to_owned()),
            VIRTIO_HMM_QUEUE_EVENT => None,
            _ => Some(format!("copy {queue}")),
        };
        let queues = (0..).zip(&self.activity.queues);
        let named = queues.filter_map(|(queue, rates)| Some((name(queue)?, rates)));
        named.collect()
    }
}

/// All devices, one of which is shown.
#[derive(Debug, Default)]
pub struct Screen {
    /// Each of them.
    pub devices: Vec<Device>,
    shown: usize,
}

impl Screen {
    /// Shows the first of these devices.
    pub fn new(devices: Vec<Device>) -> Self {
        Self { devices, shown: 0 }
    }

    /// Goes on to the next device.
    pub fn next(&mut self) {
        self.shown = (self.shown + 1) % self.devices.len().max(1);
    }

    fn head(&self, device: &Device, area: Rect, buf: &mut Buffer) {
        let mut left = vec![" hmm-top ".bold().reversed()];
        let mut keys = "q quit ";
        if self.devices.len() > 1 {
            left.push(format!(" {} of {},", self.shown + 1, self.devices.len()).into());
            keys = "Tab next, q quit ";
        }
        // At the end, where there may be no place for all of it.
        left.push(format!(" {}", device.name).into());
        let session = match device.activity.session {
            0 => "no VM yet".to_owned(),
            session if device.activity.connected => format!("VM session {session}"),
            session => format!("VM session {session} is over"),
        };
        let right = Line::from(vec![format!("{session}   ").into(), keys.dim()]);
        let [_, left_area, right_area] = parts(area, 0, right.width());
        Line::from(left).render(left_area, buf);
        right.render(right_area, buf);
    }
}

impl Widget for &Screen {
    fn render(self, area: Rect, buf: &mut Buffer) {
        let Some(device) = self.devices.get(self.shown) else {
            return;
        };
        let queues = device.queues();
        let columns = queue_columns(queues.len(), area);
        let rows = queues.len().div_ceil(columns);
        let line = Constraint::Length(1);
        let sparkline = Constraint::Min(SPARKLINE);
        let heights = [
            line,
            sparkline,
            sparkline,
            Constraint::Length(3),
            line,
            line,
            length(rows + 1),
        ];
        let [
            head,
            to_device,
            from_device,
            middle,
            processor,
            errors,
            below,
        ] = Layout::vertical(heights).areas(area);
        self.head(device, head, buf);
        history("to device", &device.to_device, TO_DEVICE, to_device, buf);
        let from = &device.from_device;
        history("from device", from, FROM_DEVICE, from_device, buf);
        let [left, right, _] = parts(middle, LABEL + 32, 0);
        times(&device.activity.total, left, buf);
        usage(&device.activity, right, buf);
        labelled("per byte", counted(device), processor, buf);
        labelled("errors", failed(device), errors, buf);
        let areas = Layout::horizontal(vec![Constraint::Fill(1); columns]).spacing(2);
        for (area, queues) in areas.split(below).iter().zip(queues.chunks(rows.max(1))) {
            queue_lines(queues, *area, buf);
        }
        if let Some(trouble) = &device.trouble {
            buf.set_style(area, Style::new().dim());
            let last = Rect::new(area.x, area.bottom().saturating_sub(1), area.width, 1);
            let text = format!(" {trouble:<width$}", width = area.width.into());
            let style = Style::new().not_dim().white().on_red();
            Line::styled(text, style).render(last.intersection(area), buf);
        }
    }
}

/// Divides an area into one of this width at the left, one at the right, and the
/// rest between them.
fn parts(area: Rect, left: usize, right: usize) -> [Rect; 3] {
    let width = |wanted: usize, most: u16| u16::try_from(wanted).map_or(most, |w| w.min(most));
    let left = width(left, area.width);
    let right = width(right, area.width - left);
    [
        Rect {
            width: left,
            ..area
        },
        Rect {
            x: area.x + left,
            width: area.width - left - right,
            ..area
        },
        Rect {
            x: area.right() - right,
            width: right,
            ..area
        },
    ]
}

fn length(length: usize) -> Constraint {
    Constraint::Length(u16::try_from(length).unwrap_or(u16::MAX))
}

/// In how many columns so many queues fit.
fn queue_columns(queues: usize, area: Rect) -> usize {
    let rows = area.height.saturating_sub(OTHERS + 2 * SPARKLINE).max(1);
    let wanted = queues.div_ceil(rows.into());
    wanted.clamp(1, usize::from(area.width / NARROW).max(1))
}

fn labelled<'a>(label: &'a str, text: impl Into<Span<'a>>, area: Rect, buf: &mut Buffer) {
    let label = format!("{label:<LABEL$}");
    Line::from(vec![label.bold(), text.into()]).render(area, buf);
}

/// What goes one way: now, at most, and before.
fn history(label: &str, rates: &VecDeque<u64>, color: Color, area: Rect, buf: &mut Buffer) {
    let [text, chart, _] = parts(area, LABEL, 0);
    let shown = rates.iter().copied().take(chart.width.into());
    let max = shown.clone().max().unwrap_or(0);
    let now = bandwidth(rates.front().copied().unwrap_or(0) as f64);
    let lines = [
        Line::from(label.bold()),
        Line::styled(now, Style::new().fg(color).bold()),
        Line::from(format!("max {}", bandwidth(max as f64)).dim()),
    ];
    for (line, row) in lines.into_iter().zip(text.rows()) {
        line.render(row, buf);
    }
    Sparkline::default()
        .data(shown)
        .max(max.max(1))
        .direction(RenderDirection::RightToLeft)
        .style(color)
        .render(chart, buf);
}

fn times(total: &Rates, area: Rect, buf: &mut Buffer) {
    let shown = |ns| if ns > 0 { time(ns) } else { NONE.into() };
    let waits = [total.wait_p50, total.wait_p99, total.wait_p999].map(shown);
    let copies = [total.copy_p50, total.copy_p99, total.copy_p999].map(shown);
    let heads = ["p50", "p99", "p99.9"].map(str::to_owned);
    let lines = [("latency", heads), ("  wait", waits), ("  copy", copies)];
    for ((label, cells), row) in lines.into_iter().zip(area.rows()) {
        let cells: String = cells.iter().map(|cell| format!("{cell:>10}")).collect();
        labelled(label, cells, row, buf);
    }
}

fn usage(activity: &Activity, area: Rect, buf: &mut Buffer) {
    let [first, second, third] = Layout::vertical([Constraint::Length(1); 3]).areas(area);
    let part = activity.memory_used as f64 / activity.memory_size.max(1) as f64;
    let [label, bar, text] = parts(first, 8, 8);
    Line::from("memory".bold()).render(label, buf);
    gauge(part, Color::Blue, bar, buf);
    Line::from(percent(part)).right_aligned().render(text, buf);
    let sizes = [
        activity.memory_used,
        activity.memory_size,
        activity.memory_peak,
    ];
    let [used, size, peak] = sizes.map(memory);
    Line::from(format!("{used} of {size}, peak {peak}")).render(second, buf);
    let requests = count(activity.total.requests);
    let text = format!("{requests}/s, fill {}", bandwidth(activity.total.fill));
    Line::from(vec!["requests ".bold(), text.into()]).render(third, buf);
}

fn gauge(part: f64, color: Color, area: Rect, buf: &mut Buffer) {
    LineGauge::default()
        .ratio(part.clamp(0.0, 1.0))
        .label("")
        .filled_symbol("█")
        .unfilled_symbol("░")
        .filled_style(color)
        .unfilled_style(Color::DarkGray)
        .render(area, buf);
}

/// What the processor counted for each byte.
fn counted(device: &Device) -> String {
    let total = &device.activity.total;
    if total.hardware.is_empty() {
        return "not counted here; the daemon's log says why".into();
    }
    if total.hardware_per_byte.is_empty() {
        return "nothing is moved".into();
    }
    let (mut counts, mut misses) = (String::new(), Vec::new());
    for (name, number) in &total.hardware_per_byte {
        match name.strip_suffix("_misses") {
            Some(of) => misses.push(format!("{of} {}", small(*number))),
            None => counts += &format!("{name} {}  ", small(*number)),
        }
    }
    if !misses.is_empty() {
        counts += &format!("misses: {}", misses.join(", "));
    }
    counts
}

/// What failed.
fn failed(device: &Device) -> Span<'static> {
    let classes = device.failures.iter().filter(|(_, number)| **number > 0);
    let classes: Vec<_> = classes
        .map(|(class, number)| format!("{class} {number}"))
        .collect();
    if classes.is_empty() {
        return "none".into();
    }
    let rate = count(device.activity.total.errors);
    format!("{rate}/s, in all {}", classes.join(", ")).red()
}

/// A head and the lines of some queues.
fn queue_lines(queues: &[(String, &Rates)], area: Rect, buf: &mut Buffer) {
    let wide = area.width >= WIDE;
    let text = |cells: [&str; 5]| {
        let [busy, to, from, requests, waiting] = cells;
        if wide {
            format!("{busy:>8}{to:>11}{from:>13}{requests:>12}{waiting:>9}")
        } else {
            format!("{busy:>8}{to:>11}")
        }
    };
    let to = if wide { "to device" } else { "moved" };
    let head = text(["busy", to, "from device", "requests/s", "waiting"]);
    let mut rows = area.rows();
    if let Some(row) = rows.next() {
        let [name, _, numbers] = parts(row, 9, head.len());
        Line::from("queue".bold()).render(name, buf);
        Line::from(head.as_str().bold()).render(numbers, buf);
    }
    for ((name, rates), row) in queues.iter().zip(rows) {
        let [name_area, bar, numbers] = parts(row, 9, head.len());
        // Of small requests not all are timed, so that it is an estimate.
        let busy = rates.busy.min(1.0);
        let color = match busy {
            ..0.7 => Color::Green,
            ..0.9 => Color::Yellow,
            _ => Color::Red,
        };
        Line::from(name.as_str()).render(name_area, buf);
        gauge(busy, color, bar, buf);
        let to = if wide { rates.to_device } else { rates.moved() };
        // It is known only of times when requests came.
        let waiting = (rates.requests > 0.0).then(|| rates.occupancy.to_string());
        let cells = [
            percent(busy),
            bandwidth(to),
            bandwidth(rates.from_device),
            count(rates.requests),
            waiting.unwrap_or_else(|| NONE.into()),
        ];
        let cells = text(cells.each_ref().map(String::as_str));
        Line::from(cells).render(numbers, buf);
    }
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};
    use serde_json::json;

    use super::*;

    /// A device with so many copy queues, after a second in which each of them did
    /// as many requests of 64 KiB each way as its number says hundreds.
    fn device(copy_queues: u64) -> Device {
        let reading = |second: u64| {
            let times = |bound: u64, n: u64| json!({ "sum_ns": 1, "max_ns": 1, "buckets": [[bound, 90 * n], [9 * bound, 10 * n]] });
            let queue = |index: u64| {
                let requests = if index < 2 { 0 } else { 100 * index * second };
                let size = json!({
                    "requests": requests, "frames": 16 * requests, "bytes": 65_536 * requests,
                    "wait": times(3_200, index * second), "copy": times(21_000, index * second),
                });
                let operation = json!({ "errors": second * index / 2, "sizes": { "64K": size } });
                json!({
                    "busy_ns": 50_000_000 * index * second,
                    "operations": { "to_device": operation, "from_device": operation },
                    "failures": { "partial": second * index / 2, "invalid": 0 },
                    "ring": {
                        "occupancy": index, "occupancy_max": 9, "full": 0, "kicks": 1,
                        "calls": 1, "calls_suppressed": 0,
                    },
                    "hardware": if index == 2 { json!({ "cycles": 11_796_480 * second,
                        "instructions": 8_000_000 * second, "llc_misses": 409_600 * second,
                        "dtlb_misses": 6_400 * second }) } else { json!({}) },
                })
            };
            serde_json::from_value(json!({
                "session": 3, "connected": true, "time_ns": second * 1_000_000_000,
                "memory": { "size": 256 << 20, "used": 64 << 20, "peak": 192 << 20, "cleared": 0 },
                "queues": (0..2 + copy_queues).map(queue).collect::<Vec<_>>(),
            }))
            .unwrap()
        };
        let mut device = Device::new("/tmp/hmm-control.sock".into());
        for second in [1, 2] {
            device.read(Ok(reading(second)));
        }
        device
    }

    fn show(screen: &Screen, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        let frame = terminal
            .draw(|frame| frame.render_widget(screen, frame.area()))
            .unwrap();
        let cells = frame.buffer.content().chunks(width.into());
        let line = |cells: &[ratatui::buffer::Cell]| cells.iter().map(|c| c.symbol()).collect();
        cells
            .map(|cells| {
                let line: String = line(cells);
                line.trim_end().to_owned()
            })
            .collect()
    }

    #[test]
    fn all_of_it_fits_80_by_24() {
        let lines = show(&Screen::new(vec![device(2)]), 80, 24);
        let expected = [
            " hmm-top  /tmp/hmm-control.sock                           VM session 3   q quit",
            "to device                                                                      █",
            "32.8 MB/s                                                                      █",
            "max 32.8 MB/s                                                                  █",
            "                                                                               █",
            "                                                                               █",
            "                                                                               █",
            "                                                                               █",
            "from device                                                                    █",
            "32.8 MB/s                                                                      █",
            "max 32.8 MB/s                                                                  █",
            "                                                                               █",
            "                                                                               █",
            "                                                                               █",
            "                                                                               █",
            "latency              p50       p99     p99.9  memory   ████░░░░░░░░░░░░░  25.0 %",
            "  wait           3.20 µs   28.8 µs   28.8 µs  64.0 MiB of 256 MiB, peak 192 MiB",
            "  copy           21.0 µs    189 µs    189 µs  requests 1.00 k/s, fill 0 B/s",
            "per byte      cycles 0.18  instructions 0.12  misses: dtlb 0.000098, llc 0.0063",
            "errors        8.00/s, in all partial 6",
            "queue                          busy  to device  from device  requests/s  waiting",
            "control   ░░░░░░░░░░░░░░░░░   0.0 %      0 B/s        0 B/s           0        -",
            "copy 2    █░░░░░░░░░░░░░░░░  10.0 %  13.1 MB/s    13.1 MB/s         400        2",
            "copy 3    ██░░░░░░░░░░░░░░░  15.0 %  19.7 MB/s    19.7 MB/s         600        3",
        ];
        assert_eq!(lines, expected, "{lines:#?}");
    }

    #[test]
    fn sixteen_copy_queues_fit_too() {
        let lines = show(&Screen::new(vec![device(16)]), 80, 24).join("\n");
        for queue in 2..18 {
            let text = format!("copy {queue:<4}");
            assert!(lines.contains(&text), "no {text} in\n{lines}");
        }
        for text in [
            "control",
            "50.0 %",
            "131 MB/s",
            "VM session 3",
            "p99.9",
            "errors",
        ] {
            assert!(lines.contains(text), "no {text} in\n{lines}");
        }
        assert!(!lines.contains("copy 1 ") && !lines.contains("event"));
    }

    #[test]
    fn any_size_will_do() {
        let mut screen = Screen::new(vec![device(16), device(1)]);
        screen.devices[0].overdue(3);
        for (width, height) in (0..30).flat_map(|n| [(n, n), (7 * n, n), (n, 7 * n)]) {
            let mut buffer = Buffer::empty(Rect::new(0, 0, width, height));
            screen.render(buffer.area, &mut buffer);
        }
        let lines = show(&screen, 200, 60);
        assert!(lines[59].contains("has not answered for 3 s"), "{lines:#?}");
        Screen::default().render(
            Rect::new(0, 0, 9, 9),
            &mut Buffer::empty(Rect::new(0, 0, 9, 9)),
        );
    }

    #[test]
    fn what_has_gone_stays_and_is_told() {
        let mut screen = Screen::new(vec![device(2)]);
        let gone = std::io::ErrorKind::ConnectionRefused.into();
        screen.devices[0].read(Err(Error::Socket("/tmp/s".into(), gone)));
        let lines = show(&screen, 80, 24);
        let told = " cannot ask the device: connection refused";
        assert_eq!(lines[23], told, "{lines:#?}");
        assert!(lines[2].starts_with("32.8 MB/s"), "{lines:#?}");
        // Another device in its place begins at zero, which is no interval.
        let reading = Reading {
            session: 1,
            time_ns: 9,
            ..Reading::default()
        };
        screen.devices[0].read(Ok(reading));
        let lines = show(&screen, 80, 24);
        assert!(
            lines[0].ends_with("VM session 1 is over   q quit"),
            "{lines:#?}"
        );
        assert_eq!(screen.devices[0].to_device.len(), 1);
        assert_ne!(lines[23], told);
    }

    #[test]
    fn what_is_not_there_is_no_zero() {
        let mut device = Device::new("d".into());
        device.read(Ok(Reading::default()));
        let lines = show(&Screen::new(vec![device]), 80, 24).join("\n");
        for text in [
            "no VM yet",
            "not counted here",
            "wait                 -         -         -",
            "errors        none",
        ] {
            assert!(lines.contains(text), "no {text} in\n{lines}");
        }
    }

    #[test]
    fn one_device_after_another_is_shown() {
        let mut screen = Screen::new(vec![device(1), Device::new("other".into())]);
        for place in [1, 2, 1] {
            let head = &show(&screen, 80, 24)[0];
            assert!(head.contains(&format!(" {place} of 2, ")), "{head}");
            assert_eq!(head.contains("other"), place == 2, "{head}");
            screen.next();
        }
    }

    #[test]
    fn the_latest_is_at_the_right() {
        let mut device = device(1);
        device.to_device = [8, 4, 0].into();
        let lines = show(&Screen::new(vec![device]), 80, 24);
        let ends: Vec<_> = lines[1..8]
            .iter()
            .map(|line| line.chars().skip(77).collect::<String>())
            .collect();
        assert_eq!(ends[0], "  █", "{lines:#?}");
        assert_eq!(ends[6], " ██", "{lines:#?}");
        assert!(lines[2].starts_with("8.00 B/s") && lines[3].starts_with("max 8.00 B/s"));
    }
}
