// SPDX-License-Identifier: GPL-2.0-only
/*
 * Migration by request of a process: a range of its memory to the device, or
 * back to RAM. docs/driver.md walks through the steps.
 */
#include <linux/delay.h>
#include <linux/hugetlb_inline.h>
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/pagemap.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "batch.h"
#include "context.h"
#include "device.h"
#include "request.h"
#include "trace.h"

/* Between two attempts on pages that only raced; long enough for a fault. */
#define VHMM_RETRY_MIN_US	20
#define VHMM_RETRY_MAX_US	200

static bool vhmm_unresolved(u8 outcome)
{
	return outcome == VHMM_PENDING || outcome == VHMM_SKIP(BUSY);
}

/* Give all pages that have no outcome yet this one. */
static void vhmm_resolve(u8 *outcome, unsigned long start, unsigned long end,
			 u8 value)
{
	unsigned long i;

	for (i = 0; i < (end - start) >> PAGE_SHIFT; i++) {
		if (vhmm_unresolved(outcome[i]))
			outcome[i] = value;
	}
}

/*
 * Tell whether page @i shall go to the device: one that setup has locked,
 * unmapped and checked for pins, or a hole. Pages of files come this far in
 * private mappings, and would be refused only after the copy. On the second
 * pass, for what is on other devices, holes and our own pages come along.
 */
static bool vhmm_wanted(const struct vhmm_batch *b, const u8 *outcome,
			unsigned long i)
{
	struct page *page;

	if (!(vhmm_entry(b->src, i) & MIGRATE_PFN_MIGRATE) ||
	    !vhmm_unresolved(outcome[i]))
		return false;
	page = vhmm_entry_page(b->src, i);
	if (b->from_peer)
		return page && !vhmm_pfn_is_ours(b->dev, page_to_pfn(page));
	return page ? folio_test_anon(page_folio(page)) : b->fill_holes;
}

/* Give a large folio, or a hole as large, a large folio of device memory. */
static bool vhmm_alloc_large(struct vhmm_batch *b, u8 *outcome)
{
	struct folio *folio;

	if (!vhmm_is_large(b->src) || !vhmm_wanted(b, outcome, 0))
		return false;
	folio = vhmm_large_alloc(b->allocation);
	if (!folio) {
		vhmm_count(b->dev, VHMM_THP_FALLBACK, 1);
		return false;
	}
	b->dst[0] = migrate_pfn(folio_pfn(folio)) | MIGRATE_PFN_COMPOUND;
	return true;
}

/*
 * The kernel takes all of a large hole or nothing: it uses all destinations
 * without looking whether there is one.
 */
static void vhmm_keep_hole_whole(struct vhmm_batch *b, unsigned long nr,
				 u8 *outcome, u8 value)
{
	unsigned long i, have = 0;

	if (!vhmm_is_large(b->src) || b->src[0] & MIGRATE_PFN_VALID)
		return;
	for (i = 0; i < nr; i++)
		have += !!vhmm_entry(b->dst, i);
	if (!have || have == nr)
		return;
	for (i = 0; i < nr; i++)
		vhmm_drop_destination(b->dst, i);
	memset(outcome, value, nr);
}

/* Give every wanted page a device page, as far as there are any. */
static void vhmm_alloc_small(struct vhmm_batch *b, unsigned long nr, u8 *outcome)
{
	unsigned int wanted = 0, got, used = 0;
	unsigned long i;

	for (i = 0; i < nr; i++)
		wanted += vhmm_wanted(b, outcome, i);
	got = vhmm_frames_alloc(b->allocation, b->pages, wanted);

	for (i = 0; i < nr; i++) {
		if (!vhmm_wanted(b, outcome, i))
			continue;
		if (used == got)
			outcome[i] = VHMM_SKIP(NO_MEMORY);
		else
			b->dst[i] = migrate_pfn(page_to_pfn(b->pages[used++]));
	}
	/* A large folio is split and may go in part. */
	vhmm_keep_hole_whole(b, nr, outcome, VHMM_SKIP(NO_MEMORY));
}

