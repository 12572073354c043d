//! Stress scenarios and contract tests of virtio-hmm, run in the guest.
//!
//! Every page carries a [`pattern`] that is checked on every read. A
//! [`scenario`] goes on for a given time; a [`contract`] test shows one clause
//! of the `migrate_vma` contract; one of the [`neighbours`] shows how migration and
//! another part of the kernel's memory management get on. After each, [`case`]
//! checks that no device memory was lost, that the driver's counters are the
//! device's, and that the kernel did not complain. The [`model`] checker makes its
//! operations up. The tests between [`tenants`] look for what others have left behind.
//! [`deaths`] has devices die under their users. [`report`] has the lines that the program prints.

#![allow(
    clippy::indexing_slicing,
    reason = "a test program that may only end early when its own indices are wrong"
)]

pub mod amount;
pub mod case;
pub mod context;
pub mod contract;
pub mod deaths;
pub mod failure;
pub mod hold;
pub mod kernel_log;
pub mod model;
pub mod neighbours;
pub mod pagemap;
pub mod pattern;
pub mod process;
pub mod region;
pub mod report;
pub mod scenario;
pub mod shared;
pub mod suite;
pub mod tenants;
pub mod watchdog;
