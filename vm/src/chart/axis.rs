//! What is where on an axis, and what is written beside it.

/// A place that has a label.
#[derive(Clone, Debug, PartialEq)]
pub struct Tick {
    /// From 0 to 1.
    pub place: f64,
    /// What is written there.
    pub label: String,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Scale {
    Linear,
    Logarithmic,
}

/// An axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    scale: Scale,
    first: f64,
    last: f64,
    /// In their order.
    pub ticks: Vec<Tick>,
}

/// Most labels, so that they fit a narrow window.
const MOST: usize = 6;

impl Axis {
    /// From zero to `most` or a little more, with labels at round numbers.
    #[must_use]
    pub fn linear(most: f64) -> Self {
        let most = if most > 0.0 { most } else { 1.0 };
        let step = round_step(most / 5.0);
        let last = (most / step - 1e-9).ceil() * step;
        Self::with(Scale::Linear, 0.0, last, multiples(step, last), |value| {
            decimal(value, step)
        })
    }

    /// From zero to exactly so many seconds.
    #[must_use]
    pub fn time(seconds: f64) -> Self {
        const STEPS: [f64; 19] = [
            0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0,
            1800.0, 3600.0, 7200.0, 14_400.0, 43_200.0,
        ];
        let last = seconds.max(0.1);
        let step = STEPS.iter().copied().find(|step| last / step < 6.0);
        let step = step.unwrap_or_else(|| round_step(last / 5.0 / 86_400.0) * 86_400.0);
        Self::with(
            Scale::Linear,
            0.0,
            last,
            multiples(step, last),
            |value| match step {
                3600.0.. => format!("{} h", decimal(value / 3600.0, step / 3600.0)),
                60.0.. => format!("{} min", decimal(value / 60.0, step / 60.0)),
                _ => format!("{} s", decimal(value, step)),
            },
        )
    }

    /// From the power of ten below `least` to that above `most`, both in nanoseconds.
    #[must_use]
    pub fn duration(least: f64, most: f64) -> Self {
        let first = least.max(1.0).log10().floor();
        let last = most.max(2.0).log10().ceil().max(first + 1.0);
        let mut exponents = Vec::new();
        let mut exponent = first;
        while exponent <= last {
            exponents.push(exponent);
            exponent += 1.0;
        }
        let stride = exponents.len().div_ceil(MOST);
        let values = exponents.iter().step_by(stride).map(|e| 10_f64.powf(*e));
        let values = values.collect();
        Self::with(
            Scale::Logarithmic,
            10_f64.powf(first),
            10_f64.powf(last),
            values,
            nanoseconds,
        )
    }

    /// A row for each name, the first at the top; row number N from there is at height
    /// [`Self::row`].
    #[must_use]
    pub fn rows<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let names: Vec<&str> = names.into_iter().collect();
        let rows = names.len().max(1) as f64;
        let mut axis = Self {
            scale: Scale::Linear,
            first: 0.0,
            last: rows,
            ticks: Vec::new(),
        };
        axis.ticks = names
            .iter()
            .enumerate()
            .map(|(row, name)| Tick {
                place: axis.place(axis.row(row)),
                label: (*name).to_owned(),
            })
            .collect();
        axis
    }

    /// The middle of a row.
    #[must_use]
    pub fn row(&self, row: usize) -> f64 {
        self.last - row as f64 - 0.5
    }

    fn with(
        scale: Scale,
        first: f64,
        last: f64,
        values: Vec<f64>,
        label: impl Fn(f64) -> String,
    ) -> Self {
        let mut axis = Self {
            scale,
            first,
            last,
            ticks: Vec::new(),
        };
        axis.ticks = values
            .into_iter()
            .map(|value| Tick {
                place: axis.place(value),
                label: label(value),
            })
            .collect();
        axis
    }

    /// Where a value is, from 0 to 1.
    #[must_use]
    pub fn place(&self, value: f64) -> f64 {
        let place = match self.scale {
            Scale::Linear => (value - self.first) / (self.last - self.first),
            Scale::Logarithmic => {
                (value.max(self.first) / self.first).ln() / (self.last / self.first).ln()
            }
        };
        place.clamp(0.0, 1.0)
    }
}

