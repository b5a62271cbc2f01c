// SPDX-License-Identifier: GPL-2.0
//! The journal: what makes an operation take effect exactly once.
//!
//! An entry is a slot of the memfd and goes through these states, each entered by one store of its first word,
//! which holds the state and the original id of the request:
//!
//! ```text
//! empty --begin--> intent --outcome--> outcome --done--> empty
//!                    `-----cancel----------------------> empty
//! ```
//!
//! A server that is killed while it holds an *intent* does not know whether it executed the operation; the next
//! instance finds that out ([`Journal::unresolved`]) before it answers anything. An *outcome* is answered again when
//! the request is resent; if the kernel has the answer already it is just left over, and goes when the report says
//! that its id is not owed, or when the journal needs the slot.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::record::{self, Intent, IntentRecord, Outcome, Recorded};
use super::region::Region;
use super::slots::Slots;
use super::StateError;
use crate::std::wire::original_id;

const TABLE: &str = "journal";
pub(super) use super::record::SLOT_LEN;
pub(super) const MAX_CAPACITY: u32 = 1 << 20;

const EMPTY: u64 = 0;
const INTENT: u64 = 1;
const OUTCOME: u64 = 2;

/// Why an operation could not be entered.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// More operations in flight than slots. A server with no more threads than slots never sees it.
    #[error("all {capacity} slots of the journal hold operations in flight")]
    Full {
        /// Slots of the journal.
        capacity: u32,
    },
    /// A resent request must be looked up first.
    #[error("request {id} is in the journal already: look it up before beginning it")]
    Known {
        /// Its original id.
        id: u64,
    },
    /// Id 0 is no request.
    #[error("0 is not the id of a request")]
    NoId,
    /// A name, the state before or the payload has no room.
    #[error("{what} is longer than the {max} bytes that the journal keeps")]
    TooLong {
        /// Which part.
        what: &'static str,
        /// Room for it, in bytes.
        max: usize,
    },
    /// [`Slot::outcome`] of a slot that was given away; cannot happen while the guard lives.
    #[error("request {id} is not in the journal any more")]
    Lost {
        /// Its original id.
        id: u64,
    },
}

