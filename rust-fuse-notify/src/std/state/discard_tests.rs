// SPDX-License-Identifier: GPL-2.0
//! Going on without a state: what stays, what is said of owed requests, and a death in between.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use zerocopy::IntoBytes;

use super::crash_tests::spawn;
use super::header::{Layout, ANSWERED_AT, REPLY_AT, REPLY_LEN_AT, REPLY_MAX};
use super::tests::{node, open, IDENTITY, SMALL};
use super::*;
use crate::std::wire::{InitOut, OutHeader, FUSE_INIT_EXT, FUSE_RESTARTABLE, FUSE_UNIQUE_RESEND};

/// The reply of a session that signed the contract for `identity`.
fn reply(identity: Identity) -> Vec<u8> {
    let out = InitOut {
        major: 7,
        minor: 40,
        flags: FUSE_INIT_EXT as u32,
        flags2: (FUSE_RESTARTABLE >> 32) as u32,
        identity: identity.0,
        ..InitOut::default()
    };
    let header = OutHeader {
        len: (size_of::<OutHeader>() + size_of::<InitOut>()) as u32,
        error: 0,
        unique: 2,
    };
    [header.as_bytes(), out.as_bytes()].concat()
}

/// A state that served, with an entry in each table.
fn served() -> OwnedFd {
    let fd = State::create_memfd().unwrap();
    let state = open(&fd).unwrap();
    state.nodes().set_root(&node(0));
    let nodeid = state.nodes().lookup(&node(5)).unwrap().nodeid;
    let new = NewHandle {
        nodeid,
        flags: 2,
        kind: HandleKind::File,
        opener: 44,
        aux: [0; 2],
    };
    state.handles().insert(&new).unwrap();
    drop(state.journal().begin(50, &Intent::default()).unwrap());
    assert!(state.init().set_reply(&reply(IDENTITY)));
    state.init().set_answered();
    drop(state);
    fd
}

fn store(fd: &OwnedFd, at: usize, bytes: &[u8]) {
    let file = File::from(fd.try_clone().unwrap());
    file.write_all_at(bytes, at as u64).unwrap();
}

fn discard(fd: &OwnedFd) -> Result<State, StateError> {
    State::discard(fd.try_clone().unwrap(), IDENTITY, &SMALL)
}

fn load(fd: &OwnedFd, at: usize) -> u64 {
    let mut bytes = [0; 8];
    let file = File::from(fd.try_clone().unwrap());
    file.read_exact_at(&mut bytes, at as u64).unwrap();
    u64::from_ne_bytes(bytes)
}

#[test]
fn what_cannot_be_used_is_discarded_and_the_handshake_stays() {
    let layout = Layout::of(&SMALL).unwrap();
    for (what, at, bytes) in [
        ("damaged", layout.journal, &[3; 8][..]),
        ("its layout", 16, &[9]),
        ("its revision", 20, &[7]),
        ("other capacities", 40, &[0xff; 4]),
    ] {
        let fd = served();
        let stamp = load(&fd, header::STAMP_AT);
        store(&fd, at, bytes);
        let refused = open(&fd).expect_err(what);
        assert!(refused.is_discardable(), "{what}: {refused}");
        assert!(refused.to_string().contains("unmount"), "{refused}");
        let state = discard(&fd).unwrap();
        assert_eq!(state.init().reply(), Some(reply(IDENTITY)));
        assert!(state.init().is_answered() && !state.is_fresh());
        assert!(state.nodes().is_empty() && state.handles().is_empty());
        assert!(state.journal().is_empty());
        // No number that the kernel may hold is given to another file.
        state.nodes().set_root(&node(0));
        let new = state.nodes().lookup(&node(6)).unwrap().nodeid;
        assert!(new >> 32 > stamp, "{new:#x}");
        drop(state);
        assert!(open(&fd).is_ok());
    }
}

#[test]
fn owed_requests_are_lost_and_later_ones_are_not() {
    const RESENT: u64 = FUSE_UNIQUE_RESEND | 3 << 48;
    let fd = served();
    let lost = Some(Recorded::Outcome(Err(libc::EIO)));
    let state = discard(&fd).unwrap();
    let journal = state.journal();
    assert_eq!(journal.lookup(RESENT | 50), lost);
    assert_eq!(journal.lookup(RESENT | 5000), lost, "no replay came yet");
    assert!(journal.resume(RESENT | 50).is_none());
    state.saw_replay(FUSE_UNIQUE_RESEND | 4 << 48 | 1000);
    state.saw_replay(FUSE_UNIQUE_RESEND | 4 << 48 | 1002);
    assert_eq!(state.discarded_below(), 1000);
    drop(state);
    // The next instance knows as well, and what was begun since is in the journal.
    let state = open(&fd).unwrap();
    let journal = state.journal();
    assert_eq!(journal.lookup(RESENT | 998), lost);
    assert_eq!(journal.lookup(RESENT | 1002), None);
    let mut slot = journal.begin(40, &Intent::default()).unwrap();
    slot.outcome(&Ok(Success::default())).unwrap();
    drop(slot);
    assert_ne!(journal.lookup(RESENT | 40), lost);
    state.saw_replay(2000);
    assert_eq!(state.discarded_below(), 1000, "once is enough");
}

