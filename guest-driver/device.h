/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The state of one device, and what the files of the driver offer each other.
 */
#ifndef VHMM_DEVICE_H
#define VHMM_DEVICE_H

#include <linux/atomic.h>
#include <linux/kref.h>
#include <linux/memremap.h>
#include <linux/miscdevice.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/percpu.h>
#include <linux/rwsem.h>
#include <linux/spinlock.h>
#include <linux/userfaultfd_k.h>
#include <linux/virtio.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "compat.h"
#include "counters.h"
#include "queue.h"
#include "virtio_hmm_abi.h"
#include "uapi/virtio_hmm.h"

struct vhmm_allocation;
struct vhmm_batch;
struct vhmm_context;

/* The specification allows 1 to 16 copy queues. */
#define VHMM_MAX_COPY_QUEUES	16

/**
 * struct vhmm_memory - the device's private memory, as the kernel sees it
 * @pgmap: its struct pages; an index into them is a device frame number
 * @resource: the physical address range that was reserved for @pgmap, NULL
 *	when there is none
 * @lock: protects changes of the fields below, which evacuation and guesses
 *	read without it. Taken in folio_free(), so possibly under a page-table
 *	lock or with interrupts off: they are always off while it is held
 * @used: one bit per frame, set while the frame is allocated
 * @moved: one bit per frame in use, set when its page has moved away and the
 *	frame is about to be free; of a large folio, only the bit of the first.
 *	Without @lock: set under the lock of the folio, cleared when it is freed
 * @nr_frames: number of frames, constant
 * @nr_used: number of bits set in @used
 * @nr_reserved: frames that are free, but promised to a migration
 * @owner: for each frame in use, the allocation it belongs to
 * @contexts: all &struct vhmm_context of the device
 * @whole: one bit per block of 2 MiB, set while none of its frames is in use
 * @partial: one bit per block, set while some are in use and some are not
 * @in_use: for each block, how many of its frames are in use
 * @nr_blocks: number of blocks, constant
 * @closed: no more frames are given out
 * @module_held: the module was pinned because frames outlive the device's
 *	contents, see vhmm_memory_lost()
 * @orphaned: the device is gone; the last frame to be freed ends the memory
 * @empty: woken when @nr_used drops to zero
 * @release_work: ends orphaned memory
 *
 * Lives as long as its &struct vhmm_device. @pgmap holds no reference on the
 * module: memunmap_pages(), at the latest in the driver's remove, waits until
 * the last page is free. Orphaned memory ends in @release_work instead, while
 * @module_held.
 */
struct vhmm_memory {
	struct dev_pagemap pgmap;
	struct resource *resource;
	spinlock_t lock; /* see @lock above */
	unsigned long *used;
	unsigned long *moved;
	unsigned long nr_frames;
	unsigned long nr_used;
	unsigned long nr_reserved;
	struct vhmm_allocation **owner;
	struct list_head contexts;
	unsigned long *whole;
	unsigned long *partial;
	u16 *in_use;
	unsigned long nr_blocks;
	bool closed;
	bool module_held;
	bool orphaned;
	wait_queue_head_t empty;
	struct work_struct release_work;
};

#define VHMM_STREAM_BITS	6

/**
 * struct vhmm_stream - CPU faults that go up in memory
 * @mm: the address space; only ever compared
 * @next: where the next fault is expected, if they go on
 * @pages: how many pages the last one asked for
 * @batch: working memory for the next one, with a page of RAM for it if there
 *	was one; NULL while a fault has it, at first and after a while
 *
 * A guess, by which the pages to come are brought home in time. Read and
 * written without a lock: threads that share one cost each other their guesses.
 * @batch is exchanged.
 */
struct vhmm_stream {
	const struct mm_struct *mm;
	unsigned long next;
	unsigned long pages;
	struct vhmm_batch *batch;
};

