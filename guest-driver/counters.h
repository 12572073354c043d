/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the driver counts, shown in debugfs under these names in lower case.
 */
#ifndef VHMM_COUNTERS_H
#define VHMM_COUNTERS_H

struct vhmm_device;

/*
 * The skipped counters follow the order of enum virtio_hmm_skip, and those of
 * the three operations that of VIRTIO_HMM_OP_TO_DEVICE, _FROM_DEVICE, _FILL:
 * both are used as an offset.
 */
enum vhmm_counter {
	VHMM_PAGES_TO_DEVICE,
	VHMM_PAGES_FILLED,
	VHMM_PAGES_TO_SYSTEM,
	VHMM_PAGES_FAULTED,
	VHMM_PAGES_EVACUATED,
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
	VHMM_TO_DEVICE_NS,
	VHMM_FROM_DEVICE_NS,
	VHMM_FILL_NS,
	VHMM_FAULT_NS,
	VHMM_REQUEST_ERRORS,
	VHMM_REQUEST_TIMEOUTS,
	VHMM_SRC_CHANGED,
	VHMM_NR_COUNTERS
};

void vhmm_debugfs_init(void);
void vhmm_debugfs_exit(void);
void vhmm_debugfs_add(struct vhmm_device *dev);
void vhmm_debugfs_remove(struct vhmm_device *dev);

#endif /* VHMM_COUNTERS_H */
