// SPDX-License-Identifier: GPL-2.0
//! What a memfd holds is not believed: all of it is looked at before any of it is served or changed.
//!
//! Each block is marked when it is reached, and one that is marked already is damage. So every walk ends, and what it
//! has passed is as the rest of the server expects it.

use std::collections::{HashMap, HashSet};

use rust_fuse_notify::std::wire::FUSE_ROOT_ID;

use super::blocks::{root, root_word, FAN_OUT, MOST_BYTES, MOST_HEIGHT};
use super::error::{check, Checked, Part, TreeError};
use super::free::Free;
use super::layout::{self, inode as at, name, xattr};
use super::names::Dir;
use super::store::Store;
use super::tree::Index;

/// No counter gets so far.
const MOST_COUNTED: u64 = 1 << 63;

impl Store {
    /// An arena without a mark is empty, but for what a first start that died has left.
    pub fn check_empty(&self) -> Checked<()> {
        let words = [
            layout::CHANGES_AT,
            layout::INODES_USED_AT,
            layout::NAMES_USED_AT,
            layout::LOG_AT,
        ];
        let empty = words.iter().all(|at| self.load(*at) == 0);
        check(empty, Part::Header, "its mark is gone")
    }

    pub fn check_header(&self) -> Checked<()> {
        let below = |at, most| self.load(at) <= u64::from(most);
        let holds = |holds, what| check(holds, Part::Header, what);
        holds(
            below(layout::INODES_USED_AT, self.layout.inodes),
            "more inodes than there is room for",
        )?;
        holds(
            below(layout::NAMES_USED_AT, self.layout.names),
            "more names than there is room for",
        )?;
        holds(
            self.changes() < MOST_COUNTED,
            "the number of changes is absurd",
        )
    }

    /// The change that a dead server had begun, before any word of it is stored.
    pub fn check_log(&self) -> Checked<()> {
        let pairs = self.load(layout::LOG_AT);
        if pairs == 0 {
            return Ok(());
        }
        let holds = |holds, what| check(holds, Part::Log, what);
        holds(
            pairs <= layout::MOST_PAIRS as u64,
            "more words than there is room for",
        )?;
        let mut numbered = false;
        for n in 0..pairs as usize {
            let place = self.load(layout::PAIRS_AT + 16 * n);
            let value = self.load(layout::PAIRS_AT + 16 * n + 8);
            if place == layout::CHANGES_AT as u64 {
                // The dead server may have stored it.
                numbered = value == self.changes() || value == self.changes() + 1;
                continue;
            }
            let Some(place) = self.layout.in_change(place) else {
                return holds(false, "a word that no change has");
            };
            self.reserve(place, 8).map_err(TreeError::Memory)?;
        }
        holds(numbered, "the number of the change is another one")
    }
}

/// Reads everything, and finds what is free.
pub fn take_stock(store: &Store) -> Checked<Index> {
    let layout = store.layout;
    let mut index = Index {
        inodes: Free::new(layout.inodes, 2),
        names: Free::new(layout.names, 0),
        blocks: Free::new(layout.blocks, 1),
        dirs: HashMap::new(),
        confirmed: HashSet::new(),
    };
    let mut used = Vec::new();
    for slot in 1..store.used(layout::INODES_USED_AT, layout.inodes) {
        let nodeid = store.load(layout.inode(slot) + at::NODEID);
        if nodeid != 0 {
            take_inode(store, &mut index, slot, nodeid)?;
            used.push(nodeid);
        }
    }
    // The first start may have died before it made the root; nothing was made then.
    check(
        index.dirs.contains_key(&FUSE_ROOT_ID) || store.changes() == 0 && used.is_empty(),
        Part::Header,
        "there is no root",
    )?;
    let mut links = HashMap::new();
    for record in 0..store.used(layout::NAMES_USED_AT, layout.names) {
        if store.load(store.child_at(record)) != 0 {
            take_name(store, &mut index, &mut links, record)?;
        }
    }
    for nodeid in &used {
        check_links(store, &index, &links, *nodeid)?;
    }
    check_dirs(&index.dirs)?;
    for nodeid in &used {
        if let Ok(place) = store.place(*nodeid) {
            store.trim(&mut index.blocks, place);
        }
    }
    Ok(index)
}

fn take_inode(store: &Store, index: &mut Index, slot: u32, nodeid: u64) -> Checked<()> {
    let (place, part) = (store.layout.inode(slot), Part::Inode(slot));
    let holds = |holds, what| check(holds, part, what);
    let is_root = slot == FUSE_ROOT_ID as u32;
    holds(
        nodeid as u32 == slot && (!is_root || nodeid == FUSE_ROOT_ID),
        "it has another nodeid",
    )?;
    index.inodes.mark(slot);
    let mode = store.load(place + at::MODE) as u32;
    let is_dir = mode & libc::S_IFMT == libc::S_IFDIR;
    holds(!is_root || is_dir, "the root is no directory")?;
    let known = matches!(
        mode & libc::S_IFMT,
        libc::S_IFREG
            | libc::S_IFDIR
            | libc::S_IFLNK
            | libc::S_IFCHR
            | libc::S_IFBLK
            | libc::S_IFIFO
            | libc::S_IFSOCK
    );
    holds(known, "its type is no type of a file")?;
    holds(
        store.load(place + at::SIZE) <= MOST_BYTES,
        "it is too large",
    )?;
    holds(
        store.load(place + at::LOOKUPS) < MOST_COUNTED,
        "it was looked up too often",
    )?;
    let mut walk = Walk {
        store,
        blocks: &mut index.blocks,
        part,
    };
    walk.data(store.load(place + at::DATA))?;
    walk.xattrs(store.load(place + at::XATTRS))?;
    if is_dir {
        let parent = if is_root { nodeid } else { 0 };
        index.dirs.insert(nodeid, Dir::new(parent));
    }
    Ok(())
}

