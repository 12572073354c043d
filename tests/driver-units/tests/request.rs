//! Whatever is added to a request, it names just that; and whatever a device answers, the driver
//! takes for done what it has said is done.
#![allow(clippy::cast_possible_truncation, clippy::indexing_slicing)]

use driver_units::request::{Answer, Request};
use proptest::{collection::vec, prelude::*};

/// More than a request is given here.
const MAX_FRAMES: usize = 400;
const EIO: i32 = 5;
const ETIMEDOUT: i32 = 110;
const FILL: u32 = 3;
/// Bytes of a response in front of the status of each frame.
const HEAD: usize = 8;

/// Frames, and pages, that follow one another; where they begin is told by the end of the last
/// ones, or else.
#[derive(Clone, Debug)]
struct Range {
    frame: Option<u64>,
    pfn: Option<u64>,
    nr: u32,
    slot: u16,
}

/// Of a frame each now and then, so that there are as many extents as frames.
fn ranges() -> impl Strategy<Value = Vec<Range>> {
    let frame = || prop_oneof![0..64_u64, 0..1_u64 << 40];
    let range = move |most| {
        let frame = prop::option::of(frame());
        let pfn = prop::option::of(1..1_u64 << 30);
        (frame, pfn, 1..=most, 0..60_000_u16).prop_map(|(frame, pfn, nr, slot)| Range {
            frame,
            pfn,
            nr,
            slot,
        })
    };
    prop_oneof![1_u32..2, 2_u32..20].prop_flat_map(move |most| vec(range(most), 1..20))
}

/// Mostly what a device may well answer.
fn answer() -> impl Strategy<Value = Answer> {
    let status = prop_oneof![4 => 0..2_u32, 1 => any::<u32>()];
    let frame = prop_oneof![3 => Just(0_u8), 1 => any::<u8>()];
    let whole = HEAD + MAX_FRAMES;
    let len = || prop_oneof![3 => Just(whole), 1 => 0..whole, 1 => 0..20_usize];
    let bytes = (status, any::<u32>(), vec(frame, MAX_FRAMES), len());
    let bytes = bytes.prop_map(|(status, done, frames, len)| {
        let mut bytes = [status.to_le_bytes(), done.to_le_bytes()].concat();
        bytes.extend(frames);
        bytes.truncate(len);
        bytes
    });
    prop_oneof![
        1 => prop_oneof![Just(EIO), Just(ETIMEDOUT)].prop_map(Answer::Refused),
        8 => (len(), bytes).prop_map(|(used, bytes)| Answer::Used(used as u32, bytes)),
    ]
}

/// As few runs of successive numbers as make up these.
fn runs(numbers: &[u64]) -> usize {
    let breaks = numbers.windows(2).filter(|pair| pair[0] + 1 != pair[1]);
    breaks.count() + usize::from(!numbers.is_empty())
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn requests_are_what_was_added(
        uses in vec((1..=FILL, ranges(), answer()), 1..4),
    ) {
        // No more room than is needed, so that what goes beyond it shows.
        let needs = |ranges: &[Range]| ranges.iter().map(|it| it.nr).sum();
        let max = uses.iter().map(|(_, ranges, _)| needs(ranges)).max();
        let mut request = Request::new(max.unwrap_or(0));

        for (op, ranges, answer) in &uses {
            request.start(*op);
            let (mut frames, mut pages, mut slots) = (vec![], vec![], vec![]);
            for range in ranges {
                let next = |list: &[u64]| list.last().map_or(1, |last| last + 1);
                let frame = range.frame.unwrap_or_else(|| next(&frames));
                let pfn = match op {
                    &FILL => 0,
                    _ => range.pfn.unwrap_or_else(|| next(&pages)),
                };
                request.add(frame, pfn, range.nr, range.slot);
                let nr = u64::from(range.nr);
                frames.extend(frame..frame + nr);
                slots.extend(u32::from(range.slot)..u32::from(range.slot) + range.nr);
                if pfn != 0 {
                    pages.extend(pfn..pfn + nr);
                }
            }
            let counted = request.counted(*op);
            let result = request.execute(answer);
            let extents = runs(&frames) as u32;
            let buffers = runs(&pages) as u32;
            let count = frames.len();
            prop_assert_eq!(request.frames(), (frames, extents));
            prop_assert_eq!(request.pages(), (pages, buffers));
            prop_assert_eq!(request.slots(), slots);

            // What the device does not write is 0xff.
            let mut response = vec![0xff; HEAD + count];
            let mut used = 0;
            if let Answer::Used(says, bytes) = answer {
                used = *says as usize;
                response.iter_mut().zip(bytes).for_each(|(to, byte)| *to = *byte);
            }
            let (head, body) = response.split_at(HEAD);
            let all_ok = head.starts_with(&[0; 4]);
            let good = used >= response.len() && (all_ok || head.starts_with(&[1, 0, 0, 0]));
            prop_assert_eq!(result, if good { 0 } else { -EIO });
            prop_assert_eq!(request.ok(), good && all_ok);
            if good {
                let expected: Vec<_> = body.iter().map(|status| all_ok || *status == 0).collect();
                prop_assert_eq!(request.frames_ok(), expected);
            }
            let done = head.iter().skip(4).rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
            let answered = u64::from(used >= HEAD);
            let done = if good { done.min(count as u64) } else { 0 };
            let expected = [counted[0] + answered, counted[1] + done];
            prop_assert_eq!(request.counted(*op), expected);
        }
    }
}
