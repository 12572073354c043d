// SPDX-License-Identifier: GPL-2.0-only
/*
 * What all migrations share: working memory, dropping a destination, and the
 * copy from device memory to RAM.
 */
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/slab.h>

#include "batch.h"
#include "device.h"
#include "request.h"

/**
 * vhmm_batch_alloc() - allocate the working memory of a migration
 * @dev: the device
 * @trigger: why; only on the way to the device are there holes to fill
 * @max: most pages at a time, 1 to VHMM_BATCH_PAGES
 *
 * Return: the batch, or NULL.
 */
struct vhmm_batch *vhmm_batch_alloc(struct vhmm_device *dev,
				    enum vhmm_trigger trigger, unsigned int max)
{
	const bool to_device = trigger == VHMM_IOCTL_TO_DEVICE;
	struct vhmm_batch *b;
	unsigned long *words;

	b = kvmalloc(sizeof(*b) + max * (4 * sizeof(*words) + sizeof(*b->outcome)),
		     GFP_KERNEL);
	if (!b)
		return NULL;
	memset(b, 0, sizeof(*b));
	b->dev = dev;
	b->trigger = trigger;
	b->max = max;
	words = (unsigned long *)(b + 1);
	b->copy = vhmm_request_alloc(dev, max, max, GFP_KERNEL);
	if (to_device)
		b->fill = vhmm_request_alloc(dev, max, max, GFP_KERNEL);
	if (!b->copy || (to_device && !b->fill)) {
		vhmm_batch_free(b);
		return NULL;
	}
	b->src = words;
	b->dst = words + max;
	b->src_seen = words + 2 * max;
	b->pages = (struct page **)(words + 3 * max);
	b->outcome = (u8 *)(words + 4 * max);
	if (!to_device)
		memset(b->pages, 0, max * sizeof(*b->pages));
	return b;
}

/**
 * vhmm_free_ram() - free the pages of RAM that nothing came home to
 * @b: the batch, which brings pages home
 */
void vhmm_free_ram(struct vhmm_batch *b)
{
	unsigned int i;

	for (i = 0; i < b->max; i++) {
		if (b->pages[i])
			__free_page(b->pages[i]);
		b->pages[i] = NULL;
	}
}

void vhmm_batch_free(struct vhmm_batch *b)
{
	if (!b)
		return;
	vhmm_batch_free(b->evict);
	if (b->ahead)
		folio_put(b->ahead);
	if (b->pages && !vhmm_to_device(b))
		vhmm_free_ram(b);
	kvfree(b->bounce);
	vhmm_request_free(b->fill);
	vhmm_request_free(b->copy);
	kvfree(b);
}

/**
 * vhmm_can_come_home() - tell whether a source entry is a page of the device
 * @b: the batch, after migrate_vma_setup()
 * @i: the page
 *
 * Return: true if it is, and may be migrated.
 */
bool vhmm_can_come_home(const struct vhmm_batch *b, unsigned long i)
{
	unsigned long src = vhmm_entry(b->src, i);

	return src & MIGRATE_PFN_MIGRATE && src & MIGRATE_PFN_VALID &&
	       vhmm_pfn_is_ours(b->dev, page_to_pfn(migrate_pfn_to_page(src)));
}

/**
 * vhmm_has_policy() - tell whether there is a memory policy
 * @vma: a mapping that the current task allocates for
 *
 * Return: true if it is not up to the kernel which node's RAM it gets.
 */
bool vhmm_has_policy(const struct vm_area_struct *vma)
{
#ifdef CONFIG_NUMA
	return vma->vm_policy || current->mempolicy ||
	       (vma->vm_ops && vma->vm_ops->get_policy);
#else
	return false;
#endif
}

/**
 * vhmm_alloc_ram_bulk() - allocate pages of RAM for a mapping at once
 * @b: the batch, which brings pages home; receives them in @b->pages, from the
 *	start on and as far as there are any
 * @vma: the mapping
 * @gfp: how
 * @nr: how many are wanted, with those that are there already
 *
 * But for clearing them, this takes half as long as one after the other.
 * No memory policy is looked at, so that where there is one there are none.
 */
