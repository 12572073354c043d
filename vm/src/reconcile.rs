//! What the two sides of a device counted, and whether they agree.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Add;

use hmm_stress::report::Latency;
use serde::Serialize;
use virtio_hmm_client::counters::{Counters, CountersError};

use crate::daemon::{Counted, Operation};
use crate::demo::microseconds;
use crate::devices::Counts;
use crate::sampler::Distribution;

/// What a page migrates for, by the driver's names, and what its pages are counted as.
const TRIGGERS: [(&str, &str); 6] = [
    ("ioctl_to_device", "pages_to_device"),
    ("ioctl_to_system", "pages_to_system"),
    ("release", "pages_released"),
    ("cpu_fault", "pages_faulted"),
    ("eviction", "pages_evicted"),
    ("evacuation", "pages_evacuated"),
];
/// The phases of a migration, by the driver's names.
const PHASES: [&str; 4] = ["setup", "copy", "pages", "finalize"];

/// The kinds of request, and the driver's counters of the pages that each frame of such a
/// request has to be found in.
const OPERATIONS: [(&str, &[&str]); 3] = [
    ("to_device", &["pages_to_device", "to_device_unused"]),
    (
        "from_device",
        &[
            "pages_to_system",
            "pages_released",
            "pages_faulted",
            "pages_evicted",
            "pages_evacuated",
            "pages_to_peer",
            "from_device_unused",
        ],
    ),
    ("fill", &["pages_filled", "fill_unused"]),
];

/// Amounts of both sides of the device for one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sides {
    /// By the driver's counters.
    pub guest: Amounts,
    /// By the daemon's counters.
    pub host: Amounts,
    /// By the daemon's statistics of each queue.
    pub queues: Amounts,
}

impl Sides {
    /// Whether all of it is the same.
    #[must_use]
    pub fn agree(&self) -> bool {
        self.guest == self.host && self.host == self.queues
    }
}

impl Sides {
    /// What is compared: its name, and the numbers of the guest, the host and its queues.
    pub(crate) fn rows(&self) -> [(&'static str, [u64; 3]); 4] {
        let all = [self.guest, self.host, self.queues];
        [
            ("requests", all.map(|amounts| amounts.requests)),
            ("frames", all.map(|amounts| amounts.frames)),
            ("bytes", all.map(|amounts| amounts.bytes)),
            ("pages", all.map(|amounts| amounts.pages)),
        ]
    }
}

impl Add for Sides {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            guest: self.guest + other.guest,
            host: self.host + other.host,
            queues: self.queues + other.queues,
        }
    }
}

/// How much of one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Amounts {
    /// Requests completed.
    pub requests: u64,
    /// Frames copied or filled.
    pub frames: u64,
    /// Bytes in these frames.
    pub bytes: u64,
    /// Pages that the frames were copied or filled for. The driver counts them as they move;
    /// on the other side they are the frames.
    pub pages: u64,
}

impl Add for Amounts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            requests: self.requests.saturating_add(other.requests),
            frames: self.frames.saturating_add(other.frames),
            bytes: self.bytes.saturating_add(other.bytes),
            pages: self.pages.saturating_add(other.pages),
        }
    }
}

impl From<Operation> for Amounts {
    fn from(operation: Operation) -> Self {
        let Operation {
            requests,
            frames,
            bytes,
            ..
        } = operation;
        Self {
            requests,
            frames,
            bytes,
            pages: frames,
        }
    }
}

/// What driver and daemon counted of copies to the device, back, and fills, by the names of
/// the driver's counters.
#[must_use]
pub fn sides(guest: impl Fn(&str) -> u64, host: &Counted) -> BTreeMap<&'static str, Sides> {
    OPERATIONS
        .into_iter()
        .map(|(name, pages)| {
            let amount = |what: &str| guest(&format!("{name}_{what}"));
            let of = |counters: &crate::daemon::Counters| -> Amounts {
                match name {
                    "to_device" => counters.to_device,
                    "from_device" => counters.from_device,
                    _ => counters.fill,
                }
                .into()
            };
            let sides = Sides {
                guest: Amounts {
                    requests: amount("requests"),
                    frames: amount("frames"),
                    bytes: amount("bytes"),
                    pages: pages
                        .iter()
                        .fold(0, |sum, name| guest(name).saturating_add(sum)),
                },
                host: of(&host.counters),
                queues: of(&host.queues),
            };
            (name, sides)
        })
        .collect()
}

