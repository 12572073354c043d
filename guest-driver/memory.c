// SPDX-License-Identifier: GPL-2.0-only
/*
 * Device memory: its struct pages, and which of its frames are in use.
 */
#include <linux/bitmap.h>
#include <linux/ioport.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/vmalloc.h>

#include "context.h"
#include "device.h"

/* Frees what its last user must not; waited for when the module is unloaded. */
static struct workqueue_struct *vhmm_release_wq;

/* How often to say what unloading waits for. */
#define VHMM_UNMAP_NOTICE	(10 * HZ)

/* A large folio of device memory is as large as one of RAM that a PMD maps. */
#define VHMM_BLOCK_FRAMES	HPAGE_PMD_NR

/*
 * Note whether the block of @frame is whole, partly used or full, after @nr of
 * its frames were taken, or given back if that is negative.
 */
static void vhmm_update_block(struct vhmm_memory *mem, unsigned long frame,
			      int nr)
{
	unsigned long block = frame / VHMM_BLOCK_FRAMES;
	unsigned int in_use = mem->in_use[block] += nr;

	lockdep_assert_held(&mem->lock);

	__assign_bit(block, mem->whole, !in_use);
	__assign_bit(block, mem->partial,
		     in_use && in_use < VHMM_BLOCK_FRAMES);
}

/*
 * The core clears these flags of a page of RAM that is freed, and not of ours:
 * the next page in this frame would count as locked, or be active and
 * unevictable at once, which the core takes for a bug.
 */
static void vhmm_folio_forget(struct folio *folio)
{
	if (folio_test_clear_mlocked(folio))
		mod_zone_page_state(folio_zone(folio), NR_MLOCK,
				    -(long)folio_nr_pages(folio));
	folio_clear_unevictable(folio);
	folio_clear_active(folio);
	folio_clear_workingset(folio);
	folio_clear_swapbacked(folio);
}

/*
 * The last reference to a device page is gone. It may have been dropped under
 * a page-table lock, so this must not sleep.
 */
static void vhmm_folio_free(struct folio *folio)
{
	struct vhmm_device *dev = vhmm_pgmap_device(page_pgmap(&folio->page));
	struct vhmm_memory *mem = &dev->memory;
	unsigned long frame = vhmm_page_frame(dev, &folio->page);
	unsigned long nr = folio_nr_pages(folio);
	unsigned long flags;

	vhmm_folio_forget(folio);
	spin_lock_irqsave(&mem->lock, flags);
	clear_bit(frame, mem->moved);
	bitmap_clear(mem->used, frame, nr);
	vhmm_update_block(mem, frame, -(int)nr);
	vhmm_allocation_uncharge(dev, frame, nr);
	if (!mem->nr_used) {
		wake_up_all(&mem->empty);
		if (mem->orphaned) {
			vhmm_queue_release(&mem->release_work);
		} else if (mem->module_held) {
			/*
			 * Unloading cannot overtake us: the driver's remove
			 * takes the lock and then, in memunmap_pages(), waits
			 * for the reference that our caller still holds.
			 */
			mem->module_held = false;
			module_put(THIS_MODULE);
		}
	}
	spin_unlock_irqrestore(&mem->lock, flags);
}

VHMM_DEFINE_FOLIO_FREE(vhmm_folio_free)

/*
 * No folio_split: a page finds its device through its pgmap, which the core
 * copies to the parts of a folio, and frames are freed by their number.
 */
static const struct dev_pagemap_ops vhmm_pagemap_ops = {
	VHMM_FOLIO_FREE(vhmm_folio_free),
	.migrate_to_ram = vhmm_migrate_to_ram,
};

static int vhmm_tables_alloc(struct vhmm_memory *mem)
{
	mem->used = bitmap_zalloc(mem->nr_frames, GFP_KERNEL);
	mem->moved = bitmap_zalloc(mem->nr_frames, GFP_KERNEL);
	mem->whole = bitmap_alloc(mem->nr_blocks, GFP_KERNEL);
	mem->partial = bitmap_zalloc(mem->nr_blocks, GFP_KERNEL);
	mem->in_use = kvcalloc(mem->nr_blocks, sizeof(*mem->in_use), GFP_KERNEL);
	mem->owner = vcalloc(mem->nr_frames, sizeof(*mem->owner));
	if (!mem->used || !mem->moved || !mem->whole || !mem->partial ||
	    !mem->in_use || !mem->owner)
		return -ENOMEM;
	bitmap_fill(mem->whole, mem->nr_blocks);
	return 0;
}

static void vhmm_tables_free(struct vhmm_memory *mem)
{
	bitmap_free(mem->used);
	bitmap_free(mem->moved);
	bitmap_free(mem->whole);
	bitmap_free(mem->partial);
	kvfree(mem->in_use);
	vfree(mem->owner);
}

