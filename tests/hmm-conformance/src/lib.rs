//! A driver in user space that tests a device against `docs/device-specification.md`.
//!
//! It takes the device through vfio-pci ([`binding`]), speaks virtio over PCI with it
//! ([`transport`]), and has its rings and buffers in [`memory`] that device and driver know by
//! the same addresses. A [`driver`] sends requests over rings that a case may fill with
//! anything; the [`cases`] are named after the statements that they are about, and a [`suite`]
//! runs them.

#![allow(
    clippy::indexing_slicing,
    reason = "a test program that may only end early when its own indices are wrong"
)]

pub mod binding;
pub mod cases;
pub mod driver;
pub mod failure;
pub mod memory;
pub mod request;
pub mod suite;
pub mod transport;