/*
 * Ask the device to copy what is to move, or to fill it with zeroes where
 * there was never a page (or the zero page): a hole has nothing to copy, and
 * its frame may hold what somebody else left there.
 */
static void vhmm_alloc_and_submit(struct vhmm_batch *b, unsigned long nr,
				  u8 *outcome)
{
	unsigned long i, run;

	if (!vhmm_alloc_large(b, outcome))
		vhmm_alloc_small(b, nr, outcome);

	if (b->from_peer)
		vhmm_peer_fetch(b, nr, outcome);

	vhmm_request_start(b->copy, VIRTIO_HMM_OP_TO_DEVICE);
	vhmm_request_start(b->fill, VIRTIO_HMM_OP_FILL);
	/* A large folio comes from one, from a hole, or from bounce pages. */
	run = vhmm_is_large(b->dst) && !b->from_peer ? nr : 1;
	for (i = 0; i < nr; i += run) {
		struct page *spage = b->from_peer ? b->bounce[i] :
						    vhmm_entry_page(b->src, i);
		struct page *dpage = vhmm_entry_page(b->dst, i);

		if (dpage)
			vhmm_request_add_range(spage ? b->copy : b->fill,
					       vhmm_page_frame(b->dev, dpage),
					       spage, run, i);
	}
	if (b->copy->nr_frames)
		vhmm_request_submit(b->copy);
	if (b->fill->nr_frames)
		vhmm_request_submit(b->fill);
}

static void vhmm_wait_and_check(struct vhmm_batch *b, struct vhmm_request *r,
				u8 *outcome)
{
	bool large = vhmm_is_large(b->dst);
	unsigned int i;
	int ret;

	if (!r->nr_frames)
		return;
	ret = vhmm_request_wait(r);
	if (vhmm_request_ok(r))
		return;
	for (i = 0; i < r->nr_frames; i++) {
		if (!ret && vhmm_request_frame_ok(r, i))
			continue;
		vhmm_drop_destination(b->dst, r->slots[i]);
		if (large)
			memset(outcome, VHMM_SKIP(COPY_FAILED), r->nr_frames);
		else
			outcome[r->slots[i]] = VHMM_SKIP(COPY_FAILED);
	}
}

/*
 * Only migrate_vma_pages() has the last word on a page: it may still race.
 * Returns how many moved.
 */
static unsigned long vhmm_account(struct vhmm_batch *b, unsigned long nr,
				  u8 *outcome)
{
	unsigned long i, moved = 0, filled = 0;

	for (i = 0; i < nr; i++) {
		if (!vhmm_has_moved(b->src, b->dst, i))
			continue;
		if (vhmm_entry(b->src_seen, i) & MIGRATE_PFN_VALID) {
			outcome[i] = VHMM_MOVED;
			moved++;
		} else {
			outcome[i] = VHMM_FILLED;
			filled++;
		}
	}
	vhmm_count(b->dev, VHMM_PAGES_FILLED, filled);
	if (b->from_peer)
		vhmm_count(b->dev, VHMM_PAGES_FROM_PEER, moved);
	if (vhmm_is_large(b->dst) && moved + filled)
		vhmm_count(b->dev, vhmm_to_device(b) ? VHMM_THP_TO_DEVICE :
						       VHMM_THP_TO_SYSTEM, 1);
	return moved;
}

/* A large folio that is not at hand is not worth the wait. */
static struct folio *vhmm_alloc_ram_large(struct vm_area_struct *vma,
					  unsigned long addr)
{
	return vma_alloc_folio(GFP_TRANSHUGE_LIGHT, HPAGE_PMD_ORDER, vma, addr);
}

static bool vhmm_take_ram_large(struct vhmm_batch *b, struct migrate_vma *args)
{
	struct folio *folio = b->ahead ?:
			      vhmm_alloc_ram_large(args->vma, args->start);

	b->ahead = NULL;
	if (!folio)
		return false;
	b->dst[0] = vhmm_ram_destination(folio);
	return true;
}

