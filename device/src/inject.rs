//! Decides which requests go wrong, from rules and a seed.
//!
//! Whether a rule strikes the n-th request that it concerns on a queue depends
//! on nothing but the seed, the rule's place in the list, the queue and n. So
//! the same requests in the same order meet the same faults.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use fastrand::Rng;
use serde::Serialize;
use tracing::info;

use crate::{
    abi::{
        VIRTIO_HMM_FRAME_FAULT, VIRTIO_HMM_FRAME_NOT_DONE, VIRTIO_HMM_FRAME_OK,
        VIRTIO_HMM_FRAME_POISONED,
    },
    request::{Extent, Operation, Request},
    rule::{Error, Fault, Rule, Share},
};

/// Most rules at a time.
const MAX_RULES: usize = 64;

/// A fault that strikes one request.
#[derive(Clone, Copy, Debug)]
pub struct Strike {
    /// What goes wrong.
    pub fault: Fault,
    /// Decides what the fault leaves to chance.
    random: u64,
}

/// The faults of one device, in one session after another.
#[derive(Debug)]
pub struct Injector {
    seed: u64,
    copy_queues: u32,
    /// Whether anything went wrong on purpose in this session, or may.
    active: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Counted>,
    dead: bool,
    /// How often the device was made well again.
    cures: u64,
    poisoned: BTreeSet<u64>,
}

#[derive(Debug, Serialize)]
struct Counted {
    rule: Rule,
    /// Requests of the session that the rule concerns, and those that it struck.
    concerned: u64,
    struck: u64,
    /// The former, by queue.
    #[serde(skip)]
    by_queue: BTreeMap<u32, u64>,
}

impl Counted {
    fn new(rule: Rule) -> Self {
        Self {
            rule,
            concerned: 0,
            struck: 0,
            by_queue: BTreeMap::new(),
        }
    }
}

/// What is injected, for those who ask.
#[derive(Debug, Serialize)]
pub struct Report {
    seed: u64,
    rules: Vec<serde_json::Value>,
    dead: bool,
    poisoned_frames: usize,
}

impl Injector {
    /// An injector with these rules, for a device of `copy_queues` copy queues.
    ///
    /// # Errors
    /// If a rule can concern no request of such a device.
    pub fn new(seed: u64, rules: &[Rule], copy_queues: u32) -> Result<Self, Error> {
        let injector = Self {
            seed,
            copy_queues,
            active: AtomicBool::new(false),
            state: Mutex::default(),
        };
        for rule in rules {
            injector.add(rule.clone())?;
        }
        Ok(injector)
    }

    /// Begins a session: nothing has gone wrong yet.
    pub fn begin(&self) {
        let mut state = self.state();
        for counted in &mut state.rules {
            *counted = Counted::new(counted.rule.clone());
        }
        state.dead = false;
        state.cures += 1;
        state.poisoned.clear();
        let active = !state.rules.is_empty();
        self.active.store(active, Ordering::Relaxed);
        if active {
            info!("faults are injected, seed {}", self.seed);
        }
    }

