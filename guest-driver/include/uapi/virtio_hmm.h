/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * User interface of the virtio-hmm driver, on /dev/hmmN.
 *
 * All calls but INFO act on the address space of the caller, which must be the
 * one that opened the file; a child that inherited the file opens its own.
 */
#ifndef _UAPI_VIRTIO_HMM_H
#define _UAPI_VIRTIO_HMM_H

#include <linux/ioctl.h>
#include <linux/types.h>

/**
 * enum virtio_hmm_device_state - whether the device can be used
 * @VIRTIO_HMM_DEVICE_OK: it works
 * @VIRTIO_HMM_DEVICE_BROKEN: it missed a deadline or was lost; pages that were
 *	only in its memory are gone
 * @VIRTIO_HMM_DEVICE_CLOSING: it is being unbound; its pages come home
 */
enum virtio_hmm_device_state {
	VIRTIO_HMM_DEVICE_OK = 0,
	VIRTIO_HMM_DEVICE_BROKEN = 1,
	VIRTIO_HMM_DEVICE_CLOSING = 2,
};

/**
 * struct virtio_hmm_info - argument of VIRTIO_HMM_IOCTL_INFO
 * @memory_size: out: bytes of device memory
 * @memory_free: out: bytes of it that are free now
 * @generation: out: changes when the contents of the memory were lost
 * @uuid: out: identity of the memory
 * @frame_size: out: bytes of a frame of device memory
 * @copy_queues: out: number of copy queues
 * @state: out: one of &enum virtio_hmm_device_state
 * @reserved: out: zero
 */
struct virtio_hmm_info {
	__u64 memory_size;
	__u64 memory_free;
	__u64 generation;
	__u8 uuid[16];
	__u32 frame_size;
	__u32 copy_queues;
	__u32 state;
	__u32 reserved;
};

/**
 * enum virtio_hmm_direction - where VIRTIO_HMM_IOCTL_MIGRATE moves pages
 * @VIRTIO_HMM_TO_DEVICE: from RAM to device memory; pages that were never
 *	touched get zero-filled device memory
 * @VIRTIO_HMM_TO_SYSTEM: from device memory to RAM
 */
enum virtio_hmm_direction {
	VIRTIO_HMM_TO_DEVICE = 0,
	VIRTIO_HMM_TO_SYSTEM = 1,
};

/**
 * enum virtio_hmm_skip - why a page stayed where it was
 * @VIRTIO_HMM_SKIP_ALREADY: it was at the destination, or (to RAM) not on
 *	this device
 * @VIRTIO_HMM_SKIP_BUSY: locked, referenced or changing, still so after the
 *	driver's retries
 * @VIRTIO_HMM_SKIP_PINNED: pinned for DMA
 * @VIRTIO_HMM_SKIP_SWAPPED: in swap
 * @VIRTIO_HMM_SKIP_OTHER_DEVICE: in the memory of another device
 * @VIRTIO_HMM_SKIP_UNSUPPORTED: a kind of memory that does not migrate: file,
 *	shared, hugetlb or device mappings, guard pages, holes that
 *	userfaultfd watches, and (to the device) memory that KSM may merge
 * @VIRTIO_HMM_SKIP_UNMAPPED: nothing is mapped there
 * @VIRTIO_HMM_SKIP_NO_MEMORY: no free memory at the destination
 * @VIRTIO_HMM_SKIP_COPY_FAILED: the device reported an error for it
 * @VIRTIO_HMM_SKIP_NR: number of reasons
 */
enum virtio_hmm_skip {
	VIRTIO_HMM_SKIP_ALREADY = 0,
	VIRTIO_HMM_SKIP_BUSY = 1,
	VIRTIO_HMM_SKIP_PINNED = 2,
	VIRTIO_HMM_SKIP_SWAPPED = 3,
	VIRTIO_HMM_SKIP_OTHER_DEVICE = 4,
	VIRTIO_HMM_SKIP_UNSUPPORTED = 5,
	VIRTIO_HMM_SKIP_UNMAPPED = 6,
	VIRTIO_HMM_SKIP_NO_MEMORY = 7,
	VIRTIO_HMM_SKIP_COPY_FAILED = 8,
	VIRTIO_HMM_SKIP_NR = 9,
};