/// Through the blocks of one inode.
struct Walk<'a> {
    store: &'a Store,
    blocks: &'a mut Free,
    part: Part,
}

impl Walk<'_> {
    /// The block that a word points to, which nothing else does.
    fn reach(&mut self, word: u64) -> Checked<usize> {
        let block = word as u32;
        check(
            word != 0 && word < u64::from(self.store.layout.blocks),
            self.part,
            "there is no block of a number that it has",
        )?;
        check(
            self.blocks.mark(block),
            self.part,
            "a block of it is reached twice",
        )?;
        Ok(self.store.layout.block(block))
    }

    fn data(&mut self, word: u64) -> Checked<()> {
        if word == 0 {
            return Ok(());
        }
        let (block, height) = root(word);
        check(
            height <= MOST_HEIGHT && word == root_word(block, height),
            self.part,
            "its tree of blocks is too high",
        )?;
        self.below(u64::from(block), height)
    }

    fn below(&mut self, word: u64, height: u32) -> Checked<()> {
        let node = self.reach(word)?;
        if height == 0 {
            return Ok(());
        }
        for which in 0..FAN_OUT as usize {
            let word = self.store.load(node + which * 8);
            if word != 0 {
                self.below(word, height - 1)?;
            }
        }
        Ok(())
    }

    fn xattrs(&mut self, mut word: u64) -> Checked<()> {
        while word != 0 {
            let block = self.reach(word)?;
            let lens = self.store.load(block + xattr::LENS);
            let (name, value) = (lens & 0xffff_ffff, lens >> 32);
            check(
                name <= name::MOST_BYTES as u64 && name + value <= xattr::MOST_BYTES as u64,
                self.part,
                "an extended attribute is too long",
            )?;
            word = self.store.load(block + xattr::NEXT);
        }
        Ok(())
    }
}

/// How many links an inode has in the names; of a directory, how many directories are in it.
type Links = HashMap<u64, u32>;

fn take_name(store: &Store, index: &mut Index, links: &mut Links, record: u32) -> Checked<()> {
    let holds = |holds, what| check(holds, Part::Name(record), what);
    let len = store.load(store.layout.name(record) + name::BYTES_LEN);
    let entry = store.entry(record);
    let text = entry.name.as_slice();
    let special = text.contains(&0) || text.contains(&b'/') || [&b"."[..], b".."].contains(&text);
    holds(
        len != 0 && len <= name::MOST_BYTES as u64 && !special,
        "it is no name",
    )?;
    // The first is 3, and each is two more than the number of the change before its own.
    holds(
        (3..=store.changes() + 2).contains(&entry.position),
        "its position is not that of a change",
    )?;
    holds(
        store.place(entry.child).is_ok(),
        "there is no inode of its number",
    )?;
    index.names.mark(record);
    let Some(dir) = index.dirs.get_mut(&entry.parent) else {
        return holds(false, "it is in no directory");
    };
    holds(dir.add(&entry), "it, or its position, is there twice")?;
    let Some(child) = index.dirs.get_mut(&entry.child) else {
        *links.entry(entry.child).or_default() += 1;
        return Ok(());
    };
    holds(child.parent == 0, "it is one of two names of a directory")?;
    child.parent = entry.parent;
    *links.entry(entry.parent).or_default() += 1;
    Ok(())
}

fn check_links(store: &Store, index: &Index, links: &Links, nodeid: u64) -> Checked<()> {
    let part = Part::Inode(nodeid as u32);
    let counted = links.get(&nodeid).copied().unwrap_or(0);
    let want = match index.dirs.get(&nodeid) {
        None => counted,
        Some(dir) if dir.parent == 0 => {
            check(dir.is_empty(), part, "it was removed and is not empty")?;
            0
        }
        Some(_) => 2 + counted,
    };
    let found = store.inode(nodeid).map(|inode| inode.nlink);
    check(
        found == Ok(want),
        part,
        "the number of links is another one",
    )
}

/// Every directory that was not removed is below the root.
fn check_dirs(dirs: &HashMap<u64, Dir>) -> Checked<()> {
    let mut sound = HashSet::from([FUSE_ROOT_ID]);
    for start in dirs.keys() {
        let (mut at, mut path) = (*start, HashSet::new());
        while at != 0 && !sound.contains(&at) {
            check(
                path.insert(at),
                Part::Inode(at as u32),
                "the directory is below itself",
            )?;
            at = dirs.get(&at).map_or(0, |dir| dir.parent);
        }
        sound.extend(path);
    }
    Ok(())
}
