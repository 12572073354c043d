//! The vhost-user device of one session: its features, its configuration, and a
//! worker for each queue.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tracing::{debug, error};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringMutex, VringState, VringT};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{ByteValued, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::{
    ErrorChain,
    abi::{VIRTIO_HMM_QUEUE_CONTROL, VIRTIO_HMM_QUEUE_COPY, virtio_hmm_config},
    chain::MAX_DESCRIPTORS,
    counters::Counters,
    engine::Engine,
    processor::{self, Processor},
    request::QueueKind,
    stop::Stop,
};

/// Most bytes of configuration that a VMM reads; those after the device's own
/// read as zero.
const CONFIG_SPACE: usize = 256;

/// Why a queue stops until it is set up anew.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Request(#[from] processor::Error),
    #[error("cannot access the ring")]
    Ring(#[from] virtio_queue::Error),
    #[error("an available ring entry lies outside guest memory")]
    Entry,
}

/// The device, from the connection of a VM to its end.
pub struct Backend {
    config: virtio_hmm_config,
    mem: GuestMemoryAtomic<GuestMemoryMmap>,
    queues: Vec<Queue>,
    stop: Arc<Stop>,
}

struct Queue {
    /// None for the event queue, whose buffers wait for events.
    processor: Option<Mutex<Processor>>,
    /// Set with the vring's lock held.
    stopped: AtomicBool,
}

impl Backend {
    /// A device of this configuration, for a VM with memory `mem`.
    pub fn new(
        config: virtio_hmm_config,
        mem: GuestMemoryAtomic<GuestMemoryMmap>,
        engine: &Engine,
        counters: &Arc<Counters>,
        stop: Arc<Stop>,
    ) -> Self {
        let copy_queues = u32::from(config.copy_queues);
        let queues = (0..VIRTIO_HMM_QUEUE_COPY + copy_queues).map(|index| {
            let kind = match index {
                VIRTIO_HMM_QUEUE_CONTROL => Some(QueueKind::Control),
                VIRTIO_HMM_QUEUE_COPY.. => Some(QueueKind::Copy),
                _ => None,
            };
            let processor = kind
                .map(|kind| Mutex::new(Processor::new(kind, engine.clone(), Arc::clone(counters))));
            Queue {
                processor,
                stopped: AtomicBool::new(false),
            }
        });
        Self {
            config,
            mem,
            queues: queues.collect(),
            stop,
        }
    }

    /// Token of the event that ends a worker.
    pub fn stop_token(&self) -> u64 {
        // The library takes the numbers up to that of queues for itself.
        self.queues.len() as u64 + 1
    }

    /// Processes what is available in the queue with this index.
    fn drain(&self, index: usize, queue: &Queue, vring: &VringMutex) {
        let Some(processor) = &queue.processor else {
            return;
        };
        let mut processor = processor.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // A frontend that stops the queue takes this lock: once it has it,
            // no request is in flight and none is begun.
            let mut state = vring.get_mut();
            let running = state.is_enabled() && state.get_queue().ready();
            if !running || queue.stopped.load(Ordering::Relaxed) || self.stop.requested() {
                return;
            }
            match self.step(&mut processor, &mut state) {
                Ok(true) => {}
                Ok(false) => return,
                Err(e) => {
                    queue.stopped.store(true, Ordering::Relaxed);
                    error!("queue {index} stops: {}", ErrorChain(&e));
                    return;
                }
            }
        }
    }

    /// Processes the next request. Returns whether there may be another.
    fn step(&self, processor: &mut Processor, state: &mut VringState) -> Result<bool, Error> {
        let mem = self.mem.memory();
        let queue = state.get_queue_mut();
        let pending = queue.avail_idx(&*mem, Ordering::Acquire)?.0 != queue.next_avail();
        if !pending {
            // Until now the driver need not have notified; this also looks
            // whether it made something available just before.
            return Ok(state.enable_notification()?);
        }
        state.disable_notification()?;
        let chain = state
            .get_queue_mut()
            .iter(mem.clone())?
            .next()
            .ok_or(Error::Entry)?;
        let head = chain.head_index();
        let written = processor.process(&mem, chain)?;
        state.add_used(head, written)?;
        if state.needs_notification()?
            && let Err(e) = state.signal_used_queue()
        {
            debug!("cannot notify the driver: {e}");
        }
        Ok(true)
    }
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

    fn set_config(&self, _offset: u32, _buf: &[u8]) -> io::Result<()> {
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "configuration is read-only",
        ))
    }

    fn update_memory(&self, _mem: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        // `self.mem` is the same object.
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues.len()).map(|index| 1 << index).collect()
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        if let Some(queue) = self.queues.get(queue_index as usize) {
            queue.stopped.store(false, Ordering::Relaxed);
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
        if let (Some(queue), Some(vring)) = (self.queues.get(thread_id), vrings.first()) {
            self.drain(thread_id, queue, vring);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{memory::Memory, session::Shared};

    #[test]
    fn configuration_beyond_what_the_protocol_carries_is_refused() {
        let shared = Shared::new(2 << 20, 2);
        let session = shared.begin();
        let backend = Backend::new(
            shared.config(&session),
            GuestMemoryAtomic::new(GuestMemoryMmap::new()),
            &Engine::new(Arc::new(Memory::new(2 << 20, false).unwrap())),
            &session.counters,
            Arc::new(Stop::new().unwrap()),
        );
        assert_eq!(backend.get_config(0, 256).len(), 256);
        assert_eq!(backend.get_config(255, 1), [0]);
        for (offset, size) in [(0, 257), (255, 2), (256, 1), (u32::MAX, 1), (8, u32::MAX)] {
            assert!(
                backend.get_config(offset, size).is_empty(),
                "{offset} {size}"
            );
        }
        assert!(backend.set_config(0, &[0]).is_err());
    }
}
