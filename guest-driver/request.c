// SPDX-License-Identifier: GPL-2.0-only
/*
 * Building requests, sending them, reading their outcome.
 */
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/smp.h>

#include "device.h"
#include "request.h"
#include "trace.h"

/**
 * vhmm_request_alloc() - allocate a request and its buffers
 * @dev: the device
 * @max_frames: room for so many frames
 * @body: bytes of the response behind its head, at least @max_frames for a
 *	copy request
 * @gfp: how to allocate
 *
 * Everything is one allocation, whose parts lie in the order of their
 * alignment: for one page it costs a single small kmalloc().
 *
 * Return: the request, or NULL.
 */
struct vhmm_request *vhmm_request_alloc(struct vhmm_device *dev,
					unsigned int max_frames,
					size_t body, gfp_t gfp)
{
	size_t sg_size = max_frames * sizeof(struct scatterlist);
	/* A request without frames, as for the counters, has no extent. */
	size_t req_size = sizeof(struct virtio_hmm_req) +
			  max_frames * sizeof(struct virtio_hmm_extent);
	size_t resp_size = ALIGN(sizeof(struct virtio_hmm_resp) + body, 8);
	struct vhmm_request *r;
	void *p;

	p = kmalloc(sizeof(*r) + sg_size + req_size + resp_size +
		    max_frames * sizeof(*r->slots), gfp);
	if (!p)
		return NULL;
	r = p;
	memset(r, 0, sizeof(*r));
	r->dev = dev;
	r->max_frames = max_frames;
	r->resp_len = sizeof(*r->resp) + body;
	r->pages_sg = p + sizeof(*r);
	r->req = (void *)r->pages_sg + sg_size;
	r->resp = (void *)r->req + req_size;
	r->slots = (void *)r->resp + resp_size;
	init_completion(&r->done);
	return r;
}

void vhmm_request_free(struct vhmm_request *r)
{
	kfree(r);
}

static struct virtio_hmm_extent *vhmm_request_extents(struct vhmm_request *r)
{
	return (struct virtio_hmm_extent *)(r->req + 1);
}

static u8 *vhmm_request_body(const struct vhmm_request *r)
{
	return (u8 *)(r->resp + 1);
}

/**
 * vhmm_request_start() - make a request empty
 * @r: the request, new or waited for
 * @op: the operation, VIRTIO_HMM_OP_*
 */
void vhmm_request_start(struct vhmm_request *r, u32 op)
{
	r->queue = NULL;
	r->used = 0;
	r->nr_frames = 0;
	r->nr_pages_sg = 0;
	reinit_completion(&r->done);
	memset(r->req, 0, sizeof(*r->req));
	r->req->op = cpu_to_le32(op);
}

static void vhmm_request_add_extent(struct vhmm_request *r, u64 frame, u32 count)
{
	struct virtio_hmm_extent *extents = vhmm_request_extents(r);
	u32 nr = le32_to_cpu(r->req->nr_extents);

	if (nr) {
		struct virtio_hmm_extent *last = &extents[nr - 1];
		u32 have = le32_to_cpu(last->count);

		if (le64_to_cpu(last->frame) + have == frame) {
			last->count = cpu_to_le32(have + count);
			return;
		}
	}
	extents[nr] = (struct virtio_hmm_extent) {
		.frame = cpu_to_le64(frame),
		.count = cpu_to_le32(count),
	};
	r->req->nr_extents = cpu_to_le32(nr + 1);
}

static void vhmm_request_add_pages(struct vhmm_request *r, struct page *page,
				   unsigned int nr)
{
	if (r->nr_pages_sg) {
		struct scatterlist *last = &r->pages_sg[r->nr_pages_sg - 1];

		if (page_to_pfn(sg_page(last)) + PHYS_PFN(last->length) ==
		    page_to_pfn(page)) {
			last->length += nr * PAGE_SIZE;
			return;
		}
	}
	sg_init_table(&r->pages_sg[r->nr_pages_sg], 1);
	sg_unmark_end(&r->pages_sg[r->nr_pages_sg]);
	sg_set_page(&r->pages_sg[r->nr_pages_sg++], page, nr * PAGE_SIZE, 0);
}

