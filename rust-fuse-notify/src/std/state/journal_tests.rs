// SPDX-License-Identifier: GPL-2.0
//! The journal: what it evicts, and what it has no room for.

use super::tests::{node, open};
use super::*;

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
