//! The tool behind `cargo vm`: makes what a VM with the device needs, boots it,
//! runs one program in it and reports how that ended.

pub mod accelerator;
mod actions;
pub mod apt;
pub mod bench;
pub mod boot_image;
pub mod browser;
pub mod build;
pub mod chart;
pub mod console;
pub mod daemon;
pub mod demo;
mod devices;
pub mod doctor;
pub mod environment;
pub mod error;
pub mod fuzz;
mod host;
pub mod initramfs;
pub mod kernel;
pub mod machine;
pub mod named_kernel;
pub mod page;
pub mod paths;
pub mod prepare;
pub mod process;
pub mod profile;
mod qmp;
pub mod reconcile;
pub mod report;
pub mod report_directory;
pub mod root;
pub mod run;
pub mod sampler;
pub mod stress;
mod terminal;
pub mod testing;
pub mod toolbox;
pub mod torture;
pub mod view;

pub use error::{Error, Result};
pub use hmm_profile::units;
