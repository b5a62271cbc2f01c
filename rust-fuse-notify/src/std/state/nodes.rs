// SPDX-License-Identifier: GPL-2.0
//! The node table: which nodeid names which file, and how often the kernel looked it up.
//!
//! A nodeid is the number of a slot and, in its upper half, a stamp that is never given twice (short of 2^32 new
//! nodes and handles), so a slot can be used again without its old nodeid ever naming another file. The root is slot 1 with
//! stamp 0; slot 0 stays free, so that no nodeid is 0.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hashbrown::HashTable;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::header::{NODES_USED_AT, STAMP_AT};
use super::region::Region;
use super::slots::Slots;
use super::StateError;
use crate::std::message::Replay;
use crate::std::wire::FUSE_ROOT_ID;

const TABLE: &str = "node table";
/// Bytes of a slot: 16 of them are a page.
pub(super) const SLOT_LEN: usize = 256;
const SLOTS_PER_PAGE: u32 = 16;
/// A slot is the lower half of a nodeid; this bounds the mapping to 64 GiB.
pub(super) const MAX_CAPACITY: u32 = 1 << 28;
/// Free pages are given back in batches of this many (4 MiB), since a page that is used again costs a fault.
const PUNCH_BATCH: usize = 1024;

/// In a slot: 0, or the nodeid; stored last, cleared first.
const NODEID: usize = 0;
/// In a slot: the lookup count.
const LOOKUPS: usize = 8;
/// In a slot: the flags.
const FLAGS: usize = 16;
/// In a slot: the server's words.
const AUX: usize = 24;
/// In a slot: a [`Fixed`].
const FIXED: usize = 56;

/// The part of a slot that never changes while it is in use.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Fixed {
    ino: u64,
    domain: u64,
    generation: u32,
    mode: u32,
    handle_kind: i32,
    handle_len: u32,
    handle: [u8; FileHandle::MAX],
}

const _: () = assert!(FIXED + size_of::<Fixed>() <= SLOT_LEN);

/// A file handle as `name_to_handle_at(2)` gives it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FileHandle {
    kind: i32,
    len: u8,
    bytes: [u8; FileHandle::MAX],
}

impl FileHandle {
    /// Largest handle, in bytes (`MAX_HANDLE_SZ`).
    pub const MAX: usize = 128;

    /// A handle of `kind` (`handle_type`); `None` if it has more than [`FileHandle::MAX`] bytes.
    pub fn new(kind: i32, bytes: &[u8]) -> Option<FileHandle> {
        let mut all = [0; FileHandle::MAX];
        all.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(FileHandle {
            kind,
            len: bytes.len() as u8,
            bytes: all,
        })
    }

    /// `handle_type`.
    pub fn kind(&self) -> i32 {
        self.kind
    }

    /// `f_handle`.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// Flags of a node; the meaning of all but [`NodeFlags::GRAVEYARD`] is up to the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeFlags(pub u32);

impl NodeFlags {
    /// No flag.
    pub const NONE: NodeFlags = NodeFlags(0);
    /// The last link was moved to the graveyard: unlinked, but still in use.
    pub const GRAVEYARD: NodeFlags = NodeFlags(1);