/// The driver's counters in the guest, by device.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Guest(BTreeMap<String, Driver>);

/// The driver's counters of one device.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Driver {
    counters: BTreeMap<String, u64>,
    fault_latency_ns: Latency,
    /// How many CPU faults took less than so many nanoseconds, and no less than the bound before.
    pub(crate) fault_latency: Distribution,
}

impl Driver {
    /// A counter; 0 if there is none.
    #[must_use]
    pub fn get(&self, name: &str) -> u64 {
        self.counters.get(name).copied().unwrap_or(0)
    }

    /// What keeps these counters from being all that happened.
    fn incomplete(&self) -> Option<String> {
        let in_use = self
            .get("frames_total")
            .wrapping_sub(self.get("frames_free"));
        if self.get("broken") != 0 {
            Some("the driver gave it up".into())
        } else if in_use > 0 {
            Some(format!("{in_use} of its frames were still in use"))
        } else {
            None
        }
    }
}

impl Guest {
    /// Takes the counters of one device, as they are in debugfs.
    ///
    /// # Errors
    /// They are not counters.
    pub fn add(
        &mut self,
        device: String,
        counters: &str,
        fault_latency: &str,
    ) -> Result<(), CountersError> {
        let counters = Counters::parse(counters)?;
        let buckets = Counters::parse(fault_latency)?;
        let buckets = buckets.iter();
        let buckets = buckets.filter_map(|(bound, number)| Some((bound.parse().ok()?, number)));
        let mut fault_latency: Distribution = buckets.collect();
        fault_latency.sort_unstable();
        let driver = Driver {
            counters: counters
                .iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
            fault_latency_ns: Latency::of_buckets(fault_latency.iter().copied()),
            fault_latency,
        };
        self.0.insert(device, driver);
        Ok(())
    }
}

/// The two sides of one device.
#[derive(Clone, Debug, Serialize)]
pub struct Device {
    /// The driver's name for it.
    pub device: String,
    /// Both sides by kind of request.
    pub counters: BTreeMap<&'static str, Sides>,
    /// Whether they all agree.
    pub reconciled: bool,
    /// Why they could not.
    pub not_compared: Option<String>,
    /// Requests that met a fault on purpose.
    pub injected: u64,
    /// All that the driver has counted.
    pub driver: Driver,
}

impl Device {
    /// Whether anything was copied to it. Two sides that both counted nothing agree about
    /// nothing.
    #[must_use]
    pub fn was_used(&self) -> bool {
        let sides = self.counters.get("to_device");
        sides.is_some_and(|sides| sides.host.frames > 0)
    }

    /// Whether there is a difference that nothing explains.
    #[must_use]
    pub fn differs(&self) -> bool {
        !self.reconciled && self.not_compared.is_none()
    }
}

/// Compares the sides of every device. The driver numbers the devices as they are plugged.
#[must_use]
pub(crate) fn devices(guest: &Guest, host: &[Counts]) -> Vec<Device> {
    host.iter()
        .enumerate()
        .map(|(slot, host)| {
            let device = format!("hmm{slot}");
            let driver = guest.0.get(&device);
            let (host, not_compared) = match host {
                Counts::Gone => (None, Some("its daemon is gone".into())),
                Counts::Changed => (None, Some("the guest had it unplugged or killed".into())),
                Counts::All(host) => (
                    Some(host),
                    match driver {
                        None => Some("the driver has not told of all of the run".into()),
                        Some(driver) => driver.incomplete(),
                    },
                ),
            };
            let host = host.copied().unwrap_or_default();
            let driver = driver.cloned().unwrap_or_default();
            let counters = sides(|name| driver.get(name), &host);
            Device {
                device,
                reconciled: not_compared.is_none() && counters.values().all(Sides::agree),
                counters,
                not_compared,
                injected: host.injected,
                driver,
            }
        })
        .collect()
}

