/* SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause */
/*
 * Wire format of the virtio-hmm device: configuration space, requests and
 * responses. Generated from device/src/abi.rs, do not edit.
 */

#ifndef _VIRTIO_HMM_ABI_H
#define _VIRTIO_HMM_ABI_H

#include <linux/types.h>

/*
 * Virtio device id. Provisional: 6 (ioMemory) has a name in QEMU and no
 * specification; the device uses it until it is given an id of its own.
 */
#define VIRTIO_ID_HMM 6

/* Version of this interface, in virtio_hmm_config.version. */
#define VIRTIO_HMM_VERSION 1

/* Bytes in one frame of device memory. */
#define VIRTIO_HMM_FRAME_SIZE 4096

/*
 * Most frames that one copy request may name: 2 MiB, one PMD of pages.
 */
#define VIRTIO_HMM_MAX_FRAMES 512

/* Index of the control queue. */
#define VIRTIO_HMM_QUEUE_CONTROL 0

/* Index of the event queue. No event is defined in version 1. */
#define VIRTIO_HMM_QUEUE_EVENT 1

/* Index of the first copy queue. */
#define VIRTIO_HMM_QUEUE_COPY 2

/* Copy guest pages into device frames. */
#define VIRTIO_HMM_OP_TO_DEVICE 1

/* Copy device frames into guest pages. */
#define VIRTIO_HMM_OP_FROM_DEVICE 2

/* Set device frames to zero. */
#define VIRTIO_HMM_OP_FILL 3

/* Copy device frames to other device frames. */
#define VIRTIO_HMM_OP_DEVICE_TO_DEVICE 4

/* Control queue: read the device's counters of this session. */
#define VIRTIO_HMM_OP_COUNTERS 256

/* Control queue: the contents of these frames are no longer needed. */
#define VIRTIO_HMM_OP_DISCARD 257

/* The request succeeded, every frame of it. */
#define VIRTIO_HMM_S_OK 0

/* Some frames failed; the status of each frame says which. */
#define VIRTIO_HMM_S_PARTIAL 1

/* The request is malformed; nothing was copied. */
#define VIRTIO_HMM_S_INVALID 2

/* The operation is not known to this queue; nothing was copied. */
#define VIRTIO_HMM_S_UNSUPPORTED 3

/* A frame lies outside device memory; nothing was copied. */
#define VIRTIO_HMM_S_RANGE 4

/* This frame was copied or filled. */
#define VIRTIO_HMM_FRAME_OK 0

/* This frame was not attempted. */
#define VIRTIO_HMM_FRAME_NOT_DONE 1

/* This frame failed: its guest page could not be accessed. */
#define VIRTIO_HMM_FRAME_FAULT 2

/*
 * This frame failed: a device frame that was to be read has lost its
 * contents.
 */
#define VIRTIO_HMM_FRAME_POISONED 3

/**
 * struct virtio_hmm_config - Device configuration space
 */
struct virtio_hmm_config {
	/** @version: VIRTIO_HMM_VERSION. */
	__le32 version;
	/** @frame_size: Bytes in a frame, VIRTIO_HMM_FRAME_SIZE. */
	__le32 frame_size;
	/** @memory_size: Bytes of device memory, a multiple of 2 MiB. */
	__le64 memory_size;
	/** @copy_queues: Number of copy queues, 1 to 16. */
	__le32 copy_queues;
	/**
	 * @max_frames: Most frames in one copy request, at most
	 * VIRTIO_HMM_MAX_FRAMES.
	 */
	__le32 max_frames;
	/**
	 * @uuid: Identity of the memory: the daemon makes it at random when it
	 * starts.
	 */
	__u8 uuid[16];
	/**
	 * @generation: Changes whenever the contents of the memory were lost
	 * or cleared.
	 */
	__le64 generation;
};

/**
 * struct virtio_hmm_req - Head of every request, device-readable
 *
 * nr_extents extents follow it at once; for DEVICE_TO_DEVICE the
 * extents of the source follow those of the destination and are counted
 * by nr_src_extents.
 */
struct virtio_hmm_req {
	/** @op: One of VIRTIO_HMM_OP_*. */
	__le32 op;
	/** @flags: No flag is defined; zero. */
	__le32 flags;
	/** @nr_frames: Sum of the counts of the (destination) extents. */
	__le32 nr_frames;
	/** @nr_extents: Number of (destination) extents. */
	__le32 nr_extents;
	/**
	 * @nr_src_extents: Number of source extents, DEVICE_TO_DEVICE only,
	 * else zero.
	 */
	__le32 nr_src_extents;
	/** @reserved: Zero. */
	__le32 reserved;
	/**
	 * @cookie: Chosen by the driver, for its traces; the device logs it
	 * with errors.
	 */
	__le64 cookie;
};

/**
 * struct virtio_hmm_extent - A run of device frames
 */
struct virtio_hmm_extent {
	/** @frame: First frame, counted from the start of device memory. */
	__le64 frame;
	/** @count: Number of frames, at least 1. */
	__le32 count;
	/** @reserved: Zero. */
	__le32 reserved;
};

/**
 * struct virtio_hmm_resp - Head of every response, device-writable,
 * first in the writable part of the chain
 *
 * For copy requests nr_frames status bytes (VIRTIO_HMM_FRAME_*) follow
 * it; then, for FROM_DEVICE, the guest pages.
 */
struct virtio_hmm_resp {
	/** @status: One of VIRTIO_HMM_S_*. */
	__le32 status;
	/**
	 * @frames_done: Number of frames whose status is VIRTIO_HMM_FRAME_OK.
	 */
	__le32 frames_done;
};

/**
 * struct virtio_hmm_op_counters - What the device counted for one
 * operation since the session began
 */
struct virtio_hmm_op_counters {
	/** @requests: Requests completed, whatever their status. */
	__le64 requests;
	/** @frames: Frames copied or filled. */
	__le64 frames;
	/** @bytes: Bytes copied or filled. */
	__le64 bytes;
	/** @errors: Requests whose status was not VIRTIO_HMM_S_OK. */
	__le64 errors;
};

/**
 * struct virtio_hmm_counters - Response body of VIRTIO_HMM_OP_COUNTERS,
 * follows virtio_hmm_resp
 */
struct virtio_hmm_counters {
	/** @to_device: Guest pages to device frames. */
	struct virtio_hmm_op_counters to_device;
	/** @from_device: Device frames to guest pages. */
	struct virtio_hmm_op_counters from_device;
	/** @fill: Frames set to zero. */
	struct virtio_hmm_op_counters fill;
	/** @device_to_device: Device frames to device frames. */
	struct virtio_hmm_op_counters device_to_device;
	/** @discard: Frames that were discarded. */
	struct virtio_hmm_op_counters discard;
	/** @unsupported: Requests of an operation unknown to their queue. */
	__le64 unsupported;
};

#endif /* _VIRTIO_HMM_ABI_H */