    /// Whether all of `other` is set.
    pub fn contains(self, other: NodeFlags) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What a new node is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewNode {
    /// How the file is found again.
    pub handle: FileHandle,
    /// Distinguishes file systems below one root, for instance `st_dev` or a mount id; part of the key.
    pub domain: u64,
    /// Generation that is given to the kernel with the nodeid.
    pub generation: u32,
    /// Inode number that applications see.
    pub ino: u64,
    /// `st_mode`, of which the type counts.
    pub mode: u32,
    /// Flags.
    pub flags: NodeFlags,
    /// For the server; not interpreted.
    pub aux: [u64; 4],
}

/// A copy of a slot of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Id that the kernel uses; never given to another file.
    pub nodeid: u64,
    /// Lookups that the kernel has not given back.
    pub lookups: u64,
    /// What the server said when it made the node, with the flags and words as they are now.
    pub info: NewNode,
}

/// The inodes that the kernel was told of.
///
/// Everything can be called from any thread. What counts lookups or makes and frees nodes takes one lock of this
/// process for a moment; reading a node takes none.
#[derive(Debug)]
pub struct NodeTable {
    region: Arc<Region>,
    base: usize,
    capacity: u32,
    hasher: RandomState,
    inner: Mutex<Inner>,
}

fn set_bit(map: &mut Vec<u64>, slot: u32) {
    let word = (slot / 64) as usize;
    if map.len() <= word {
        map.resize(word + 1, 0);
    }
    map[word] |= 1 << (slot % 64);
}

fn has_bit(map: &[u64], slot: u32) -> bool {
    map.get((slot / 64) as usize)
        .is_some_and(|bits| bits & (1 << (slot % 64)) != 0)
}

/// What is found out again at every start.
#[derive(Debug)]
struct Inner {
    slots: Slots,
    /// Slots by file.
    index: HashTable<u32>,
    /// Slots that were confirmed in this recovery.
    confirmed: Vec<u64>,
    /// Slots that the kernel has shown in this recovery.
    shown: Vec<u64>,
    /// First slots of pages that became free and were not given back yet.
    free_pages: Vec<u32>,
}

impl NodeTable {
    pub(super) fn open(
        region: Arc<Region>,
        base: usize,
        capacity: u32,
    ) -> Result<NodeTable, StateError> {
        let table = NodeTable {
            region,
            base,
            capacity,
            hasher: RandomState::new(),
            inner: Mutex::new(Inner {
                slots: Slots::new(capacity),
                index: HashTable::new(),
                confirmed: Vec::new(),
                shown: Vec::new(),
                free_pages: Vec::new(),
            }),
        };
        let used = table.region.load(NODES_USED_AT);
        let mut end = 2;
        {
            let inner = &mut *table.inner();
            inner.slots.mark(0);
            inner.slots.mark(FUSE_ROOT_ID as u32);
            let used = u32::try_from(used).unwrap_or(u32::MAX).min(capacity);
            let mut slot = 1;
            while let Some(memory) = table.memory_from(slot).filter(|m| m.start < used) {
                for slot in memory.start.max(slot)..memory.end.min(used) {
                    if table.check(slot)? {
                        inner.slots.mark(slot);
                        table.enter(inner, slot);
                        end = slot + 1;
                    }
                }
                slot = memory.end;
            }
        }
        // What was freed at the end need not be looked at again.
        table.region.store(NODES_USED_AT, u64::from(end));
        Ok(table)
    }

    /// The next slots from `slot` on that have memory. (It may begin before it, and its last may have some in part.)
    fn memory_from(&self, slot: u32) -> Option<std::ops::Range<u32>> {
        if slot >= self.capacity {
            return None;
        }
        let bytes = self.region.next_used(self.at(slot))?;
        let slots = |bytes: usize| u32::try_from(bytes / SLOT_LEN).unwrap_or(u32::MAX);
        let first = slots(bytes.start.saturating_sub(self.base));
        let end = slots((bytes.end.saturating_sub(self.base)).next_multiple_of(SLOT_LEN));
        Some(first..end.max(first + 1))
    }

    /// Whether a slot is in use; an error if no server can have written it.
    fn check(&self, slot: u32) -> Result<bool, StateError> {
        let damaged = |what| {
            Err(StateError::Damaged {
                table: TABLE,
                slot,
                what,
            })
        };
        let nodeid = self.region.load_published(self.at(slot) + NODEID);
        if nodeid == 0 {
            return Ok(false);
        }
        if nodeid as u32 != slot || (slot == FUSE_ROOT_ID as u32) != (nodeid == FUSE_ROOT_ID) {
            return damaged("its nodeid belongs to another slot");
        }
        if nodeid >> 32 >= self.region.load(STAMP_AT) {
            return damaged("its nodeid was never given out");
        }
        let fixed: Fixed = self.region.get(self.at(slot) + FIXED);
        if fixed.handle_len as usize > FileHandle::MAX {
            return damaged("its file handle is too long");
        }
        Ok(true)
    }