static void vhmm_memory_unmap(struct vhmm_memory *mem)
{
	memunmap_pages(&mem->pgmap);
	release_mem_region(mem->resource->start, resource_size(mem->resource));
	mem->resource = NULL;
	vhmm_tables_free(mem);
}

static void vhmm_memory_release(struct work_struct *work)
{
	struct vhmm_device *dev =
		container_of(work, struct vhmm_device, memory.release_work);

	vhmm_memory_unmap(&dev->memory);
	vhmm_device_put(dev);
	/* Unloading waits for this work, see vhmm_memory_destroy_workqueue(). */
	module_put(THIS_MODULE);
}

/* All devices share it, so that pages can move from one to another. */
static void *vhmm_pgmap_owner(void)
{
	return &vhmm_release_wq;
}

/**
 * vhmm_memory_init() - give device memory its struct pages
 * @dev: the device
 * @size: bytes of device memory, a multiple of 2 MiB
 *
 * The addresses are taken from a hole in the physical address space; nothing
 * answers there. This function and vhmm_memory_unmap() are the only places
 * that know it.
 *
 * Return: 0 or a negative errno.
 */
int vhmm_memory_init(struct vhmm_device *dev, u64 size)
{
	struct vhmm_memory *mem = &dev->memory;
	struct resource *res;
	void *map;
	int ret;

	spin_lock_init(&mem->lock);
	init_waitqueue_head(&mem->empty);
	INIT_LIST_HEAD(&mem->contexts);
	INIT_WORK(&mem->release_work, vhmm_memory_release);
	mem->nr_frames = size >> PAGE_SHIFT;
	mem->nr_blocks = mem->nr_frames / VHMM_BLOCK_FRAMES;
	ret = vhmm_tables_alloc(mem);
	if (ret)
		goto err_tables;

	res = request_free_mem_region(&iomem_resource, size, "virtio_hmm");
	if (IS_ERR(res)) {
		ret = PTR_ERR(res);
		goto err_tables;
	}
	mem->resource = res;

	mem->pgmap.type = MEMORY_DEVICE_PRIVATE;
	mem->pgmap.range.start = res->start;
	mem->pgmap.range.end = res->start + size - 1;
	mem->pgmap.nr_range = 1;
	mem->pgmap.ops = &vhmm_pagemap_ops;
	mem->pgmap.owner = vhmm_pgmap_owner();
	map = memremap_pages(&mem->pgmap, dev_to_node(&dev->vdev->dev));
	if (IS_ERR(map)) {
		ret = PTR_ERR(map);
		goto err_region;
	}
	return 0;

err_region:
	release_mem_region(res->start, resource_size(res));
	mem->resource = NULL;
err_tables:
	vhmm_tables_free(mem);
	return ret;
}

/**
 * vhmm_memory_close() - give out no more frames
 * @dev: the device
 */
void vhmm_memory_close(struct vhmm_device *dev)
{
	struct vhmm_memory *mem = &dev->memory;
	unsigned long flags;

	spin_lock_irqsave(&mem->lock, flags);
	mem->closed = true;
	spin_unlock_irqrestore(&mem->lock, flags);
}

/**
 * vhmm_memory_open() - give out frames again
 * @dev: the device; nothing is done if it is broken or being unbound
 */
void vhmm_memory_open(struct vhmm_device *dev)
{
	struct vhmm_memory *mem = &dev->memory;
	unsigned long flags;

	spin_lock_irqsave(&mem->lock, flags);
	mem->closed = vhmm_device_is_broken(dev) || READ_ONCE(dev->closing);
	spin_unlock_irqrestore(&mem->lock, flags);
}

/**
 * vhmm_memory_lost() - the contents of device memory are gone
 * @dev: the device
 *
 * Processes may still map device pages. Touching one gives SIGBUS, through
 * our migrate_to_ram, so the module has to stay until the last one is freed.
 */
void vhmm_memory_lost(struct vhmm_device *dev)
{
	struct vhmm_memory *mem = &dev->memory;
	unsigned long flags;

	spin_lock_irqsave(&mem->lock, flags);
	mem->closed = true;
	if (mem->nr_used && !mem->module_held)
		mem->module_held = try_module_get(THIS_MODULE);
	spin_unlock_irqrestore(&mem->lock, flags);
}

/**
 * vhmm_memory_exit() - end device memory, now or when its last frame is freed
 * @dev: the device, evacuated or broken; no more frames are given out
 *
 * Only the memory of a broken device can still have pages in use here. They
 * cannot come home, and memunmap_pages() would wait for them for ever.
 */
