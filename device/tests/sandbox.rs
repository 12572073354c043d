//! What a confined process can no longer do. Each attempt is made by a process of
//! its own: this program once more, which confines itself as the daemon does.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    env, fs,
    net::TcpListener,
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    path::Path,
    process::{Command, Output},
    thread,
};

use clap::ValueEnum;
use libc::c_long;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nix::{errno::Errno, sys::signal::Signal};
use perf_event::{Builder, events::Software};
use vhost_device_hmm::{sandbox, seccomp::Mode};

/// First argument of a process that confines itself.
const CONFINED: &str = "confined";

/// System calls that the daemon has no use for, with arguments that do no harm
/// where they are let through.
const FORBIDDEN: &[(&str, c_long, [c_long; 4])] = &[
    ("bpf", libc::SYS_bpf, [-1, 0, 0, 0]),
    ("chmod", libc::SYS_chmod, [0, 0, 0, 0]),
    ("connect", libc::SYS_connect, [-1, 0, 0, 0]),
    ("execve", libc::SYS_execve, [0, 0, 0, 0]),
    ("fchmod", libc::SYS_fchmod, [-1, 0, 0, 0]),
    ("io_uring_setup", libc::SYS_io_uring_setup, [0, 0, 0, 0]),
    ("ioctl TIOCSTI", libc::SYS_ioctl, [-1, 0x5412, 0, 0]),
    ("kill", libc::SYS_kill, [0, 0, 0, 0]),
    ("memfd_create", libc::SYS_memfd_create, [0, 0, 0, 0]),
    (
        "mmap PROT_EXEC",
        libc::SYS_mmap,
        [0, 0, libc::PROT_EXEC as c_long, 0],
    ),
    ("mount", libc::SYS_mount, [0, 0, 0, 0]),
    (
        "mprotect PROT_EXEC",
        libc::SYS_mprotect,
        [0, 0, libc::PROT_EXEC as c_long, 0],
    ),
    ("openat2", libc::SYS_openat2, [-1, 0, 0, 0]),
    ("perf_event_open", libc::SYS_perf_event_open, [0, 0, -1, -1]),
    ("pidfd_open", libc::SYS_pidfd_open, [-1, 0, 0, 0]),
    (
        "prctl PR_GET_DUMPABLE",
        libc::SYS_prctl,
        [libc::PR_GET_DUMPABLE as c_long, 0, 0, 0],
    ),
    (
        "process_vm_readv",
        libc::SYS_process_vm_readv,
        [-1, 0, 0, 0],
    ),
    ("ptrace", libc::SYS_ptrace, [-1, -1, 0, 0]),
    ("rename", libc::SYS_rename, [0, 0, 0, 0]),
    ("setuid", libc::SYS_setuid, [-1, 0, 0, 0]),
    ("socket", libc::SYS_socket, [-1, 0, 0, 0]),
    ("tgkill SIGKILL", libc::SYS_tgkill, [-1, -1, 9, 0]),
    (
        "tgkill another",
        libc::SYS_tgkill,
        [-1, -1, libc::SIGABRT as c_long, 0],
    ),
    ("unshare", libc::SYS_unshare, [1, 0, 0, 0]),
    ("vfork", libc::SYS_clone, [libc::SIGCHLD as c_long, 0, 0, 0]),
];

