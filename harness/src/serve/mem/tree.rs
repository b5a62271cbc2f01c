// SPDX-License-Identifier: GPL-2.0
//! The tree: what the arena holds, what is found out about it at the start, and who may look or change.
//!
//! One lock: many read, or one changes. What a change needs is prepared in free records and blocks; one commit makes it
//! happen; then the index follows.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::errno::Errno;
use rust_fuse_notify::std::state::State;
use rust_fuse_notify::std::wire::FUSE_ROOT_ID;

use super::check::take_stock;
use super::error::{Checked, TreeError};
use super::free::Free;
use super::inode::{Inode, Time};
use super::layout::{inode as at, INODES_USED_AT, NAMES_USED_AT};
use super::names::{valid, Dir, Entry};
use super::store::{Change, Res, Store};

pub struct Tree {
    pub store: Store,
    index: RwLock<Index>,
}

/// What is not stored, for it can be found out.
pub struct Index {
    pub inodes: Free,
    pub names: Free,
    pub blocks: Free,
    /// By nodeid.
    pub dirs: HashMap<u64, Dir>,
    /// Shown in the replay that is under way.
    pub confirmed: HashSet<u64>,
}

impl Tree {
    pub fn open(state: Arc<State>) -> Checked<Tree> {
        let store = Store::open(state)?;
        let index = take_stock(&store)?;
        let tree = Tree {
            store,
            index: RwLock::new(index),
        };
        tree.make_root().map_err(TreeError::Memory)?;
        Ok(tree)
    }

    pub fn reading(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn changing(&self) -> RwLockWriteGuard<'_, Index> {
        // Whoever panicked with it leaves records that nothing points to.
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn make_root(&self) -> Res<()> {
        let index = &mut *self.changing();
        if index.dirs.contains_key(&FUSE_ROOT_ID) {
            return Ok(());
        }
        let place = self.store.layout.inode(FUSE_ROOT_ID as u32);
        self.store.reserve(place, at::LEN)?;
        self.store.will_use(INODES_USED_AT, FUSE_ROOT_ID as u32);
        let now = Time::now();
        let root = Inode {
            nodeid: FUSE_ROOT_ID,
            mode: libc::S_IFDIR | 0o755,
            nlink: 2,
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            size: 0,
            rdev: 0,
            times: [now; 3],
        };
        self.store.fill(place, &root);
        self.store.publish(place + at::NODEID, FUSE_ROOT_ID);
        index.dirs.insert(FUSE_ROOT_ID, Dir::new(FUSE_ROOT_ID));
        Ok(())
    }

    /// Finds a name and counts the lookup.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Res<Inode> {
        let index = self.changing();
        let entry = self.find(&index, parent, valid(name)?)?;
        self.count(entry.child)
    }

    pub fn find(&self, index: &Index, parent: u64, name: &[u8]) -> Res<Entry> {
        let record = self.dir(index, parent)?.find(name).ok_or(Errno::ENOENT)?;
        Ok(self.store.entry(record))
    }

    pub fn dir<'a>(&self, index: &'a Index, nodeid: u64) -> Res<&'a Dir> {
        match index.dirs.get(&nodeid) {
            Some(dir) => Ok(dir),
            None => self.store.place(nodeid).and(Err(Errno::ENOTDIR)),
        }
    }

    /// One lookup more; the caller holds the lock for changes.
    pub fn count(&self, nodeid: u64) -> Res<Inode> {
        let place = self.store.place(nodeid)?;
        let lookups = self.store.load(place + at::LOOKUPS);
        self.store.store(place + at::LOOKUPS, lookups + 1);
        self.store.inode(nodeid)
    }

    /// The kernel gives lookups back. A file without a name goes with the last one.
    pub fn forget(&self, nodeid: u64, lookups: u64) {
        let mut index = self.changing();
        let Ok(place) = self.store.place(nodeid) else {
            return;
        };
        let left = self.store.load(place + at::LOOKUPS).saturating_sub(lookups);
        self.store.store(place + at::LOOKUPS, left);
        self.drop_if_unused(&mut index, nodeid);
    }

    /// Frees an inode that has neither a name nor a lookup.
    pub fn drop_if_unused(&self, index: &mut Index, nodeid: u64) {
        let (Ok(place), Ok(inode)) = (self.store.place(nodeid), self.store.inode(nodeid)) else {
            return;
        };
        let unused = inode.nlink == 0 && self.store.load(place + at::LOOKUPS) == 0;
        if !unused || nodeid == FUSE_ROOT_ID {
            return;
        }
        // One store: from now on nothing points to its blocks.
        self.store.publish(place + at::NODEID, 0);
        let blocks = &mut index.blocks;
        self.store
            .each_block(place, &mut |block| blocks.give(block));
        self.store
            .each_xattr(place, &mut |block, _| blocks.give(block));
        index.inodes.give(nodeid as u32);
        index.dirs.remove(&nodeid);
    }

    /// A free inode record, and the nodeid that its file will have.
    pub fn new_inode(&self, index: &mut Index) -> Res<(usize, u64)> {
        let slot = index.inodes.take().ok_or(Errno::ENOSPC)?;
        let place = self.store.layout.inode(slot);
        if let Err(e) = self.store.reserve(place, at::LEN) {
            index.inodes.give(slot);
            return Err(e);
        }
        // Of a damaged tree something may be left behind what was used.
        self.store.clear(place + at::NODEID, 8);
        self.store.will_use(INODES_USED_AT, slot);
        // The number of the change that makes it valid: no other file has it (short of 2^32 changes).
        let stamp = (self.store.changes() + 1) & 0xffff_ffff;
        Ok((place, u64::from(slot) | stamp << 32))
    }

    /// A free record of a name in `parent`, filled; the change has yet to say what has the name.
    pub fn new_entry(&self, index: &mut Index, parent: u64, name: &[u8]) -> Res<Entry> {
        let record = index.names.take().ok_or(Errno::ENOSPC)?;
        let place = self.store.layout.name(record);
        if let Err(e) = self.store.reserve(place, super::layout::name::LEN) {
            index.names.give(record);
            return Err(e);
        }
        self.store.clear(self.store.child_at(record), 8);
        self.store.will_use(NAMES_USED_AT, record);
        let entry = Entry {
            record,
            child: 0,
            parent,
            // Positions 0 to 2 are the start, and behind the two that every directory has.
            position: self.store.changes() + 3,
            name: name.to_vec(),
        };
        self.store.fill_entry(&entry);
        Ok(entry)
    }

    /// The kernel has asked for everything that it knows: what it does not know has no lookups.
    pub fn settle(&self) -> u64 {
        let mut index = self.changing();
        let mut gone = 0;
        for slot in 1..self.store.used(INODES_USED_AT, self.store.layout.inodes) {
            let place = self.store.layout.inode(slot);
            let nodeid = self.store.load(place + at::NODEID);
            if nodeid == 0 || nodeid == FUSE_ROOT_ID || index.confirmed.contains(&nodeid) {
                continue;
            }
            if self.store.load(place + at::LOOKUPS) != 0 {
                self.store.store(place + at::LOOKUPS, 0);
            }
            self.drop_if_unused(&mut index, nodeid);
            gone += u64::from(self.store.place(nodeid).is_err());
        }
        index.confirmed.clear();
        gone
    }
}

/// A change, and whose times are new with it.
impl Tree {
    /// A directory has changed now.
    pub fn touch_dir(&self, change: &mut Change, nodeid: u64) -> Res<()> {
        self.store.touch(change, self.store.place(nodeid)?);
        Ok(())
    }
}
