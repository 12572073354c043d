//! Device memory and who uses it, `memory.c` and `context.c`. What is taken is given back when it
//! is dropped.

use std::{cell::Cell, ptr::NonNull};

use crate::some;

/// Frames of a block, which is what a large folio has.
pub const BLOCK_FRAMES: usize = 512;

mod ffi {
    use std::ffi::{c_long, c_uint, c_void};

    use super::Block;

    /// `struct vhmm_device` and others, which only the driver looks into.
    pub type Opaque = c_void;

    // An unsigned long is a usize wherever Linux runs.
    unsafe extern "C" {
        pub fn test_device_new(blocks: usize) -> *mut Opaque;
        pub fn test_all_returned() -> bool;
        pub fn test_module_users() -> c_long;
        pub fn test_context_limit(ctx: *mut Opaque, limit: usize);
        pub fn test_page_is_new(dev: *mut Opaque, page: *const Opaque, order: c_uint) -> bool;
        pub fn test_page_put(dev: *mut Opaque, page: *mut Opaque);
        pub fn test_page_frame(dev: *const Opaque, page: *const Opaque) -> usize;
        pub fn test_block(dev: *const Opaque, block: usize, to: *mut Block);
        pub fn test_reserved(dev: *const Opaque) -> usize;

        pub fn vhmm_device_put(dev: *mut Opaque);
        pub fn vhmm_memory_exit(dev: *mut Opaque);
        pub fn vhmm_memory_close(dev: *mut Opaque);
        pub fn vhmm_memory_open(dev: *mut Opaque);
        pub fn vhmm_memory_lost(dev: *mut Opaque);
        pub fn vhmm_memory_used(dev: *mut Opaque) -> usize;
        pub fn vhmm_frames_alloc(a: *mut Opaque, pages: *mut *mut Opaque, nr: c_uint) -> c_uint;
        pub fn vhmm_large_alloc(a: *mut Opaque) -> *mut Opaque;
        pub fn vhmm_context_alloc(dev: *mut Opaque, mm: *mut Opaque) -> *mut Opaque;
        pub fn vhmm_context_put(ctx: *mut Opaque);
        pub fn vhmm_allocation_begin(ctx: *mut Opaque, start: usize, end: usize) -> *mut Opaque;
        pub fn vhmm_allocation_end(a: *mut Opaque);
        pub fn vhmm_allocation_reserve(a: *mut Opaque, nr: usize) -> bool;
    }
}

/// What the driver notes of a block.
#[repr(C)]
#[derive(Clone, Debug)]
pub struct Block {
    /// How many of its frames are in use.
    pub in_use: u32,
    /// None is.
    pub whole: bool,
    /// Some are, and some are not.
    pub partial: bool,
    /// Which ones are.
    pub used: [bool; BLOCK_FRAMES],
}

/// The memory of a device.
#[derive(Debug)]
pub struct Memory {
    device: NonNull<ffi::Opaque>,
    blocks: usize,
    gone: Cell<bool>,
}

impl Memory {
    /// Makes memory of so many blocks.
    ///
    /// # Panics
    ///
    /// There is not so much memory.
    #[must_use]
    pub fn new(blocks: usize) -> Self {
        // SAFETY: it has no precondition.
        let device = unsafe { ffi::test_device_new(blocks) };
        Self {
            device: some(device),
            blocks,
            gone: Cell::new(false),
        }
    }

    /// Opens the device, for at most so many frames.
    ///
    /// # Panics
    ///
    /// The memory is gone.
    #[must_use]
    pub fn context(&self, limit: usize) -> Context<'_> {
        let device = self.usable();
        // SAFETY: the device is alive; what an mm is used for is left out in kernel.h.
        let context = some(unsafe { ffi::vhmm_context_alloc(device, std::ptr::null_mut()) });
        let context = Context {
            context,
            memory: self,
        };
        context.limit(limit);
        context
    }

    /// Gives out no more frames.
    pub fn close(&self) {
        // SAFETY: the device is alive.
        unsafe { ffi::vhmm_memory_close(self.device.as_ptr()) }
    }

    /// Gives out frames again.
    pub fn open(&self) {
        // SAFETY: the device is alive.
        unsafe { ffi::vhmm_memory_open(self.usable()) }
    }

    /// Tells the driver that the contents are gone.
    pub fn lost(&self) {
        // SAFETY: the device is alive.
        unsafe { ffi::vhmm_memory_lost(self.usable()) }
    }

    /// Unbinds the device, whose contents are gone: the memory goes when the last frame does.
    pub fn exit(&self) {
        // SAFETY: the device is alive. Nobody uses the memory afterwards but who frees frames:
        // see usable().
        unsafe { ffi::vhmm_memory_exit(self.usable()) };
        self.gone.set(true);
    }

    /// Tells whether the module has to stay.
    #[must_use]
    pub fn pins_module() -> bool {
        // SAFETY: it has no precondition.
        unsafe { ffi::test_module_users() != 0 }
    }

    /// The number of frames in use.
    #[must_use]
    pub fn used(&self) -> usize {
        // SAFETY: the device is alive.
        unsafe { ffi::vhmm_memory_used(self.device.as_ptr()) }
    }

    /// The number of frames that are promised and not taken.
    #[must_use]
    pub fn reserved(&self) -> usize {
        // SAFETY: the device is alive.
        unsafe { ffi::test_reserved(self.device.as_ptr()) }
    }

    /// What the driver notes of a block.
    ///
    /// # Panics
    ///
    /// There is no such block.
    #[must_use]
    pub fn block(&self, block: usize) -> Block {
        assert!(block < self.blocks);
        let mut to = Block {
            in_use: 0,
            whole: false,
            partial: false,
            used: [false; BLOCK_FRAMES],
        };
        // SAFETY: the memory is alive and has this block; `to` has the layout of what is written.
        unsafe { ffi::test_block(self.usable(), block, &raw mut to) };
        to
    }

    /// The device, while it has its memory.
    fn usable(&self) -> *mut ffi::Opaque {
        assert!(!self.gone.get(), "the memory is gone");
        self.device.as_ptr()
    }

    /// Tells whether all that this thread had of the driver, since it made its last memory, was
    /// given back.
    #[must_use]
    pub fn all_returned() -> bool {
        // SAFETY: it has no precondition.
        unsafe { ffi::test_all_returned() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let device = self.device.as_ptr();
        // SAFETY: what borrows the memory has been dropped, so no frame is in use; the device is
        // ours until it is put.
        unsafe {
            if !self.gone.get() {
                ffi::vhmm_memory_exit(device);
            }
            ffi::vhmm_device_put(device);
        }
    }
}

