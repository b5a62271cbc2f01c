// SPDX-License-Identifier: GPL-2.0
//! The tree without a kernel: that it is a file system, within its bounds.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;
use rust_fuse_notify::std::state::{Config, State};
use rust_fuse_notify::std::wire::Identity;

use super::attr::Attributes;
use super::error::{Part, TreeError};
use super::make::{Caller, New};
use super::once::{Kept, Opcode};
use super::store::Res;
use super::tree::Tree;

pub const ROOT: u64 = 1;
pub const ME: Caller = Caller { uid: 7, gid: 8 };

pub fn s(name: &str) -> &OsStr {
    OsStr::new(name)
}

const CONFIG: Config = Config {
    nodes: 16,
    handles: 2,
    journal: 8,
    arena_pages: 256,
};

/// A server without a kernel; dropped and made again it is the next instance.
pub fn instance(memfd: &OwnedFd) -> Tree {
    open(memfd, &CONFIG)
}

fn open(memfd: &OwnedFd, config: &Config) -> Tree {
    let fd = memfd.try_clone().unwrap();
    let state = State::open(fd, Identity([1, 2]), config).unwrap();
    let tree = Tree::open(Arc::new(state)).unwrap();
    tree.resolve().unwrap();
    tree
}

pub fn new() -> (OwnedFd, Tree) {
    let memfd = State::create_memfd().unwrap();
    let tree = instance(&memfd);
    (memfd, tree)
}

/// The request was answered.
pub fn finish<T>(made: Kept<'_, T>) -> Res<T> {
    made.map(|(value, slot)| {
        if let Some(slot) = slot {
            slot.done();
        }
        value
    })
}

pub fn make(tree: &Tree, unique: u64, parent: u64, name: &str, mode: u32) -> Res<u64> {
    let new = New {
        opcode: Opcode::Mknod,
        mode,
        rdev: 0,
        target: if mode & libc::S_IFMT == libc::S_IFLNK {
            b"target"
        } else {
            b""
        },
    };
    finish(tree.make(unique, ME, (parent, s(name)), &new)).map(|inode| inode.nodeid)
}

pub fn file(tree: &Tree, unique: u64, parent: u64, name: &str) -> u64 {
    make(tree, unique, parent, name, libc::S_IFREG | 0o644).unwrap()
}

pub fn dir(tree: &Tree, unique: u64, parent: u64, name: &str) -> u64 {
    make(tree, unique, parent, name, libc::S_IFDIR | 0o755).unwrap()
}

pub fn names(tree: &Tree, dir: u64, after: u64) -> Vec<(u64, String)> {
    let mut names = Vec::new();
    tree.read_dir(dir, after, false, |shown| {
        names.push((
            shown.position,
            String::from_utf8_lossy(shown.name).into_owned(),
        ));
        false
    })
    .unwrap();
    names
}

/// What is left of everything.
pub fn left(tree: &Tree) -> [u32; 3] {
    let index = tree.reading();
    [index.inodes.left(), index.names.left(), index.blocks.left()]
}

