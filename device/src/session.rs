//! What the control plane can know of the device and its sessions.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use uuid::Uuid;

use crate::{
    abi::{
        VIRTIO_HMM_FRAME_SIZE, VIRTIO_HMM_MAX_FRAMES, VIRTIO_HMM_QUEUE_COPY, VIRTIO_HMM_VERSION,
        virtio_hmm_config,
    },
    counters::Counters,
    hardware::Events,
};

/// The time from the connection of a VM to that of the next.
#[derive(Clone, Debug, Serialize)]
pub struct Session {
    /// Counts the sessions, 0 before the first.
    #[serde(rename = "session")]
    pub number: u64,
    /// Whether the VM is still there.
    pub connected: bool,
    /// Generation of the memory's contents, from 1.
    pub generation: u64,
    /// Bytes of device memory.
    pub memory_size: u64,
    /// Number of copy queues.
    pub copy_queues: u16,
    /// What was counted in the session.
    pub counters: Arc<Counters>,
}

fn counters(copy_queues: u16, events: &Events) -> Arc<Counters> {
    let queues = VIRTIO_HMM_QUEUE_COPY as usize + usize::from(copy_queues);
    Arc::new(Counters::new(queues, events.clone()))
}

/// The state that the server and the control plane share.
#[derive(Debug)]
pub struct Shared {
    uuid: Uuid,
    events: Events,
    session: Mutex<Session>,
}

impl Shared {
    /// The state of a device that no VM has used yet, whose workers have the
    /// processor count these events.
    pub fn new(memory_size: u64, copy_queues: u16, events: Events) -> Self {
        let session = Session {
            number: 0,
            connected: false,
            generation: 1,
            memory_size,
            copy_queues,
            counters: counters(copy_queues, &events),
        };
        Self {
            uuid: Uuid::new_v4(),
            events,
            session: Mutex::new(session),
        }
    }

    /// Identity of the memory.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// The session as it is now.
    pub fn session(&self) -> Session {
        self.lock().clone()
    }

    /// Begins a session, with new counters.
    pub fn begin(&self) -> Session {
        let mut session = self.lock();
        session.number += 1;
        session.connected = true;
        session.counters = counters(session.copy_queues, &self.events);
        session.clone()
    }

    /// Ends a session; the memory has been cleared. The counters stay.
    pub fn end(&self) {
        let mut session = self.lock();
        session.connected = false;
        session.generation += 1;
    }

    /// The configuration space of the device in `session`.
    pub fn config(&self, session: &Session) -> virtio_hmm_config {
        virtio_hmm_config {
            version: VIRTIO_HMM_VERSION.into(),
            frame_size: VIRTIO_HMM_FRAME_SIZE.into(),
            memory_size: session.memory_size.into(),
            copy_queues: u32::from(session.copy_queues).into(),
            max_frames: VIRTIO_HMM_MAX_FRAMES.into(),
            uuid: self.uuid.into_bytes(),
            generation: session.generation.into(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
