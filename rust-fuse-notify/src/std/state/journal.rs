// SPDX-License-Identifier: GPL-2.0
//! The journal: what makes an operation take effect exactly once.
//!
//! An entry is a slot of the memfd and goes through these states, each entered by one store of its first word,
//! which holds the state and the original id of the request:
//!
//! ```text
//! empty --begin--> intent --outcome--> outcome --done--> empty
//!   |                `-----cancel----------------------> empty
//!   `----record----------------------> outcome
//! ```
//!
//! A server that is killed while it holds an *intent* does not know whether it executed the operation; the next
//! instance finds that out ([`Journal::unresolved`]) before it answers anything. An *outcome* is answered again when
//! the request is resent; if the kernel has the answer already it is just left over, and goes when the report says
//! that its id is not owed.
//!
//! # No locks
//!
//! Each thread has a slot of its own, which it finds free unless an earlier instance left something in it (then it
//! takes another). Who may write a slot is said by one byte in process memory, taken and given back with one atomic
//! operation each; that byte is the only thing that threads contend for, and they do not, having different ones. What
//! is slow is what is rare: looking for the entry of a resent request reads the first word of every slot ever used.

use std::cell::Cell;
use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::header::DISCARDED_BELOW_AT;
use super::journal_error::JournalError;
use super::record::{self, Intent, IntentRecord, Outcome, Recorded};
use super::region::Region;
use super::StateError;
use crate::std::wire::{original_id, FUSE_UNIQUE_RESEND};

const TABLE: &str = "journal";
pub(super) use super::record::SLOT_LEN;
pub(super) const MAX_CAPACITY: u32 = 1 << 20;

/// States of an entry, in the lowest byte of its first word; the id is above.
const EMPTY: u64 = 0;
const INTENT: u64 = 1;
const OUTCOME: u64 = 2;

/// Nobody uses the slot; it is empty.
const FREE: u8 = 0;
/// A guard uses it.
const HELD: u8 = 1;
/// It has an entry that no guard holds.
const LEFT: u8 = 2;

thread_local! {
    /// The number of this thread, from 1 on; 0: it has none yet.
    static WORKER: Cell<u32> = const { Cell::new(0) };
}

/// In a cache line of its own.
#[derive(Debug)]
#[repr(align(64))]
struct Owner(AtomicU8);

/// Which slot a thread tries first.
pub(super) fn worker() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    if WORKER.get() == 0 {
        WORKER.set(NEXT.fetch_add(1, Ordering::Relaxed).max(1));
    }
    WORKER.get() - 1
}

/// The operations that must not be executed twice.
#[derive(Debug)]
pub struct Journal {
    region: Arc<Region>,
    base: usize,
    capacity: u32,
    /// Who may write each slot.
    owners: Box<[Owner]>,
    /// Entries that no guard holds.
    left: AtomicU32,
    /// One more than the highest slot that was ever used.
    used: AtomicU32,
    /// Outcomes with a smaller id are not owed for sure: what may be evicted.
    not_owed_below: AtomicU64,
    /// Nodes that evicted outcomes named.
    orphans: Mutex<Vec<u64>>,
}

impl Journal {
    /// Longest name, in bytes.
    pub const MAX_NAME: usize = record::MAX_NAME;
    /// Longest state before, in bytes.
    pub const MAX_BEFORE: usize = record::MAX_BEFORE;
    /// Longest payload of an outcome, in bytes.
    pub const MAX_PAYLOAD: usize = record::MAX_PAYLOAD;

    pub(super) fn open(
        region: Arc<Region>,
        base: usize,
        capacity: u32,
    ) -> Result<Journal, StateError> {
        let journal = Journal {
            region,
            base,
            capacity,
            owners: (0..capacity).map(|_| Owner(AtomicU8::new(FREE))).collect(),
            left: AtomicU32::new(0),
            used: AtomicU32::new(0),
            // Without a report nobody knows what is owed; the oldest are the least likely to be.
            not_owed_below: AtomicU64::new(u64::MAX),
            orphans: Mutex::default(),
        };
        let mut ids = HashSet::new();
        for slot in 0..capacity {
            let Some(id) = journal.check(slot)? else {
                continue;
            };
            if !ids.insert(id) {
                return Err(StateError::Damaged {
                    table: TABLE,
                    slot,
                    what: "its request has another entry",
                });
            }
            journal.owners[slot as usize]
                .0
                .store(LEFT, Ordering::Relaxed);
            journal.left.fetch_add(1, Ordering::Relaxed);
            journal.used.store(slot + 1, Ordering::Relaxed);
        }
        Ok(journal)
    }

