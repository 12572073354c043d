//! What QEMU boots: the kernel itself, unpacked once, rather than an image that unpacks itself in
//! every guest, which takes a fifth of a boot under TCG.
//!
//! When a guest wakes up from suspend to RAM, QEMU resets the machine, and with that it writes an
//! unpacked kernel to memory again, over the one that slept. An image it does not.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use ruzstd::decoding::StreamingDecoder;

use crate::error::{FileContext, Result};
use crate::paths::Cache;
use crate::report::Report;

/// Bytes in a sector of an image's setup code.
const SECTOR: u64 = 512;
/// The window of `zstd -22 --ultra`, with which the kernel's build packs it, in bytes.
const WINDOW: u64 = 128 << 20;
/// No kernel is larger than this, in bytes.
const LARGEST: u64 = 1 << 30;
/// Type of the note "Xen" with the address at which QEMU enters a kernel: `XEN_ELFNOTE_PHYS32_ENTRY`
/// of the kernel's `include/xen/interface/elfnote.h`.
const ENTRY_NOTE: u32 = 18;
/// Type of the program header that is about notes.
const PT_NOTE: u32 = 4;

/// What to boot of this image, which is unpacked unless that is done. The image itself where QEMU
/// cannot boot what is in it, or it is packed otherwise than Debian's kernels are.
///
/// # Errors
/// The image cannot be read, or the cache cannot be written.
pub fn make(image: &Path, cache: &Cache, report: Report) -> Result<PathBuf> {
    if let Some(made) = made(image, cache) {
        return Ok(made);
    }
    let _lock = cache.lock(report)?;
    if let Some(made) = made(image, cache) {
        return Ok(made);
    }
    let directory = cache.boot_images();
    fs::create_dir_all(&directory).at("create", &directory)?;
    let packed = File::open(image).at("read", image)?;
    let time = packed.metadata().and_then(|packed| packed.modified());
    let kernel = unpack(packed).unwrap_or_default();
    let path = place(image, cache);
    let partial = path.with_extension("partial");
    let mut file = File::create(&partial).at("write", &partial)?;
    file.write_all(&kernel).at("write", &partial)?;
    file.set_modified(time.at("read", image)?)
        .at("write", &partial)?;
    fs::rename(&partial, &path).at("write", &path)?;
    Ok(if kernel.is_empty() {
        image.into()
    } else {
        path
    })
}

/// What [`make`] found to boot of this image, if it has not changed since.
#[must_use]
pub fn made(image: &Path, cache: &Cache) -> Option<PathBuf> {
    let path = place(image, cache);
    let made = fs::metadata(&path).ok()?;
    // A user builds a kernel again in the same place.
    let same = made.modified().ok()? == fs::metadata(image).ok()?.modified().ok()?;
    let empty = made.len() == 0;
    same.then(|| if empty { image.into() } else { path })
}

fn place(image: &Path, cache: &Cache) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    image.hash(&mut hasher);
    cache
        .boot_images()
        .join(format!("{:016x}", hasher.finish()))
}

/// The kernel in an image, which is laid out as `Documentation/arch/x86/boot.rst` says, if QEMU
/// can boot it.
fn unpack(mut image: impl Read + Seek) -> Option<Vec<u8>> {
    let mut header = [0; 0x250];
    image.read_exact(&mut header).ok()?;
    if header.get(0x202..0x206) != Some(b"HdrS") {
        return None;
    }
    let sectors = u64::from(*header.get(0x1f1)?);
    let offset = u64::from(u32_at(&header, 0x248)?);
    let length = u64::from(u32_at(&header, 0x24c)?);
    let start = (sectors + 1) * SECTOR + offset;
    image.seek(SeekFrom::Start(start)).ok()?;
    let decoder = StreamingDecoder::new_with_max_window_size(image.take(length), WINDOW).ok()?;
    let mut kernel = Vec::new();
    decoder.take(LARGEST).read_to_end(&mut kernel).ok()?;
    tell_entry(notes(&kernel)?).then_some(kernel)
}

/// The notes of an ELF file of 64 bits.
fn notes(elf: &[u8]) -> Option<&[u8]> {
    let offset_at = |at| usize::try_from(u64::from_le_bytes(bytes_at(elf, at)?)).ok();
    let u16_at = |at| bytes_at(elf, at).map(u16::from_le_bytes).map(usize::from);
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (headers, size, count) = (offset_at(0x20)?, u16_at(0x36)?, u16_at(0x38)?);
    let header = (0..count)
        .filter_map(|number| headers.checked_add(number * size))
        .find(|&header| u32_at(elf, header) == Some(PT_NOTE))?;
    let start = offset_at(header.checked_add(0x08)?)?;
    let length = offset_at(header.checked_add(0x20)?)?;
    elf.get(start..)?.get(..length)
}

