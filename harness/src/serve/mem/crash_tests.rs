// SPDX-License-Identifier: GPL-2.0
//! Each change, each single store at which the server may die in it, one or two restarts, then the resent request: the
//! tree must be the one that comes out without a crash, and nothing of the arena may be lost.

use std::os::fd::OwnedFd;

use rust_fuse_notify::std::state::State;
use rust_fuse_notify::std::wire::FUSE_UNIQUE_RESEND;

use crate::crash_points::{die_at, points_of};

use super::attr::Attributes;
use super::inode::Time;
use super::make::New;
use super::once::Opcode;
use super::store::Res;
use super::tests::{dir, file, finish, instance, left, make, names, s, ME, ROOT};
use super::tree::Tree;

const ID: u64 = 42;
const RESENT: u64 = ID | FUSE_UNIQUE_RESEND | (3 << 48);

struct Case {
    name: &'static str,
    act: fn(&Tree, u64) -> Res<()>,
    /// One change, so whole or not there also when nobody asks again.
    whole: bool,
}

const fn whole(name: &'static str, act: fn(&Tree, u64) -> Res<()>) -> Case {
    Case {
        name,
        act,
        whole: true,
    }
}

const fn in_parts(name: &'static str, act: fn(&Tree, u64) -> Res<()>) -> Case {
    Case {
        name,
        act,
        whole: false,
    }
}

/// The nodeid of what [`lay_out`] made; counts nothing.
fn node(tree: &Tree, name: &str) -> u64 {
    let index = tree.reading();
    tree.find(&index, ROOT, name.as_bytes()).unwrap().child
}

fn rename(tree: &Tree, unique: u64, from: &str, to: &str, flags: u32) -> Res<()> {
    let (from, to) = ((ROOT, s(from)), (ROOT, s(to)));
    finish(tree.rename(unique, ME, from, to, flags))
}

const CASES: &[Case] = &[
    whole("mkdir", |tree, unique| {
        make(tree, unique, ROOT, "new", libc::S_IFDIR | 0o750).map(drop)
    }),
    whole("mknod", |tree, unique| {
        make(tree, unique, ROOT, "new", libc::S_IFIFO | 0o640).map(drop)
    }),
    whole("symlink", |tree, unique| {
        let new = New {
            opcode: Opcode::Symlink,
            mode: libc::S_IFLNK | 0o777,
            rdev: 0,
            target: b"somewhere else",
        };
        finish(tree.make(unique, ME, (ROOT, s("new")), &new)).map(drop)
    }),
    whole("create", |tree, unique| {
        let at = (ROOT, s("new"));
        finish(tree.create(unique, ME, at, 0o600, libc::O_EXCL)).map(drop)
    }),
    whole("link", |tree, unique| {
        finish(tree.link(unique, node(tree, "one"), (ROOT, s("new")))).map(drop)
    }),
    whole("unlink", |tree, unique| {
        finish(tree.remove(unique, (ROOT, s("one")), false))
    }),
    whole("unlink one of two", |tree, unique| {
        finish(tree.remove(unique, (ROOT, s("two")), false))
    }),
    whole("rmdir", |tree, unique| {
        finish(tree.remove(unique, (ROOT, s("empty")), true))
    }),
    whole("rename", |tree, unique| {
        rename(tree, unique, "one", "new", 0)
    }),
    whole("rename, NOREPLACE", |tree, unique| {
        rename(tree, unique, "one", "new", libc::RENAME_NOREPLACE)
    }),
    whole("rename over a file", |tree, unique| {
        rename(tree, unique, "one", "two", 0)
    }),
    whole("rename over the last name", |tree, unique| {
        rename(tree, unique, "two", "one", 0)
    }),
    whole("rename over a directory", |tree, unique| {
        rename(tree, unique, "full", "empty", 0)
    }),
    whole("rename, EXCHANGE", |tree, unique| {
        rename(tree, unique, "one", "full", libc::RENAME_EXCHANGE)
    }),
    whole("rename, WHITEOUT", |tree, unique| {
        rename(tree, unique, "one", "new", libc::RENAME_WHITEOUT)
    }),
    whole("rename over a file, WHITEOUT", |tree, unique| {
        rename(tree, unique, "two", "one", libc::RENAME_WHITEOUT)
    }),
    whole("rename of a directory into another", |tree, unique| {
        let (from, to) = ((ROOT, s("empty")), (node(tree, "full"), s("moved")));
        finish(tree.rename(unique, ME, from, to, 0))
    }),
    whole("exchange between directories", |tree, unique| {
        let (from, to) = ((ROOT, s("empty")), (node(tree, "full"), s("inner")));
        finish(tree.rename(unique, ME, from, to, libc::RENAME_EXCHANGE))
    }),
    whole("setxattr, CREATE", |tree, unique| {
        let one = node(tree, "one");
        finish(tree.set_xattr(unique, one, s("user.new"), b"value", libc::XATTR_CREATE))
    }),
    whole("setxattr, REPLACE", |tree, unique| {
        let one = node(tree, "one");
        finish(tree.set_xattr(unique, one, s("user.old"), b"newer", libc::XATTR_REPLACE))
    }),
    whole("removexattr", |tree, unique| {
        finish(tree.remove_xattr(unique, node(tree, "one"), s("user.old")))
    }),
    whole("setattr", |tree, _| {
        let time = Time { secs: -7, nanos: 9 };
        let new = Attributes {
            mode: Some(0o4711),
            uid: Some(3),
            gid: Some(4),
            size: None,
            atime: Some(time),
            mtime: Some(time),
        };
        tree.set_attr(node(tree, "one"), &new).map(drop)
    }),
    whole("truncate", |tree, _| truncate(tree, 3)),
    whole("truncate to a larger size", |tree, _| truncate(tree, 9000)),
    in_parts("write", |tree, _| {
        tree.write(node(tree, "one"), 3, b"written over").map(drop)
    }),
    in_parts("write behind the end", |tree, _| {
        tree.write(node(tree, "one"), 4090, b"over two blocks")
            .map(drop)
    }),
    in_parts("write far behind the end", |tree, _| {
        tree.write(node(tree, "one"), 600 * 4096 + 5, b"a tree of blocks")
            .map(drop)
    }),
    in_parts("punch", |tree, _| {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        tree.allocate(node(tree, "large"), 100, 3 * 4096, mode)
    }),
    in_parts("fallocate", |tree, _| {
        tree.allocate(node(tree, "one"), 5000, 5000, 0)
    }),
];