    /// The id of a slot's entry, if it has one; an error if no server can have written it.
    fn check(&self, slot: u32) -> Result<Option<u64>, StateError> {
        let damaged = |what| {
            Err(StateError::Damaged {
                table: TABLE,
                slot,
                what,
            })
        };
        let at = self.at(slot);
        let word = self.region.load_published(at);
        let id = word >> 8;
        let readable = match word & 0xff {
            EMPTY if word == 0 => return Ok(None),
            INTENT => record::read_intent(&self.region, at, id).is_some(),
            OUTCOME => record::read_outcome(&self.region, at).is_some(),
            _ => return damaged("its state is none"),
        };
        if !readable || id == 0 || id != original_id(id) {
            return damaged("its entry cannot be read");
        }
        Ok(Some(id))
    }

    /// Enters an operation, before anything of it is executed. `unique` is that of the request (resent or not).
    ///
    /// When no slot is free the leftover outcome with the lowest id goes, unless it may be owed; an intent never does.
    ///
    /// # Errors
    /// [`JournalError`]; nothing was entered.
    pub fn begin(&self, unique: u64, intent: &Intent<'_>) -> Result<Slot<'_>, JournalError> {
        if intent.before.len() > Self::MAX_BEFORE {
            return Err(JournalError::TooLong {
                what: "the state before",
                max: Self::MAX_BEFORE,
            });
        }
        if !record::fits(intent) {
            return Err(JournalError::TooLong {
                what: "a name",
                max: Self::MAX_NAME,
            });
        }
        let slot = self.take(unique)?;
        record::write_intent(&self.region, self.at(slot.slot), intent);
        self.region
            .publish(self.at(slot.slot), slot.id << 8 | INTENT);
        Ok(slot)
    }

    /// Enters how an operation ended that needed no intent, since it may be executed again as long as it has no
    /// outcome (a copy, say, whose source may change once it is answered).
    ///
    /// # Errors
    /// [`JournalError`]; nothing was entered.
    pub fn record(&self, unique: u64, outcome: &Outcome) -> Result<Slot<'_>, JournalError> {
        check_outcome(outcome)?;
        let slot = self.take(unique)?;
        record::write_outcome(&self.region, self.at(slot.slot), outcome);
        self.region
            .publish(self.at(slot.slot), slot.id << 8 | OUTCOME);
        Ok(slot)
    }

