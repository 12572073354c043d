//! What the two sides of a device counted, and whether they agree.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Add;

use serde::Serialize;

use crate::daemon::{Counters, Operation};

/// Shell commands that print the driver's counters of every device, for [`Guest::add_line`].
pub const PRINT_COUNTERS: &str = "grep '' /sys/kernel/debug/virtio_hmm/*/counters /dev/null";

/// Amounts of both sides of the device for one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sides {
    /// By the driver's counters.
    pub guest: Amounts,
    /// By the daemon's counters.
    pub host: Amounts,
}

impl Sides {
    fn agree(&self) -> bool {
        self.guest == self.host
    }
}

impl Add for Sides {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            guest: self.guest + other.guest,
            host: self.host + other.host,
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
}

impl Add for Amounts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            frames: self.frames + other.frames,
            bytes: self.bytes + other.bytes,
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
        }
    }
}

/// What driver and daemon counted of copies to the device, back, and fills, by the names of
/// the driver's counters.
#[must_use]
pub fn sides(guest: impl Fn(&str) -> u64, host: &Counters) -> BTreeMap<&'static str, Sides> {
    let operations = [
        ("to_device", host.to_device),
        ("from_device", host.from_device),
        ("fill", host.fill),
    ];
    operations
        .into_iter()
        .map(|(name, operation)| {
            let amount = |what: &str| guest(&format!("{name}_{what}"));
            let sides = Sides {
                guest: Amounts {
                    requests: amount("requests"),
                    frames: amount("frames"),
                    bytes: amount("bytes"),
                },
                host: operation.into(),
            };
            (name, sides)
        })
        .collect()
}

/// The driver's counters in the guest, by device.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Guest(BTreeMap<String, BTreeMap<String, u64>>);

impl Guest {
    /// Takes a line that [`PRINT_COUNTERS`] prints; false if it is another line.
    pub fn add_line(&mut self, line: &str) -> bool {
        let parts = || {
            let rest = line.strip_prefix("/sys/kernel/debug/virtio_hmm/")?;
            let (device, rest) = rest.split_once("/counters:")?;
            let (name, value) = rest.split_once(' ')?;
            Some((device, name, value.trim().parse().ok()?))
        };
        let Some((device, name, value)) = parts() else {
            return false;
        };
        let counters = self.0.entry(device.to_owned()).or_default();
        counters.insert(name.to_owned(), value);
        true
    }

    /// A counter of a device; 0 if there is none.
    #[must_use]
    pub fn get(&self, device: &str, name: &str) -> u64 {
        let counters = self.0.get(device);
        counters
            .and_then(|counters| counters.get(name))
            .map_or(0, |&value| value)
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
}

impl Device {
    /// Whether anything was copied to it. Two sides that both counted nothing agree about
    /// nothing.
    #[must_use]
    pub fn was_used(&self) -> bool {
        let sides = self.counters.get("to_device");
        sides.is_some_and(|sides| sides.host.frames > 0)
    }
}

/// Compares the sides of every device. The driver numbers the devices as they are plugged.
#[must_use]
pub fn devices(guest: &Guest, host: &[Option<Counters>]) -> Vec<Device> {
    host.iter()
        .enumerate()
        .map(|(slot, host)| {
            let device = format!("hmm{slot}");
            let host = host.unwrap_or_default();
            let counters = sides(|name| guest.get(&device, name), &host);
            Device {
                device,
                reconciled: counters.values().all(Sides::agree),
                counters,
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
    let mut text = format!("{:<18}{:>16}{:>16}\n", "", "guest", "host");
    for (name, sides) in counters {
        let name = name.replace('_', " ");
        for (what, guest, host) in [
            ("requests", sides.guest.requests, sides.host.requests),
            ("frames", sides.guest.frames, sides.host.frames),
            ("bytes", sides.guest.bytes, sides.host.bytes),
        ] {
            let sign = if guest == host { "" } else { "  differs" };
            let _ = writeln!(
                text,
                "{:<20}{:>16}{:>16}{sign}",
                format!("{name} {what}"),
                grouped(guest),
                grouped(host)
            );
        }
    }
    text
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

    /// A device whose two sides counted the same, and more than nothing.
    pub(crate) fn agreeing() -> (Guest, Counters) {
        let one = Operation {
            requests: 3,
            frames: 1000,
            bytes: 1000 * 4096,
            errors: 0,
        };
        let host = Counters {
            to_device: one,
            from_device: one,
            fill: one,
        };
        let mut guest = Guest::default();
        for name in ["to_device", "from_device", "fill"] {
            for (what, amount) in [("requests", 3), ("frames", 1000), ("bytes", 1000 * 4096)] {
                let line =
                    format!("/sys/kernel/debug/virtio_hmm/hmm0/counters:{name}_{what} {amount}");
                assert!(guest.add_line(&line));
            }
        }
        (guest, host)
    }

    #[test]
    fn sides_that_agree_reconcile() {
        let (guest, host) = agreeing();
        let devices = devices(&guest, &[Some(host)]);
        assert!(devices[0].reconciled);
        assert!(!table(&total(&devices)).contains("differs"));
    }

    #[test]
    fn one_frame_of_difference_is_found_and_shown() {
        let (guest, mut host) = agreeing();
        host.fill.frames += 1;
        let devices = devices(&guest, &[Some(host)]);
        assert!(!devices[0].reconciled);
        assert!(table(&total(&devices)).contains("differs"));
    }

    #[test]
    fn each_device_has_to_agree_with_its_own_daemon() {
        let (guest, host) = agreeing();
        let devices = devices(&guest, &[Some(host), Some(host)]);
        let reconciled: Vec<bool> = devices.iter().map(|device| device.reconciled).collect();
        assert_eq!(reconciled, [true, false]);
        assert_eq!(total(&devices)["fill"].host.frames, 2000);
    }

    #[test]
    fn a_device_that_moved_nothing_was_not_used() {
        let devices = devices(&Guest::default(), &[Some(Counters::default())]);
        assert!(devices[0].reconciled && !devices[0].was_used());
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
