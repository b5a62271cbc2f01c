// SPDX-License-Identifier: GPL-2.0
//! Trees that no server wrote, damaged in one way each: they are refused, with what an operator can do.

use std::sync::mpsc::{channel, RecvTimeoutError};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use rust_fuse_notify::std::state::State;

use super::blocks::MOST_BYTES;
use super::layout::{self, inode as at, name, xattr, PAGE};
use super::names::Entry;
use super::tests::{dir, file, finish, instance, make, s, ROOT};
use super::tree::Tree;

/// So long nothing takes here but what never ends.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Something of each kind.
pub fn lay_out(tree: &Tree) {
    let small = file(tree, 2, ROOT, "small");
    tree.write(small, 0, b"content").unwrap();
    for name in ["user.c", "user.b", "user.a"] {
        finish(tree.set_xattr(4, small, s(name), b"value", 0)).unwrap();
    }
    let large = file(tree, 6, ROOT, "large");
    tree.write(large, 0, &[b'l'; 3 * PAGE]).unwrap();
    tree.write(large, 600 * PAGE as u64, b"far away").unwrap();
    finish(tree.link(8, large, (ROOT, s("large-too")))).unwrap();
    let top = dir(tree, 10, ROOT, "top");
    let below = dir(tree, 12, top, "below");
    let inner = file(tree, 14, below, "inner");
    tree.write(inner, 5000, b"inner").unwrap();
    finish(tree.set_xattr(16, inner, s("user.inner"), b"", 0)).unwrap();
    make(tree, 18, top, "symbolic", libc::S_IFLNK | 0o777).unwrap();
    // Without a name, but looked up.
    let open = file(tree, 20, ROOT, "open");
    tree.write(open, 0, b"open").unwrap();
    finish(tree.remove(22, (ROOT, s("open")), false)).unwrap();
    dir(tree, 24, ROOT, "gone");
    finish(tree.remove(26, (ROOT, s("gone")), true)).unwrap();
}

fn entry(tree: &Tree, path: &str) -> Entry {
    let index = tree.reading();
    let mut entry = None;
    for name in path.split('/') {
        let dir = entry.map_or(ROOT, |entry: Entry| entry.child);
        entry = Some(tree.find(&index, dir, name.as_bytes()).unwrap());
    }
    entry.unwrap()
}

/// Where a word of an inode is.
fn inode(tree: &Tree, path: &str, word: usize) -> usize {
    let nodeid = match path {
        "" => ROOT,
        path => entry(tree, path).child,
    };
    tree.store.place(nodeid).unwrap() + word
}

/// Where a word of a name is.
fn named(tree: &Tree, path: &str, word: usize) -> usize {
    tree.store.layout.name(entry(tree, path).record) + word
}

/// Where the block is that a word points to.
fn block(tree: &Tree, pointer: usize) -> usize {
    tree.store.layout.block(tree.store.load(pointer) as u32)
}

fn set(tree: &Tree, at: usize, value: u64) {
    tree.store.store(at, value);
}

fn copy(tree: &Tree, from: usize, to: usize) {
    set(tree, to, tree.store.load(from));
}

/// A change that was begun, of this one pair and the change's number.
fn begun(tree: &Tree, place: u64, number: u64) {
    let words = [place, 7, layout::CHANGES_AT as u64, number];
    for (n, word) in words.into_iter().enumerate() {
        set(tree, layout::PAIRS_AT + 8 * n, word);
    }
    set(tree, layout::LOG_AT, 2);
}

fn begun_at(tree: &Tree, place: usize) {
    begun(tree, place as u64, tree.store.changes() + 1);
}

fn links(tree: &Tree, path: &str, by: i64) {
    let at = inode(tree, path, at::MODE);
    let links = tree.store.load(at).wrapping_add_signed(by << 32);
    set(tree, at, links);
}