/*
 * Most kernels clear a page that they allocate, and a large folio for as long
 * as its copy takes. So what the next window most likely wants is allocated
 * while the device copies this one.
 */
static void vhmm_alloc_ahead(struct vhmm_batch *b, struct migrate_vma *args)
{
	unsigned long end = min(b->end, args->vma->vm_end);
	unsigned long left = end - min(end, args->end);

	if (vhmm_is_large(b->dst)) {
		if (!b->ahead && left >= HPAGE_PMD_SIZE)
			b->ahead = vhmm_alloc_ram_large(args->vma, args->end);
		return;
	}
	vhmm_alloc_ram_bulk(b, args->vma, VHMM_SPARE_GFP,
			    min(left >> PAGE_SHIFT, b->copy->nr_frames));
}

/*
 * Holes are reported in this direction as well: they stay. So do the pages of
 * other devices.
 */
static bool vhmm_wanted_home(const struct vhmm_batch *b, const u8 *outcome,
			     unsigned long i)
{
	return vhmm_unresolved(outcome[i]) && vhmm_can_come_home(b, i);
}

static void vhmm_alloc_and_copy_to_ram(struct vhmm_batch *b,
				       struct migrate_vma *args, u8 *outcome)
{
	unsigned long i, wanted = 0, taken = 0;

	if (vhmm_is_large(b->src) && !vhmm_wanted_home(b, outcome, 0))
		return;
	if (vhmm_is_large(b->src) && vhmm_take_ram_large(b, args))
		goto copy;
	if (vhmm_is_large(b->src))
		vhmm_count(b->dev, VHMM_THP_FALLBACK, 1);

	for (i = 0; i < args->npages; i++)
		wanted += vhmm_wanted_home(b, outcome, i);
	vhmm_alloc_ram_bulk(b, args->vma, GFP_HIGHUSER_MOVABLE, wanted);
	for (i = 0; i < args->npages; i++) {
		if (!vhmm_wanted_home(b, outcome, i))
			continue;
		if (!vhmm_take_ram(b, args, i, GFP_HIGHUSER_MOVABLE, taken++))
			outcome[i] = VHMM_SKIP(NO_MEMORY);
		/* Without the first, none of a large folio can move. */
		if (vhmm_is_large(b->src) && !b->dst[0]) {
			vhmm_resolve(outcome, args->start, args->end,
				     VHMM_SKIP(NO_MEMORY));
			return;
		}
	}
copy:
	for (i = 0; i < args->npages; i++) {
		if (vhmm_entry(b->dst, i))
			outcome[i] = VHMM_SKIP(COPY_FAILED);
	}
	vhmm_copy_to_ram_begin(b->dev, b->copy, b->src, b->dst, args->npages);
	vhmm_alloc_ahead(b, args);
	vhmm_copy_to_ram_end(b->copy, b->dst);
	/* Until vhmm_account() says otherwise. */
	for (i = 0; i < args->npages; i++) {
		if (vhmm_entry(b->dst, i))
			outcome[i] = VHMM_PENDING;
	}
}

