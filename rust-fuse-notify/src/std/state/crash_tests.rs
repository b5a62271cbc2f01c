// SPDX-License-Identifier: GPL-2.0
//! A child kills itself before each single store of a script; the parent opens what is left, which must be what the
//! script makes of the operations that were completed, with or without the one in progress.

use std::fmt::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI64, Ordering};

use nix::sys::signal::Signal;
use nix::sys::socket::{send, socketpair, AddressFamily, MsgFlags, SockFlag, SockType};
use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::{ForkResult, Pid};

use super::tests::{node, open};
use super::*;
use crate::std::wire::{InHeader, FUSE_INIT};
use zerocopy::IntoBytes;

/// Stores until this process kills itself; negative: never.
static LEFT: AtomicI64 = AtomicI64::new(-1);

/// Called before every store, and after those that publish.
pub(super) fn step() {
    if LEFT.load(Ordering::Relaxed) < 0 {
        return;
    }
    if LEFT.fetch_sub(1, Ordering::Relaxed) == 0 {
        // SAFETY: no memory is touched.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
}

/// One call of the interface. Files are numbered; nodeids and handles come out the same in every run.
#[derive(Clone, Copy, Debug)]
enum Op {
    Root,
    Lookup(u64),
    Forget(u64),
    Remove(u64),
    Bury(u64),
    Open(u64),
    Close(usize),
    Begin(u64),
    Outcome(u64),
    Record(u64),
    Done(u64),
    DropBelow(u64),
    ReadInit,
    Reply,
    Answered,
}

/// What may be found when the operation was in progress, apart from before and after.
fn halfway(op: Op) -> Option<Op> {
    match op {
        // In the script below the fifth entry has no room: the lowest outcome goes first.
        Op::Begin(14) => Some(Op::DropBelow(11)),
        // Two go, one after the other.
        Op::DropBelow(14) => Some(Op::DropBelow(13)),
        _ => None,
    }
}

const SCRIPT: &[Op] = {
    use Op::*;
    &[
        ReadInit,
        Root,
        Reply,
        Answered,
        Lookup(5),
        Lookup(6),
        Lookup(5),
        Open(5),
        Forget(6),
        Remove(6),
        Lookup(7),
        Open(7),
        Close(0),
        Bury(7),
        Open(5),
        Begin(10),
        Outcome(10),
        Begin(11),
        Begin(12),
        Outcome(12),
        Begin(13),
        Begin(14),
        Outcome(11),
        Done(11),
        Outcome(14),
        Begin(15),
        Outcome(13),
        DropBelow(14),
        Forget(7),
        Remove(7),
        Lookup(8),
        Record(16),
    ]
};

fn nodeid(state: &State, which: u64) -> u64 {
    state.nodes().find(0, &node(which).handle).unwrap().nodeid
}

fn apply(state: &State, device: &OwnedFd, op: Op) {
    let before = [9; 16];
    let intent = Intent {
        opcode: 9,
        nodeids: [1, 2],
        names: [b"from", b"to"],
        args: [3; 4],
        before: &before,
    };
    match op {
        Op::Root => state.nodes().set_root(&node(0)),
        Op::Lookup(which) => drop(state.nodes().lookup(&node(which)).unwrap()),
        Op::Forget(which) => drop(state.nodes().forget(nodeid(state, which), 1)),
        Op::Remove(which) => assert!(state.nodes().remove(nodeid(state, which))),
        Op::Bury(which) => {
            assert!(state.nodes().set_flags(
                nodeid(state, which),
                NodeFlags::GRAVEYARD,
                NodeFlags::NONE
            ));
        }
        Op::Open(which) => {
            let nodeid = nodeid(state, which);
            let new = NewHandle {
                nodeid,
                flags: 2,
                kind: HandleKind::File,
                opener: 9,
                aux: [5, 6],
            };
            state.handles().insert(&new).unwrap();
        }
        Op::Close(nth) => {
            let mut fhs = Vec::new();
            state.handles().for_each(|handle| fhs.push(handle.fh));
            state.handles().remove(fhs[nth]).unwrap();
        }
        Op::Begin(id) => drop(state.journal().begin(id, &intent).unwrap()),
        Op::Outcome(id) => {
            let success = Success {
                nodeid: id,
                fh: 3,
                payload: b"payload".to_vec(),
            };
            let outcome = if id == 14 {
                Err(libc::EEXIST)
            } else {
                Ok(success)
            };
            state
                .journal()
                .resume(id)
                .unwrap()
                .outcome(&outcome)
                .unwrap();
        }
        Op::Record(id) => drop(state.journal().record(id, &Err(libc::EIO)).unwrap()),
        Op::Done(id) => state.journal().resume(id).unwrap().done(),
        Op::DropBelow(id) => drop(state.journal().drop_below(Some(id))),
        Op::ReadInit => drop(state.init().read_request(device.as_fd()).unwrap()),
        Op::Reply => assert!(state
            .init()
            .set_reply(b"a reply that is longer than a word")),
        Op::Answered => state.init().set_answered(),
    }
}

fn snapshot(state: &State) -> String {
    let mut text = String::new();
    state
        .nodes()
        .for_each(|node| writeln!(text, "{node:?}").unwrap());
    state
        .handles()
        .for_each(|handle| writeln!(text, "{handle:?}").unwrap());
    for id in 0..100 {
        if let Some(recorded) = state.journal().lookup(id) {
            writeln!(text, "{id} {recorded:?}").unwrap();
        }
    }
    let init = state.init();
    writeln!(
        text,
        "{:?} {:?} {}",
        init.request(),
        init.reply(),
        init.is_answered()
    )
    .unwrap();
    text
}

/// A memfd and a device with INIT in its queue.
fn fresh() -> (OwnedFd, OwnedFd, OwnedFd) {
    let (device, far) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    let header = InHeader {
        len: 104,
        opcode: FUSE_INIT,
        unique: 2,
        ..InHeader::default()
    };
    send(
        far.as_raw_fd(),
        &[header.as_bytes(), &[1; 64]].concat(),
        MsgFlags::empty(),
    )
    .unwrap();
    (State::create_memfd().unwrap(), device, far)
}

fn after(script: &[Op]) -> String {
    let (memfd, device, _far) = fresh();
    let state = open(&memfd).unwrap();
    for op in script {
        apply(&state, &device, *op);
    }
    snapshot(&state)
}

/// Runs `child` in a process that kills itself before store number `stores`; gives back how many bytes it wrote to
/// its pipe, and whether it came to its end.
fn killed_at(stores: i64, child: impl FnOnce(&OwnedFd)) -> (usize, bool) {
    let (progress, report) = nix::unistd::pipe().unwrap();
    let child = spawn(stores, || child(&report));
    drop(report);
    let status = waitpid(child, None).unwrap();
    let mut bytes = [0; 4096];
    let done = nix::unistd::read(&progress, &mut bytes).unwrap();
    match status {
        WaitStatus::Signaled(_, Signal::SIGKILL, _) => (done, false),
        WaitStatus::Exited(_, 0) => (done, true),
        other => panic!("the child ended with {other:?} after {done} operations, {stores} stores"),
    }
}

/// A process that kills itself before store number `stores` (negative: never); exits with 1 if `child` panics.
pub(crate) fn spawn(stores: i64, child: impl FnOnce()) -> Pid {
    // SAFETY: the child allocates, which glibc allows after a fork, and takes no lock of the test harness.
    match unsafe { nix::unistd::fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            LEFT.store(stores, Ordering::Relaxed);
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
            // SAFETY: ends the child without running anything of the test harness.
            unsafe { libc::_exit(i32::from(ended.is_err())) }
        }
    }
}

