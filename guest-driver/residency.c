// SPDX-License-Identifier: GPL-2.0-only
/*
 * Where the pages of a range are.
 *
 * hmm_range_fault() is the usual way to look, but it shows swapped pages and
 * the pages of other devices as holes. So the page tables are read here, in
 * the way of get_user_pages_fast(): with interrupts off, which keeps page
 * tables from being freed, and without a lock. The answer is a snapshot.
 */
#include <linux/mm.h>
#include <linux/pgtable.h>

#include "device.h"

static u8 vhmm_softleaf_residency(struct vhmm_device *dev, softleaf_t entry,
				  unsigned long offset, unsigned long *frame)
{
	if (softleaf_is_device_private(entry)) {
		if (!vhmm_pfn_is_ours(dev, softleaf_to_pfn(entry)))
			return VIRTIO_HMM_RESIDENCY_OTHER_DEVICE;
		*frame = softleaf_to_pfn(entry) - vhmm_first_pfn(dev) + offset;
		return VIRTIO_HMM_RESIDENCY_DEVICE;
	}
	if (softleaf_is_migration(entry))
		return VIRTIO_HMM_RESIDENCY_MOVING;
	if (softleaf_is_swap(entry))
		return VIRTIO_HMM_RESIDENCY_SWAPPED;
	if (softleaf_is_device_exclusive(entry))
		return VIRTIO_HMM_RESIDENCY_RAM;
	return VIRTIO_HMM_RESIDENCY_NONE;
}

static u8 vhmm_pte_residency(struct vhmm_device *dev, pte_t pte,
			     unsigned long *frame)
{
	if (pte_none(pte))
		return VIRTIO_HMM_RESIDENCY_NONE;
	if (!pte_present(pte))
		return vhmm_softleaf_residency(dev, softleaf_from_pte(pte), 0,
					       frame);
	return is_zero_pfn(pte_pfn(pte)) ? VIRTIO_HMM_RESIDENCY_ZERO :
					   VIRTIO_HMM_RESIDENCY_RAM;
}

/* A huge page of anonymous memory that is not anonymous is the zero page. */
static u8 vhmm_huge_residency(struct vm_area_struct *vma, unsigned long pfn)
{
	return vma && vma_is_anonymous(vma) && pfn_valid(pfn) &&
	       !folio_test_anon(pfn_folio(pfn)) ?
		VIRTIO_HMM_RESIDENCY_ZERO : VIRTIO_HMM_RESIDENCY_RAM;
}

/**
 * vhmm_lookup() - find the lowest page-table entry for an address
 * @mm: the address space; interrupts are off
 * @addr: the address
 * @pmd: receives the PMD entry, none if there is not even that
 * @pte: receives the PTE if @pmd points to a table
 *
 * Return: true if @pte was read.
 */
static bool vhmm_lookup(struct mm_struct *mm, unsigned long addr, pmd_t *pmd,
			pte_t *pte)
{
	pgd_t pgd = pgdp_get(pgd_offset(mm, addr));
	p4d_t p4d;
	pud_t pud;

	*pmd = __pmd(0);
	if (pgd_none(pgd))
		return false;
	p4d = p4dp_get(p4d_offset_lockless(pgd_offset(mm, addr), pgd, addr));
	if (p4d_none(p4d))
		return false;
	pud = pudp_get(pud_offset(&p4d, addr));
	if (pud_none(pud) || pud_leaf(pud))
		return false;
	*pmd = pmdp_get_lockless(pmd_offset(&pud, addr));
	if (pmd_none(*pmd) || !pmd_present(*pmd) || pmd_leaf(*pmd))
		return false;
	*pte = ptep_get_lockless(pte_offset_kernel(pmd, addr));
	return true;
}

static u8 vhmm_addr_residency(struct vhmm_device *dev,
			      struct vm_area_struct *vma, struct mm_struct *mm,
			      unsigned long addr, unsigned long *frame)
{
	pmd_t pmd;
	pte_t pte;

	if (vhmm_lookup(mm, addr, &pmd, &pte))
		return vhmm_pte_residency(dev, pte, frame);
	if (pmd_none(pmd))
		return VIRTIO_HMM_RESIDENCY_NONE;
	if (!pmd_present(pmd))
		return vhmm_softleaf_residency(dev, softleaf_from_pmd(pmd),
					       (addr & ~HPAGE_PMD_MASK) >> PAGE_SHIFT,
					       frame);
	return vhmm_huge_residency(vma, pmd_pfn(pmd));
}

