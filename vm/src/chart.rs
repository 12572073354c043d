//! Charts as SVG, to be put into a page.
//!
//! The marks are drawn in a square of 1000 by 1000 units that the page stretches to whatever room
//! there is, so that a chart fits a wide window and a narrow one. Text stands outside of it,
//! where it is not stretched. Colours are classes, which the page's style sheet sets for light
//! and dark. What is exactly where is told by titles, which show under the pointer.

mod axis;

pub use axis::{Axis, nanoseconds};

use std::fmt::Write as _;

use maud::{Markup, html};

/// Units on a side.
const SIDE: f64 = 1000.0;

/// A frame with two axes.
#[derive(Clone, Debug)]
pub struct Chart<'a> {
    /// What refers to it: unique in the page.
    pub id: String,
    /// What it shows.
    pub title: String,
    /// What the axes are, and what else has to be said.
    pub caption: &'a str,
    /// What is said to those who do not see it.
    pub summary: String,
    /// From left to right.
    pub x: Axis,
    /// From bottom to top.
    pub y: Axis,
    /// Classes of the marks, and what they stand for. None is shown for a single one.
    pub legend: &'a [(&'a str, &'a str)],
    /// Characters that there is room for to the left, at least: charts above one another with
    /// the same room have the same places.
    pub left: usize,
    /// Height in pixels.
    pub height: usize,
    /// Whether it takes the whole width of the page.
    pub wide: bool,
}

impl Chart<'_> {
    /// The chart with these marks, made by the other functions.
    #[must_use]
    pub fn draw(&self, marks: &Markup) -> Markup {
        let at = |place: f64| format!("{:.2}%", place * 100.0);
        let up = |place: f64| at(1.0 - place);
        let digits = self.y.ticks.iter().map(|tick| tick.label.chars().count());
        let left = digits.max().unwrap_or(0).max(self.left);
        html! {
            figure id=(self.id) class=[self.wide.then_some("wide")] {
                figcaption { h3 { (self.title) } p { (self.caption) } }
                @if self.legend.len() > 1 {
                    ul.legend {
                        @for (class, label) in self.legend {
                            li { svg class=(class) viewBox="0 0 12 12" aria-hidden="true" { rect class="mark" width="12" height="12" rx="2" {} } (label) }
                        }
                    }
                }
                div.chart style=(format!("--left:{left}ch;--height:{}px", self.height)) {
                    svg.left aria-hidden="true" {
                        @for tick in &self.y.ticks {
                            text x="100%" y=(up(tick.place)) { (tick.label) }
                        }
                    }
                    svg.marks role="img" aria-label=(self.summary) viewBox="0 0 1000 1000" preserveAspectRatio="none" {
                        @for tick in &self.y.ticks {
                            path.grid d=(format!("M0 {0:.1}H1000", SIDE * (1.0 - tick.place))) {}
                        }
                        (marks)
                    }
                    svg.below aria-hidden="true" {
                        @for tick in &self.x.ticks {
                            text x=(at(tick.place)) y="1em" { (tick.label) }
                        }
                    }
                }
            }
        }
    }

    fn point(&self, (x, y): (f64, f64)) -> (f64, f64) {
        (SIDE * self.x.place(x), SIDE * (1.0 - self.y.place(y)))
    }

    /// A line of steps, each from one place to another at a height, and the area below it.
    #[must_use]
    pub fn steps(&self, class: &str, steps: impl IntoIterator<Item = (f64, f64, f64)>) -> Markup {
        let (mut line, mut area) = (String::new(), String::new());
        let mut last = f64::NAN;
        for (from, to, height) in steps {
            let (left, y) = self.point((from, height));
            let right = self.point((to, height)).0;
            // After a gap it begins anew.
            let joint = if (left - last).abs() < 2.0 { 'L' } else { 'M' };
            let _ = write!(line, "{joint}{left:.1} {y:.1}H{right:.1}");
            let _ = write!(area, "M{left:.1} {SIDE}V{y:.1}H{right:.1}V{SIDE}");
            last = right;
        }
        html! {
            g class=(class) { path.area d=(area) {} path.line d=(line) {} }
        }
    }

    /// A line through these places.
    #[must_use]
    pub fn line(&self, class: &str, places: impl IntoIterator<Item = (f64, f64)>) -> Markup {
        let mut path = String::new();
        for place in places {
            let (x, y) = self.point(place);
            let command = if path.is_empty() { 'M' } else { 'L' };
            let _ = write!(path, "{command}{x:.1} {y:.1}");
        }
        html! { g class=(class) { path.line d=(path) {} } }
    }

    /// A dot for each pair of places.
    #[must_use]
    pub fn dots(&self, class: &str, dots: impl IntoIterator<Item = (f64, f64)>) -> Markup {
        let mut path = String::new();
        for dot in dots {
            let (x, y) = self.point(dot);
            let _ = write!(path, "M{x:.1} {y:.1}h0");
        }
        html! { g class=(class) { path.dots d=(path) {} } }
    }

    /// A bar from one place to another, of this thickness around `y`.
    #[must_use]
    pub fn bar(
        &self,
        class: &str,
        (from, to): (f64, f64),
        (y, thickness): (f64, f64),
        title: &str,
    ) -> Markup {
        let (left, top) = self.point((from, y + thickness / 2.0));
        let (right, bottom) = self.point((to, y - thickness / 2.0));
        html! {
            rect class=(format!("{class} mark")) x=(format!("{left:.1}")) y=(format!("{top:.1}"))
                width=(format!("{:.1}", (right - left).max(1.5))) height=(format!("{:.1}", bottom - top)) {
                title { (title) }
            }
        }
    }

    /// Places of the whole chart's height that have a title, from one place to another.
    #[must_use]
    pub fn titles(&self, titles: impl IntoIterator<Item = (f64, f64, String)>) -> Markup {
        let places = titles.into_iter().map(|(from, to, title)| {
            let (left, right) = (self.point((from, 0.0)).0, self.point((to, 0.0)).0);
            (format!("{left:.1}"), format!("{:.1}", right - left), title)
        });
        html! {
            @for (x, width, title) in places {
                rect.title x=(x) width=(width) height="1000" { title { (title) } }
            }
        }
    }
}
