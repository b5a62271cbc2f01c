// SPDX-License-Identifier: GPL-2.0
//! What earlier revisions wrote is read, and what is written is readable by the previous one: the rule of [`super::header`].
//!
//! `fixtures/` holds states as earlier versions of the crate wrote them, one `offset word` a line, in hex. When a
//! release changes the layout, `cargo test -p rust-fuse-notify freeze -- --ignored --nocapture` *before* the change
//! gives the next fixture.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use super::header::DISCARDED_BELOW_AT;
use super::previous::Previous;
use super::tests::{node, IDENTITY};
use super::*;
use crate::std::wire::FUSE_UNIQUE_RESEND;

const CONFIG: Config = Config {
    nodes: 64,
    handles: 16,
    journal: 8,
    arena_pages: 0,
};

/// Uses every table and every kind of entry.
fn fill(state: &State) -> (u64, u64) {
    state.nodes().set_root(&node(0));
    let one = state.nodes().lookup(&node(5)).unwrap().nodeid;
    let gone = state.nodes().lookup(&node(6)).unwrap().nodeid;
    state.nodes().lookup(&node(5)).unwrap();
    state.nodes().forget(gone, 1);
    state.nodes().remove(gone);
    let two = state.nodes().lookup(&node(7)).unwrap().nodeid;
    state
        .nodes()
        .set_flags(two, NodeFlags::GRAVEYARD, NodeFlags::NONE);
    let new = NewHandle {
        nodeid: one,
        flags: 2,
        kind: HandleKind::File,
        opener: 1 << 63 | 44,
        aux: [1, 2],
    };
    state.handles().insert(&new).unwrap();
    let dir = NewHandle {
        kind: HandleKind::Directory,
        opener: 0,
        ..new
    };
    state.handles().insert(&dir).unwrap();
    let intent = Intent {
        opcode: 9,
        nodeids: [one, two],
        names: [b"from", b"to"],
        args: [1, 2, 3, 4],
        before: &[7; 300],
    };
    drop(state.journal().begin(50, &intent).unwrap());
    let mut slot = state.journal().begin(52, &intent).unwrap();
    let success = Success {
        nodeid: two,
        fh: 9,
        payload: vec![3; 128],
    };
    slot.outcome(&Ok(success)).unwrap();
    let mut failed = state.journal().begin(54, &Intent::default()).unwrap();
    failed.outcome(&Err(libc::EEXIST)).unwrap();
    state.journal().begin(56, &intent).unwrap().done();
    assert!(state.init().set_reply(&[0x5a; 80]));
    state.init().set_answered();
    (one, two)
}

#[test]
#[ignore = "writes a fixture to the standard output"]
fn freeze() {
    let fd = State::create_memfd().unwrap();
    let state = State::open(fd.try_clone().unwrap(), IDENTITY, &CONFIG).unwrap();
    fill(&state);
    let file = File::from(fd);
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    println!("size {:x}", bytes.len());
    for (at, word) in bytes.chunks_exact(8).enumerate() {
        let word = u64::from_ne_bytes(word.try_into().unwrap());
        if word != 0 {
            println!("{:x} {word:x}", at * 8);
        }
    }
}

/// What earlier revisions wrote by `freeze`, and below which id they say that nothing is known.
const EARLIER: [(&str, u64); 2] = [
    (include_str!("fixtures/layout-1.0.txt"), 0),
    (include_str!("fixtures/layout-1.1.txt"), 10),
];

/// A memfd with the words of a fixture.
fn fixture(text: &str) -> OwnedFd {
    let file = File::from(State::create_memfd().unwrap());
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (at, word) = line.split_once(' ').unwrap();
        let word = u64::from_str_radix(word, 16).unwrap();
        match at {
            "size" => file.set_len(word).unwrap(),
            at => {
                let at = u64::from_str_radix(at, 16).unwrap();
                file.write_all_at(&word.to_ne_bytes(), at).unwrap();
            }
        }
    }
    file.into()
}

