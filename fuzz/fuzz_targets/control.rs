//! The control socket's input, which arrives in pieces of the length that the
//! first byte says. Each line gets one reply, a JSON object, whatever
//! the pieces.
#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::{Corpus, fuzz_target};
use serde_json::{Map, Value};
use vhost_device_hmm::{
    control::Control,
    hardware::Events,
    inject::Injector,
    memory::{Backing, Memory},
    session::Shared,
    stop::Stop,
};

struct Parts {
    shared: Arc<Shared>,
    memory: Arc<Memory>,
    stop: Arc<Stop>,
}

static PARTS: LazyLock<Parts> = LazyLock::new(|| Parts {
    shared: Arc::new(Shared::new(2 << 20, 1, Events::default())),
    memory: Arc::new(Memory::new(2 << 20, Backing::Sparse).unwrap()),
    stop: Arc::new(Stop::new().unwrap()),
});

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((length, bytes)) = input.split_first() else {
        return Corpus::Reject;
    };
    let whole = answers(bytes, bytes.len().max(1));
    if let (replies, Some(rest)) = &whole {
        let lines = bytes.iter().filter(|b| **b == b'\n').count();
        assert_eq!(*replies, lines);
        assert!(bytes.ends_with(rest));
    }
    assert_eq!(whole, answers(bytes, usize::from(*length).max(1)));
    Corpus::Keep
});

/// The number of replies to what arrives in pieces, and the beginning of a line
/// that is left, unless a line was too long.
fn answers(bytes: &[u8], piece: usize) -> (usize, Option<Vec<u8>>) {
    let injector = Arc::new(Injector::new(1, &[], 1).unwrap());
    let (shared, memory) = (Arc::clone(&PARTS.shared), Arc::clone(&PARTS.memory));
    let control = Control::new(shared, memory, injector, Arc::clone(&PARTS.stop));
    let (mut line, mut replies) = (Vec::new(), Vec::new());
    let complete = bytes
        .chunks(piece)
        .all(|piece| control.answer(&mut line, piece, &mut replies).unwrap());
    assert!(replies.is_empty() || replies.ends_with(b"\n"));
    let replies = replies.split_inclusive(|b| *b == b'\n');
    let replies = replies.map(|reply| serde_json::from_slice::<Map<String, Value>>(reply).unwrap());
    (replies.count(), complete.then_some(line))
}
