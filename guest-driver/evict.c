// SPDX-License-Identifier: GPL-2.0-only
/*
 * Make room in device memory: bring home what was used least recently.
 *
 * The victim is the open file with the most frames, the one that asks counted
 * with what it asks for. So a process that wants more than there is evicts
 * itself, and one that is content with its share is left alone.
 */
#include <linux/delay.h>
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>

#include "batch.h"
#include "context.h"
#include "device.h"
#include "trace.h"

/* So many allocations may resist eviction before the request gives up. */
#define VHMM_EVICT_TRIES	64
/* Between two looks for a victim when everything is in use by a migration. */
#define VHMM_EVICT_PAUSE_US	1000

/*
 * The least recently used allocation of a context; but not from the window
 * that the room is for, whose pages would only change places.
 */
static struct vhmm_allocation *
vhmm_lru_first(const struct vhmm_context *ctx, const struct vhmm_allocation *a)
{
	struct vhmm_allocation *victim;

	list_for_each_entry(victim, &ctx->lru, node) {
		if (ctx != a->ctx || victim->start >= a->end ||
		    victim->end <= a->start)
			return victim;
	}
	return NULL;
}

static struct vhmm_allocation *vhmm_lru_take(struct vhmm_allocation *victim)
{
	if (victim) {
		list_del_init(&victim->node);
		victim->users++;
	}
	return victim;
}

/*
 * Take the next allocation to evict off its list, for vhmm_allocation_end().
 * @limited tells whether what stands in the way is the limit of the file.
 */
static struct vhmm_allocation *
vhmm_victim_get(const struct vhmm_allocation *a, unsigned long nr, bool *limited)
{
	struct vhmm_memory *mem = &a->ctx->dev->memory;
	struct vhmm_allocation *victim = NULL, *first;
	unsigned long own, most = 0, has;
	struct vhmm_context *ctx;

	spin_lock_irq(&mem->lock);
	own = a->ctx->nr_frames + a->ctx->nr_reserved + nr - a->nr_reserved;
	*limited = own > a->ctx->limit;
	list_for_each_entry(ctx, &mem->contexts, node) {
		has = ctx == a->ctx ? own : ctx->nr_frames + ctx->nr_reserved;
		if (has <= most || (*limited && ctx != a->ctx))
			continue;
		first = vhmm_lru_first(ctx, a);
		if (first) {
			victim = first;
			most = has;
		}
	}
	vhmm_lru_take(victim);
	spin_unlock_irq(&mem->lock);
	return victim;
}

/*
 * Through the address space that migrated it there: so large folios can be
 * split, and the page tables cannot go away. Only a trylock, so that nobody
 * is held up by what another process does with its own memory.
 */
static unsigned long vhmm_evict_mapped(struct vhmm_batch *b,
				       const struct vhmm_allocation *victim)
{
	struct mm_struct *mm = victim->ctx->mm;
	unsigned long moved = 0;

	if (!mmget_not_zero(mm))
		return 0;
	if (mmap_read_trylock(mm)) {
		moved = vhmm_migrate_home(b, mm, victim->start, victim->end);
		mmap_read_unlock(mm);
	}
	mmput(mm);
	return moved;
}

/* Wherever they are mapped: moved by mremap(), or left to a child. */
static unsigned long vhmm_evict_frames(struct vhmm_batch *b,
				       struct vhmm_allocation *victim)
{
	struct vhmm_memory *mem = &b->dev->memory;
	unsigned long start, last, moved = 0;
	bool left;

	spin_lock_irq(&mem->lock);
	left = victim->users > 1;
	start = ALIGN_DOWN(victim->first, HPAGE_PMD_NR);
	last = victim->last;
	spin_unlock_irq(&mem->lock);
	for (; left && start <= last; start += HPAGE_PMD_NR)
		moved += vhmm_evacuate_frames(b, victim, start);
	return moved;
}

static unsigned long vhmm_evict(struct vhmm_batch *b,
				struct vhmm_allocation *victim)
{
	struct vhmm_device *dev = b->dev;
	unsigned long moved;

	moved = vhmm_evict_mapped(b, victim);
	moved += vhmm_evict_frames(b, victim);
	trace_vhmm_evict(dev, b->trigger, victim, moved);
	vhmm_allocation_end(victim);
	return moved;
}

/**
 * vhmm_evict_owner() - bring the pages home that went with a frame
 * @b: working memory
 * @frame: the frame
 *
 * For a large folio that RAM has no large page for: here it can be split.
 */
void vhmm_evict_owner(struct vhmm_batch *b, unsigned long frame)
{
	struct vhmm_memory *mem = &b->dev->memory;
	struct vhmm_allocation *a;

	spin_lock_irq(&mem->lock);
	a = mem->owner[frame];
	if (a)
		a->users++;
	spin_unlock_irq(&mem->lock);
	if (a) {
		vhmm_evict_mapped(b, a);
		vhmm_allocation_put(a);
	}
}

/*
 * Count the pages of the window that have to get a frame. Where it cannot be
 * known without trying, as for the copied pages of a file, they are not.
 */
