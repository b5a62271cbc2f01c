// SPDX-License-Identifier: GPL-2.0
//! The handle table: every `fh` that was given out, so that the next instance can open the file again.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::header::{HANDLES_USED_AT, STAMP_AT};
use super::region::Region;
use super::slots::Slots;
use super::StateError;
use crate::std::wire::original_id;

const TABLE: &str = "handle table";
/// Bytes of a slot.
pub(super) const SLOT_LEN: usize = 64;
/// A slot is the lower half of an `fh`.
pub(super) const MAX_CAPACITY: u32 = 1 << 28;

/// In a slot: 0, or the `fh`; stored last, cleared first.
const FH: usize = 0;
/// In a slot: a [`Fixed`].
const FIXED: usize = 8;

/// A slot while it is in use.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Fixed {
    nodeid: u64,
    flags: i32,
    kind: u32,
    opener: u64,
    aux: [u64; 2],
}

const _: () = assert!(FIXED + size_of::<Fixed>() <= SLOT_LEN);

/// What a handle is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandleKind {
    /// OPEN or CREATE.
    File,
    /// OPENDIR.
    Directory,
}

/// What a new handle is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewHandle {
    /// The file.
    pub nodeid: u64,
    /// `O_*` flags as the server will open the file again.
    pub flags: i32,
    /// Of what.
    pub kind: HandleKind,
    /// `unique` or original id of the request that opens it, so that a resend finds it again; 0: not kept.
    pub opener: u64,
    /// For the server; not interpreted.
    pub aux: [u64; 2],
}

/// A copy of a slot of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle {
    /// What the kernel was given.
    pub fh: u64,
    /// What the server said when it made the handle.
    pub info: NewHandle,
}

/// The open files and directories.
#[derive(Debug)]
pub struct HandleTable {
    region: Arc<Region>,
    base: usize,
    capacity: u32,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    slots: Slots,
    /// Nodeid and `fh`: a file may be open a hundred thousand times.
    by_node: BTreeSet<(u64, u64)>,
    /// By original id of the OPEN; only those of earlier instances, since only their answers can be missing.
    by_opener: HashMap<u64, u64>,
}

impl HandleTable {
    pub(super) fn open(
        region: Arc<Region>,
        base: usize,
        capacity: u32,
    ) -> Result<HandleTable, StateError> {
        let table = HandleTable {
            region,
            base,
            capacity,
            inner: Mutex::new(Inner {
                slots: Slots::new(capacity),
                by_node: BTreeSet::new(),
                by_opener: HashMap::new(),
            }),
        };
        let used = table.region.load(HANDLES_USED_AT);
        let mut end = 0;
        {
            let inner = &mut *table.inner();
            for slot in 0..u32::try_from(used).unwrap_or(u32::MAX).min(capacity) {
                let Some(handle) = table.check(slot)? else {
                    continue;
                };
                inner.slots.mark(slot);
                inner.by_node.insert((handle.info.nodeid, handle.fh));
                if handle.info.opener != 0 {
                    inner.by_opener.insert(handle.info.opener, handle.fh);
                }
                end = slot + 1;
            }
        }
        table.region.store(HANDLES_USED_AT, u64::from(end));
        Ok(table)
    }

    fn check(&self, slot: u32) -> Result<Option<Handle>, StateError> {
        let damaged = |what| {
            Err(StateError::Damaged {
                table: TABLE,
                slot,
                what,
            })
        };
        let fh = self.region.load_published(self.at(slot) + FH);
        if fh == 0 {
            return Ok(None);
        }
        if fh as u32 != slot {
            return damaged("its handle belongs to another slot");
        }
        if fh >> 32 == 0 || fh >> 32 >= self.region.load(STAMP_AT) {
            return damaged("its handle was never given out");
        }
        let fixed: Fixed = self.region.get(self.at(slot) + FIXED);
        if fixed.kind > 1 {
            return damaged("it is neither of a file nor of a directory");
        }
        Ok(Some(self.copy(slot, fh)))
    }