    /// Puts the root (nodeid 1) in, or replaces what is said of it.
    pub fn set_root(&self, root: &NewNode) {
        let inner = &mut *self.inner();
        let slot = FUSE_ROOT_ID as u32;
        if self.region.load(self.at(slot) + NODEID) != 0 {
            if self.copy(slot, FUSE_ROOT_ID).info == *root {
                return;
            }
            self.leave(inner, slot);
            self.region.publish(self.at(slot) + NODEID, 0);
        }
        self.fill(slot, FUSE_ROOT_ID, root, 1);
        self.enter(inner, slot);
    }

    /// The node of a nodeid; `None` is what a server answers with `ESTALE`.
    pub fn get(&self, nodeid: u64) -> Option<Node> {
        let slot = self.slot_of(nodeid)?;
        let at = self.at(slot);
        if self.region.load_published(at + NODEID) != nodeid {
            return None;
        }
        let node = self.copy(slot, nodeid);
        // A slot that was freed and filled again meanwhile has another nodeid.
        self.region.still(at + NODEID, nodeid).then_some(node)
    }

    /// One lookup: finds the node of this file (by `domain` and `handle`) or makes it, and adds 1 to its count.
    /// Call it before the LOOKUP is answered. A node that is found stays as it is, whatever else `new` says.
    ///
    /// # Errors
    /// [`StateError::Full`].
    pub fn lookup(&self, new: &NewNode) -> Result<Node, StateError> {
        let inner = &mut *self.inner();
        if let Some(slot) = self.search(inner, new.domain, &new.handle) {
            let at = self.at(slot);
            let count = self.region.load(at + LOOKUPS).saturating_add(1);
            self.region.store(at + LOOKUPS, count);
            return Ok(self.copy(slot, self.region.load(at + NODEID)));
        }
        let slot = inner.slots.take().ok_or(StateError::Full {
            table: TABLE,
            capacity: self.capacity,
        })?;
        if self.region.load(NODES_USED_AT) <= u64::from(slot) {
            self.region.store(NODES_USED_AT, u64::from(slot) + 1);
        }
        let nodeid = u64::from(slot) | (self.stamp() << 32);
        self.fill(slot, nodeid, new, 1);
        self.enter(inner, slot);
        Ok(self.copy(slot, nodeid))
    }

    /// The node of a file, if there is one; counts nothing.
    pub fn find(&self, domain: u64, handle: &FileHandle) -> Option<Node> {
        let inner = self.inner();
        let slot = self.search(&inner, domain, handle)?;
        Some(self.copy(slot, self.region.load(self.at(slot) + NODEID)))
    }

    /// One more lookup of a node that is known (an outcome answered again): its new count. `None`: there is no such
    /// node.
    pub fn add_lookup(&self, nodeid: u64) -> Option<u64> {
        let _inner = self.inner();
        let at = self.known(nodeid)?;
        let count = self.region.load(at + LOOKUPS).saturating_add(1);
        self.region.store(at + LOOKUPS, count);
        Some(count)
    }

    /// FORGET: subtracts. When nothing is left the node is given back, to be cleaned up and then removed with
    /// [`NodeTable::remove`]. The root is never given back.
    pub fn forget(&self, nodeid: u64, nlookup: u64) -> Option<Node> {
        let _inner = self.inner();
        let at = self.known(nodeid)?;
        if nodeid == FUSE_ROOT_ID {
            return None;
        }
        let count = self.region.load(at + LOOKUPS).saturating_sub(nlookup);
        self.region.store(at + LOOKUPS, count);
        (count == 0).then(|| self.copy(nodeid as u32, nodeid))
    }

    /// Frees a slot if its count is still 0; `false` if it was looked up again meanwhile, is unknown, or is the
    /// root.
    pub fn remove(&self, nodeid: u64) -> bool {
        let inner = &mut *self.inner();
        let Some(at) = self.known(nodeid) else {
            return false;
        };
        if nodeid == FUSE_ROOT_ID || self.region.load(at + LOOKUPS) != 0 {
            return false;
        }
        let slot = nodeid as u32;
        self.leave(inner, slot);
        self.region.publish(at + NODEID, 0);
        inner.slots.give(slot);
        self.unconfirm(inner, slot);
        self.free_page(inner, slot / SLOTS_PER_PAGE * SLOTS_PER_PAGE);
        true
    }