/* Say why the pages that are still where they were did not move. */
static void vhmm_classify(struct vhmm_batch *b, struct vm_area_struct *vma,
			  unsigned long start, unsigned long end, u8 *outcome)
{
	unsigned long i, nr = (end - start) >> PAGE_SHIFT;
	bool to_device = vhmm_to_device(b);
	u8 *residency = (u8 *)b->dst;
	unsigned int here;

	for (i = 0; i < nr; i++) {
		if (vhmm_unresolved(outcome[i]))
			break;
	}
	if (i == nr)
		return;

	/* The entries have served: the frames can have their place. */
	here = vhmm_residency(b->dev, vma->vm_mm, start, end, residency, b->src);
	if (to_device)
		vhmm_allocations_used(b->dev, b->src, here);
	for (; i < nr; i++) {
		if (!vhmm_unresolved(outcome[i]))
			continue;
		outcome[i] = VHMM_SKIP(BUSY);
		switch (residency[i]) {
		case VIRTIO_HMM_RESIDENCY_DEVICE:
			if (to_device)
				outcome[i] = VHMM_SKIP(ALREADY);
			break;
		case VIRTIO_HMM_RESIDENCY_MOVING:
			break;
		case VIRTIO_HMM_RESIDENCY_NONE:
		case VIRTIO_HMM_RESIDENCY_ZERO:
		case VIRTIO_HMM_RESIDENCY_RAM:
			outcome[i] = to_device ?
				VHMM_SKIPPED + vhmm_why_in_ram(b->dev, vma,
							       start + i * PAGE_SIZE) :
				VHMM_SKIP(ALREADY);
			break;
		case VIRTIO_HMM_RESIDENCY_SWAPPED:
			outcome[i] = to_device ? VHMM_SKIP(SWAPPED) :
						 VHMM_SKIP(ALREADY);
			break;
		case VIRTIO_HMM_RESIDENCY_OTHER_DEVICE:
			outcome[i] = to_device ? VHMM_SKIP(OTHER_DEVICE) :
						 VHMM_SKIP(ALREADY);
			break;
		}
	}
}

/*
 * A PMD can move as one: if the range is one, and (a hole has no folio that
 * says so) the process did not ask for small pages.
 */
static bool vhmm_may_be_large(struct vm_area_struct *vma, unsigned long start,
			      unsigned long end)
{
	return vhmm_large_folios && thp_migration_supported() &&
	       IS_ALIGNED(start, HPAGE_PMD_SIZE) &&
	       end - start == HPAGE_PMD_SIZE &&
	       !(vma->vm_flags & VM_NOHUGEPAGE);
}

static void vhmm_migrate_vma(struct vhmm_batch *b, struct vm_area_struct *vma,
			     unsigned long start, unsigned long end,
			     bool large, u8 *outcome)
{
	struct migrate_vma args = {
		.vma = vma,
		.src = b->src,
		.dst = b->dst,
		.start = start,
		.end = end,
		.pgmap_owner = b->dev->memory.pgmap.owner,
		.flags = vhmm_to_device(b) && !b->from_peer ?
			 MIGRATE_VMA_SELECT_SYSTEM :
			 MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
	};
	struct vhmm_migration m;
	unsigned long moved = 0;
	int error;

	b->fill_holes = vhmm_vma_fills_holes(vma);
	if (large && vhmm_may_be_large(vma, start, end))
		args.flags |= MIGRATE_VMA_SELECT_COMPOUND;
	vhmm_migration_begin(&m, b->dev, b->trigger, start,
			     (end - start) >> PAGE_SHIFT);
	error = migrate_vma_setup(&args);
	vhmm_migration_lap(&m, VHMM_SETUP);
	if (error) {
		vhmm_resolve(outcome, start, end, VHMM_SKIP(UNSUPPORTED));
		vhmm_migration_end(&m, 0, error);
		return;
	}
	/* With nothing collected nothing is held. */
	if (args.cpages) {
		memcpy(b->src_seen, b->src, args.npages * sizeof(*b->src));
		if (vhmm_to_device(b)) {
			vhmm_alloc_and_submit(b, args.npages, outcome);
			vhmm_wait_and_check(b, b->copy, outcome);
			vhmm_wait_and_check(b, b->fill, outcome);
			vhmm_keep_hole_whole(b, args.npages, outcome,
					     VHMM_SKIP(COPY_FAILED));
			vhmm_peer_done(b);
		} else {
			vhmm_alloc_and_copy_to_ram(b, &args, outcome);
		}
		vhmm_check_src(b->dev, b->src, b->src_seen, args.npages);
		vhmm_migration_lap(&m, VHMM_COPY);
		migrate_vma_pages(&args);
		vhmm_migration_lap(&m, VHMM_PAGES);
		vhmm_mark_moved(b->src, b->dst, args.npages);
		moved = vhmm_account(b, args.npages, outcome);
		migrate_vma_finalize(&args);
		vhmm_migration_lap(&m, VHMM_FINALIZE);
		error = vhmm_settle(b->copy, b->src, b->dst);
		if (b->fill)
			error = vhmm_settle(b->fill, b->src, b->dst) ?: error;
	}
	vhmm_migration_end(&m, moved, error);
	vhmm_classify(b, vma, start, end, outcome);
}

