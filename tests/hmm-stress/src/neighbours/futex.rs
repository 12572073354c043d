//! Futexes in device pages: the kernel reads and changes the word by itself.

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use virtio_hmm_client::{Direction, Residency};

use super::counted::counted;
use crate::context::Context;
use crate::failure::Failure;
use crate::region::Region;
use crate::require;

/// How long a thread may take to wait, and to wake.
const PATIENCE: Duration = Duration::from_secs(20);

/// FUTEX_OP of the kernel's header: add 1, compare with equal 0.
const ADD_ONE: libc::c_int = 1 << 28 | 1 << 12;

/// The first word of `page`, as a futex.
fn word(region: &Region, page: usize) -> &AtomicU32 {
    // SAFETY: the word is half of an aligned one, lives as long, and is as atomic.
    unsafe { &*region.words(page).as_ptr().cast::<AtomicU32>() }
}

/// The call, with a number or a timeout as its fourth argument.
fn futex(
    word: &AtomicU32,
    operation: libc::c_int,
    value: u32,
    fourth: usize,
    second: *const AtomicU32,
    third: libc::c_int,
) -> io::Result<i64> {
    // SAFETY: the words live for the call and are atomics; so does the timeout.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word,
            operation,
            value,
            fourth,
            second,
            third,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn failed(source: io::Error) -> Failure {
    Failure::System {
        call: "futex",
        source,
    }
}

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let region = context.region(2, 0)?;
    for flag in [libc::FUTEX_PRIVATE_FLAG, 0] {
        wait_for_another_value(context, &region, flag)?;
        wake(context, &region, flag)?;
        change_and_wake(context, &region, flag)?;
        lock(context, &region, flag)?;
    }
    Ok(())
}

/// Set the words and bring both pages to the device.
fn prepare(context: &Context, region: &Region, values: [u32; 2]) -> Result<(), Failure> {
    for (page, value) in values.into_iter().enumerate() {
        word(region, page).store(value, Ordering::SeqCst);
    }
    context.settle(region.all(), Direction::ToDevice, 0)?;
    context.expect(region, 0..2, |_| Residency::Device)
}

/// The kernel reads the word, which brings it home, and sees that there is nothing to wait for.
fn wait_for_another_value(context: &Context, region: &Region, flag: i32) -> Result<(), Failure> {
    prepare(context, region, [7, 0])?;
    counted(context, &[("pages_faulted", 1)], || {
        let waited = futex(
            word(region, 0),
            libc::FUTEX_WAIT | flag,
            8,
            0,
            ptr::null(),
            0,
        );
        require!(
            waited
                .as_ref()
                .is_err_and(|error| error.raw_os_error() == Some(libc::EAGAIN)),
            "waiting for a word that has changed: {waited:?}"
        );
        Ok(())
    })?;
    context.expect(region, 0..2, |page| {
        [Residency::Ram, Residency::Device][page]
    })
}

/// A thread waits, the page moves to the device and back, and the thread can be woken.
fn wake(context: &Context, region: &Region, flag: i32) -> Result<(), Failure> {
    prepare(context, region, [1, 0])?;
    let timeout = libc::timespec {
        tv_sec: PATIENCE.as_secs().cast_signed(),
        tv_nsec: 0,
    };
    thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let timeout = (&raw const timeout) as usize;
            futex(
                word(region, 0),
                libc::FUTEX_WAIT | flag,
                1,
                timeout,
                ptr::null(),
                0,
            )
        });
        // It has read the word when the page is home.
        let end = Instant::now() + PATIENCE;
        while context.device.query(region.range(0..1))? != [Residency::Ram] && Instant::now() < end
        {
            thread::yield_now();
        }
        for direction in [
            Direction::ToDevice,
            Direction::ToSystem,
            Direction::ToDevice,
        ] {
            context.settle(region.all(), direction, 0)?;
        }
        // Waking needs the address and not the page.
        let mut woken = 0;
        while woken == 0 && Instant::now() < end {
            let call = futex(
                word(region, 0),
                libc::FUTEX_WAKE | flag,
                1,
                0,
                ptr::null(),
                0,
            );
            woken = call.map_err(failed)?;
            thread::yield_now();
        }
        let waited = waiter
            .join()
            .map_err(|_| Failure::Broken("a thread panicked".into()))?;
        require!(
            woken == 1 && waited.is_ok(),
            "{woken} threads were woken, which ended with {waited:?}"
        );
        require!(
            word(region, 0).load(Ordering::SeqCst) == 1,
            "the word changed"
        );
        Ok(())
    })
}

/// FUTEX_WAKE_OP changes the second word, in the kernel and with page faults off at first.
fn change_and_wake(context: &Context, region: &Region, flag: i32) -> Result<(), Failure> {
    prepare(context, region, [0, 41])?;
    // get_futex_key() takes a reference on both pages unless the futexes are private.
    let home = if flag == 0 { 2 } else { 1 };
    counted(context, &[("pages_faulted", home)], || {
        let operation = libc::FUTEX_WAKE_OP | flag;
        futex(word(region, 0), operation, 1, 1, word(region, 1), ADD_ONE).map_err(failed)
    })?;
    context.expect(region, 1..2, |_| Residency::Ram)?;
    let seen = word(region, 1).load(Ordering::SeqCst);
    require!(seen == 42, "FUTEX_WAKE_OP made {seen} of 41");
    Ok(())
}

/// FUTEX_LOCK_PI puts the thread's number into the word, and FUTEX_UNLOCK_PI removes it.
fn lock(context: &Context, region: &Region, flag: i32) -> Result<(), Failure> {
    // SAFETY: gettid always succeeds.
    let own = unsafe { libc::gettid() }.cast_unsigned();
    for (operation, before, after) in [
        (libc::FUTEX_LOCK_PI, 0, own),
        (libc::FUTEX_UNLOCK_PI, own, 0),
    ] {
        prepare(context, region, [before, 0])?;
        counted(context, &[("pages_faulted", 1)], || {
            futex(word(region, 0), operation | flag, 0, 0, ptr::null(), 0).map_err(failed)
        })?;
        context.expect(region, 0..1, |_| Residency::Ram)?;
        let seen = word(region, 0).load(Ordering::SeqCst);
        require!(seen == after, "a lock holds {seen} instead of {after}");
    }
    Ok(())
}
