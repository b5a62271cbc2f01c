// SPDX-License-Identifier: GPL-2.0
//! Trees with words that are anything: each is refused, or served without harm. The table of single damages is in
//! `damage_tests.rs`.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::mpsc::{channel, RecvTimeoutError};

use rust_fuse_notify::std::state::State;

use super::attr::Attributes;
use super::blocks::MOST_BYTES;
use super::damage_tests::{lay_out, PATIENCE};
use super::layout::{self, PAGE};
use super::tests::{finish, instance, make, s, ME, ROOT};
use super::tree::Tree;

const CASES: u32 = 2000;

/// Uses everything that is there and makes more; an error is an answer.
fn use_all(tree: &Tree) {
    let (mut dirs, mut found) = (vec![ROOT], Vec::new());
    while let Some(dir) = dirs.pop() {
        tree.read_dir(dir, 2, false, |shown| {
            found.push((dir, OsStr::from_bytes(shown.name).to_owned(), shown.inode));
            false
        })
        .unwrap();
        let here = found.iter().filter(|(parent, ..)| *parent == dir);
        dirs.extend(
            here.filter(|(.., inode)| inode.is_dir())
                .map(|(.., inode)| inode.nodeid),
        );
        assert!(found.len() < 100, "a tree that does not end");
    }
    let mut unique = 1000;
    let mut unique = || {
        unique += 2;
        unique
    };
    for (dir, name, inode) in &found {
        let (nodeid, size) = (inode.nodeid, inode.size);
        let _ = tree.lookup(*dir, name).map(|inode| inode.attr());
        for offset in [0, size.saturating_sub(PAGE as u64)] {
            let _ = tree.read(nodeid, offset, 2 * PAGE);
        }
        let xattrs = tree.list_xattrs(nodeid).unwrap_or_default();
        for name in xattrs.split(|byte| *byte == 0) {
            let _ = tree.get_xattr(nodeid, OsStr::from_bytes(name));
            let _ = finish(tree.set_xattr(unique(), nodeid, OsStr::from_bytes(name), b"new", 0));
        }
        let _ = finish(tree.set_xattr(unique(), nodeid, s("user.new"), b"new", 0));
        let _ = finish(tree.remove_xattr(unique(), nodeid, s("user.b")));
        if inode.mode & libc::S_IFMT == libc::S_IFREG {
            for offset in [size, 513 * PAGE as u64, MOST_BYTES - 3] {
                let _ = tree.write(nodeid, offset, b"new");
            }
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let _ = tree.allocate(nodeid, 100, 600 * PAGE as u64, mode);
        }
        let shorter = Attributes {
            size: Some(size / 2),
            mode: Some(0o600),
            ..Attributes::default()
        };
        let _ = tree.set_attr(nodeid, &shorter);
        if !inode.is_dir() {
            let _ = finish(tree.link(unique(), nodeid, (*dir, s("link"))));
        }
        let _ = make(tree, unique(), nodeid, "dir", libc::S_IFDIR | 0o700);
        let _ = make(tree, unique(), *dir, "file", libc::S_IFREG | 0o700);
        let renamed = ((*dir, name.as_os_str()), (*dir, s("file")));
        for flags in [libc::RENAME_EXCHANGE, libc::RENAME_WHITEOUT] {
            let _ = finish(tree.rename(unique(), ME, renamed.0, renamed.1, flags));
        }
        let _ = finish(tree.remove(unique(), (*dir, name), inode.is_dir()));
        let _ = finish(tree.remove(unique(), (*dir, s("file")), inode.is_dir()));
        tree.forget(nodeid, 1);
    }
    tree.settle();
}

/// Where a word has a meaning.
fn words_of(tree: &Tree) -> Vec<usize> {
    let (store, layout) = (&tree.store, tree.store.layout);
    let mut places: Vec<usize> = (0..7).map(|n| 8 * n).collect();
    places.extend((0..9).map(|n| layout::LOG_AT + 8 * n));
    let mut extend = |start: usize, words: usize| places.extend((0..words).map(|n| start + 8 * n));
    for slot in 0..store.used(layout::INODES_USED_AT, layout.inodes) {
        extend(layout.inode(slot), 13);
    }
    for record in 0..store.used(layout::NAMES_USED_AT, layout.names) {
        extend(layout.name(record), 5);
    }
    let blocks = layout.blocks - tree.reading().blocks.left();
    for block in 1..blocks {
        extend(layout.block(block), 4);
    }
    places
}

#[test]
fn hostile_trees_do_no_harm() {
    let memfd = State::create_memfd().unwrap();
    let tree = instance(&memfd);
    lay_out(&tree);
    let words = words_of(&tree);
    let state = tree.store.state.clone();
    let mut sound = vec![0; state.arena().len()];
    state.arena().read(0, &mut sound);
    drop(tree);

    let (tell, told) = channel();
    let worker = std::thread::spawn(move || {
        let mut seed = 4711_u64;
        let mut random = move |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize % below
        };
        for _ in 0..CASES {
            let arena = state.arena();
            arena.write(0, &sound);
            let mut done = Vec::new();
            for _ in 0..=random(3) {
                let place = match random(16) {
                    0 => random(arena.len() / 8) * 8,
                    _ => words[random(words.len())],
                };
                let old = arena.load(place);
                let value = match random(8) {
                    0 => 0,
                    1 => (random(1 << 31) as u64) << random(34),
                    2 => random(64) as u64 | (random(5) as u64) << 56,
                    3 => old.wrapping_add(1),
                    4 => old.wrapping_sub(1),
                    5 => old ^ 1 << random(64),
                    _ => arena.load(words[random(words.len())]),
                };
                arena.store(place, value);
                done.push((place, old, value));
            }
            if random(4) == 0 {
                // A change that was begun.
                let place = words[random(words.len())] as u64;
                let number = arena.load(layout::CHANGES_AT).wrapping_add(1);
                let pairs = [place, 7, layout::CHANGES_AT as u64, number];
                for (n, word) in pairs.into_iter().enumerate() {
                    arena.store(layout::PAIRS_AT + 8 * n, word);
                }
                arena.store(layout::LOG_AT, 2);
                done.push((layout::LOG_AT, place, 7));
            }
            tell.send((done, None)).unwrap();
            let served = Tree::open(state.clone()).is_ok_and(|tree| {
                use_all(&tree);
                drop(tree);
                // What was served is not refused later.
                Tree::open(state.clone()).map(drop).unwrap();
                true
            });
            tell.send((Vec::new(), Some(served))).unwrap();
        }
    });
    let (mut last, mut served) = (Vec::new(), 0);
    let end = loop {
        match told.recv_timeout(PATIENCE) {
            Ok((done, None)) => last = done,
            Ok((_, Some(yes))) => served += u32::from(yes),
            Err(end) => break end,
        }
    };
    assert_eq!(end, RecvTimeoutError::Disconnected, "hangs after {last:x?}");
    assert!(worker.join().is_ok(), "panics after {last:x?}");
    assert!((CASES / 20..CASES).contains(&served), "{served} served");
    eprintln!("{served} of {CASES} served");
}