/**
 * vhmm_vma_can_migrate() - tell whether a kind of memory migrates
 * @vma: the mapping
 * @to_device: the direction
 *
 * A page that KSM merged must not come to the device: KSM goes on to read it
 * by its frame. Nor may migrate_vma_setup() see it: KSM can have lost track of
 * this mapping (it forgets a page that it finds migrating), and what setup
 * unmapped would never be mapped again. A page can be merged at any time, so
 * the whole mapping stays.
 *
 * Return: true if it is a kind that migrate_vma takes, and can move that way.
 */
bool vhmm_vma_can_migrate(struct vm_area_struct *vma, bool to_device)
{
	return !(vma->vm_flags & (VM_SPECIAL | VM_SHARED)) &&
	       !is_vm_hugetlb_page(vma) && !vma_is_dax(vma) &&
	       !(to_device && vma->vm_flags & VM_MERGEABLE);
}

/* One attempt on a window of at most a batch, which several VMAs may share. */
static void vhmm_migrate_window(struct vhmm_batch *b, struct mm_struct *mm,
				unsigned long start, unsigned long end,
				bool large)
{
	unsigned long addr = start;

	mmap_assert_locked(mm);

	while (addr < end) {
		u8 *outcome = b->outcome + ((addr - start) >> PAGE_SHIFT);
		struct vm_area_struct *vma = find_vma(mm, addr);
		unsigned long next = end;

		if (!vma || vma->vm_start > addr) {
			if (vma)
				next = min(end, vma->vm_start);
			vhmm_resolve(outcome, addr, next, VHMM_SKIP(UNMAPPED));
		} else {
			next = min(end, vma->vm_end);
			if (vhmm_vma_can_migrate(vma, vhmm_to_device(b)))
				vhmm_migrate_vma(b, vma, addr, next, large,
						 outcome);
			else
				vhmm_resolve(outcome, addr, next, vhmm_to_device(b) ?
					     VHMM_SKIP(UNSUPPORTED) :
					     VHMM_SKIP(ALREADY));
		}
		addr = next;
	}
}

static bool vhmm_has(const struct vhmm_batch *b, unsigned long nr, u8 outcome)
{
	return memchr(b->outcome, outcome, nr);
}

/* Pages with this outcome are to be tried again. */
static bool vhmm_again(struct vhmm_batch *b, unsigned long nr, u8 outcome)
{
	unsigned long i;
	bool any = false;

	for (i = 0; i < nr; i++) {
		if (b->outcome[i] == outcome) {
			b->outcome[i] = VHMM_PENDING;
			any = true;
		}
	}
	return any;
}

/* From RAM first, and then from the memory of other devices. */
static void vhmm_migrate_attempt(struct vhmm_batch *b, struct mm_struct *mm,
				 unsigned long start, unsigned long end,
				 bool large)
{
	unsigned long nr = (end - start) >> PAGE_SHIFT;

	vhmm_migrate_window(b, mm, start, end, large);
	if (vhmm_to_device(b) && vhmm_again(b, nr, VHMM_SKIP(OTHER_DEVICE))) {
		b->from_peer = true;
		vhmm_migrate_window(b, mm, start, end, large);
		b->from_peer = false;
	}
}

/**
 * vhmm_migrate_home() - bring a range of at most a batch home, at one attempt
 * @b: working memory, of a batch that goes to RAM
 * @mm: an address space, its lock held for reading
 * @start: the range, within one PMD
 * @end: its end
 *
 * Return: how many pages came home.
 */
