//! Parts of the guest driver in user space: its source as it is, with `c/kernel.h` for what that
//! needs of the kernel.

use std::ptr::NonNull;

pub mod memory;
pub mod request;

fn some<T>(pointer: *mut T) -> NonNull<T> {
    let Some(pointer) = NonNull::new(pointer) else {
        unreachable!("what the driver allocates is there, see kernel.h")
    };
    pointer
}