fn main() {
    let arguments: Vec<String> = env::args().collect();
    if let [_, first, mode, deed, dir] = &arguments[..]
        && first == CONFINED
    {
        let mode = Mode::from_str(mode, false).unwrap();
        sandbox::enter(
            mode,
            deed.starts_with("count"),
            [&*Path::new(dir).join("socket")].into_iter(),
        )
        .unwrap();
        let (deed, dir) = (deed.clone(), dir.clone());
        // In a thread that starts later, as the workers do.
        thread::spawn(move || attempt(&deed, Path::new(&dir)))
            .join()
            .unwrap();
        return;
    }
    let trials = vec![
        trial("a_forbidden_call_kills", a_forbidden_call_kills),
        trial(
            "a_forbidden_call_is_logged_or_let_through",
            a_forbidden_call_is_let_through,
        ),
        trial(
            "calls_that_libraries_try_are_refused",
            calls_that_libraries_try_are_refused,
        ),
        trial("only_itself_is_counted", only_itself_is_counted),
        trial("a_panic_can_be_seen", a_panic_can_be_seen),
        Trial::ignorable_test("files_are_refused", || {
            if landlock_version() < 1 {
                return Ok(Completion::ignored_with("this kernel has no Landlock"));
            }
            files_are_refused();
            Ok(Completion::Completed)
        }),
        Trial::ignorable_test("connections_are_refused", || {
            if landlock_version() < 4 {
                return Ok(Completion::ignored_with(
                    "this kernel's Landlock knows no network",
                ));
            }
            connections_are_refused();
            Ok(Completion::Completed)
        }),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn trial(name: &str, body: fn()) -> Trial {
    Trial::test(name, move || {
        body();
        Ok::<(), Failed>(())
    })
}

/// What the confined process does.
fn attempt(deed: &str, dir: &Path) {
    let (what, path) = deed.split_once(' ').unwrap_or((deed, ""));
    let done = match what {
        "call" => {
            let (_, number, [a, b, c, d]) = FORBIDDEN.iter().find(|(n, ..)| *n == path).unwrap();
            // SAFETY: the arguments are null pointers and values that these
            // calls refuse, or they only read a state of the process; a child
            // made by clone() without a stack of its own ends at once.
            if unsafe { libc::syscall(*number, *a, *b, *c, *d) } == 0 && path == "vfork" {
                // SAFETY: nothing is to be cleaned up in the child.
                unsafe { libc::_exit(0) };
            }
            return;
        }
        "count" => {
            let mut counter = Builder::new(Software::TASK_CLOCK);
            if path == "another" {
                counter.observe_pid(1);
            }
            counter.enabled(true).build().map(drop)
        }
        "panic" => panic!("on purpose"),
        "abort" => std::process::abort(),
        "open" => fs::File::open(path).map(drop),
        "list" => fs::read_dir(path).map(drop),
        "create" => fs::write(dir.join("new"), "").map(drop),
        "append" => fs::File::options()
            .append(true)
            .open(dir.join("file"))
            .map(drop),
        "remove" => fs::remove_file(path),
        "connect" => std::net::TcpStream::connect(path).map(drop),
        "listen" => TcpListener::bind("127.0.0.1:0").map(drop),
        _ => panic!("unknown deed {deed}"),
    };
    match done {
        Ok(()) => println!("done"),
        Err(e) => println!("errno {}", e.raw_os_error().unwrap()),
    }
}

/// Has another process confine itself and try a deed.
fn confined(mode: &str, deed: &str, dir: &Path) -> Output {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args([CONFINED, mode, deed]).arg(dir);
    command.env("RUST_BACKTRACE", "1").output().unwrap()
}

/// The deed fails with this error.
fn refused(mode: &str, deed: &str, dir: &Path, errno: Errno) {
    let output = confined(mode, deed, dir);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(
        said.trim(),
        format!("errno {}", errno as i32),
        "{deed}: {output:?}"
    );
}

fn done(mode: &str, deed: &str, dir: &Path) {
    let output = confined(mode, deed, dir);
    assert_eq!(output.stdout, b"done\n", "{deed}: {output:?}");
}

fn a_forbidden_call_kills() {
    let dir = tempfile::tempdir().unwrap();
    for (name, ..) in FORBIDDEN {
        let output = confined("kill", &format!("call {name}"), dir.path());
        let signal = output.status.signal();
        assert_eq!(signal, Some(Signal::SIGSYS as i32), "{name}: {output:?}");
    }
}

fn a_forbidden_call_is_let_through() {
    let dir = tempfile::tempdir().unwrap();
    for mode in ["log", "none"] {
        for (name, ..) in FORBIDDEN {
            let output = confined(mode, &format!("call {name}"), dir.path());
            assert!(output.status.success(), "{mode}, {name}: {output:?}");
        }
    }
}

fn calls_that_libraries_try_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    // Landlock would say EACCES.
    refused("kill", "open /proc/self/maps", dir.path(), Errno::ENOSYS);
    refused("kill", "list /", dir.path(), Errno::ENOSYS);
    refused("kill", "create", dir.path(), Errno::ENOSYS);
}

fn only_itself_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let output = confined("kill", "count itself", dir.path());
    // Some machines do not allow even that.
    assert!(output.status.success(), "{output:?}");
    let output = confined("kill", "count another", dir.path());
    assert_eq!(
        output.status.signal(),
        Some(Signal::SIGSYS as i32),
        "{output:?}"
    );
}

fn a_panic_can_be_seen() {
    let dir = tempfile::tempdir().unwrap();
    let output = confined("kill", "panic", dir.path());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("on purpose"), "{said}");
    assert_eq!(output.status.code(), Some(101), "{output:?}");
    let output = confined("kill", "abort", dir.path());
    assert_eq!(
        output.status.signal(),
        Some(Signal::SIGABRT as i32),
        "{output:?}"
    );
}

fn files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let (file, foreign) = (dir.path().join("file"), other.path().join("file"));
    for file in [&file, &foreign] {
        fs::write(file, "precious").unwrap();
        fs::set_permissions(file, fs::Permissions::from_mode(0o666)).unwrap();
    }
    let own = env::current_exe().unwrap();
    for path in [
        Path::new("/proc/meminfo"),
        Path::new("/proc/self/maps"),
        &own,
        &file,
        &foreign,
    ] {
        refused(
            "none",
            &format!("open {}", path.display()),
            dir.path(),
            Errno::EACCES,
        );
    }
    refused("none", "list /", dir.path(), Errno::EACCES);
    refused("none", "create", dir.path(), Errno::EACCES);
    refused("none", "append", dir.path(), Errno::EACCES);
    refused(
        "none",
        &format!("remove {}", foreign.display()),
        dir.path(),
        Errno::EACCES,
    );
    assert_eq!(fs::read(&foreign).unwrap(), b"precious");
    // The sockets lie here.
    done("kill", &format!("remove {}", file.display()), dir.path());
    assert!(!file.exists());
}

fn connections_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    refused(
        "none",
        &format!("connect {address}"),
        dir.path(),
        Errno::EACCES,
    );
    refused("none", "listen", dir.path(), Errno::EACCES);
}

/// The version of Landlock that the kernel has, 0 if none.
fn landlock_version() -> c_long {
    const VERSION: c_long = 1;
    // SAFETY: with this flag the call only tells the version.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, VERSION) }.max(0)
}