/**
 * struct vhmm_device - one virtio-hmm device
 * @ref: held by the bound driver, by each open file, and by orphaned memory
 * @vdev: the virtio device; valid until @gone
 * @id: N in /dev/hmmN
 * @misc: the device node
 * @use: held for reading by every ioctl that touches the device or its memory,
 *	for writing to set @gone. Outermost: taken before mmap_lock
 * @gone: the driver was unbound; under @use
 * @closing: unbinding has begun; new migrations to the device are refused
 * @broken: the device missed a deadline or was lost; set once, never cleared
 * @reset_lock: serializes the one reset of a broken device; only the locks of
 *	queues and of the memory are inside
 * @dma_stopped: that reset was done, so the device touches no memory any more;
 *	under @reset_lock
 * @memory: device memory
 * @asleep: the system sleeps or is about to: new migrations to the device wait
 * @awake: woken when @asleep ends
 * @pm_nb: hears of it
 * @evacuation: set aside, since unbinding cannot fail for want of memory; under
 *	@evacuation_lock
 * @evacuation_lock: outermost, but for @use, which is not held with it
 * @control: the control queue
 * @copy: the copy queues
 * @nr_copy: number of @copy in use, constant
 * @generation: of the memory's contents, from the configuration space
 * @uuid: of the memory, from the configuration space
 * @streams: of the tasks that fault, by hash
 * @trim: frees what @streams keep for the next faults
 * @next_cookie: the cookie of the next request
 * @counters: see counters.h
 * @debugfs: the directory of this device
 */
struct vhmm_device {
	struct kref ref;
	struct virtio_device *vdev;
	int id;
	struct miscdevice misc;

	struct rw_semaphore use;
	bool gone;
	bool closing;
	bool broken;
	struct mutex reset_lock; /* see @reset_lock above */
	bool dma_stopped;

	struct vhmm_memory memory;
	bool asleep;
	wait_queue_head_t awake;
	struct notifier_block pm_nb;

	struct vhmm_batch *evacuation;
	struct mutex evacuation_lock; /* see @evacuation_lock above */
	struct vhmm_queue control;
	struct vhmm_queue copy[VHMM_MAX_COPY_QUEUES];
	unsigned int nr_copy;
	u64 generation;
	u8 uuid[16];
	struct vhmm_stream streams[1 << VHMM_STREAM_BITS];
	struct delayed_work trim;
	atomic64_t next_cookie;

	struct vhmm_counters __percpu *counters;
	struct dentry *debugfs;
};

extern unsigned int vhmm_timeout_ms;
extern unsigned int vhmm_poll_us;
extern unsigned int vhmm_retries;
extern unsigned int vhmm_fault_around;
extern bool vhmm_large_folios;

/* main.c */
void vhmm_device_get(struct vhmm_device *dev);
void vhmm_device_put(struct vhmm_device *dev);
void vhmm_device_break(struct vhmm_device *dev, const char *why);
int vhmm_queues_find(struct vhmm_device *dev);
void vhmm_queues_del(struct vhmm_device *dev);

static inline void vhmm_count(struct vhmm_device *dev, unsigned int counter,
			      u64 n)
{
	this_cpu_add(dev->counters->value[counter], n);
}

static inline bool vhmm_device_is_broken(const struct vhmm_device *dev)
{
	return READ_ONCE(dev->broken);
}

/* memory.c */
int vhmm_memory_init(struct vhmm_device *dev, u64 size);
void vhmm_memory_exit(struct vhmm_device *dev);
void vhmm_memory_close(struct vhmm_device *dev);
void vhmm_memory_open(struct vhmm_device *dev);
void vhmm_memory_lost(struct vhmm_device *dev);
unsigned long vhmm_memory_used(struct vhmm_device *dev);
unsigned int vhmm_frames_alloc(struct vhmm_allocation *a, struct page **pages,
			       unsigned int nr);