    /// Adds a rule behind the others.
    ///
    /// # Errors
    /// If it can concern no request of the device, or there are too many.
    pub fn add(&self, rule: Rule) -> Result<(), Error> {
        rule.check(self.copy_queues)?;
        let mut state = self.state();
        if state.rules.len() >= MAX_RULES {
            return Err(Error::TooMany(MAX_RULES));
        }
        info!("injecting {rule}, seed {}", self.seed);
        state.rules.push(Counted::new(rule));
        self.active.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Makes the device well: no rule is left, a queue that stalled goes on, a
    /// dead device lives, and poisoned frames hold what they held.
    pub fn clear(&self) {
        let mut state = self.state();
        let cures = state.cures + 1;
        // What waits still has to be answered, so this stays active.
        *state = State {
            cures,
            ..State::default()
        };
        info!("no more faults are injected");
    }

    /// Whether a request must be asked about: false as long as no session with
    /// a rule is concerned.
    pub fn active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// Whether the device is dead.
    pub fn dead(&self) -> bool {
        self.state().dead
    }

    /// Lets the device die.
    pub fn kill(&self) {
        self.state().dead = true;
    }

    /// How often the device was made well. A queue that stalled goes on when
    /// this changes.
    pub fn cures(&self) -> u64 {
        self.state().cures
    }

    /// Decides about a request for `operation` on `queue`. If `holding`, a
    /// request of the queue waits to be overtaken, and this one can do that.
    pub fn decide(&self, queue: u32, operation: Operation, holding: bool) -> Option<Strike> {
        let mut state = self.state();
        for (place, counted) in (0..).zip(&mut state.rules) {
            let rule = &counted.rule;
            if !rule.concerns(queue, operation)
                || holding && matches!(rule.fault, Fault::Reorder(_))
            {
                continue;
            }
            let number = counted.by_queue.entry(queue).or_default();
            let mut rng = rng([self.seed, place, queue.into(), *number]);
            *number += 1;
            counted.concerned += 1;
            if counted.concerned > rule.after
                && counted.struck < rule.count
                && rng.f64() < rule.probability
            {
                counted.struck += 1;
                return Some(Strike {
                    fault: rule.fault,
                    random: rng.u64(..),
                });
            }
        }
        None
    }

    /// What the device does to `request`, before it is executed: sets the
    /// status of each frame that is to fail.
    pub fn spoil(
        &self,
        strike: Option<Strike>,
        operation: Operation,
        request: &Request,
        statuses: &mut [u8],
    ) {
        let mut state = self.state();
        let sources = match operation {
            Operation::FromDevice => &request.extents,
            _ => &request.sources,
        };
        if let (Some((count, random)), Operation::FromDevice) = (poison(strike), operation) {
            let chosen = choose(statuses.len(), count, random);
            let frames = frames(sources).zip(chosen);
            state
                .poisoned
                .extend(frames.filter_map(|(frame, chosen)| chosen.then_some(frame)));
        }
        if !state.poisoned.is_empty() {
            for (frame, status) in frames(sources).zip(&mut *statuses) {
                if state.poisoned.contains(&frame) {
                    *status = VIRTIO_HMM_FRAME_POISONED;
                }
            }
        }
        let done = match strike.map(|strike| strike.fault) {
            Some(Fault::Error(count)) => {
                let random = strike.map_or(0, |strike| strike.random);
                let chosen = choose(statuses.len(), count, random);
                for (status, chosen) in statuses.iter_mut().zip(chosen) {
                    if chosen {
                        *status = VIRTIO_HMM_FRAME_FAULT;
                    }
                }
                return;
            }
            Some(Fault::Short(frames)) => {
                frames.map_or(statuses.len() / 2, |frames| frames as usize)
            }
            Some(Fault::Drop(Share::Half)) => statuses.len() / 2,
            _ => return,
        };
        statuses
            .iter_mut()
            .skip(done)
            .for_each(|status| *status = VIRTIO_HMM_FRAME_NOT_DONE);
    }

    /// Notes what became of the frames of a `request` that was executed: those
    /// that were written are no longer poisoned, unless they are to be.
    pub fn settle(
        &self,
        strike: Option<Strike>,
        operation: Operation,
        request: &Request,
        statuses: &[u8],
    ) {
        let mut state = self.state();
        match operation {
            Operation::Counters | Operation::FromDevice => return,
            Operation::Discard => {
                for Extent { frame, count } in &request.extents {
                    let discarded = *frame..*frame + u64::from(*count);
                    state.poisoned.retain(|frame| !discarded.contains(frame));
                }
                return;
            }
            Operation::ToDevice | Operation::Fill | Operation::DeviceToDevice => {}
        }
        let written = || {
            let statuses = statuses.iter();
            let written = frames(&request.extents).zip(statuses);
            written.filter_map(|(frame, status)| (*status == VIRTIO_HMM_FRAME_OK).then_some(frame))
        };
        if !state.poisoned.is_empty() {
            for frame in written() {
                state.poisoned.remove(&frame);
            }
        }
        if let Some((count, random)) = poison(strike) {
            let chosen = choose(written().count(), count, random);
            let spoilt = written().zip(chosen);
            state
                .poisoned
                .extend(spoilt.filter_map(|(frame, chosen)| chosen.then_some(frame)));
        }
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The rules and what they did in this session.
    pub fn report(&self) -> Report {
        let state = self.state();
        Report {
            seed: self.seed,
            rules: state
                .rules
                .iter()
                .map(|rule| serde_json::json!(rule))
                .collect(),
            dead: state.dead,
            poisoned_frames: state.poisoned.len(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn rng(parts: [u64; 4]) -> Rng {
    let seed = parts
        .into_iter()
        .fold(0, |seed: u64, part| Rng::with_seed(seed ^ part).u64(..));
    Rng::with_seed(seed)
}

fn poison(strike: Option<Strike>) -> Option<(u32, u64)> {
    match strike {
        Some(Strike {
            fault: Fault::Poison(count),
            random,
        }) => Some((count, random)),
        _ => None,
    }
}

/// The numbers of all frames in order.
fn frames(extents: &[Extent]) -> impl Iterator<Item = u64> {
    extents
        .iter()
        .flat_map(|extent| extent.frame..extent.frame + u64::from(extent.count))
}

/// For each of `len` frames, whether it is among the `count` at random.
fn choose(len: usize, count: u32, random: u64) -> impl Iterator<Item = bool> {
    let mut rng = Rng::with_seed(random);
    let mut wanted = len.min(count as usize);
    (0..len).map(move |at| {
        // Each is as likely as any other: `wanted` are still to be found among
        // those that are left.
        let chosen = rng.usize(..len - at) < wanted;
        wanted -= usize::from(chosen);
        chosen
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn injector(seed: u64, rules: &[&str]) -> Injector {
        let rules: Vec<_> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        let injector = Injector::new(seed, &rules, 2).unwrap();
        injector.begin();
        injector
    }

    /// Which of `count` requests are struck.
    fn strikes(injector: &Injector, queue: u32, count: usize) -> Vec<Option<(Fault, u64)>> {
        let strike = |_| injector.decide(queue, Operation::ToDevice, false);
        (0..count)
            .map(strike)
            .map(|strike| strike.map(|strike| (strike.fault, strike.random)))
            .collect()
    }

    #[test]
    fn without_rules_nothing_is_asked() {
        let injector = Injector::new(1, &[], 2).unwrap();
        assert!(!injector.active());
        injector.begin();
        assert!(!injector.active());
        injector.add("stall".parse().unwrap()).unwrap();
        assert!(injector.active());
        injector.clear();
        assert!(injector.active(), "what waits has to be answered");
        injector.begin();
        assert!(!injector.active());
    }

    #[test]
    fn the_first_rule_that_strikes_decides() {
        let injector = injector(1, &["stall,after=1,count=1", "dead,count=1", "drop"]);
        let faults: Vec<_> = strikes(&injector, 2, 4)
            .into_iter()
            .map(|strike| strike.unwrap().0.name())
            .collect();
        assert_eq!(faults, ["dead", "stall", "drop", "drop"]);
        let report = serde_json::to_value(injector.report()).unwrap();
        let counts: Vec<_> = report["rules"]
            .as_array()
            .unwrap()
            .iter()
            .map(|rule| {
                (
                    rule["concerned"].as_u64().unwrap(),
                    rule["struck"].as_u64().unwrap(),
                )
            })
            .collect();
        assert_eq!(counts, [(4, 1), (3, 1), (2, 2)]);
    }

    #[test]
    fn a_request_that_can_overtake_is_not_held_itself() {
        let injector = injector(1, &["reorder", "drop"]);
        let operation = Operation::Fill;
        let name = |holding| injector.decide(2, operation, holding).unwrap().fault.name();
        assert_eq!(
            [name(false), name(true), name(false)],
            ["reorder", "drop", "reorder"]
        );
    }

    #[test]
    fn a_session_begins_like_the_last_one() {
        let injector = injector(7, &["error=2,probability=0.5,after=3,count=5"]);
        let first = strikes(&injector, 2, 64);
        assert_eq!(first.iter().flatten().count(), 5);
        assert!(first[..3].iter().all(Option::is_none));
        assert_eq!(strikes(&injector, 2, 64).iter().flatten().count(), 0);
        injector.begin();
        assert_eq!(strikes(&injector, 2, 64), first);
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        /// What other queues do makes no difference, other seeds do.
        #[test]
        fn seed_queue_and_number_decide(seed: u64, others in 0..200_usize) {
            let rules = ["error,probability=0.5"];
            let alone = strikes(&injector(seed, &rules), 2, 128);
            let disturbed = injector(seed, &rules);
            let other = strikes(&disturbed, 3, others);
            prop_assert_eq!(&strikes(&disturbed, 2, 128), &alone);
            prop_assert!(alone[..other.len().min(128)] != other[..other.len().min(128)] || others < 32);
            prop_assert_ne!(&strikes(&injector(seed ^ 1, &rules), 2, 128), &alone);
        }

        #[test]
        fn as_many_are_chosen_as_there_are(len in 0..600_usize, count in 0..700_u32, random: u64) {
            let chosen = choose(len, count, random).filter(|chosen| *chosen).count();
            prop_assert_eq!(chosen, len.min(count as usize));
        }

        #[test]
        fn probability_is_how_often(seed: u64, percent in 0..=100_u32) {
            let rule = format!("error,probability={}", f64::from(percent) / 100.0);
            let struck = strikes(&injector(seed, &[&rule]), 2, 2000).iter().flatten().count();
            let expected = 20 * percent as usize;
            // Ten standard deviations.
            prop_assert!(struck.abs_diff(expected) < 224, "{} of {}", struck, expected);
            prop_assert!(percent > 0 || struck == 0);
            prop_assert!(percent < 100 || struck == 2000);
        }
    }
}
