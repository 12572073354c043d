/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * One round of migration: up to a PMD of pages between setup and finalize.
 */
#ifndef VHMM_BATCH_H
#define VHMM_BATCH_H

#include <linux/huge_mm.h>
#include <linux/migrate.h>
#include <linux/pagemap.h>

#include "compat.h"
#include "counters.h"

struct vhmm_allocation;
struct vhmm_device;
struct vhmm_request;

/* One aligned PMD of pages per migrate_vma_setup(). */
#define VHMM_BATCH_PAGES	HPAGE_PMD_NR

/* For a page of RAM that nobody waits for: not worth more than light reclaim. */
#define VHMM_SPARE_GFP	(GFP_HIGHUSER_MOVABLE | __GFP_NORETRY | __GFP_NOWARN)

/*
 * What became of a page. Values from VHMM_SKIPPED on are VHMM_SKIPPED plus a
 * reason of enum virtio_hmm_skip.
 */
enum vhmm_outcome {
	VHMM_PENDING,
	VHMM_MOVED,
	VHMM_FILLED,
	VHMM_SKIPPED,
};

#define VHMM_SKIP(reason)	(VHMM_SKIPPED + VIRTIO_HMM_SKIP_##reason)

/**
 * struct vhmm_batch - working memory of a migration of up to VHMM_BATCH_PAGES
 * @dev: the device
 * @max: how many entries each of the arrays has
 * @src: as migrate_vma_setup() filled it; ours to read only
 * @dst: the destinations
 * @src_seen: @src as it was after setup
 * @pages: destination pages before they are given to @dst; on the way to RAM
 *	also those for the next window, and NULL where there is none
 * @outcome: for each page, &enum vhmm_outcome
 * @copy: the copy request
 * @fill: the fill request, NULL when the batch only moves pages to RAM
 * @trigger: why pages migrate
 * @allocation: where frames come from, in a batch that goes to the device
 * @fill_holes: where there is no page one is wanted, vhmm_vma_fills_holes()
 * @from_peer: it is about pages in the memory of other devices
 * @ahead: a large folio of RAM for the next window, allocated while the device
 *	copied this one; NULL if there is none
 * @end: where the range ends that this is a window of; 0 if it is none
 * @bounce: the RAM they come through; NULL if there were none yet
 * @evict: what to make room with; NULL if that was not needed yet
 *
 * Owned by one task at a time. Reused from batch to batch, so that a long range
 * is migrated without allocating anything but pages and, to the device, one
 * &struct vhmm_allocation for each.
 */
struct vhmm_batch {
	struct vhmm_device *dev;
	unsigned int max;
	unsigned long *src;
	unsigned long *dst;
	unsigned long *src_seen;
	struct page **pages;
	u8 *outcome;
	struct vhmm_request *copy;
	struct vhmm_request *fill;
	enum vhmm_trigger trigger;
	struct vhmm_allocation *allocation;
	bool fill_holes;
	bool from_peer;
	struct folio *ahead;
	unsigned long end;
	struct page **bounce;
	struct vhmm_batch *evict;
};

static inline bool vhmm_to_device(const struct vhmm_batch *b)
{
	return b->fill;
}

/*
 * A large folio, or a hole as large, is the first of 512 entries and has
 * MIGRATE_PFN_COMPOUND; the others are 0. It is alone in its batch.
 */
static inline bool vhmm_is_large(const unsigned long *entries)
{
	return entries[0] & MIGRATE_PFN_COMPOUND;
}

/* The entry that speaks for page @i. */
static inline unsigned long vhmm_entry(const unsigned long *entries,
				       unsigned long i)
{
	return vhmm_is_large(entries) ? entries[0] : entries[i];
}

/* Page @i of the entries, NULL for a hole or where nothing goes. */
static inline struct page *vhmm_entry_page(const unsigned long *entries,
					   unsigned long i)
{
	struct page *page = migrate_pfn_to_page(vhmm_entry(entries, i));

	return page && vhmm_is_large(entries) ? folio_page(page_folio(page), i) :
						page;
}

/* Whether page @i is at its destination, after migrate_vma_pages(). */
static inline bool vhmm_has_moved(const unsigned long *src,
				  const unsigned long *dst, unsigned long i)
{
	return vhmm_entry(dst, i) &&
	       (src[vhmm_is_large(dst) ? 0 : i] & MIGRATE_PFN_MIGRATE);
}

/* The destination entry for a folio of RAM; locks the folio. */
static inline unsigned long vhmm_ram_destination(struct folio *folio)
{
	folio_lock(folio);
	return migrate_pfn(folio_pfn(folio)) |
	       (folio_test_large(folio) ? MIGRATE_PFN_COMPOUND : 0);
}

struct vhmm_batch *vhmm_batch_alloc(struct vhmm_device *dev,
				    enum vhmm_trigger trigger, unsigned int max);
void vhmm_batch_free(struct vhmm_batch *b);
void vhmm_free_ram(struct vhmm_batch *b);
bool vhmm_has_policy(const struct vm_area_struct *vma);

bool vhmm_can_come_home(const struct vhmm_batch *b, unsigned long i);
void vhmm_alloc_ram_bulk(struct vhmm_batch *b, const struct vm_area_struct *vma,
			 gfp_t gfp, unsigned long nr);
bool vhmm_take_ram(struct vhmm_batch *b, struct migrate_vma *args,
		   unsigned long i, gfp_t gfp, unsigned long nr);
void vhmm_drop_destination(unsigned long *dst, unsigned long i);
unsigned long vhmm_count_moved(const unsigned long *src,
			       const unsigned long *dst, unsigned long nr);
void vhmm_mark_moved(const unsigned long *src, const unsigned long *dst,
		     unsigned long nr);
void vhmm_check_src(struct vhmm_device *dev, const unsigned long *src,
		    const unsigned long *seen, unsigned long nr);
void vhmm_copy_to_ram_begin(struct vhmm_device *dev, struct vhmm_request *r,
			    const unsigned long *src, const unsigned long *dst,
			    unsigned long nr);
void vhmm_copy_to_ram_end(struct vhmm_request *r, unsigned long *dst);
void vhmm_copy_to_ram(struct vhmm_device *dev, struct vhmm_request *r,
		      const unsigned long *src, unsigned long *dst,
		      unsigned long nr);
int vhmm_settle(struct vhmm_request *r, const unsigned long *src,
		const unsigned long *dst);

#endif /* VHMM_BATCH_H */