/// The next 1, 2 or 5 with zeros.
fn round_step(least: f64) -> f64 {
    let power = 10_f64.powf(least.log10().floor());
    let digits = [1.0, 2.0, 5.0].into_iter();
    let fitting = digits.map(|digit| digit * power);
    fitting
        .into_iter()
        .find(|step| *step >= least * (1.0 - 1e-9))
        .unwrap_or(10.0 * power)
}

fn multiples(step: f64, last: f64) -> Vec<f64> {
    let values = (0..100_u32).map(|number| f64::from(number) * step);
    values
        .take_while(|value| *value <= last * (1.0 + 1e-9))
        .collect()
}

/// A multiple of a round step, with the decimals that the step has.
fn decimal(value: f64, step: f64) -> String {
    let decimals = (1..9)
        .take_while(|power| step * 10_f64.powi(power - 1) < 1.0 - 1e-9)
        .count();
    format!("{value:.decimals$}")
}

/// A time for people, with up to three digits.
#[must_use]
pub fn nanoseconds(ns: f64) -> String {
    let (value, unit) = match ns {
        1e9.. => (ns / 1e9, "s"),
        1e6.. => (ns / 1e6, "ms"),
        1e3.. => (ns / 1e3, "µs"),
        _ => (ns, "ns"),
    };
    if value < 10.0 && value.fract() > 0.05 {
        format!("{value:.1} {unit}")
    } else {
        format!("{value:.0} {unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|tick| tick.label.as_str()).collect()
    }

    #[test]
    fn labels_are_round_numbers() {
        assert_eq!(
            labels(&Axis::linear(430.0)),
            ["0", "100", "200", "300", "400", "500"]
        );
        assert_eq!(
            labels(&Axis::linear(1.0)),
            ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
        );
        assert_eq!(labels(&Axis::time(34.0)), ["0 s", "10 s", "20 s", "30 s"]);
        assert_eq!(
            labels(&Axis::time(600.0)),
            ["0 min", "2 min", "4 min", "6 min", "8 min", "10 min"]
        );
        assert_eq!(
            labels(&Axis::time(9000.0)),
            ["0 min", "30 min", "60 min", "90 min", "120 min", "150 min"]
        );
        assert_eq!(
            labels(&Axis::duration(3000.0, 90e6)),
            ["1 µs", "10 µs", "100 µs", "1 ms", "10 ms", "100 ms"]
        );
    }

    #[test]
    fn no_axis_has_more_labels_than_fit_and_none_is_outside() {
        for exponent in -1..60 {
            let value = 1.7_f64.powi(exponent);
            for axis in [
                Axis::linear(value),
                Axis::time(value),
                Axis::duration(1.0, value),
            ] {
                assert!((2..=MOST).contains(&axis.ticks.len()), "{value} {axis:?}");
                for pair in axis.ticks.windows(2) {
                    assert!(pair[0].place < pair[1].place, "{value} {axis:?}");
                    assert_ne!(pair[0].label, pair[1].label, "{value}");
                }
                assert!(
                    axis.ticks
                        .iter()
                        .all(|tick| (0.0..=1.0).contains(&tick.place))
                );
            }
        }
    }

    #[test]
    fn values_are_where_they_belong() {
        let axis = Axis::linear(430.0);
        assert_eq!(
            [0.0, 250.0, 500.0, 9999.0].map(|value| axis.place(value)),
            [0.0, 0.5, 1.0, 1.0]
        );
        let axis = Axis::duration(1000.0, 10e6);
        assert!((axis.place(100_000.0) - 0.5).abs() < 1e-9);
        assert_eq!(axis.place(0.0), 0.0);
        let axis = Axis::rows(["a", "b"]);
        assert_eq!(axis.ticks[0].place, 0.75);
        assert_eq!(axis.place(axis.row(1)), 0.25);
    }

    #[test]
    fn nothing_at_all_has_an_axis() {
        assert_eq!(Axis::linear(0.0), Axis::linear(1.0));
        assert!(Axis::time(0.0).ticks.len() > 1);
        assert!(Axis::rows([]).ticks.is_empty());
    }

    #[test]
    fn times_have_fitting_units() {
        assert_eq!(
            [256.0, 1536.0, 20_000.0, 3e6, 12e9].map(nanoseconds),
            ["256 ns", "1.5 µs", "20 µs", "3 ms", "12 s"]
        );
    }
}
