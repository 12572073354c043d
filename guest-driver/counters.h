/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the driver counts, shown in debugfs under these names in lower case.
 */
#ifndef VHMM_COUNTERS_H
#define VHMM_COUNTERS_H

#include <linux/types.h>

struct vhmm_device;

/* Why pages migrate. */
enum vhmm_trigger {
	VHMM_IOCTL_TO_DEVICE,
	VHMM_IOCTL_TO_SYSTEM,
	VHMM_RELEASE,
	VHMM_CPU_FAULT,
	VHMM_EVICTION,
	VHMM_EVACUATION,
	VHMM_NR_TRIGGERS
};

/* What a migration consists of; each phase begins where the one before ends. */
enum vhmm_phase {
	VHMM_SETUP,
	/* With the allocation of the destinations. */
	VHMM_COPY,
	VHMM_PAGES,
	VHMM_FINALIZE,
	VHMM_NR_PHASES
};

/*
 * The first ones follow the order of enum vhmm_trigger, the skipped ones that
 * of enum virtio_hmm_skip, and those of the three operations that of
 * VIRTIO_HMM_OP_TO_DEVICE, _FROM_DEVICE, _FILL: all are used as an offset.
 */
enum vhmm_counter {
	VHMM_PAGES_TO_DEVICE,
	VHMM_PAGES_TO_SYSTEM,
	VHMM_PAGES_RELEASED,
	VHMM_PAGES_FAULTED,
	VHMM_PAGES_EVICTED,
	VHMM_PAGES_EVACUATED,
	VHMM_PAGES_FILLED,
	VHMM_PAGES_FROM_PEER,
	VHMM_PAGES_TO_PEER,
	VHMM_THP_TO_DEVICE,
	VHMM_THP_TO_SYSTEM,
	VHMM_THP_FALLBACK,
	VHMM_CPU_FAULTS,
	VHMM_CPU_FAULTS_RETRIED,
	VHMM_CPU_FAULTS_SIGBUS,
	VHMM_CPU_FAULTS_OOM,
	VHMM_SKIPPED_ALREADY,
	VHMM_SKIPPED_BUSY,
	VHMM_SKIPPED_PINNED,
	VHMM_SKIPPED_SWAPPED,
	VHMM_SKIPPED_OTHER_DEVICE,
	VHMM_SKIPPED_UNSUPPORTED,
	VHMM_SKIPPED_UNMAPPED,
	VHMM_SKIPPED_NO_MEMORY,
	VHMM_SKIPPED_COPY_FAILED,
	VHMM_MIGRATE_RETRIES,
	VHMM_TO_DEVICE_REQUESTS,
	VHMM_FROM_DEVICE_REQUESTS,
	VHMM_FILL_REQUESTS,
	VHMM_TO_DEVICE_FRAMES,
	VHMM_FROM_DEVICE_FRAMES,
	VHMM_FILL_FRAMES,
	VHMM_TO_DEVICE_BYTES,
	VHMM_FROM_DEVICE_BYTES,
	VHMM_FILL_BYTES,
	VHMM_TO_DEVICE_UNUSED,
	VHMM_FROM_DEVICE_UNUSED,
	VHMM_FILL_UNUSED,
	VHMM_TO_DEVICE_NS,
	VHMM_FROM_DEVICE_NS,
	VHMM_FILL_NS,
	VHMM_FAULT_NS,
	VHMM_REQUEST_ERRORS,
	VHMM_REQUEST_TIMEOUTS,
	VHMM_SRC_CHANGED,
	VHMM_NR_COUNTERS
};

/* Eight buckets to each power of two of nanoseconds. */
#define VHMM_LATENCY_SHIFT	3
#define VHMM_LATENCY_BUCKETS	((64 - VHMM_LATENCY_SHIFT + 1) << VHMM_LATENCY_SHIFT)

/**
 * struct vhmm_counters - what one CPU has counted
 * @value: by &enum vhmm_counter
 * @migrations: how many there were, by trigger
 * @phase_ns: how long their phases took
 * @fault_latency: CPU faults by the time that they took, see
 *	vhmm_latency_bucket()
 *
 * The sum over all CPUs is what counts.
 */
struct vhmm_counters {
	u64 value[VHMM_NR_COUNTERS];
	u64 migrations[VHMM_NR_TRIGGERS];
	u64 phase_ns[VHMM_NR_TRIGGERS][VHMM_NR_PHASES];
	u64 fault_latency[VHMM_LATENCY_BUCKETS];
};

/**
 * struct vhmm_migration - one migration, from setup to finalize
 * @dev: the device whose pages they are or shall be
 * @trigger: why
 * @start: address of the first page; 0 if they are found by their frames
 * @nr: number of pages looked at
 * @lap: when the phase at hand began
 * @phase_ns: how long the phases took
 */
struct vhmm_migration {
	struct vhmm_device *dev;
	enum vhmm_trigger trigger;
	unsigned long start;
	unsigned long nr;
	u64 lap;
	u64 phase_ns[VHMM_NR_PHASES];
};

void vhmm_migration_begin(struct vhmm_migration *m, struct vhmm_device *dev,
			  enum vhmm_trigger trigger, unsigned long start,
			  unsigned long nr);
void vhmm_migration_lap(struct vhmm_migration *m, enum vhmm_phase phase);
void vhmm_migration_end(struct vhmm_migration *m, unsigned long moved,
			int error);
void vhmm_count_fault(struct vhmm_device *dev, u64 ns);

void vhmm_debugfs_init(void);
void vhmm_debugfs_exit(void);
void vhmm_debugfs_add(struct vhmm_device *dev);
void vhmm_debugfs_remove(struct vhmm_device *dev);

#endif /* VHMM_COUNTERS_H */