/// An open file.
#[derive(Debug)]
pub struct Context<'m> {
    context: NonNull<ffi::Opaque>,
    memory: &'m Memory,
}

impl<'m> Context<'m> {
    /// Limits the frames that it can have.
    pub fn limit(&self, limit: usize) {
        // SAFETY: the context is alive.
        unsafe { ffi::test_context_limit(self.context.as_ptr(), limit) }
    }

    /// Begins an allocation.
    #[must_use]
    pub fn begin(&self) -> Allocation<'m> {
        // SAFETY: the context is alive, and stays so for the allocation; the driver keeps the
        // addresses as a hint only.
        let allocation = unsafe { ffi::vhmm_allocation_begin(self.context.as_ptr(), 0, 0) };
        Allocation {
            allocation: some(allocation),
            memory: self.memory,
        }
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        // SAFETY: it is alive and not ours any more.
        unsafe { ffi::vhmm_context_put(self.context.as_ptr()) }
    }
}

/// An allocation that can get frames.
#[derive(Debug)]
pub struct Allocation<'m> {
    allocation: NonNull<ffi::Opaque>,
    memory: &'m Memory,
}

impl<'m> Allocation<'m> {
    /// Keeps frames from others; true if there are so many.
    pub fn reserve(&self, nr: usize) -> bool {
        // SAFETY: the allocation is alive.
        unsafe { ffi::vhmm_allocation_reserve(self.allocation.as_ptr(), nr) }
    }

    /// Allocates up to so many frames.
    ///
    /// # Panics
    ///
    /// The memory is gone.
    #[must_use]
    pub fn frames(&self, nr: u32) -> Vec<Folio<'m>> {
        self.memory.usable();
        // With one to spare, by which it shows if it takes too many.
        let mut pages = vec![std::ptr::null_mut(); nr as usize + 1];
        // SAFETY: the allocation is alive, and `pages` has room for `nr`.
        let found =
            unsafe { ffi::vhmm_frames_alloc(self.allocation.as_ptr(), pages.as_mut_ptr(), nr) };
        pages.truncate(found as usize);
        let folio = |page| Folio {
            page: some(page),
            memory: self.memory,
        };
        pages.into_iter().map(folio).collect()
    }

    /// Allocates a large folio.
    ///
    /// # Panics
    ///
    /// The memory is gone.
    #[must_use]
    pub fn large(&self) -> Option<Folio<'m>> {
        self.memory.usable();
        // SAFETY: the allocation is alive.
        let page = unsafe { ffi::vhmm_large_alloc(self.allocation.as_ptr()) };
        let memory = self.memory;
        NonNull::new(page).map(|page| Folio { page, memory })
    }
}

impl Drop for Allocation<'_> {
    fn drop(&mut self) {
        // SAFETY: it is alive and not ours any more.
        unsafe { ffi::vhmm_allocation_end(self.allocation.as_ptr()) }
    }
}

/// Frames that are in use, one or a whole block.
#[derive(Debug)]
pub struct Folio<'m> {
    page: NonNull<ffi::Opaque>,
    memory: &'m Memory,
}

impl Folio<'_> {
    /// The number of the first frame.
    #[must_use]
    pub fn frame(&self) -> usize {
        // SAFETY: the device is alive; a page is only computed with.
        unsafe { ffi::test_page_frame(self.memory.device.as_ptr(), self.page.as_ptr()) }
    }

    /// Tells whether the page is as one that was just given out: with one reference, knowing its
    /// size and its memory, and nothing of whose it was before.
    ///
    /// # Panics
    ///
    /// The frame is not in the memory.
    #[must_use]
    pub fn is_new(&self, frames: usize) -> bool {
        assert!(self.frame() < self.memory.blocks * BLOCK_FRAMES);
        // SAFETY: the device is alive and has this page.
        unsafe {
            ffi::test_page_is_new(
                self.memory.device.as_ptr(),
                self.page.as_ptr(),
                frames.ilog2(),
            )
        }
    }
}

impl Drop for Folio<'_> {
    fn drop(&mut self) {
        // SAFETY: the device is alive, and its memory too while this page is in use.
        unsafe { ffi::test_page_put(self.memory.device.as_ptr(), self.page.as_ptr()) }
    }
}
