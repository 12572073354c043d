/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A request to the device: what is sent, what comes back, and its outcome.
 */
#ifndef VHMM_REQUEST_H
#define VHMM_REQUEST_H

#include <linux/completion.h>
#include <linux/ktime.h>
#include <linux/scatterlist.h>

#include "virtio_hmm_abi.h"

struct vhmm_device;
struct vhmm_queue;

/**
 * struct vhmm_request - one request and its buffers
 * @dev: the device
 * @queue: where it was submitted, NULL before
 * @done: completed once, by the queue, when the device has answered or can
 *	answer no more
 * @used: bytes of the response that the device wrote, 0 if it did not answer;
 *	valid after @done
 * @max_frames: room for so many frames
 * @nr_frames: frames added so far
 * @nr_pages_sg: entries of @pages_sg in use
 * @resp_len: bytes of the response
 * @submitted: when it was put on the queue
 * @latency_ns: from then until it was seen complete
 * @error: what vhmm_request_wait() returned
 * @out_sg: @req and its extents
 * @resp_sg: @resp and what follows it
 * @pages_sg: the guest pages; physically contiguous ones share an entry
 * @slots: for each frame, what the caller passed when it was added
 * @resp: response head; status bytes or a body follow it
 * @req: request head; its extents follow it
 *
 * Owned by one task, which is the only one to touch it, but for @done and
 * @used. It and its buffers are one allocation, and must not be freed
 * between vhmm_request_submit() and the return of vhmm_request_wait().
 */
struct vhmm_request {
	struct vhmm_device *dev;
	struct vhmm_queue *queue;
	struct completion done;
	unsigned int used;
	unsigned int max_frames;
	unsigned int nr_frames;
	unsigned int nr_pages_sg;
	size_t resp_len;
	ktime_t submitted;
	u64 latency_ns;
	int error;
	struct scatterlist out_sg;
	struct scatterlist resp_sg;
	struct scatterlist *pages_sg;
	u16 *slots;
	struct virtio_hmm_resp *resp;
	struct virtio_hmm_req *req;
};

struct vhmm_request *vhmm_request_alloc(struct vhmm_device *dev,
					unsigned int max_frames,
					size_t body, gfp_t gfp);
void vhmm_request_free(struct vhmm_request *r);
void vhmm_request_start(struct vhmm_request *r, u32 op);
void vhmm_request_add_range(struct vhmm_request *r, u64 frame,
			    struct page *page, unsigned int nr,
			    unsigned int slot);
void vhmm_request_submit(struct vhmm_request *r);
int vhmm_request_wait(struct vhmm_request *r);
bool vhmm_request_ok(const struct vhmm_request *r);
bool vhmm_request_frame_ok(const struct vhmm_request *r, unsigned int i);

int vhmm_control_counters(struct vhmm_device *dev,
			  struct virtio_hmm_counters *counters);
int vhmm_control_discard_all(struct vhmm_device *dev);

#endif /* VHMM_REQUEST_H */
