//! The system calls that the daemon makes once it has started.
//!
//! There is one list for all threads: they share their memory, so that whoever
//! takes one over can have the others make the calls.

use std::collections::BTreeMap;

use clap::ValueEnum;
use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

/// What becomes of a system call that is not on the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// It is made; there is no list.
    None,
    /// It is made, and the kernel logs it.
    Log,
    /// It kills the process.
    Kill,
}

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The list is no filter.
    #[error("cannot make the filter of system calls")]
    Make(#[from] BackendError),
    /// The kernel refuses it.
    #[error("cannot filter system calls")]
    Apply(#[from] seccompiler::Error),
}

/// Allowed with any arguments.
const ALLOWED: &[c_long] = &[
    // Events of the VMM, the guest, the sockets, the timers and the stop.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    // Connections to the sockets that were made before, messages, log lines.
    libc::SYS_accept4,
    libc::SYS_close,
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_write,
    libc::SYS_writev,
    // The sockets are removed at the end. Landlock says in which directories.
    libc::SYS_unlink,
    // Device memory is given back, and allocated again; how much of it is used.
    libc::SYS_fallocate,
    libc::SYS_fstat,
    // Guest memory that a VMM sends: its size is looked at before it is mapped.
    libc::SYS_lseek,
    // The allocator.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Threads: they begin and end with each session.
    libc::SYS_exit,
    libc::SYS_futex,
    libc::SYS_gettid,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    // Time, where the kernel has no clock that can be read without a call.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_restart_syscall,
    // Seeds of hash tables.
    libc::SYS_getrandom,
    // The end, also by a signal or a panic.
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
];

/// An argument's number, a mask, and the value of the bits in the mask.
type Condition = (u8, u64, u64);

const ALL: u64 = u32::MAX as u64;
const THREAD: u64 = (libc::CLONE_VM | libc::CLONE_THREAD) as u64;

/// Allowed only under conditions, all of which must hold. A call that stands
/// here more than once is allowed if one line allows it.
const CONDITIONAL: &[(c_long, &[Condition])] = &[
    // Threads, but no processes.
    (libc::SYS_clone, &[(0, THREAD, THREAD)]),
    // Guest memory, stacks and the heap are never executable.
    (libc::SYS_mmap, &[(2, libc::PROT_EXEC as u64, 0)]),
    (libc::SYS_mprotect, &[(2, libc::PROT_EXEC as u64, 0)]),
    // Names of threads.
    (libc::SYS_prctl, &[(0, ALL, libc::PR_SET_NAME as u64)]),
    // Connections are made non-blocking.
    (libc::SYS_ioctl, &[(1, ALL, libc::FIONBIO)]),
    // The listening socket is duplicated for each session. A debug build asks
    // whether a descriptor is open before it closes it.
    (libc::SYS_fcntl, &[(1, ALL, libc::F_DUPFD_CLOEXEC as u64)]),
    (libc::SYS_fcntl, &[(1, ALL, libc::F_GETFD as u64)]),
    // How much device memory is used: asked about a descriptor, not about a path.
    (libc::SYS_newfstatat, &[(3, EMPTY_PATH, EMPTY_PATH)]),
    (libc::SYS_statx, &[(2, EMPTY_PATH, EMPTY_PATH)]),
];

/// Allowed besides where the workers have the processor count what they do: each
/// opens counters of itself, on any processor.
const COUNTING: &[(c_long, &[Condition])] = &[
    (libc::SYS_perf_event_open, &[(1, ALL, 0), (2, ALL, ALL)]),
    (libc::SYS_ioctl, &[(1, ALL, PERF_EVENT_IOC_ID)]),
];

/// Gets the number of a counter: _IOR('$', 7, __u64 *), see `linux/perf_event.h`.
const PERF_EVENT_IOC_ID: u64 = 0x8008_2407;

const EMPTY_PATH: u64 = libc::AT_EMPTY_PATH as u64;

/// Calls that libraries make and can do without. They fail as if the kernel did
/// not know them.
const REFUSED: &[c_long] = &[
    // The C library's allocator looks at a kernel setting when it shrinks a
    // heap; a panic's backtrace looks for debugging information.
    libc::SYS_getcwd,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_readlink,
    // Its arguments cannot be checked; clone() is taken instead.
    libc::SYS_clone3,
];

/// Filters the system calls of this thread and those that it starts later, which
/// have the processor count what they do if `counting`.
///
/// # Errors
/// If the kernel has no such filters.
pub fn filter(mode: Mode, counting: bool) -> Result<(), Error> {
    let mut rules = allowed(counting)?;
    match mode {
        Mode::None => {}
        Mode::Log => apply_filter(&program(rules, SeccompAction::Log, SeccompAction::Allow)?)?,
        Mode::Kill => {
            let refused = || REFUSED.iter().map(|call| (*call, Vec::new()));
            let errno = SeccompAction::Errno(libc::ENOSYS as u32);
            let refuse = program(refused().collect(), SeccompAction::Allow, errno)?;
            // Of two filters the stricter wins, so that these are refused.
            rules.extend(refused());
            let kill = program(rules, SeccompAction::KillProcess, SeccompAction::Allow)?;
            apply_filter(&refuse)?;
            apply_filter(&kill)?;
        }
    }
    Ok(())
}

fn program(
    rules: BTreeMap<c_long, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    action: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let filter = SeccompFilter::new(rules, otherwise, action, TargetArch::x86_64)?;
    filter.try_into()
}

fn allowed(counting: bool) -> Result<BTreeMap<c_long, Vec<SeccompRule>>, BackendError> {
    let mut rules: BTreeMap<_, Vec<_>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    let counting = if counting { COUNTING } else { &[] };
    // A panic that cannot unwind ends in abort().
    let own = std::process::id().into();
    let abort: &[Condition] = &[(0, ALL, own), (2, ALL, libc::SIGABRT as u64)];
    let abort = [(libc::SYS_tgkill, abort)];
    for (call, conditions) in CONDITIONAL.iter().chain(counting).chain(&abort) {
        let condition = |(argument, mask, value): &Condition| {
            let compare = SeccompCmpOp::MaskedEq(*mask);
            SeccompCondition::new(*argument, SeccompCmpArgLen::Qword, compare, *value)
        };
        let conditions = conditions.iter().map(condition).collect::<Result<_, _>>()?;
        rules
            .entry(*call)
            .or_default()
            .push(SeccompRule::new(conditions)?);
    }
    Ok(rules)
}