/// What [`fill`] puts into a state, seen through the interface.
fn check(state: &State, discarded_below: u64) {
    let mut nodes = Vec::new();
    state.nodes().for_each(|node| nodes.push(*node));
    let [root, one, two] = nodes[..] else {
        panic!("{nodes:?}");
    };
    assert_eq!((root.nodeid, root.info), (1, node(0)));
    assert_eq!((one.lookups, one.info), (2, node(5)));
    let buried = NewNode {
        flags: NodeFlags::GRAVEYARD,
        ..node(7)
    };
    assert_eq!((two.lookups, two.info), (1, buried));
    let file = state.handles().opened_by(44).unwrap();
    let info = NewHandle {
        nodeid: one.nodeid,
        flags: 2,
        kind: HandleKind::File,
        opener: 44,
        aux: [1, 2],
    };
    assert_eq!(file.info, info);
    let of_node = state.handles().of_node(one.nodeid);
    assert_eq!(of_node.len(), 2);
    assert_eq!(of_node[1].info.kind, HandleKind::Directory);
    let intent = IntentRecord {
        id: 50,
        opcode: 9,
        nodeids: [one.nodeid, two.nodeid],
        names: [b"from".to_vec(), b"to".to_vec()],
        args: [1, 2, 3, 4],
        before: vec![7; 300],
    };
    assert_eq!(state.journal().unresolved(), [intent]);
    let success = Success {
        nodeid: two.nodeid,
        fh: 9,
        payload: vec![3; 128],
    };
    let outcome = |id| state.journal().lookup(FUSE_UNIQUE_RESEND | id);
    assert_eq!(outcome(52), Some(Recorded::Outcome(Ok(success))));
    assert_eq!(outcome(54), Some(Recorded::Outcome(Err(libc::EEXIST))));
    assert_eq!(outcome(56), None);
    assert_eq!(state.journal().len(), 3);
    assert_eq!(state.init().reply(), Some(vec![0x5a; 80]));
    assert!(state.init().is_answered());
    assert_eq!(state.discarded_below(), discarded_below);
    let lost = Some(Recorded::Outcome(Err(libc::EIO)));
    let older = discarded_below.checked_sub(2).map(outcome);
    assert_eq!(older, older.is_some().then_some(lost));
    // What is given out from here on was never given out before.
    let new = state.nodes().lookup(&node(9)).unwrap().nodeid;
    assert!(new >> 32 >= 6, "{new:#x}");
}

#[test]
fn states_of_earlier_revisions_are_read() {
    for (text, discarded_below) in EARLIER {
        let fd = fixture(text);
        let state = State::open(fd.try_clone().unwrap(), IDENTITY, &CONFIG).unwrap();
        assert!(!state.is_fresh());
        check(&state, discarded_below);
        // And written: the operations of this version on it, then read again.
        state.journal().resume(50).unwrap().cancel();
        assert_eq!(state.journal().drop_below(None), 2);
        drop(state.journal().begin(58, &Intent::default()).unwrap());
        drop(state);
        let state = State::open(fd, IDENTITY, &CONFIG).unwrap();
        assert_eq!(state.journal().unresolved()[0].id, 58);
        assert_eq!(state.journal().len(), 1);
        assert_eq!(state.discarded_below(), discarded_below);
    }
}

#[test]
fn this_version_reads_its_own() {
    let fd = State::create_memfd().unwrap();
    let state = State::open(fd.try_clone().unwrap(), IDENTITY, &CONFIG).unwrap();
    fill(&state);
    drop(state);
    check(&State::open(fd, IDENTITY, &CONFIG).unwrap(), 0);
}

#[test]
fn the_previous_version_reads_what_this_one_writes() {
    let fd = State::create_memfd().unwrap();
    let state = State::open(fd.try_clone().unwrap(), IDENTITY, &CONFIG).unwrap();
    fill(&state);
    for (text, discarded_below) in EARLIER {
        state.region.store(DISCARDED_BELOW_AT, discarded_below);
        let ours = Previous::read(&fd).unwrap();
        let theirs = Previous::read(&fixture(text)).unwrap();
        assert_eq!(ours, theirs);
        assert_eq!(theirs.journal.len(), 3, "the reader reads nothing");
        assert_eq!(theirs.discarded_below, discarded_below);
    }
    // Entries that only this version makes are the ones it knows.
    let copied = Success {
        payload: vec![1; 4],
        ..Success::default()
    };
    drop(state.journal().record(60, &Ok(copied)).unwrap());
    assert_eq!(Previous::read(&fd).unwrap().journal[&60].0, 2);
}

#[test]
fn the_previous_version_reads_a_state_that_was_discarded() {
    for (text, _) in EARLIER {
        let fd = fixture(text);
        drop(State::discard(fd.try_clone().unwrap(), IDENTITY, &CONFIG).unwrap());
        let found = Previous::read(&fd).unwrap();
        assert!(found.nodes.is_empty() && found.handles.is_empty() && found.journal.is_empty());
        assert_eq!(found.discarded_below, u64::MAX);
    }
}
