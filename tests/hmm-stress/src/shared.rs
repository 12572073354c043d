//! Counts that forked children share with their parent.

use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::failure::Failure;

/// What every word of a page that was lost holds after its SIGBUS.
pub const LOST: u64 = u64::from_ne_bytes(*b"was lost");

/// Counts of this process and of all its children.
#[derive(Debug, Default)]
pub struct Shared {
    /// Pages checked and calls made.
    pub operations: AtomicU64,
    /// Pages that did not hold what they should.
    pub mismatches: AtomicU64,
    /// SIGBUS signals received.
    pub sigbus: AtomicU64,
}

static SHARED: OnceLock<&'static Shared> = OnceLock::new();
static ALONE: Shared = Shared {
    operations: AtomicU64::new(0),
    mismatches: AtomicU64::new(0),
    sigbus: AtomicU64::new(0),
};

/// SIGBUS signals that this process has received.
static OWN_SIGNALS: AtomicU64 = AtomicU64::new(0);

/// How many SIGBUS signals this process has received, and its parents before they forked it.
#[must_use]
pub fn own_signals() -> u64 {
    OWN_SIGNALS.load(Ordering::Relaxed)
}

/// The counts. Before [`share`] they belong to this process alone.
#[must_use]
pub fn counts() -> &'static Shared {
    SHARED.get().copied().unwrap_or(&ALONE)
}

/// Put the counts into shared memory, and count SIGBUS from here on.
///
/// # Errors
/// No memory could be mapped, or the handler not be installed.
pub fn share() -> Result<(), Failure> {
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing.
    let memory = unsafe {
        libc::mmap(
            ptr::null_mut(),
            size_of::<Shared>(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if memory == libc::MAP_FAILED {
        return Err(Failure::system("mmap"));
    }
    // SAFETY: the mapping is page aligned, zeroed, large enough, never unmapped, and
    // every bit pattern is a valid `Shared`.
    let shared = unsafe { &*memory.cast::<Shared>() };
    SHARED.get_or_init(|| shared);
    install(
        libc::SIGBUS,
        on_sigbus as *const () as usize,
        libc::SA_SIGINFO,
    )
}

/// Have `handler` called for `signal`, without restarting interrupted calls.
pub(crate) fn install(
    signal: libc::c_int,
    handler: libc::sighandler_t,
    flags: libc::c_int,
) -> Result<(), Failure> {
    // SAFETY: an all-zero sigaction is valid, and both arguments live for the call.
    // The handlers of this crate only count and map memory.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        libc::sigaction(signal, &raw const action, ptr::null_mut())
    };
    if result != 0 {
        return Err(Failure::system("sigaction"));
    }
    Ok(())
}

/// Count the signal and put a page full of [`LOST`] where the lost one was, so that the
/// access goes on and the scenario can report. It is filled before it is put there: other
/// threads that look at the same page would take what they see for wrong.
extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    counts().sigbus.fetch_add(1, Ordering::Relaxed);
    OWN_SIGNALS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing; mmap is a
    // bare system call.
    let memory = unsafe {
        libc::mmap(
            ptr::null_mut(),
            virtio_hmm_client::PAGE_SIZE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if memory == libc::MAP_FAILED {
        // SAFETY: _exit may be called from a signal handler.
        unsafe { libc::_exit(1) }
    }
    let words = memory.cast::<u64>();
    for word in 0..virtio_hmm_client::PAGE_SIZE / size_of::<u64>() {
        // SAFETY: the page is new, and has that many words.
        unsafe { words.add(word).write_volatile(LOST) };
    }
    // SAFETY: the kernel passes a valid siginfo. The page at the address was lost, so
    // nothing that could still be read is replaced; mremap is a bare system call.
    let moved = unsafe {
        let page = (*info).si_addr() as usize & !(virtio_hmm_client::PAGE_SIZE - 1);
        libc::mremap(
            memory,
            virtio_hmm_client::PAGE_SIZE,
            virtio_hmm_client::PAGE_SIZE,
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
            page as *mut libc::c_void,
        )
    };
    if moved == libc::MAP_FAILED {
        // SAFETY: as above.
        unsafe { libc::_exit(1) }
    }
}