/**
 * vhmm_request_add_range() - add frames to a request
 * @r: the request, with room
 * @frame: the first device frame
 * @page: the first page of RAM they are copied to or from; NULL for a fill
 * @nr: how many frames, and pages, that follow one another
 * @slot: a number for the caller, kept in @r->slots; counts up with the frames
 */
void vhmm_request_add_range(struct vhmm_request *r, u64 frame,
			    struct page *page, unsigned int nr,
			    unsigned int slot)
{
	vhmm_request_add_extent(r, frame, nr);
	if (page)
		vhmm_request_add_pages(r, page, nr);
	while (nr--)
		r->slots[r->nr_frames++] = slot++;
}

static void vhmm_request_send(struct vhmm_request *r, struct vhmm_queue *q)
{
	struct vhmm_device *dev = r->dev;
	int ret;

	r->req->cookie = cpu_to_le64(atomic64_inc_return(&dev->next_cookie));
	/* Nothing that the device does not write can be taken for success. */
	memset(r->resp, 0xff, r->resp_len);

	sg_init_one(&r->out_sg, r->req, sizeof(*r->req) +
		    le32_to_cpu(r->req->nr_extents) *
		    sizeof(struct virtio_hmm_extent));
	sg_init_one(&r->resp_sg, r->resp, r->resp_len);
	if (r->nr_pages_sg)
		sg_mark_end(&r->pages_sg[r->nr_pages_sg - 1]);

	trace_vhmm_copy_submit(r);
	r->queue = q;
	r->submitted = ktime_get();
	ret = vhmm_queue_submit(q, r);
	if (ret) {
		if (ret == -ETIMEDOUT) {
			vhmm_count(dev, VHMM_REQUEST_TIMEOUTS, 1);
			vhmm_device_break(dev, "a queue stayed full");
		}
		complete(&r->done);
	}
}

/*
 * A CPU has a queue by its number, or several that it takes in turn where there
 * are at least twice as many as CPUs: they are more copies at a time.
 */
static struct vhmm_queue *vhmm_copy_queue(struct vhmm_device *dev)
{
	unsigned int cpus = num_online_cpus();
	unsigned int turns = DIV_ROUND_UP(dev->nr_copy, cpus);
	unsigned int nr = raw_smp_processor_id();

	if (turns > 1)
		nr += cpus * ((u32)atomic64_read(&dev->next_cookie) % turns);
	return &dev->copy[nr % dev->nr_copy];
}

/**
 * vhmm_request_submit() - send a copy request
 * @r: the request, with at least one frame
 *
 * It cannot fail: what goes wrong is told by vhmm_request_wait().
 */
void vhmm_request_submit(struct vhmm_request *r)
{
	struct vhmm_device *dev = r->dev;

	r->req->nr_frames = cpu_to_le32(r->nr_frames);
	r->resp_len = sizeof(*r->resp) + r->nr_frames;
	vhmm_request_send(r, vhmm_copy_queue(dev));
}

static bool vhmm_request_answered(const struct vhmm_request *r)
{
	return r->used >= sizeof(*r->resp);
}

static int vhmm_request_finish(struct vhmm_request *r)
{
	u32 status;
	int ret = 0;

	vhmm_queue_wait(r->queue, r);
	r->latency_ns = ktime_to_ns(ktime_sub(ktime_get(), r->submitted));

	if (!vhmm_request_answered(r)) {
		ret = -EIO;
		goto out;
	}
	status = le32_to_cpu(r->resp->status);
	/* A frame status that was not written is not a good one. */
	if ((status != VIRTIO_HMM_S_OK && status != VIRTIO_HMM_S_PARTIAL) ||
	    r->used < r->resp_len)
		ret = -EIO;
	if (ret || status != VIRTIO_HMM_S_OK) {
		vhmm_count(r->dev, VHMM_REQUEST_ERRORS, 1);
		dev_err_ratelimited(&r->dev->vdev->dev,
				    "operation %#x ended with status %u\n",
				    le32_to_cpu(r->req->op), status);
	}
out:
	r->error = ret;
	trace_vhmm_copy_complete(r, ret);
	return ret;
}

