//! The vhost-user device of one session: its features, its configuration, and a
//! worker for each queue.

use std::{
    io,
    os::fd::RawFd,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use tracing::debug;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringMutex};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vm_memory::{ByteValued, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::{
    abi::{VIRTIO_HMM_QUEUE_CONTROL, VIRTIO_HMM_QUEUE_COPY, virtio_hmm_config},
    chain::MAX_DESCRIPTORS,
    counters::Counters,
    engine::Engine,
    inject::Injector,
    link::Link,
    processor::Processor,
    request::QueueKind,
    stop::Stop,
    worker::Worker,
};

/// Most bytes of configuration that a VMM reads; those after the device's own
/// read as zero.
const CONFIG_SPACE: usize = 256;

/// The device, from the connection of a VM to its end.
pub struct Backend {
    config: virtio_hmm_config,
    queues: Vec<Queue>,
    stop: Arc<Stop>,
}

struct Queue {
    /// None for the event queue, whose buffers wait for events.
    worker: Option<Mutex<Worker>>,
    /// The ring, once it has been served.
    vring: OnceLock<VringMutex>,
}

impl Backend {
    /// A device of this configuration, for a VM with memory `mem`.
    ///
    /// # Errors
    /// If the host refuses what a worker needs.
    pub fn new(
        config: virtio_hmm_config,
        mem: GuestMemoryAtomic<GuestMemoryMmap>,
        engine: &Engine,
        counters: &Arc<Counters>,
        injector: &Arc<Injector>,
        link: Option<Link>,
        stop: Arc<Stop>,
    ) -> io::Result<Self> {
        let copy_queues = u32::from(config.copy_queues);
        let link = link.map(Arc::new);
        let queues = (0..VIRTIO_HMM_QUEUE_COPY + copy_queues).map(|index| {
            let kind = match index {
                VIRTIO_HMM_QUEUE_CONTROL => Some(QueueKind::Control),
                VIRTIO_HMM_QUEUE_COPY.. => Some(QueueKind::Copy),
                _ => None,
            };
            let worker = kind.map(|kind| {
                let processor =
                    Processor::new(kind, index as usize, engine.clone(), Arc::clone(counters));
                let (counters, injector) = (Arc::clone(counters), Arc::clone(injector));
                let (mem, link) = (mem.clone(), link.clone());
                Worker::new(index, mem, processor, counters, injector, link).map(Mutex::new)
            });
            Ok(Queue {
                worker: worker.transpose()?,
                vring: OnceLock::new(),
            })
        });
        Ok(Self {
            config,
            queues: queues.collect::<io::Result<_>>()?,
            stop,
        })
    }

    /// Token of the event that ends a worker.
    pub fn stop_token(&self) -> u64 {
        // The library takes the numbers up to that of queues for itself.
        self.queues.len() as u64 + 1
    }

    /// Token of the timer of a worker.
    pub fn timer_token(&self) -> u64 {
        self.stop_token() + 1
    }

    /// The timer of each worker, if it has one.
    pub fn timers(&self) -> impl Iterator<Item = Option<RawFd>> {
        let worker = |queue: &Queue| queue.worker.as_ref().map(|worker| lock(worker).timer());
        self.queues.iter().map(worker)
    }
}

fn lock(worker: &Mutex<Worker>) -> MutexGuard<'_, Worker> {
    worker.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        self.queues.len()
    }

    fn max_queue_size(&self) -> usize {
        MAX_DESCRIPTORS.into()
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The rings know.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut space = self.config.as_slice().to_vec();
        space.resize(CONFIG_SPACE, 0);
        let start = offset as usize;
        let range = start..start.saturating_add(size as usize);
        // An answer that is too short tells the frontend that it failed.
        space.get(range).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn set_config(&self, offset: u32, buf: &[u8]) -> io::Result<()> {
        // An error would end the session.
        debug!(
            "ignored: {} bytes written to the configuration at {offset}",
            buf.len()
        );
        Ok(())
    }

    fn update_memory(&self, _mem: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        // The workers have the same object.
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues.len()).map(|index| 1 << index).collect()
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        if let Some(queue) = self.queues.get(queue_index as usize)
            && let (Some(worker), Some(vring)) = (&queue.worker, queue.vring.get())
        {
            lock(worker).stop(vring);
        }
        Ok(())
    }

    /// Worker `thread_id` serves the queue of the same number, alone.
    fn handle_event(
        &self,
        device_event: u16,
        _events: EventSet,
        vrings: &[VringMutex],
        thread_id: usize,
    ) -> io::Result<()> {
        if u64::from(device_event) == self.stop_token() {
            // An error is what ends a worker.
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        if let (Some(queue), Some(vring)) = (self.queues.get(thread_id), vrings.first())
            && let Some(worker) = &queue.worker
        {
            let vring = queue.vring.get_or_init(|| vring.clone());
            let mut worker = lock(worker);
            if u64::from(device_event) != self.timer_token() {
                worker.kicked();
            }
            worker.drain(vring, || self.stop.requested());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        hardware::Events,
        memory::{Backing, Memory},
        session::Shared,
    };

    #[test]
    fn configuration_beyond_what_the_protocol_carries_is_refused() {
        let shared = Shared::new(2 << 20, 2, Events::default());
        let session = shared.begin();
        let backend = Backend::new(
            shared.config(&session),
            GuestMemoryAtomic::new(GuestMemoryMmap::new()),
            &Engine::new(Arc::new(Memory::new(2 << 20, Backing::Sparse).unwrap())),
            &session.counters,
            &Arc::new(Injector::new(0, &[], 2).unwrap()),
            None,
            Arc::new(Stop::new().unwrap()),
        )
        .unwrap();
        assert_eq!(backend.get_config(0, 256).len(), 256);
        assert_eq!(backend.get_config(255, 1), [0]);
        for (offset, size) in [(0, 257), (255, 2), (256, 1), (u32::MAX, 1), (8, u32::MAX)] {
            assert!(
                backend.get_config(offset, size).is_empty(),
                "{offset} {size}"
            );
        }
    }
}