/// The operations that must not be executed twice.
#[derive(Debug)]
pub struct Journal {
    region: Arc<Region>,
    base: usize,
    capacity: u32,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    slots: Slots,
    by_id: HashMap<u64, u32>,
    /// Outcomes that no guard holds: what may be evicted, lowest id first.
    finished: BTreeMap<u64, u32>,
    /// Nodes that evicted outcomes named.
    orphans: Vec<u64>,
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
        let mut inner = Inner {
            slots: Slots::new(capacity),
            by_id: HashMap::new(),
            finished: BTreeMap::new(),
            orphans: Vec::new(),
        };
        for slot in 0..capacity {
            let damaged = |what| {
                Err(StateError::Damaged {
                    table: TABLE,
                    slot,
                    what,
                })
            };
            let at = base + slot as usize * SLOT_LEN;
            let word = region.load_published(at);
            let id = word >> 8;
            let readable = match word & 0xff {
                EMPTY if word == 0 => continue,
                INTENT => record::read_intent(&region, at, id).is_some(),
                OUTCOME => record::read_outcome(&region, at).is_some(),
                _ => return damaged("its state is none"),
            };
            if !readable || id == 0 || id != original_id(id) {
                return damaged("its entry cannot be read");
            }
            if inner.by_id.insert(id, slot).is_some() {
                return damaged("its request has another entry");
            }
            if word & 0xff == OUTCOME {
                inner.finished.insert(id, slot);
            }
            inner.slots.mark(slot);
        }
        Ok(Journal {
            region,
            base,
            capacity,
            inner: Mutex::new(inner),
        })
    }

    /// Enters an operation, before anything of it is executed. `unique` is that of the request (resent or not).
    ///
    /// When no slot is free the leftover outcome with the lowest id goes; an intent never does.
    ///
    /// # Errors
    /// [`JournalError`]; nothing was entered.
    pub fn begin(&self, unique: u64, intent: &Intent<'_>) -> Result<Slot<'_>, JournalError> {
        let id = original_id(unique);
        if id == 0 {
            return Err(JournalError::NoId);
        }
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
        let slot = {
            let inner = &mut *self.inner();
            if inner.by_id.contains_key(&id) {
                return Err(JournalError::Known { id });
            }
            let slot = match inner.slots.take() {
                Some(slot) => slot,
                None => {
                    self.evict(inner);
                    inner.slots.take().ok_or(JournalError::Full {
                        capacity: self.capacity,
                    })?
                }
            };
            inner.by_id.insert(id, slot);
            slot
        };
        // The slot is this thread's alone now.
        record::write_intent(&self.region, self.at(slot), intent);
        self.region.publish(self.at(slot), id << 8 | INTENT);
        Ok(Slot {
            journal: self,
            id,
            slot,
        })
    }

    /// What is known of a request; ask for resent ones, and answer an outcome without executing anything.
    pub fn lookup(&self, unique: u64) -> Option<Recorded> {
        let id = original_id(unique);
        let slot = *self.inner().by_id.get(&id)?;
        self.recorded(id, slot)
    }

    /// The slot of a request that is known, to [`Slot::done`] it once its outcome is answered again.
    pub fn resume(&self, unique: u64) -> Option<Slot<'_>> {
        let id = original_id(unique);
        let inner = &mut *self.inner();
        let slot = *inner.by_id.get(&id)?;
        inner.finished.remove(&id);
        Some(Slot {
            journal: self,
            id,
            slot,
        })
    }

    /// Every intent without an outcome, lowest id first: at start-up each is to be resolved with [`Journal::resume`]
    /// and [`Slot::outcome`] (found done, or finished) or [`Slot::cancel`] (not done, or undone).
    pub fn unresolved(&self) -> Vec<IntentRecord> {
        let mut entries: Vec<(u64, u32)> = self
            .inner()
            .by_id
            .iter()
            .map(|(id, slot)| (*id, *slot))
            .collect();
        entries.sort_unstable();
        let intents =
            entries
                .into_iter()
                .filter_map(|(id, slot)| match self.recorded(id, slot)? {
                    Recorded::Intent(intent) => Some(intent),
                    Recorded::Outcome(_) => None,
                });
        intents.collect()
    }

    /// Drops every leftover outcome whose id is smaller; `None`, nothing is owed, drops all of them. Returns how many.
    pub fn drop_below(&self, lowest_owed: Option<u64>) -> u64 {
        let inner = &mut *self.inner();
        let mut dropped = 0;
        while let Some((&id, _)) = inner.finished.first_key_value() {
            if lowest_owed.is_some_and(|lowest| id >= original_id(lowest)) {
                break;
            }
            self.evict(inner);
            dropped += 1;
        }
        dropped
    }

    /// Entries, in whatever state.
    pub fn len(&self) -> usize {
        self.inner().slots.live()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Nodes that outcomes name.
    pub(super) fn nodes_named(&self) -> HashSet<u64> {
        let entries: Vec<(u64, u32)> = self
            .inner()
            .by_id
            .iter()
            .map(|(id, slot)| (*id, *slot))
            .collect();
        let named = entries
            .into_iter()
            .filter_map(|(id, slot)| match self.recorded(id, slot)? {
                Recorded::Outcome(Ok(success)) => Some(success.nodeid),
                _ => None,
            });
        named.collect()
    }

    /// Nodes that outcomes named which were evicted since the last call.
    pub(super) fn take_orphans(&self) -> Vec<u64> {
        std::mem::take(&mut self.inner().orphans)
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

    /// Frees the slot of the leftover outcome with the lowest id, if there is one.
    fn evict(&self, inner: &mut Inner) {
        let Some((id, slot)) = inner.finished.pop_first() else {
            return;
        };
        if let Some(Recorded::Outcome(Ok(success))) = self.recorded(id, slot) {
            // A server that never asks for them must not pay for it; the next recovery finds them anyway.
            if success.nodeid != 0 && inner.orphans.len() < self.capacity as usize {
                inner.orphans.push(success.nodeid);
            }
        }
        self.release(inner, id, slot);
    }

    fn release(&self, inner: &mut Inner, id: u64, slot: u32) {
        self.region.publish(self.at(slot), EMPTY);
        inner.by_id.remove(&id);
        inner.slots.give(slot);
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at(&self, slot: u32) -> usize {
        self.base + slot as usize * SLOT_LEN
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
        if outcome
            .as_ref()
            .is_ok_and(|success| success.payload.len() > Journal::MAX_PAYLOAD)
        {
            return Err(JournalError::TooLong {
                what: "the payload",
                max: Journal::MAX_PAYLOAD,
            });
        }
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
        let inner = &mut *self.journal.inner();
        if inner.by_id.get(&self.id) == Some(&self.slot) {
            inner.finished.remove(&self.id);
            self.journal.release(inner, self.id, self.slot);
        }
        // Nothing is left for drop to do.
        std::mem::forget(self);
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let inner = &mut *self.journal.inner();
        let word = self.journal.region.load(self.journal.at(self.slot));
        if word == self.id << 8 | OUTCOME && inner.by_id.get(&self.id) == Some(&self.slot) {
            inner.finished.insert(self.id, self.slot);
        }
    }
}
