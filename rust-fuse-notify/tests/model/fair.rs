// SPDX-License-Identifier: GPL-2.0

//! Whether what happens by itself comes to an end.
//!
//! The properties say that a state in which nothing happens by itself is a good one. That nobody
//! waits for ever needs one thing more: no infinite run without mischief. The states are finitely
//! many, so that is: no cycle of progress. (The checker's own `eventually` misses cycles, and joins
//! of paths.)

use super::sizes::Size;
use super::state::State;
use stateright::Model;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

type Fingerprint = u64;

fn fingerprint(state: &State) -> Fingerprint {
    let mut hasher = DefaultHasher::new();
    state.hash(&mut hasher);
    hasher.finish()
}

/// What was found.
#[derive(Debug, PartialEq, Eq)]
pub struct Ends {
    pub states: usize,
    /// The longest run without mischief.
    pub longest: usize,
}

enum Mark {
    /// On the path that is being followed.
    Open,
    /// The longest run from here.
    Done(usize),
}

/// Follows all progress from all states.
///
/// # Errors
///
/// A state from which progress leads back to it.
pub fn ends(m: &Size) -> Result<Ends, Box<State>> {
    let mut marks: HashMap<Fingerprint, Mark> = HashMap::new();
    let mut starts = m.init_states();
    let mut longest = 0;
    while let Some(start) = starts.pop() {
        let mut path = Vec::new();
        enter(m, start, &mut path, &mut marks, &mut starts);
        while let Some(at) = path.last_mut() {
            if let Some(next) = at.next.pop() {
                match marks.get(&fingerprint(&next)) {
                    Some(Mark::Open) => return Err(Box::new(next)),
                    Some(Mark::Done(length)) => at.length = at.length.max(length + 1),
                    None => enter(m, next, &mut path, &mut marks, &mut starts),
                }
                continue;
            }
            let (print, length) = (at.print, at.length);
            longest = longest.max(length);
            marks.insert(print, Mark::Done(length));
            path.pop();
            if let Some(before) = path.last_mut() {
                before.length = before.length.max(length + 1);
            }
        }
    }
    Ok(Ends {
        states: marks.len(),
        longest,
    })
}

struct At {
    print: Fingerprint,
    next: Vec<State>,
    length: usize,
}

/// Begins with a state that is not known yet. Where mischief leads from it is looked at later.
fn enter(
    m: &Size,
    state: State,
    path: &mut Vec<At>,
    marks: &mut HashMap<Fingerprint, Mark>,
    starts: &mut Vec<State>,
) {
    let print = fingerprint(&state);
    if marks.contains_key(&print) {
        return;
    }
    marks.insert(print, Mark::Open);
    let (mut progress, mut all) = (Vec::new(), Vec::new());
    m.progress(&state, &mut progress);
    m.actions(&state, &mut all);
    let mut next = Vec::new();
    for action in all {
        let Some(after) = m.next_state(&state, action) else {
            continue;
        };
        if progress.contains(&action) {
            next.push(after);
        } else if !marks.contains_key(&fingerprint(&after)) {
            starts.push(after);
        }
    }
    path.push(At {
        print,
        next,
        length: 0,
    });
}
