//! A model of the link between the driver's memory and that of the device: when
//! a copy that was made at once would have come to its end over a slower link.
//!
//! The link has the same bandwidth each way, and requests in one direction
//! follow one another on it, from whatever queue. Latency comes on top, once a
//! request, and those of several requests overlap.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::request::{FRAME_SIZE, Operation};

/// Least bandwidth, in bytes a second: the largest request then takes 2 s.
pub const LEAST_BANDWIDTH: u64 = 1 << 20;

/// Properties of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Bytes a second each way, at least [`LEAST_BANDWIDTH`]; as fast as memory
    /// if not said.
    pub bandwidth: Option<u64>,
    /// Time that each copy request takes apart from the transfer.
    pub latency: Duration,
}

impl Config {
    /// The link, if it is not that of memory itself.
    pub fn link(self) -> Option<Link> {
        (self != Self::default()).then(|| Link {
            config: self,
            to_device: Direction::default(),
            from_device: Direction::default(),
        })
    }
}

/// When one direction is free again, if it was ever used.
#[derive(Debug, Default)]
struct Direction(Mutex<Option<Instant>>);

/// A link.
#[derive(Debug)]
pub struct Link {
    config: Config,
    to_device: Direction,
    from_device: Direction,
}

impl Link {
    /// When a request for `operation` that moves `frames` frames and came at
    /// `start` is done. To be called in the order in which requests come.
    pub fn done(&self, operation: Operation, frames: u32, start: Instant) -> Instant {
        let direction = match operation {
            Operation::ToDevice => Some(&self.to_device),
            Operation::FromDevice => Some(&self.from_device),
            _ => None,
        };
        let sent = match (direction, self.config.bandwidth) {
            (Some(direction), Some(bandwidth)) => {
                let bytes = u64::from(frames) * FRAME_SIZE as u64;
                direction.send(start, bytes, bandwidth)
            }
            _ => start,
        };
        sent + self.config.latency
    }
}

impl Direction {
    /// Sends `bytes` as soon as what was sent before has left. Returns when
    /// they have.
    fn send(&self, start: Instant, bytes: u64, bandwidth: u64) -> Instant {
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(bandwidth.max(1));
        let time = Duration::from_nanos(nanoseconds.try_into().unwrap_or(u64::MAX));
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let end = free.map_or(start, |free| free.max(start)) + time;
        *free = Some(end);
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    /// Frames that take a millisecond at 1000 MiB/s, and a bit more than one.
    const FRAMES: u32 = 256;
    const BANDWIDTH: u64 = 1000 << 20;

    fn link(bandwidth: Option<u64>, latency: Duration) -> Link {
        Config { bandwidth, latency }.link().unwrap()
    }

    #[test]
    fn no_link_is_modelled_unless_asked_for() {
        assert!(Config::default().link().is_none());
    }

    #[test]
    fn transfers_in_one_direction_follow_one_another() {
        let link = link(Some(BANDWIDTH), 10 * MS);
        let start = Instant::now();
        let done = |operation| link.done(operation, FRAMES, start) - start;
        assert_eq!(done(Operation::ToDevice), 11 * MS);
        assert_eq!(done(Operation::ToDevice), 12 * MS);
        assert_eq!(done(Operation::FromDevice), 11 * MS);
        assert_eq!(done(Operation::ToDevice), 13 * MS);
        // Those that move nothing over the link only have its latency.
        assert_eq!(done(Operation::Fill), 10 * MS);
        assert_eq!(done(Operation::DeviceToDevice), 10 * MS);
        // A pause is not made up for.
        let later = start + 100 * MS;
        assert_eq!(
            link.done(Operation::ToDevice, FRAMES, later) - later,
            11 * MS
        );
    }

    #[test]
    fn latency_alone_lets_transfers_overlap() {
        let link = link(None, 10 * MS);
        let start = Instant::now();
        for _ in 0..3 {
            assert_eq!(
                link.done(Operation::ToDevice, FRAMES, start) - start,
                10 * MS
            );
        }
    }
}