unsigned long vhmm_migrate_home(struct vhmm_batch *b, struct mm_struct *mm,
				unsigned long start, unsigned long end)
{
	unsigned long i, moved = 0, nr = (end - start) >> PAGE_SHIFT;

	memset(b->outcome, VHMM_PENDING, nr);
	vhmm_migrate_window(b, mm, start, end, true);
	for (i = 0; i < nr; i++)
		moved += b->outcome[i] == VHMM_MOVED;
	return moved;
}

/*
 * Migrate one window, and try again on pages that only raced: setup does not
 * wait for a locked page, and finds one that is on its way to an LRU list
 * referenced. The lock is dropped in between, so that who holds them up can
 * go on. Where device memory has run out, room is made first.
 */
static int vhmm_migrate_batch(struct vhmm_batch *b, struct mm_struct *mm,
			      unsigned long start, unsigned long end, bool evict)
{
	unsigned long nr = (end - start) >> PAGE_SHIFT;
	unsigned int attempt;

	memset(b->outcome, VHMM_PENDING, nr);
	for (attempt = 0;; attempt++) {
		if (evict)
			vhmm_make_room(b, mm);
		if (mmap_read_lock_killable(mm))
			return -EINTR;
		/* A large folio that stayed is tried again in small pages. */
		vhmm_migrate_attempt(b, mm, start, end, !attempt);
		mmap_read_unlock(mm);
		if (vhmm_device_is_broken(b->dev))
			return -EIO;
		if (READ_ONCE(b->dev->asleep) && vhmm_to_device(b))
			return -EAGAIN;
		if (attempt == vhmm_retries)
			return 0;
		if (!(evict && vhmm_again(b, nr, VHMM_SKIP(NO_MEMORY))) &&
		    !vhmm_has(b, nr, VHMM_SKIP(BUSY)))
			return 0;
		vhmm_count(b->dev, VHMM_MIGRATE_RETRIES, 1);
		usleep_range(VHMM_RETRY_MIN_US, VHMM_RETRY_MAX_US);
	}
}

static int vhmm_migrate_one(struct vhmm_batch *b, struct vhmm_context *ctx,
			    unsigned long start, unsigned long end, bool evict)
{
	int ret;

	if (!vhmm_to_device(b))
		return vhmm_migrate_batch(b, ctx->mm, start, end, false);

	b->allocation = vhmm_allocation_begin(ctx, start, end);
	if (!b->allocation)
		return -ENOMEM;
	ret = vhmm_migrate_batch(b, ctx->mm, start, end, evict);
	vhmm_allocation_end(b->allocation);
	return ret;
}

static void vhmm_tally(struct vhmm_batch *b, unsigned long nr,
		       struct virtio_hmm_migrate *arg)
{
	unsigned long i;

	for (i = 0; i < nr; i++) {
		unsigned int reason = b->outcome[i] - VHMM_SKIPPED;

		if (b->outcome[i] == VHMM_MOVED) {
			arg->moved++;
		} else if (b->outcome[i] == VHMM_FILLED) {
			arg->filled++;
		} else if (!WARN_ON_ONCE(reason >= VIRTIO_HMM_SKIP_NR)) {
			arg->skipped[reason]++;
			vhmm_count(b->dev, VHMM_SKIPPED_ALREADY + reason, 1);
		}
	}
	arg->done += nr << PAGE_SHIFT;
}

/**
 * vhmm_migrate_range() - migrate a range of a process
 * @ctx: the open file; its address space is that of the caller
 * @arg: the range and direction, checked; what was done is added to it, and the
 *	range is gone on with from there
 * @trigger: what it is counted as, which also says the direction
 *
 * Works in batches of an aligned PMD. Signals are looked at in between.
 *
 * Return: 0, -EINTR, -ENOMEM, -EIO, -ENODEV, -EAGAIN when it has to go on after
 * vhmm_wait_awake(), or -EFAULT when part of the range is not mapped; @arg
 * tells how far it came.
 */
