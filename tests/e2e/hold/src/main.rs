//! Guest program: fills pages, moves them to the device, waits, reads them back.
//!
//! `hmm-hold PAGES READY GO [DEVICE]`: creates the file READY once the pages are
//! on the device, waits for the file GO, then touches every page. It keeps no
//! descriptor of the device open meanwhile.

use std::env;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use hmm_hold::{HELD, WORD};
use virtio_hmm_client::{Device, Direction, PAGE_SIZE, Residency};

fn main() -> ExitCode {
    match hold() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("hmm-hold: {message}");
            ExitCode::FAILURE
        }
    }
}

fn hold() -> Result<(), String> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (pages, ready, go, device) = match arguments.as_slice() {
        [pages, ready, go] => (pages, ready, go, "/dev/hmm0"),
        [pages, ready, go, device] => (pages, ready, go, device.as_str()),
        _ => return Err("usage: hmm-hold PAGES READY GO [DEVICE]".into()),
    };
    let pages: usize = pages.parse().map_err(|_| "PAGES is no number")?;
    let bytes = pages * PAGE_SIZE;

    // One page more than needed, so that whole pages fit at any alignment.
    let mut memory = HELD.repeat((bytes + PAGE_SIZE) / WORD);
    let start = (memory.as_ptr() as usize).next_multiple_of(PAGE_SIZE);
    let range = start..start + bytes;
    let device = Device::open(device).map_err(|error| error.to_string())?;
    let on_device = || -> Result<usize, String> {
        let pages = device
            .query(range.clone())
            .map_err(|error| error.to_string())?;
        Ok(pages
            .iter()
            .filter(|&&page| page == Residency::Device)
            .count())
    };
    // Migration is best effort, and a few pages may need another try.
    for _ in 0..10 {
        device
            .migrate_all(range.clone(), Direction::ToDevice)
            .map_err(|error| error.to_string())?;
        if on_device()? == pages {
            break;
        }
    }
    if on_device()? != pages {
        return Err(format!(
            "only {} of {pages} pages are on the device",
            on_device()?
        ));
    }
    drop(device);

    fs::write(ready, "").map_err(|error| error.to_string())?;
    while !Path::new(go).exists() {
        thread::sleep(Duration::from_millis(20));
    }
    if memory.chunks_exact(WORD).any(|word| word != HELD) {
        return Err("a page does not hold what was written".into());
    }
    // The pages can be written again, too.
    memory.fill(0);
    println!("all {pages} pages are as they were");
    Ok(())
}