#[test]
fn data_is_what_was_written() {
    let mut seed = 12345_u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    let (memfd, mut tree) = new();
    let before = left(&tree);
    let nodeid = file(&tree, 2, ROOT, "file");
    let mut model: Vec<u8> = Vec::new();
    for step in 0..600 {
        let (offset, len) = (random(200_000), random(9000) as usize);
        match random(6) {
            0 => {
                let size = Attributes {
                    size: Some(offset),
                    ..Attributes::default()
                };
                tree.set_attr(nodeid, &size).unwrap();
                model.resize(offset as usize, 0);
            }
            1 => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                tree.allocate(nodeid, offset, len as u64 + 1, mode).unwrap();
                let end = model.len().min(offset as usize + len + 1);
                model
                    .get_mut(offset as usize..end)
                    .into_iter()
                    .for_each(|hole| hole.fill(0));
            }
            2 => {
                tree.allocate(nodeid, offset, len as u64 + 1, 0).unwrap();
                model.resize(model.len().max(offset as usize + len + 1), 0);
            }
            3 => {
                drop(tree);
                tree = instance(&memfd);
            }
            _ => {
                let data: Vec<u8> = (0..=len).map(|n| (n + step) as u8 | 1).collect();
                assert_eq!(tree.write(nodeid, offset, &data), Ok(data.len()));
                let end = offset as usize + data.len();
                model.resize(model.len().max(end), 0);
                model[offset as usize..end].copy_from_slice(&data);
            }
        }
        assert_eq!(tree.attr(nodeid).unwrap().size, model.len() as u64);
        let from = random(model.len() as u64 + 1);
        let read = tree.read(nodeid, from, 10_000).unwrap();
        let end = model.len().min(from as usize + 10_000);
        assert!(read == model[from as usize..end], "step {step}");
    }
    assert!(tree.read(nodeid, 0, 1 << 20).unwrap() == model);
    finish(tree.remove(4, (ROOT, s("file")), false)).unwrap();
    tree.forget(nodeid, 1);
    assert_eq!(left(&tree), before);
    assert_eq!(tree.attr(nodeid), Err(Errno::ESTALE));
}

#[test]
fn what_is_full_says_so_and_what_is_removed_is_free_again() {
    let (memfd, tree) = new();
    let before = left(&tree);
    let (mut unique, mut counts) = (2, Vec::new());
    for _ in 0..2 {
        let fd = file(&tree, unique, ROOT, "large");
        let mut written = 0;
        let error = loop {
            match tree.write(fd, written, &[7; 5000]) {
                Ok(n) => written += n as u64,
                Err(e) => break e,
            }
        };
        assert_eq!(error, Errno::ENOSPC);
        assert_eq!(tree.attr(fd).unwrap().size, written);
        counts.push(written);
        // Names and inodes are bounded as well, and nothing is left over of what failed.
        let mut made = 0;
        while make(&tree, unique + 2, ROOT, &format!("{made}"), libc::S_IFREG).is_ok() {
            (made, unique) = (made + 1, unique + 2);
        }
        assert_eq!(left(&tree)[0], 0);
        let names_left = left(&tree)[1];
        let link = make(&tree, 9999, ROOT, "symbolic", libc::S_IFLNK);
        assert_eq!((link, left(&tree)[1]), (Err(Errno::ENOSPC), names_left));
        for (_, name) in names(&tree, ROOT, 2) {
            let nodeid = tree.lookup(ROOT, s(&name)).unwrap().nodeid;
            unique += 2;
            finish(tree.remove(unique, (ROOT, s(&name)), false)).unwrap();
            tree.forget(nodeid, 2);
        }
        assert_eq!(left(&tree), before);
    }
    assert!(counts[0] == counts[1] && counts[0] > 200_000, "{counts:?}");
    drop(tree);
    assert_eq!(left(&instance(&memfd)), before);
}

#[test]
fn an_allocation_that_there_is_no_room_for_takes_none() {
    let (_, tree) = new();
    let fd = file(&tree, 2, ROOT, "f");
    tree.write(fd, 0, &[7; 5000]).unwrap();
    let before = left(&tree);
    assert_eq!(tree.allocate(fd, 0, 64 << 20, 0), Err(Errno::ENOSPC));
    assert_eq!(left(&tree), before);
    assert_eq!(tree.attr(fd).unwrap().size, 5000);
    // Within the file what holes could be filled stay so: they are its own, and read as zeroes.
    assert_eq!(tree.read(fd, 4990, 100).unwrap(), [7; 10]);
}

