//! What the rest of the kernel's memory management does to device pages, and what
//! migration does to its pages.
//!
//! Each test needs one of these neighbours; where the kernel or the machine does not have
//! it, the test is skipped. The tests only need root.

mod advice;
mod atomics;
mod cgroup;
mod core_dump;
mod counted;
mod cpu_hotplug;
mod exec;
mod fault_around;
mod fork;
mod futex;
mod guard_pages;
mod huge;
mod ksm;
mod lazyfree;
mod mappings;
mod meanwhile;
mod memcg;
mod memory_hotplug;
mod mlock;
mod numa;
mod numa_balancing;
mod own_memory;
mod pagemap_entries;
mod pins;
mod private_file;
mod protection;
mod refused;
mod remap;
mod remote_access;
mod signal_stack;
mod soft_dirty;
mod swap;
mod system_calls;
mod tunable;
mod uffd_access_protect;
mod uffd_missing;
mod uffd_write_protect;
mod userfaultfd;

use crate::suite::{self, Test, tests};

/// All of them, in the order in which they run.
pub const ALL: &[Test] = tests! {
    ksm::merged: "ksm_merged_pages_stay",
        "pages that KSM may merge stay in RAM until it may not any more";
    ksm::on_device: "ksm_leaves_device_pages",
        "KSM neither reads nor merges device pages";
    ksm::zero: "ksm_zero_pages_stay",
        "so do pages that KSM made the zero page";
    fault_around::grows: "fault_around_grows",
        "whoever goes up in memory gets twice as many pages at each fault";
    fault_around::one_by_one: "fault_around_off",
        "who does not go up, or switched it off, gets the page that he touches";
    fault_around::holes: "fault_around_leaves_holes",
        "holes stay holes, and what is in RAM stays there";
    fault_around::mapping_ends: "fault_around_ends_with_the_mapping",
        "pages of the next mapping stay on the device";
    swap::pressure: "swap_under_memory_pressure",
        "pages in RAM are swapped out, device pages stay, and come home under pressure";
    memcg::charge: "memcg_charge_follows_pages",
        "device pages and filled holes are charged once, like pages in RAM";
    memcg::at_limit: "memcg_at_its_limit",
        "pages migrate both ways and come home by fault in a cgroup without room";
    memcg::lowered_limit: "memcg_limit_below_device_pages",
        "a limit below its device pages kills a process, and all of them are freed";
    memcg::kill_on_touch: "memcg_oom_kill_with_device_pages",
        "an OOM kill frees device pages, and others keep theirs";
    memcg::kill_on_fill: "memcg_oom_kill_while_filling",
        "a process that fills holes beyond its limit is killed, and all are freed";
    fork::shared: "fork_with_shared_device_pages",
        "fork with none, half and all on the device; parent and child write";
    fork::child_migrates: "fork_then_the_child_migrates",
        "a shared page moves once for both processes";
    fork::while_migrating: "fork_while_migrating",
        "children made in the middle of migrations";
    fork::parent_exits_first: "fork_and_the_parent_exits_first",
        "device pages outlive who put them there, with his child and grandchild";
    fork::exec: "fork_and_exec",
        "vfork, fork and exec leave device pages to the parent";
    mlock::locked: "mlocked_pages_migrate",
        "locked pages migrate both ways and stay counted as locked";
    mlock::lock_on_device: "mlock_of_device_pages",
        "mlock brings pages home, MLOCK_ONFAULT locks them when they come";
    mlock::unlock_on_device: "munlock_of_device_pages",
        "locked device pages are unlocked, thrown away and unmapped";
    mlock::huge_pages: "mlocked_huge_pages",
        "huge pages are locked and unlocked as one, on the device and at home";
    mlock::after_active: "mlocked_pages_in_used_frames",
        "frames keep nothing of what the kernel thought of their last page";
    mlock::lock_all: "mlockall_with_holes",
        "holes of locked memory are filled, and locked when they come home";
    lazyfree::on_device: "madv_free_of_device_pages",
        "MADV_FREE leaves device pages as they are";
    lazyfree::migrates: "madv_free_then_migrate",
        "pages after MADV_FREE hold old bytes or zeros, and what was written later counts";
    advice::reclaim: "madv_cold_and_pageout",
        "MADV_COLD, MADV_PAGEOUT and MADV_WILLNEED leave device pages where they are";
    advice::populate: "madv_populate",
        "MADV_POPULATE_READ and _WRITE bring device pages home";
    advice::discard: "madv_dontneed",
        "MADV_DONTNEED frees device pages";
    advice::guard: "madv_guard",
        "guard pages replace device pages and are not filled";
    advice::collapse: "madv_collapse",
        "MADV_COLLAPSE brings device pages home into a huge page, which travels as one";
    uffd_missing::holes: "userfaultfd_missing",
        "holes that userfaultfd watches are not filled, and device pages are not missing";
    uffd_missing::moving: "userfaultfd_move",
        "UFFDIO_MOVE does not take device pages";
    uffd_missing::minor: "userfaultfd_minor",
        "anonymous memory has no minor faults, on the device neither";
    uffd_write_protect::survives: "userfaultfd_write_protect",
        "protected pages stay protected on the device and back";
    uffd_write_protect::on_device: "userfaultfd_write_protect_on_device",
        "device pages are protected and unprotected where they are";
    uffd_write_protect::holes: "userfaultfd_write_protected_holes",
        "protected holes are not filled";
    uffd_access_protect::run: "userfaultfd_access_protect",
        "pages protected from any access stay so on the device and back";
    pagemap_entries::entries: "pagemap_shows_swap_entries",
        "device pages look like swap in pagemap, writable and read-only ones of two types";
    pagemap_entries::huge: "pagemap_shows_huge_device_pages",
        "so does each part of a huge page";
    pagemap_entries::unprivileged: "pagemap_hides_device_frames",
        "who is not root does not see where they are";
    pagemap_entries::scanned: "pagemap_scan_finds_device_pages",
        "PAGEMAP_SCAN counts them as swapped";
    pagemap_entries::resident: "smaps_counts_device_pages",
        "smaps counts them as resident";
    huge::write_protected: "userfaultfd_write_protect_huge",
        "huge pages are protected in RAM, and unprotected in part on the device";
    huge::soft_dirty: "soft_dirty_huge",
        "the soft-dirty bit of a huge page survives both ways, and clear_refs on the device";
    huge::advice: "madv_of_huge_device_pages",
        "advice leaves huge device pages as they are, MADV_DONTNEED takes parts of them";
    soft_dirty::cleared: "soft_dirty_cleared_on_the_device",
        "clear_refs clears the bit of device pages, and loses the next write to writable ones";
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
    private_file::run: "private_file_mappings",
        "written pages of a private file mapping migrate, the file's own and holes stay";
    refused::shared_anonymous: "shared_anonymous_memory_is_refused",
        "anonymous memory shared with a child stays, and the reason is said";
    refused::shared_file: "shared_file_mapping_is_refused",
        "a file mapped as shared stays, and the file has what was written";
    refused::sysv: "sysv_shared_memory_is_refused",
        "a System V segment stays";
    refused::hugetlb: "hugetlb_is_refused",
        "pages of the hugetlb pool stay";
    refused::secret: "secret_memory_is_refused",
        "memory that the kernel cannot see (memfd_secret) stays";
    refused::special: "special_mappings_are_refused",
        "vDSO and vvar stay, the vsyscall page is no address of the process";
    protection::run: "protected_memory",
        "pages and holes that may not be read or written migrate, and stay forbidden";
    guard_pages::run: "guard_pages_stay",
        "guard pages take device pages away, stay, and are holes when removed";
    futex::run: "futex_in_device_pages",
        "waiting, waking, FUTEX_WAKE_OP and PI locks with words in device pages";
    system_calls::buffers: "system_calls_with_device_buffers",
        "no EFAULT and no short transfer because a buffer of a system call is on the device";
    system_calls::arguments: "system_calls_with_device_arguments",
        "paths, structures and arrays of system calls in device pages";
    signal_stack::run: "signal_frames_on_a_device_stack",
        "signals are handled on a stack on the device, which migrates under the handler";
    atomics::run: "atomic_instructions_on_device_pages",
        "no addition of several threads is lost while the pages migrate";
    own_memory::run: "a_process_runs_on_device_memory",
        "program, data, heap and stack of a process migrate while it runs";
    exec::run: "exec_from_device_memory",
        "execve takes its arguments from device pages, and frees those of the old program";
    remap::dont_unmap: "mremap_dontunmap",
        "device pages move to another address, the old one is empty and can be used";
    remap::sizes: "mremap_shorter_and_longer",
        "device pages that are cut off are freed, the others stay where they are";
    numa::policies: "pages_come_home_to_the_node_of_their_policy",
        "mbind and set_mempolicy hold for pages that come home, by fault and by request";
    numa::moving: "moving_between_nodes_leaves_device_pages",
        "move_pages, mbind and migrate_pages move pages of RAM and pass over device pages";
    numa_balancing::run: "numa_balancing_and_migration",
        "pages that NUMA balancing made inaccessible migrate and come back";
    memory_hotplug::run: "memory_goes_offline_while_it_migrates",
        "a block of memory goes offline and comes back under migrating pages";
    cpu_hotplug::run: "cpus_go_offline_during_migration",
        "faults and migrations go on while their CPUs go and come back";
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
