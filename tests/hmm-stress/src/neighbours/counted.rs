//! How the driver's counters move.

use crate::context::Context;
use crate::failure::Failure;
use crate::require;

/// Run `body` and require that each of the driver's counters named changed by as much as
/// is said.
pub(super) fn counted<T>(
    context: &Context,
    expected: &[(&str, usize)],
    body: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let before = context.driver_counters()?;
    let value = body()?;
    let change = context.driver_counters()?.since(&before);
    for &(name, expected) in expected {
        let seen = change.get(name).copied();
        require!(
            seen == i64::try_from(expected).ok(),
            "{name} should have changed by {expected} and did by {seen:?}"
        );
    }
    Ok(value)
}
