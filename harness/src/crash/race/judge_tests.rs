// SPDX-License-Identifier: GPL-2.0
//! The judge is judged: by histories that are linearizable because they were made so, by some that are not, and by
//! another judge.

use super::draw;
use super::judge::{judge, Verdict, Violation};
use super::model::{Expected, State, Stepped};
use super::op::{Got, How, Kind, Name, Op, Record};
use super::window;
use crate::raw::wait::Rng;

const X: Name = Name(0);
const Y: Name = Name(1);
const Z: Name = Name(2);

fn record(process: u8, called: u64, returned: u64, op: Op, got: Got) -> Record {
    Record {
        process,
        op,
        called,
        returned,
        got,
    }
}

/// One call after the other, by process 0, each with its result.
fn in_order(calls: &[(Op, Got)]) -> Vec<Record> {
    let stamps = (1..).step_by(2);
    calls
        .iter()
        .zip(stamps)
        .map(|((op, got), at)| record(0, at, at + 1, *op, got.clone()))
        .collect()
}

fn failed(errno: i32) -> Got {
    Got::Failed(errno)
}

fn fine(history: &[Record]) -> bool {
    match judge(history, &[State::empty()]) {
        Verdict::Fine(_) => true,
        Verdict::Not(_) => false,
        Verdict::TooMany => panic!("too many"),
    }
}

fn violation(history: &[Record]) -> Violation {
    match judge(history, &[State::empty()]) {
        Verdict::Not(violation) => violation,
        other => panic!("{other:?}"),
    }
}

/// A result that fits, with a fresh inode number for a file that has none yet.
fn concrete(state: &mut State, expected: Expected, fresh: &mut u64) -> Got {
    let got = match &expected {
        Expected::Exactly(got) => got.clone(),
        Expected::Node(node) => {
            let node = state.known(*node);
            *fresh += 1;
            Got::Node(node.kind, node.ino.unwrap_or(*fresh))
        }
    };
    assert!(state.allows(&expected, &got));
    got
}

/// Executes a workload step by step, whose turn it is being drawn: a history of something that is linearizable.
fn executed(workload: &[Vec<Op>], rng: &mut Rng) -> Vec<Record> {
    enum At {
        Idle,
        Called(u64, Option<u8>),
        Done(u64, Got),
    }
    let mut state = State::empty();
    let (mut clock, mut fresh) = (0, 100);
    let mut next: Vec<usize> = vec![0; workload.len()];
    let mut at: Vec<At> = workload.iter().map(|_| At::Idle).collect();
    let mut history = Vec::new();
    while next.iter().zip(workload).any(|(n, ops)| *n < ops.len()) {
        let process = rng.below(workload.len());
        let Some(op) = workload[process].get(next[process]) else {
            continue;
        };
        clock += 1;
        at[process] = match std::mem::replace(&mut at[process], At::Idle) {
            At::Idle => At::Called(clock, None),
            At::Called(called, found) => match state.step(op, found) {
                Stepped::Found(node) => At::Called(called, Some(node)),
                Stepped::Ended(expected) => {
                    At::Done(called, concrete(&mut state, expected, &mut fresh))
                }
            },
            At::Done(called, got) => {
                history.push(record(process as u8, called, clock, *op, got));
                next[process] += 1;
                At::Idle
            }
        };
    }
    history
}

#[test]
fn what_was_executed_in_some_order_is_fine() {
    let mut largest = 0;
    for seed in 0..25 {
        let mut rng = Rng(seed);
        let workload = draw::workload(seed, 4, 60);
        let history = executed(&workload, &mut rng);
        match judge(&history, &[State::empty()]) {
            Verdict::Fine(fine) => largest = largest.max(fine.most),
            other => panic!("seed {seed}: {other:?}"),
        }
    }
    assert!(largest > 10, "they hardly overlap: {largest}");
}

#[test]
fn calls_that_overlap_may_take_effect_in_any_order() {
    let mut history = vec![
        record(0, 1, 4, Op::Mkdir(X), failed(libc::EEXIST)),
        record(1, 2, 3, Op::Mkdir(X), Got::Done),
    ];
    assert!(fine(&history));
    // But not one that was called when the other had returned.
    history[1].called = 5;
    history[1].returned = 6;
    assert_eq!(violation(&history).at, 0);
}

