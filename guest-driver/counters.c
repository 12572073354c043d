// SPDX-License-Identifier: GPL-2.0-only
/*
 * The driver's counters, and the device's own, in debugfs.
 */
#include <linux/debugfs.h>
#include <linux/ktime.h>
#include <linux/percpu.h>
#include <linux/seq_file.h>

#include "device.h"
#include "request.h"
#include "trace.h"

static struct dentry *vhmm_debugfs_root;

static const char * const vhmm_counter_names[VHMM_NR_COUNTERS] = {
	[VHMM_PAGES_TO_DEVICE] = "pages_to_device",
	[VHMM_PAGES_TO_SYSTEM] = "pages_to_system",
	[VHMM_PAGES_RELEASED] = "pages_released",
	[VHMM_PAGES_FAULTED] = "pages_faulted",
	[VHMM_PAGES_EVICTED] = "pages_evicted",
	[VHMM_PAGES_EVACUATED] = "pages_evacuated",
	[VHMM_PAGES_FILLED] = "pages_filled",
	[VHMM_PAGES_FROM_PEER] = "pages_from_peer",
	[VHMM_PAGES_TO_PEER] = "pages_to_peer",
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
	[VHMM_TO_DEVICE_UNUSED] = "to_device_unused",
	[VHMM_FROM_DEVICE_UNUSED] = "from_device_unused",
	[VHMM_FILL_UNUSED] = "fill_unused",
	[VHMM_TO_DEVICE_NS] = "to_device_ns",
	[VHMM_FROM_DEVICE_NS] = "from_device_ns",
	[VHMM_FILL_NS] = "fill_ns",
	[VHMM_FAULT_NS] = "fault_ns",
	[VHMM_REQUEST_ERRORS] = "request_errors",
	[VHMM_REQUEST_TIMEOUTS] = "request_timeouts",
	[VHMM_SRC_CHANGED] = "src_changed",
};

static const char * const vhmm_trigger_names[VHMM_NR_TRIGGERS] = {
	[VHMM_IOCTL_TO_DEVICE] = "ioctl_to_device",
	[VHMM_IOCTL_TO_SYSTEM] = "ioctl_to_system",
	[VHMM_RELEASE] = "release",
	[VHMM_CPU_FAULT] = "cpu_fault",
	[VHMM_EVICTION] = "eviction",
	[VHMM_EVACUATION] = "evacuation",
};

static const char * const vhmm_phase_names[VHMM_NR_PHASES] = {
	[VHMM_SETUP] = "setup",
	[VHMM_COPY] = "copy",
	[VHMM_PAGES] = "pages",
	[VHMM_FINALIZE] = "finalize",
};

static u64 vhmm_counted(const u64 __percpu *counter)
{
	u64 sum = 0;
	int cpu;

	for_each_possible_cpu(cpu)
		sum += *per_cpu_ptr(counter, cpu);
	return sum;
}

/**
 * vhmm_migration_begin() - begin to count and time a migration
 * @m: where to keep it
 * @dev: the device
 * @trigger: why
 * @start: address of the first page; 0 if they are found by their frames
 * @nr: number of pages to look at
 */
void vhmm_migration_begin(struct vhmm_migration *m, struct vhmm_device *dev,
			  enum vhmm_trigger trigger, unsigned long start,
			  unsigned long nr)
{
	*m = (struct vhmm_migration) {
		.dev = dev,
		.trigger = trigger,
		.start = start,
		.nr = nr,
		.lap = ktime_get_ns(),
	};
}

/**
 * vhmm_migration_lap() - a phase has ended, and the next one begins
 * @m: the migration
 * @phase: the phase that has ended
 */
void vhmm_migration_lap(struct vhmm_migration *m, enum vhmm_phase phase)
{
	u64 now = ktime_get_ns();

	m->phase_ns[phase] = now - m->lap;
	m->lap = now;
}

/**
 * vhmm_migration_end() - count a migration
 * @m: the migration
 * @moved: how many pages moved; holes that were filled are none
 * @error: of the setup or the copy, or 0
 */
