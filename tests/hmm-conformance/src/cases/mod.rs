//! The cases, named after the statements of `docs/device-specification.md`.
//!
//! A case begins with a device that was reset and started, and may leave it in any state: after
//! each the device has to work again.

mod chains;
mod configuration;
mod copies;
mod lifetime;
mod notifications;
mod rejections;
mod reset;
mod setup;

use crate::driver::Driver;
use crate::failure::Result;

/// Addresses that are not in any machine's memory: far up, at the interrupt controller, and at
/// the end of all addresses.
const OUTSIDE: [u64; 3] = [1 << 46, 0xfee0_0000, u64::MAX - 8];

/// A case.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Its name, which begins with the statement.
    pub name: &'static str,
    /// Fails if the device does not conform.
    pub run: fn(&mut Driver) -> Result,
    /// How it ends QEMU, if it does.
    pub fatal: Option<&'static str>,
}

impl Case {
    /// The statement that it is about, like D15.
    #[must_use]
    pub fn statement(&self) -> String {
        self.name
            .split('_')
            .next()
            .unwrap_or_default()
            .to_uppercase()
    }
}

macro_rules! cases {
    ($($name:ident $(ends QEMU by $fatal:literal)?),* $(,)?) => {
        pub(super) const CASES: &[$crate::cases::Case] = &[
            $($crate::cases::Case {
                name: stringify!($name),
                run: $name,
                fatal: { let fatal: &[&str] = &[$($fatal)?]; fatal.first().copied() },
            }),*
        ];
    };
}
use cases;

/// All cases, in the order in which they run: first the one that wants an unused device.
pub fn all() -> impl Iterator<Item = &'static Case> {
    [
        lifetime::CASES,
        configuration::CASES,
        setup::CASES,
        copies::CASES,
        rejections::CASES,
        chains::CASES,
        notifications::CASES,
        reset::CASES,
    ]
    .into_iter()
    .flatten()
}

/// Statements that no case is about, and why.
pub const NOT_TESTED: &[(&str, &str)] = &[
    (
        "D21",
        "no frame loses its contents unless a device does so on purpose: device/tests/protocol/injection.rs",
    ),
    (
        "R1",
        "of the driver: this one ends with an error at a device that it does not know",
    ),
    (
        "R2",
        "of the driver: a device cannot tell what a driver relies on",
    ),
    (
        "R5",
        "of the driver: this one fails the case at a status that it does not expect",
    ),
    ("R7", "of the driver: the device knows nothing of processes"),
    (
        "R8",
        "of the driver: D5 says what a device does with such operations",
    ),
];
