// SPDX-License-Identifier: GPL-2.0-only
/*
 * A CPU touched a page that is in device memory: bring it home.
 */
#include <linux/gfp.h>
#include <linux/ktime.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/pagemap.h>

#include "batch.h"
#include "device.h"
#include "request.h"
#include "trace.h"

/* A frame whose copy fails while the device works is asked for so often. */
#define VHMM_FAULT_COPIES	3

/*
 * Give pages of RAM to what is to come home and has none yet: one large folio
 * for a large folio, else small ones.
 */
static bool vhmm_fault_alloc(struct migrate_vma *args)
{
	bool large = vhmm_is_large(args->src);
	unsigned long i, nr = large ? 1 : args->npages;

	for (i = 0; i < nr; i++) {
		struct folio *folio;

		if (args->dst[i] || !(args->src[i] & MIGRATE_PFN_VALID) ||
		    !(args->src[i] & MIGRATE_PFN_MIGRATE))
			continue;
		/*
		 * A large folio that is faulted on cannot be split here: the
		 * fault holds a reference of its own on it. So its
		 * destination is worth reclaim and compaction.
		 */
		folio = vma_alloc_folio(large ? GFP_TRANSHUGE : GFP_HIGHUSER_MOVABLE,
					large ? HPAGE_PMD_ORDER : 0, args->vma,
					args->start + i * PAGE_SIZE);
		if (!folio)
			return false;
		args->dst[i] = vhmm_ram_destination(folio);
	}
	return true;
}

static vm_fault_t vhmm_fault_copy(struct vhmm_device *dev,
				  struct migrate_vma *args,
				  struct vhmm_request *r, unsigned long address)
{
	unsigned long i = (address - args->start) >> PAGE_SHIFT;
	unsigned int copies = 0;
	bool memory;

	do {
		memory = vhmm_fault_alloc(args);
		vhmm_copy_to_ram(dev, r, args->src, args->dst, args->npages);
		if (vhmm_entry(args->dst, i))
			return 0;
		vhmm_settle(r, args->src, args->dst);
	} while (memory && !vhmm_device_is_broken(dev) &&
		 ++copies < VHMM_FAULT_COPIES);

	/*
	 * Without memory the kernel may free some and try again. Only when the
	 * device has lost the contents is there nothing left to wait for.
	 */
	return memory ? VM_FAULT_SIGBUS : VM_FAULT_OOM;
}

static vm_fault_t vhmm_fault_range(struct vhmm_device *dev,
				   struct vm_fault *vmf,
				   struct migrate_vma *args,
				   unsigned long *seen,
				   struct vhmm_request *r)
{
	unsigned long i = (vmf->address - args->start) >> PAGE_SHIFT;
	struct vhmm_migration m;
	unsigned long moved;
	vm_fault_t ret = 0;

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
	memcpy(seen, args->src, args->npages * sizeof(*seen));
	/*
	 * Or else somebody is moving the page, or has moved it: return to the
	 * CPU, which finds it at home or faults again.
	 */
	if (vhmm_entry(args->src, i) & MIGRATE_PFN_VALID)
		ret = vhmm_fault_copy(dev, args, r, vmf->address);
	vhmm_check_src(dev, args->src, seen, args->npages);
	vhmm_migration_lap(&m, VHMM_COPY);

	migrate_vma_pages(args);
	vhmm_migration_lap(&m, VHMM_PAGES);
	moved = vhmm_count_moved(args->src, args->dst, args->npages);
	if (moved && vhmm_is_large(args->dst))
		vhmm_count(dev, VHMM_THP_TO_SYSTEM, 1);
	if (!moved && !ret)
		vhmm_count(dev, VHMM_CPU_FAULTS_RETRIED, 1);
	migrate_vma_finalize(args);
	vhmm_migration_lap(&m, VHMM_FINALIZE);
	vhmm_migration_end(&m, moved, vhmm_settle(r, args->src, args->dst));
	return ret;
}

static vm_fault_t vhmm_fault_small(struct vhmm_device *dev, struct vm_fault *vmf)
{
	unsigned long src = 0, dst = 0, seen;
	struct migrate_vma args = {
		.src = &src,
		.dst = &dst,
		.start = vmf->address & PAGE_MASK,
		.end = (vmf->address & PAGE_MASK) + PAGE_SIZE,
	};
	struct vhmm_request *r;
	vm_fault_t ret;

	r = vhmm_request_alloc(dev, 1, 1, GFP_KERNEL);
	if (!r)
		return VM_FAULT_OOM;
	ret = vhmm_fault_range(dev, vmf, &args, &seen, r);
	vhmm_request_free(r);
	return ret;
}

/* The PMD maps a large folio of ours: all of it comes home. */
static vm_fault_t vhmm_fault_large(struct vhmm_device *dev, struct vm_fault *vmf)
{
	struct migrate_vma args = {
		.start = vmf->address & HPAGE_PMD_MASK,
		.end = (vmf->address & HPAGE_PMD_MASK) + HPAGE_PMD_SIZE,
		.flags = MIGRATE_VMA_SELECT_COMPOUND,
	};
	struct vhmm_batch *b;
	vm_fault_t ret;

	b = vhmm_batch_alloc(dev, VHMM_CPU_FAULT);
	if (!b)
		return VM_FAULT_OOM;
	args.src = b->src;
	args.dst = b->dst;
	ret = vhmm_fault_range(dev, vmf, &args, b->src_seen, b->copy);
	vhmm_batch_free(b);
	return ret;
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
	else if (vmf->pte)
		ret = vhmm_fault_small(dev, vmf);
	else
		ret = vhmm_fault_large(dev, vmf);

	ns = ktime_to_ns(ktime_sub(ktime_get(), begin));
	vhmm_count_fault(dev, ns);
	if (ret & VM_FAULT_SIGBUS)
		vhmm_count(dev, VHMM_CPU_FAULTS_SIGBUS, 1);
	if (ret & VM_FAULT_OOM)
		vhmm_count(dev, VHMM_CPU_FAULTS_OOM, 1);
	trace_vhmm_cpu_fault(dev, vmf, ns, ret);
	return ret;
}
