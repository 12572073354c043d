// SPDX-License-Identifier: GPL-2.0-only
/*
 * Accounting of device memory: to the open files, and by the time of its last
 * use.
 */
#include <linux/mm.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include "context.h"
#include "device.h"

static void vhmm_context_release(struct work_struct *work)
{
	struct vhmm_context *ctx =
		container_of(work, struct vhmm_context, release_work);

	mmdrop(ctx->mm);
	kfree(ctx);
}

/**
 * vhmm_context_alloc() - account for an open file
 * @dev: the device
 * @mm: the address space that opens it
 *
 * Return: the context, ended by vhmm_context_put(); or NULL.
 */
struct vhmm_context *vhmm_context_alloc(struct vhmm_device *dev,
					struct mm_struct *mm)
{
	struct vhmm_memory *mem = &dev->memory;
	struct vhmm_context *ctx;

	ctx = kzalloc_obj(*ctx);
	if (!ctx)
		return NULL;
	ctx->dev = dev;
	mmgrab(mm);
	ctx->mm = mm;
	ctx->users = 1;
	INIT_LIST_HEAD(&ctx->lru);
	ctx->limit = ULONG_MAX;
	INIT_WORK(&ctx->release_work, vhmm_context_release);

	spin_lock_irq(&mem->lock);
	list_add_tail(&ctx->node, &mem->contexts);
	spin_unlock_irq(&mem->lock);
	return ctx;
}

static void vhmm_context_put_locked(struct vhmm_context *ctx)
{
	lockdep_assert_held(&ctx->dev->memory.lock);

	if (--ctx->users)
		return;
	list_del(&ctx->node);
	vhmm_queue_release(&ctx->release_work);
}

void vhmm_context_put(struct vhmm_context *ctx)
{
	struct vhmm_memory *mem = &ctx->dev->memory;

	spin_lock_irq(&mem->lock);
	vhmm_context_put_locked(ctx);
	spin_unlock_irq(&mem->lock);
}

/**
 * vhmm_allocation_begin() - prepare to take frames for a window
 * @ctx: whose they will be
 * @start: the window
 * @end: its end
 *
 * Return: the allocation, for vhmm_allocation_end(); or NULL.
 */
struct vhmm_allocation *vhmm_allocation_begin(struct vhmm_context *ctx,
					      unsigned long start,
					      unsigned long end)
{
	struct vhmm_memory *mem = &ctx->dev->memory;
	struct vhmm_allocation *a;

	a = kzalloc_obj(*a);
	if (!a)
		return NULL;
	a->ctx = ctx;
	INIT_LIST_HEAD(&a->node);
	a->start = start;
	a->end = end;
	a->first = ULONG_MAX;
	a->users = 1;

	spin_lock_irq(&mem->lock);
	ctx->users++;
	spin_unlock_irq(&mem->lock);
	return a;
}

static void vhmm_allocation_unuse(struct vhmm_allocation *a, unsigned int nr)
{
	struct vhmm_context *ctx = a->ctx;

	lockdep_assert_held(&ctx->dev->memory.lock);

	a->users -= nr;
	if (a->users)
		return;
	list_del(&a->node);
	kfree(a);
	vhmm_context_put_locked(ctx);
}

/**
 * vhmm_allocation_end() - be done with an allocation
 * @a: from vhmm_allocation_begin(), or taken off its list; not ours any more
 *
 * Frames that are in use can be evicted from now on, and were used last now.
 */
void vhmm_allocation_end(struct vhmm_allocation *a)
{
	struct vhmm_context *ctx = a->ctx;
	struct vhmm_memory *mem = &ctx->dev->memory;

	spin_lock_irq(&mem->lock);
	mem->nr_reserved -= a->nr_reserved;
	ctx->nr_reserved -= a->nr_reserved;
	a->nr_reserved = 0;
	list_move_tail(&a->node, &ctx->lru);
	vhmm_allocation_unuse(a, 1);
	spin_unlock_irq(&mem->lock);
}

/**
 * vhmm_allocation_put() - let go of an allocation that others may work on
 * @a: one whose @users was raised; not ours any more
 */
