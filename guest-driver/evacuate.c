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

static void vhmm_evacuate_frames(struct vhmm_batch *b, unsigned long frame,
				 unsigned long nr)
{
	struct vhmm_device *dev = b->dev;
	unsigned long i, moved = 0;

	/*
	 * By frame and not by address: pages may be mapped by processes that
	 * exec or exit just now, or by several after fork. Only trylocks.
	 */
	migrate_device_range(b->src, vhmm_first_pfn(dev) + frame, nr);
	memcpy(b->src_seen, b->src, nr * sizeof(*b->src));
	for (i = 0; i < nr; i++) {
		struct folio *folio;

		b->dst[i] = 0;
		if (!(b->src[i] & MIGRATE_PFN_MIGRATE))
			continue;
		/* Unbinding cannot be refused, so it waits for memory. */
		folio = folio_alloc(GFP_HIGHUSER_MOVABLE | __GFP_NOFAIL, 0);
		folio_lock(folio);
		b->dst[i] = migrate_pfn(folio_pfn(folio));
	}
	vhmm_copy_to_ram(dev, b->copy, b->src, b->dst, nr);
	vhmm_check_src(dev, b->src, b->src_seen, nr);
	migrate_device_pages(b->src, b->dst, nr);
	for (i = 0; i < nr; i++) {
		if (b->dst[i] && (b->src[i] & MIGRATE_PFN_MIGRATE))
			moved++;
	}
	vhmm_count(dev, VHMM_PAGES_EVACUATED, moved);
	migrate_device_finalize(b->src, b->dst, nr);
	trace_vhmm_evacuate(dev, frame, nr, moved);
}

/**
 * vhmm_evacuate() - bring all pages home
 * @dev: the device; no more frames are given out
 *
 * Goes on until no frame is in use: a page that is locked now, because it is
 * being faulted back or its process exits, is found free or unlocked later.
 *
 * Return: 0; -EIO when the device broke, and pages may be left.
 */
int vhmm_evacuate(struct vhmm_device *dev)
{
	struct vhmm_memory *mem = &dev->memory;
	unsigned long notice = jiffies + VHMM_EVACUATE_NOTICE;
	struct vhmm_batch *b = dev->evacuation;
	unsigned long frame;
	int ret = 0;

	while (vhmm_memory_used(dev)) {
		for (frame = find_first_bit(mem->used, mem->nr_frames);
		     frame < mem->nr_frames && !vhmm_device_is_broken(dev);
		     frame = find_next_bit(mem->used, mem->nr_frames, frame)) {
			unsigned long nr = min(mem->nr_frames - frame,
					       (unsigned long)b->max);

			vhmm_evacuate_frames(b, frame, nr);
			frame += nr;
			cond_resched();
		}
		if (vhmm_device_is_broken(dev)) {
			ret = -EIO;
			break;
		}
		wait_event_timeout(mem->empty, !vhmm_memory_used(dev),
				   VHMM_EVACUATE_PAUSE);
		if (time_after(jiffies, notice)) {
			dev_notice(&dev->vdev->dev, "%lu pages still to come home\n",
				   vhmm_memory_used(dev));
			notice = jiffies + VHMM_EVACUATE_NOTICE;
		}
	}
	return ret;
}
