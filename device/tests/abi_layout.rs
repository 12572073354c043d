//! Sizes and offsets of the wire structures, as the specification lists them.
//! `ByteValued` is sound for them only while they have no padding.

use std::mem::{offset_of, size_of};

use vhost_device_hmm::abi::*;

/// Checks that the listed fields of `$type` follow one another without a gap.
macro_rules! assert_layout {
    ($type:ident { $($field:ident: $size:expr),+ $(,)? }) => {
        let mut offset = 0;
        $(
            assert_eq!(offset_of!($type, $field), offset, stringify!($type.$field));
            offset += $size;
        )+
        assert_eq!(size_of::<$type>(), offset, stringify!($type));
    };
}

#[test]
fn structures_have_the_specified_layout_and_no_padding() {
    assert_layout!(virtio_hmm_config {
        version: 4,
        frame_size: 4,
        memory_size: 8,
        copy_queues: 4,
        max_frames: 4,
        uuid: 16,
        generation: 8,
    });
    assert_layout!(virtio_hmm_req {
        op: 4,
        flags: 4,
        nr_frames: 4,
        nr_extents: 4,
        nr_src_extents: 4,
        reserved: 4,
        cookie: 8,
    });
    assert_layout!(virtio_hmm_extent {
        frame: 8,
        count: 4,
        reserved: 4
    });
    assert_layout!(virtio_hmm_resp {
        status: 4,
        frames_done: 4
    });
    assert_layout!(virtio_hmm_op_counters {
        requests: 8,
        frames: 8,
        bytes: 8,
        errors: 8
    });
    assert_layout!(virtio_hmm_counters {
        to_device: 32,
        from_device: 32,
        fill: 32,
        device_to_device: 32,
        discard: 32,
        unsupported: 8,
    });
}
