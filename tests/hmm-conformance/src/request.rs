//! Requests, right or wrong, and their responses.

use vhost_device_hmm::abi::{
    VIRTIO_HMM_FRAME_OK, VIRTIO_HMM_OP_COUNTERS, VIRTIO_HMM_OP_DISCARD, VIRTIO_HMM_S_OK,
    virtio_hmm_extent, virtio_hmm_req,
};
use vm_memory::ByteValued;

/// A run of frames: the first, and how many.
pub type Frames = (u64, u32);

/// What a driver asks for. A new one is well-formed.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its head.
    pub head: virtio_hmm_req,
    /// Its extents, and behind them those of its source.
    pub extents: Vec<virtio_hmm_extent>,
}

impl Request {
    /// An operation on these frames.
    #[must_use]
    pub fn new(op: u32, extents: &[Frames]) -> Self {
        Self::from_to(op, &[], extents)
    }

    /// An operation on the frames `to` that reads the frames `from`.
    #[must_use]
    pub fn from_to(op: u32, from: &[Frames], to: &[Frames]) -> Self {
        let number = |list: &[Frames]| u32::try_from(list.len()).unwrap_or(u32::MAX).into();
        let counts = to.iter().map(|(_, count)| *count);
        let extent = |(frame, count): &Frames| virtio_hmm_extent {
            frame: (*frame).into(),
            count: (*count).into(),
            ..virtio_hmm_extent::default()
        };
        Self {
            head: virtio_hmm_req {
                op: op.into(),
                nr_frames: counts.fold(0, u32::saturating_add).into(),
                nr_extents: number(to),
                nr_src_extents: number(from),
                ..virtio_hmm_req::default()
            },
            extents: to.iter().chain(from).map(extent).collect(),
        }
    }

    /// Its bytes, without guest pages.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let extents = self.extents.iter().flat_map(|extent| extent.as_slice());
        self.head
            .as_slice()
            .iter()
            .chain(extents)
            .copied()
            .collect()
    }

    /// Number of status bytes in its response.
    #[must_use]
    pub fn statuses(&self) -> usize {
        match u32::from(self.head.op) {
            VIRTIO_HMM_OP_COUNTERS | VIRTIO_HMM_OP_DISCARD => 0,
            _ => u32::from(self.head.nr_frames).min(1024) as usize,
        }
    }
}

/// What a device answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Status of the request.
    pub status: u32,
    /// Number of frames that succeeded.
    pub frames_done: u32,
    /// The place of the status bytes, written or not.
    pub statuses: Vec<u8>,
    /// The used length.
    pub written: usize,
}

impl Response {
    /// That of a request which did all its frames and wrote so many bytes of data.
    #[must_use]
    pub fn ok(frames: usize, data: usize) -> Self {
        Self {
            status: VIRTIO_HMM_S_OK,
            frames_done: u32::try_from(frames).unwrap_or(u32::MAX),
            statuses: vec![VIRTIO_HMM_FRAME_OK; frames],
            written: 8 + frames + data,
        }
    }
}
