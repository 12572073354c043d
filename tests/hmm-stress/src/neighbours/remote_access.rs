//! One process reads and writes the memory of another, whose pages are on the device.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use super::counted::counted;
use crate::context::Context;
use crate::failure::Failure;
use crate::pattern::WORDS;
use crate::process::{self, Child, pipe};
use crate::region::Region;
use crate::require;

const PAGES: usize = 48;

/// A child whose pages are on the device.
struct Target {
    child: Child,
    region: Region,
    ready: File,
    go: File,
}

fn told(source: io::Error) -> Failure {
    Failure::System {
        call: "a pipe between two processes",
        source,
    }
}

impl Target {
    /// The child fills a region with generation 1 and migrates it. Each time it is told
    /// to, it requires the next generation and migrates again.
    fn new(context: &Context) -> Result<Self, Failure> {
        let region = context.region(PAGES, 0)?;
        let (mut ready, told_ready) = pipe()?;
        let (told_go, go) = pipe()?;
        let here = &region;
        let child = process::fork(context, move |context| {
            let (mut told_ready, mut told_go) = (told_ready, told_go);
            here.fill_all(1);
            for generation in 2.. {
                context.settle(here.all(), Direction::ToDevice, 0)?;
                context.expect(here, 0..PAGES, |_| Residency::Device)?;
                told_ready.write_all(&[0]).map_err(told)?;
                let mut end = [0];
                told_go.read_exact(&mut end).map_err(told)?;
                context.check(here, 0..PAGES, |_| generation)?;
                if end == [1] {
                    break;
                }
            }
            Ok(())
        })?;
        ready.read_exact(&mut [0]).map_err(told)?;
        Ok(Self {
            child,
            region,
            ready,
            go,
        })
    }

    /// Have the child look at what it holds and migrate again.
    fn again(mut self) -> Result<Self, Failure> {
        drain()?;
        self.go.write_all(&[0]).map_err(told)?;
        if self.ready.read_exact(&mut [0]).is_err() {
            self.child.wait()?;
            return Err(Failure::Broken("the other process has ended".into()));
        }
        Ok(self)
    }

    /// Have the child look at what it holds and end.
    fn end(mut self) -> Result<(), Failure> {
        self.go.write_all(&[1]).map_err(told)?;
        self.child.wait()
    }

    /// The bytes that all pages hold in `generation`.
    fn bytes(&self, generation: u64) -> Vec<u8> {
        (0..PAGES)
            .flat_map(|page| self.region.pattern(page, generation).bytes())
            .collect()
    }

    /// Where the pages are in either process: the child has the region at the same place.
    fn slice(&self) -> libc::iovec {
        slice(&self.region)
    }
}

/// Have all CPUs give up pages that they keep to move them to another LRU list.
///
/// An access through /proc/PID/mem marks a page as accessed, which puts it into such a
/// batch with a reference. migrate_device_unmap() does not drain those of other CPUs for a
/// page that is on an LRU list already, so it would stay busy until the batch is full.
fn drain() -> Result<(), Failure> {
    fs::write("/proc/sys/vm/drop_caches", "1").map_err(|source| Failure::System {
        call: "dropping caches",
        source,
    })
}

fn slice(region: &Region) -> libc::iovec {
    libc::iovec {
        iov_base: region.all().start as *mut _,
        iov_len: region.all().len(),
    }
}

