// SPDX-License-Identifier: GPL-2.0-only
/*
 * virtio_hmm: driver of the virtio-hmm device, whose private memory the pages
 * of a process can be migrated to.
 */
#include <linux/idr.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/slab.h>
#include <linux/virtio_config.h>

#include "batch.h"
#include "device.h"
#include "request.h"

#if !IS_ENABLED(CONFIG_DEVICE_PRIVATE)
#error "This kernel is built without CONFIG_DEVICE_PRIVATE"
#endif

unsigned int vhmm_timeout_ms = 5000;
module_param_named(timeout_ms, vhmm_timeout_ms, uint, 0644);
MODULE_PARM_DESC(timeout_ms, "Milliseconds a request may take before the device is declared broken (5000)");

unsigned int vhmm_poll_us = 1000;
module_param_named(poll_us, vhmm_poll_us, uint, 0644);
MODULE_PARM_DESC(poll_us, "Microseconds to poll for a completion before sleeping (1000)");

unsigned int vhmm_retries = 4;
module_param_named(retries, vhmm_retries, uint, 0644);
MODULE_PARM_DESC(retries, "How often to try pages again that only raced (4)");

unsigned int vhmm_fault_around = 16;
module_param_named(fault_around, vhmm_fault_around, uint, 0644);
MODULE_PARM_DESC(fault_around, "Most pages that come home at a CPU fault of a run of them, 1 for none but the touched one (16)");

/* Where the kernel has large folios of device memory. */
bool vhmm_large_folios = MIGRATE_PFN_COMPOUND;
module_param_named(large_folios, vhmm_large_folios, bool, 0644);
MODULE_PARM_DESC(large_folios, "Migrate 2 MiB folios as one (Y if the kernel can)");

static DEFINE_IDA(vhmm_ida);

static void vhmm_device_free(struct kref *ref)
{
	struct vhmm_device *dev = container_of(ref, struct vhmm_device, ref);

	cancel_delayed_work_sync(&dev->trim);
	vhmm_fault_trim(&dev->trim.work);
	vhmm_batch_free(dev->evacuation);
	ida_free(&vhmm_ida, dev->id);
	free_percpu(dev->counters);
	kfree(dev);
}

void vhmm_device_get(struct vhmm_device *dev)
{
	kref_get(&dev->ref);
}

void vhmm_device_put(struct vhmm_device *dev)
{
	kref_put(&dev->ref, vhmm_device_free);
}

/**
 * vhmm_device_break() - give the device up
 * @dev: the device
 * @why: what it did, for the log
 *
 * A request that was not answered may still be running, and write to RAM. So
 * the device is reset before anybody is told that his request failed: when
 * this returns, nothing is touched any more. May sleep; callers may hold
 * mmap_lock and page locks.
 */
void vhmm_device_break(struct vhmm_device *dev, const char *why)
{
	unsigned int i;

	mutex_lock(&dev->reset_lock);
	if (!dev->dma_stopped) {
		WRITE_ONCE(dev->broken, true);
		vhmm_memory_lost(dev);
		dev_err(&dev->vdev->dev,
			"hmm%d is broken: %s; %lu pages that were only in its memory are lost\n",
			dev->id, why, vhmm_memory_used(dev));
		virtio_reset_device(dev->vdev);
		dev->dma_stopped = true;
		vhmm_queue_fail_all(&dev->control);
		for (i = 0; i < dev->nr_copy; i++)
			vhmm_queue_fail_all(&dev->copy[i]);
	}
	mutex_unlock(&dev->reset_lock);
}