/// What is in the message, and what was done to the tree.
type Case = (&'static str, fn(&Tree));

const HEADER: &[Case] = &[
    ("header: its mark is gone", |t| set(t, layout::MAGIC_AT, 0)),
    ("of another server", |t| set(t, layout::MAGIC_AT, 77)),
    ("another version", |t| set(t, layout::NAMES_AT, 77)),
    ("header: more inodes", |t| {
        set(
            t,
            layout::INODES_USED_AT,
            u64::from(t.store.layout.inodes) + 1,
        );
    }),
    ("header: more names", |t| {
        set(t, layout::NAMES_USED_AT, u64::MAX)
    }),
    ("header: the number of changes", |t| {
        set(t, layout::CHANGES_AT, u64::MAX)
    }),
    ("log: more words", |t| set(t, layout::LOG_AT, 256)),
    ("log: more words", |t| set(t, layout::LOG_AT, u64::MAX)),
    ("log: a word that", |t| {
        begun_at(t, t.store.state.arena().len())
    }),
    ("log: a word that", |t| begun_at(t, usize::MAX - 7)),
    ("log: a word that", |t| {
        begun_at(t, inode(t, "small", at::RDEV) + 4)
    }),
    ("log: a word that", |t| begun_at(t, layout::INODES_AT)),
    ("log: a word that", |t| begun_at(t, layout::PAIRS_AT)),
    ("log: a word that", |t| {
        begun_at(t, named(t, "small", name::PARENT))
    }),
    ("log: a word that", |t| {
        begun_at(t, block(t, inode(t, "small", at::XATTRS)) + xattr::LENS)
    }),
    ("log: a word that", |t| {
        begun_at(t, t.store.layout.block(1) - PAGE)
    }),
    ("log: the number of the change", |t| {
        begun(t, inode(t, "small", at::RDEV) as u64, 2)
    }),
    ("log: the number of the change", |t| {
        begun_at(t, inode(t, "small", at::RDEV));
        set(t, layout::LOG_AT, 1);
    }),
];

const INODES: &[Case] = &[
    ("another nodeid", |t| {
        copy(
            t,
            inode(t, "large", at::NODEID),
            inode(t, "small", at::NODEID),
        )
    }),
    ("inode 1: it has another nodeid", |t| {
        set(t, inode(t, "", at::NODEID), 1 | 5 << 32)
    }),
    ("inode 1: the root is no directory", |t| {
        copy(t, inode(t, "small", at::MODE), inode(t, "", at::MODE))
    }),
    ("header: there is no root", |t| {
        for slot in 1..t.store.layout.inodes {
            set(t, t.store.layout.inode(slot) + at::NODEID, 0);
        }
        for record in 0..t.store.layout.names {
            set(t, t.store.child_at(record), 0);
        }
    }),
    ("no type of a file", |t| {
        set(t, inode(t, "small", at::MODE), 0o644 | 1 << 32)
    }),
    ("too large", |t| {
        set(t, inode(t, "small", at::SIZE), MOST_BYTES + 1)
    }),
    ("too large", |t| set(t, inode(t, "top", at::SIZE), u64::MAX)),
    ("looked up too often", |t| {
        set(t, inode(t, "small", at::LOOKUPS), u64::MAX)
    }),
    ("the number of links", |t| links(t, "small", 1)),
    ("the number of links", |t| links(t, "large", -1)),
    ("the number of links", |t| links(t, "top", (1 << 31) - 3)),
    ("inode 1: the number of links", |t| links(t, "", 1)),
    ("no inode", |t| set(t, layout::INODES_USED_AT, 3)),
    // Height 0, 1 and more; in the inode, and in the tree below it.
    ("no block", |t| {
        set(
            t,
            inode(t, "small", at::DATA),
            u64::from(t.store.layout.blocks),
        )
    }),
    ("no block", |t| {
        set(t, inode(t, "small", at::DATA), 0xffff_ffff | 1 << 56)
    }),
    ("no block", |t| {
        set(
            t,
            inode(t, "large", at::DATA),
            u64::from(t.store.layout.blocks) | 2 << 56,
        )
    }),
    ("no block", |t| set(t, inode(t, "small", at::DATA), 3 << 56)),
    ("no block", |t| {
        set(t, block(t, inode(t, "large", at::DATA)) + 8, 1 << 31)
    }),
    ("no block", |t| {
        set(
            t,
            block(t, block(t, inode(t, "large", at::DATA))) + 24,
            5 | 1 << 32,
        )
    }),
    ("too high", |t| {
        set(
            t,
            inode(t, "small", at::DATA),
            t.store.load(inode(t, "small", at::DATA)) | 4 << 56,
        )
    }),
    ("too high", |t| {
        set(
            t,
            inode(t, "large", at::DATA),
            t.store.load(inode(t, "large", at::DATA)) | 255 << 56,
        )
    }),
    ("too high", |t| {
        set(
            t,
            inode(t, "small", at::DATA),
            t.store.load(inode(t, "small", at::DATA)) | 1 << 40,
        )
    }),
    ("reached twice", |t| {
        copy(
            t,
            inode(t, "small", at::DATA),
            inode(t, "top/below/inner", at::DATA),
        )
    }),
    ("reached twice", |t| {
        copy(
            t,
            inode(t, "small", at::XATTRS),
            inode(t, "top/below/inner", at::DATA),
        )
    }),
    // A tree of blocks that has itself below it.
    ("reached twice", |t| {
        let root = inode(t, "large", at::DATA);
        set(t, block(t, root), t.store.load(root) as u32 as u64);
    }),
    ("reached twice", |t| {
        copy(
            t,
            block(t, inode(t, "large", at::DATA)),
            block(t, inode(t, "large", at::DATA)) + 16,
        )
    }),
    // Chains of extended attributes.
    ("reached twice", |t| {
        let first = inode(t, "small", at::XATTRS);
        copy(t, first, block(t, first) + xattr::NEXT);
    }),
    ("reached twice", |t| {
        let first = inode(t, "small", at::XATTRS);
        copy(t, first, block(t, block(t, first)) + xattr::NEXT);
    }),
    ("reached twice", |t| {
        copy(
            t,
            inode(t, "small", at::XATTRS),
            inode(t, "top", at::XATTRS),
        )
    }),
    ("no block", |t| {
        set(t, inode(t, "small", at::XATTRS), 1 << 32 | 5)
    }),
    ("no block", |t| {
        set(
            t,
            block(t, inode(t, "small", at::XATTRS)) + xattr::NEXT,
            u64::MAX,
        )
    }),
    ("too long", |t| {
        set(
            t,
            block(t, inode(t, "small", at::XATTRS)) + xattr::LENS,
            6 | 4075 << 32,
        )
    }),
    ("too long", |t| {
        set(
            t,
            block(t, inode(t, "small", at::XATTRS)) + xattr::LENS,
            256,
        )
    }),
];

const NAMES: &[Case] = &[
    ("no inode", |t| {
        set(
            t,
            named(t, "small", name::CHILD),
            u64::from(t.store.layout.inodes),
        )
    }),
    ("no inode", |t| {
        set(t, named(t, "small", name::CHILD), u64::MAX)
    }),
    ("no inode", |t| {
        set(t, named(t, "small", name::CHILD), 5 << 32)
    }),
    ("no inode", |t| {
        let nobody = 5 << 32;
        set(t, t.store.layout.inode(0) + at::NODEID, nobody);
        set(t, named(t, "small", name::CHILD), nobody);
    }),
    ("no inode", |t| set(t, inode(t, "small", at::NODEID), 0)),
    ("in no directory", |t| {
        copy(
            t,
            inode(t, "small", at::NODEID),
            named(t, "large", name::PARENT),
        )
    }),
    ("in no directory", |t| {
        set(t, named(t, "large", name::PARENT), u64::MAX)
    }),
    ("is there twice", |t| {
        for word in [name::BYTES_LEN, name::BYTES, name::BYTES + 8] {
            copy(t, named(t, "large", word), named(t, "large-too", word));
        }
    }),
    ("is there twice", |t| {
        copy(
            t,
            named(t, "large", name::COOKIE),
            named(t, "small", name::COOKIE),
        )
    }),
    ("its position", |t| {
        set(t, named(t, "small", name::COOKIE), 2)
    }),
    ("its position", |t| {
        set(t, named(t, "small", name::COOKIE), t.store.changes() + 3)
    }),
    ("no name", |t| set(t, named(t, "small", name::BYTES_LEN), 0)),
    ("no name", |t| {
        set(t, named(t, "small", name::BYTES_LEN), 256)
    }),
    ("no name", |t| set(t, named(t, "small", name::BYTES_LEN), 6)),
    ("no name", |t| {
        set(
            t,
            named(t, "small", name::BYTES),
            u64::from_ne_bytes(*b"sm/ll\0\0\0"),
        )
    }),
    ("no name", |t| {
        set(
            t,
            named(t, "small", name::BYTES),
            u64::from_ne_bytes(*b"..\0\0\0\0\0\0"),
        );
        set(t, named(t, "small", name::BYTES_LEN), 2);
    }),
    ("two names of a directory", |t| {
        copy(
            t,
            inode(t, "top", at::NODEID),
            named(t, "large-too", name::CHILD),
        )
    }),
    ("two names of a directory", |t| {
        set(t, named(t, "small", name::CHILD), ROOT)
    }),
    // With link counts that are right.
    ("below itself", |t| {
        links(t, "", -1);
        links(t, "top/below", 1);
        copy(
            t,
            inode(t, "top/below", at::NODEID),
            named(t, "top", name::PARENT),
        );
    }),
    ("below itself", |t| {
        links(t, "", -1);
        links(t, "top", 1);
        copy(
            t,
            inode(t, "top", at::NODEID),
            named(t, "top", name::PARENT),
        );
    }),
    ("not empty", |t| {
        links(t, "", -1);
        links(t, "top", -3);
        set(t, named(t, "top", name::CHILD), 0);
    }),
];

/// How a start with this tree ends: the message that refuses it, or else what happened.
fn start(state: Arc<State>) -> Result<String, &'static str> {
    let (tell, told) = channel();
    std::thread::spawn(move || {
        let message = Tree::open(state).err().map(|e| e.to_string());
        tell.send(message)
    });
    match told.recv_timeout(PATIENCE) {
        Ok(Some(message)) => Ok(message),
        Ok(None) => Err("it was served"),
        Err(RecvTimeoutError::Disconnected) => Err("the server panicked"),
        Err(RecvTimeoutError::Timeout) => Err("the server hung"),
    }
}

