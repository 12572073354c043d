//! vhost-user device with private memory and a DMA copy engine.
//!
//! From the inside out: [`memory`] is the device's memory, [`engine`] copies to
//! and from it and knows nothing of virtio, [`chain`], [`request`] and [`processor`]
//! turn descriptor chains into copies, a [`worker`] serves one queue, [`backend`]
//! has one for each, [`server`] serves one VM after another, and [`control`] is the
//! control plane, on which the data plane never waits. [`link`] says how long a
//! copy takes over a modelled link, [`rule`] and [`inject`] what goes wrong on purpose.
//! [`counters`] and [`hardware`] are what workers count. [`sandbox`] and [`seccomp`]
//! are what the process gives up once it has started.
pub mod abi;
pub mod arrivals;
pub mod backend;
pub mod chain;
pub mod control;
pub mod counters;
pub mod engine;
pub mod hardware;
pub mod histogram;
pub mod inject;
pub mod link;
pub mod memory;
pub mod metrics;
pub mod polling;
pub mod processor;
pub mod request;
pub mod rule;
pub mod sandbox;
pub mod scrape;
pub mod seccomp;
pub mod server;
pub mod session;
pub mod socket;
pub mod statistics;
pub mod stop;
pub mod units;
pub mod worker;

use std::{error::Error, fmt};

/// Shows an error followed by its sources, in one line.
pub struct ErrorChain<'a>(pub &'a dyn Error);

impl fmt::Display for ErrorChain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
