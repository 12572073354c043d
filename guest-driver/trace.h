/* SPDX-License-Identifier: GPL-2.0-only */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM virtio_hmm

#if !defined(VHMM_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define VHMM_TRACE_H

#include <linux/mm.h>
#include <linux/tracepoint.h>

#include "context.h"
#include "counters.h"
#include "device.h"
#include "request.h"

TRACE_DEFINE_ENUM(VHMM_IOCTL_TO_DEVICE);
TRACE_DEFINE_ENUM(VHMM_IOCTL_TO_SYSTEM);
TRACE_DEFINE_ENUM(VHMM_RELEASE);
TRACE_DEFINE_ENUM(VHMM_CPU_FAULT);
TRACE_DEFINE_ENUM(VHMM_EVICTION);
TRACE_DEFINE_ENUM(VHMM_EVACUATION);

#define vhmm_print_trigger(trigger)					\
	__print_symbolic(trigger,					\
			 { VHMM_IOCTL_TO_DEVICE,			\
			   "direction=to_device trigger=ioctl" },	\
			 { VHMM_IOCTL_TO_SYSTEM,			\
			   "direction=to_system trigger=ioctl" },	\
			 { VHMM_RELEASE,				\
			   "direction=to_system trigger=release" },	\
			 { VHMM_CPU_FAULT,				\
			   "direction=to_system trigger=cpu_fault" },	\
			 { VHMM_EVICTION,				\
			   "direction=to_system trigger=eviction" },	\
			 { VHMM_EVACUATION,				\
			   "direction=to_system trigger=evacuation" })

TRACE_EVENT(vhmm_migrate_begin,
	TP_PROTO(struct vhmm_device *dev, enum vhmm_trigger trigger,
		 unsigned long start, unsigned long end),
	TP_ARGS(dev, trigger, start, end),
	TP_STRUCT__entry(
		__field(int, id)
		__field(unsigned int, trigger)
		__field(unsigned long, start)
		__field(unsigned long, end)
	),
	TP_fast_assign(
		__entry->id = dev->id;
		__entry->trigger = trigger;
		__entry->start = start;
		__entry->end = end;
	),
	TP_printk("hmm%d %s start=%#lx end=%#lx pages=%lu",
		  __entry->id, vhmm_print_trigger(__entry->trigger),
		  __entry->start, __entry->end,
		  (__entry->end - __entry->start) >> PAGE_SHIFT)
);

TRACE_EVENT(vhmm_migrate_end,
	TP_PROTO(struct vhmm_device *dev, enum vhmm_trigger trigger,
		 const struct virtio_hmm_migrate *arg, int error),
	TP_ARGS(dev, trigger, arg, error),
	TP_STRUCT__entry(
		__field(int, id)
		__field(unsigned int, trigger)
		__field(u64, start)
		__field(u64, end)
		__field(u64, moved)
		__field(u64, filled)
		__field(u64, done)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->id = dev->id;
		__entry->trigger = trigger;
		__entry->start = arg->start;
		__entry->end = arg->start + arg->length;
		__entry->moved = arg->moved;
		__entry->filled = arg->filled;
		__entry->done = arg->done >> PAGE_SHIFT;
		__entry->error = error;
	),
	TP_printk("hmm%d %s start=%#llx end=%#llx done=%llu moved=%llu filled=%llu error=%d",
		  __entry->id, vhmm_print_trigger(__entry->trigger),
		  __entry->start, __entry->end, __entry->done, __entry->moved,
		  __entry->filled, __entry->error)
);

TRACE_EVENT(vhmm_migration,
	TP_PROTO(const struct vhmm_migration *m, unsigned long moved, int error),
	TP_ARGS(m, moved, error),
	TP_STRUCT__entry(
		__field(int, id)
		__field(unsigned int, trigger)
		__field(unsigned long, start)
		__field(unsigned long, pages)
		__field(unsigned long, moved)
		__field(u64, setup_ns)
		__field(u64, copy_ns)
		__field(u64, pages_ns)
		__field(u64, finalize_ns)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->id = m->dev->id;
		__entry->trigger = m->trigger;
		__entry->start = m->start;
		__entry->pages = m->nr;
		__entry->moved = moved;
		__entry->setup_ns = m->phase_ns[VHMM_SETUP];
		__entry->copy_ns = m->phase_ns[VHMM_COPY];
		__entry->pages_ns = m->phase_ns[VHMM_PAGES];
		__entry->finalize_ns = m->phase_ns[VHMM_FINALIZE];
		__entry->error = error;
	),
	TP_printk("hmm%d %s start=%#lx pages=%lu moved=%lu setup_ns=%llu copy_ns=%llu pages_ns=%llu finalize_ns=%llu error=%d",
		  __entry->id, vhmm_print_trigger(__entry->trigger),
		  __entry->start, __entry->pages, __entry->moved,
		  __entry->setup_ns, __entry->copy_ns, __entry->pages_ns,
		  __entry->finalize_ns, __entry->error)
);

