/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A virtqueue and those who wait on it.
 */
#ifndef VHMM_QUEUE_H
#define VHMM_QUEUE_H

#include <linux/spinlock.h>
#include <linux/virtio.h>
#include <linux/wait.h>

struct vhmm_request;

/**
 * struct vhmm_queue - a virtqueue whose requests are waited for
 * @lock: serializes all operations on @vq but virtqueue_notify() and
 *	virtqueue_is_broken(); taken in the interrupt handler, so always with
 *	interrupts off; a leaf
 * @vq: the virtqueue; NULL while it is not set up
 * @sleepers: number of waiters that need the interrupt; under @lock
 * @space: woken when descriptors became free
 *
 * Part of its &struct vhmm_device.
 */
struct vhmm_queue {
	spinlock_t lock; /* see @lock above */
	struct virtqueue *vq;
	unsigned int sleepers;
	wait_queue_head_t space;
};

void vhmm_queue_init(struct vhmm_queue *q);
void vhmm_queue_callback(struct virtqueue *vq);
int vhmm_queue_submit(struct vhmm_queue *q, struct vhmm_request *r);
void vhmm_queue_wait(struct vhmm_queue *q, struct vhmm_request *r);
void vhmm_queue_fail_all(struct vhmm_queue *q);
void vhmm_queue_clear(struct vhmm_queue *q);

#endif /* VHMM_QUEUE_H */