/// The sum over all devices, by kind of request.
#[must_use]
pub fn total(devices: &[Device]) -> BTreeMap<&'static str, Sides> {
    let mut total = BTreeMap::new();
    for (name, sides) in devices.iter().flat_map(|device| &device.counters) {
        let sum = total.entry(*name).or_insert_with(Sides::default);
        *sum = *sum + *sides;
    }
    total
}

/// A table of both sides for a person.
#[must_use]
pub fn table(counters: &BTreeMap<&'static str, Sides>) -> String {
    let mut text = format!(
        "{:<18}{:>16}{:>16}{:>16}\n",
        "", "guest", "host", "its queues"
    );
    for (name, sides) in counters {
        for (what, numbers) in sides.rows() {
            let [guest, host, queues] = numbers.map(grouped);
            let name = format!("{} {what}", name.replace('_', " "));
            let mark = differs(numbers);
            let line = format!("{name:<20}{guest:>14}{host:>16}{queues:>16}  {mark}");
            let _ = writeln!(text, "{}", line.trim_end());
        }
    }
    text
}

/// The mark of numbers that are not all the same.
pub(crate) fn differs([guest, host, queues]: [u64; 3]) -> &'static str {
    if guest == host && host == queues {
        ""
    } else {
        "differs"
    }
}

/// What migrated why and for how long, for a person.
fn migrations(driver: &Driver) -> String {
    let mut text = format!("{:<18}{:>10}{:>12}", "", "number", "pages");
    for phase in PHASES {
        let _ = write!(text, "{:>14}", format!("{phase}, ms"));
    }
    text.push('\n');
    for (trigger, pages) in TRIGGERS {
        let number = driver.get(&format!("{trigger}_migrate_count"));
        if number == 0 {
            continue;
        }
        let name = trigger.replace('_', " ");
        let pages = grouped(driver.get(pages));
        let _ = write!(text, "{name:<18}{:>10}{pages:>12}", grouped(number));
        for phase in PHASES {
            let ns = driver.get(&format!("{trigger}_migrate_{phase}_ns"));
            let _ = write!(
                text,
                "{:>12}.{}",
                grouped(ns / 1_000_000),
                ns / 100_000 % 10
            );
        }
        text.push('\n');
    }
    let Latency {
        count, p50, p99, ..
    } = driver.fault_latency_ns;
    if count > 0 {
        let _ = writeln!(
            text,
            "{} CPU faults: half took less than {}, 99 % less than {}",
            grouped(count),
            microseconds(p50),
            microseconds(p99)
        );
    }
    text
}

/// Both sides of the devices, one by one.
fn report<'a>(devices: impl IntoIterator<Item = &'a Device>) -> String {
    let mut text = String::new();
    for device in devices {
        if let Some(reason) = &device.not_compared {
            let _ = writeln!(text, "{} is not compared: {reason}", device.device);
        } else {
            let _ = writeln!(text, "{}\n{}", device.device, table(&device.counters));
            text += &migrations(&device.driver);
        }
    }
    text
}

/// Shows on standard error both sides of the devices on which they differ, or of all. Says
/// whether there are any that differ.
pub fn tell(devices: &[Device], all: bool) -> bool {
    let shown = devices.iter().filter(|device| all || device.differs());
    eprint!("{}", report(shown));
    let differ = devices.iter().any(Device::differs);
    if differ {
        eprintln!("virtio-hmm: driver and device counted different amounts");
    }
    differ
}