void vhmm_memory_exit(struct vhmm_device *dev)
{
	struct vhmm_memory *mem = &dev->memory;
	bool orphaned = false;
	unsigned long flags;

	spin_lock_irqsave(&mem->lock, flags);
	if (mem->nr_used && mem->module_held) {
		vhmm_device_get(dev);
		mem->orphaned = true;
		orphaned = true;
	}
	spin_unlock_irqrestore(&mem->lock, flags);
	if (orphaned)
		return;
	/* The module is being unloaded: it is too late to pin it. */
	while (!wait_event_timeout(mem->empty, !vhmm_memory_used(dev),
				   VHMM_UNMAP_NOTICE))
		dev_notice(&dev->vdev->dev,
			   "%lu lost pages are still mapped: unloading waits for their processes\n",
			   vhmm_memory_used(dev));
	vhmm_memory_unmap(mem);
}

/**
 * vhmm_memory_used() - count the frames in use
 * @dev: the device
 *
 * Return: the number of frames that are allocated now.
 */
unsigned long vhmm_memory_used(struct vhmm_device *dev)
{
	return READ_ONCE(dev->memory.nr_used);
}

/**
 * vhmm_frames_alloc() - allocate device frames
 * @a: whose they will be
 * @pages: where to put their pages, locked and with one reference each
 * @nr: how many are wanted
 *
 * Blocks that are in use anyway come first, so that whole ones stay for large
 * folios. What the frames contain is undefined: the caller has to overwrite
 * all of it.
 *
 * Return: how many were allocated, 0 to @nr.
 */
unsigned int vhmm_frames_alloc(struct vhmm_allocation *a, struct page **pages,
			       unsigned int nr)
{
	struct vhmm_device *dev = a->ctx->dev;
	struct vhmm_memory *mem = &dev->memory;
	unsigned long first = vhmm_first_pfn(dev);
	unsigned long flags, block, frame, end, run;
	unsigned int found = 0, i;

	spin_lock_irqsave(&mem->lock, flags);
	nr = mem->closed ? 0 : min(nr, vhmm_allocation_left(a));
	while (found < nr) {
		block = find_first_bit(mem->partial, mem->nr_blocks);
		if (block == mem->nr_blocks)
			block = find_first_bit(mem->whole, mem->nr_blocks);
		if (block == mem->nr_blocks)
			break;
		frame = block * VHMM_BLOCK_FRAMES;
		end = frame + VHMM_BLOCK_FRAMES;
		for (; found < nr; frame += run) {
			frame = find_next_zero_bit(mem->used, end, frame);
			if (frame == end)
				break;
			run = min(find_next_bit(mem->used, end, frame) - frame,
				  nr - found);
			bitmap_set(mem->used, frame, run);
			vhmm_update_block(mem, frame, run);
			vhmm_allocation_charge(a, frame, run);
			for (i = 0; i < run; i++)
				pages[found++] = pfn_to_page(first + frame + i);
		}
	}
	spin_unlock_irqrestore(&mem->lock, flags);

	for (i = 0; i < found; i++)
		zone_device_page_init(pages[i], &mem->pgmap, 0);
	return found;
}

/**
 * vhmm_large_alloc() - allocate a large folio of device memory
 * @a: whose it will be
 *
 * What it contains is undefined.
 *
 * Return: the folio, of HPAGE_PMD_NR frames, locked and with one reference; or
 * NULL when no block is whole, or not so many frames may be had.
 */
struct folio *vhmm_large_alloc(struct vhmm_allocation *a)
{
	struct vhmm_device *dev = a->ctx->dev;
	struct vhmm_memory *mem = &dev->memory;
	unsigned long flags, block, frame;
	struct folio *folio;

	spin_lock_irqsave(&mem->lock, flags);
	block = find_first_bit(mem->whole, mem->nr_blocks);
	if (mem->closed || block == mem->nr_blocks ||
	    vhmm_allocation_left(a) < VHMM_BLOCK_FRAMES) {
		spin_unlock_irqrestore(&mem->lock, flags);
		return NULL;
	}
	frame = block * VHMM_BLOCK_FRAMES;
	bitmap_set(mem->used, frame, VHMM_BLOCK_FRAMES);
	vhmm_update_block(mem, frame, VHMM_BLOCK_FRAMES);
	vhmm_allocation_charge(a, frame, VHMM_BLOCK_FRAMES);
	spin_unlock_irqrestore(&mem->lock, flags);

	/* Not page_folio(): the page may still look like part of a former folio. */
	folio = (struct folio *)pfn_to_page(vhmm_first_pfn(dev) + frame);
	zone_device_folio_init(folio, &mem->pgmap, HPAGE_PMD_ORDER);
	return folio;
}

void vhmm_queue_release(struct work_struct *work)
{
	queue_work(vhmm_release_wq, work);
}

int vhmm_memory_setup_workqueue(void)
{
	vhmm_release_wq = alloc_workqueue("virtio_hmm", WQ_UNBOUND, 0);
	return vhmm_release_wq ? 0 : -ENOMEM;
}

void vhmm_memory_destroy_workqueue(void)
{
	destroy_workqueue(vhmm_release_wq);
}
