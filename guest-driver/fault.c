// SPDX-License-Identifier: GPL-2.0-only
/*
 * A CPU touched a page that is in device memory: bring it home.
 */
#include <linux/cpuset.h>
#include <linux/gfp.h>
#include <linux/hash.h>
#include <linux/ktime.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/pagemap.h>

#include "batch.h"
#include "device.h"
#include "request.h"
#include "trace.h"

/* For how long what the last faults had is kept for the next ones. */
#define VHMM_FAULT_KEEP		HZ

/* A frame whose copy fails while the device works is asked for so often. */
#define VHMM_FAULT_COPIES	3

/*
 * Whether the kernel might have given this task the page that is left from the
 * last fault, which may have been another one's.
 */
static bool vhmm_fault_may_take(const struct page *spare,
				const struct vm_area_struct *vma)
{
	int nid = page_to_nid(spare);

	return !vhmm_has_policy(vma) && nid == numa_mem_id() &&
	       node_isset(nid, cpuset_current_mems_allowed);
}

/*
 * A page of RAM for the next fault, allocated and cleared while the device
 * copies: without reclaim, since it may come to nothing.
 */
static void vhmm_fault_alloc_spare(struct vhmm_batch *b,
				   const struct vm_area_struct *vma)
{
	if (!vhmm_is_large(b->src))
		vhmm_alloc_ram_bulk(b, vma, VHMM_SPARE_GFP & ~__GFP_RECLAIM, 1);
}

/*
 * What was touched is worth reclaim and compaction. A large folio cannot be
 * split here: the fault holds a reference on it.
 */
static bool vhmm_fault_take_ram(struct vhmm_batch *b, struct migrate_vma *args)
{
	struct folio *folio;

	if (b->pages[0] && !vhmm_fault_may_take(b->pages[0], args->vma))
		vhmm_free_ram(b);
	if (!vhmm_is_large(args->src))
		return vhmm_take_ram(b, args, 0, GFP_HIGHUSER_MOVABLE, 0);
	folio = vma_alloc_folio(GFP_TRANSHUGE, HPAGE_PMD_ORDER, args->vma,
				args->start);
	if (!folio)
		return false;
	args->dst[0] = vhmm_ram_destination(folio);
	return true;
}

/*
 * Give pages of RAM to those above the touched one, as far as there are any.
 * There can be pages of other devices as well, and holes: they stay as they are.
 */
static void vhmm_fault_around_alloc(struct vhmm_batch *b,
				    struct migrate_vma *args)
{
	unsigned long i, wanted = 0, taken = 0;

	for (i = 1; i < args->npages; i++)
		wanted += vhmm_can_come_home(b, i);
	vhmm_alloc_ram_bulk(b, args->vma, VHMM_SPARE_GFP, wanted);
	for (i = 1; i < args->npages; i++) {
		if (!vhmm_can_come_home(b, i))
			continue;
		if (!vhmm_take_ram(b, args, i, VHMM_SPARE_GFP, taken++))
			break;
	}
}

/* The page that was touched is the first; or all of a large folio was. */
static vm_fault_t vhmm_fault_copy(struct vhmm_batch *b, struct migrate_vma *args)
{
	unsigned long i, nr = vhmm_is_large(args->src) ? 1 : args->npages;
	struct vhmm_device *dev = b->dev;
	unsigned int copies = 0;

	do {
		/* Without memory the kernel may free some and try again. */
		if (!vhmm_fault_take_ram(b, args))
			return VM_FAULT_OOM;
		/* Only at first: a page that has failed is asked for alone. */
		if (!copies && nr > 1)
			vhmm_fault_around_alloc(b, args);
		vhmm_copy_to_ram_begin(dev, b->copy, args->src, args->dst,
				       args->npages);
		vhmm_fault_alloc_spare(b, args->vma);
		vhmm_copy_to_ram_end(b->copy, args->dst);
		if (args->dst[0])
			return 0;
		for (i = 1; i < nr; i++)
			vhmm_drop_destination(args->dst, i);
		vhmm_settle(b->copy, args->src, args->dst);
	} while (!vhmm_device_is_broken(dev) && ++copies < VHMM_FAULT_COPIES);

	/* The device has lost the contents: there is nothing to wait for. */
	return VM_FAULT_SIGBUS;
}

