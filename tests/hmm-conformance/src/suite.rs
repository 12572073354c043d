//! Runs cases one after another and prints how they end, as KTAP has it.

use std::sync::atomic::{AtomicBool, Ordering};

use vhost_device_hmm::ErrorChain;

use crate::cases::Case;
use crate::driver::{Driver, FEATURES};
use crate::failure::{Failure, Result};

/// How many cases ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// The device conforms.
    pub passed: u32,
    /// It does not.
    pub failed: u32,
    /// Not tried.
    pub skipped: u32,
}

/// What runs.
#[derive(Debug)]
pub struct Suite<'a> {
    /// The device.
    pub driver: &'a mut Driver,
    /// Whether also those cases run that end QEMU.
    pub fatal: bool,
    /// Set to end before the next case.
    pub interrupted: &'a AtomicBool,
}

impl Suite<'_> {
    /// Runs the cases. None if interrupted.
    pub fn run(&mut self, cases: &[&Case]) -> Option<Totals> {
        println!("1..{}", cases.len());
        let mut totals = Totals::default();
        let mut lost = None;
        for (number, case) in (1..).zip(cases) {
            if self.interrupted.load(Ordering::Relaxed) {
                println!("Bail out! interrupted");
                return None;
            }
            let (result, works) = match lost {
                // It would run into the same deadlines again and again.
                Some(earlier) => {
                    let text = format!("the device does not work any more since {earlier}");
                    (Err(Failure::Broken(text)), Ok(()))
                }
                None => self.try_out(case),
            };
            if works.is_err() {
                lost = Some(case.name);
            }
            match (&result, &works) {
                (Ok(()), Ok(())) => {
                    totals.passed += 1;
                    println!("ok {number} {}", case.name);
                }
                (Err(Failure::Skip(reason)), Ok(())) => {
                    totals.skipped += 1;
                    println!("ok {number} {} # SKIP {reason}", case.name);
                }
                _ => {
                    totals.failed += 1;
                    if let Err(failure) = result {
                        println!("# {}", ErrorChain(&failure));
                    }
                    if let Err(failure) = works {
                        println!("# afterwards: {}", ErrorChain(&failure));
                    }
                    println!("not ok {number} {}", case.name);
                }
            }
        }
        Some(totals)
    }

    /// How a case ends, and whether the device works afterwards.
    fn try_out(&mut self, case: &Case) -> (Result, Result) {
        if let Some(end) = case.fatal.filter(|_| !self.fatal) {
            let reason = format!("it ends QEMU 11.1.3: {end}; --fatal runs it");
            return (Err(Failure::Skip(reason)), Ok(()));
        }
        let driver = &mut *self.driver;
        let start = driver.memory.mark();
        let started = driver.start(FEATURES);
        let result = started.and_then(|()| (case.run)(driver));
        driver.memory.release(start);
        let works = driver.check_works();
        driver.memory.release(start);
        (result, works)
    }
}
