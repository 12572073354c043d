//! Writes the seeds that are binary: a valid request for each operation, in
//! `corpus/request` as it is and in `corpus/ring` in a ring.

use std::{fs, io, path::Path};

use hmm_fuzz::{
    AVAIL, BANDWIDTH, CONTROL, DATA, EVENT_IDX, FIT, INDIRECT, LATENCY, NEXT, REQUEST, RESPONSE,
    RULE, START, TABLE, TABLE_OF_OTHERS, WRITE,
};
use vhost_device_hmm::abi::*;
use vm_memory::ByteValued;

const FRAMES: u32 = 2;

/// The rules of `ring`, in its order.
const RULES: [&str; 11] = [
    "error", "short", "poison", "reorder", "delay", "drop", "stall", "dead", "status", "lose",
    "double",
];

struct Seed {
    name: &'static str,
    op: u32,
    settings: u8,
    frames: u32,
    sources: u32,
    data: u32,
    body: u32,
}

impl Seed {
    const fn copy(name: &'static str, op: u32) -> Self {
        Self {
            name,
            op,
            settings: 0,
            frames: FRAMES,
            sources: 0,
            data: 0,
            body: FRAMES,
        }
    }

    fn all() -> [Self; 6] {
        let bytes = FRAMES * VIRTIO_HMM_FRAME_SIZE;
        let counters = size_of::<virtio_hmm_counters>() as u32;
        let copy = Self::copy;
        [
            Self {
                data: bytes,
                ..copy("to_device", VIRTIO_HMM_OP_TO_DEVICE)
            },
            Self {
                body: FRAMES + bytes,
                ..copy("from_device", VIRTIO_HMM_OP_FROM_DEVICE)
            },
            copy("fill", VIRTIO_HMM_OP_FILL),
            Self {
                sources: 1,
                ..copy("device_to_device", VIRTIO_HMM_OP_DEVICE_TO_DEVICE)
            },
            Self {
                settings: CONTROL,
                frames: 0,
                body: counters,
                ..copy("counters", VIRTIO_HMM_OP_COUNTERS)
            },
            Self {
                settings: CONTROL,
                body: 0,
                ..copy("discard", VIRTIO_HMM_OP_DISCARD)
            },
        ]
    }

    fn request(&self) -> Vec<u8> {
        self.request_at(0)
    }

    /// The request for frames from this one on.
    fn request_at(&self, first: u64) -> Vec<u8> {
        let extents = self.frames.min(1);
        let head = virtio_hmm_req {
            op: self.op.into(),
            nr_frames: self.frames.into(),
            nr_extents: extents.into(),
            nr_src_extents: self.sources.into(),
            ..Default::default()
        };
        let mut request = head.as_slice().to_vec();
        for place in 0..extents + self.sources {
            let extent = virtio_hmm_extent {
                frame: (first + u64::from(place * 8)).into(),
                count: self.frames.into(),
                ..Default::default()
            };
            request.extend(extent.as_slice());
        }
        request
    }

    /// Two bytes of settings, the lengths, and a request.
    fn for_parser(&self, settings: u8, request: &[u8]) -> Vec<u8> {
        let mut input = vec![self.settings | settings, 20];
        input.extend(self.data.to_le_bytes());
        input.extend(self.body.to_le_bytes());
        input.extend(request);
        input
    }

    /// Two bytes of settings, and the memory.
    fn for_ring(&self, settings: u8, rule: u8) -> Vec<u8> {
        let request = self.request();
        let len = request.len() as u32;
        let mut chain = vec![
            (REQUEST, len, 0),
            (RESPONSE, 8 + self.body.min(FRAMES), WRITE),
        ];
        if self.data > 0 {
            chain.insert(1, (DATA, self.data, 0));
        }
        if self.body > FRAMES {
            chain.push((DATA, self.body - FRAMES, WRITE));
        }
        let mut image = vec![0; (REQUEST - START) as usize];
        let mut put = |at: u64, bytes: &[u8]| {
            let at = (at - START) as usize;
            image[at..at + bytes.len()].copy_from_slice(bytes);
        };
        // The same chain, and once more in an indirect table.
        let last = chain.len() - 1;
        for table in [TABLE, INDIRECT] {
            for (index, (addr, len, flags)) in chain.iter().enumerate() {
                let flags = if index < last { flags | NEXT } else { *flags };
                put(
                    table + index as u64 * 16,
                    &descriptor(*addr, *len, flags, index as u16 + 1),
                );
            }
        }
        let indirect = descriptor(INDIRECT, chain.len() as u32 * 16, TABLE_OF_OTHERS, 0);
        put(TABLE + 15 * 16, &indirect);
        for (at, value) in (AVAIL + 2..).step_by(2).zip([2_u16, 0, 15]) {
            put(at, &value.to_le_bytes());
        }
        image.extend(request);
        [vec![self.settings | settings, rule], image].concat()
    }
}

fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    let (addr, len) = (addr.to_le_bytes(), len.to_le_bytes());
    [&addr[..], &len, &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let (request, ring) = (corpus.join("request"), corpus.join("ring"));
    for directory in [&request, &ring] {
        fs::create_dir_all(directory)?;
    }
    for seed in Seed::all() {
        let name = seed.name;
        fs::write(request.join(name), seed.for_parser(0, &seed.request()))?;
        // The last frames of a device of 512.
        let last = seed.for_parser(FIT, &seed.request_at(510 - 8 * u64::from(seed.sources)));
        fs::write(request.join(format!("{name}_last")), last)?;
        fs::write(ring.join(name), seed.for_ring(EVENT_IDX, 0))?;
        fs::write(
            ring.join(format!("{name}_link")),
            seed.for_ring(BANDWIDTH | LATENCY, 0),
        )?;
    }
    // Rules strike copies, which the first four are.
    for ((rule, name), seed) in (0..).zip(RULES).zip(Seed::all().iter().take(4).cycle()) {
        fs::write(ring.join(name), seed.for_ring(RULE, rule))?;
    }
    Ok(())
}