#[test]
fn every_store_of_every_operation() {
    let snapshots: Vec<String> = (0..=SCRIPT.len()).map(|n| after(&SCRIPT[..n])).collect();
    let mut in_progress = vec![0_u32; SCRIPT.len()];
    for stores in 0.. {
        let (memfd, device, _far) = fresh();
        let (done, ended) = killed_at(stores, |report| {
            let state = open(&memfd).unwrap();
            for op in SCRIPT {
                apply(&state, &device, *op);
                nix::unistd::write(report, b".").unwrap();
            }
        });
        let state = open(&memfd)
            .unwrap_or_else(|error| panic!("after {stores} stores, {done} operations: {error}"));
        let found = snapshot(&state);
        if ended {
            assert_eq!(found, snapshots[SCRIPT.len()]);
            // Otherwise the script was not cut where it was meant to be.
            assert!(
                in_progress.iter().all(|times| *times > 0),
                "never killed in one of {in_progress:?}"
            );
            eprintln!("killed before each of {stores} stores");
            return;
        }
        if let Some(times) = in_progress.get_mut(done) {
            *times += 1;
        }
        let next = (done + 1).min(SCRIPT.len());
        let half = SCRIPT.get(done).and_then(|op| halfway(*op));
        let half = half.map(|half| after(&[&SCRIPT[..done], &[half]].concat()));
        assert!(
            found == snapshots[done] || found == snapshots[next] || Some(&found) == half.as_ref(),
            "killed at store {stores}, in {:?}, found\n{found}\nbefore\n{}\nafter\n{}",
            SCRIPT.get(done),
            snapshots[done],
            snapshots[next],
        );
        // What is given out from here on was never given out before.
        let new = state.nodes().lookup(&node(77)).unwrap().nodeid;
        let given = |snapshot: &String| snapshot.contains(&format!("nodeid: {new},"));
        assert!(!given(&found) && !snapshots[..=done].iter().any(given));
    }
}

#[test]
fn every_store_of_a_settle_and_the_next_one_ends_the_same() {
    let report = Report {
        cookie: 0,
        epoch: 1,
        replayed: 2,
        confirmed: 2,
        revoked: 0,
        held: 0,
        lowest_owed: Some(12),
        hold_ns: 0,
        root_ns: 0,
        replay_ns: 0,
        settle_ns: 0,
    };
    let settle = |state: &State| {
        state.nodes().begin_replay();
        state.nodes().confirm(1, 1);
        state.nodes().confirm(nodeid(state, 5), 40);
        state.settle(&report, |_| Keep::Drop);
    };
    let prepared = || {
        let (memfd, device, _far) = fresh();
        let state = open(&memfd).unwrap();
        for op in SCRIPT {
            apply(&state, &device, *op);
        }
        drop(state);
        memfd
    };
    let undisturbed = {
        let memfd = prepared();
        let state = open(&memfd).unwrap();
        let before = snapshot(&state);
        settle(&state);
        assert_ne!(snapshot(&state), before, "there was nothing to settle");
        snapshot(&state)
    };
    for stores in 0.. {
        let memfd = prepared();
        let (_, ended) = killed_at(stores, |_| settle(&open(&memfd).unwrap()));
        let state = open(&memfd).unwrap();
        settle(&state);
        assert_eq!(snapshot(&state), undisturbed, "killed at store {stores}");
        if ended {
            assert!(stores > 5);
            return;
        }
    }
}
