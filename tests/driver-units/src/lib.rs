//! Parts of the guest driver in user space: its source as it is, with `c/kernel.h` for what that
//! needs of the kernel.

pub mod memory;