/*
 * Flag of VIRTIO_HMM_IOCTL_MIGRATE: when device memory or the limit of the file
 * is used up, leave pages where they are (VIRTIO_HMM_SKIP_NO_MEMORY). Without it
 * the least recently used pages of the file that uses most go home instead.
 */
#define VIRTIO_HMM_MIGRATE_NO_EVICT	(1U << 0)

/**
 * struct virtio_hmm_migrate - argument of VIRTIO_HMM_IOCTL_MIGRATE
 * @start: in: first byte of the range, page aligned
 * @length: in: bytes of the range, a multiple of the page size, not zero
 * @direction: in: one of &enum virtio_hmm_direction
 * @flags: in: 0 or VIRTIO_HMM_MIGRATE_NO_EVICT; to RAM it has no effect
 * @done: out: bytes of the range that were dealt with, from @start; less than
 *	@length only when the call fails
 * @moved: out: pages copied to the destination
 * @filled: out: pages that were a hole or the zero page and are now
 *	zero-filled device memory; nothing was copied for them
 * @skipped: out: pages left where they were, by &enum virtio_hmm_skip
 *
 * @moved, @filled and all of @skipped add up to @done in pages.
 */
struct virtio_hmm_migrate {
	__u64 start;
	__u64 length;
	__u32 direction;
	__u32 flags;
	__u64 done;
	__u64 moved;
	__u64 filled;
	__u64 skipped[VIRTIO_HMM_SKIP_NR];
};

/**
 * enum virtio_hmm_residency - where a page is
 * @VIRTIO_HMM_RESIDENCY_NONE: never touched, or not mapped
 * @VIRTIO_HMM_RESIDENCY_RAM: in RAM
 * @VIRTIO_HMM_RESIDENCY_ZERO: the shared zero page
 * @VIRTIO_HMM_RESIDENCY_DEVICE: in the memory of this device
 * @VIRTIO_HMM_RESIDENCY_OTHER_DEVICE: in the memory of another device
 * @VIRTIO_HMM_RESIDENCY_SWAPPED: in swap
 * @VIRTIO_HMM_RESIDENCY_MOVING: being migrated at this moment
 */
enum virtio_hmm_residency {
	VIRTIO_HMM_RESIDENCY_NONE = 0,
	VIRTIO_HMM_RESIDENCY_RAM = 1,
	VIRTIO_HMM_RESIDENCY_ZERO = 2,
	VIRTIO_HMM_RESIDENCY_DEVICE = 3,
	VIRTIO_HMM_RESIDENCY_OTHER_DEVICE = 4,
	VIRTIO_HMM_RESIDENCY_SWAPPED = 5,
	VIRTIO_HMM_RESIDENCY_MOVING = 6,
};

/**
 * struct virtio_hmm_query - argument of VIRTIO_HMM_IOCTL_QUERY
 * @start: in: first byte of the range, page aligned
 * @length: in: bytes of the range, a multiple of the page size, not zero
 * @residency: in: address of an array of one byte per page, filled with
 *	&enum virtio_hmm_residency; it may lie in the range itself
 * @flags: in: zero
 */
struct virtio_hmm_query {
	__u64 start;
	__u64 length;
	__u64 residency;
	__u64 flags;
};

/* Flag of VIRTIO_HMM_IOCTL_RELEASE: all that was migrated through this file. */
#define VIRTIO_HMM_RELEASE_ALL	(1U << 0)

/**
 * struct virtio_hmm_release - argument of VIRTIO_HMM_IOCTL_RELEASE
 * @start: in: first byte of the range, page aligned
 * @length: in: bytes of the range, a multiple of the page size; both are zero
 *	with VIRTIO_HMM_RELEASE_ALL
 * @flags: in: 0 or VIRTIO_HMM_RELEASE_ALL
 * @reserved: in: zero
 * @released: out: pages that came home
 * @remaining: out: pages that did not, of those that were reached
 */
struct virtio_hmm_release {
	__u64 start;
	__u64 length;
	__u32 flags;
	__u32 reserved;
	__u64 released;
	__u64 remaining;
};

