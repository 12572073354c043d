//! Requests to the device, `request.c`, and a device that answers them as a test wants.

use std::ptr::NonNull;

use crate::some;

mod ffi {
    use std::ffi::{c_int, c_uint, c_void};

    /// `struct vhmm_request`, or a page, which only the driver looks into.
    pub type Opaque = c_void;

    /// `struct test_answer`.
    #[repr(C)]
    pub struct Answer {
        pub refused: c_int,
        pub used: u32,
        pub bytes: *const u8,
        pub len: usize,
    }

    unsafe extern "C" {
        pub fn test_request_new(max_frames: c_uint) -> *mut Opaque;
        pub fn test_request_add(r: *mut Opaque, frame: u64, pfn: u64, nr: c_uint, slot: c_uint);
        pub fn test_request_do(r: *mut Opaque, answer: *const Answer) -> c_int;
        pub fn test_request_frames(r: *const Opaque, frames: *mut u64, max: c_uint) -> c_uint;
        pub fn test_request_extents(r: *const Opaque) -> c_uint;
        pub fn test_request_pages(r: *const Opaque, pfns: *mut u64, max: c_uint) -> c_uint;
        pub fn test_request_buffers(r: *const Opaque) -> c_uint;
        pub fn test_request_counted(r: *const Opaque, op: u32, to: *mut [u64; 2]);
        pub fn test_request_slot(r: *const Opaque, i: c_uint) -> c_uint;

        pub fn vhmm_request_start(r: *mut Opaque, op: u32);
        pub fn vhmm_request_free(r: *mut Opaque);
        pub fn vhmm_request_ok(r: *const Opaque) -> bool;
        pub fn vhmm_request_frame_ok(r: *const Opaque, i: c_uint) -> bool;
    }
}

/// What the device does with a request.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Nothing, for the queue did not take it: with this error.
    Refused(i32),
    /// It says that it has written so many bytes of the response, and has written these.
    Used(u32, Vec<u8>),
}

/// A request that can be used again and again.
#[derive(Debug)]
pub struct Request {
    request: NonNull<ffi::Opaque>,
    max_frames: u32,
    frames: u32,
}

impl Request {
    /// Makes a request with room for so many frames.
    #[must_use]
    pub fn new(max_frames: u32) -> Self {
        Self {
            // SAFETY: it has no precondition.
            request: some(unsafe { ffi::test_request_new(max_frames) }),
            max_frames,
            frames: 0,
        }
    }

    /// Makes it empty, for an operation of the device.
    pub fn start(&mut self, op: u32) {
        self.frames = 0;
        // SAFETY: the request is alive.
        unsafe { ffi::vhmm_request_start(self.request.as_ptr(), op) }
    }

    /// Adds so many frames and, unless none is meant by 0, guest pages.
    ///
    /// # Panics
    ///
    /// There is no room for them.
    pub fn add(&mut self, frame: u64, pfn: u64, nr: u32, slot: u16) {
        self.frames += nr;
        assert!(self.frames <= self.max_frames);
        // SAFETY: the request is alive and has room; a page is only computed with.
        unsafe { ffi::test_request_add(self.request.as_ptr(), frame, pfn, nr, slot.into()) }
    }

    /// Sends it and waits for the answer; 0 or a negative error number.
    pub fn execute(&mut self, answer: &Answer) -> i32 {
        let mut to = ffi::Answer {
            refused: 0,
            used: 0,
            bytes: std::ptr::null(),
            len: 0,
        };
        match answer {
            Answer::Refused(error) => to.refused = -error,
            Answer::Used(used, bytes) => {
                to.used = *used;
                to.bytes = bytes.as_ptr();
                to.len = bytes.len();
            }
        }
        // SAFETY: the request and the answer are alive, and not looked at by anyone afterwards.
        unsafe { ffi::test_request_do(self.request.as_ptr(), &raw const to) }
    }

    /// The frames that it names, and by how many extents.
    #[must_use]
    pub fn frames(&self) -> (Vec<u64>, u32) {
        let request = self.request.as_ptr();
        // SAFETY: the request is alive.
        let extents = unsafe { ffi::test_request_extents(request) };
        // SAFETY: the request is alive, and no more is written than there is room for.
        let list = self.list(|to, max| unsafe { ffi::test_request_frames(request, to, max) });
        (list, extents)
    }

    /// The guest pages that it names, and by how many buffers.
    #[must_use]
    pub fn pages(&self) -> (Vec<u64>, u32) {
        let request = self.request.as_ptr();
        // SAFETY: the request is alive.
        let buffers = unsafe { ffi::test_request_buffers(request) };
        // SAFETY: the request is alive, and no more is written than there is room for.
        let list = self.list(|to, max| unsafe { ffi::test_request_pages(request, to, max) });
        (list, buffers)
    }

    /// What `fill` writes, given the room for one more than there should be, and how many.
    fn list(&self, fill: impl Fn(*mut u64, u32) -> u32) -> Vec<u64> {
        let mut list = vec![0; self.max_frames as usize + 1];
        let found = fill(list.as_mut_ptr(), self.max_frames + 1);
        list.truncate(found as usize);
        list
    }

    /// The slots of its frames.
    #[must_use]
    pub fn slots(&self) -> Vec<u32> {
        // SAFETY: the request is alive and has a slot for each of its frames.
        let slot = |i| unsafe { ffi::test_request_slot(self.request.as_ptr(), i) };
        (0..self.frames).map(slot).collect()
    }

    /// How many requests of an operation the driver has counted, and how many frames.
    #[must_use]
    pub fn counted(&self, op: u32) -> [u64; 2] {
        assert!((1..=3).contains(&op));
        let mut to = [0; 2];
        // SAFETY: the request is alive, and this is an operation that is counted.
        unsafe { ffi::test_request_counted(self.request.as_ptr(), op, &raw mut to) };
        to
    }

    /// Tells, after it was executed, whether all went well.
    #[must_use]
    pub fn ok(&self) -> bool {
        // SAFETY: the request is alive.
        unsafe { ffi::vhmm_request_ok(self.request.as_ptr()) }
    }

    /// Tells, after it was executed without error, which frames went well.
    #[must_use]
    pub fn frames_ok(&self) -> Vec<bool> {
        // SAFETY: the request is alive and has a status for each of its frames.
        let ok = |i| unsafe { ffi::vhmm_request_frame_ok(self.request.as_ptr(), i) };
        (0..self.frames).map(ok).collect()
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        // SAFETY: it is alive and not ours any more.
        unsafe { ffi::vhmm_request_free(self.request.as_ptr()) }
    }
}