void vhmm_migration_end(struct vhmm_migration *m, unsigned long moved, int error)
{
	struct vhmm_counters __percpu *counters = m->dev->counters;
	unsigned int i;

	this_cpu_add(counters->value[VHMM_PAGES_TO_DEVICE + m->trigger], moved);
	this_cpu_inc(counters->migrations[m->trigger]);
	for (i = 0; i < VHMM_NR_PHASES; i++)
		this_cpu_add(counters->phase_ns[m->trigger][i], m->phase_ns[i]);
	trace_vhmm_migration(m, moved, error);
}

/*
 * A time below 8 ns has a bucket of its own. Of others, the power of two and
 * the three bits that follow the first one make the bucket.
 */
static unsigned int vhmm_latency_bucket(u64 ns)
{
	unsigned int shift;

	if (ns < 1 << VHMM_LATENCY_SHIFT)
		return ns;
	shift = fls64(ns) - 1 - VHMM_LATENCY_SHIFT;
	return (shift << VHMM_LATENCY_SHIFT) + (ns >> shift);
}

/* The least time that is too long for a bucket; 0 stands for 2^64. */
static u64 vhmm_latency_bound(unsigned int bucket)
{
	unsigned int next = bucket + 1;
	unsigned int shift = next >> VHMM_LATENCY_SHIFT;

	if (!shift)
		return next;
	return (u64)(next - ((shift - 1) << VHMM_LATENCY_SHIFT)) << (shift - 1);
}

/**
 * vhmm_count_fault() - count a CPU fault and the time that it took
 * @dev: the device
 * @ns: nanoseconds
 */
void vhmm_count_fault(struct vhmm_device *dev, u64 ns)
{
	vhmm_count(dev, VHMM_CPU_FAULTS, 1);
	vhmm_count(dev, VHMM_FAULT_NS, ns);
	this_cpu_inc(dev->counters->fault_latency[vhmm_latency_bucket(ns)]);
}

static void vhmm_show_migrations(struct seq_file *m, struct vhmm_device *dev,
				 enum vhmm_trigger t)
{
	unsigned int i;

	seq_printf(m, "%s_migrate_count %llu\n", vhmm_trigger_names[t],
		   vhmm_counted(&dev->counters->migrations[t]));
	for (i = 0; i < VHMM_NR_PHASES; i++)
		seq_printf(m, "%s_migrate_%s_ns %llu\n", vhmm_trigger_names[t],
			   vhmm_phase_names[i],
			   vhmm_counted(&dev->counters->phase_ns[t][i]));
}

static int counters_show(struct seq_file *m, void *unused)
{
	struct vhmm_device *dev = m->private;
	unsigned int i;

	for (i = 0; i < VHMM_NR_COUNTERS; i++)
		seq_printf(m, "%s %llu\n", vhmm_counter_names[i],
			   vhmm_counted(&dev->counters->value[i]));
	for (i = 0; i < VHMM_NR_TRIGGERS; i++)
		vhmm_show_migrations(m, dev, i);
	seq_printf(m, "frames_total %lu\n", dev->memory.nr_frames);
	seq_printf(m, "frames_free %lu\n",
		   dev->memory.nr_frames - vhmm_memory_used(dev));
	seq_printf(m, "broken %d\n", vhmm_device_is_broken(dev));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(counters);

static int fault_latency_show(struct seq_file *m, void *unused)
{
	struct vhmm_device *dev = m->private;
	unsigned int i;
	u64 nr;

	for (i = 0; i < VHMM_LATENCY_BUCKETS; i++) {
		nr = vhmm_counted(&dev->counters->fault_latency[i]);
		if (nr)
			seq_printf(m, "%llu %llu\n", vhmm_latency_bound(i), nr);
	}
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(fault_latency);

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
	debugfs_create_file("fault_latency", 0444, dev->debugfs, dev,
			    &fault_latency_fops);
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