    /// Gives out an `fh`, never 0 and never given before. Call it before the OPEN is answered.
    ///
    /// # Errors
    /// [`StateError::Full`].
    pub fn insert(&self, new: &NewHandle) -> Result<u64, StateError> {
        let inner = &mut *self.inner();
        let slot = inner.slots.take().ok_or(StateError::Full {
            table: TABLE,
            capacity: self.capacity,
        })?;
        if self.region.load(HANDLES_USED_AT) <= u64::from(slot) {
            self.region.store(HANDLES_USED_AT, u64::from(slot) + 1);
        }
        let mut stamp = 0;
        while stamp == 0 {
            stamp = self.region.next(STAMP_AT) & 0xffff_ffff;
        }
        let fh = u64::from(slot) | (stamp << 32);
        let fixed = Fixed {
            nodeid: new.nodeid,
            flags: new.flags,
            kind: u32::from(new.kind == HandleKind::Directory),
            opener: original_id(new.opener),
            aux: new.aux,
        };
        self.region.put(self.at(slot) + FIXED, &fixed);
        self.region.publish(self.at(slot) + FH, fh);
        inner.by_node.insert((new.nodeid, fh));
        Ok(fh)
    }

    /// The handle of an `fh`; `None` is what a server answers with `EBADF`.
    pub fn get(&self, fh: u64) -> Option<Handle> {
        let at = self.known(fh)?;
        let handle = self.copy(fh as u32, fh);
        self.region.still(at + FH, fh).then_some(handle)
    }

    /// Frees the slot; `None`: it was free. At RELEASE call `State::release`, which also tells of a node that nobody has any more.
    pub fn remove(&self, fh: u64) -> Option<Handle> {
        let inner = &mut *self.inner();
        let at = self.known(fh)?;
        let handle = self.copy(fh as u32, fh);
        self.region.publish(at + FH, 0);
        inner.slots.give(fh as u32);
        inner.by_node.remove(&(handle.info.nodeid, fh));
        if inner.by_opener.get(&handle.info.opener) == Some(&fh) {
            inner.by_opener.remove(&handle.info.opener);
        }
        Some(handle)
    }

    /// The handle that a request with this id opened for an earlier instance. Ask for resent OPENs: the answer did
    /// not arrive, so the handle is to be given again instead of a new one.
    pub fn opened_by(&self, unique: u64) -> Option<Handle> {
        let fh = *self.inner().by_opener.get(&original_id(unique))?;
        self.get(fh)
    }

    /// The handles of a node.
    pub fn of_node(&self, nodeid: u64) -> Vec<Handle> {
        let of_it = (nodeid, 0)..=(nodeid, u64::MAX);
        let fhs: Vec<u64> = self
            .inner()
            .by_node
            .range(of_it)
            .map(|(_, fh)| *fh)
            .collect();
        fhs.into_iter().filter_map(|fh| self.get(fh)).collect()
    }

    /// Handles in the table.
    pub fn len(&self) -> usize {
        self.inner().slots.live()
    }

    /// Whether nothing is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `each` with every handle, in the order of slots. `each` may use the table.
    pub fn for_each(&self, mut each: impl FnMut(&Handle)) {
        let end = self.inner().slots.end();
        for slot in 0..end {
            let fh = self.region.load_published(self.at(slot) + FH);
            if let Some(handle) = self.get(fh) {
                each(&handle);
            }
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at(&self, slot: u32) -> usize {
        self.base + slot as usize * SLOT_LEN
    }

    /// Offset of a slot that is in use under this `fh`.
    fn known(&self, fh: u64) -> Option<usize> {
        let slot = fh as u32;
        if fh == 0 || slot >= self.capacity {
            return None;
        }
        let at = self.at(slot);
        (self.region.load_published(at + FH) == fh).then_some(at)
    }

    fn copy(&self, slot: u32, fh: u64) -> Handle {
        let fixed: Fixed = self.region.get(self.at(slot) + FIXED);
        let kind = if fixed.kind == 0 {
            HandleKind::File
        } else {
            HandleKind::Directory
        };
        Handle {
            fh,
            info: NewHandle {
                nodeid: fixed.nodeid,
                flags: fixed.flags,
                kind,
                opener: fixed.opener,
                aux: fixed.aux,
            },
        }
    }
}
