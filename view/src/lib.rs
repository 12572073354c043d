//! What `hmm-stat` and `hmm-top` have in common: a [`reading`] of a running
//! device's statistics after each [`interval`], and the [`rates`] at which they
//! change.
pub mod interval;
pub mod rates;
pub mod reading;
