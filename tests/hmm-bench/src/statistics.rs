//! Medians, spreads and means.

use serde::{Deserialize, Serialize};

/// What several measurements of the same thing gave.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// Smallest.
    pub low: f64,
    /// Largest.
    pub high: f64,
}

impl Spread {
    /// Of at least one value.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        Some(Self {
            median: quantile(values, 0.5)?,
            low: quantile(values, 0.0)?,
            high: quantile(values, 1.0)?,
        })
    }
}

/// The value below which a part of the values lies, from 0 to 1, between the two nearest
/// values where it falls between them.
#[must_use]
pub fn quantile(values: &[f64], part: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the place lies between 0 and the last index"
    )]
    let below = (last as f64 * part).floor() as usize;
    let (low, high) = (sorted[below], sorted[last.min(below + 1)]);
    Some(low + (high - low) * (last as f64 * part - below as f64))
}

/// The geometric mean of values above 0: ratios of it do not depend on what is divided by what
/// (P. J. Fleming and J. J. Wallace, "How not to lie with statistics", CACM 29(3), 1986).
#[must_use]
pub fn geometric_mean(values: &[f64]) -> Option<f64> {
    let logarithms: f64 = values.iter().map(|value| value.ln()).sum();
    (!values.is_empty()).then(|| (logarithms / values.len() as f64).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one_or_between_the_two() {
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 0.5), Some(2.0));
        assert_eq!(quantile(&[4.0, 1.0, 2.0, 3.0], 0.5), Some(2.5));
        assert_eq!(quantile(&[7.0], 0.5), Some(7.0));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn high_quantiles_come_near_the_largest() {
        let values: Vec<f64> = (0..=100).map(f64::from).collect();
        assert_eq!(quantile(&values, 0.99), Some(99.0));
        assert_eq!(quantile(&values, 1.0), Some(100.0));
        assert_eq!(quantile(&[1.0, 2.0], 0.99), Some(1.99));
    }

    #[test]
    fn the_geometric_mean_of_reciprocals_is_the_reciprocal() {
        let mean = geometric_mean(&[1.0, 8.0, 27.0]).unwrap();
        assert!((mean - 6.0).abs() < 1e-9, "{mean}");
        let other = geometric_mean(&[1.0, 1.0 / 8.0, 1.0 / 27.0]).unwrap();
        assert!((mean * other - 1.0).abs() < 1e-9, "{other}");
        assert_eq!(geometric_mean(&[]), None);
    }

    #[test]
    fn a_spread_does_not_depend_on_the_order() {
        let spread = Spread::of(&[5.0, 1.0, 3.0]).unwrap();
        assert_eq!(spread, Spread::of(&[1.0, 3.0, 5.0]).unwrap());
        assert_eq!((spread.low, spread.median, spread.high), (1.0, 3.0, 5.0));
        assert_eq!(Spread::of(&[]), None);
    }
}
