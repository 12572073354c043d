//! Guest program: does with the pages of one region what its standard input says, a
//! line each, and answers each with a line.
//!
//! | command | answer |
//! |---|---|
//! | `new PAGES` | `new`: a region of 4 KiB pages, each with a pattern, replaces the last one |
//! | `holes` | `holes`: the region has no pages, and reads as zero |
//! | `to-device`, `to-system` | `moved M filled F copy_failed C busy B`, or `error …` |
//! | `check` | `right R lost L wrong W`: what every byte of the pages holds; a lost page cannot be read |
//! | `touch PAGE` | `touched`, or `signal N`: what a process gets that reads the page |
//! | `run COMMAND` | `exit N OUTPUT`: a shell command, its output in one line |
//!
//! The device is open only while a command uses it.

use std::io::{self, BufRead, Write};
use std::process::{Command, ExitCode};

use hmm_stress::region::{PageSize, Region};
use virtio_hmm_client::{Device, Direction, PAGE_SIZE, Skip};

fn main() -> ExitCode {
    match answer_all() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("hmm-pages: {message}");
            ExitCode::FAILURE
        }
    }
}

fn answer_all() -> Result<(), String> {
    let mut pages = Pages {
        region: region(0)?,
        generation: 0,
    };
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|error| error.to_string())?;
        let (command, rest) = line.split_once(' ').unwrap_or((&line, ""));
        let answer = pages.answer(command, rest)?;
        println!("{answer}");
        io::stdout().flush().map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn region(pages: usize) -> Result<Region, String> {
    // The kernel maps nothing that is empty.
    Region::new(pages.max(1), PageSize::Small, 1).map_err(|error| error.describe())
}

struct Pages {
    region: Region,
    /// What every page holds; 0 is zeros.
    generation: u64,
}

impl Pages {
    fn answer(&mut self, command: &str, rest: &str) -> Result<String, String> {
        match command {
            "new" => {
                self.region = region(number(rest)?)?;
                self.generation = 1;
                self.region.fill_all(self.generation);
                Ok("new".into())
            }
            "holes" => {
                let all = 0..self.region.pages();
                self.region.discard(all).map_err(|e| e.describe())?;
                self.generation = 0;
                Ok("holes".into())
            }
            "to-device" => Ok(self.migrate(Direction::ToDevice)),
            "to-system" => Ok(self.migrate(Direction::ToSystem)),
            "check" => Ok(self.check()),
            "touch" => self.touch(number(rest)?),
            "run" => run(rest),
            _ => Err(format!("unknown command {command:?}")),
        }
    }

    fn migrate(&self, direction: Direction) -> String {
        let device = match Device::open("/dev/hmm0") {
            Ok(device) => device,
            Err(error) => return format!("error {error}"),
        };
        match device.migrate_all(self.region.all(), direction) {
            Ok(outcome) => format!(
                "moved {} filled {} copy_failed {} busy {}",
                outcome.moved,
                outcome.filled,
                outcome.skipped(Skip::CopyFailed),
                outcome.skipped(Skip::Busy),
            ),
            Err(error) => format!("error {}", error.source),
        }
    }

    fn check(&self) -> String {
        let (mut right, mut lost, mut wrong) = (0, 0, 0);
        for page in 0..self.region.pages() {
            let expected = self.region.pattern(page, self.generation).bytes();
            match read(self.region.range(page..page + 1).start) {
                None => lost += 1,
                Some(bytes) if bytes.iter().copied().eq(expected) => right += 1,
                Some(_) => wrong += 1,
            }
        }
        format!("right {right} lost {lost} wrong {wrong}")
    }

    fn touch(&self, page: usize) -> Result<String, String> {
        // SAFETY: the child only reads memory and ends.
        match unsafe { libc::fork() } {
            -1 => Err("no child".into()),
            0 => {
                self.region.touch(page);
                // SAFETY: ends the child without running the parent's destructors.
                unsafe { libc::_exit(0) }
            }
            child => {
                let mut status = 0;
                // SAFETY: the status is a place for it.
                if unsafe { libc::waitpid(child, &raw mut status, 0) } != child {
                    return Err("the child is not there".into());
                }
                if libc::WIFSIGNALED(status) {
                    Ok(format!("signal {}", libc::WTERMSIG(status)))
                } else {
                    Ok("touched".into())
                }
            }
        }
    }
}

/// The page at `address` of this process, read by the kernel, which reports a page that
/// is lost and sends no signal.
fn read(address: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; PAGE_SIZE];
    let to = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: PAGE_SIZE,
    };
    let from = libc::iovec {
        iov_base: address as *mut libc::c_void,
        iov_len: PAGE_SIZE,
    };
    // SAFETY: `to` is a buffer of that length; `from` is only read, by the kernel.
    let read =
        unsafe { libc::process_vm_readv(libc::getpid(), &raw const to, 1, &raw const from, 1, 0) };
    (usize::try_from(read) == Ok(PAGE_SIZE)).then_some(bytes)
}

fn number(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| format!("{text:?} is no number"))
}

fn run(command: &str) -> Result<String, String> {
    let output = Command::new("sh").args(["-c", command]).output();
    let output = output.map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let text: Vec<&str> = text.split_whitespace().collect();
    let status = output.status.code().unwrap_or(-1);
    Ok(format!("exit {status} {}", text.join(" "))
        .trim_end()
        .into())
}