/// Whether one of these notes says where QEMU enters the kernel.
fn tell_entry(mut notes: &[u8]) -> bool {
    while let [Some(name), Some(value), Some(kind)] = [0, 4, 8].map(|at| u32_at(notes, at)) {
        if kind == ENTRY_NOTE && notes.get(12..16) == Some(b"Xen\0") {
            return true;
        }
        let [name, value] = [name, value].map(|length| u64::from(length).next_multiple_of(4));
        let next = usize::try_from(12 + name + value).unwrap_or(usize::MAX);
        notes = notes.get(next..).unwrap_or_default();
    }
    false
}

fn u32_at(from: &[u8], at: usize) -> Option<u32> {
    bytes_at(from, at).map(u32::from_le_bytes)
}

fn bytes_at<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    /// An ELF file with notes of these names and types.
    fn kernel(kinds: &[(&[u8; 4], u32)]) -> Vec<u8> {
        let mut elf = vec![0; 0x40 + 2 * 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[0x20] = 0x40;
        elf[0x36] = 56;
        elf[0x38] = 2;
        elf[0x40] = 1;
        let (second, start) = (0x40 + 56, elf.len());
        elf[second] = 4;
        elf[second + 0x08] = u8::try_from(start).unwrap();
        for (name, kind) in kinds {
            for number in [4, 6, *kind] {
                elf.extend(u32::to_le_bytes(number));
            }
            elf.extend(*name);
            elf.extend([0xaa; 8]);
        }
        elf[second + 0x20] = u8::try_from(elf.len() - start).unwrap();
        elf
    }

    /// An image that has this packed in it.
    fn image(packed: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * 512 + 7];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248] = 7;
        let length = u32::try_from(packed.len() + 4).unwrap();
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend(packed);
        // The kernel's build appends its size, and there is more behind it.
        image.extend([0x11; 4 + 100]);
        image
    }

    fn packed(kernel: &[u8]) -> Vec<u8> {
        compress_to_vec(kernel, CompressionLevel::Fastest)
    }

    fn unpacked(image: &[u8]) -> Option<Vec<u8>> {
        unpack(std::io::Cursor::new(image))
    }

    #[test]
    fn a_kernel_that_qemu_can_enter_is_unpacked() {
        let kernel = kernel(&[(b"Xen\0", 19), (b"GNU\0", 18), (b"Xen\0", 18)]);
        assert_eq!(unpacked(&image(&packed(&kernel))), Some(kernel));
    }

    #[test]
    fn any_other_image_is_left_as_it_is() {
        let good = kernel(&[(b"Xen\0", 18)]);
        for other in [
            kernel(&[(b"Xen\0", 19), (b"GNU\0", 18)]),
            kernel(&[]),
            vec![],
        ] {
            assert_eq!(unpacked(&image(&packed(&other))), None);
        }
        assert_eq!(unpacked(&image(&good)), None);
        let whole = image(&packed(&good));
        assert!(unpacked(&whole).is_some());
        for length in 0..whole.len() - 105 {
            assert_eq!(unpacked(&whole[..length]), None, "{length} bytes of it");
        }
        for length in 0..good.len() {
            let cut = packed(&good[..length]);
            assert_eq!(unpacked(&image(&cut)), None, "{length} bytes of its kernel");
        }
    }

    #[test]
    fn an_image_that_changes_is_unpacked_again() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path().into());
        let path = directory.path().join("bzImage");
        let contents = |kernel: &[u8]| {
            fs::write(&path, image(&packed(kernel))).unwrap();
            let old = std::time::SystemTime::UNIX_EPOCH
                + std::time::Duration::from_secs(kernel.len() as u64);
            File::open(&path).unwrap().set_modified(old).unwrap();
        };
        let kernels = [kernel(&[(b"Xen\0", 18)]), kernel(&[(b"Xen\0", 18); 2])];
        for kernel in &kernels {
            contents(kernel);
            assert_eq!(made(&path, &cache), None);
            let made_of_it = make(&path, &cache, Report).unwrap();
            assert_eq!(&fs::read(&made_of_it).unwrap(), kernel);
            assert_eq!(made(&path, &cache), Some(made_of_it));
        }
        contents(b"");
        assert_eq!(make(&path, &cache, Report).unwrap(), path);
        assert_eq!(made(&path, &cache), Some(path));
    }
}