struct folio *vhmm_large_alloc(struct vhmm_allocation *a);
void vhmm_queue_release(struct work_struct *work);
int vhmm_memory_setup_workqueue(void);
void vhmm_memory_destroy_workqueue(void);

static inline struct vhmm_device *vhmm_pgmap_device(struct dev_pagemap *pgmap)
{
	return container_of(pgmap, struct vhmm_device, memory.pgmap);
}

static inline unsigned long vhmm_first_pfn(const struct vhmm_device *dev)
{
	return PHYS_PFN(dev->memory.pgmap.range.start);
}

/*
 * The PFN of a private page is no physical address: all that may be done with
 * it is to turn it into the number of the device's frame.
 */
static inline u64 vhmm_page_frame(const struct vhmm_device *dev,
				  const struct page *page)
{
	return page_to_pfn(page) - vhmm_first_pfn(dev);
}

static inline bool vhmm_pfn_is_ours(const struct vhmm_device *dev,
				    unsigned long pfn)
{
	return pfn >= vhmm_first_pfn(dev) &&
	       pfn - vhmm_first_pfn(dev) < dev->memory.nr_frames;
}

/* fault.c */
vm_fault_t vhmm_migrate_to_ram(struct vm_fault *vmf);
void vhmm_fault_trim(struct work_struct *work);

/* evacuate.c */
bool vhmm_evacuate(struct vhmm_device *dev, unsigned long timeout);
unsigned long vhmm_evacuate_frames(struct vhmm_batch *b,
				   const struct vhmm_allocation *a,
				   unsigned long start);

/* power.c */
int vhmm_power_init(struct vhmm_device *dev);
void vhmm_power_exit(struct vhmm_device *dev);
int vhmm_wait_awake(struct vhmm_device *dev);
int vhmm_freeze(struct virtio_device *vdev);
int vhmm_restore(struct virtio_device *vdev);
int vhmm_reset_prepare(struct virtio_device *vdev);
int vhmm_reset_done(struct virtio_device *vdev);
void vhmm_shutdown(struct virtio_device *vdev);

/* migrate.c */
int vhmm_migrate_range(struct vhmm_context *ctx, struct virtio_hmm_migrate *arg,
		       enum vhmm_trigger trigger);
int vhmm_release_range(struct vhmm_context *ctx, struct virtio_hmm_release *arg);
unsigned long vhmm_migrate_home(struct vhmm_batch *b, struct mm_struct *mm,
				unsigned long start, unsigned long end);
bool vhmm_vma_can_migrate(struct vm_area_struct *vma, bool to_device);

/* peer.c */
void vhmm_peer_fetch(struct vhmm_batch *b, unsigned long nr, u8 *outcome);
void vhmm_peer_done(struct vhmm_batch *b);

/* evict.c */
void vhmm_evict_owner(struct vhmm_batch *b, unsigned long frame);
void vhmm_make_room(struct vhmm_batch *b, struct mm_struct *mm);
int vhmm_release_all(struct vhmm_context *ctx, struct virtio_hmm_release *arg);

/*
 * Whether holes of a mapping can become device pages. Those that userfaultfd
 * watches cannot: the kernel leaves them to who watches.
 */
static inline bool vhmm_vma_fills_holes(struct vm_area_struct *vma)
{
	return vma_is_anonymous(vma) && !userfaultfd_missing(vma);
}

/* residency.c */
unsigned int vhmm_residency(struct vhmm_device *dev, struct mm_struct *mm,
			    unsigned long start, unsigned long end,
			    u8 *residency, unsigned long *frames);
enum virtio_hmm_skip vhmm_why_in_ram(struct vhmm_device *dev,
				     struct vm_area_struct *vma,
				     unsigned long addr);

/* chardev.c */
int vhmm_chardev_register(struct vhmm_device *dev);
void vhmm_chardev_unregister(struct vhmm_device *dev);

#endif /* VHMM_DEVICE_H */