void vhmm_alloc_ram_bulk(struct vhmm_batch *b, const struct vm_area_struct *vma,
			 gfp_t gfp, unsigned long nr)
{
	if (vhmm_has_policy(vma))
		vhmm_free_ram(b);
	else
		alloc_pages_bulk(gfp, nr, b->pages);
}

/**
 * vhmm_take_ram() - give a page of a mapping a page of RAM to come home to
 * @b: the batch
 * @args: the migration
 * @i: the page
 * @gfp: how to allocate one
 * @nr: the number of pages before this one that were given one
 *
 * It is one of vhmm_alloc_ram_bulk(), if there is one.
 *
 * Return: true, or false without memory.
 */
bool vhmm_take_ram(struct vhmm_batch *b, struct migrate_vma *args,
		   unsigned long i, gfp_t gfp, unsigned long nr)
{
	struct folio *folio;

	if (b->pages[nr])
		folio = page_folio(b->pages[nr]);
	else
		folio = vma_alloc_folio(gfp, 0, args->vma,
					args->start + i * PAGE_SIZE);
	if (!folio)
		return false;
	b->pages[nr] = NULL;
	args->dst[i] = vhmm_ram_destination(folio);
	return true;
}

/**
 * vhmm_drop_destination() - leave a page where it is after all
 * @dst: destination entries
 * @i: the page; where there is one destination for it, that is unlocked and
 *	freed, and a large folio with all of its pages
 *
 * Only before migrate_vma_pages().
 */
void vhmm_drop_destination(unsigned long *dst, unsigned long i)
{
	struct folio *folio;

	if (vhmm_is_large(dst))
		i = 0;
	if (!dst[i])
		return;
	folio = page_folio(migrate_pfn_to_page(dst[i]));
	dst[i] = 0;
	folio_unlock(folio);
	folio_put(folio);
}

/**
 * vhmm_count_moved() - count the pages that moved
 * @src: source entries after migrate_vma_pages()
 * @dst: destination entries
 * @nr: number of entries
 *
 * Return: how many pages are at their destination.
 */
unsigned long vhmm_count_moved(const unsigned long *src,
			       const unsigned long *dst, unsigned long nr)
{
	unsigned long i, moved = 0;

	for (i = 0; i < nr; i++)
		moved += vhmm_has_moved(src, dst, i);
	return moved;
}

/**
 * vhmm_mark_moved() - mark the device frames that pages have moved away from
 * @src: source entries after migrate_vma_pages(), and before finalize unlocks
 *	the folios
 * @dst: destination entries
 * @nr: number of entries
 *
 * A frame is free only when its last reference is dropped. Until then it can
 * be found by its number and locked, though it has no contents and no charge.
 */
void vhmm_mark_moved(const unsigned long *src, const unsigned long *dst,
		     unsigned long nr)
{
	unsigned long i, run = vhmm_is_large(dst) ? nr : 1;
	struct vhmm_device *dev;
	struct page *page;

	for (i = 0; i < nr; i += run) {
		page = vhmm_has_moved(src, dst, i) ? migrate_pfn_to_page(src[i]) :
						     NULL;
		if (!page || !is_device_private_page(page))
			continue;
		dev = vhmm_pgmap_device(page_pgmap(page));
		set_bit(vhmm_page_frame(dev, page), dev->memory.moved);
	}
}

/**
 * vhmm_check_src() - check that no source entry was changed
 * @dev: the device
 * @src: the entries, just before migrate_vma_pages()
 * @seen: the same after migrate_vma_setup()
 * @nr: number of entries
 *
 * The contract forbids it (S5 in docs/driver.md). Comparing 4 KiB costs
 * nothing beside copying 2 MiB, and makes the contract testable.
 */
