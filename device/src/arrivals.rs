//! When requests became available, as far as one who looks at the ring between
//! two requests can tell.

use std::{collections::VecDeque, time::Instant};

/// The arrivals of requests on one ring. Places in the ring are counted modulo
/// 2^16, as virtio does.
#[derive(Debug, Default)]
pub struct Arrivals {
    /// Requests before this place have been noted, if any were.
    known: Option<u16>,
    /// Requests before this place arrived with the next one.
    end: u16,
    /// When those did.
    arrived: Option<Instant>,
    /// All later ones: before this place, at that time.
    later: VecDeque<(u16, Instant)>,
}

impl Arrivals {
    /// Notes that the requests before `available` have arrived, the next of
    /// which to be taken is at `next`. Returns whether some are new.
    pub fn note(&mut self, available: u16, next: u16, now: impl FnOnce() -> Instant) -> bool {
        let new = available != self.known.unwrap_or(next);
        if !new && next != self.end {
            return false;
        }
        if new {
            self.known = Some(available);
            self.later.push_back((available, now()));
        }
        if self.arrived.is_none() || next == self.end {
            while let Some((end, arrived)) = self.later.pop_front() {
                (self.end, self.arrived) = (end, Some(arrived));
                if end != next {
                    return new;
                }
            }
            (self.end, self.arrived) = (next, None);
        }
        new
    }

    /// When the next request to be taken arrived.
    pub fn next(&self) -> Option<Instant> {
        self.arrived
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        /// Each request has the time at which it was first seen, wherever the
        /// ring begins and whenever some more arrive.
        #[test]
        fn each_has_the_time_of_its_arrival(
            start: u16,
            steps in vec((0..4_u16, 0..4_usize), 1..64),
        ) {
            let begin = Instant::now();
            let mut arrivals = Arrivals::default();
            let (mut available, mut next) = (start, start);
            let mut expected = VecDeque::new();
            for (step, (arriving, taken)) in (1..).zip(steps) {
                let now = begin + Duration::from_secs(step);
                available = available.wrapping_add(arriving);
                expected.extend((0..arriving).map(|_| now));
                for _ in 0..=taken {
                    arrivals.note(available, next, || now);
                    let Some(arrived) = expected.front() else {
                        break;
                    };
                    prop_assert_eq!(arrivals.next(), Some(*arrived));
                    expected.pop_front();
                    next = next.wrapping_add(1);
                }
            }
        }
    }
}
