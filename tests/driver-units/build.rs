//! Compiles the driver's own source, with `c/kernel.h` for what it needs of the kernel.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

const DRIVER: &str = "../../guest-driver";

fn main() -> io::Result<()> {
    let headers = PathBuf::from(env::var_os("OUT_DIR").ok_or(io::ErrorKind::NotFound)?);
    // Nearly all is in kernel.h: the headers that the driver names only have to be there.
    for entry in fs::read_dir(DRIVER)? {
        let path = entry?.path();
        if path.extension().is_some_and(|it| it == "c" || it == "h") {
            for name in fs::read_to_string(&path)?.lines().filter_map(included) {
                let header = headers.join(name);
                fs::create_dir_all(header.parent().unwrap_or(&headers))?;
                fs::write(header, "")?;
            }
        }
    }

    let driver = Path::new(DRIVER);
    cc::Build::new()
        .file(driver.join("memory.c"))
        .file(driver.join("context.c"))
        .file(driver.join("request.c"))
        .file("c/memory_harness.c")
        .file("c/request_harness.c")
        .include("c")
        .include(driver)
        .include(driver.join("include"))
        // The machine's own headers, such as linux/types.h, come first.
        .flag("-idirafter")
        .flag(&headers)
        .flag("-include")
        .flag("kernel.h")
        // As in the kernel.
        .flag("-std=gnu11")
        .flag("-fno-strict-aliasing")
        .flag("-fno-strict-overflow")
        .extra_warnings(false)
        .try_compile("driver_units")
        .map_err(io::Error::other)?;
    println!("cargo::rerun-if-changed=c");
    println!("cargo::rerun-if-changed={DRIVER}");
    Ok(())
}

/// The header of the kernel that a line includes.
fn included(line: &str) -> Option<&str> {
    let name = line.strip_prefix("#include <")?.strip_suffix('>')?;
    (name.starts_with("linux/") || name.starts_with("trace/")).then_some(name)
}
