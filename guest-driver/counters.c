// SPDX-License-Identifier: GPL-2.0-only
/*
 * The driver's counters, and the device's own, in debugfs.
 */
#include <linux/debugfs.h>
#include <linux/seq_file.h>

#include "device.h"
#include "request.h"

static struct dentry *vhmm_debugfs_root;

static const char * const vhmm_counter_names[VHMM_NR_COUNTERS] = {
	[VHMM_PAGES_TO_DEVICE] = "pages_to_device",
	[VHMM_PAGES_FILLED] = "pages_filled",
	[VHMM_PAGES_TO_SYSTEM] = "pages_to_system",
	[VHMM_PAGES_FAULTED] = "pages_faulted",
	[VHMM_PAGES_EVACUATED] = "pages_evacuated",
	[VHMM_PAGES_EVICTED] = "pages_evicted",
	[VHMM_PAGES_FROM_PEER] = "pages_from_peer",
	[VHMM_THP_TO_DEVICE] = "thp_to_device",
	[VHMM_THP_TO_SYSTEM] = "thp_to_system",
	[VHMM_THP_FALLBACK] = "thp_fallback",
	[VHMM_CPU_FAULTS] = "cpu_faults",
	[VHMM_CPU_FAULTS_RETRIED] = "cpu_faults_retried",
	[VHMM_CPU_FAULTS_SIGBUS] = "cpu_faults_sigbus",
	[VHMM_CPU_FAULTS_OOM] = "cpu_faults_oom",
	[VHMM_SKIPPED_ALREADY] = "skipped_already",
	[VHMM_SKIPPED_BUSY] = "skipped_busy",
	[VHMM_SKIPPED_PINNED] = "skipped_pinned",
	[VHMM_SKIPPED_SWAPPED] = "skipped_swapped",
	[VHMM_SKIPPED_OTHER_DEVICE] = "skipped_other_device",
	[VHMM_SKIPPED_UNSUPPORTED] = "skipped_unsupported",
	[VHMM_SKIPPED_UNMAPPED] = "skipped_unmapped",
	[VHMM_SKIPPED_NO_MEMORY] = "skipped_no_memory",
	[VHMM_SKIPPED_COPY_FAILED] = "skipped_copy_failed",
	[VHMM_MIGRATE_RETRIES] = "migrate_retries",
	[VHMM_TO_DEVICE_REQUESTS] = "to_device_requests",
	[VHMM_FROM_DEVICE_REQUESTS] = "from_device_requests",
	[VHMM_FILL_REQUESTS] = "fill_requests",
	[VHMM_TO_DEVICE_FRAMES] = "to_device_frames",
	[VHMM_FROM_DEVICE_FRAMES] = "from_device_frames",
	[VHMM_FILL_FRAMES] = "fill_frames",
	[VHMM_TO_DEVICE_BYTES] = "to_device_bytes",
	[VHMM_FROM_DEVICE_BYTES] = "from_device_bytes",
	[VHMM_FILL_BYTES] = "fill_bytes",
	[VHMM_TO_DEVICE_NS] = "to_device_ns",
	[VHMM_FROM_DEVICE_NS] = "from_device_ns",
	[VHMM_FILL_NS] = "fill_ns",
	[VHMM_FAULT_NS] = "fault_ns",
	[VHMM_REQUEST_ERRORS] = "request_errors",
	[VHMM_REQUEST_TIMEOUTS] = "request_timeouts",
	[VHMM_SRC_CHANGED] = "src_changed",
};

static int counters_show(struct seq_file *m, void *unused)
{
	struct vhmm_device *dev = m->private;
	unsigned int i;

	for (i = 0; i < VHMM_NR_COUNTERS; i++)
		seq_printf(m, "%s %lld\n", vhmm_counter_names[i],
			   atomic64_read(&dev->counters[i]));
	seq_printf(m, "frames_total %lu\n", dev->memory.nr_frames);
	seq_printf(m, "frames_free %lu\n",
		   dev->memory.nr_frames - vhmm_memory_used(dev));
	seq_printf(m, "broken %d\n", vhmm_device_is_broken(dev));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(counters);

static void vhmm_show_op(struct seq_file *m, const char *op,
			 const struct virtio_hmm_op_counters *c)
{
	seq_printf(m, "%s_requests %llu\n", op, le64_to_cpu(c->requests));
	seq_printf(m, "%s_frames %llu\n", op, le64_to_cpu(c->frames));
	seq_printf(m, "%s_bytes %llu\n", op, le64_to_cpu(c->bytes));
	seq_printf(m, "%s_errors %llu\n", op, le64_to_cpu(c->errors));
}

static int device_counters_show(struct seq_file *m, void *unused)
{
	struct vhmm_device *dev = m->private;
	struct virtio_hmm_counters c;
	int ret;

	/* Removing the file waits for us, so the device is bound. */
	ret = vhmm_control_counters(dev, &c);
	if (ret)
		return ret;
	vhmm_show_op(m, "to_device", &c.to_device);
	vhmm_show_op(m, "from_device", &c.from_device);
	vhmm_show_op(m, "fill", &c.fill);
	vhmm_show_op(m, "device_to_device", &c.device_to_device);
	vhmm_show_op(m, "discard", &c.discard);
	seq_printf(m, "unsupported %llu\n", le64_to_cpu(c.unsupported));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(device_counters);

void vhmm_debugfs_add(struct vhmm_device *dev)
{
	dev->debugfs = debugfs_create_dir(dev->misc.name, vhmm_debugfs_root);
	debugfs_create_file("counters", 0444, dev->debugfs, dev, &counters_fops);
	debugfs_create_file("device_counters", 0444, dev->debugfs, dev,
			    &device_counters_fops);
}

void vhmm_debugfs_remove(struct vhmm_device *dev)
{
	debugfs_remove_recursive(dev->debugfs);
}

void vhmm_debugfs_init(void)
{
	vhmm_debugfs_root = debugfs_create_dir("virtio_hmm", NULL);
}

void vhmm_debugfs_exit(void)
{
	debugfs_remove_recursive(vhmm_debugfs_root);
}
