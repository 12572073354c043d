//! Signal frames on a stack that is on the device.
//!
//! The kernel writes the frame with page faults off at first, and reads it when the
//! handler returns.

use std::hint;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use virtio_hmm_client::{Direction, Residency};

use crate::context::Context;
use crate::failure::Failure;
use crate::region::Region;
use crate::require;
use crate::shared::install;

/// Pages of the stack. The frame and the handler need the last few.
const PAGES: usize = 32;
const USED: usize = 8;

const ROUNDS: u64 = 200;

/// Signals handled, where the handler's stack was, and whether it waits to return.
static HANDLED: AtomicU64 = AtomicU64::new(0);
static PLACE: AtomicUsize = AtomicUsize::new(0);
static WAIT: AtomicBool = AtomicBool::new(false);
static INSIDE: AtomicBool = AtomicBool::new(false);

extern "C" fn handle(_: libc::c_int) {
    let local = 0u8;
    PLACE.store(&raw const local as usize, Ordering::SeqCst);
    HANDLED.fetch_add(1, Ordering::SeqCst);
    INSIDE.store(true, Ordering::SeqCst);
    while WAIT.load(Ordering::SeqCst) {
        hint::spin_loop();
    }
    INSIDE.store(false, Ordering::SeqCst);
}

/// A stack for signals of this thread, given back when dropped.
struct SignalStack;

impl SignalStack {
    fn set(region: &Region) -> Result<Self, Failure> {
        let stack = libc::stack_t {
            ss_sp: region.all().start as *mut _,
            ss_flags: 0,
            ss_size: region.all().len(),
        };
        // SAFETY: the memory is mapped, and the region outlives what is returned.
        if unsafe { libc::sigaltstack(&raw const stack, ptr::null_mut()) } != 0 {
            return Err(Failure::system("sigaltstack"));
        }
        Ok(Self)
    }
}

impl Drop for SignalStack {
    fn drop(&mut self) {
        let none = libc::stack_t {
            ss_sp: ptr::null_mut(),
            ss_flags: libc::SS_DISABLE,
            ss_size: 0,
        };
        // SAFETY: the stack is not in use outside of a handler.
        unsafe { libc::sigaltstack(&raw const none, ptr::null_mut()) };
    }
}

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    install(
        libc::SIGUSR2,
        handle as *const () as usize,
        libc::SA_ONSTACK,
    )?;
    // The thread's own stack stays what it is; it has none for signals.
    thread::scope(|scope| {
        scope
            .spawn(|| on_this_thread(context))
            .join()
            .map_err(|_| Failure::Broken("a thread panicked".into()))?
    })
}

fn on_this_thread(context: &Context) -> Result<(), Failure> {
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    let _stack = SignalStack::set(&region)?;
    HANDLED.store(0, Ordering::SeqCst);
    for round in 1..=ROUNDS {
        context.settle(region.all(), Direction::ToDevice, 0)?;
        raise()?;
        require!(HANDLED.load(Ordering::SeqCst) == round, "a signal was lost");
        let place = PLACE.load(Ordering::SeqCst);
        require!(
            region.all().contains(&place),
            "the handler ran on another stack"
        );
    }
    // Only the frame came home.
    context.expect(&region, 0..PAGES - USED, |_| Residency::Device)?;
    context.expect(&region, PAGES - 1..PAGES, |_| Residency::Ram)?;
    context.check(&region, 0..PAGES - USED, |_| 1)?;

    while_handling(context, &region)?;
    context.check(&region, 0..PAGES - USED, |_| 1)
}

/// The frame goes to the device while the handler runs on it, and is read from there.
fn while_handling(context: &Context, region: &Region) -> Result<(), Failure> {
    for _ in 0..ROUNDS / 10 {
        WAIT.store(true, Ordering::SeqCst);
        thread::scope(|scope| {
            let migrator = scope.spawn(|| {
                while !INSIDE.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
                let mut moved = 0;
                // The handler may touch its stack, which fetches a page again.
                for _ in 0..10 {
                    moved += context.migrate(region.all(), Direction::ToDevice)?.moved;
                }
                Ok::<_, Failure>(moved)
            });
            let releaser = scope.spawn(move || {
                let moved = migrator.join();
                WAIT.store(false, Ordering::SeqCst);
                moved
            });
            let before = HANDLED.load(Ordering::SeqCst);
            raise()?;
            let moved = releaser
                .join()
                .and_then(|moved| moved)
                .map_err(|_| Failure::Broken("a thread panicked".into()))??;
            require!(
                moved > 0 && HANDLED.load(Ordering::SeqCst) == before + 1,
                "{moved} pages moved under a handler"
            );
            Ok::<_, Failure>(())
        })?;
    }
    Ok(())
}

/// Signal this thread, which handles it before the call returns. What the thread's
/// vector registers hold goes through the frame.
fn raise() -> Result<(), Failure> {
    let values: [f64; 8] = std::array::from_fn(|index| index as f64 + 0.5);
    let values = hint::black_box(values);
    // SAFETY: the handler only uses statics.
    if unsafe { libc::raise(libc::SIGUSR2) } != 0 {
        return Err(Failure::system("raise"));
    }
    let sum: f64 = hint::black_box(values).iter().sum();
    require!(sum == 32.0, "registers changed: {sum}");
    Ok(())
}
