//! vhost-user device with private memory and a DMA copy engine.
pub mod abi;