static int vhmm_read_config(struct vhmm_device *dev, u64 *memory_size)
{
	struct virtio_device *vdev = dev->vdev;
	u32 version, frame_size, copy_queues, max_frames;

	virtio_cread_le(vdev, struct virtio_hmm_config, version, &version);
	virtio_cread_le(vdev, struct virtio_hmm_config, frame_size, &frame_size);
	virtio_cread_le(vdev, struct virtio_hmm_config, memory_size, memory_size);
	virtio_cread_le(vdev, struct virtio_hmm_config, copy_queues, &copy_queues);
	virtio_cread_le(vdev, struct virtio_hmm_config, max_frames,
			&max_frames);
	virtio_cread_le(vdev, struct virtio_hmm_config, generation,
			&dev->generation);
	virtio_cread_bytes(vdev, offsetof(struct virtio_hmm_config, uuid),
			   dev->uuid, sizeof(dev->uuid));

	if (version != VIRTIO_HMM_VERSION) {
		dev_err(&vdev->dev, "version %u of the device is not known\n",
			version);
		return -EINVAL;
	}
	if (frame_size != PAGE_SIZE || !*memory_size ||
	    !IS_ALIGNED(*memory_size, HPAGE_PMD_SIZE) ||
	    max_frames < VHMM_BATCH_PAGES || !copy_queues ||
	    *memory_size >> PAGE_SHIFT > U32_MAX) {
		dev_err(&vdev->dev,
			"unusable device: %llu bytes in frames of %u, %u frames a request, %u copy queues\n",
			*memory_size, frame_size, max_frames, copy_queues);
		return -EINVAL;
	}
	dev->nr_copy = min(copy_queues, VHMM_MAX_COPY_QUEUES);
	return 0;
}

/**
 * vhmm_queues_find() - set up the virtqueues
 * @dev: the device, which is reset or new
 *
 * Return: 0 or a negative errno.
 */
int vhmm_queues_find(struct vhmm_device *dev)
{
	struct virtqueue_info info[VIRTIO_HMM_QUEUE_COPY + VHMM_MAX_COPY_QUEUES] = {
		[VIRTIO_HMM_QUEUE_CONTROL] = { "control", vhmm_queue_callback },
		/* Nothing is defined on it yet; it is there to be counted. */
		[VIRTIO_HMM_QUEUE_EVENT] = { "event", NULL },
	};
	struct virtqueue *vqs[ARRAY_SIZE(info)];
	unsigned int i;
	int ret;

	for (i = 0; i < dev->nr_copy; i++)
		info[VIRTIO_HMM_QUEUE_COPY + i] =
			(struct virtqueue_info){ "copy", vhmm_queue_callback };
	ret = virtio_find_vqs(dev->vdev, VIRTIO_HMM_QUEUE_COPY + dev->nr_copy,
			      vqs, info, NULL);
	if (ret)
		return ret;

	dev->control.vq = vqs[VIRTIO_HMM_QUEUE_CONTROL];
	for (i = 0; i < dev->nr_copy; i++)
		dev->copy[i].vq = vqs[VIRTIO_HMM_QUEUE_COPY + i];
	return 0;
}

/**
 * vhmm_queues_del() - take the virtqueues down
 * @dev: the device, reset, so that it touches them no more
 *
 * A request that is still on one has failed.
 */
void vhmm_queues_del(struct vhmm_device *dev)
{
	unsigned int i;

	vhmm_queue_fail_all(&dev->control);
	vhmm_queue_clear(&dev->control);
	for (i = 0; i < dev->nr_copy; i++) {
		vhmm_queue_fail_all(&dev->copy[i]);
		vhmm_queue_clear(&dev->copy[i]);
	}
	dev->vdev->config->del_vqs(dev->vdev);
}