static vm_fault_t vhmm_fault_range(struct vhmm_batch *b, struct vm_fault *vmf,
				   struct migrate_vma *args)
{
	struct vhmm_device *dev = b->dev;
	struct vhmm_migration m;
	unsigned long moved;
	vm_fault_t ret = 0;

	args->src = b->src;
	args->dst = b->dst;
	args->vma = vmf->vma;
	args->pgmap_owner = dev->memory.pgmap.owner;
	args->fault_page = vmf->page;
	args->flags |= MIGRATE_VMA_SELECT_DEVICE_PRIVATE;

	vhmm_migration_begin(&m, dev, VHMM_CPU_FAULT, args->start,
			     (args->end - args->start) >> PAGE_SHIFT);
	/* It fails only for memory that could not have come to the device. */
	if (WARN_ON_ONCE(migrate_vma_setup(args)))
		return VM_FAULT_SIGBUS;
	vhmm_migration_lap(&m, VHMM_SETUP);
	if (!args->cpages) {
		vhmm_count(dev, VHMM_CPU_FAULTS_RETRIED, 1);
		vhmm_migration_end(&m, 0, 0);
		return 0;
	}
	memcpy(b->src_seen, args->src, args->npages * sizeof(*b->src_seen));
	/*
	 * Or else somebody is moving the page, or has moved it, home or to
	 * another device: return to the CPU, which finds it or faults again.
	 */
	if (vhmm_can_come_home(b, 0))
		ret = vhmm_fault_copy(b, args);
	vhmm_check_src(dev, args->src, b->src_seen, args->npages);
	vhmm_migration_lap(&m, VHMM_COPY);

	migrate_vma_pages(args);
	vhmm_migration_lap(&m, VHMM_PAGES);
	vhmm_mark_moved(args->src, args->dst, args->npages);
	moved = vhmm_count_moved(args->src, args->dst, args->npages);
	if (moved && vhmm_is_large(args->dst))
		vhmm_count(dev, VHMM_THP_TO_SYSTEM, 1);
	if (!moved && !ret)
		vhmm_count(dev, VHMM_CPU_FAULTS_RETRIED, 1);
	migrate_vma_finalize(args);
	vhmm_migration_lap(&m, VHMM_FINALIZE);
	vhmm_migration_end(&m, moved,
			   vhmm_settle(b->copy, args->src, args->dst));
	return ret;
}

/*
 * How many pages to bring home from the touched one on, which is the first.
 * Twice as many as the last time as long as a task goes up in memory: then the
 * next ones are most likely touched soon.
 */
static unsigned long vhmm_fault_window(const struct vhmm_stream *stream,
				       const struct vm_fault *vmf)
{
	unsigned long most = clamp(READ_ONCE(vhmm_fault_around), 1UL,
				   VHMM_BATCH_PAGES);
	unsigned long start = vmf->address & PAGE_MASK;
	unsigned long end = min(ALIGN(start + 1, HPAGE_PMD_SIZE),
				vmf->vma->vm_end);
	unsigned long pages = READ_ONCE(stream->pages);

	if (READ_ONCE(stream->mm) != vmf->vma->vm_mm ||
	    start - READ_ONCE(stream->next) >= pages << PAGE_SHIFT)
		return 1;
	return min3(2 * pages, most, (end - start) >> PAGE_SHIFT);
}

