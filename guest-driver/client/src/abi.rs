//! The driver's user interface as the kernel sees it.
//!
//! These are the definitions of `guest-driver/include/uapi/virtio_hmm.h`, where
//! the meaning of each field is written down; a test compares the two.

use libc::Ioctl;

/// Number of reasons to skip a page, `VIRTIO_HMM_SKIP_NR`.
pub const SKIP_NR: usize = 9;

/// `struct virtio_hmm_info`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "documented in the C header")]
pub struct Info {
    pub memory_size: u64,
    pub memory_free: u64,
    pub generation: u64,
    pub uuid: [u8; 16],
    pub frame_size: u32,
    pub copy_queues: u32,
    pub state: u32,
    pub reserved: u32,
}

/// `struct virtio_hmm_migrate`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "documented in the C header")]
pub struct Migrate {
    pub start: u64,
    pub length: u64,
    pub direction: u32,
    pub flags: u32,
    pub done: u64,
    pub moved: u64,
    pub filled: u64,
    pub skipped: [u64; SKIP_NR],
}

/// `struct virtio_hmm_query`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "documented in the C header")]
pub struct Query {
    pub start: u64,
    pub length: u64,
    pub residency: u64,
    pub flags: u64,
}

/// `struct virtio_hmm_release`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "documented in the C header")]
pub struct Release {
    pub start: u64,
    pub length: u64,
    pub flags: u32,
    pub reserved: u32,
    pub released: u64,
    pub remaining: u64,
}

/// `struct virtio_hmm_limit`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "documented in the C header")]
pub struct Limit {
    pub bytes: u64,
    pub used: u64,
    pub flags: u32,
    pub reserved: u32,
}

/// `VIRTIO_HMM_MIGRATE_NO_EVICT`
pub const MIGRATE_NO_EVICT: u32 = 1;
/// `VIRTIO_HMM_RELEASE_ALL`
pub const RELEASE_ALL: u32 = 1;
/// `VIRTIO_HMM_LIMIT_SET`
pub const LIMIT_SET: u32 = 1;

const TYPE: u32 = 0xB7;

/// `VIRTIO_HMM_IOCTL_INFO`
pub const IOCTL_INFO: Ioctl = libc::_IOR::<Info>(TYPE, 0x00);
/// `VIRTIO_HMM_IOCTL_MIGRATE`
pub const IOCTL_MIGRATE: Ioctl = libc::_IOWR::<Migrate>(TYPE, 0x01);
/// `VIRTIO_HMM_IOCTL_QUERY`
pub const IOCTL_QUERY: Ioctl = libc::_IOW::<Query>(TYPE, 0x02);
/// `VIRTIO_HMM_IOCTL_RELEASE`
pub const IOCTL_RELEASE: Ioctl = libc::_IOWR::<Release>(TYPE, 0x03);
/// `VIRTIO_HMM_IOCTL_LIMIT`
pub const IOCTL_LIMIT: Ioctl = libc::_IOWR::<Limit>(TYPE, 0x04);
