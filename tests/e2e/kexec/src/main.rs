//! Guest program: `hmm-kexec KERNEL INITRAMFS COMMAND-LINE` boots that kernel, without the
//! firmware and without an end of the machine.

use std::env;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::process::ExitCode;

use rustix::system::{RebootCommand, reboot};

fn main() -> ExitCode {
    match kexec() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("hmm-kexec: {message}");
            ExitCode::FAILURE
        }
    }
}

fn kexec() -> Result<(), String> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [kernel, initramfs, command_line] = arguments.as_slice() else {
        return Err("usage: hmm-kexec KERNEL INITRAMFS COMMAND-LINE".into());
    };
    let open = |path: &str| File::open(path).map_err(|error| format!("{path}: {error}"));
    let (kernel, initramfs) = (open(kernel)?, open(initramfs)?);
    let command_line = CString::new(command_line.as_str()).map_err(|error| error.to_string())?;
    let bytes = command_line.as_bytes_with_nul();
    // SAFETY: the descriptors are open, and the pointer is to as many bytes as are said.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            bytes.len(),
            bytes.as_ptr(),
            0,
        )
    };
    if result != 0 {
        let error = io::Error::last_os_error();
        return Err(format!("the kernel cannot be loaded: {error}"));
    }
    // Everything is in memory only, there is nothing to sync.
    reboot(RebootCommand::Kexec).map_err(|error| format!("no kexec: {error}"))
}