static unsigned long vhmm_count_homeless(struct vhmm_batch *b, struct mm_struct *mm)
{
	const struct vhmm_allocation *a = b->allocation;
	struct vm_area_struct *vma = NULL;
	u8 *residency = (u8 *)b->pages;
	unsigned long addr, nr = 0;

	mmap_assert_locked(mm);

	vhmm_residency(b->dev, mm, a->start, a->end, residency, NULL);
	for (addr = a->start; addr < a->end; addr += PAGE_SIZE) {
		if (!vma || addr >= vma->vm_end)
			vma = vma_lookup(mm, addr);
		if (!vma || !vma_is_anonymous(vma) ||
		    !vhmm_vma_can_migrate(vma, true))
			continue;
		switch (residency[(addr - a->start) >> PAGE_SHIFT]) {
		case VIRTIO_HMM_RESIDENCY_NONE:
		case VIRTIO_HMM_RESIDENCY_ZERO:
			nr += vhmm_vma_fills_holes(vma);
			break;
		case VIRTIO_HMM_RESIDENCY_RAM:
		case VIRTIO_HMM_RESIDENCY_OTHER_DEVICE:
			nr++;
		}
	}
	return nr;
}

/* Whether what others have may become free, or can be evicted later. */
static bool vhmm_is_worth_waiting(const struct vhmm_allocation *a)
{
	const struct vhmm_memory *mem = &a->ctx->dev->memory;

	return READ_ONCE(mem->nr_used) + READ_ONCE(mem->nr_reserved) >
	       READ_ONCE(a->ctx->nr_frames) + READ_ONCE(a->ctx->nr_reserved);
}

static bool vhmm_give_up(const struct vhmm_device *dev)
{
	return fatal_signal_pending(current) || vhmm_device_is_broken(dev) ||
	       READ_ONCE(dev->memory.closed);
}

/*
 * Evict until @nr frames are reserved for the batch, or nothing more can be
 * evicted.
 */
static void vhmm_evict_for(struct vhmm_batch *b, unsigned long nr)
{
	unsigned long deadline = jiffies + msecs_to_jiffies(vhmm_timeout_ms);
	struct vhmm_allocation *victim;
	unsigned int tries = 0;
	bool limited;

	while (!vhmm_allocation_reserve(b->allocation, nr) &&
	       !vhmm_give_up(b->dev) && tries < VHMM_EVICT_TRIES) {
		victim = vhmm_victim_get(b->allocation, nr, &limited);
		if (victim) {
			tries = vhmm_evict(b->evict, victim) ? 0 : tries + 1;
			cond_resched();
			continue;
		}
		if (limited || time_after(jiffies, deadline) ||
		    !vhmm_is_worth_waiting(b->allocation))
			return;
		usleep_range(VHMM_EVICT_PAUSE_US, 2 * VHMM_EVICT_PAUSE_US);
	}
}

/**
 * vhmm_make_room() - see to it that a window can migrate to the device
 * @b: the batch, with the allocation of the window
 * @mm: the address space; its lock is not held, as eviction takes others'
 *
 * As far as it can be had, room is reserved for all pages of the window that
 * are not there yet.
 */
void vhmm_make_room(struct vhmm_batch *b, struct mm_struct *mm)
{
	struct vhmm_allocation *a = b->allocation;
	unsigned long nr = (a->end - a->start) >> PAGE_SHIFT;

	if (vhmm_allocation_reserve(a, nr))
		return;
	if (!b->evict)
		b->evict = vhmm_batch_alloc(b->dev, VHMM_EVICTION, VHMM_BATCH_PAGES);
	if (!b->evict)
		return;
	if (mmap_read_lock_killable(mm))
		return;
	nr = vhmm_count_homeless(b, mm);
	mmap_read_unlock(mm);
	vhmm_evict_for(b, nr);
}

/**
 * vhmm_release_all() - bring home all that a file has migrated
 * @ctx: the open file
 * @arg: receives how much came home, and how much did not
 *
 * Return: 0, -EBUSY when some pages could not be had before the deadline of a
 * request, -EINTR, -EIO or -ENOMEM.
 */
int vhmm_release_all(struct vhmm_context *ctx, struct virtio_hmm_release *arg)
{
	unsigned long deadline = jiffies + msecs_to_jiffies(vhmm_timeout_ms);
	struct vhmm_memory *mem = &ctx->dev->memory;
	struct vhmm_allocation *victim;
	struct vhmm_batch *b;
	unsigned long moved;
	int ret = 0;

	b = vhmm_batch_alloc(ctx->dev, VHMM_RELEASE, VHMM_BATCH_PAGES);
	if (!b)
		return -ENOMEM;
	for (;;) {
		spin_lock_irq(&mem->lock);
		arg->remaining = ctx->nr_frames;
		victim = vhmm_lru_take(list_first_entry_or_null(&ctx->lru,
								struct vhmm_allocation, node));
		spin_unlock_irq(&mem->lock);
		moved = victim ? vhmm_evict(b, victim) : 0;
		arg->released += moved;
		if (!arg->remaining)
			break;
		if (vhmm_device_is_broken(ctx->dev))
			ret = -EIO;
		else if (signal_pending(current))
			ret = -EINTR;
		else if (time_after(jiffies, deadline))
			ret = -EBUSY;
		if (ret)
			break;
		if (!moved)
			usleep_range(VHMM_EVICT_PAUSE_US, 2 * VHMM_EVICT_PAUSE_US);
	}
	vhmm_batch_free(b);
	return ret;
}
