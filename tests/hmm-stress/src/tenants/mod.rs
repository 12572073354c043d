//! Between tenants: bytes of one process never reach another, in device frames and in RAM.
//!
//! Each test has a tenant fill memory with its secrets, on the device and in RAM, and give it
//! up in one way. Then another process is handed every free frame of the device, as holes of
//! its own memory, and gets each page home into RAM that the driver chose: all must be zero.

mod leave;
mod newcomer;

use crate::suite::{self, Test, tests};

/// All of them, in the order in which they run.
pub const ALL: &[Test] = tests! {
    newcomer::alone: "tenants_find_zeros",
        "a process that comes now finds nothing of those who were there before";
    leave::munmap: "tenants_munmap",
        "after munmap of small and of huge pages";
    leave::discard: "tenants_madv_dontneed",
        "after MADV_DONTNEED, of all pages and of parts of huge ones";
    leave::lazy_free: "tenants_madv_free",
        "after MADV_FREE, here and there";
    leave::request: "tenants_migrate_back",
        "after migration to RAM";
    leave::fault: "tenants_cpu_fault",
        "after CPU faults";
    leave::eviction: "tenants_eviction",
        "after eviction of what was used least recently";
    leave::exit: "tenants_exit",
        "after exit";
    leave::kill: "tenants_kill",
        "after SIGKILL";
    leave::exec: "tenants_exec",
        "after exec";
    leave::copy_on_write: "tenants_fork",
        "after fork, when parent and child have each written what they shared";
};

/// The names of all tests between tenants.
pub const NAMES: [&str; ALL.len()] = suite::names(ALL);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        suite::assert_unique(ALL);
    }
}