/// A kernel that only sends again shows no replay, and the next crash must not cost more than this one.
#[test]
fn without_a_replay_the_first_new_request_tells_which_are_lost() {
    const RESENT: u64 = FUSE_UNIQUE_RESEND;
    for enter in [true, false] {
        let fd = served();
        let state = discard(&fd).unwrap();
        let lost = Some(Recorded::Outcome(Err(libc::EIO)));
        assert_eq!(state.journal().lookup(RESENT | 60), lost);
        match enter {
            true => drop(state.journal().begin(100, &Intent::default()).unwrap()),
            false => assert_eq!(state.journal().lookup(100), None, "nobody had read it"),
        }
        drop(state);
        let state = open(&fd).unwrap();
        assert_eq!(state.journal().lookup(RESENT | 98), lost);
        assert_eq!(state.journal().lookup(RESENT | 102), None, "{enter}");
    }
}

#[test]
fn what_has_no_handshake_or_belongs_to_another_is_not_touched() {
    let nothing = State::create_memfd().unwrap();
    assert!(matches!(discard(&nothing), Err(StateError::NoHandshake(_))));
    let foreign = served();
    store(&foreign, 0, b"something");
    let refused = open(&foreign).unwrap_err();
    assert!(refused.is_discardable(), "{refused}");
    let error = discard(&foreign).unwrap_err();
    assert!(matches!(error, StateError::NoHandshake(_)), "{error}");
    assert_eq!(load(&foreign, 0), u64::from_ne_bytes(*b"somethin"));
    let endless = served();
    store(
        &endless,
        REPLY_LEN_AT,
        &(REPLY_MAX as u64 + 1).to_ne_bytes(),
    );
    assert!(matches!(discard(&endless), Err(StateError::NoHandshake(_))));

    let other = served();
    store(&other, REPLY_AT, &reply(Identity([1, 1])));
    let refused = discard(&other).unwrap_err();
    assert!(matches!(refused, StateError::WrongIdentity { .. }));
    assert!(!refused.is_discardable());
    let state = open(&other).unwrap();
    assert_eq!(state.nodes().len(), 2, "it was changed");
}

#[test]
fn before_the_kernel_was_answered_nothing_is_owed() {
    let fd = served();
    store(&fd, ANSWERED_AT, &[0; 8]);
    let state = discard(&fd).unwrap();
    assert_eq!(state.discarded_below(), 0);
    assert!(state.is_fresh());
}

#[test]
fn a_file_of_another_size_is_laid_out_anew() {
    for config in [
        Config {
            nodes: 4096,
            handles: 4,
            journal: 2,
            arena_pages: 0,
        },
        Config {
            nodes: 16,
            handles: 2,
            journal: 2,
            arena_pages: 0,
        },
    ] {
        let fd = State::create_memfd().unwrap();
        let state = State::open(fd.try_clone().unwrap(), IDENTITY, &config).unwrap();
        assert!(state.init().set_reply(&reply(IDENTITY)));
        state.init().set_answered();
        drop(state);
        store(&fd, 16, &[9]);
        let big = Config {
            nodes: 1 << 20,
            handles: 1 << 10,
            journal: 64,
            arena_pages: 0,
        };
        let state = State::discard(fd.try_clone().unwrap(), IDENTITY, &big).unwrap();
        state.nodes().set_root(&node(0));
        for n in 1..8 {
            state.nodes().lookup(&node(n)).unwrap();
        }
        drop(state);
        assert_eq!(open(&fd).unwrap().nodes().len(), 8);
    }
}

#[test]
fn a_death_while_discarding_is_finished_by_the_next_one() {
    use nix::sys::wait::{waitpid, WaitStatus};
    for stores in 0.. {
        let fd = served();
        store(&fd, 16, &[9]);
        let child = spawn(stores, || drop(discard(&fd).unwrap()));
        let ended = match waitpid(child, None).unwrap() {
            WaitStatus::Signaled(..) => false,
            WaitStatus::Exited(_, 0) => true,
            other => panic!("{other:?} after {stores} stores"),
        };
        let state = match open(&fd) {
            Ok(state) => state,
            Err(error) if stores == 0 => {
                assert!(error.is_discardable(), "{error}");
                continue;
            }
            Err(error) => panic!("after {stores} stores: {error}"),
        };
        assert_eq!(state.init().reply(), Some(reply(IDENTITY)), "{stores}");
        assert_eq!(state.discarded_below(), u64::MAX, "{stores}");
        assert!(state.journal().is_empty() && state.nodes().is_empty());
        if ended {
            assert!(stores > 500, "{stores}");
            return;
        }
    }
}
