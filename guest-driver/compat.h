/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The names of the newest kernel, for the older ones that the driver builds
 * for: 6.12 and later. Each guard cites the release that changed something.
 */
#ifndef VHMM_COMPAT_H
#define VHMM_COMPAT_H

#include <linux/gfp.h>
#include <linux/memremap.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/version.h>
#include <linux/virtio.h>

#define VHMM_KERNEL_BEFORE(major, minor) \
	(KERNEL_VERSION(major, minor, 0) > LINUX_VERSION_CODE)

/* 7.0: allocate an object by its type. */
#ifndef kzalloc_obj
#define kmalloc_obj(object)	kmalloc(sizeof(object), GFP_KERNEL)
#define kzalloc_obj(object)	kzalloc(sizeof(object), GFP_KERNEL)
#endif

/*
 * 6.19: leaf entries of page tables that are not present are softleaf_t, by
 * whatever level they are found on.
 */
#if !VHMM_KERNEL_BEFORE(6, 19)
#include <linux/leafops.h>
#else
#include <linux/swapops.h>
#define softleaf_t				swp_entry_t
#define softleaf_from_pte(pte)			pte_to_swp_entry(pte)
#define softleaf_from_pmd(pmd)			pmd_to_swp_entry(pmd)
#define softleaf_to_pfn(entry)			swp_offset_pfn(entry)
#define softleaf_is_swap(entry)			(!non_swap_entry(entry))
#define softleaf_is_migration(entry)		is_migration_entry(entry)
#define softleaf_is_device_private(entry)	is_device_private_entry(entry)
#define softleaf_is_device_exclusive(entry)	is_device_exclusive_entry(entry)
#endif

/*
 * 6.19: large folios of device memory. Before, huge pages are split on their
 * way to the device: without this flag no entry is ever that of a large folio.
 */
#ifndef MIGRATE_PFN_COMPOUND
#define MIGRATE_PFN_COMPOUND		0
#define MIGRATE_VMA_SELECT_COMPOUND	0
#endif

/*
 * 6.19: dev_pagemap_ops::page_free() became folio_free(), and a device page is
 * told its pagemap and its order when it is given out.
 */
#if !VHMM_KERNEL_BEFORE(6, 19)
#define VHMM_FOLIO_FREE(callback)	.folio_free = callback
#define VHMM_DEFINE_FOLIO_FREE(callback)
#else
#define VHMM_FOLIO_FREE(callback)	.page_free = callback##_page
#define VHMM_DEFINE_FOLIO_FREE(callback)		\
	static void callback##_page(struct page *page)	\
	{						\
		callback(page_folio(page));		\
	}

static inline void vhmm_device_page_init(struct page *page,
					 struct dev_pagemap *pgmap,
					 unsigned int order)
{
	WARN_ON_ONCE(order);
	zone_device_page_init(page);
}

#define zone_device_page_init vhmm_device_page_init

static inline void zone_device_folio_init(struct folio *folio,
					  struct dev_pagemap *pgmap,
					  unsigned int order)
{
	zone_device_page_init(&folio->page, pgmap, order);
}
#endif

/* 6.15: a page's pagemap is found through its folio. */
#if VHMM_KERNEL_BEFORE(6, 15)
static inline struct dev_pagemap *page_pgmap(const struct page *page)
{
	return page->pgmap;
}

/* 6.15: device pages by a list of their numbers, which may have gaps. */
static inline int migrate_device_pfns(unsigned long *src_pfns,
				      unsigned long npages)
{
	unsigned long i, nr;

	for (i = 0; i < npages; i += nr) {
		unsigned long start = src_pfns[i];

		for (nr = 1; i + nr < npages; nr++) {
			if (src_pfns[i + nr] != start + nr)
				break;
		}
		migrate_device_range(src_pfns + i, start, nr);
	}
	return 0;
}
#endif

/*
 * 6.15: the virtio bus tells drivers that the system goes down. Before, it took
 * no part in that, and the core told them itself.
 */
#if !VHMM_KERNEL_BEFORE(6, 15)
#define VHMM_SHUTDOWN_CALLBACK	.shutdown = vhmm_shutdown
#else
#define VHMM_SHUTDOWN_CALLBACK	.driver.shutdown = vhmm_driver_shutdown

void vhmm_shutdown(struct virtio_device *vdev);

static inline void vhmm_driver_shutdown(struct device *dev)
{
	vhmm_shutdown(dev_to_virtio(dev));
}
#endif

/*
 * 6.14: a PCI function can be reset behind the back of its virtio driver, which
 * is told. Before, a virtio device had no such reset.
 */
#if !VHMM_KERNEL_BEFORE(6, 14)
#define VHMM_RESET_CALLBACKS			\
	.reset_prepare = vhmm_reset_prepare,	\
	.reset_done = vhmm_reset_done,
#else
#define VHMM_RESET_CALLBACKS
#endif

/* 6.14: pages that are allocated at once always go to an array. */
#if VHMM_KERNEL_BEFORE(6, 14)
#define alloc_pages_bulk(gfp, nr, pages) alloc_pages_bulk_array(gfp, nr, pages)
#endif

/* 6.13: it no longer asks whether the page is huge, which the order tells. */
#if VHMM_KERNEL_BEFORE(6, 13)
static inline struct folio *vhmm_vma_alloc_folio(gfp_t gfp, int order,
						 struct vm_area_struct *vma,
						 unsigned long addr)
{
	return vma_alloc_folio(gfp, order, vma, addr, order > 0);
}

#undef vma_alloc_folio
#define vma_alloc_folio vhmm_vma_alloc_folio
#endif

#endif /* VHMM_COMPAT_H */
