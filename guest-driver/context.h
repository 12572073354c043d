/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Who uses device memory, how much of it, and since when.
 */
#ifndef VHMM_CONTEXT_H
#define VHMM_CONTEXT_H

#include <linux/list.h>
#include <linux/workqueue.h>

struct mm_struct;
struct vhmm_device;

/**
 * struct vhmm_context - an open /dev/hmmN and the device memory it uses
 * @dev: the device; the open file holds a reference, and frames keep it too
 * @mm: the address space that opened it, kept by mmgrab(); to use it takes
 *	mmget_not_zero()
 * @users: the open file, and each of its allocations
 * @node: in &struct vhmm_memory.contexts
 * @lru: its allocations that can be evicted, the least recently used first
 * @nr_frames: frames in use
 * @nr_reserved: frames that were promised to its migrations
 * @limit: what both may add up to; ULONG_MAX for no limit
 * @release_work: frees it, since the last user may be in atomic context
 *
 * All but the first two are under &struct vhmm_memory.lock. Outlives the file
 * while frames are in use, as in a child of the process.
 */
struct vhmm_context {
	struct vhmm_device *dev;
	struct mm_struct *mm;
	unsigned int users;
	struct list_head node;
	struct list_head lru;
	unsigned long nr_frames;
	unsigned long nr_reserved;
	unsigned long limit;
	struct work_struct release_work;
};

/**
 * struct vhmm_allocation - the frames that one window of a migration got
 * @ctx: whose they are
 * @node: in &struct vhmm_context.lru; empty while a migration or an eviction
 *	works on it
 * @start: the addresses that the window had: a hint, for mremap() moves pages
 * @end: end of these
 * @first: no frame is below this one
 * @last: no frame is above this one
 * @users: its frames, and who works on it
 * @nr_reserved: frames that were promised and not yet taken
 *
 * The unit of eviction. Under &struct vhmm_memory.lock but for the constant
 * @ctx, @start and @end.
 */
struct vhmm_allocation {
	struct vhmm_context *ctx;
	struct list_head node;
	unsigned long start;
	unsigned long end;
	unsigned long first;
	unsigned long last;
	unsigned int users;
	unsigned int nr_reserved;
};

struct vhmm_context *vhmm_context_alloc(struct vhmm_device *dev,
					struct mm_struct *mm);
void vhmm_context_put(struct vhmm_context *ctx);

struct vhmm_allocation *vhmm_allocation_begin(struct vhmm_context *ctx,
					      unsigned long start,
					      unsigned long end);
void vhmm_allocation_end(struct vhmm_allocation *a);
void vhmm_allocation_put(struct vhmm_allocation *a);
bool vhmm_allocation_reserve(struct vhmm_allocation *a, unsigned long nr);
unsigned long vhmm_allocation_left(struct vhmm_allocation *a);
void vhmm_allocation_charge(struct vhmm_allocation *a, unsigned long frame,
			    unsigned int nr);
void vhmm_allocation_uncharge(struct vhmm_device *dev, unsigned long frame,
			      unsigned int nr);
void vhmm_allocations_used(struct vhmm_device *dev, const unsigned long *frames,
			   unsigned int nr);

#endif /* VHMM_CONTEXT_H */
