// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * A device that answers requests as a test wants.
 */
#include "device.h"
#include "request.h"

/**
 * struct test_answer - what the device does with a request
 * @refused: what the queue tells instead of an answer, or 0
 * @used: how many bytes of the response it says it has written
 * @bytes: what it does write
 * @len: how many bytes
 */
struct test_answer {
	int refused;
	u32 used;
	const u8 *bytes;
	size_t len;
};

static __thread const struct test_answer *answer;

void vhmm_device_break(struct vhmm_device *dev, const char *why)
{
	dev->broken = true;
}

int vhmm_queue_submit(struct vhmm_queue *q, struct vhmm_request *r)
{
	size_t extents = le32_to_cpu(r->req->nr_extents);
	unsigned int i;

	assert(q >= r->dev->copy && q < r->dev->copy + r->dev->nr_copy);
	assert(sg_page(&r->out_sg) == r->req && r->out_sg.end);
	assert(r->out_sg.length == sizeof(*r->req) +
	       extents * sizeof(struct virtio_hmm_extent));
	for (i = 0; i < r->nr_pages_sg; i++)
		assert(r->pages_sg[i].end == (i == r->nr_pages_sg - 1));
	if (answer->refused)
		return answer->refused;
	memcpy(sg_page(&r->resp_sg), answer->bytes,
	       min(answer->len, (size_t)r->resp_sg.length));
	r->used = answer->used;
	complete(&r->done);
	return 0;
}

void vhmm_queue_wait(struct vhmm_queue *q, struct vhmm_request *r)
{
	assert(r->done.done);
}

struct vhmm_request *test_request_new(unsigned int max_frames)
{
	static __thread struct virtio_device vdev;
	static __thread struct vhmm_counters counters;
	static __thread struct vhmm_device dev;

	dev.vdev = &vdev;
	dev.counters = &counters;
	dev.nr_copy = 3;
	return vhmm_request_alloc(&dev, max_frames, max_frames, GFP_KERNEL);
}

/* With no pages if @pfn is 0. */
void test_request_add(struct vhmm_request *r, u64 frame, u64 pfn,
		      unsigned int nr, unsigned int slot)
{
	vhmm_request_add_range(r, frame, pfn_to_page(pfn), nr, slot);
}

int test_request_do(struct vhmm_request *r, const struct test_answer *a)
{
	answer = a;
	vhmm_request_submit(r);
	return vhmm_request_wait(r);
}

/* The frames that the request names, of which there is room for @max. */
unsigned int test_request_frames(const struct vhmm_request *r, u64 *frames,
				 unsigned int max)
{
	const struct virtio_hmm_extent *extent = (const void *)(r->req + 1);
	u32 nr = le32_to_cpu(r->req->nr_extents);
	unsigned int found = 0;
	u32 i, j;

	for (i = 0; i < nr; i++)
		for (j = 0; j < le32_to_cpu(extent[i].count); j++)
			if (found++ < max)
				frames[found - 1] =
					le64_to_cpu(extent[i].frame) + j;
	return found;
}

unsigned int test_request_extents(const struct vhmm_request *r)
{
	return le32_to_cpu(r->req->nr_extents);
}

/* The same of the guest's pages. */
unsigned int test_request_pages(const struct vhmm_request *r, u64 *pfns,
				unsigned int max)
{
	unsigned int found = 0, i, j;

	for (i = 0; i < r->nr_pages_sg; i++)
		for (j = 0; j < PHYS_PFN(r->pages_sg[i].length); j++)
			if (found++ < max)
				pfns[found - 1] =
					page_to_pfn(sg_page(&r->pages_sg[i])) + j;
	return found;
}

unsigned int test_request_buffers(const struct vhmm_request *r)
{
	return r->nr_pages_sg;
}

void test_request_counted(const struct vhmm_request *r, u32 op, u64 to[2])
{
	const u64 *value = r->dev->counters->value + op - VIRTIO_HMM_OP_TO_DEVICE;

	to[0] = value[VHMM_TO_DEVICE_REQUESTS];
	to[1] = value[VHMM_TO_DEVICE_FRAMES];
}

unsigned int test_request_slot(const struct vhmm_request *r, unsigned int i)
{
	return r->slots[i];
}