#[test]
fn what_is_damaged_is_refused_with_a_way_out() {
    let mut wrong = Vec::new();
    for (table, cases) in [("header", HEADER), ("inodes", INODES), ("names", NAMES)] {
        for (n, (what, damage)) in cases.iter().enumerate() {
            let memfd = State::create_memfd().unwrap();
            let tree = instance(&memfd);
            lay_out(&tree);
            damage(&tree);
            let state = tree.store.state.clone();
            drop(tree);
            let result = start(state);
            let way_out = "mount again with an empty memfd";
            if !result
                .as_ref()
                .is_ok_and(|said| said.contains(what) && said.contains(way_out))
            {
                wrong.push(format!("{table} {n}, {what}: {result:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
}

/// It is not looked at, for it would take memory; so it must not matter what is there.
#[test]
fn what_is_behind_what_was_used_is_nothing() {
    let memfd = State::create_memfd().unwrap();
    let tree = instance(&memfd);
    let nodeid = file(&tree, 2, ROOT, "file");
    let mut written = 0;
    while let Ok(more) = tree.write(nodeid, written, &[1; PAGE]) {
        written += more as u64;
    }
    let (slot, record) = (nodeid as u32 + 1, entry(&tree, "file").record + 1);
    let stale = u64::from(slot) | 9 << 32;
    set(&tree, tree.store.layout.inode(slot) + at::NODEID, stale);
    set(&tree, tree.store.child_at(record), stale);
    drop(tree);
    let tree = instance(&memfd);
    assert_eq!(tree.attr(stale), Err(Errno::ESTALE));
    // Takes both records, and then there is no block.
    let made = make(&tree, 4, ROOT, "symbolic", libc::S_IFLNK);
    assert_eq!(made, Err(Errno::ENOSPC));
    assert_eq!(tree.attr(stale), Err(Errno::ESTALE));
    drop(tree);
    assert_eq!(instance(&memfd).attr(stale), Err(Errno::ESTALE));
}
