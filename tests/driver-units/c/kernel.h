/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * What the tested parts of the driver need of the kernel, for one thread in
 * user space. Types that only lie in structures are empty.
 */
#ifndef KERNEL_H
#define KERNEL_H

#undef NDEBUG
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <limits.h>
#include <linux/types.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s64 s64;
typedef unsigned int gfp_t;
typedef unsigned int vm_fault_t;
typedef struct { } wait_queue_head_t;

struct device { };
struct kref {
	unsigned int refcount;
};

struct miscdevice { };
struct mutex { };
struct notifier_block { };
struct rw_semaphore { };
struct mm_struct;
struct virtqueue;
struct vm_area_struct;
struct vm_fault;
struct virtio_device {
	struct device dev;
};

#define __percpu
#define HZ			100
#define READ_ONCE(x)		(x)
#define ALIGN(x, to)		(((x) + (to) - 1) / (to) * (to))
#define cpu_to_le32		htole32
#define cpu_to_le64		htole64
#define le32_to_cpu		le32toh
#define le64_to_cpu		le64toh
#define this_cpu_add(x, n)	((x) += (n))

#define container_of(ptr, type, member) \
	((type *)((char *)(ptr) - offsetof(type, member)))
#define min(a, b) ({			\
	__auto_type _a = (a);		\
	__auto_type _b = (b);		\
	_a < _b ? _a : _b;		\
})
#define max(a, b) ({			\
	__auto_type _a = (a);		\
	__auto_type _b = (b);		\
	_a > _b ? _a : _b;		\
})

#define IS_ERR(ptr)		((unsigned long)(ptr) >= -4095UL)
#define PTR_ERR(ptr)		((long)(ptr))

#define dev_notice(dev, ...)	((void)(dev))
#define dev_err_ratelimited(dev, ...)	((void)(dev))
#define dev_to_node(dev)	((void)(dev), 0)

/* Memory of the kernel. What was not asked to be zero is not. */
#define GFP_KERNEL		0

/* Allocations of this thread that were not freed. */
extern __thread long kernel_allocated;

/* What is in front of and behind them. */
#define KMALLOC_GUARD		16

static inline void *kmalloc(size_t size, gfp_t gfp)
{
	u8 *p = malloc(size + 2 * KMALLOC_GUARD);

	assert(p);
	kernel_allocated++;
	memset(p, 0x5a, size + 2 * KMALLOC_GUARD);
	memcpy(p, &size, sizeof(size));
	return p + KMALLOC_GUARD;
}

static inline void *kzalloc(size_t size, gfp_t gfp)
{
	return memset(kmalloc(size, gfp), 0, size);
}

static inline void kfree(void *p)
{
	u8 *start = p - KMALLOC_GUARD;
	size_t size, i;

	if (!p)
		return;
	memcpy(&size, start, sizeof(size));
	for (i = 0; i < KMALLOC_GUARD; i++)
		assert(start[KMALLOC_GUARD + size + i] == 0x5a);
	kernel_allocated--;
	free(start);
}

#define kvcalloc(n, size, gfp)	kzalloc((n) * (size), gfp)
#define vcalloc(n, size)	kzalloc((n) * (size), GFP_KERNEL)
#define kvfree			kfree
#define vfree			kfree

/* Locks, which are only looked at. */
typedef struct {
	bool held;
} spinlock_t;

static inline void spin_lock_init(spinlock_t *lock)
{
	lock->held = false;
}

static inline void spin_lock_irq(spinlock_t *lock)
{
	assert(!lock->held);
	lock->held = true;
}

static inline void spin_unlock_irq(spinlock_t *lock)
{
	assert(lock->held);
	lock->held = false;
}

#define spin_lock_irqsave(lock, flags)		((flags) = 0, spin_lock_irq(lock))
#define spin_unlock_irqrestore(lock, flags)	((void)(flags), spin_unlock_irq(lock))
#define lockdep_assert_held(lock)		assert((lock)->held)

/* Nothing can be waited for. */
#define init_waitqueue_head(wq)			((void)(wq))
#define wake_up_all(wq)				((void)(wq))
#define wait_event_timeout(wq, condition, timeout) \
	({ assert(condition); 1; })

/* Work is done at once. */
struct work_struct;
typedef void (*work_func_t)(struct work_struct *work);

struct work_struct {
	work_func_t func;
};

struct delayed_work {
	struct work_struct work;
};

struct workqueue_struct;