/// 1234567 as 1,234,567.
#[must_use]
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::daemon;

    /// A device whose two sides counted the same, and more than nothing.
    pub(crate) fn agreeing() -> (Guest, Counted) {
        let one = Operation {
            requests: 3,
            frames: 1000,
            bytes: 1000 * 4096,
            errors: 0,
        };
        let counters = daemon::Counters {
            to_device: one,
            from_device: one,
            fill: one,
        };
        let host = Counted {
            counters,
            queues: counters,
            injected: 0,
        };
        let mut text = String::new();
        for (name, pages) in OPERATIONS {
            for (what, amount) in [("requests", 3), ("frames", 1000), ("bytes", 1000 * 4096)] {
                let _ = writeln!(text, "{name}_{what} {amount}");
            }
            let others = 100 * (pages.len() as u64 - 1);
            for counter in pages.iter().skip(1) {
                let _ = writeln!(text, "{counter} 100");
            }
            let _ = writeln!(text, "{} {}", pages[0], 1000 - others);
        }
        text += "frames_total 512\nframes_free 512\nbroken 0\n";
        let mut guest = Guest::default();
        guest.add("hmm0".into(), &text, "1000 1\n").unwrap();
        (guest, host)
    }

    fn change(guest: &mut Guest, name: &str, change: impl Fn(&mut u64)) {
        let driver = guest.0.get_mut("hmm0").unwrap();
        change(driver.counters.get_mut(name).unwrap());
    }

    fn compare(guest: &Guest, host: Counted) -> Device {
        let mut devices = devices(guest, &[Counts::All(host)]);
        devices.pop().unwrap()
    }

    #[test]
    fn sides_that_agree_reconcile() {
        let (guest, host) = agreeing();
        let device = compare(&guest, host);
        assert!(device.reconciled && !device.differs());
        let text = report([&device]);
        assert!(
            !text.contains("differs") && text.contains("1 CPU faults"),
            "{text}"
        );
    }

    /// A request that the device lost, or did twice, is missing or too much on its side.
    #[test]
    fn one_request_or_frame_of_difference_is_found_and_shown() {
        let (guest, right) = agreeing();
        let wrong: [fn(&mut daemon::Counters); 6] = [
            |counters| counters.to_device.requests -= 1,
            |counters| counters.to_device.requests += 1,
            |counters| counters.from_device.frames -= 1,
            |counters| counters.from_device.frames += 1,
            |counters| counters.fill.bytes -= 1,
            |counters| counters.fill.bytes += 4096,
        ];
        for wrong in wrong {
            let mut host = right;
            wrong(&mut host.counters);
            for host in [
                host,
                Counted {
                    queues: host.counters,
                    ..host
                },
                Counted {
                    counters: right.counters,
                    queues: host.counters,
                    ..host
                },
            ] {
                let device = compare(&guest, host);
                assert!(device.differs(), "{host:?}");
                assert!(report([&device]).contains("differs"), "{host:?}");
            }
        }
    }

    #[test]
    fn every_frame_has_to_be_found_among_the_pages() {
        let (right, host) = agreeing();
        for name in OPERATIONS.iter().flat_map(|(_, pages)| *pages) {
            for by in [1, u64::MAX] {
                let mut guest = right.clone();
                change(&mut guest, name, |value| *value = value.wrapping_add(by));
                assert!(compare(&guest, host).differs(), "{name}");
            }
        }
    }

    #[test]
    fn what_cannot_agree_is_not_compared() {
        let (right, host) = agreeing();
        let mut wrong = host;
        wrong.counters.fill.requests += 1;
        for counts in [Counts::Gone, Counts::Changed] {
            assert!(devices(&right, &[counts])[0].not_compared.is_some());
        }
        assert!(compare(&Guest::default(), wrong).not_compared.is_some());
        for (name, value) in [("broken", 1), ("frames_free", 511)] {
            let mut guest = right.clone();
            change(&mut guest, name, |counter| *counter = value);
            let device = compare(&guest, wrong);
            assert!(!device.reconciled && !device.differs(), "{name}");
            assert!(report([&device]).contains("not compared"), "{name}");
        }
    }

    #[test]
    fn each_device_has_to_agree_with_its_own_daemon() {
        let (guest, host) = agreeing();
        let devices = devices(&guest, &[Counts::All(host), Counts::All(host)]);
        let reconciled: Vec<bool> = devices.iter().map(|device| device.reconciled).collect();
        assert_eq!(reconciled, [true, false]);
        assert_eq!(total(&devices)["fill"].host.frames, 2000);
    }

    #[test]
    fn a_device_that_moved_nothing_was_not_used() {
        let mut guest = Guest::default();
        guest.add("hmm0".into(), "", "").unwrap();
        let device = compare(&guest, Counted::default());
        assert!(device.reconciled && !device.was_used());
    }

    #[test]
    fn what_is_no_counter_is_refused() {
        let mut guest = Guest::default();
        assert!(guest.add("hmm0".into(), "frames\n", "").is_err());
        assert!(guest.add("hmm0".into(), "", "1000\n").is_err());
    }

    #[test]
    fn numbers_are_grouped_by_three() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(grouped(number), text);
        }
    }
}
