// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/hmmN: the user interface, described in uapi/virtio_hmm.h.
 */
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "batch.h"
#include "device.h"

/**
 * struct vhmm_file - an open /dev/hmmN
 * @dev: the device, referenced
 * @mm: the address space that opened it, kept by mmgrab(): only compared
 */
struct vhmm_file {
	struct vhmm_device *dev;
	struct mm_struct *mm;
};

static int vhmm_open(struct inode *inode, struct file *filp)
{
	/* misc_open() holds the lock that misc_deregister() takes. */
	struct vhmm_device *dev =
		container_of(filp->private_data, struct vhmm_device, misc);
	struct vhmm_file *file;

	file = kmalloc_obj(*file);
	if (!file)
		return -ENOMEM;
	vhmm_device_get(dev);
	file->dev = dev;
	mmgrab(current->mm);
	file->mm = current->mm;
	filp->private_data = file;
	return 0;
}

static int vhmm_release(struct inode *inode, struct file *filp)
{
	struct vhmm_file *file = filp->private_data;

	vhmm_device_put(file->dev);
	mmdrop(file->mm);
	kfree(file);
	return 0;
}

static int vhmm_check_range(u64 start, u64 length)
{
	if (!length || !PAGE_ALIGNED(start) || !PAGE_ALIGNED(length))
		return -EINVAL;
	if (start + length < start || start + length > TASK_SIZE)
		return -EINVAL;
	return 0;
}

static int vhmm_ioctl_info(struct vhmm_device *dev, void __user *argp)
{
	struct virtio_hmm_info info = {
		.memory_size = (u64)dev->memory.nr_frames << PAGE_SHIFT,
		.memory_free = (u64)(dev->memory.nr_frames -
				     vhmm_memory_used(dev)) << PAGE_SHIFT,
		.generation = dev->generation,
		.frame_size = PAGE_SIZE,
		.copy_queues = dev->nr_copy,
		.state = vhmm_device_is_broken(dev) ? VIRTIO_HMM_DEVICE_BROKEN :
			 READ_ONCE(dev->closing) ? VIRTIO_HMM_DEVICE_CLOSING :
			 VIRTIO_HMM_DEVICE_OK,
	};

	memcpy(info.uuid, dev->uuid, sizeof(info.uuid));
	return copy_to_user(argp, &info, sizeof(info)) ? -EFAULT : 0;
}

static int vhmm_ioctl_migrate(struct vhmm_device *dev, void __user *argp)
{
	struct virtio_hmm_migrate arg;
	int ret;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (arg.flags || arg.direction > VIRTIO_HMM_TO_SYSTEM)
		return -EINVAL;
	ret = vhmm_check_range(arg.start, arg.length);
	if (ret)
		return ret;
	arg.done = 0;
	arg.moved = 0;
	arg.filled = 0;
	memset(arg.skipped, 0, sizeof(arg.skipped));

	ret = vhmm_migrate_range(dev, current->mm, &arg);
	if (copy_to_user(argp, &arg, sizeof(arg)))
		return -EFAULT;
	return ret;
}

static int vhmm_ioctl_query(struct vhmm_device *dev, void __user *argp)
{
	struct virtio_hmm_query arg;
	u8 residency[VHMM_BATCH_PAGES];
	u8 __user *out;
	u64 addr, end;
	int ret;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (arg.flags)
		return -EINVAL;
	ret = vhmm_check_range(arg.start, arg.length);
	if (ret)
		return ret;

	out = u64_to_user_ptr(arg.residency);
	end = arg.start + arg.length;
	for (addr = arg.start; addr < end; ) {
		u64 next = min(addr + sizeof(residency) * PAGE_SIZE, end);
		size_t nr = (next - addr) >> PAGE_SHIFT;

		if (signal_pending(current) || mmap_read_lock_killable(current->mm))
			return -EINTR;
		vhmm_residency(dev, current->mm, addr, next, residency);
		mmap_read_unlock(current->mm);
		/* Without the lock: the array may be what is asked about. */
		if (copy_to_user(out, residency, nr))
			return -EFAULT;
		out += nr;
		addr = next;
		cond_resched();
	}
	return 0;
}

static long vhmm_ioctl(struct file *filp, unsigned int cmd, unsigned long arg)
{
	struct vhmm_file *file = filp->private_data;
	struct vhmm_device *dev = file->dev;
	void __user *argp = (void __user *)arg;
	long ret;

	down_read(&dev->use);
	if (dev->gone)
		ret = -ENODEV;
	else if (cmd == VIRTIO_HMM_IOCTL_INFO)
		ret = vhmm_ioctl_info(dev, argp);
	else if (cmd != VIRTIO_HMM_IOCTL_MIGRATE && cmd != VIRTIO_HMM_IOCTL_QUERY)
		ret = -ENOTTY;
	else if (file->mm != current->mm)
		ret = -EBADF;
	else if (cmd == VIRTIO_HMM_IOCTL_MIGRATE)
		ret = vhmm_ioctl_migrate(dev, argp);
	else
		ret = vhmm_ioctl_query(dev, argp);
	up_read(&dev->use);
	return ret;
}

static const struct file_operations vhmm_fops = {
	.owner = THIS_MODULE,
	.open = vhmm_open,
	.release = vhmm_release,
	.unlocked_ioctl = vhmm_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

int vhmm_chardev_register(struct vhmm_device *dev)
{
	int ret;

	dev->misc.minor = MISC_DYNAMIC_MINOR;
	dev->misc.name = kasprintf(GFP_KERNEL, "hmm%d", dev->id);
	dev->misc.fops = &vhmm_fops;
	dev->misc.parent = &dev->vdev->dev;
	/* It acts on the memory of its caller only, like madvise(). */
	dev->misc.mode = 0666;
	if (!dev->misc.name)
		return -ENOMEM;
	ret = misc_register(&dev->misc);
	if (ret)
		kfree(dev->misc.name);
	return ret;
}

void vhmm_chardev_unregister(struct vhmm_device *dev)
{
	misc_deregister(&dev->misc);
	kfree(dev->misc.name);
}
