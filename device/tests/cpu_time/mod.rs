//! What the device's threads take of the CPUs.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// CPU time of this process without this thread, which is the VMM.
pub(crate) fn cpu_time() -> Duration {
    let of = |clock| Duration::from(clock_gettime(clock).unwrap());
    // Read one after the other, and not to the nanosecond.
    of(ClockId::CLOCK_PROCESS_CPUTIME_ID).saturating_sub(of(ClockId::CLOCK_THREAD_CPUTIME_ID))
}