static int vhmm_probe(struct virtio_device *vdev)
{
	struct vhmm_device *dev;
	u64 memory_size;
	unsigned int i;
	int ret;

	if (!vdev->config->get)
		return -EINVAL;

	dev = kzalloc_obj(*dev);
	if (!dev)
		return -ENOMEM;
	kref_init(&dev->ref);
	init_rwsem(&dev->use);
	mutex_init(&dev->reset_lock);
	mutex_init(&dev->evacuation_lock);
	INIT_DELAYED_WORK(&dev->trim, vhmm_fault_trim);
	dev->vdev = vdev;
	vdev->priv = dev;
	vhmm_queue_init(&dev->control);
	for (i = 0; i < VHMM_MAX_COPY_QUEUES; i++)
		vhmm_queue_init(&dev->copy[i]);
	dev->counters = alloc_percpu(struct vhmm_counters);
	if (!dev->counters) {
		ret = -ENOMEM;
		goto err_free;
	}
	dev->id = ida_alloc(&vhmm_ida, GFP_KERNEL);
	if (dev->id < 0) {
		ret = dev->id;
		goto err_counters;
	}

	ret = vhmm_read_config(dev, &memory_size);
	if (ret)
		goto err_put;
	dev->evacuation = vhmm_batch_alloc(dev, VHMM_EVACUATION,
					   VHMM_BATCH_PAGES);
	if (!dev->evacuation) {
		ret = -ENOMEM;
		goto err_put;
	}
	ret = vhmm_memory_init(dev, memory_size);
	if (ret) {
		dev_err(&vdev->dev, "no struct pages for %llu bytes: %d\n",
			memory_size, ret);
		goto err_put;
	}
	ret = vhmm_queues_find(dev);
	if (ret)
		goto err_memory;
	virtio_device_ready(vdev);
	ret = vhmm_power_init(dev);
	if (ret)
		goto err_vqs;
	ret = vhmm_chardev_register(dev);
	if (ret)
		goto err_power;
	vhmm_debugfs_add(dev);
	dev_info(&vdev->dev, "hmm%d: %llu MiB of device memory, %u copy queues\n",
		 dev->id, memory_size >> 20, dev->nr_copy);
	return 0;

err_power:
	vhmm_power_exit(dev);
err_vqs:
	virtio_reset_device(vdev);
	vhmm_queues_del(dev);
err_memory:
	vhmm_memory_exit(dev);
err_put:
	vhmm_device_put(dev);
	return ret;

err_counters:
	free_percpu(dev->counters);
err_free:
	kfree(dev);
	return ret;
}

static void vhmm_remove(struct virtio_device *vdev)
{
	struct vhmm_device *dev = vdev->priv;

	WRITE_ONCE(dev->closing, true);
	vhmm_power_exit(dev);
	vhmm_debugfs_remove(dev);
	vhmm_chardev_unregister(dev);
	vhmm_memory_close(dev);
	/* A surprise removal has marked the queues: nothing will be answered. */
	if (dev->control.vq && virtqueue_is_broken(dev->control.vq))
		vhmm_device_break(dev, "it was removed");
	/* While the copy queues work, and ioctls may help. */
	vhmm_evacuate(dev, MAX_SCHEDULE_TIMEOUT);
	down_write(&dev->use);
	dev->gone = true;
	up_write(&dev->use);
	vhmm_memory_exit(dev);

	if (!vhmm_device_is_broken(dev))
		vhmm_control_discard_all(dev);
	virtio_reset_device(vdev);
	vhmm_queues_del(dev);
	vhmm_device_put(dev);
}

static const struct virtio_device_id vhmm_ids[] = {
	{ VIRTIO_ID_HMM, VIRTIO_DEV_ANY_ID },
	{}
};
MODULE_DEVICE_TABLE(virtio, vhmm_ids);

static struct virtio_driver vhmm_driver = {
	.driver.name = KBUILD_MODNAME,
	.id_table = vhmm_ids,
	.probe = vhmm_probe,
	.remove = vhmm_remove,
	.freeze = pm_sleep_ptr(vhmm_freeze),
	.restore = pm_sleep_ptr(vhmm_restore),
	VHMM_RESET_CALLBACKS
	VHMM_SHUTDOWN_CALLBACK,
};

static int __init vhmm_init(void)
{
	int ret;

	ret = vhmm_memory_setup_workqueue();
	if (ret)
		return ret;
	vhmm_debugfs_init();
	ret = register_virtio_driver(&vhmm_driver);
	if (ret) {
		vhmm_debugfs_exit();
		vhmm_memory_destroy_workqueue();
	}
	return ret;
}

static void __exit vhmm_exit(void)
{
	unregister_virtio_driver(&vhmm_driver);
	vhmm_debugfs_exit();
	vhmm_memory_destroy_workqueue();
	ida_destroy(&vhmm_ida);
}

module_init(vhmm_init);
module_exit(vhmm_exit);
MODULE_DESCRIPTION("Device-private memory and migration for the virtio-hmm device");
MODULE_LICENSE("GPL");
