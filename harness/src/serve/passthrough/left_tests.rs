// SPDX-License-Identifier: GPL-2.0
//! What a change must not leave behind: an outcome that nobody asks for, a file that nobody can use.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;
use rust_fuse_notify::std::adopt::Recover;
use rust_fuse_notify::std::message::Report;
use rust_fuse_notify::std::state::{Config, State};

use super::crash_cases::finish;
use super::crash_tests::{instance, instance_of, lay_out, possible, s, tree, ID, ME};
use super::make::Thing;
use super::nodes::ROOT;
use super::recover::Recovery;

fn laid_out() -> (tempfile::TempDir, OwnedFd) {
    let dir = tempfile::tempdir().unwrap();
    lay_out(dir.path());
    (dir, State::create_memfd().unwrap())
}

/// What cannot be told of (a table is full) is an error, and leaves no outcome that nobody will ask for.
#[test]
fn what_there_is_no_room_for_leaves_nothing_in_the_journal() {
    if !possible() {
        return;
    }
    let (dir, memfd) = laid_out();
    let config = Config {
        nodes: 4,
        handles: 2,
        ..Config::default()
    };
    let server = instance_of(dir.path(), &memfd, true, &config);
    let one = server.lookup(ROOT, s("one")).unwrap().nodeid;
    server.lookup(ROOT, s("two")).unwrap();
    let full = Err(Errno::ENOMEM);
    let thing = Thing::Dir { mode: 0o755 };
    assert_eq!(
        server.make(ID, ME, (ROOT, s("d")), 0, &thing).map(finish),
        full
    );
    let flags = libc::O_CREAT | libc::O_RDWR;
    let create = |unique, name| {
        let created = server.create(unique, ME, (ROOT, s(name)), (0o640, 0), flags);
        created.map(finish)
    };
    assert_eq!(create(ID + 2, "f"), full);
    assert!(server.state.journal().is_empty());
    // The names are shown all the same.
    let dir_of_root = server.open_dir(ID + 4, ROOT).unwrap();
    let (_, counted) = server.read_dir_plus(ROOT, dir_of_root, 0).unwrap();
    assert_eq!(counted.len(), 3, "one, and two by both of its names");
    server.take_back(&counted);
    server.close(dir_of_root);
    // There is room for an inode again, and none for a handle.
    server.forget(one, 1);
    for n in 0..2 {
        server.open_dir(ID + 6 + n * 2, ROOT).unwrap();
    }
    assert_eq!(create(ID + 10, "g"), Err(Errno::ENFILE));
    assert!(server.state.journal().is_empty());
}

/// The server died in an OPEN, and its application was killed: no answer of it can come, so nothing is kept for it.
#[test]
fn a_file_without_a_name_is_not_kept_for_a_handle_that_nobody_has() {
    if !possible() {
        return;
    }
    let (dir, memfd) = laid_out();
    let server = instance(dir.path(), &memfd);
    let one = server.lookup(ROOT, s("one")).unwrap().nodeid;
    let two = server.lookup(ROOT, s("two")).unwrap().nodeid;
    server
        .remove(ID, (ROOT, s("one")), false)
        .map(finish)
        .unwrap();
    for (unique, nodeid) in [(ID + 2, one), (ID + 4, two)] {
        server.open(unique, nodeid, libc::O_RDONLY).unwrap();
    }
    drop(server);
    let server = Arc::new(instance(dir.path(), &memfd));
    let state = server.state.clone();
    // The kernel has shown neither.
    let mut recovery = Recovery::new(server.clone());
    let report = Report {
        cookie: 1 << 62,
        epoch: 1,
        replayed: 1,
        confirmed: 1,
        revoked: 0,
        held: 0,
        lowest_owed: None,
        hold_ns: 0,
        root_ns: 0,
        replay_ns: 0,
        settle_ns: 0,
    };
    recovery.finish(&state, Some(&report)).unwrap();
    assert!(state.nodes().get(one).is_none() && !server.yard.contains(one));
    assert!(tree(dir.path()).contains(&"0 graves".to_owned()));
    // It has a name: an answer to CREATE that came late may be in use.
    assert!(state.nodes().get(two).is_some());
    assert_eq!(state.handles().len(), 1);
}