static void vhmm_fault_note(struct vhmm_stream *stream,
			    const struct mm_struct *mm, unsigned long start,
			    unsigned long pages)
{
	WRITE_ONCE(stream->mm, mm);
	WRITE_ONCE(stream->next, start + (pages << PAGE_SHIFT));
	WRITE_ONCE(stream->pages, pages);
}

/* What the last fault had is large enough most often. */
static struct vhmm_batch *vhmm_fault_batch(struct vhmm_device *dev,
					   struct vhmm_stream *stream,
					   unsigned int nr)
{
	struct vhmm_batch *b = xchg(&stream->batch, NULL);

	if (b && b->max >= nr)
		return b;
	vhmm_batch_free(b);
	return vhmm_batch_alloc(dev, VHMM_CPU_FAULT, nr);
}

static vm_fault_t vhmm_fault(struct vhmm_device *dev, struct vm_fault *vmf)
{
	struct vhmm_stream *stream =
		&dev->streams[hash_ptr(current, VHMM_STREAM_BITS)];
	/* A PMD maps a large folio of ours: all of it comes home. */
	bool large = !vmf->pte;
	unsigned long nr = large ? HPAGE_PMD_NR : vhmm_fault_window(stream, vmf);
	unsigned long start = vmf->address & (large ? HPAGE_PMD_MASK : PAGE_MASK);
	struct migrate_vma args = {
		.start = start,
		.end = start + (nr << PAGE_SHIFT),
		.flags = large ? MIGRATE_VMA_SELECT_COMPOUND : 0,
	};
	struct vhmm_batch *b;
	vm_fault_t ret;

	b = vhmm_fault_batch(dev, stream, nr);
	if (!b)
		return VM_FAULT_OOM;
	ret = vhmm_fault_range(b, vmf, &args);
	vhmm_batch_free(xchg(&stream->batch, b));
	if (!delayed_work_pending(&dev->trim))
		schedule_delayed_work(&dev->trim, VHMM_FAULT_KEEP);
	if (!large)
		vhmm_fault_note(stream, vmf->vma->vm_mm, start, nr);
	return ret;
}

/**
 * vhmm_fault_trim() - free the working memory that no fault has now
 * @work: of the device
 *
 * A page of RAM in it would keep its memory from being taken offline.
 */
void vhmm_fault_trim(struct work_struct *work)
{
	struct vhmm_device *dev = container_of(to_delayed_work(work),
					       struct vhmm_device, trim);
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(dev->streams); i++)
		vhmm_batch_free(xchg(&dev->streams[i].batch, NULL));
}

/**
 * vhmm_migrate_to_ram() - the migrate_to_ram callback of our pages
 * @vmf: the fault; @vmf->page is locked and referenced
 *
 * mmap_lock is held for reading. The address space may be any that maps the
 * page, as a child's after fork, and the caller may be a system call or a
 * core dump as well as a CPU fault.
 *
 * Return: 0 when the access is to be tried again, VM_FAULT_OOM, or, when the
 * contents are lost, VM_FAULT_SIGBUS.
 */
vm_fault_t vhmm_migrate_to_ram(struct vm_fault *vmf)
{
	struct vhmm_device *dev = vhmm_pgmap_device(page_pgmap(vmf->page));
	ktime_t begin = ktime_get();
	vm_fault_t ret;
	u64 ns;

	if (vhmm_device_is_broken(dev))
		ret = VM_FAULT_SIGBUS;
	else
		ret = vhmm_fault(dev, vmf);

	ns = ktime_to_ns(ktime_sub(ktime_get(), begin));
	vhmm_count_fault(dev, ns);
	if (ret & VM_FAULT_SIGBUS)
		vhmm_count(dev, VHMM_CPU_FAULTS_SIGBUS, 1);
	if (ret & VM_FAULT_OOM)
		vhmm_count(dev, VHMM_CPU_FAULTS_OOM, 1);
	trace_vhmm_cpu_fault(dev, vmf, ns, ret);
	return ret;
}
