//! Sizes and times as people write them.

use std::time::Duration;

/// Bytes in `text`, a number with an optional suffix K, M, G or T, which stand
/// for powers of 1024.
///
/// # Errors
/// If it is no such number, or does not fit; the text says so.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (text.get(..at), 10),
        Some((at, 'm' | 'M')) => (text.get(..at), 20),
        Some((at, 'g' | 'G')) => (text.get(..at), 30),
        Some((at, 't' | 'T')) => (text.get(..at), 40),
        _ => (Some(text), 0),
    };
    let number: u64 = digits
        .unwrap_or_default()
        .parse()
        .map_err(|_| "not a size")?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "too large".into())
}

/// Time in `text`, a whole number with the suffix ns, us, ms or s.
///
/// # Errors
/// If it is no such number, or exceeds a day; the text says so.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    let unit_at = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let nanoseconds: u64 = match unit {
        "ns" => 1,
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        _ => return Err("not a time, such as 10us, 5ms or 1s".into()),
    };
    let number: u64 = number.parse().map_err(|_| "not a time")?;
    number
        .checked_mul(nanoseconds)
        .map(Duration::from_nanos)
        .filter(|time| *time <= Duration::from_secs(86_400))
        .ok_or_else(|| "longer than a day".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit_and_an_end() {
        assert_eq!(parse_time("10us"), Ok(Duration::from_micros(10)));
        assert_eq!(parse_time("0ns"), Ok(Duration::ZERO));
        assert_eq!(parse_time("86400s"), Ok(Duration::from_secs(86_400)));
        for text in [
            "",
            "5",
            "ms",
            "-5ms",
            "5 ms",
            "1.5s",
            "5m",
            "86401s",
            "99999999999s",
        ] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }
}