fn truncate(tree: &Tree, size: u64) -> Res<()> {
    let new = Attributes {
        size: Some(size),
        ..Attributes::default()
    };
    tree.set_attr(node(tree, "one"), &new).map(drop)
}

fn lay_out(tree: &Tree) {
    let one = file(tree, 2, ROOT, "one");
    tree.write(one, 0, b"content of one").unwrap();
    finish(tree.set_xattr(4, one, s("user.old"), b"old", 0)).unwrap();
    let two = file(tree, 6, ROOT, "two");
    tree.write(two, 0, b"content of two").unwrap();
    finish(tree.link(8, two, (ROOT, s("two-too")))).unwrap();
    dir(tree, 10, ROOT, "empty");
    let full = dir(tree, 12, ROOT, "full");
    file(tree, 14, full, "inner");
    let large = file(tree, 16, ROOT, "large");
    tree.write(large, 0, &[b'l'; 4 * 4096]).unwrap();
}

/// Everything but times that are now and numbers that are given out.
fn show(tree: &Tree, dir: u64, path: &str, lines: &mut Vec<String>) {
    for (_, name) in names(tree, dir, 2) {
        let index = tree.reading();
        let nodeid = tree.find(&index, dir, name.as_bytes()).unwrap().child;
        drop(index);
        let inode = tree.attr(nodeid).unwrap();
        let end = inode.size.max(40_000) - 40_000;
        let data = [0, end]
            .map(|at| tree.read(nodeid, at, 40_000).unwrap())
            .concat();
        let content: Vec<_> = data.iter().enumerate().filter(|(_, b)| **b != 0).collect();
        let xattrs = tree.list_xattrs(nodeid).unwrap();
        let values: Vec<_> = xattrs
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty())
            .map(|name| tree.get_xattr(nodeid, s(std::str::from_utf8(name).unwrap())))
            .collect();
        let set = inode
            .times
            .map(|time| if time.secs < 0 { time.secs } else { 0 });
        let (mode, nlink, size, owner) =
            (inode.mode, inode.nlink, inode.size, (inode.uid, inode.gid));
        lines.push(format!(
            "{path}/{name} {mode:o} {nlink} {owner:?} {size} {content:?} {xattrs:?} {values:?} {set:?}"
        ));
        if inode.is_dir() {
            show(tree, nodeid, &format!("{path}/{name}"), lines);
        }
    }
}

/// What a recovery leaves in which the kernel shows nothing but the root; what is free is part of it.
fn result(memfd: &OwnedFd, tree: Tree) -> String {
    tree.settle();
    let mut lines = Vec::new();
    show(&tree, ROOT, "", &mut lines);
    lines.sort();
    let root = tree.attr(ROOT).unwrap().nlink;
    let free = left(&tree);
    drop(tree);
    assert_eq!(left(&instance(memfd)), free, "what is free is found again");
    format!("{}\nroot {root}, free {free:?}", lines.join("\n"))
}

fn undisturbed(case: &Case, act: bool) -> (String, Vec<&'static str>) {
    let memfd = State::create_memfd().unwrap();
    let tree = instance(&memfd);
    lay_out(&tree);
    let (points, done) = points_of(|| if act { (case.act)(&tree, ID) } else { Ok(()) });
    done.unwrap_or_else(|e| panic!("{}: {e}", case.name));
    (result(&memfd, tree), points)
}