    /// The node that the kernel shows, if it is known with that generation; for [`crate::std::adopt::Recover::replay`].
    ///
    /// # Errors
    /// `ESTALE`: it is not.
    pub fn replayed(&self, replay: &Replay) -> Result<Node, i32> {
        self.get(replay.nodeid)
            .filter(|node| node.info.generation == replay.generation)
            .ok_or(libc::ESTALE)
    }

    /// Begins a recovery: no node counts as confirmed any more.
    pub(crate) fn begin_replay(&self) {
        let inner = &mut *self.inner();
        inner.confirmed.clear();
        inner.shown.clear();
    }

    /// The kernel asks for it in a replay, whatever the answer is going to be.
    pub(crate) fn show(&self, nodeid: u64) {
        let inner = &mut *self.inner();
        if self.known(nodeid).is_some() {
            set_bit(&mut inner.shown, nodeid as u32);
        }
    }

    /// Whether the kernel has asked for it in this recovery.
    pub(super) fn was_shown(&self, nodeid: u64) -> bool {
        has_bit(&self.inner().shown, nodeid as u32)
    }

    /// A replay is confirmed: the count is *set*. `false`: there is no such node.
    pub(crate) fn confirm(&self, nodeid: u64, nlookup: u64) -> bool {
        let inner = &mut *self.inner();
        let Some(at) = self.known(nodeid) else {
            return false;
        };
        self.region.store(at + LOOKUPS, nlookup);
        set_bit(&mut inner.confirmed, nodeid as u32);
        true
    }

    /// Sets the count of a node that was not confirmed to 0. `false`: it was confirmed, is the root, or is gone.
    pub(super) fn disown(&self, nodeid: u64) -> bool {
        let inner = self.inner();
        let Some(at) = self.known(nodeid) else {
            return false;
        };
        if has_bit(&inner.confirmed, nodeid as u32) || nodeid == FUSE_ROOT_ID {
            return false;
        }
        self.region.store(at + LOOKUPS, 0);
        true
    }

    /// Changes the flags; `false`: there is no such node.
    pub fn set_flags(&self, nodeid: u64, set: NodeFlags, clear: NodeFlags) -> bool {
        let _inner = self.inner();
        let Some(at) = self.known(nodeid) else {
            return false;
        };
        let flags = self.region.load(at + FLAGS) & !u64::from(clear.0) | u64::from(set.0);
        self.region.store(at + FLAGS, flags);
        true
    }

    /// Changes the server's own words, each of which is stored whole; `false`: there is no such node.
    pub fn set_aux(&self, nodeid: u64, aux: [u64; 4]) -> bool {
        let _inner = self.inner();
        let Some(at) = self.known(nodeid) else {
            return false;
        };
        self.region.put(at + AUX, &aux);
        true
    }

    /// Nodes in the table, the root among them.
    pub fn len(&self) -> usize {
        self.inner().index.len()
    }

