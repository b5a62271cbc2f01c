// SPDX-License-Identifier: GPL-2.0
//! The journal: what it evicts, and what it has no room for.

use super::tests::{node, open};
use super::*;
use crate::std::wire::FUSE_UNIQUE_RESEND;

#[test]
fn the_journal_evicts_outcomes_and_never_an_intent() {
    let fd = State::create_memfd().unwrap();
    let state = open(&fd).unwrap();
    let journal = state.journal();
    let unused = state.nodes().lookup(&node(1)).unwrap().nodeid;
    state.nodes().forget(unused, 1);
    let nothing = Intent::default();
    drop(journal.begin(5, &nothing).unwrap());
    for id in [9, 7, 8] {
        let nodeid = if id == 7 { unused } else { 0 };
        let mut slot = journal.begin(id, &nothing).unwrap();
        slot.outcome(&Ok(Success {
            nodeid,
            ..Success::default()
        }))
        .unwrap();
    }
    assert!(state.take_orphans().is_empty());
    let held = journal.begin(20, &nothing).unwrap();
    assert_eq!(journal.lookup(7), None, "the lowest outcome goes first");
    assert_eq!(state.take_orphans()[0].nodeid, unused);
    assert!(journal.lookup(8).is_some() && journal.lookup(9).is_some());
    let resumed = journal.resume(8).unwrap();
    drop(journal.begin(21, &nothing).unwrap());
    assert!(
        journal.lookup(8).is_some(),
        "an outcome that is being answered is not evicted"
    );
    assert_eq!(
        journal.begin(22, &nothing).err(),
        Some(JournalError::Full { capacity: 4 })
    );
    resumed.done();
    assert_eq!(journal.lookup(8), None);
    held.cancel();
    assert!(journal.begin(23, &nothing).is_ok());
    assert_eq!(
        journal.begin(5, &nothing).err(),
        Some(JournalError::Known { id: 5 })
    );
    assert_eq!(
        journal.begin(1 << 63, &nothing).err(),
        Some(JournalError::NoId)
    );
    assert_eq!(
        journal
            .unresolved()
            .iter()
            .map(|intent| intent.id)
            .collect::<Vec<_>>(),
        [5, 21, 23]
    );
}

#[test]
fn the_journal_refuses_what_has_no_room() {
    let fd = State::create_memfd().unwrap();
    let state = open(&fd).unwrap();
    let long = [b'x'; 256];
    let intent = Intent {
        names: [b"", &long],
        ..Intent::default()
    };
    assert!(matches!(
        state.journal().begin(1, &intent),
        Err(JournalError::TooLong { max: 255, .. })
    ));
    let intent = Intent {
        before: &[0; 481],
        ..Intent::default()
    };
    assert!(matches!(
        state.journal().begin(1, &intent),
        Err(JournalError::TooLong { max: 480, .. })
    ));
    let mut slot = state
        .journal()
        .begin(
            1,
            &Intent {
                names: [&long[1..], &long[1..]],
                ..Intent::default()
            },
        )
        .unwrap();
    let big = Ok(Success {
        payload: vec![0; 129],
        ..Success::default()
    });
    assert!(matches!(
        slot.outcome(&big),
        Err(JournalError::TooLong { max: 128, .. })
    ));
    slot.outcome(&Err(libc::EEXIST)).unwrap();
    assert_eq!(slot.outcome(&Err(1)), Err(JournalError::Lost { id: 1 }));
    assert_eq!(
        state.journal().lookup(1),
        Some(Recorded::Outcome(Err(libc::EEXIST)))
    );
}

#[test]
fn what_may_be_owed_is_not_evicted() {
    let fd = State::create_memfd().unwrap();
    let state = open(&fd).unwrap();
    let journal = state.journal();
    let nothing = Intent::default();
    for id in [10, 12, 14, 16] {
        let mut slot = journal.begin(id, &nothing).unwrap();
        slot.outcome(&Ok(Success::default())).unwrap();
    }
    assert_eq!(journal.drop_below(Some(14)), 2);
    drop(journal.begin(20, &nothing).unwrap());
    drop(journal.begin(22, &nothing).unwrap());
    assert_eq!(
        journal.begin(24, &nothing).err(),
        Some(JournalError::Full { capacity: 4 })
    );
    assert!(journal.lookup(14).is_some() && journal.lookup(16).is_some());
    // Answered at last.
    journal.resume(14).unwrap().done();
    assert!(journal.begin(24, &nothing).is_ok());
}

