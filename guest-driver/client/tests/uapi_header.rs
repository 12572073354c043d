//! The Rust definitions agree with the C header, as a C compiler sees it.

use std::mem::{offset_of, size_of};
use std::path::Path;
use std::process::Command;

use virtio_hmm_client::{DeviceState, Direction, Residency, Skip, abi};

/// C expressions, and what Rust has for each.
fn expected() -> Vec<(String, u64)> {
    let mut rows: Vec<(String, u64)> = Vec::new();
    let mut row = |expression: &str, value: u64| rows.push((expression.to_owned(), value));
    macro_rules! layout {
        ($c:literal, $rust:ty, $($field:ident),+) => {
            row(concat!("sizeof(struct ", $c, ")"), size_of::<$rust>() as u64);
            $(row(
                concat!("offsetof(struct ", $c, ", ", stringify!($field), ")"),
                offset_of!($rust, $field) as u64,
            );)+
        };
    }
    layout!(
        "virtio_hmm_info",
        abi::Info,
        memory_size,
        memory_free,
        generation,
        uuid,
        frame_size,
        copy_queues,
        state,
        reserved
    );
    layout!(
        "virtio_hmm_migrate",
        abi::Migrate,
        start,
        length,
        direction,
        flags,
        done,
        moved,
        filled,
        skipped
    );
    layout!(
        "virtio_hmm_query",
        abi::Query,
        start,
        length,
        residency,
        flags
    );
    layout!(
        "virtio_hmm_release",
        abi::Release,
        start,
        length,
        flags,
        reserved,
        released,
        remaining
    );
    layout!("virtio_hmm_limit", abi::Limit, bytes, used, flags, reserved);
    row("VIRTIO_HMM_IOCTL_INFO", abi::IOCTL_INFO);
    row("VIRTIO_HMM_IOCTL_MIGRATE", abi::IOCTL_MIGRATE);
    row("VIRTIO_HMM_IOCTL_QUERY", abi::IOCTL_QUERY);
    row("VIRTIO_HMM_IOCTL_RELEASE", abi::IOCTL_RELEASE);
    row("VIRTIO_HMM_IOCTL_LIMIT", abi::IOCTL_LIMIT);
    row("VIRTIO_HMM_MIGRATE_NO_EVICT", abi::MIGRATE_NO_EVICT.into());
    row("VIRTIO_HMM_RELEASE_ALL", abi::RELEASE_ALL.into());
    row("VIRTIO_HMM_LIMIT_SET", abi::LIMIT_SET.into());
    row("VIRTIO_HMM_DEVICE_OK", DeviceState::Ok as u64);
    row("VIRTIO_HMM_DEVICE_BROKEN", DeviceState::Broken as u64);
    row("VIRTIO_HMM_DEVICE_CLOSING", DeviceState::Closing as u64);
    row("VIRTIO_HMM_TO_DEVICE", Direction::ToDevice as u64);
    row("VIRTIO_HMM_TO_SYSTEM", Direction::ToSystem as u64);
    row("VIRTIO_HMM_SKIP_ALREADY", Skip::Already as u64);
    row("VIRTIO_HMM_SKIP_BUSY", Skip::Busy as u64);
    row("VIRTIO_HMM_SKIP_PINNED", Skip::Pinned as u64);
    row("VIRTIO_HMM_SKIP_SWAPPED", Skip::Swapped as u64);
    row("VIRTIO_HMM_SKIP_OTHER_DEVICE", Skip::OtherDevice as u64);
    row("VIRTIO_HMM_SKIP_UNSUPPORTED", Skip::Unsupported as u64);
    row("VIRTIO_HMM_SKIP_UNMAPPED", Skip::Unmapped as u64);
    row("VIRTIO_HMM_SKIP_NO_MEMORY", Skip::NoMemory as u64);
    row("VIRTIO_HMM_SKIP_COPY_FAILED", Skip::CopyFailed as u64);
    row("VIRTIO_HMM_SKIP_NR", abi::SKIP_NR as u64);
    row("VIRTIO_HMM_RESIDENCY_NONE", Residency::None as u64);
    row("VIRTIO_HMM_RESIDENCY_RAM", Residency::Ram as u64);
    row("VIRTIO_HMM_RESIDENCY_ZERO", Residency::Zero as u64);
    row("VIRTIO_HMM_RESIDENCY_DEVICE", Residency::Device as u64);
    row(
        "VIRTIO_HMM_RESIDENCY_OTHER_DEVICE",
        Residency::OtherDevice as u64,
    );
    row("VIRTIO_HMM_RESIDENCY_SWAPPED", Residency::Swapped as u64);
    row("VIRTIO_HMM_RESIDENCY_MOVING", Residency::Moving as u64);
    rows
}

#[test]
fn rust_and_c_agree() {
    if Command::new("cc").arg("--version").output().is_err() {
        eprintln!("skipped: there is no C compiler, cc");
        return;
    }
    let rows = expected();
    let mut source = String::from(
        "#include <stddef.h>\n#include <stdio.h>\n#include \"virtio_hmm.h\"\nint main(void)\n{\n",
    );
    for (expression, _) in &rows {
        source += &format!("\tprintf(\"%llu\\n\", (unsigned long long)({expression}));\n");
    }
    source += "\treturn 0;\n}\n";

    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("layout.c");
    let program = directory.path().join("layout");
    std::fs::write(&file, source).unwrap();
    let headers = Path::new(env!("CARGO_MANIFEST_DIR")).join("../include/uapi");
    let compiled = Command::new("cc")
        .args(["-Wall", "-Werror", "-I"])
        .arg(headers)
        .arg("-o")
        .args([&program, &file])
        .output()
        .unwrap();
    assert!(
        compiled.status.success(),
        "{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    let output = Command::new(&program).output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let seen: Vec<u64> = printed.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(seen.len(), rows.len());
    for ((expression, value), seen) in rows.iter().zip(seen) {
        assert_eq!(seen, *value, "{expression}");
    }
}
