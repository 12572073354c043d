//! Pages that something holds, so that they cannot migrate.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};
use virtio_hmm_client::PAGE_SIZE;

use crate::failure::Failure;
use crate::process::pipe;
use crate::region::Region;

/// A page that a pipe refers to, as vmsplice leaves it.
#[derive(Debug)]
pub struct PipedPage {
    read: File,
}

impl PipedPage {
    /// Put `page` into a pipe without copying it.
    ///
    /// # Errors
    /// There is no pipe, or vmsplice fails.
    pub fn new(region: &Region, page: usize) -> Result<Self, Failure> {
        let (read, write) = pipe()?;
        let slice = libc::iovec {
            iov_base: region.words(page).as_ptr().cast_mut().cast(),
            iov_len: PAGE_SIZE,
        };
        // SAFETY: the slice is one mapped page, which the kernel only reads.
        let length = unsafe { libc::vmsplice(write.as_raw_fd(), &raw const slice, 1, 0) };
        if usize::try_from(length) != Ok(PAGE_SIZE) {
            return Err(Failure::system("vmsplice"));
        }
        Ok(Self { read })
    }

    /// Let go of the page, and return the words that the pipe held.
    ///
    /// # Errors
    /// The pipe cannot be read.
    pub fn release(mut self) -> Result<Vec<u64>, Failure> {
        let mut bytes = vec![0; PAGE_SIZE];
        self.read
            .read_exact(&mut bytes)
            .map_err(|source| Failure::System {
                call: "reading a pipe",
                source,
            })?;
        Ok(bytes
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
            .collect())
    }
}

/// A page pinned for DMA: a registered buffer of an io_uring.
pub struct PinnedPage<'a> {
    ring: IoUring,
    region: &'a Region,
    page: usize,
}

impl<'a> PinnedPage<'a> {
    /// Pin `page` for reading and writing.
    ///
    /// # Errors
    /// [`Failure::Skip`] where there is no io_uring; the registration fails.
    pub fn new(region: &'a Region, page: usize) -> Result<Self, Failure> {
        let ring = IoUring::new(1)
            .map_err(|error| Failure::Skip(format!("there is no io_uring: {error}")))?;
        let buffer = libc::iovec {
            iov_base: region.words(page).as_ptr().cast_mut().cast(),
            iov_len: PAGE_SIZE,
        };
        // SAFETY: the page stays mapped as long as `region`, which outlives the ring,
        // and its words are only seen as atomics.
        unsafe { ring.submitter().register_buffers(&[buffer]) }.map_err(|source| {
            Failure::System {
                call: "io_uring_register",
                source,
            }
        })?;
        Ok(Self { ring, region, page })
    }

    /// Have the kernel write `generation` to the page, through the pin.
    ///
    /// # Errors
    /// The read into the buffer fails or falls short.
    pub fn write(&mut self, generation: u64) -> Result<(), Failure> {
        let io = |source| Failure::System {
            call: "reading into a registered buffer",
            source,
        };
        let (read, mut write) = pipe()?;
        let pattern = self.region.pattern(self.page, generation);
        let bytes: Vec<u8> = pattern.words().flat_map(u64::to_le_bytes).collect();
        write.write_all(&bytes).map_err(io)?;
        let target = self.region.words(self.page).as_ptr().cast_mut().cast();
        // PAGE_SIZE fits into 32 bits.
        #[allow(clippy::cast_possible_truncation)]
        let entry =
            opcode::ReadFixed::new(types::Fd(read.as_raw_fd()), target, PAGE_SIZE as u32, 0)
                .build();
        // SAFETY: the buffer is the registered page and lives as long as the ring; the
        // pipe lives until the completion below.
        unsafe { self.ring.submission().push(&entry) }
            .map_err(|_| Failure::Broken("the submission queue is full".into()))?;
        self.ring.submit_and_wait(1).map_err(io)?;
        let result = self.ring.completion().next().map(|entry| entry.result());
        if result.and_then(|length| usize::try_from(length).ok()) != Some(PAGE_SIZE) {
            return Err(Failure::Broken(format!(
                "reading into a registered buffer gave {result:?}"
            )));
        }
        Ok(())
    }

    /// Undo the pin.
    ///
    /// # Errors
    /// The buffer cannot be given back.
    pub fn release(self) -> Result<(), Failure> {
        self.ring
            .submitter()
            .unregister_buffers()
            .map_err(|source| Failure::System {
                call: "io_uring_register",
                source,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::PageSize;

    #[test]
    fn a_pipe_sees_what_is_written_to_its_page() {
        let region = Region::new(2, PageSize::Small, 1).unwrap();
        region.fill_all(1);
        let held = PipedPage::new(&region, 1).unwrap();
        region.fill(1, 2);
        assert!(
            held.release()
                .unwrap()
                .into_iter()
                .eq(region.pattern(1, 2).words())
        );
    }

    #[test]
    fn a_pin_writes_to_its_page() {
        let region = Region::new(2, PageSize::Small, 1).unwrap();
        region.fill_all(1);
        let mut held = match PinnedPage::new(&region, 1) {
            Err(Failure::Skip(reason)) => {
                eprintln!("skipped: {reason}");
                return;
            }
            result => result.unwrap(),
        };
        held.write(2).unwrap();
        held.release().unwrap();
        region.check(0, 1).unwrap();
        region.check(1, 2).unwrap();
    }
}