/// What is left when the server dies at point number `at`, `restarts` instances follow, each but the last of which dies
/// at once, and the request is resent or not.
fn run(case: &Case, at: usize, restarts: u32, resend: bool) -> String {
    let memfd = State::create_memfd().unwrap();
    let tree = instance(&memfd);
    lay_out(&tree);
    let point = die_at(at, || (case.act)(&tree, ID))
        .unwrap_or_else(|done| panic!("{} ended with {done:?}, no point {at}", case.name));
    drop(tree);
    for _ in 1..restarts {
        drop(instance(&memfd));
    }
    let tree = instance(&memfd);
    if resend {
        (case.act)(&tree, RESENT)
            .unwrap_or_else(|e| panic!("{}, dead at {at} {point}, resent: {e}", case.name));
        let journal = tree.store.state.journal();
        assert!(journal.is_empty(), "{}, dead at {at} {point}", case.name);
    }
    result(&memfd, tree)
}

#[test]
fn a_resent_change_takes_effect_exactly_once_at_whatever_store_the_server_died() {
    let mut deaths = 0;
    for case in CASES {
        let (want, points) = undisturbed(case, true);
        assert!(points.len() > 3, "{}: {points:?}", case.name);
        for at in 0..points.len() {
            for restarts in [1, 2] {
                let got = run(case, at, restarts, true);
                assert_eq!(
                    got, want,
                    "{}, dead at {at} of {points:?}, {restarts} restarts",
                    case.name
                );
                deaths += 1;
            }
        }
    }
    eprintln!("{deaths} deaths");
}

#[test]
fn a_change_that_nobody_waits_for_any_more_is_whole_or_not_there() {
    for case in CASES.iter().filter(|case| case.whole) {
        let (done, points) = undisturbed(case, true);
        let (undone, _) = undisturbed(case, false);
        assert_ne!(done, undone, "{}", case.name);
        for (at, point) in points.iter().enumerate() {
            let got = run(case, at, 1, false);
            assert!(
                got == done || got == undone,
                "{}, dead at {at}, {point}: neither before nor after but\n{got}\nbefore\n{undone}\nafter\n{done}",
                case.name
            );
        }
    }
}

/// The next instance may die as well, at any store of finishing what the first one left.
#[test]
fn to_finish_a_change_can_be_interrupted_as_often_as_one_likes() {
    let case = CASES
        .iter()
        .find(|case| case.name == "rename over a directory")
        .unwrap();
    let (want, points) = undisturbed(case, true);
    let mut interrupted = 0;
    for at in 0..points.len() {
        for second in 0.. {
            let memfd = State::create_memfd().unwrap();
            let tree = instance(&memfd);
            lay_out(&tree);
            die_at(at, || (case.act)(&tree, ID)).expect("it dies");
            drop(tree);
            if die_at(second, || instance(&memfd)).is_err() {
                break;
            }
            let tree = instance(&memfd);
            (case.act)(&tree, RESENT).unwrap();
            assert_eq!(result(&memfd, tree), want, "dead at {at}, then at {second}");
            interrupted += 1;
        }
    }
    assert!(interrupted > points.len(), "{interrupted}");
}

#[test]
fn what_has_no_name_stays_as_long_as_the_kernel_knows_it() {
    let memfd = State::create_memfd().unwrap();
    let mut tree = instance(&memfd);
    lay_out(&tree);
    let free = left(&tree);
    let one = node(&tree, "one");
    finish(tree.remove(50, (ROOT, s("one")), false)).unwrap();
    for n in 0..3_u8 {
        drop(tree);
        tree = instance(&memfd);
        tree.changing().confirmed.insert(one);
        tree.settle();
        assert_eq!(tree.attr(one).unwrap().nlink, 0);
        tree.write(one, u64::from(n), &[b'0' + n]).unwrap();
        assert_eq!(
            finish(tree.link(60, one, (ROOT, s("again")))),
            Err(nix::errno::Errno::ENOENT)
        );
    }
    assert_eq!(tree.read(one, 0, 7).unwrap(), b"012tent");
    drop(tree);
    let tree = instance(&memfd);
    tree.settle();
    assert!(tree.attr(one).is_err());
    // Its inode, its name, its data and its attribute.
    let gained: Vec<u32> = left(&tree)
        .into_iter()
        .zip(free)
        .map(|(now, then)| now - then)
        .collect();
    assert_eq!(gained, [1, 1, 2]);
}

/// Bytes behind the size are nothing: those of a WRITE that was never finished, and those that a truncation cut off.
#[test]
fn what_was_behind_the_end_does_not_come_back() {
    for name in [
        "write behind the end",
        "write far behind the end",
        "truncate",
    ] {
        let case = CASES.iter().find(|case| case.name == name).unwrap();
        let (_, points) = undisturbed(case, true);
        for at in 0..points.len() {
            let memfd = State::create_memfd().unwrap();
            let tree = instance(&memfd);
            lay_out(&tree);
            die_at(at, || (case.act)(&tree, ID)).expect("it dies");
            drop(tree);
            let tree = instance(&memfd);
            let one = node(&tree, "one");
            let end = tree.attr(one).unwrap().size;
            truncate(&tree, 601 * 4096).unwrap();
            for from in [0, 4096, 600 * 4096] {
                let data = tree.read(one, from, 4096).unwrap();
                let mut behind = data.iter().zip(from..).filter(|(_, at)| *at >= end);
                assert!(behind.all(|(byte, _)| *byte == 0), "{name}, dead at {at}");
            }
        }
    }
}
