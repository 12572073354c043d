//! The time between two readings, as a user gives it.

use std::time::Duration;

/// Reads a number of seconds.
///
/// # Errors
/// If it is none from 0.01 to 86400.
pub fn parse_interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|s| (0.01..=86_400.0).contains(s));
    let seconds = seconds.ok_or("not a number from 0.01 to 86400")?;
    Ok(Duration::from_secs_f64(seconds))
}