#[test]
fn a_change_that_took_effect_twice_is_found() {
    // mkdir that its own maker is told EEXIST of.
    let twice = [record(0, 1, 2, Op::Mkdir(X), failed(libc::EEXIST))];
    assert_eq!(violation(&twice).instead, ["0"]);
    // A byte that was appended twice.
    let twice = in_order(&[
        (Op::Mknod(X), Got::Done),
        (Op::Append(X, 7), Got::Done),
        (Op::Read(X), Got::Bytes(vec![7, 7])),
    ]);
    assert_eq!(violation(&twice).instead, ["[7]"]);
    // An exchange that was undone by its repetition.
    let twice = in_order(&[
        (Op::Mkdir(X), Got::Done),
        (Op::Mknod(Y), Got::Done),
        (Op::Rename(X, Y, How::Exchange), Got::Done),
        (Op::Stat(X), Got::Node(Kind::Dir, 7)),
    ]);
    assert_eq!(violation(&twice).instead, ["File"]);
    let twice = in_order(&[
        (Op::Mknod(X), Got::Done),
        (Op::SetNew(X, 3), failed(libc::EEXIST)),
    ]);
    assert_eq!(violation(&twice).at, 1);
}

#[test]
fn a_change_that_was_lost_is_found() {
    let lost = in_order(&[
        (Op::Put(0, 3), Got::Done),
        (Op::Get(0), Got::Bytes(vec![0])),
    ]);
    assert_eq!(violation(&lost).instead, ["[3]"]);
    let lost = in_order(&[
        (Op::Symlink(X, 4), Got::Done),
        (Op::Unlink(X), Got::Done),
        (Op::Readlink(X), Got::Target(4)),
    ]);
    assert_eq!(violation(&lost).instead, ["ENOENT"]);
    let lost = in_order(&[
        (Op::Mkdir(X), Got::Done),
        (Op::List(0), Got::Entries(Vec::new())),
    ]);
    assert_eq!(violation(&lost).instead, ["[a/x Dir]"]);
}

#[test]
fn a_file_stays_the_same_file() {
    let made = |ino| (Op::Create(X), Got::Node(Kind::File, ino));
    let moved = (Op::Rename(X, Z, How::NoReplace), Got::Done);
    let other = (Op::Create(Y), Got::Node(Kind::File, 8));
    let stat = |ino| (Op::Stat(Z), Got::Node(Kind::File, ino));
    assert!(fine(&in_order(&[
        made(7),
        other.clone(),
        moved.clone(),
        stat(7)
    ])));
    // Another one, or the number of another one.
    for ino in [8, 9] {
        let calls = [made(7), other.clone(), moved.clone(), stat(ino)];
        assert_eq!(violation(&in_order(&calls)).at, 3);
    }
    assert!(!fine(&in_order(&[made(8), other])));
}

#[test]
fn a_name_may_go_between_the_two_steps_of_a_call() {
    // The link finds x, which is renamed and made anew; then it makes its name.
    let mut history = vec![
        record(0, 1, 2, Op::Create(X), Got::Node(Kind::File, 7)),
        record(0, 3, 20, Op::Link(X, Z), Got::Done),
        record(1, 4, 5, Op::Rename(X, Y, How::Plain), Got::Done),
        record(1, 6, 7, Op::Stat(Z), failed(libc::ENOENT)),
        record(1, 8, 9, Op::Mkdir(X), Got::Done),
        record(0, 21, 22, Op::Stat(Z), Got::Node(Kind::File, 7)),
    ];
    assert!(fine(&history));
    // Not before it was called, though.
    history[1].called = 10;
    assert!(!fine(&history));
}

#[test]
fn any_start_is_taken_and_the_ends_are_told() {
    let made = in_order(&[(Op::Mkdir(X), Got::Done)]);
    let Verdict::Fine(first) = judge(&made, &[State::empty()]) else {
        panic!("it is fine");
    };
    let again = in_order(&[(Op::Mkdir(X), failed(libc::EEXIST))]);
    assert!(!fine(&again));
    let both = [State::empty(), first.ends[0].clone()];
    assert!(matches!(judge(&again, &both), Verdict::Fine(_)));
}

