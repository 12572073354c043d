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

static vm_fault_t vhmm_fault_copy(struct vhmm_device *dev,
				  struct migrate_vma *args)
{
	unsigned int copies = 0;
	struct vhmm_request *r;
	struct folio *folio;

	r = vhmm_request_alloc(dev, 1, 1, GFP_KERNEL);
	if (!r)
		return VM_FAULT_OOM;

	do {
		folio = vma_alloc_folio(GFP_HIGHUSER_MOVABLE, 0, args->vma,
					args->start);
		if (!folio)
			break;
		folio_lock(folio);
		args->dst[0] = migrate_pfn(folio_pfn(folio));
		vhmm_copy_to_ram(dev, r, args->src, args->dst, 1);
	} while (!args->dst[0] && !vhmm_device_is_broken(dev) &&
		 ++copies < VHMM_FAULT_COPIES);

	vhmm_request_free(r);
	if (args->dst[0])
		return 0;
	/*
	 * Without memory the kernel may free some and try again. Only when the
	 * device has lost the contents is there nothing left to wait for.
	 */
	return folio ? VM_FAULT_SIGBUS : VM_FAULT_OOM;
}

static vm_fault_t vhmm_fault(struct vhmm_device *dev, struct vm_fault *vmf)
{
	unsigned long src = 0, dst = 0, seen;
	struct migrate_vma args = {
		.vma = vmf->vma,
		.src = &src,
		.dst = &dst,
		.start = vmf->address & PAGE_MASK,
		.end = (vmf->address & PAGE_MASK) + PAGE_SIZE,
		.pgmap_owner = dev,
		.fault_page = vmf->page,
		.flags = MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
	};
	vm_fault_t ret = 0;

	/* It fails only for memory that could not have come to the device. */
	if (WARN_ON_ONCE(migrate_vma_setup(&args)))
		return VM_FAULT_SIGBUS;
	/*
	 * Somebody else is moving the page, or has moved it: return to the CPU,
	 * which finds it at home or faults again.
	 */
	if (!args.cpages || !(src & MIGRATE_PFN_VALID)) {
		vhmm_count(dev, VHMM_CPU_FAULTS_RETRIED, 1);
	} else {
		seen = src;
		ret = vhmm_fault_copy(dev, &args);
		vhmm_check_src(dev, &src, &seen, 1);
	}
	if (!args.cpages)
		return ret;

	migrate_vma_pages(&args);
	if (dst && (src & MIGRATE_PFN_MIGRATE))
		vhmm_count(dev, VHMM_PAGES_FAULTED, 1);
	else if (dst)
		vhmm_count(dev, VHMM_CPU_FAULTS_RETRIED, 1);
	migrate_vma_finalize(&args);
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
	else
		ret = vhmm_fault(dev, vmf);

	ns = ktime_to_ns(ktime_sub(ktime_get(), begin));
	vhmm_count(dev, VHMM_CPU_FAULTS, 1);
	vhmm_count(dev, VHMM_FAULT_NS, ns);
	if (ret & VM_FAULT_SIGBUS)
		vhmm_count(dev, VHMM_CPU_FAULTS_SIGBUS, 1);
	if (ret & VM_FAULT_OOM)
		vhmm_count(dev, VHMM_CPU_FAULTS_OOM, 1);
	trace_vhmm_cpu_fault(dev, vmf, ns, ret);
	return ret;
}
