//! Sizes and times as users write them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer};

/// A number of bytes; in text `512M` or `1G` (powers of 1024).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl Size {
    /// One mebibyte.
    pub const MIB: u64 = 1 << 20;
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, shift) = match text.char_indices().next_back() {
            Some((at, 'K' | 'k')) => (text.get(..at), 10),
            Some((at, 'M' | 'm')) => (text.get(..at), 20),
            Some((at, 'G' | 'g')) => (text.get(..at), 30),
            _ => (Some(text), 0),
        };
        number
            .and_then(|number| number.parse::<u64>().ok())
            .and_then(|number| number.checked_mul(1 << shift))
            .map(Size)
            .ok_or_else(|| format!("`{text}` is not a size such as 512M or 1G"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, suffix) in [(30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{suffix}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// Reads a time such as `90`, `90s`, `10m` or `1h`.
///
/// # Errors
/// The text is none of these, or zero.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.char_indices().next_back() {
        Some((at, 's')) => (text.get(..at), 1),
        Some((at, 'm')) => (text.get(..at), 60),
        Some((at, 'h')) => (text.get(..at), 3600),
        _ => (Some(text), 1),
    };
    number
        .and_then(|number| number.parse::<u64>().ok())
        .and_then(|number| number.checked_mul(unit))
        .filter(|&seconds| seconds > 0)
        .map(Duration::from_secs)
        .ok_or_else(|| format!("`{text}` is not a time such as 90s or 10m"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_print_alike() {
        for (text, bytes) in [("1", 1), ("3K", 3072), ("512M", 512 << 20), ("2G", 2 << 30)] {
            let size: Size = text.parse().unwrap();
            assert_eq!(size, Size(bytes));
            assert_eq!(size.to_string(), text);
        }
        assert_eq!("0".parse(), Ok(Size(0)));
        assert_eq!(Size(0).to_string(), "0");
    }

    #[test]
    fn nonsense_is_no_size_and_no_time() {
        for text in ["", "M", "-1M", "1.5G", "1T", "99999999999G", "µ"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        for text in ["", "s", "0", "-3s", "1d", "99999999999999999999h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_have_units() {
        assert_eq!(parse_duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(parse_duration("1h"), Ok(Duration::from_secs(3600)));
    }
}
