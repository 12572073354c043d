//! What the user is told while something is made. All of it goes to standard error.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Tells the user what is being done; quiet for things that take no time.
#[derive(Clone, Copy, Debug)]
pub struct Report;

impl Report {
    /// One line.
    pub fn line(self, text: &str) {
        eprintln!("virtio-hmm: {text}");
    }

    /// A bar of `total` bytes, which shows on a terminal only.
    #[must_use]
    pub fn bytes(self, total: u64) -> ProgressBar {
        Self::bar(total, "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec}")
    }

    /// A bar of `total` steps, which shows on a terminal only.
    #[must_use]
    pub fn steps(self, total: u64) -> ProgressBar {
        Self::bar(total, "{wide_bar} {pos}/{len}")
    }

    /// A moving sign for a step of unknown length, which shows on a terminal only.
    #[must_use]
    pub fn spinner(self) -> ProgressBar {
        let bar = ProgressBar::new_spinner();
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    }

    fn bar(total: u64, template: &str) -> ProgressBar {
        let style =
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::new(total).with_style(style)
    }
}