    /// Whether there is no node, not even the root.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `each` with every node, in the order of slots. `each` may use the table; what comes and goes meanwhile
    /// may or may not be seen.
    pub fn for_each(&self, mut each: impl FnMut(&Node)) {
        let end = self.inner().slots.end();
        for slot in 1..end {
            let nodeid = self.region.load_published(self.at(slot) + NODEID);
            if let Some(node) = self.get(nodeid).filter(|_| nodeid != 0) {
                each(&node);
            }
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A panic under this lock is a failed assertion of the region; the tables are as good as before.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at(&self, slot: u32) -> usize {
        self.base + slot as usize * SLOT_LEN
    }

    fn slot_of(&self, nodeid: u64) -> Option<u32> {
        let slot = nodeid as u32;
        (nodeid != 0 && slot < self.capacity).then_some(slot)
    }

    /// Offset of a slot that is in use under this nodeid; the caller holds the lock.
    fn known(&self, nodeid: u64) -> Option<usize> {
        let at = self.at(self.slot_of(nodeid)?);
        (self.region.load(at + NODEID) == nodeid).then_some(at)
    }

    /// 32 bits that no other node has; never 0, which is the root's.
    fn stamp(&self) -> u64 {
        loop {
            let stamp = self.region.next(STAMP_AT) & 0xffff_ffff;
            if stamp != 0 {
                return stamp;
            }
        }
    }

    fn fill(&self, slot: u32, nodeid: u64, new: &NewNode, lookups: u64) {
        let at = self.at(slot);
        let fixed = Fixed {
            ino: new.ino,
            domain: new.domain,
            generation: new.generation,
            mode: new.mode,
            handle_kind: new.handle.kind,
            handle_len: u32::from(new.handle.len),
            handle: new.handle.bytes,
        };
        self.region.put(at + FIXED, &fixed);
        self.region.put(at + AUX, &new.aux);
        self.region.store(at + FLAGS, u64::from(new.flags.0));
        self.region.store(at + LOOKUPS, lookups);
        self.region.publish(at + NODEID, nodeid);
    }

    fn copy(&self, slot: u32, nodeid: u64) -> Node {
        let at = self.at(slot);
        let fixed: Fixed = self.region.get(at + FIXED);
        Node {
            nodeid,
            lookups: self.region.load(at + LOOKUPS),
            info: NewNode {
                handle: handle_of(&fixed),
                domain: fixed.domain,
                generation: fixed.generation,
                ino: fixed.ino,
                mode: fixed.mode,
                flags: NodeFlags(self.region.load(at + FLAGS) as u32),
                aux: self.region.get(at + AUX),
            },
        }
    }

    fn key(&self, slot: u32) -> (u64, FileHandle) {
        let fixed: Fixed = self.region.get(self.at(slot) + FIXED);
        (fixed.domain, handle_of(&fixed))
    }

    fn search(&self, inner: &Inner, domain: u64, handle: &FileHandle) -> Option<u32> {
        let key = (domain, *handle);
        inner
            .index
            .find(self.hasher.hash_one(key), |slot| self.key(*slot) == key)
            .copied()
    }

    fn enter(&self, inner: &mut Inner, slot: u32) {
        let rehash = |slot: &u32| self.hasher.hash_one(self.key(*slot));
        inner.index.insert_unique(rehash(&slot), slot, rehash);
    }

    fn leave(&self, inner: &mut Inner, slot: u32) {
        let hash = self.hasher.hash_one(self.key(slot));
        if let Ok(entry) = inner.index.find_entry(hash, |other| *other == slot) {
            entry.remove();
        }
        if inner.index.capacity() > 4096 && inner.index.len() < inner.index.capacity() / 8 {
            let wanted = inner.index.len() * 2;
            inner
                .index
                .shrink_to(wanted, |slot| self.hasher.hash_one(self.key(*slot)));
        }
    }

    fn unconfirm(&self, inner: &mut Inner, slot: u32) {
        for map in [&mut inner.confirmed, &mut inner.shown] {
            if let Some(bits) = map.get_mut((slot / 64) as usize) {
                *bits &= !(1 << (slot % 64));
            }
        }
    }

    /// Remembers a page that became free; gives the remembered ones back when there are many.
    fn free_page(&self, inner: &mut Inner, first: u32) {
        if !inner.slots.is_group_free(first) {
            return;
        }
        inner.free_pages.push(first);
        if inner.free_pages.len() < PUNCH_BATCH {
            return;
        }
        let mut pages = std::mem::take(&mut inner.free_pages);
        pages.retain(|first| inner.slots.is_group_free(*first));
        pages.sort_unstable();
        pages.dedup();
        for run in pages.chunk_by(|a, b| *b == a + SLOTS_PER_PAGE) {
            let len = run.len() * SLOT_LEN * SLOTS_PER_PAGE as usize;
            if let Err(error) = self.region.punch(self.at(run[0]), len) {
                // Memory is kept that could be given back; nothing else is wrong.
                tracing::debug!(%error, "punching a hole into the node table");
                return;
            }
        }
    }
}

fn handle_of(fixed: &Fixed) -> FileHandle {
    // `check` has seen the length at start and `fill` wrote the others; the minimum is against other processes.
    let len = fixed.handle_len.min(FileHandle::MAX as u32) as u8;
    FileHandle {
        kind: fixed.handle_kind,
        len,
        bytes: fixed.handle,
    }
}