TRACE_EVENT(vhmm_evacuate,
	TP_PROTO(struct vhmm_device *dev, unsigned long frame, unsigned long nr,
		 unsigned long moved),
	TP_ARGS(dev, frame, nr, moved),
	TP_STRUCT__entry(
		__field(int, id)
		__field(unsigned long, frame)
		__field(unsigned long, nr)
		__field(unsigned long, moved)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->id = dev->id;
		__entry->frame = frame;
		__entry->nr = nr;
		__entry->moved = moved;
		__entry->error = moved < nr ? -EBUSY : 0;
	),
	TP_printk("hmm%d direction=to_system trigger=evacuation frame=%lu frames=%lu moved=%lu error=%d",
		  __entry->id, __entry->frame, __entry->nr, __entry->moved,
		  __entry->error)
);

TRACE_EVENT(vhmm_evict,
	TP_PROTO(struct vhmm_device *dev, enum vhmm_trigger trigger,
		 const struct vhmm_allocation *victim, unsigned long moved),
	TP_ARGS(dev, trigger, victim, moved),
	TP_STRUCT__entry(
		__field(int, id)
		__field(unsigned int, trigger)
		__field(unsigned long, start)
		__field(unsigned long, end)
		__field(unsigned long, moved)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->id = dev->id;
		__entry->trigger = trigger;
		__entry->start = victim->start;
		__entry->end = victim->end;
		__entry->moved = moved;
		__entry->error = moved ? 0 : -EBUSY;
	),
	TP_printk("hmm%d %s start=%#lx end=%#lx pages=%lu moved=%lu error=%d",
		  __entry->id, vhmm_print_trigger(__entry->trigger),
		  __entry->start, __entry->end,
		  (__entry->end - __entry->start) >> PAGE_SHIFT, __entry->moved,
		  __entry->error)
);

TRACE_EVENT(vhmm_cpu_fault,
	TP_PROTO(struct vhmm_device *dev, const struct vm_fault *vmf, u64 ns,
		 vm_fault_t result),
	TP_ARGS(dev, vmf, ns, result),
	TP_STRUCT__entry(
		__field(int, id)
		__field(unsigned long, address)
		__field(u64, ns)
		__field(unsigned int, result)
	),
	TP_fast_assign(
		__entry->id = dev->id;
		__entry->address = vmf->address & PAGE_MASK;
		__entry->ns = ns;
		__entry->result = (__force unsigned int)result;
	),
	TP_printk("hmm%d direction=to_system trigger=cpu_fault address=%#lx ns=%llu error=%#x",
		  __entry->id, __entry->address, __entry->ns, __entry->result)
);

TRACE_EVENT(vhmm_copy_submit,
	TP_PROTO(const struct vhmm_request *r),
	TP_ARGS(r),
	TP_STRUCT__entry(
		__field(int, id)
		__field(u64, cookie)
		__field(u32, op)
		__field(u32, frames)
		__field(u32, extents)
	),
	TP_fast_assign(
		__entry->id = r->dev->id;
		__entry->cookie = le64_to_cpu(r->req->cookie);
		__entry->op = le32_to_cpu(r->req->op);
		__entry->frames = le32_to_cpu(r->req->nr_frames);
		__entry->extents = le32_to_cpu(r->req->nr_extents);
	),
	TP_printk("hmm%d cookie=%llu op=%#x frames=%u extents=%u",
		  __entry->id, __entry->cookie, __entry->op, __entry->frames,
		  __entry->extents)
);

TRACE_EVENT(vhmm_copy_complete,
	TP_PROTO(const struct vhmm_request *r, int error),
	TP_ARGS(r, error),
	TP_STRUCT__entry(
		__field(int, id)
		__field(u64, cookie)
		__field(u32, op)
		__field(u32, status)
		__field(u32, done)
		__field(u64, ns)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->id = r->dev->id;
		__entry->cookie = le64_to_cpu(r->req->cookie);
		__entry->op = le32_to_cpu(r->req->op);
		__entry->status = le32_to_cpu(r->resp->status);
		__entry->done = le32_to_cpu(r->resp->frames_done);
		__entry->ns = r->latency_ns;
		__entry->error = error;
	),
	TP_printk("hmm%d cookie=%llu op=%#x status=%u frames_done=%u ns=%llu error=%d",
		  __entry->id, __entry->cookie, __entry->op, __entry->status,
		  __entry->done, __entry->ns, __entry->error)
);

#endif /* VHMM_TRACE_H */

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
