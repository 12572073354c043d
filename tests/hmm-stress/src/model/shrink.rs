//! Making a script that fails short.

use std::time::Instant;

use super::operation::Step;

/// The shortest script found that still `fails`: first without runs of steps, then without
/// single ones, then with fewer pages, all over until nothing more can go. `script` itself
/// is known to fail. At `end` the best so far has to do.
pub(super) fn shrink(
    mut script: Vec<Step>,
    end: Instant,
    mut fails: impl FnMut(&[Step]) -> bool,
) -> Vec<Step> {
    let mut accept = |script: &mut Vec<Step>, candidate: Vec<Step>| {
        let fails = Instant::now() < end && fails(&candidate);
        if fails {
            *script = candidate;
        }
        fails
    };
    loop {
        let before = script.clone();
        drop_steps(&mut script, &mut accept);
        narrow_ranges(&mut script, &mut accept);
        if script == before {
            return script;
        }
    }
}

fn drop_steps(script: &mut Vec<Step>, accept: &mut impl FnMut(&mut Vec<Step>, Vec<Step>) -> bool) {
    let mut chunk = script.len() / 2;
    while chunk > 0 {
        // From the end: what comes late depends on what was before it.
        let mut stop = script.len();
        while stop > 0 {
            let start = stop.saturating_sub(chunk);
            let candidate = [&script[..start], &script[stop..]].concat();
            accept(script, candidate);
            stop = start;
        }
        chunk /= 2;
    }
}

fn narrow_ranges(
    script: &mut Vec<Step>,
    accept: &mut impl FnMut(&mut Vec<Step>, Vec<Step>) -> bool,
) {
    for index in 0..script.len() {
        loop {
            let pages = script[index].pages.clone();
            if pages.len() < 2 {
                break;
            }
            let middle = pages.start + pages.len() / 2;
            let narrower = [
                pages.start..middle,
                middle..pages.end,
                pages.start..pages.end - 1,
                pages.start + 1..pages.end,
            ];
            let found = narrower.into_iter().any(|pages| {
                let mut candidate = script.clone();
                candidate[index] = candidate[index].narrowed(pages);
                accept(script, candidate)
            });
            if !found {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::generate::generate;
    use crate::model::operation::Operation;
    use crate::model::state::State;

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    /// Memory that keeps what is discarded while it is on the device.
    fn keeps_discarded_device_pages(script: &[Step]) -> bool {
        let (mut right, mut wrong) = (State::new(), State::new());
        let mut on_device = [false; super::super::operation::PAGES];
        for step in script.iter().filter(|step| step.process == 0) {
            right.apply(step.operation, step.pages.clone());
            match step.operation {
                Operation::ToDevice => on_device[step.pages.clone()].fill(true),
                Operation::Discard => {
                    for page in step.pages.clone().filter(|&page| !on_device[page]) {
                        wrong.apply(Operation::Discard, page..page + 1);
                    }
                    continue;
                }
                Operation::Read | Operation::Write(_) | Operation::Poke(_) | Operation::ToRam => {
                    on_device[step.pages.clone()].fill(false);
                }
                _ => {}
            }
            wrong.apply(step.operation, step.pages.clone());
            if step.operation == Operation::Read {
                let differs = |&page: &usize| {
                    let contents = |state: &State| state.page(page).map(|page| page.contents);
                    contents(&right) != contents(&wrong)
                };
                let seen = right.accessible(step.pages.clone(), false);
                if seen.iter().any(differs) {
                    return true;
                }
            }
        }
        false
    }

    #[test]
    fn only_the_steps_that_matter_are_left() {
        let script = generate(3, 2000);
        assert!(keeps_discarded_device_pages(&script));
        let shrunk = shrink(script, later(), keeps_discarded_device_pages);
        let verbs: Vec<String> = shrunk
            .iter()
            .map(|step| step.to_string().split(' ').nth(1).unwrap().to_owned())
            .collect();
        assert!(
            matches!(
                verbs.join(" ").as_str(),
                "write to-device discard read" | "poke to-device discard read"
            ),
            "{verbs:?}"
        );
        assert!(
            shrunk.iter().all(|step| step.pages.len() == 1),
            "{shrunk:?}"
        );
        let page = shrunk[0].pages.clone();
        assert!(shrunk.iter().all(|step| step.pages == page), "{shrunk:?}");
    }

    #[test]
    fn a_script_is_as_it_was_when_there_is_no_time() {
        let script = generate(3, 50);
        assert_eq!(shrink(script.clone(), Instant::now(), |_| true), script);
    }

    #[test]
    fn what_always_fails_shrinks_to_nothing() {
        assert_eq!(shrink(generate(3, 50), later(), |_| true), []);
    }
}
