// SPDX-License-Identifier: GPL-2.0-only
/*
 * From the memory of another device of ours: through RAM, since the devices
 * cannot reach each other. The bounce pages are never mapped anywhere.
 */
#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "batch.h"
#include "device.h"
#include "request.h"

static bool vhmm_bounce_alloc(struct vhmm_batch *b, unsigned long nr)
{
	unsigned long i;

	if (!b->bounce)
		b->bounce = kvcalloc(VHMM_BATCH_PAGES, sizeof(*b->bounce),
				     GFP_KERNEL);
	if (!b->bounce)
		return false;
	for (i = 0; i < nr; i++) {
		if (vhmm_entry(b->dst, i))
			b->bounce[i] = alloc_page(GFP_HIGHUSER | __GFP_NOWARN);
		if (vhmm_entry(b->dst, i) && !b->bounce[i])
			return false;
	}
	return true;
}

enum vhmm_fetch {
	VHMM_NOT_FETCHED,
	VHMM_FETCHED,
	VHMM_FETCH_FAILED,
};

/* Fetch what is on the device of page @first; it has its own queues. */
static void vhmm_peer_fetch_one(struct vhmm_batch *b, unsigned long nr,
				unsigned long first, u8 *fetch)
{
	struct page *page = vhmm_entry_page(b->src, first);
	struct vhmm_device *peer = vhmm_pgmap_device(page_pgmap(page));
	struct vhmm_request *r = b->copy;
	unsigned long i, fetched = 0;
	int ret;

	r->dev = peer;
	vhmm_request_start(r, VIRTIO_HMM_OP_FROM_DEVICE);
	for (i = first; i < nr; i++) {
		page = vhmm_entry_page(b->src, i);
		if (!vhmm_entry(b->dst, i) ||
		    !vhmm_pfn_is_ours(peer, page_to_pfn(page)))
			continue;
		fetch[i] = VHMM_FETCHED;
		vhmm_request_add_range(r, vhmm_page_frame(peer, page),
				       b->bounce[i], 1, i);
	}
	vhmm_request_submit(r);
	ret = vhmm_request_wait(r);
	for (i = 0; i < r->nr_frames; i++) {
		if (ret || !vhmm_request_frame_ok(r, i))
			fetch[r->slots[i]] = VHMM_FETCH_FAILED;
		else
			fetched++;
	}
	vhmm_count(peer, VHMM_PAGES_TO_PEER, fetched);
	r->dev = b->dev;
}

/**
 * vhmm_peer_fetch() - bring the sources of a batch to where its device can read
 * @b: the batch; its sources are on other devices
 * @nr: number of entries
 * @outcome: receives what cannot move, whose destinations are dropped
 *
 * Afterwards page i is in @b->bounce[i], until vhmm_peer_done().
 */
void vhmm_peer_fetch(struct vhmm_batch *b, unsigned long nr, u8 *outcome)
{
	bool memory = vhmm_bounce_alloc(b, nr);
	bool large = vhmm_is_large(b->dst);
	u8 *fetch = (u8 *)b->pages;
	unsigned long i;

	memset(fetch, VHMM_NOT_FETCHED, nr);
	for (i = 0; memory && i < nr; i++) {
		if (vhmm_entry(b->dst, i) && fetch[i] == VHMM_NOT_FETCHED)
			vhmm_peer_fetch_one(b, nr, i, fetch);
	}
	for (i = 0; i < nr; i++) {
		if (!vhmm_entry(b->dst, i) || fetch[i] == VHMM_FETCHED)
			continue;
		vhmm_drop_destination(b->dst, i);
		memset(outcome + (large ? 0 : i), memory ?
		       VHMM_SKIP(COPY_FAILED) : VHMM_SKIP(NO_MEMORY),
		       large ? nr : 1);
	}
}

/**
 * vhmm_peer_done() - free the bounce pages
 * @b: the batch, whose requests were waited for
 */
void vhmm_peer_done(struct vhmm_batch *b)
{
	unsigned long i;

	for (i = 0; b->bounce && i < VHMM_BATCH_PAGES; i++) {
		if (b->bounce[i])
			__free_page(b->bounce[i]);
		b->bounce[i] = NULL;
	}
}
