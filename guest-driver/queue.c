// SPDX-License-Identifier: GPL-2.0-only
/*
 * Virtqueues: submit, poll, then sleep. Every wait ends at a deadline.
 */
#include <linux/delay.h>
#include <linux/jiffies.h>
#include <linux/ktime.h>

#include "device.h"
#include "request.h"

/*
 * How often a sleeping waiter looks whether the transport has marked its
 * queue broken, as on surprise removal: nothing wakes it then.
 */
#define VHMM_BROKEN_CHECK	msecs_to_jiffies(100)

void vhmm_queue_init(struct vhmm_queue *q)
{
	spin_lock_init(&q->lock);
	init_waitqueue_head(&q->space);
}

/* Hand the answered requests to their waiters. */
static void vhmm_queue_drain(struct vhmm_queue *q)
{
	struct vhmm_request *r;
	unsigned int len;
	bool wake = false;

	lockdep_assert_held(&q->lock);

	while (q->vq && (r = virtqueue_get_buf(q->vq, &len))) {
		r->used = len;
		complete(&r->done);
		wake = q->sleepers;
	}
	if (wake)
		wake_up_all(&q->space);
}

/* Drain, and leave the interrupt armed exactly when somebody sleeps. */
static void vhmm_queue_drain_and_arm(struct vhmm_queue *q)
{
	lockdep_assert_held(&q->lock);

	do {
		virtqueue_disable_cb(q->vq);
		vhmm_queue_drain(q);
	} while (q->sleepers && !virtqueue_enable_cb(q->vq));
}

/**
 * vhmm_queue_callback() - a used buffer notification came
 * @vq: the control queue or a copy queue
 *
 * Runs in hard interrupt context.
 */
void vhmm_queue_callback(struct virtqueue *vq)
{
	struct vhmm_device *dev = vq->vdev->priv;
	struct vhmm_queue *q = vq->index == VIRTIO_HMM_QUEUE_CONTROL ?
		&dev->control : &dev->copy[vq->index - VIRTIO_HMM_QUEUE_COPY];
	unsigned long flags;

	spin_lock_irqsave(&q->lock, flags);
	/* All queues share one line, which may fire before setup has ended. */
	if (q->vq)
		vhmm_queue_drain_and_arm(q);
	spin_unlock_irqrestore(&q->lock, flags);
}

static bool vhmm_queue_dead(struct vhmm_queue *q, struct vhmm_device *dev)
{
	return vhmm_device_is_broken(dev) || !q->vq || virtqueue_is_broken(q->vq);
}

static int vhmm_queue_add(struct vhmm_queue *q, struct vhmm_request *r,
			  bool *notify)
{
	bool to_device = le32_to_cpu(r->req->op) == VIRTIO_HMM_OP_TO_DEVICE;
	unsigned int out = 0, in = 0;
	struct scatterlist *sgs[3];
	int ret;

	lockdep_assert_held(&q->lock);

	sgs[out++] = &r->out_sg;
	if (r->nr_pages_sg && to_device)
		sgs[out++] = r->pages_sg;
	sgs[out + in++] = &r->resp_sg;
	if (r->nr_pages_sg && !to_device)
		sgs[out + in++] = r->pages_sg;

	ret = virtqueue_add_sgs(q->vq, sgs, out, in, r, GFP_ATOMIC);
	if (!ret)
		*notify = virtqueue_kick_prepare(q->vq);
	return ret;
}

static void vhmm_queue_sleep_begin(struct vhmm_queue *q)
{
	spin_lock_irq(&q->lock);
	q->sleepers++;
	vhmm_queue_drain_and_arm(q);
	spin_unlock_irq(&q->lock);
}

static void vhmm_queue_sleep_end(struct vhmm_queue *q)
{
	spin_lock_irq(&q->lock);
	q->sleepers--;
	spin_unlock_irq(&q->lock);
}

/* Whether it is worth trying again, with success or to learn that it is dead. */
static bool vhmm_queue_has_space(struct vhmm_queue *q, struct vhmm_device *dev,
				 unsigned int seen)
{
	bool space;

	spin_lock_irq(&q->lock);
	space = vhmm_queue_dead(q, dev) || q->vq->num_free > seen;
	spin_unlock_irq(&q->lock);
	return space;
}