#define WQ_UNBOUND				0
#define INIT_WORK(work, f)			((work)->func = (f))
#define alloc_workqueue(name, flags, n)		((struct workqueue_struct *)-1L)
#define destroy_workqueue(wq)			((void)(wq))

static inline bool queue_work(struct workqueue_struct *wq,
			      struct work_struct *work)
{
	work->func(work);
	return true;
}

/* The module: how often it is in use. */
#define THIS_MODULE				(&kernel_module_users)

extern __thread long kernel_module_users;

static inline bool try_module_get(long *users)
{
	++*users;
	return true;
}

static inline void module_put(long *users)
{
	--*users;
}

struct list_head {
	struct list_head *next, *prev;
};

static inline void INIT_LIST_HEAD(struct list_head *list)
{
	list->next = list;
	list->prev = list;
}

static inline bool list_empty(const struct list_head *list)
{
	return list->next == list;
}

static inline void list_add_tail(struct list_head *node, struct list_head *list)
{
	node->next = list;
	node->prev = list->prev;
	list->prev->next = node;
	list->prev = node;
}

static inline void list_del(struct list_head *node)
{
	node->next->prev = node->prev;
	node->prev->next = node->next;
}

static inline void list_move_tail(struct list_head *node,
				  struct list_head *list)
{
	list_del(node);
	list_add_tail(node, list);
}

#define BITS_PER_LONG		(CHAR_BIT * sizeof(long))

static inline bool test_bit(unsigned long bit, const unsigned long *map)
{
	return map[bit / BITS_PER_LONG] >> bit % BITS_PER_LONG & 1;
}

static inline void __assign_bit(unsigned long bit, unsigned long *map,
				bool value)
{
	unsigned long mask = 1UL << bit % BITS_PER_LONG;

	map[bit / BITS_PER_LONG] &= ~mask;
	if (value)
		map[bit / BITS_PER_LONG] |= mask;
}

#define clear_bit(bit, map)			__assign_bit(bit, map, false)

static inline void bitmap_set(unsigned long *map, unsigned int start,
			      unsigned int nr)
{
	while (nr--)
		__assign_bit(start++, map, true);
}

static inline void bitmap_clear(unsigned long *map, unsigned int start,
				unsigned int nr)
{
	while (nr--)
		__assign_bit(start++, map, false);
}

static inline unsigned long find_next(const unsigned long *map,
				      unsigned long size, unsigned long bit,
				      bool value)
{
	while (bit < size && test_bit(bit, map) != value)
		bit++;
	return min(bit, size);
}

#define find_first_bit(map, size)		find_next(map, size, 0, true)
#define find_next_bit(map, size, bit)		find_next(map, size, bit, true)
#define find_next_zero_bit(map, size, bit)	find_next(map, size, bit, false)
#define bitmap_fill(map, nr)			bitmap_set(map, 0, nr)
#define bitmap_bytes(nr)			(ALIGN(nr, BITS_PER_LONG) / CHAR_BIT)
#define bitmap_alloc(nr, gfp)			kmalloc(bitmap_bytes(nr), gfp)
#define bitmap_zalloc(nr, gfp)			kzalloc(bitmap_bytes(nr), gfp)
#define bitmap_free				kfree

#define PAGE_SHIFT		12
#define PAGE_SIZE		(1UL << PAGE_SHIFT)
#define PHYS_PFN(x)		((unsigned long)((x) >> PAGE_SHIFT))
#define HPAGE_PMD_ORDER		9
#define HPAGE_PMD_NR		(1 << HPAGE_PMD_ORDER)

struct dev_pagemap;

/* A page that is in use has one reference. */
struct page {
	struct dev_pagemap *pgmap;
	unsigned int refcount;
	unsigned int order;
	/* Those that the core leaves on a page that is freed. */
	unsigned int flags;
} __attribute__((aligned(32)));

struct folio {
	struct page page;
};

/* As with a vmemmap at address 0. */
#define page_to_pfn(p)		((unsigned long)(p) / sizeof(struct page))
#define pfn_to_page(pfn)	((struct page *)((pfn) * sizeof(struct page)))

#define page_pgmap(p)		((p)->pgmap)
#define folio_nr_pages(folio)	(1UL << (folio)->page.order)

enum { PG_mlocked, PG_unevictable, PG_active, PG_workingset, PG_swapbacked, PG_all };

static inline bool folio_clear(struct folio *folio, unsigned int flag)
{
	bool was = folio->page.flags >> flag & 1;

	folio->page.flags &= ~(1U << flag);
	return was;
}

