//! Numbers for a person: three digits and a unit.

/// A number with a prefix of thousands, such as `1.23 M`.
fn prefixed(number: f64, prefixes: &[&str], step: f64) -> String {
    let mut scaled = number;
    let mut prefixes = prefixes.iter().peekable();
    let mut prefix = prefixes.next().copied().unwrap_or_default();
    // What would be rounded to the next step is shown as that.
    while scaled >= step - 0.5 && prefixes.peek().is_some() {
        scaled /= step;
        prefix = prefixes.next().copied().unwrap_or_default();
    }
    let digits = match scaled {
        _ if scaled == 0.0 => 0,
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    };
    format!("{scaled:.digits$} {prefix}")
}

/// Bytes a second, as `412 MB/s`.
pub fn bandwidth(bytes: f64) -> String {
    prefixed(bytes, &["B/s", "kB/s", "MB/s", "GB/s", "TB/s"], 1000.0)
}

/// Bytes of memory, as `123 MiB`.
pub fn memory(bytes: u64) -> String {
    prefixed(bytes as f64, &["B", "KiB", "MiB", "GiB", "TiB"], 1024.0)
}

/// Things, or things a second, as `12.3 k`.
pub fn count(number: f64) -> String {
    let text = prefixed(number, &["", "k", "M", "G", "T"], 1000.0);
    text.trim_end().to_owned()
}

/// A time, as `12.3 µs`.
pub fn time(ns: u64) -> String {
    prefixed(ns as f64, &["ns", "µs", "ms", "s"], 1000.0)
}

/// A part of a whole, as `63.2 %`.
pub fn percent(part: f64) -> String {
    format!("{:.1} %", part * 100.0)
}

/// A small number with two digits that say something, as `0.016`.
pub fn small(number: f64) -> String {
    let (mut scaled, mut digits) = (number, 0);
    while scaled > 0.0 && scaled < 9.95 && digits < 9 {
        scaled *= 10.0;
        digits += 1;
    }
    format!("{number:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        for (bytes, text) in [
            (0.0, "0 B/s"),
            (1.0, "1.00 B/s"),
            (12_345.0, "12.3 kB/s"),
            (411_900_000.0, "412 MB/s"),
            (999_600_000.0, "1.00 GB/s"),
            (9.996, "10.0 B/s"),
            (99.96, "100 B/s"),
            (5e15, "5000 TB/s"),
        ] {
            assert_eq!(bandwidth(bytes), text);
        }
        assert_eq!(memory(256 << 20), "256 MiB");
        assert_eq!(memory((1 << 30) - 1), "1.00 GiB");
        assert_eq!(memory(u64::MAX), "16777216 TiB");
        assert_eq!(count(1_234_567.0), "1.23 M");
        assert_eq!(count(42.0), "42.0");
        assert_eq!(time(3_200), "3.20 µs");
        assert_eq!(time(34_000_000_000), "34.0 s");
        assert_eq!(percent(0.632), "63.2 %");
        let numbers = [0.0, 0.0156, 0.000_244, 0.45, 12.6, 123.4, 1e-12];
        let texts = ["0", "0.016", "0.00024", "0.45", "13", "123", "0.000000000"];
        assert_eq!(numbers.map(small), texts);
    }
}
