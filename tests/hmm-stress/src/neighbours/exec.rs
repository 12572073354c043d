//! execve() with arguments in device pages.
//!
//! The kernel copies them to the new program's stack, then throws the old address space
//! away with all its device pages.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use crate::context::Context;
use crate::failure::Failure;
use crate::process::{self, pipe};
use crate::region::Region;
use crate::require;

/// Pages of the text, and of others that go away with the process.
const TEXT: usize = 3;
const PAGES: usize = 64;

/// Says that it runs, waits for a line, and prints its argument.
const SCRIPT: &str = r#"echo; read line; printf %s "$1""#;

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let free = context.free()?;
    let region = context.region(PAGES, 0)?;
    // A page is for the addresses of arguments; the text fills those before it.
    let text: String = ('a'..='w').cycle().take(TEXT * PAGE_SIZE - 1).collect();
    let (mut output, stdout) = pipe()?;
    let (stdin, mut input) = pipe()?;
    let child = process::fork(context, |context| {
        region.fill_all(1);
        let argument = write_text(&region, &text);
        context.settle(region.all(), Direction::ToDevice, 0)?;
        context.expect(&region, 0..PAGES, |_| Residency::Device)?;
        Err(exec(&region, argument, &stdin, &stdout))
    })?;
    drop((stdin, stdout));
    let io = |source| Failure::System {
        call: "a pipe to another program",
        source,
    };
    // The other program runs, so the pages of the old one are gone.
    if output.read_exact(&mut [0]).is_err() {
        return child.wait();
    }
    context.wait_free(free)?;
    input.write_all(b"\n").map_err(io)?;
    let mut seen = String::new();
    output.read_to_string(&mut seen).map_err(io)?;
    child.wait()?;
    require!(
        seen == text,
        "the argument arrived with {} bytes of {}, or with others",
        seen.len(),
        text.len()
    );
    Ok(())
}

/// Put the text at the start of the region.
fn write_text(region: &Region, text: &str) -> *const libc::c_char {
    let mut bytes = text.bytes().chain(Some(0));
    for word in (0..TEXT).flat_map(|page| region.words(page)) {
        let bytes = std::array::from_fn(|_| bytes.next().unwrap_or(0));
        word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
    }
    region.all().start as *const _
}

/// Become a shell, with its argument and the list of its arguments in the region. Returns
/// only the failure.
fn exec(region: &Region, argument: *const libc::c_char, stdin: &File, stdout: &File) -> Failure {
    let names = ["sh", "-c", SCRIPT, "sh"].map(|name| CString::new(name).unwrap_or_default());
    let arguments = names.iter().map(|name| name.as_ptr()).chain([argument]);
    let list = region.words(TEXT);
    for (place, argument) in list.iter().zip(arguments.chain([std::ptr::null()])) {
        place.store(argument as u64, Ordering::Relaxed);
    }
    // SAFETY: descriptors are open; the list and what it points at are mapped, and both
    // end in a zero.
    unsafe {
        libc::dup2(stdin.as_raw_fd(), 0);
        libc::dup2(stdout.as_raw_fd(), 1);
        libc::execv(c"/bin/sh".as_ptr(), list.as_ptr().cast());
    }
    Failure::System {
        call: "execv",
        source: io::Error::last_os_error(),
    }
}
