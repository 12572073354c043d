//! Drives the device over its vhost-user socket as a VMM and its guest do, with
//! hand-built rings and no VM. Where a test proves a conformance statement of
//! `docs/device-specification.md`, its name begins with the statement's number.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod harness;
mod injection;
mod link;
mod operations;
mod rejections;
mod rings;
mod sessions;
mod statistics;