/**
 * vhmm_queue_submit() - put a request on the queue
 * @q: the queue
 * @r: the request
 *
 * Sleeps while the ring is full, at most as long as the deadline of a request.
 *
 * Return: 0; -ENODEV when the device is broken; -ETIMEDOUT when the ring stayed
 * full; another negative errno when the transport refuses the request.
 */
int vhmm_queue_submit(struct vhmm_queue *q, struct vhmm_request *r)
{
	unsigned long deadline = jiffies + msecs_to_jiffies(vhmm_timeout_ms);
	unsigned int seen;
	bool notify;
	int ret;

	for (;;) {
		notify = false;
		spin_lock_irq(&q->lock);
		/* Checked under the lock that vhmm_queue_fail_all() takes. */
		if (vhmm_queue_dead(q, r->dev)) {
			ret = -ENODEV;
		} else {
			ret = vhmm_queue_add(q, r, &notify);
			seen = q->vq->num_free;
		}
		spin_unlock_irq(&q->lock);
		/* -ENOMEM: a buffer could not be mapped for DMA at once. */
		if (ret != -ENOSPC && ret != -ENOMEM)
			break;
		if (time_after(jiffies, deadline))
			return -ETIMEDOUT;

		vhmm_queue_sleep_begin(q);
		wait_event_timeout(q->space, vhmm_queue_has_space(q, r->dev, seen),
				   ret == -ENOMEM ? 1 : VHMM_BROKEN_CHECK);
		vhmm_queue_sleep_end(q);
	}
	if (notify)
		virtqueue_notify(q->vq);
	return ret;
}

static bool vhmm_queue_poll(struct vhmm_queue *q, struct vhmm_request *r)
{
	u64 end = ktime_get_ns() + (u64)vhmm_poll_us * NSEC_PER_USEC;

	for (;;) {
		if (spin_trylock_irq(&q->lock)) {
			vhmm_queue_drain(q);
			spin_unlock_irq(&q->lock);
		}
		if (try_wait_for_completion(&r->done))
			return true;
		if (ktime_get_ns() >= end || need_resched())
			return false;
		cpu_relax();
	}
}

/**
 * vhmm_queue_wait() - wait until a request is answered or cannot be any more
 * @q: the queue it was submitted to
 * @r: the request
 *
 * A request that misses its deadline breaks the device. That resets it, so on
 * return the device does not touch the buffers and pages of the request.
 */
void vhmm_queue_wait(struct vhmm_queue *q, struct vhmm_request *r)
{
	unsigned long deadline = jiffies + msecs_to_jiffies(vhmm_timeout_ms);

	if (vhmm_queue_poll(q, r))
		return;

	vhmm_queue_sleep_begin(q);
	while (!wait_for_completion_timeout(&r->done, VHMM_BROKEN_CHECK)) {
		if (vhmm_queue_dead(q, r->dev)) {
			vhmm_device_break(r->dev, "it was removed");
		} else if (time_after(jiffies, deadline)) {
			vhmm_count(r->dev, VHMM_REQUEST_TIMEOUTS, 1);
			vhmm_device_break(r->dev, "a request missed its deadline");
		}
	}
	vhmm_queue_sleep_end(q);
}

/**
 * vhmm_queue_fail_all() - end the wait for all requests on the queue
 * @q: the queue of a device that is broken and has been reset
 */
void vhmm_queue_fail_all(struct vhmm_queue *q)
{
	struct vhmm_request *r;

	if (!q->vq)
		return;
	spin_lock_irq(&q->lock);
	while ((r = virtqueue_detach_unused_buf(q->vq))) {
		r->used = 0;
		complete(&r->done);
	}
	wake_up_all(&q->space);
	spin_unlock_irq(&q->lock);
}

/**
 * vhmm_queue_clear() - forget the virtqueue, which is about to be deleted
 * @q: the queue; nothing is on it
 */
void vhmm_queue_clear(struct vhmm_queue *q)
{
	spin_lock_irq(&q->lock);
	q->vq = NULL;
	spin_unlock_irq(&q->lock);
}