int vhmm_migrate_range(struct vhmm_context *ctx, struct virtio_hmm_migrate *arg,
		       enum vhmm_trigger trigger)
{
	bool to_device = trigger == VHMM_IOCTL_TO_DEVICE;
	bool evict = to_device && !(arg->flags & VIRTIO_HMM_MIGRATE_NO_EVICT);
	unsigned long addr = arg->start + arg->done;
	unsigned long end = arg->start + arg->length;
	struct vhmm_device *dev = ctx->dev;
	struct vhmm_batch *b;
	int ret = 0;

	b = vhmm_batch_alloc(dev, trigger, min(arg->length >> PAGE_SHIFT,
					       VHMM_BATCH_PAGES));
	if (!b)
		return -ENOMEM;

	b->end = end;
	trace_vhmm_migrate_begin(dev, trigger, addr, end);
	while (addr < end) {
		unsigned long next = min(ALIGN(addr + 1, HPAGE_PMD_SIZE), end);

		/* Not before the first batch: a call always gets on. */
		if (addr != arg->start && signal_pending(current))
			ret = -EINTR;
		else if (vhmm_device_is_broken(dev))
			ret = -EIO;
		else if (READ_ONCE(dev->closing) && to_device)
			ret = -ENODEV;
		else
			ret = vhmm_migrate_one(b, ctx, addr, next, evict);
		if (ret)
			break;
		vhmm_tally(b, (next - addr) >> PAGE_SHIFT, arg);
		addr = next;
		cond_resched();
	}
	if (!ret && arg->skipped[VIRTIO_HMM_SKIP_UNMAPPED])
		ret = -EFAULT;
	trace_vhmm_migrate_end(dev, trigger, arg, ret);
	vhmm_batch_free(b);
	return ret;
}

/* One mapping, until nothing of it is on the device. */
static int vhmm_release_mapping(struct vhmm_context *ctx,
				struct virtio_hmm_release *arg,
				unsigned long start, unsigned long end)
{
	unsigned long deadline = jiffies + msecs_to_jiffies(vhmm_timeout_ms);
	u64 left;
	int ret;

	for (;;) {
		struct virtio_hmm_migrate migrate = {
			.start = start,
			.length = end - start,
			.direction = VIRTIO_HMM_TO_SYSTEM,
		};

		ret = vhmm_migrate_range(ctx, &migrate, VHMM_RELEASE);
		arg->released += migrate.moved;
		left = migrate.skipped[VIRTIO_HMM_SKIP_BUSY] +
		       migrate.skipped[VIRTIO_HMM_SKIP_NO_MEMORY] +
		       migrate.skipped[VIRTIO_HMM_SKIP_COPY_FAILED];
		/* Somebody may have unmapped part of it meanwhile. */
		if ((ret && ret != -EFAULT) || !left)
			break;
		ret = -EBUSY;
		if (time_after(jiffies, deadline))
			break;
		if (msleep_interruptible(1)) {
			ret = -EINTR;
			break;
		}
	}
	arg->remaining += left;
	return ret == -EFAULT ? 0 : ret;
}

/**
 * vhmm_release_range() - bring home what of a range is on the device
 * @ctx: the open file; its address space is that of the caller
 * @arg: the range; receives what was done
 *
 * Unlike vhmm_migrate_range() it does not leave pages that are busy.
 *
 * Return: 0, -EBUSY when some pages could not be had before the deadline of a
 * request, -EINTR, -ENOMEM or -EIO.
 */
int vhmm_release_range(struct vhmm_context *ctx, struct virtio_hmm_release *arg)
{
	unsigned long addr = arg->start, end = addr + arg->length, next;
	struct vm_area_struct *vma;
	int ret = 0;

	while (!ret && addr < end) {
		if (mmap_read_lock_killable(ctx->mm))
			return -EINTR;
		vma = find_vma(ctx->mm, addr);
		if (vma) {
			addr = max(addr, vma->vm_start);
			next = min(end, vma->vm_end);
		}
		mmap_read_unlock(ctx->mm);
		if (!vma || addr >= end)
			break;
		ret = vhmm_release_mapping(ctx, arg, addr, next);
		addr = next;
	}
	return ret;
}
