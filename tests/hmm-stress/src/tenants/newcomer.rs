//! The process that comes next.

use virtio_hmm_client::{Direction, PAGE_SIZE};

use crate::context::Context;
use crate::failure::Failure;
use crate::process;
use crate::region::{PMD_PAGES, PageSize, Region};
use crate::require;

/// Pages of a piece of the newcomer's memory.
const PIECE: usize = 4 * PMD_PAGES;

/// Nobody is to leave anything; somebody may have been there before.
pub(super) fn alone(context: &Context) -> Result<(), Failure> {
    arrives(context)
}

/// A process is handed every free frame, and finds zeros wherever it looks.
pub(super) fn arrives(context: &Context) -> Result<(), Failure> {
    for page_size in [PageSize::Small, PageSize::Huge] {
        process::fork(context, |context| {
            // Nobody else's pages are to go home for it.
            look(&context.without_eviction()?, page_size)
        })?
        .wait()?;
    }
    Ok(())
}

fn look(context: &Context, page_size: PageSize) -> Result<(), Failure> {
    let free = context.free()? / PAGE_SIZE as u64;
    let (mut pieces, mut handed_out) = (Vec::new(), 0);
    // None comes home before all are handed out, or it would be handed out again.
    while handed_out < free {
        let left = usize::try_from(free - handed_out).unwrap_or(PIECE);
        let piece = Region::new(left.min(PIECE), page_size, context.region_seed(100))?;
        let settled = context.settle(piece.all(), Direction::ToDevice, 0)?;
        pieces.push(piece);
        if settled.filled == 0 {
            break;
        }
        handed_out += settled.filled;
    }
    let mut result = Ok(());
    for piece in pieces {
        // Half of it on request, half by fault.
        let half = piece.range(0..piece.pages() / 2);
        let checked = context
            .settle(half, Direction::ToSystem, 0)
            .and_then(|_| context.check(&piece, 0..piece.pages(), |_| 0));
        // The rest is looked at as well.
        result = result.and(checked);
    }
    result?;
    require!(
        handed_out == free,
        "{handed_out} of {free} free frames were handed out"
    );
    Ok(())
}
