//! Amounts of memory and time: as people write them, and as they fit a machine.

use std::time::Duration;

use virtio_hmm_client::PAGE_SIZE;

/// Parse a size in bytes: a number, and K, M or G for powers of 1024.
///
/// # Errors
/// It is something else, zero, or too large.
pub fn parse_size(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.strip_suffix(['K', 'M', 'G', 'k', 'm', 'g']) {
        Some(digits) => (digits, text.to_ascii_uppercase()),
        None => (text, String::new()),
    };
    let shift = match unit.chars().last() {
        Some('K') => 10,
        Some('M') => 20,
        Some('G') => 30,
        _ => 0,
    };
    digits
        .parse::<usize>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|&bytes| bytes > 0)
        .ok_or_else(|| format!("{text:?} is not a size like 64M"))
}

/// Parse a duration: a number of seconds, or one with ms, s or m.
///
/// # Errors
/// It is something else, negative, or too long.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (digits, seconds) = if let Some(digits) = text.strip_suffix("ms") {
        (digits, 0.001)
    } else if let Some(digits) = text.strip_suffix('s') {
        (digits, 1.0)
    } else if let Some(digits) = text.strip_suffix('m') {
        (digits, 60.0)
    } else {
        (text, 1.0)
    };
    digits
        .parse::<f64>()
        .ok()
        .and_then(|number| Duration::try_from_secs_f64(number * seconds).ok())
        .ok_or_else(|| format!("{text:?} is not a duration like 5s"))
}

/// How many pages a region may have when `wanted` bytes were asked for: at most half of
/// the free device memory and a quarter of the available RAM, at least 16.
#[must_use]
pub fn fit_pages(wanted: usize, device_free: u64, ram_available: u64) -> usize {
    let limit = (device_free / 2).min(ram_available / 4);
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    (wanted.min(limit) / PAGE_SIZE).max(16)
}

/// The bytes of RAM that programs can still have, from the text of /proc/meminfo.
#[must_use]
pub fn available_ram(meminfo: &str) -> Option<u64> {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?
        .trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("64M"), Ok(64 << 20));
        assert_eq!(parse_size("1g"), Ok(1 << 30));
        assert_eq!(parse_size("4096"), Ok(4096));
        for text in ["", "M", "0", "-1", "64MB", "99999999999999999999", "1.5M"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(parse_duration("0.5"), Ok(Duration::from_millis(500)));
        for text in ["", "s", "-1s", "inf", "nan", "5h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn regions_fit_the_machine() {
        let gib = 1 << 30;
        assert_eq!(fit_pages(64 << 20, gib, gib), 16384);
        assert_eq!(fit_pages(64 << 20, 32 << 20, gib), 4096);
        assert_eq!(fit_pages(64 << 20, gib, 64 << 20), 4096);
        assert_eq!(fit_pages(1, 0, 0), 16);
    }

    #[test]
    fn meminfo() {
        let text = "MemTotal:  100 kB\nMemAvailable:   50 kB\n";
        assert_eq!(available_ram(text), Some(51200));
        assert_eq!(available_ram("MemTotal: 1 kB\n"), None);
    }
}
