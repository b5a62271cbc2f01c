// SPDX-License-Identifier: GPL-2.0
//! A backing that is found again otherwise than it was left.

use std::os::fd::AsFd;

use rust_fuse_notify::std::state::{Config, State};
use rust_fuse_notify::std::wire::Identity;

use super::backing::Backing;
use super::crash_tests::{instance, lay_out, s};
use super::nodes::ROOT;
use super::wire::duplicate;

/// btrfs, say, has another number each time that it is mounted.
#[test]
fn a_backing_that_was_mounted_again_under_another_number_has_the_same_nodes() {
    let tmp = tempfile::tempdir().unwrap();
    lay_out(tmp.path());
    let memfd = State::create_memfd().unwrap();
    let first = instance(tmp.path(), &memfd);
    let one = first.lookup(ROOT, s("one")).unwrap().nodeid;
    drop(first);

    // As if the table had been made under another number.
    let backing = Backing::open(tmp.path()).unwrap();
    let (identity, number) = (Identity(backing.identity), backing.dev + 1);
    let fd = duplicate(memfd.as_fd()).unwrap();
    let state = State::open(fd, identity, &Config::default()).unwrap();
    for nodeid in [ROOT, one] {
        let mut new = state.nodes().get(nodeid).unwrap().info;
        new.domain = number;
        if nodeid == ROOT {
            state.nodes().set_root(&new);
        } else {
            state.nodes().remove(nodeid);
            assert_ne!(state.nodes().lookup(&new).unwrap().nodeid, 0);
        }
    }
    let moved = state
        .nodes()
        .find(number, &state.nodes().get(ROOT).unwrap().info.handle);
    assert_eq!(moved.map(|root| root.nodeid), Some(ROOT));
    let before = state.nodes().len();
    drop(state);

    let next = instance(tmp.path(), &memfd);
    assert_eq!(next.state.nodes().get(ROOT).unwrap().info.domain, number);
    next.lookup(ROOT, s("one")).unwrap();
    assert_eq!(
        next.state.nodes().len(),
        before,
        "one file got a second nodeid"
    );
}