#[test]
fn a_stream_neither_repeats_nor_skips_what_stays() {
    let (memfd, tree) = new();
    for n in 0..20 {
        file(&tree, 2 + 2 * n, ROOT, &format!("f{n}"));
    }
    let all = names(&tree, ROOT, 0);
    assert_eq!(
        (all.len(), all[0].1.as_str(), all[1].1.as_str()),
        (22, ".", "..")
    );
    let half = all[11].0;
    finish(tree.remove(100, (ROOT, s("f3")), false)).unwrap();
    finish(tree.remove(102, (ROOT, s("f12")), false)).unwrap();
    file(&tree, 104, ROOT, "new");
    drop(tree);
    let rest: Vec<String> = names(&instance(&memfd), ROOT, half)
        .into_iter()
        .map(|(_, n)| n)
        .collect();
    assert_eq!(
        rest,
        ["f10", "f11", "f13", "f14", "f15", "f16", "f17", "f18", "f19", "new"]
    );
}

#[test]
fn attributes_follow_what_is_done() {
    let (_memfd, tree) = new();
    let top = dir(&tree, 2, ROOT, "top");
    assert_eq!(
        (
            tree.attr(ROOT).unwrap().nlink,
            tree.attr(top).unwrap().nlink
        ),
        (3, 2)
    );
    let setgid = Attributes {
        mode: Some(0o2775),
        gid: Some(55),
        ..Attributes::default()
    };
    tree.set_attr(top, &setgid).unwrap();
    let below = tree.attr(dir(&tree, 4, top, "below")).unwrap();
    assert_eq!(
        (below.gid, below.mode, below.uid),
        (55, libc::S_IFDIR | 0o2755, 7)
    );
    let leaf = file(&tree, 6, top, "leaf");
    assert_eq!(tree.attr(leaf).unwrap().gid, 55);
    finish(tree.link(8, leaf, (ROOT, s("second")))).unwrap();
    assert_eq!(tree.attr(leaf).unwrap().nlink, 2);
    let over = |from: (u64, &str), to: (u64, &str), flags| {
        let (from, to) = ((from.0, s(from.1)), (to.0, s(to.1)));
        finish(tree.rename(10, ME, from, to, flags))
    };
    // Two names of one file.
    assert_eq!(over((top, "leaf"), (ROOT, "second"), 0), Ok(()));
    assert_eq!(tree.attr(leaf).unwrap().nlink, 2);
    assert_eq!(
        over((top, "below"), (ROOT, "second"), 0),
        Err(Errno::ENOTDIR)
    );
    assert_eq!(
        over((ROOT, "second"), (top, "below"), 0),
        Err(Errno::EISDIR)
    );
    assert_eq!(
        over((ROOT, "second"), (top, "leaf"), libc::RENAME_NOREPLACE),
        Err(Errno::EEXIST)
    );
    assert_eq!(
        over((top, "below"), (ROOT, "gone"), libc::RENAME_EXCHANGE),
        Err(Errno::ENOENT)
    );
    assert_eq!(
        over((top, "below"), (ROOT, "second"), libc::RENAME_EXCHANGE),
        Ok(())
    );
    let links = |nodeid| tree.attr(nodeid).unwrap().nlink;
    assert_eq!((links(ROOT), links(top), links(below.nodeid)), (4, 2, 2));
    assert_eq!(
        finish(tree.remove(12, (ROOT, s("top")), true)),
        Err(Errno::ENOTEMPTY)
    );
    assert_eq!(
        finish(tree.remove(14, (ROOT, s("top")), false)),
        Err(Errno::EISDIR)
    );
    assert_eq!(
        finish(tree.remove(16, (top, s("leaf")), true)),
        Err(Errno::ENOTDIR)
    );
    // `..` is where the directory is now.
    let mut up = 0;
    tree.read_dir(below.nodeid, 1, false, |shown| {
        up = shown.inode.nodeid;
        true
    })
    .unwrap();
    assert_eq!(up, ROOT);
}

