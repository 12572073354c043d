// SPDX-License-Identifier: GPL-2.0-only
/*
 * Bring pages home whoever maps them: all, before the device is unbound or the
 * system sleeps; or those that eviction does not find at their addresses.
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

static bool vhmm_is_large_frame(struct vhmm_device *dev, unsigned long frame)
{
	struct page *page = pfn_to_page(vhmm_first_pfn(dev) + frame);

	/*
	 * A page that is not in use may still look like part of the large
	 * folio it was in.
	 */
	return test_bit(frame, dev->memory.used) &&
	       folio_test_large(page_folio(page));
}

/*
 * Leave alone the frames whose pages another task has moved, and has not freed
 * yet: the core comes to a page from an address, and never meets those. They
 * are locked now, so a mark that will be there is there.
 */
static void vhmm_leave_moved(struct vhmm_batch *b, unsigned long nr)
{
	struct page *page;
	unsigned long i;

	for (i = 0; i < nr; i++) {
		page = migrate_pfn_to_page(b->src[i]);
		if (page && test_bit(vhmm_page_frame(b->dev, page),
				     b->dev->memory.moved))
			b->src[i] &= ~MIGRATE_PFN_MIGRATE;
	}
}

/*
 * Lock and unmap the pages of a block that are in use, and put them into
 * @b->src. By frame and not by address: pages may be mapped by processes that
 * exec or exit just now, or by several after fork. Only trylocks.
 */
static unsigned long vhmm_evacuate_setup(struct vhmm_batch *b,
					 const struct vhmm_allocation *a,
					 unsigned long start)
{
	struct vhmm_memory *mem = &b->dev->memory;
	unsigned long first = vhmm_first_pfn(b->dev);
	unsigned long frame, nr = 0;

	/* A large folio that is split meanwhile is found as its pages. */
	if (vhmm_is_large_frame(b->dev, start)) {
		if (a && READ_ONCE(mem->owner[start]) != a)
			return 0;
		migrate_device_range(b->src, first + start, HPAGE_PMD_NR);
		return HPAGE_PMD_NR;
	}
	frame = start;
	for_each_set_bit_from(frame, mem->used, start + HPAGE_PMD_NR) {
		if (!a || READ_ONCE(mem->owner[frame]) == a)
			b->src[nr++] = first + frame;
	}
	migrate_device_pfns(b->src, nr);
	return nr;
}

/**
 * vhmm_evacuate_frames() - bring the pages of a block home by their frames
 * @b: working memory
 * @a: the allocation whose pages are meant; NULL for all, and then memory for
 *	small ones is waited for
 * @start: the first frame of the block
 *
 * Return: how many came home.
 */
unsigned long vhmm_evacuate_frames(struct vhmm_batch *b,
				   const struct vhmm_allocation *a,
				   unsigned long start)
{
	gfp_t gfp = GFP_HIGHUSER_MOVABLE | (a ? __GFP_NOWARN : __GFP_NOFAIL);
	struct vhmm_device *dev = b->dev;
	unsigned long i, moved, nr;
	struct vhmm_migration m;

	vhmm_migration_begin(&m, dev, b->trigger, 0, 0);
	nr = vhmm_evacuate_setup(b, a, start);
	m.nr = nr;
	vhmm_leave_moved(b, nr);
	vhmm_migration_lap(&m, VHMM_SETUP);
	memcpy(b->src_seen, b->src, nr * sizeof(*b->src));
	for (i = 0; i < nr; i++) {
		bool large = b->src[i] & MIGRATE_PFN_COMPOUND;
		struct folio *folio;

		b->dst[i] = 0;
		if (!(b->src[i] & MIGRATE_PFN_MIGRATE))
			continue;
		/* A large folio cannot be split here, only at its address. */
		folio = large ? folio_alloc(GFP_TRANSHUGE, HPAGE_PMD_ORDER) :
				folio_alloc(gfp, 0);
		if (!folio)
			continue;
		b->dst[i] = vhmm_ram_destination(folio);
	}
	vhmm_copy_to_ram(dev, b->copy, b->src, b->dst, nr);
	vhmm_check_src(dev, b->src, b->src_seen, nr);
	vhmm_migration_lap(&m, VHMM_COPY);
	migrate_device_pages(b->src, b->dst, nr);
	vhmm_migration_lap(&m, VHMM_PAGES);
	vhmm_mark_moved(b->src, b->dst, nr);
	moved = vhmm_count_moved(b->src, b->dst, nr);
	migrate_device_finalize(b->src, b->dst, nr);
	vhmm_migration_lap(&m, VHMM_FINALIZE);
	vhmm_migration_end(&m, moved, vhmm_settle(b->copy, b->src, b->dst));
	if (!a)
		trace_vhmm_evacuate(dev, start, nr, moved);
	return moved;
}

/**
 * vhmm_evacuate() - bring all pages home
 * @dev: the device; no more frames are given out
 * @timeout: jiffies after which to give up, or MAX_SCHEDULE_TIMEOUT
 *
 * Goes on until no frame is in use: a page that is locked now, because it is
 * being faulted back or its process exits, is found free or unlocked later.
 * Ends early when the device breaks.
 *
 * Return: true if no frame is in use any more.
 */
bool vhmm_evacuate(struct vhmm_device *dev, unsigned long timeout)
{
	struct vhmm_memory *mem = &dev->memory;
	unsigned long begin = jiffies, notice = begin + VHMM_EVACUATE_NOTICE;
	unsigned long frame;

	mutex_lock(&dev->evacuation_lock);
	while (vhmm_memory_used(dev) && jiffies - begin < timeout) {
		for (frame = 0; frame < mem->nr_frames; frame += HPAGE_PMD_NR) {
			if (vhmm_device_is_broken(dev))
				break;
			if (test_bit(frame / HPAGE_PMD_NR, mem->whole))
				continue;
			vhmm_evacuate_frames(dev->evacuation, NULL, frame);
			if (vhmm_is_large_frame(dev, frame))
				vhmm_evict_owner(dev->evacuation, frame);
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
	mutex_unlock(&dev->evacuation_lock);
	return !vhmm_memory_used(dev);
}
