//! What `hmm-stat` and `hmm-top` have in common: a [`reading`] of a running
//! device's statistics after each [`interval`], and the [`rates`] at which they
//! change. [`screen`] is what `hmm-top` shows of them, in numbers of a [`mod@format`]
//! for people.
pub mod format;
pub mod interval;
pub mod rates;
pub mod reading;
pub mod screen;
