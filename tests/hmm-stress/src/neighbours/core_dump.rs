//! The core dump of a process whose pages are on the device.
//!
//! get_dump_page() brings each page home to write it. Memory with MADV_DONTDUMP is left
//! out, and its pages go away with the process where they are.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

use virtio_hmm_client::{Direction, PAGE_SIZE, Residency};

use super::counted::counted;
use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::Region;
use crate::require;

const PATTERN: &str = "/proc/sys/kernel/core_pattern";

/// The kernel appends nothing to a name with a %.
const TEMPLATE: &str = "/tmp/hmm-stress-core.%p";

const PAGES: usize = 160;

/// Pages that are left out, and pages that were never touched.
const LEFT_OUT: Range<usize> = 64..96;
const HOLES: Range<usize> = 120..140;

fn generation(page: usize) -> u64 {
    u64::from(!HOLES.contains(&page))
}

/// Puts the name of core dumps back.
struct CorePattern {
    before: String,
}

impl CorePattern {
    fn set() -> Result<Self, Failure> {
        let before = match fs::read_to_string(PATTERN) {
            Ok(before) => before,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Failure::Skip("the kernel dumps no cores".into()));
            }
            Err(source) => {
                return Err(Failure::System {
                    call: "reading core_pattern",
                    source,
                });
            }
        };
        fs::write(PATTERN, TEMPLATE).map_err(|source| Failure::System {
            call: "writing core_pattern",
            source,
        })?;
        Ok(Self { before })
    }
}

impl Drop for CorePattern {
    fn drop(&mut self) {
        // Nobody is left to tell of a failure.
        let _ = fs::write(PATTERN, &self.before);
    }
}

pub(super) fn run(context: &Context) -> Result<(), Failure> {
    let _pattern = CorePattern::set()?;
    let region = context.region(PAGES, 0)?;
    region.leave_out_of_dumps(LEFT_OUT)?;
    let dumped = PAGES - LEFT_OUT.len();
    let (pid, dumps) = counted(context, &[("pages_faulted", dumped)], || {
        let child = process::fork(context, |context| {
            for page in (0..PAGES).filter(|&page| generation(page) == 1) {
                region.fill(page, 1);
            }
            context.settle(region.all(), Direction::ToDevice, 0)?;
            context.expect(&region, 0..PAGES, |_| Residency::Device)?;
            abort()
        })?;
        let pid = child.pid();
        Ok((pid, child.wait_signal(libc::SIGABRT)?))
    })?;
    require!(dumps, "a child that aborted left no core dump");
    let path = PathBuf::from(TEMPLATE.replace("%p", &pid.to_string()));
    let core = fs::read(&path).map_err(|source| Failure::System {
        call: "reading a core dump",
        source,
    });
    // Whatever is wrong with it, it is not left in RAM.
    let _ = fs::remove_file(&path);
    compare(context, &Core(core?), &region)
}

/// End this process with a core dump.
fn abort() -> Result<(), Failure> {
    let all = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: the limit lives for the call; abort ends the process.
    unsafe {
        if libc::setrlimit(libc::RLIMIT_CORE, &raw const all) != 0 {
            return Err(Failure::system("setrlimit"));
        }
        libc::abort()
    }
}

fn compare(context: &Context, core: &Core, region: &Region) -> Result<(), Failure> {
    for page in 0..PAGES {
        let place = region.range(page..page).start;
        let seen = core.page(place);
        if LEFT_OUT.contains(&page) {
            require!(seen.is_none(), "page {page} is in the dump");
            continue;
        }
        let Some(seen) = seen else {
            return Err(Failure::Broken(format!("page {page} is not in the dump")));
        };
        let written = region.pattern(page, generation(page)).bytes();
        require!(
            seen.iter().copied().eq(written),
            "page {page} of the dump holds other bytes"
        );
    }
    // The dump was the child's: here the pages were never touched.
    context.expect(region, 0..PAGES, |_| Residency::None)
}

/// A core dump: an ELF file with a program header for each mapping.
struct Core(Vec<u8>);

impl Core {
    fn number<const N: usize>(&self, offset: usize) -> Option<usize> {
        let mut bytes = [0; 8];
        bytes[..N].copy_from_slice(self.0.get(offset..offset + N)?);
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    }

    /// What the dump has of the page at `address`.
    fn page(&self, address: usize) -> Option<&[u8]> {
        const LOAD: usize = 1;
        // e_phoff, e_phentsize, e_phnum of the 64-bit format.
        let (table, size, entries) = (
            self.number::<8>(32)?,
            self.number::<2>(54)?,
            self.number::<2>(56)?,
        );
        (0..entries).find_map(|entry| {
            // p_type, p_offset, p_vaddr, p_filesz.
            let header = table + entry * size;
            let offset = self.number::<8>(header + 8)?;
            let start = self.number::<8>(header + 16)?;
            let length = self.number::<8>(header + 32)?;
            let here = address.checked_sub(start)?;
            if self.number::<4>(header)? != LOAD || here + PAGE_SIZE > length {
                return None;
            }
            self.0.get(offset + here..offset + here + PAGE_SIZE)
        })
    }
}
