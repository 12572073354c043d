//! How long a worker looks at an empty ring before it sleeps.

use std::time::{Duration, Instant};

/// How long at most, and how soon the next request must have come the last time. To
/// be woken takes tens of microseconds, which is most of what a CPU fault takes; and
/// a device that is not used takes no time of its host.
const WINDOW: Duration = Duration::from_millis(1);

/// One look in so many yields the CPU: a yield takes longer than a look, and what comes
/// meanwhile waits for its end.
const LOOKS: u32 = 16;

/// A yield that takes longer has given the CPU to something that wants it for good. To
/// get it back takes a slice of the scheduler, some milliseconds, whereas a worker that
/// sleeps is woken at once. What takes less is brief, as the timer tick of a vCPU.
const LOST: Duration = Duration::from_micros(500);

/// For how long there is no polling after such a yield: doubles with each, from the
/// one to the other.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(100));

/// After so many short yields, the time is halved.
const SHORT_YIELDS: u32 = 100;

/// Whether a worker looks at its ring again at once, should it be empty.
#[derive(Debug, Default)]
pub struct Polling {
    /// Since when the ring has been empty, if it is.
    empty: Option<Instant>,
    /// Whether it was empty for less than [`WINDOW`] before the last request came.
    busy: bool,
    /// Until when the CPU is left to others, if it is.
    until: Option<Instant>,
    pause: Duration,
    looks: u32,
    short_yields: u32,
}

impl Polling {
    /// Whether to poll, at the time that `clock` tells.
    pub fn is_due(&mut self, clock: impl Fn() -> Instant) -> bool {
        if !self.busy {
            return false;
        }
        if self.until.is_some_and(|until| clock() < until) {
            return false;
        }
        self.until = None;
        self.empty
            .is_none_or(|since| clock().saturating_duration_since(since) < WINDOW)
    }

    /// The ring was seen to be empty.
    pub fn note_empty(&mut self, clock: impl Fn() -> Instant) {
        self.empty.get_or_insert_with(clock);
    }

    /// The ring was seen to have a request. Returns whether it was empty before.
    pub fn note_request(&mut self, clock: impl Fn() -> Instant) -> bool {
        let Some(since) = self.empty.take() else {
            return false;
        };
        self.busy = clock().saturating_duration_since(since) < WINDOW;
        true
    }

    /// Whether to yield the CPU after this look at an empty ring.
    pub fn yields(&mut self) -> bool {
        self.looks = (self.looks + 1) % LOOKS;
        self.looks == 0
    }

    /// The worker has yielded its CPU at `begun` and has had it back at `done`.
    pub fn note_yield(&mut self, begun: Instant, done: Instant) {
        if done.saturating_duration_since(begun) > LOST {
            self.short_yields = 0;
            self.pause = (self.pause * 2).clamp(PAUSES.0, PAUSES.1);
            self.until = Some(done + self.pause);
            return;
        }
        self.short_yields += 1;
        if self.short_yields == SHORT_YIELDS {
            self.short_yields = 0;
            self.pause /= 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MICROSECOND: Duration = Duration::from_micros(1);

    /// One that polls because requests came shortly after one another.
    fn busy(now: Instant) -> Polling {
        let mut polling = Polling::default();
        polling.note_empty(|| now);
        assert!(polling.note_request(|| now + MICROSECOND));
        assert!(polling.is_due(|| now + MICROSECOND));
        polling
    }

    #[test]
    fn one_look_in_some_yields() {
        let mut polling = Polling::default();
        let yields = (0..4 * LOOKS).filter(|_| polling.yields()).count();
        assert_eq!(yields, 4);
    }

    #[test]
    fn sleeps_until_requests_come_soon_after_one_another() {
        let now = Instant::now();
        let mut polling = Polling::default();
        assert!(!polling.is_due(|| now));
        polling.note_empty(|| now);
        assert!(polling.note_request(|| now + WINDOW));
        assert!(!polling.is_due(|| now + WINDOW));
        assert!(!polling.note_request(|| now + WINDOW), "was not empty");
    }

    #[test]
    fn sleeps_after_the_window() {
        let now = Instant::now();
        let mut polling = busy(now);
        polling.note_empty(|| now);
        polling.note_empty(|| now + WINDOW / 2);
        assert!(polling.is_due(|| now + WINDOW - MICROSECOND));
        assert!(!polling.is_due(|| now + WINDOW));
    }

    #[test]
    fn leaves_the_cpu_to_who_wants_it_for_longer_each_time() {
        let mut now = Instant::now();
        let mut polling = busy(now);
        let mut expected = PAUSES.0;
        for _ in 0..10 {
            let done = now + LOST + MICROSECOND;
            polling.note_yield(now, done);
            assert!(!polling.is_due(|| done + expected - MICROSECOND));
            assert!(polling.is_due(|| done + expected));
            now = done + expected;
            expected = (expected * 2).min(PAUSES.1);
        }
    }

    #[test]
    fn forgets_lost_time_when_yields_are_short() {
        let now = Instant::now();
        let mut polling = busy(now);
        for _ in 0..10 {
            polling.note_yield(now, now + 2 * LOST);
        }
        for _ in 0..20 * SHORT_YIELDS {
            polling.note_yield(now, now + MICROSECOND);
        }
        polling.note_yield(now, now + 2 * LOST);
        assert!(polling.is_due(|| now + 2 * LOST + PAUSES.0));
    }
}
