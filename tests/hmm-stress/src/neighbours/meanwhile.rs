//! Migration in the background of something else.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use virtio_hmm_client::Direction;

use crate::context::Context;
use crate::failure::Failure;
use crate::region::Region;
use crate::require;

/// Run `body` while another thread migrates the regions in each of the directions in turn,
/// at least once before it and once after it began.
///
/// # Errors
/// The body's, a migration's, or no page moved.
pub(super) fn meanwhile<T>(
    context: &Context,
    regions: &[&Region],
    directions: &[Direction],
    body: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let round = || {
        let mut moved = 0;
        for region in regions {
            for &direction in directions {
                moved += context.migrate(region.all(), direction)?.moved;
            }
        }
        Ok::<_, Failure>(moved)
    };
    let mut moved = round()?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let migrator = scope.spawn(|| {
            loop {
                moved += round()?;
                if stop.load(Ordering::Relaxed) {
                    return Ok::<_, Failure>(moved);
                }
            }
        });
        let result = body();
        stop.store(true, Ordering::Relaxed);
        let moved = migrator
            .join()
            .map_err(|_| Failure::Broken("a thread panicked".into()))?;
        let value = result?;
        require!(moved? > 0, "nothing migrated meanwhile");
        Ok(value)
    })
}