#[test]
fn attributes_of_the_users_own() {
    let (_memfd, tree) = new();
    let blocks = left(&tree)[2];
    let set =
        |name: &str, value: &[u8], flags| finish(tree.set_xattr(2, ROOT, s(name), value, flags));
    assert_eq!(
        set("user.a", b"1", libc::XATTR_REPLACE),
        Err(Errno::ENODATA)
    );
    assert_eq!(set("user.a", b"1", libc::XATTR_CREATE), Ok(()));
    assert_eq!(set("user.a", b"2", libc::XATTR_CREATE), Err(Errno::EEXIST));
    assert_eq!(set("user.b", b"", 0), Ok(()));
    assert_eq!(set("user.a", &[9; 4000], 0), Ok(()));
    assert_eq!(set("user.c", &[9; 4096], 0), Err(Errno::ENOSPC));
    assert_eq!(
        set("system.posix_acl_access", b"", 0),
        Err(Errno::EOPNOTSUPP)
    );
    assert_eq!(tree.get_xattr(ROOT, s("user.a")), Ok(vec![9; 4000]));
    assert_eq!(tree.list_xattrs(ROOT), Ok(b"user.b\0user.a\0".to_vec()));
    for name in ["user.b", "user.a"] {
        finish(tree.remove_xattr(4, ROOT, s(name))).unwrap();
        assert_eq!(tree.get_xattr(ROOT, s(name)), Err(Errno::ENODATA));
    }
    assert_eq!(left(&tree)[2], blocks);
}

#[test]
fn a_tree_that_nobody_can_have_written_is_refused() {
    let (memfd, tree) = new();
    let nodeid = file(&tree, 2, ROOT, "file");
    tree.write(nodeid, 0, b"data").unwrap();
    let other = file(&tree, 4, ROOT, "other");
    let word = |nodeid| tree.store.place(nodeid).unwrap() + super::layout::inode::DATA;
    tree.store.store(word(other), tree.store.load(word(nodeid)));
    let state = tree.store.state.clone();
    drop(tree);
    let refused = Tree::open(state).err().unwrap();
    let damaged = TreeError::Damaged {
        part: Part::Inode(other as u32),
        what: "a block of it is reached twice",
    };
    assert_eq!(refused, damaged);
    drop(memfd);
}

#[test]
fn what_is_not_used_takes_no_memory() {
    let memfd = State::create_memfd().unwrap();
    let config = Config {
        arena_pages: 1 << 22,
        ..CONFIG
    };
    for _ in 0..2 {
        let tree = open(&memfd, &config);
        file(&tree, 2, ROOT, &format!("file{}", tree.store.changes()));
        tree.settle();
    }
    let memory = nix::sys::stat::fstat(&memfd).unwrap().st_blocks * 512;
    assert!(memory < 8 << 20, "{memory} bytes for two files in 16 GiB");
}

#[test]
fn a_nodeid_is_never_given_twice() {
    let (_memfd, tree) = new();
    let before = left(&tree);
    let mut given = std::collections::HashSet::new();
    for n in 0..20 {
        let unique = 100 + 10 * n;
        let old = dir(&tree, unique, ROOT, "old");
        let over = dir(&tree, unique + 2, ROOT, "over");
        assert!(given.insert(old) && given.insert(over), "round {n}");
        let (from, to) = ((ROOT, s("old")), (ROOT, s("over")));
        finish(tree.rename(unique + 4, ME, from, to, 0)).unwrap();
        assert_eq!(tree.attr(over).unwrap().nlink, 0);
        tree.forget(over, 1);
        finish(tree.remove(unique + 6, (ROOT, s("over")), true)).unwrap();
        assert_eq!(tree.attr(old).unwrap().nlink, 0);
        // Nothing can be made in it any more.
        let made = make(&tree, unique + 8, old, "new", libc::S_IFREG);
        assert_eq!(made, Err(Errno::ENOENT));
        tree.forget(old, 1);
        assert_eq!(
            (tree.attr(old), tree.attr(over)),
            (Err(Errno::ESTALE), Err(Errno::ESTALE))
        );
        assert_eq!(left(&tree), before);
    }
}