#[test]
fn a_window_has_what_is_needed_and_little_else() {
    let mut seen = 0;
    for seed in 0..50 {
        let mut rng = Rng(seed);
        let mut history = executed(&draw::workload(seed, 4, 40), &mut rng);
        // A result that may be wrong.
        let at = rng.below(history.len());
        history[at].got = match history[at].got {
            Got::Failed(_) => Got::Done,
            _ => failed(libc::EEXIST),
        };
        let Verdict::Not(violation) = judge(&history, &[State::empty()]) else {
            continue;
        };
        seen += 1;
        let window = window::cut(&history, violation);
        assert!(
            matches!(judge(&window.records, &window.before), Verdict::Not(_)),
            "seed {seed}"
        );
        assert!(window.records.len() < history.len(), "seed {seed}");
        for n in 0..window.records.len() {
            let mut less = window.records.clone();
            let gone = less.remove(n);
            assert!(
                !gone.only_looks() || !matches!(judge(&less, &window.before), Verdict::Not(_)),
                "seed {seed}: nobody needs {gone}"
            );
        }
        assert!(window.told(&[]).contains("not linearizable"));
    }
    assert!(seen > 12, "{seen}");
}

#[test]
fn a_window_is_about_one_thing() {
    // Process 1 does something else all the time, so there is no moment at which no call is under way.
    let mut history = vec![record(1, 1, 100, Op::Put(0, 1), Got::Done)];
    for n in 0..10 {
        let at = 2 + 4 * n;
        history.push(record(0, at, at + 1, Op::Mkdir(Z), Got::Done));
        history.push(record(0, at + 2, at + 3, Op::Rmdir(Z), Got::Done));
    }
    history.push(record(0, 50, 51, Op::Stat(Y), failed(libc::ENOENT)));
    history.push(record(0, 52, 53, Op::Mkdir(X), failed(libc::EEXIST)));
    let violation = violation(&history);
    let window = window::cut(&history, violation);
    assert_eq!(window.records.len(), 1, "{}", window.told(&[]));
    let died = |at, how: &str| (at, how.to_owned());
    let marks = [
        died(3, "long ago"),
        died(9, "an earlier death"),
        died(52, "the server died"),
        died(99, "later"),
    ];
    let told = window.told(&marks);
    assert!(
        told.contains("mkdir a/x = EEXIST; whatever the order, it gives 0"),
        "{told}"
    );
    assert!(told.contains("the server died") && told.contains("an earlier death"));
    assert!(!told.contains("long ago") && !told.contains("later"));
}

/// A call that is one step, for the other judge.
fn one_step(op: &Op) -> bool {
    !matches!(
        op,
        Op::Link(..)
            | Op::SetNew(..)
            | Op::SetOld(..)
            | Op::RemoveXattr(_)
            | Op::GetXattr(_)
            | Op::Append(..)
            | Op::Read(_)
            // Inode numbers are told when somebody asks: not what a sequential object does.
            | Op::Stat(_)
            | Op::Create(_)
    )
}

impl stateright::semantics::SequentialSpec for State {
    type Op = Op;
    type Ret = Got;

    fn invoke(&mut self, op: &Op) -> Got {
        match self.step(op, None) {
            Stepped::Ended(Expected::Exactly(got)) => got,
            _ => panic!("{op} is not one step"),
        }
    }
}

#[test]
fn another_judge_says_the_same() {
    use stateright::semantics::{ConsistencyTester, LinearizabilityTester};
    let mut said = [0, 0];
    for seed in 0..800 {
        let mut rng = Rng(seed);
        let mut workload = draw::workload(seed, 3, 12);
        for ops in &mut workload {
            ops.retain(one_step);
            ops.truncate(4);
        }
        let mut history = executed(&workload, &mut rng);
        if history.is_empty() {
            continue;
        }
        // Somebody's result for another's, or another error.
        if seed % 4 != 0 {
            let (one, two) = (rng.below(history.len()), rng.below(history.len()));
            history[one].got = match seed % 4 {
                1 => history[two].got.clone(),
                2 => failed(libc::EEXIST),
                _ => Got::Done,
            };
        }
        let mut events: Vec<(u64, bool, &Record)> = Vec::new();
        for record in &history {
            events.push((record.called, false, record));
            events.push((record.returned, true, record));
        }
        events.sort_by_key(|(at, ..)| *at);
        let mut other = LinearizabilityTester::new(State::empty());
        for (_, is_return, record) in events {
            match is_return {
                false => other.on_invoke(record.process, record.op).map(drop),
                true => other
                    .on_return(record.process, record.got.clone())
                    .map(drop),
            }
            .unwrap();
        }
        let ours = fine(&history);
        assert_eq!(ours, other.is_consistent(), "seed {seed}: {history:#?}");
        said[usize::from(ours)] += 1;
    }
    assert!(said.iter().all(|times| *times > 100), "{said:?}");
}
