/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The newest kernel, whose names the driver uses.
 */
#define KERNEL_VERSION(a, b, c)	(((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE	KERNEL_VERSION(7, 3, 0)