    /// An empty slot for a request that has no entry. Nothing of it is valid yet.
    fn take(&self, unique: u64) -> Result<Slot<'_>, JournalError> {
        let id = original_id(unique);
        if id == 0 {
            return Err(JournalError::NoId);
        }
        self.saw_request(unique);
        // The id of a request that was never sent before is new.
        let may_be_known =
            unique & FUSE_UNIQUE_RESEND != 0 || self.left.load(Ordering::Acquire) != 0;
        if may_be_known && self.find(id).is_some() {
            return Err(JournalError::Known { id });
        }
        let slot = match self.claim() {
            Some(slot) => slot,
            None => self.evict().ok_or(JournalError::Full {
                capacity: self.capacity,
            })?,
        };
        self.used.fetch_max(slot + 1, Ordering::AcqRel);
        Ok(Slot {
            journal: self,
            id,
            slot,
        })
    }

    /// A free slot, this thread's own if possible.
    fn claim(&self) -> Option<u32> {
        let first = worker() % self.capacity;
        (first..self.capacity).chain(0..first).find(|slot| {
            let owner = &self.owners[*slot as usize].0;
            owner
                .compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        })
    }

    /// What is known of a request; ask for resent ones, and answer an outcome without executing anything.
    ///
    /// After [`super::State::discard`] a request that the dead server had read, and of which nothing is known, has
    /// the outcome `EIO`: it may have been executed or not.
    pub fn lookup(&self, unique: u64) -> Option<Recorded> {
        let id = original_id(unique);
        self.saw_request(unique);
        let found = self.find(id).and_then(|slot| self.recorded(id, slot));
        if found.is_none() && self.is_lost(unique) {
            return Some(Recorded::Outcome(Err(libc::EIO)));
        }
        found
    }

    /// Whether nobody knows any more if a request was executed.
    fn is_lost(&self, unique: u64) -> bool {
        unique & FUSE_UNIQUE_RESEND != 0
            && original_id(unique) < self.region.load(DISCARDED_BELOW_AT)
    }

    /// On a kernel that replays nothing the first request that is new tells which ones a dead server had read: those
    /// before it, as requests are read in the order of their ids.
    fn saw_request(&self, unique: u64) {
        let new = unique & FUSE_UNIQUE_RESEND == 0 && unique != 0;
        if new && self.region.load(DISCARDED_BELOW_AT) == u64::MAX {
            self.region.publish(DISCARDED_BELOW_AT, original_id(unique));
        }
    }

    /// The slot of a request that is known, to [`Slot::done`] it once its outcome is answered again. `None`: it has
    /// none, or another thread has it.
    pub fn resume(&self, unique: u64) -> Option<Slot<'_>> {
        let id = original_id(unique);
        let slot = self.find(id)?;
        self.seize(slot).then_some(Slot {
            journal: self,
            id,
            slot,
        })
    }

    /// Takes a leftover entry.
    fn seize(&self, slot: u32) -> bool {
        let owner = &self.owners[slot as usize].0;
        let seized = owner
            .compare_exchange(LEFT, HELD, Ordering::Acquire, Ordering::Relaxed)
            .is_ok();
        if seized {
            self.left.fetch_sub(1, Ordering::Release);
        }
        seized
    }

    /// Every intent without an outcome, lowest id first: at start-up each is to be resolved with [`Journal::resume`]
    /// and [`Slot::outcome`] (found done, or finished) or [`Slot::cancel`] (not done, or undone).
    pub fn unresolved(&self) -> Vec<IntentRecord> {
        let intents =
            self.entries()
                .into_iter()
                .filter_map(|(id, slot)| match self.recorded(id, slot)? {
                    Recorded::Intent(intent) => Some(intent),
                    Recorded::Outcome(_) => None,
                });
        intents.collect()
    }

    /// Drops every leftover outcome whose id is smaller; `None`, nothing is owed, drops all of them. Returns how many.
    /// None of those that stay is evicted from now on.
    pub fn drop_below(&self, lowest_owed: Option<u64>) -> u64 {
        let below = lowest_owed.map_or(u64::MAX, original_id);
        self.not_owed_below.store(below, Ordering::Relaxed);
        let mut dropped = 0;
        for (id, slot) in self.entries() {
            let word = self.region.load_published(self.at(slot));
            if id < below && word == id << 8 | OUTCOME && self.seize(slot) {
                self.orphan(id, slot);
                self.release(slot);
                dropped += 1;
            }
        }
        dropped
    }

    /// Entries, in whatever state.
    pub fn len(&self) -> usize {
        self.entries().len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Nodes that outcomes name.
    pub(super) fn nodes_named(&self) -> HashSet<u64> {
        let named =
            self.entries()
                .into_iter()
                .filter_map(|(id, slot)| match self.recorded(id, slot)? {
                    Recorded::Outcome(Ok(success)) => Some(success.nodeid),
                    _ => None,
                });
        named.collect()
    }

    /// Nodes that outcomes named which were evicted since the last call.
    pub(super) fn take_orphans(&self) -> Vec<u64> {
        std::mem::take(&mut *self.orphans())
    }

    /// Id and slot of every entry, lowest id first.
    fn entries(&self) -> Vec<(u64, u32)> {
        let used = self.used.load(Ordering::Acquire);
        let mut entries: Vec<(u64, u32)> = (0..used)
            .map(|slot| (self.region.load_published(self.at(slot)) >> 8, slot))
            .filter(|(id, _)| *id != 0)
            .collect();
        entries.sort_unstable();
        entries
    }

    fn find(&self, id: u64) -> Option<u32> {
        let used = self.used.load(Ordering::Acquire);
        (0..used).find(|slot| id != 0 && self.region.load_published(self.at(*slot)) >> 8 == id)
    }

    fn recorded(&self, id: u64, slot: u32) -> Option<Recorded> {
        let at = self.at(slot);
        let word = self.region.load_published(at);
        let recorded = match word & 0xff {
            INTENT => Recorded::Intent(record::read_intent(&self.region, at, id)?),
            OUTCOME => Recorded::Outcome(record::read_outcome(&self.region, at)?),
            _ => return None,
        };
        (word >> 8 == id && self.region.still(at, word)).then_some(recorded)
    }

    /// Empties the slot of the leftover outcome with the lowest id, if there is one that is not owed; the caller has
    /// it then.
    fn evict(&self) -> Option<u32> {
        let below = self.not_owed_below.load(Ordering::Relaxed);
        for (id, slot) in self.entries() {
            let word = self.region.load_published(self.at(slot));
            if id < below && word == id << 8 | OUTCOME && self.seize(slot) {
                self.orphan(id, slot);
                self.region.publish(self.at(slot), EMPTY);
                return Some(slot);
            }
        }
        None
    }

    /// Remembers the node that an outcome names which is about to go.
    fn orphan(&self, id: u64, slot: u32) {
        if let Some(Recorded::Outcome(Ok(success))) = self.recorded(id, slot) {
            let mut orphans = self.orphans();
            // A server that never asks for them must not pay for it; the next recovery finds them anyway.
            if success.nodeid != 0 && orphans.len() < self.capacity as usize {
                orphans.push(success.nodeid);
            }
        }
    }

    /// Empties a slot that the caller has, and gives it back.
    fn release(&self, slot: u32) {
        self.region.publish(self.at(slot), EMPTY);
        self.owners[slot as usize].0.store(FREE, Ordering::Release);
    }

    fn orphans(&self) -> MutexGuard<'_, Vec<u64>> {
        self.orphans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at(&self, slot: u32) -> usize {
        self.base + slot as usize * SLOT_LEN
    }
}

