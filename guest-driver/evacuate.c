// SPDX-License-Identifier: GPL-2.0-only
/*
 * Bring all pages home, whoever maps them: before the device is unbound.
 */
#include <linux/gfp.h>
#include <linux/jiffies.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/pagemap.h>

#include "batch.h"
#include "device.h"
#include "request.h"
#include "trace.h"

/* How long to leave pages alone that could not be locked. */
#define VHMM_EVACUATE_PAUSE	msecs_to_jiffies(10)
/* How often to say that some still cannot be. */
#define VHMM_EVACUATE_NOTICE	(10 * HZ)

/*
 * Lock and unmap the pages of a block that are in use, and put them into
 * @b->src. By frame and not by address: pages may be mapped by processes that
 * exec or exit just now, or by several after fork. Only trylocks.
 */
static unsigned long vhmm_evacuate_setup(struct vhmm_batch *b, unsigned long start)
{
	struct vhmm_memory *mem = &b->dev->memory;
	unsigned long first = vhmm_first_pfn(b->dev);
	unsigned long frame, nr = 0;

	/*
	 * A page that is not in use may still look like part of the large
	 * folio it was in, so only those in use are named. A large folio that
	 * is split meanwhile is found as its pages.
	 */
	if (test_bit(start, mem->used) &&
	    folio_test_large(page_folio(pfn_to_page(first + start)))) {
		migrate_device_range(b->src, first + start, HPAGE_PMD_NR);
		return HPAGE_PMD_NR;
	}
	frame = start;
	for_each_set_bit_from(frame, mem->used, start + HPAGE_PMD_NR)
		b->src[nr++] = first + frame;
	migrate_device_pfns(b->src, nr);
	return nr;
}

static void vhmm_evacuate_block(struct vhmm_batch *b, unsigned long start)
{
	struct vhmm_device *dev = b->dev;
	unsigned long i, moved, nr;

	nr = vhmm_evacuate_setup(b, start);
	memcpy(b->src_seen, b->src, nr * sizeof(*b->src));
	for (i = 0; i < nr; i++) {
		bool large = b->src[i] & MIGRATE_PFN_COMPOUND;
		struct folio *folio;

		b->dst[i] = 0;
		if (!(b->src[i] & MIGRATE_PFN_MIGRATE))
			continue;
		/*
		 * Unbinding cannot be refused, so it waits for memory. A large
		 * folio cannot be split here, and is tried again.
		 */
		if (large)
			folio = folio_alloc(GFP_TRANSHUGE, HPAGE_PMD_ORDER);
		else
			folio = folio_alloc(GFP_HIGHUSER_MOVABLE | __GFP_NOFAIL, 0);
		if (!folio)
			continue;
		b->dst[i] = vhmm_ram_destination(folio);
	}
	vhmm_copy_to_ram(dev, b->copy, b->src, b->dst, nr);
	vhmm_check_src(dev, b->src, b->src_seen, nr);
	migrate_device_pages(b->src, b->dst, nr);
	moved = vhmm_count_moved(b->src, b->dst, nr);
	vhmm_count(dev, VHMM_PAGES_EVACUATED, moved);
	migrate_device_finalize(b->src, b->dst, nr);
	trace_vhmm_evacuate(dev, start, nr, moved);
}

/**
 * vhmm_evacuate() - bring all pages home
 * @dev: the device; no more frames are given out
 *
 * Goes on until no frame is in use: a page that is locked now, because it is
 * being faulted back or its process exits, is found free or unlocked later.
 * Ends early when the device breaks, and pages may be left then.
 */
void vhmm_evacuate(struct vhmm_device *dev)
{
	struct vhmm_memory *mem = &dev->memory;
	unsigned long notice = jiffies + VHMM_EVACUATE_NOTICE;
	struct vhmm_batch *b = dev->evacuation;
	unsigned long frame;

	while (vhmm_memory_used(dev)) {
		for (frame = 0; frame < mem->nr_frames; frame += HPAGE_PMD_NR) {
			if (vhmm_device_is_broken(dev))
				break;
			if (test_bit(frame / HPAGE_PMD_NR, mem->whole))
				continue;
			vhmm_evacuate_block(b, frame);
			cond_resched();
		}
		if (vhmm_device_is_broken(dev))
			break;
		wait_event_timeout(mem->empty, !vhmm_memory_used(dev),
				   VHMM_EVACUATE_PAUSE);
		if (time_after(jiffies, notice)) {
			dev_notice(&dev->vdev->dev, "%lu pages still to come home\n",
				   vhmm_memory_used(dev));
			notice = jiffies + VHMM_EVACUATE_NOTICE;
		}
	}
}
