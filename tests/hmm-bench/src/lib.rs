//! Benchmark of virtio-hmm beside what is used instead of a device, run in the guest.
//!
//! In every round each [`contender`] does the same [`work`] on fresh memory of its own, one
//! contender after the other. [`measure`] times it and compares every byte afterwards;
//! [`report`] has the lines that the program prints, and what is made of them.

#![allow(
    clippy::indexing_slicing,
    reason = "a benchmark that may only end early when its own indices are wrong"
)]

pub mod contender;
pub mod contents;
pub mod measure;
pub mod report;
pub mod statistics;
pub mod work;