/**
 * vhmm_request_wait() - wait for a copy request and count it
 * @r: the request
 *
 * Return: 0 when the device has answered: vhmm_request_frame_ok() tells what
 * became of each frame. -EIO when it has not, or has refused the request.
 */
int vhmm_request_wait(struct vhmm_request *r)
{
	struct vhmm_device *dev = r->dev;
	/* The operations count from 1, in the order of the counters. */
	unsigned int op = le32_to_cpu(r->req->op) - VIRTIO_HMM_OP_TO_DEVICE;
	u32 frames;
	int ret;

	ret = vhmm_request_finish(r);
	if (vhmm_request_answered(r))
		vhmm_count(dev, VHMM_TO_DEVICE_REQUESTS + op, 1);
	if (ret)
		return ret;

	frames = min(le32_to_cpu(r->resp->frames_done), r->nr_frames);
	vhmm_count(dev, VHMM_TO_DEVICE_FRAMES + op, frames);
	vhmm_count(dev, VHMM_TO_DEVICE_BYTES + op, (u64)frames * PAGE_SIZE);
	vhmm_count(dev, VHMM_TO_DEVICE_NS + op, r->latency_ns);
	return 0;
}

/**
 * vhmm_request_ok() - tell whether all frames were copied or filled
 * @r: a request that was waited for
 *
 * Return: true if they were.
 */
bool vhmm_request_ok(const struct vhmm_request *r)
{
	return !r->error && r->resp->status == cpu_to_le32(VIRTIO_HMM_S_OK);
}

/**
 * vhmm_request_frame_ok() - tell whether a frame was copied or filled
 * @r: a request whose vhmm_request_wait() returned 0
 * @i: the frame, counted in the order in which they were added
 *
 * Return: true if it was.
 */
bool vhmm_request_frame_ok(const struct vhmm_request *r, unsigned int i)
{
	return vhmm_request_ok(r) ||
	       vhmm_request_body(r)[i] == VIRTIO_HMM_FRAME_OK;
}

/**
 * vhmm_control_counters() - read the device's own counters
 * @dev: the device
 * @counters: where to put them
 *
 * Return: 0, -ENOMEM or -EIO.
 */
int vhmm_control_counters(struct vhmm_device *dev,
			  struct virtio_hmm_counters *counters)
{
	struct vhmm_request *r;
	int ret;

	r = vhmm_request_alloc(dev, 0, sizeof(*counters), GFP_KERNEL);
	if (!r)
		return -ENOMEM;
	vhmm_request_start(r, VIRTIO_HMM_OP_COUNTERS);
	vhmm_request_send(r, &dev->control);
	ret = vhmm_request_finish(r);
	if (!ret)
		memcpy(counters, vhmm_request_body(r), sizeof(*counters));
	vhmm_request_free(r);
	return ret;
}

/**
 * vhmm_control_discard_all() - give all of device memory back to the host
 * @dev: the device; none of its frames is in use
 *
 * Return: 0, -ENOMEM or -EIO.
 */
int vhmm_control_discard_all(struct vhmm_device *dev)
{
	struct vhmm_request *r;
	int ret;

	r = vhmm_request_alloc(dev, 1, 0, GFP_KERNEL);
	if (!r)
		return -ENOMEM;
	vhmm_request_start(r, VIRTIO_HMM_OP_DISCARD);
	vhmm_request_add_extent(r, 0, dev->memory.nr_frames);
	r->req->nr_frames = cpu_to_le32(dev->memory.nr_frames);
	vhmm_request_send(r, &dev->control);
	ret = vhmm_request_finish(r);
	vhmm_request_free(r);
	return ret;
}
