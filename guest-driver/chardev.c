// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/hmmN: the user interface, described in uapi/virtio_hmm.h.
 */
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "batch.h"
#include "context.h"
#include "device.h"

static int vhmm_open(struct inode *inode, struct file *filp)
{
	/* misc_open() holds the lock that misc_deregister() takes. */
	struct vhmm_device *dev =
		container_of(filp->private_data, struct vhmm_device, misc);
	struct vhmm_context *ctx;

	ctx = vhmm_context_alloc(dev, current->mm);
	if (!ctx)
		return -ENOMEM;
	vhmm_device_get(dev);
	filp->private_data = ctx;
	return 0;
}

static int vhmm_release(struct inode *inode, struct file *filp)
{
	struct vhmm_context *ctx = filp->private_data;
	struct vhmm_device *dev = ctx->dev;

	vhmm_context_put(ctx);
	vhmm_device_put(dev);
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

static int vhmm_ioctl_migrate(struct vhmm_context *ctx, void __user *argp)
{
	struct virtio_hmm_migrate arg;
	struct vhmm_device *dev = ctx->dev;
	enum vhmm_trigger trigger;
	int ret;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (arg.flags & ~VIRTIO_HMM_MIGRATE_NO_EVICT ||
	    arg.direction > VIRTIO_HMM_TO_SYSTEM)
		return -EINVAL;
	ret = vhmm_check_range(arg.start, arg.length);
	if (ret)
		return ret;
	arg.done = 0;
	arg.moved = 0;
	arg.filled = 0;
	memset(arg.skipped, 0, sizeof(arg.skipped));

	trigger = arg.direction == VIRTIO_HMM_TO_DEVICE ? VHMM_IOCTL_TO_DEVICE :
							  VHMM_IOCTL_TO_SYSTEM;
	ret = vhmm_migrate_range(ctx, &arg, trigger);
	while (ret == -EAGAIN) {
		/* The system is going to sleep, and we with it: hold no lock. */
		up_read(&dev->use);
		ret = vhmm_wait_awake(dev);
		down_read(&dev->use);
		if (!ret)
			ret = dev->gone ? -ENODEV :
					  vhmm_migrate_range(ctx, &arg, trigger);
	}
	if (copy_to_user(argp, &arg, sizeof(arg)))
		return -EFAULT;
	return ret;
}

static int vhmm_ioctl_release(struct vhmm_context *ctx, void __user *argp)
{
	struct virtio_hmm_release arg;
	int ret;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (arg.flags & ~VIRTIO_HMM_RELEASE_ALL || arg.reserved)
		return -EINVAL;
	arg.released = 0;
	arg.remaining = 0;

	if (arg.flags & VIRTIO_HMM_RELEASE_ALL) {
		if (arg.start || arg.length)
			return -EINVAL;
		ret = vhmm_release_all(ctx, &arg);
	} else {
		ret = vhmm_check_range(arg.start, arg.length);
		if (ret)
			return ret;
		ret = vhmm_release_range(ctx, &arg);
	}
	if (copy_to_user(argp, &arg, sizeof(arg)))
		return -EFAULT;
	return ret;
}

static int vhmm_ioctl_limit(struct vhmm_context *ctx, void __user *argp)
{
	struct vhmm_memory *mem = &ctx->dev->memory;
	struct virtio_hmm_limit arg;

	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (arg.flags & ~VIRTIO_HMM_LIMIT_SET || arg.reserved)
		return -EINVAL;
	if (arg.flags & VIRTIO_HMM_LIMIT_SET && arg.bytes != U64_MAX &&
	    !PAGE_ALIGNED(arg.bytes))
		return -EINVAL;

	spin_lock_irq(&mem->lock);
	if (arg.flags & VIRTIO_HMM_LIMIT_SET)
		ctx->limit = arg.bytes == U64_MAX ? ULONG_MAX :
						    arg.bytes >> PAGE_SHIFT;
	arg.bytes = ctx->limit == ULONG_MAX ? U64_MAX :
					      (u64)ctx->limit << PAGE_SHIFT;
	arg.used = (u64)ctx->nr_frames << PAGE_SHIFT;
	spin_unlock_irq(&mem->lock);
	return copy_to_user(argp, &arg, sizeof(arg)) ? -EFAULT : 0;
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

		/* Task work, as io_uring's, looks like a signal: the call is restarted. */
		if (signal_pending(current) || mmap_read_lock_killable(current->mm))
			return -ERESTARTSYS;
		vhmm_residency(dev, current->mm, addr, next, residency, NULL);
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

static int vhmm_ioctl_on_mm(struct vhmm_context *ctx, unsigned int cmd,
			    void __user *argp)
{
	if (ctx->mm != current->mm)
		return -EBADF;
	switch (cmd) {
	case VIRTIO_HMM_IOCTL_MIGRATE:
		return vhmm_ioctl_migrate(ctx, argp);
	case VIRTIO_HMM_IOCTL_QUERY:
		return vhmm_ioctl_query(ctx->dev, argp);
	case VIRTIO_HMM_IOCTL_RELEASE:
		return vhmm_ioctl_release(ctx, argp);
	default:
		return vhmm_ioctl_limit(ctx, argp);
	}
}

static long vhmm_ioctl(struct file *filp, unsigned int cmd, unsigned long arg)
{
	struct vhmm_context *ctx = filp->private_data;
	struct vhmm_device *dev = ctx->dev;
	void __user *argp = (void __user *)arg;
	long ret;

	down_read(&dev->use);
	if (dev->gone) {
		ret = -ENODEV;
	} else {
		switch (cmd) {
		case VIRTIO_HMM_IOCTL_INFO:
			ret = vhmm_ioctl_info(dev, argp);
			break;
		case VIRTIO_HMM_IOCTL_MIGRATE:
		case VIRTIO_HMM_IOCTL_QUERY:
		case VIRTIO_HMM_IOCTL_RELEASE:
		case VIRTIO_HMM_IOCTL_LIMIT:
			ret = vhmm_ioctl_on_mm(ctx, cmd, argp);
			break;
		default:
			ret = -ENOTTY;
		}
	}
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
	/* It acts on its caller's memory, and moves that of others at most. */
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