#define folio_test_clear_mlocked(folio)		folio_clear(folio, PG_mlocked)
#define folio_clear_unevictable(folio)		folio_clear(folio, PG_unevictable)
#define folio_clear_active(folio)		folio_clear(folio, PG_active)
#define folio_clear_workingset(folio)		folio_clear(folio, PG_workingset)
#define folio_clear_swapbacked(folio)		folio_clear(folio, PG_swapbacked)

/* The pages of this thread that are mlocked. */
extern __thread long kernel_mlocked;

#define NR_MLOCK				(&kernel_mlocked)
#define folio_zone(folio)			NULL
#define mod_zone_page_state(zone, item, n)	((void)(zone), *(item) += (n))

static inline void zone_device_page_init(struct page *page,
					 struct dev_pagemap *pgmap,
					 unsigned int order)
{
	page->pgmap = pgmap;
	page->refcount++;
	page->order = order;
}

#define zone_device_folio_init(folio, pgmap, order) \
	zone_device_page_init(&(folio)->page, pgmap, order)

struct dev_pagemap_ops {
	void (*folio_free)(struct folio *folio);
	vm_fault_t (*migrate_to_ram)(struct vm_fault *vmf);
};

struct resource {
	u64 start;
	u64 end;
};

struct dev_pagemap {
	int type;
	int nr_range;
	struct resource range;
	const struct dev_pagemap_ops *ops;
	void *owner;
};

#define MEMORY_DEVICE_PRIVATE			1
#define memremap_pages(pgmap, nid)		((void)(nid), (void *)(pgmap))
#define memunmap_pages(pgmap)			((void)(pgmap))
#define resource_size(res)			((res)->end - (res)->start + 1)

extern struct resource iomem_resource;

/* The addresses are those that have the pages which are allocated here. */
static inline struct resource *request_free_mem_region(struct resource *base,
						       unsigned long size,
						       const char *name)
{
	size_t bytes = PHYS_PFN(size) * sizeof(struct page);
	void *pages = aligned_alloc(sizeof(struct page), 2 * bytes);
	struct resource *res = pages + bytes;

	assert(pages && sizeof(*res) <= bytes);
	memset(pages, 0, bytes);
	kernel_allocated++;
	res->start = (u64)page_to_pfn(pages) << PAGE_SHIFT;
	res->end = res->start + size - 1;
	return res;
}

static inline void release_mem_region(u64 start, u64 size)
{
	kernel_allocated--;
	free(pfn_to_page(PHYS_PFN(start)));
}

struct scatterlist {
	void *page;
	unsigned int length;
	bool end;
};

#define sg_page(sg)				((sg)->page)
#define sg_mark_end(sg)				((void)((sg)->end = true))
#define sg_unmark_end(sg)			((void)((sg)->end = false))
#define sg_set_page(sg, p, len, offset)		sg_set(sg, p, len)
#define sg_init_one(sg, p, len)			(sg_init_table(sg, 1), sg_set(sg, p, len))

static inline void sg_init_table(struct scatterlist *sg, unsigned int nr)
{
	memset(sg, 0, nr * sizeof(*sg));
	sg_mark_end(sg + nr - 1);
}

static inline void sg_set(struct scatterlist *sg, void *page,
			  unsigned int length)
{
	sg->page = page;
	sg->length = length;
}

struct completion {
	bool done;
};

#define init_completion(x)			((x)->done = false)
#define reinit_completion(x)			((x)->done = false)
#define complete(x)				((x)->done = true)

typedef struct {
	s64 counter;
} atomic64_t;

#define atomic64_inc_return(v)			(++(v)->counter)
#define atomic64_read(v)			((v)->counter)
#define num_online_cpus()			2U
#define raw_smp_processor_id()			1
#define DIV_ROUND_UP(n, d)			(((n) + (d) - 1) / (d))

/* No time passes. */
typedef s64 ktime_t;

#define ktime_get()				0
#define ktime_sub(a, b)				((a) - (b))
#define ktime_to_ns(time)			(time)

#define TP_PROTO(...)				__VA_ARGS__
#define TRACE_EVENT(name, proto, ...)		static inline void trace_##name(proto) { }
#define TRACE_DEFINE_ENUM(name)			struct vhmm_device

#define mmgrab(mm)				((void)(mm))
#define mmdrop(mm)				((void)(mm))
#define vma_is_anonymous(vma)			((void)(vma), false)
#define userfaultfd_missing(vma)		((void)(vma), false)

#endif /* KERNEL_H */