/* Flag of VIRTIO_HMM_IOCTL_LIMIT: set the limit, and not only ask for it. */
#define VIRTIO_HMM_LIMIT_SET	(1U << 0)

/**
 * struct virtio_hmm_limit - argument of VIRTIO_HMM_IOCTL_LIMIT
 * @bytes: in with VIRTIO_HMM_LIMIT_SET, and out: the bytes of device memory that
 *	pages migrated through this file may use, a multiple of the page size;
 *	all ones, as at first, for no limit
 * @used: out: the bytes they use
 * @flags: in: 0 or VIRTIO_HMM_LIMIT_SET
 * @reserved: in: zero
 */
struct virtio_hmm_limit {
	__u64 bytes;
	__u64 used;
	__u32 flags;
	__u32 reserved;
};

#define VIRTIO_HMM_IOCTL_TYPE	0xB7

/*
 * Describe the device. It works whatever the state of the device.
 *
 * EFAULT	the argument cannot be written
 * ENODEV	the device was unbound
 */
#define VIRTIO_HMM_IOCTL_INFO \
	_IOR(VIRTIO_HMM_IOCTL_TYPE, 0x00, struct virtio_hmm_info)

/*
 * Migrate a range. The output fields are written on success and with EINTR,
 * ENOMEM, EIO and EFAULT (bad address in the range), and say how far it came.
 * Pages that cannot move are skipped and counted; they are not an error.
 *
 * EINVAL	unaligned or empty range, or beyond user space; unknown
 *		direction or flag
 * EFAULT	the argument cannot be accessed; or part of the range is not
 *		mapped (the mapped rest was migrated)
 * EINTR	a signal came between two batches of 2 MiB
 * ENOMEM	no kernel memory for the work
 * EIO		the device is broken
 * EBADF	the file was opened by another address space
 * ENODEV	the device is being unbound, or was
 */
#define VIRTIO_HMM_IOCTL_MIGRATE \
	_IOWR(VIRTIO_HMM_IOCTL_TYPE, 0x01, struct virtio_hmm_migrate)

/*
 * Report where each page of a range is. The answer is a snapshot: it may be
 * out of date when the call returns.
 *
 * EINVAL	unaligned or empty range, or beyond user space; flags not zero
 * EFAULT	the argument or the array cannot be accessed
 * EINTR	a signal came
 * EBADF	the file was opened by another address space
 * ENODEV	the device was unbound
 */
#define VIRTIO_HMM_IOCTL_QUERY \
	_IOW(VIRTIO_HMM_IOCTL_TYPE, 0x02, struct virtio_hmm_query)

/*
 * Bring pages home, and do not leave those that are busy at first. Addresses
 * where nothing is mapped are no error. The output fields are written on
 * success and with EINTR, ENOMEM, EIO and EBUSY.
 *
 * EINVAL	unaligned or empty range, or beyond user space; a range with
 *		VIRTIO_HMM_RELEASE_ALL; unknown flag; reserved not zero
 * EFAULT	the argument cannot be accessed
 * EBUSY	some pages could not be had before the deadline of a request
 * EINTR	a signal came
 * ENOMEM	no kernel memory for the work
 * EIO		the device is broken
 * EBADF	the file was opened by another address space
 * ENODEV	the device was unbound: all pages are home or, if it was
 *		broken, lost
 */
#define VIRTIO_HMM_IOCTL_RELEASE \
	_IOWR(VIRTIO_HMM_IOCTL_TYPE, 0x03, struct virtio_hmm_release)

/*
 * Limit what a file may use of device memory. Beyond it the file's own least
 * recently used pages go home. A limit below what is used now brings nothing
 * home at once.
 *
 * EINVAL	not a multiple of the page size; unknown flag; reserved not zero
 * EFAULT	the argument cannot be accessed
 * EBADF	the file was opened by another address space
 * ENODEV	the device was unbound
 */
#define VIRTIO_HMM_IOCTL_LIMIT \
	_IOWR(VIRTIO_HMM_IOCTL_TYPE, 0x04, struct virtio_hmm_limit)

#endif /* _UAPI_VIRTIO_HMM_H */
