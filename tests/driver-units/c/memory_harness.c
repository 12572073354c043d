// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * One device, or rather its memory, for the tests.
 */
#include <unistd.h>

#include "context.h"
#include "device.h"

__thread long kernel_allocated;
__thread long kernel_mlocked;
__thread long kernel_module_users;
struct resource iomem_resource;

vm_fault_t vhmm_migrate_to_ram(struct vm_fault *vmf)
{
	abort();
}

void vhmm_device_get(struct vhmm_device *dev)
{
	dev->ref.refcount++;
}

void vhmm_device_put(struct vhmm_device *dev)
{
	if (!--dev->ref.refcount)
		kfree(dev);
}

struct vhmm_device *test_device_new(unsigned long blocks)
{
	static struct virtio_device vdev;
	struct vhmm_device *dev;

	/* An endless loop ends the test. */
	alarm(60);
	kernel_allocated = 0;
	kernel_mlocked = 0;
	kernel_module_users = 0;
	dev = kzalloc(sizeof(*dev), GFP_KERNEL);
	vhmm_device_get(dev);
	dev->vdev = &vdev;
	assert(!vhmm_memory_init(dev, (u64)blocks * HPAGE_PMD_NR << PAGE_SHIFT));
	return dev;
}

/* All that this thread had of the kernel was given back. */
bool test_all_returned(void)
{
	alarm(0);
	return !kernel_allocated && !kernel_mlocked && !kernel_module_users;
}

long test_module_users(void)
{
	return kernel_module_users;
}

void test_context_limit(struct vhmm_context *ctx, unsigned long limit)
{
	ctx->limit = limit;
}

bool test_page_is_new(struct vhmm_device *dev, const struct page *page,
		      unsigned int order)
{
	return page->refcount == 1 && page->order == order && !page->flags &&
	       page->pgmap == &dev->memory.pgmap;
}

/* The last reference is gone, and the page has had an eventful life. */
void test_page_put(struct vhmm_device *dev, struct page *page)
{
	struct folio *folio = (struct folio *)page;

	page->flags = (1U << PG_all) - 1;
	kernel_mlocked += folio_nr_pages(folio);
	page->refcount--;
	dev->memory.pgmap.ops->folio_free(folio);
}

unsigned long test_page_frame(const struct vhmm_device *dev,
			      const struct page *page)
{
	return vhmm_page_frame(dev, page);
}

/* What the memory tells of a block. */
struct test_block {
	unsigned int in_use;
	bool whole;
	bool partial;
	bool used[HPAGE_PMD_NR];
};

void test_block(const struct vhmm_device *dev, unsigned long block,
		struct test_block *to)
{
	const struct vhmm_memory *mem = &dev->memory;
	unsigned long i;

	to->in_use = mem->in_use[block];
	to->whole = test_bit(block, mem->whole);
	to->partial = test_bit(block, mem->partial);
	for (i = 0; i < HPAGE_PMD_NR; i++)
		to->used[i] = test_bit(block * HPAGE_PMD_NR + i, mem->used);
}

unsigned long test_reserved(const struct vhmm_device *dev)
{
	return dev->memory.nr_reserved;
}
