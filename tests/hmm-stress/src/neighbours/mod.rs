//! What the rest of the kernel's memory management does to device pages, and what
//! migration does to its pages.
//!
//! Each test needs one of these neighbours; where the kernel or the machine does not have
//! it, the test is skipped. The tests only need root.

mod core_dump;
mod counted;
mod meanwhile;
mod pins;
mod remote_access;
mod soft_dirty;

use crate::suite::{self, Test, tests};

/// All of them, in the order in which they run.
pub const ALL: &[Test] = tests! {
    soft_dirty::survives: "soft_dirty_survives_migration",
        "a page written since clear_refs stays so on the device and back, others stay clean";
    pins::registered_buffers: "registered_buffers_pin_their_pages",
        "io_uring's registered buffers come home, stay as long as they are registered, then move";
    pins::pipes: "pipes_hold_their_pages",
        "pages that vmsplice put into a pipe come home, stay until it is drained, then move";
    pins::direct_io: "direct_io_and_migration",
        "O_DIRECT from and into device pages, and pages that migrate meanwhile";
    pins::direct_io_in_flight: "direct_io_in_flight_pins_its_pages",
        "pages that a disk reads into stay until it has completed";
    remote_access::process_vm: "process_vm_readv_and_writev",
        "device pages of two processes, read and written by one of them";
    remote_access::proc_mem: "proc_pid_mem",
        "device pages of another process, read and written through /proc/PID/mem";
    remote_access::ptrace: "ptrace_peek_and_poke",
        "device pages of another process, read and written by its tracer";
    core_dump::run: "core_dump_has_device_pages",
        "the core dump of a process has the bytes of its device pages, without MADV_DONTDUMP ones";
};

/// The names of all of them.
pub const NAMES: [&str; ALL.len()] = suite::names(ALL);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        suite::assert_unique(ALL);
    }
}
