// SPDX-License-Identifier: GPL-2.0
//! Is a history linearizable? That is: is there, for each call, a moment between its two stamps (two moments for a call
//! of two steps), such that the calls, executed one after the other in that order, give what they gave?
//!
//! The search of Wing and Gong, made "just in time" as by Lowe: the stamps are gone through in order, with the set of
//! everything that the tree and the calls under way can be by then. A call is only executed when one returns, and each
//! set has each of its members once (the memory of the search). So the work grows with the number of calls that overlap,
//! not with the length of the history; and when the set becomes empty, the call that has just returned is where it
//! stopped being explicable.

use std::collections::{BTreeSet, HashSet};

use super::model::{State, Stepped};
use super::op::{Op, Record};

/// More than this cannot be overlooked; a history never comes near it.
const TOO_MANY: usize = 200_000;

/// How far a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Slot {
    /// The process calls nothing now.
    Idle,
    Called,
    /// The first of two steps is done.
    Found(u8),
    /// All steps are done, and gave what it will return.
    Done,
}

/// Something that can be the case at some moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Config {
    state: State,
    slots: Vec<Slot>,
}

impl Config {
    fn tidy(&mut self) {
        let of = |slot: &Slot| match slot {
            Slot::Found(node) => Some(*node),
            _ => None,
        };
        let mut held: Vec<Option<u8>> = self.slots.iter().map(of).collect();
        self.state.tidy(&mut held);
        for (slot, node) in self.slots.iter_mut().zip(held) {
            if let Some(node) = node {
                *slot = Slot::Found(node);
            }
        }
    }
}

#[derive(Debug)]
pub struct Fine {
    /// What the tree can be at the end.
    #[allow(dead_code)] // For tests.
    pub ends: Vec<State>,
    /// The largest set.
    pub most: usize,
}

#[derive(Debug)]
pub enum Verdict {
    Fine(Fine),
    /// There is no such order.
    Not(Violation),
    /// The search was given up.
    TooMany,
}

#[derive(Debug)]
pub struct Violation {
    /// Index of the call at whose return nothing was left.
    pub at: usize,
    /// What the model would have had it give.
    pub instead: Vec<String>,
    /// The last stamp before it at which no call was under way, and what the tree could be then.
    pub since: u64,
    pub before: Vec<State>,
}

/// Judges the calls of a history, which may begin with any of these trees.
pub fn judge(records: &[Record], starts: &[State]) -> Verdict {
    let processes = records
        .iter()
        .map(|r| usize::from(r.process) + 1)
        .max()
        .unwrap_or(0);
    let mut events: Vec<(u64, bool, usize)> = Vec::new();
    for (at, record) in records.iter().enumerate() {
        events.push((record.called, false, at));
        events.push((record.returned, true, at));
    }
    events.sort_unstable();
    let mut running: Vec<Option<usize>> = vec![None; processes];
    let mut configs: HashSet<Config> = starts
        .iter()
        .map(|state| Config {
            state: state.clone(),
            slots: vec![Slot::Idle; processes],
        })
        .collect();
    let (mut since, mut before, mut most) = (0, starts.to_vec(), configs.len());
    for (stamp, is_return, at) in events {
        let process = usize::from(records[at].process);
        if !is_return {
            assert!(running[process].is_none(), "a process calls one at a time");
            running[process] = Some(at);
            let called = |mut config: Config| {
                config.slots[process] = Slot::Called;
                config
            };
            configs = configs.into_iter().map(called).collect();
            continue;
        }
        let Some(mut next) = returned(records, &running, &configs, process) else {
            return Verdict::TooMany;
        };
        if next.is_empty() {
            return Verdict::Not(Violation {
                at,
                instead: instead(records, &running, &configs, process),
                since,
                before,
            });
        }
        running[process] = None;
        most = most.max(next.len());
        std::mem::swap(&mut configs, &mut next);
        if running.iter().all(Option::is_none) {
            since = stamp;
            before = configs.iter().map(|c| c.state.clone()).collect();
        }
    }
    Verdict::Fine(Fine {
        ends: configs.into_iter().map(|c| c.state).collect(),
        most,
    })
}

/// Everything that can be the case when the call of `process` has returned; None: too much.
fn returned(
    records: &[Record],
    running: &[Option<usize>],
    configs: &HashSet<Config>,
    process: usize,
) -> Option<HashSet<Config>> {
    let mut after = HashSet::new();
    let mut seen: HashSet<Config> = configs.clone();
    let mut todo: Vec<Config> = configs.iter().cloned().collect();
    while let Some(config) = todo.pop() {
        if config.slots[process] == Slot::Done {
            let mut config = config;
            config.slots[process] = Slot::Idle;
            after.insert(config);
            continue;
        }
        for (other, at) in running.iter().enumerate() {
            let Some(at) = *at else { continue };
            let Some(next) = step(&config, other, &records[at]) else {
                continue;
            };
            if seen.len() >= TOO_MANY {
                return None;
            }
            if seen.insert(next.clone()) {
                todo.push(next);
            }
        }
    }
    Some(after)
}

fn found(slot: Slot) -> Option<Option<u8>> {
    match slot {
        Slot::Called => Some(None),
        Slot::Found(node) => Some(Some(node)),
        Slot::Idle | Slot::Done => None,
    }
}

/// One more step of the call of a process, if there is one that ends in what the call gave.
fn step(config: &Config, process: usize, record: &Record) -> Option<Config> {
    let mut next = config.clone();
    next.slots[process] = match next.state.step(&record.op, found(config.slots[process])?) {
        Stepped::Found(node) => Slot::Found(node),
        Stepped::Ended(expected) => next
            .state
            .allows(&expected, &record.got)
            .then_some(Slot::Done)?,
    };
    next.tidy();
    Some(next)
}

/// All that the call of `process` could have given, whatever it did give.
fn instead(
    records: &[Record],
    running: &[Option<usize>],
    configs: &HashSet<Config>,
    process: usize,
) -> Vec<String> {
    let mut could = BTreeSet::new();
    let mut seen: HashSet<Config> = configs.clone();
    let mut todo: Vec<Config> = configs.iter().cloned().collect();
    while let Some(config) = todo.pop() {
        for (other, at) in running.iter().enumerate() {
            let Some(at) = *at else { continue };
            let next = if other == process {
                could_give(&config, other, &records[at].op, &mut could)
            } else {
                step(&config, other, &records[at])
            };
            todo.extend(next.filter(|next| seen.len() < TOO_MANY && seen.insert(next.clone())));
        }
    }
    could.into_iter().collect()
}

fn could_give(
    config: &Config,
    process: usize,
    op: &Op,
    could: &mut BTreeSet<String>,
) -> Option<Config> {
    let mut next = config.clone();
    match next.state.step(op, found(config.slots[process])?) {
        Stepped::Found(node) => {
            next.slots[process] = Slot::Found(node);
            next.tidy();
            Some(next)
        }
        Stepped::Ended(expected) => {
            could.insert(next.state.told(&expected));
            None
        }
    }
}