/// process_vm_readv and process_vm_writev, with pages on the device on either side.
pub(super) fn process_vm(context: &Context) -> Result<(), Failure> {
    let target = Target::new(context)?;
    // The same patterns as in the child.
    let local = context.region(PAGES, 0)?;
    local.fill_all(9);
    context.settle(local.all(), Direction::ToDevice, 0)?;

    let call = |name: &'static str,
                call: unsafe extern "C" fn(
        libc::pid_t,
        *const libc::iovec,
        libc::c_ulong,
        *const libc::iovec,
        libc::c_ulong,
        libc::c_ulong,
    ) -> isize,
                target: &Target| {
        let (here, there) = (slice(&local), target.slice());
        // SAFETY: both slices are mapped in their processes, and the local one is only
        // seen as atomics.
        let length = unsafe {
            call(
                target.child.pid(),
                &raw const here,
                1,
                &raw const there,
                1,
                0,
            )
        };
        if length < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS) {
            return Err(Failure::Skip(format!("there is no {name}")));
        }
        if usize::try_from(length) != Ok(PAGES * PAGE_SIZE) {
            return Err(Failure::Broken(format!(
                "{name} gave {length}: {}",
                io::Error::last_os_error()
            )));
        }
        Ok(())
    };
    // All pages of both come home, once each.
    let both = [("pages_faulted", 2 * PAGES), ("cpu_faults_oom", 0)];
    counted(context, &both, || {
        call("process_vm_readv", libc::process_vm_readv, &target)
    })?;
    context.expect(&local, 0..PAGES, |_| Residency::Ram)?;
    context.check(&local, 0..PAGES, |_| 1)?;

    local.fill_all(2);
    call("process_vm_writev", libc::process_vm_writev, &target)?;
    let target = target.again()?;
    local.fill_all(3);
    context.settle(local.all(), Direction::ToDevice, 0)?;
    counted(context, &both, || {
        call("process_vm_writev", libc::process_vm_writev, &target)
    })?;
    target.end()
}

/// Reading and writing /proc/PID/mem.
pub(super) fn proc_mem(context: &Context) -> Result<(), Failure> {
    let target = Target::new(context)?;
    let io = |source| Failure::System {
        call: "using /proc/PID/mem",
        source,
    };
    let memory = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{}/mem", target.child.pid()))
        .map_err(io)?;
    let place = target.region.all().start as u64;
    let home = [("pages_faulted", PAGES)];
    let mut bytes = vec![0; PAGES * PAGE_SIZE];
    counted(context, &home, || {
        memory.read_exact_at(&mut bytes, place).map_err(io)
    })?;
    require!(bytes == target.bytes(1), "/proc/PID/mem shows other bytes");
    memory.write_all_at(&target.bytes(2), place).map_err(io)?;
    let target = target.again()?;
    counted(context, &home, || {
        memory.write_all_at(&target.bytes(3), place).map_err(io)
    })?;
    target.end()
}

/// PTRACE_PEEKDATA and PTRACE_POKEDATA.
pub(super) fn ptrace(context: &Context) -> Result<(), Failure> {
    let target = Target::new(context)?;
    let pid = target.child.pid();
    let request = |name: &'static str, request, address: usize, data: usize| {
        // SAFETY: the tracee is a child of this process; addresses lie in its region, or
        // are not looked at.
        unsafe {
            *libc::__errno_location() = 0;
            let result = libc::ptrace(request, pid, address, data);
            if result == -1 && *libc::__errno_location() != 0 {
                return Err(Failure::system(name));
            }
            Ok(result)
        }
    };
    request("PTRACE_ATTACH", libc::PTRACE_ATTACH, 0, 0)?;
    target.child.wait_stopped()?;
    let address = |page: usize, word: usize| target.region.range(page..page).start + 8 * word;
    let words = |page, generation| target.region.pattern(page, generation).words().enumerate();
    counted(context, &[("pages_faulted", PAGES)], || {
        for page in 0..PAGES {
            for (word, expected) in words(page, 1).step_by(WORDS / 8) {
                let seen = request(
                    "PTRACE_PEEKDATA",
                    libc::PTRACE_PEEKDATA,
                    address(page, word),
                    0,
                )?;
                require!(
                    seen.cast_unsigned() == expected,
                    "word {word} of page {page} is {seen:#x}, not {expected:#x}"
                );
            }
        }
        Ok(())
    })?;
    for page in 0..PAGES {
        for (word, value) in words(page, 2) {
            let value = usize::try_from(value).unwrap_or(0);
            request(
                "PTRACE_POKEDATA",
                libc::PTRACE_POKEDATA,
                address(page, word),
                value,
            )?;
        }
    }
    request("PTRACE_DETACH", libc::PTRACE_DETACH, 0, 0)?;
    // Nothing of it came to the memory of this process.
    require!(
        target.region.words(0)[0].load(Ordering::Relaxed) == 0,
        "poking into another process changed this one"
    );
    target.end()
}