void vhmm_allocation_put(struct vhmm_allocation *a)
{
	struct vhmm_memory *mem = &a->ctx->dev->memory;

	spin_lock_irq(&mem->lock);
	vhmm_allocation_unuse(a, 1);
	spin_unlock_irq(&mem->lock);
}

/**
 * vhmm_allocation_left() - tell how many frames an allocation can get
 * @a: the allocation; the lock of the memory is held
 *
 * Return: those reserved for it and those that nobody has, within the limit.
 */
unsigned long vhmm_allocation_left(struct vhmm_allocation *a)
{
	const struct vhmm_context *ctx = a->ctx;
	const struct vhmm_memory *mem = &ctx->dev->memory;
	unsigned long own = ctx->nr_frames + ctx->nr_reserved;

	lockdep_assert_held(&mem->lock);

	return a->nr_reserved +
	       min(mem->nr_frames - mem->nr_used - mem->nr_reserved,
		   ctx->limit - min(ctx->limit, own));
}

/**
 * vhmm_allocation_reserve() - keep frames from others
 * @a: the allocation that will take them
 * @nr: how many it shall have in reserve
 *
 * Return: true if there are so many; else it got all there are.
 */
bool vhmm_allocation_reserve(struct vhmm_allocation *a, unsigned long nr)
{
	struct vhmm_context *ctx = a->ctx;
	struct vhmm_memory *mem = &ctx->dev->memory;
	unsigned long more;

	spin_lock_irq(&mem->lock);
	more = min(nr, vhmm_allocation_left(a));
	more -= min(more, a->nr_reserved);
	a->nr_reserved += more;
	ctx->nr_reserved += more;
	mem->nr_reserved += more;
	spin_unlock_irq(&mem->lock);
	return a->nr_reserved >= nr;
}

/**
 * vhmm_allocation_charge() - account for frames that are now in use
 * @a: whose they are; the lock of the memory is held
 * @frame: the first
 * @nr: how many
 */
void vhmm_allocation_charge(struct vhmm_allocation *a, unsigned long frame,
			    unsigned int nr)
{
	struct vhmm_context *ctx = a->ctx;
	struct vhmm_memory *mem = &ctx->dev->memory;
	unsigned int reserved = min(nr, a->nr_reserved);
	unsigned int i;

	lockdep_assert_held(&mem->lock);

	for (i = 0; i < nr; i++)
		mem->owner[frame + i] = a;
	a->first = min(a->first, frame);
	a->last = max(a->last, frame + nr - 1);
	a->users += nr;
	a->nr_reserved -= reserved;
	ctx->nr_reserved -= reserved;
	mem->nr_reserved -= reserved;
	ctx->nr_frames += nr;
	mem->nr_used += nr;
}

/**
 * vhmm_allocation_uncharge() - account for frames that are free again
 * @dev: the device; the lock of its memory is held
 * @frame: the first; all are of one allocation
 * @nr: how many
 */
void vhmm_allocation_uncharge(struct vhmm_device *dev, unsigned long frame,
			      unsigned int nr)
{
	struct vhmm_memory *mem = &dev->memory;
	struct vhmm_allocation *a = mem->owner[frame];

	lockdep_assert_held(&mem->lock);

	memset(mem->owner + frame, 0, nr * sizeof(*mem->owner));
	mem->nr_used -= nr;
	a->ctx->nr_frames -= nr;
	vhmm_allocation_unuse(a, nr);
}

/**
 * vhmm_allocations_used() - note that frames were used now
 * @dev: the device
 * @frames: their numbers; frames that have changed hands meanwhile do no harm
 * @nr: how many
 */
void vhmm_allocations_used(struct vhmm_device *dev, const unsigned long *frames,
			   unsigned int nr)
{
	struct vhmm_memory *mem = &dev->memory;
	struct vhmm_allocation *a, *last = NULL;
	unsigned int i;

	spin_lock_irq(&mem->lock);
	for (i = 0; i < nr; i++) {
		a = mem->owner[frames[i]];
		/* One that is not on the list is being filled or evicted. */
		if (a && a != last && !list_empty(&a->node))
			list_move_tail(&a->node, &a->ctx->lru);
		last = a;
	}
	spin_unlock_irq(&mem->lock);
}