void vhmm_check_src(struct vhmm_device *dev, const unsigned long *src,
		    const unsigned long *seen, unsigned long nr)
{
	unsigned long i;

	for (i = 0; i < nr; i++) {
		if (src[i] != seen[i])
			vhmm_count(dev, VHMM_SRC_CHANGED, 1);
	}
}

/**
 * vhmm_copy_to_ram_begin() - have device pages copied into the RAM chosen for them
 * @dev: the device
 * @r: a request with room for @nr frames
 * @src: source entries: device pages, locked and unmapped
 * @dst: destination entries: a locked page of RAM, or 0
 * @nr: number of entries
 */
void vhmm_copy_to_ram_begin(struct vhmm_device *dev, struct vhmm_request *r,
			    const unsigned long *src, const unsigned long *dst,
			    unsigned long nr)
{
	/* A large folio goes to a large folio. */
	unsigned int run = vhmm_is_large(dst) ? nr : 1;
	unsigned long i;

	vhmm_request_start(r, VIRTIO_HMM_OP_FROM_DEVICE);
	for (i = 0; i < nr; i += run) {
		struct page *page = vhmm_entry_page(dst, i);

		if (page)
			vhmm_request_add_range(r, vhmm_page_frame(dev, vhmm_entry_page(src, i)),
					       page, run, i);
	}
	if (r->nr_frames)
		vhmm_request_submit(r);
}

/**
 * vhmm_copy_to_ram_end() - wait for the copy, and drop what failed
 * @r: the request of vhmm_copy_to_ram_begin()
 * @dst: the destination entries
 *
 * The status of each frame is checked. Where a copy failed the destination is
 * dropped, so that what is in it is never seen.
 */
void vhmm_copy_to_ram_end(struct vhmm_request *r, unsigned long *dst)
{
	unsigned long i;
	int ret;

	if (!r->nr_frames)
		return;
	ret = vhmm_request_wait(r);
	if (vhmm_request_ok(r))
		return;
	for (i = 0; i < r->nr_frames; i++) {
		if (ret || !vhmm_request_frame_ok(r, i))
			vhmm_drop_destination(dst, r->slots[i]);
	}
}

/**
 * vhmm_copy_to_ram() - copy device pages into the RAM chosen for them
 * @dev: the device
 * @r: a request with room for @nr frames
 * @src: source entries: device pages, locked and unmapped
 * @dst: destination entries: a locked page of RAM, or 0
 * @nr: number of entries
 *
 * Begins and ends at once.
 */
void vhmm_copy_to_ram(struct vhmm_device *dev, struct vhmm_request *r,
		      const unsigned long *src, unsigned long *dst,
		      unsigned long nr)
{
	vhmm_copy_to_ram_begin(dev, r, src, dst, nr);
	vhmm_copy_to_ram_end(r, dst);
}

/**
 * vhmm_settle() - count the frames that were copied or filled for nothing
 * @r: the request, which was waited for, or has no frames; is empty afterwards
 * @src: source entries after migrate_vma_pages(), or before the same frames are
 *	copied once more
 * @dst: destination entries
 *
 * Return: the outcome of the request.
 */
int vhmm_settle(struct vhmm_request *r, const unsigned long *src,
		const unsigned long *dst)
{
	unsigned int i, op, nr = r->nr_frames, unused = 0;

	r->nr_frames = 0;
	if (!nr || r->error)
		return nr ? r->error : 0;
	op = le32_to_cpu(r->req->op) - VIRTIO_HMM_OP_TO_DEVICE;
	if (vhmm_is_large(dst) && vhmm_has_moved(src, dst, 0))
		return 0;
	for (i = 0; i < nr; i++)
		unused += vhmm_request_frame_ok(r, i) &&
			  !vhmm_has_moved(src, dst, r->slots[i]);
	vhmm_count(r->dev, VHMM_TO_DEVICE_UNUSED + op, unused);
	return 0;
}
