// SPDX-License-Identifier: GPL-2.0-only
/*
 * Pages come home before the system sleeps, hibernates, is reset or goes down:
 * what is in device memory then may be lost.
 */
#include <linux/freezer.h>
#include <linux/sched/signal.h>
#include <linux/suspend.h>
#include <linux/virtio_config.h>

#include "device.h"

/* So long may it take; sleeping is refused then, going down is not. */
#define VHMM_POWER_TIMEOUT	(20 * HZ)

/* Keep new pages away, and bring home what is there. */
static bool vhmm_fall_asleep(struct vhmm_device *dev)
{
	WRITE_ONCE(dev->asleep, true);
	vhmm_memory_close(dev);
	return vhmm_evacuate(dev, VHMM_POWER_TIMEOUT);
}

static void vhmm_wake_up(struct vhmm_device *dev)
{
	vhmm_memory_open(dev);
	WRITE_ONCE(dev->asleep, false);
	wake_up_all(&dev->awake);
}

/*
 * A notifier and not freeze(): while processes still run and swap still works,
 * so that there is memory to bring the pages home to.
 */
static int vhmm_pm_notify(struct notifier_block *nb, unsigned long action,
			  void *unused)
{
	struct vhmm_device *dev = container_of(nb, struct vhmm_device, pm_nb);

	switch (action) {
	case PM_SUSPEND_PREPARE:
	case PM_HIBERNATION_PREPARE:
		/* What a broken device has lost cannot come home later either. */
		if (!vhmm_fall_asleep(dev) && !vhmm_device_is_broken(dev)) {
			dev_err(&dev->vdev->dev,
				"%lu pages did not come home: not sleeping\n",
				vhmm_memory_used(dev));
			vhmm_wake_up(dev);
			return notifier_from_errno(-EBUSY);
		}
		return NOTIFY_OK;
	case PM_POST_SUSPEND:
	case PM_POST_HIBERNATION:
		vhmm_wake_up(dev);
		return NOTIFY_OK;
	default:
		return NOTIFY_DONE;
	}
}

int vhmm_power_init(struct vhmm_device *dev)
{
	init_waitqueue_head(&dev->awake);
	dev->pm_nb.notifier_call = vhmm_pm_notify;
	return register_pm_notifier(&dev->pm_nb);
}

void vhmm_power_exit(struct vhmm_device *dev)
{
	unregister_pm_notifier(&dev->pm_nb);
	wake_up_all(&dev->awake);
}

/**
 * vhmm_wait_awake() - wait until pages may migrate to the device
 * @dev: the device; no lock is held, for the caller may be frozen
 *
 * Return: 0 or -EINTR.
 */
int vhmm_wait_awake(struct vhmm_device *dev)
{
	return wait_event_freezable(dev->awake, !READ_ONCE(dev->asleep) ||
				    READ_ONCE(dev->closing)) ? -EINTR : 0;
}

int vhmm_freeze(struct virtio_device *vdev)
{
	struct vhmm_device *dev = vdev->priv;

	if (!vhmm_device_is_broken(dev)) {
		if (vhmm_memory_used(dev))
			return -EBUSY;
		virtio_reset_device(vdev);
	}
	vhmm_queues_del(dev);
	return 0;
}

int vhmm_restore(struct virtio_device *vdev)
{
	struct vhmm_device *dev = vdev->priv;
	int ret;

	/* One that was given up must not be started again. */
	if (vhmm_device_is_broken(dev))
		return -EIO;
	ret = vhmm_queues_find(dev);
	if (ret)
		vhmm_device_break(dev, "it did not come back");
	else
		virtio_device_ready(vdev);
	return ret;
}

int vhmm_reset_prepare(struct virtio_device *vdev)
{
	struct vhmm_device *dev = vdev->priv;

	if (!vhmm_fall_asleep(dev))
		vhmm_device_break(dev, "it is reset with pages in its memory");
	return vhmm_freeze(vdev);
}

int vhmm_reset_done(struct virtio_device *vdev)
{
	int ret = vhmm_restore(vdev);

	vhmm_wake_up(vdev->priv);
	return ret;
}

/* For kexec as well: the next kernel finds a device that is at rest. */
void vhmm_shutdown(struct virtio_device *vdev)
{
	struct vhmm_device *dev = vdev->priv;

	if (!vhmm_fall_asleep(dev) && !vhmm_device_is_broken(dev))
		vhmm_device_break(dev, "it is shut down with pages in its memory");
	/* Nobody may kick a queue after the reset. */
	virtio_break_device(vdev);
	virtio_reset_device(vdev);
}