#[test]
fn a_request_that_is_in_the_journal_is_not_begun_twice() {
    let fd = State::create_memfd().unwrap();
    let state = open(&fd).unwrap();
    let journal = state.journal();
    let held = journal.begin(10, &Intent::default()).unwrap();
    let resent = FUSE_UNIQUE_RESEND | 1 << 48 | 10;
    let known = Some(JournalError::Known { id: 10 });
    assert_eq!(journal.begin(resent, &Intent::default()).err(), known);
    assert_eq!(journal.record(resent, &Err(1)).err(), known);
    assert!(journal.resume(resent).is_none(), "another thread has it");
    drop(held);
    assert!(journal.resume(resent).is_some());
}

#[test]
fn an_outcome_without_an_intent() {
    let fd = State::create_memfd().unwrap();
    let state = open(&fd).unwrap();
    let outcome = Ok(Success {
        payload: vec![1, 2, 3, 4],
        ..Success::default()
    });
    drop(state.journal().record(10, &outcome).unwrap());
    let long = Ok(Success {
        payload: vec![0; 129],
        ..Success::default()
    });
    let refused = state.journal().record(12, &long).err();
    assert!(matches!(refused, Some(JournalError::TooLong { .. })));
    drop(state);
    let state = open(&fd).unwrap();
    assert!(state.journal().unresolved().is_empty());
    assert_eq!(state.journal().lookup(10), Some(Recorded::Outcome(outcome)));
    assert_eq!(state.journal().lookup(12), None);
}

#[test]
fn a_thread_keeps_to_its_slot() {
    let fd = State::create_memfd().unwrap();
    let config = Config {
        journal: 1024,
        ..super::tests::SMALL
    };
    let state = State::open(fd, super::tests::IDENTITY, &config).unwrap();
    let journal = state.journal();
    std::thread::scope(|scope| {
        for worker in 0..3_u64 {
            scope.spawn(move || {
                let mut slots = std::collections::HashSet::new();
                for n in 1..=1000 {
                    let id = worker << 32 | n;
                    let slot = journal.begin(id, &Intent::default()).unwrap();
                    slots.insert(
                        format!("{slot:?}")
                            .rsplit("slot: ")
                            .next()
                            .unwrap()
                            .to_owned(),
                    );
                    slot.done();
                }
                assert_eq!(slots.len(), 1, "{slots:?}");
            });
        }
    });
    assert!(journal.is_empty());
}

#[test]
fn the_journal_has_its_memory_from_the_start() {
    let fd = State::create_memfd().unwrap();
    let config = Config {
        journal: 512,
        ..super::tests::SMALL
    };
    let _state = State::open(fd.try_clone().unwrap(), super::tests::IDENTITY, &config).unwrap();
    let blocks = nix::sys::stat::fstat(&fd).unwrap().st_blocks as usize * 512;
    assert!(blocks >= 512 * journal::SLOT_LEN, "{blocks}");
}

#[test]
#[ignore = "a measurement"]
fn measure() {
    let fd = State::create_memfd().unwrap();
    let state = State::open(fd, super::tests::IDENTITY, &Config::default()).unwrap();
    let journal = state.journal();
    let intent = Intent {
        opcode: 45,
        names: [b"a-name-of-some-length", b"another-name"],
        before: &[7; 80],
        ..Intent::default()
    };
    const EACH: u64 = 1_000_000;
    for threads in [1, 2, 4] {
        let began = std::time::Instant::now();
        std::thread::scope(|scope| {
            for thread in 0..threads {
                scope.spawn(move || {
                    for n in 1..=EACH {
                        let mut slot = journal.begin(thread << 32 | n, &intent).unwrap();
                        slot.outcome(&Ok(Success::default())).unwrap();
                        slot.done();
                    }
                });
            }
        });
        let ns = began.elapsed().as_nanos() as u64 / EACH;
        println!("{threads} threads: {ns} ns for intent, outcome and end");
    }
}