fn check_outcome(outcome: &Outcome) -> Result<(), JournalError> {
    match outcome {
        Ok(success) if success.payload.len() > Journal::MAX_PAYLOAD => Err(JournalError::TooLong {
            what: "the payload",
            max: Journal::MAX_PAYLOAD,
        }),
        _ => Ok(()),
    }
}

/// The entry of one operation.
///
/// Dropping the guard forgets nothing: an outcome is answered again if its request is resent, and an intent (the
/// operation panicked half way, say) is for the next instance to resolve.
#[derive(Debug)]
pub struct Slot<'a> {
    journal: &'a Journal,
    id: u64,
    slot: u32,
}

impl Slot<'_> {
    /// Original id of the request.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Enters how it ended, before it is answered.
    ///
    /// # Errors
    /// [`JournalError::TooLong`]; the entry is as it was.
    pub fn outcome(&mut self, outcome: &Outcome) -> Result<(), JournalError> {
        check_outcome(outcome)?;
        let (region, at) = (&self.journal.region, self.journal.at(self.slot));
        // An outcome that is replaced must not be read half old, half new.
        if region.load_published(at) != self.id << 8 | INTENT {
            return Err(JournalError::Lost { id: self.id });
        }
        record::write_outcome(region, at, outcome);
        region.publish(at, self.id << 8 | OUTCOME);
        Ok(())
    }

    /// It was answered: forgets it.
    pub fn done(self) {
        self.forget();
    }

    /// It was not executed, or undone: forgets it, a resend executes it.
    pub fn cancel(self) {
        self.forget();
    }

    fn forget(self) {
        self.journal.release(self.slot);
        // Nothing is left for drop to do.
        std::mem::forget(self);
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let journal = self.journal;
        let owner = &journal.owners[self.slot as usize].0;
        if journal.region.load(journal.at(self.slot)) == EMPTY {
            // Taken, and never filled.
            owner.store(FREE, Ordering::Release);
            return;
        }
        journal.left.fetch_add(1, Ordering::Release);
        owner.store(LEFT, Ordering::Release);
    }
}