/**
 * vhmm_residency() - tell where each page of a range is
 * @dev: the device that "this device" means
 * @mm: the address space; mmap_lock is held
 * @start: first byte, page aligned
 * @end: end of the range, page aligned; at most a batch away
 * @residency: receives an &enum virtio_hmm_residency for each page
 * @frames: receives the numbers of the frames of this device that are among
 *	them; NULL if nobody wants to know
 *
 * Return: how many frames of this device there are.
 */
unsigned int vhmm_residency(struct vhmm_device *dev, struct mm_struct *mm,
			    unsigned long start, unsigned long end,
			    u8 *residency, unsigned long *frames)
{
	struct vm_area_struct *vma = NULL;
	unsigned long addr, flags, frame;
	unsigned int nr = 0;

	mmap_assert_locked(mm);

	for (addr = start; addr < end; addr += PAGE_SIZE) {
		if (!vma || addr >= vma->vm_end)
			vma = find_vma(mm, addr);
		local_irq_save(flags);
		*residency = vhmm_addr_residency(dev, vma, mm, addr, &frame);
		local_irq_restore(flags);
		if (*residency++ != VIRTIO_HMM_RESIDENCY_DEVICE)
			continue;
		if (frames)
			frames[nr] = frame;
		nr++;
	}
	return nr;
}

static enum virtio_hmm_skip vhmm_why_present(struct vm_area_struct *vma,
					     unsigned long pfn)
{
	struct folio *folio;

	if (is_zero_pfn(pfn))
		return vhmm_vma_fills_holes(vma) ? VIRTIO_HMM_SKIP_BUSY :
						   VIRTIO_HMM_SKIP_UNSUPPORTED;
	if (!pfn_valid(pfn))
		return VIRTIO_HMM_SKIP_UNSUPPORTED;
	folio = pfn_folio(pfn);
	/* The huge zero page, or a page of the file that the VMA maps. */
	if (!folio_test_anon(folio))
		return vhmm_vma_fills_holes(vma) ? VIRTIO_HMM_SKIP_BUSY :
						   VIRTIO_HMM_SKIP_UNSUPPORTED;
	return folio_maybe_dma_pinned(folio) ? VIRTIO_HMM_SKIP_PINNED :
					       VIRTIO_HMM_SKIP_BUSY;
}

/**
 * vhmm_why_in_ram() - tell why a page or hole did not go to the device
 * @dev: the device
 * @vma: the mapping; mmap_lock is held
 * @addr: its address, where no device page and no page in swap was seen
 *
 * Return: a reason that held at this moment.
 */
enum virtio_hmm_skip vhmm_why_in_ram(struct vhmm_device *dev,
				     struct vm_area_struct *vma,
				     unsigned long addr)
{
	/* A hole is filled unless something came in between. */
	enum virtio_hmm_skip why = vhmm_vma_fills_holes(vma) ?
		VIRTIO_HMM_SKIP_BUSY : VIRTIO_HMM_SKIP_UNSUPPORTED;
	unsigned long flags, frame;
	pmd_t pmd;
	pte_t pte;

	local_irq_save(flags);
	if (vhmm_lookup(vma->vm_mm, addr, &pmd, &pte)) {
		if (pte_present(pte))
			why = vhmm_why_present(vma, pte_pfn(pte));
		/* No hole but a mark: of a guard, of userfaultfd, of poison. */
		else if (!pte_none(pte) &&
			 vhmm_pte_residency(dev, pte, &frame) ==
			 VIRTIO_HMM_RESIDENCY_NONE)
			why = VIRTIO_HMM_SKIP_UNSUPPORTED;
	} else if (pmd_present(pmd)) {
		why = vhmm_why_present(vma, pmd_pfn(pmd));
	}
	local_irq_restore(flags);
	return why;
}
