// SPDX-License-Identifier: GPL-2.0
//! Exactly once: every change has a number, and the intent of a request says which one its change will have.
//!
//! So the next instance needs no look at the tree: the change of that number was made or it was not.

pub use rust_fuse_notify::std::state::Slot;
use rust_fuse_notify::std::state::{Intent, Recorded, Success};
use rust_fuse_notify::std::wire::FUSE_UNIQUE_RESEND;

use nix::errno::Errno;

use crate::crash_points::reach;

use super::store::{Change, Res};
use super::tree::Tree;

/// A result with the journal's slot, to be given back when the request was answered.
pub type Kept<'a, T> = Res<(T, Option<Slot<'a>>)>;

/// Which request it was: for whoever reads the journal.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum Opcode {
    Symlink = 6,
    Mknod = 8,
    Mkdir = 9,
    Unlink = 10,
    Rmdir = 11,
    Link = 13,
    SetXattr = 21,
    RemoveXattr = 24,
    Create = 35,
    Rename = 45,
}

impl Tree {
    /// Makes the change of a request, and enters that it was made. The caller holds the lock, answers, and then gives
    /// the slot back with `done()`.
    pub fn once(&self, unique: u64, opcode: Opcode, change: Change) -> Res<Slot<'_>> {
        let intent = Intent {
            opcode: opcode as u32,
            args: [self.store.changes() + 1, 0, 0, 0],
            ..Intent::default()
        };
        let mut slot = self
            .store
            .state
            .journal()
            .begin(unique, &intent)
            .map_err(|e| {
                tracing::error!("cannot enter request {unique:#x} in the journal: {e}");
                Errno::EIO
            })?;
        reach("intent");
        self.store.commit(change);
        reach("committed");
        if let Err(e) = slot.outcome(&Ok(Success::default())) {
            tracing::error!("cannot enter the outcome of request {unique:#x}: {e}");
        }
        reach("outcome");
        Ok(slot)
    }

    /// For a resent request: its slot, if an earlier instance executed it.
    pub fn answered(&self, unique: u64) -> Res<Option<Slot<'_>>> {
        if unique & FUSE_UNIQUE_RESEND == 0 {
            return Ok(None);
        }
        let journal = self.store.state.journal();
        match journal.lookup(unique) {
            Some(Recorded::Outcome(Ok(_))) => Ok(journal.resume(unique)),
            Some(Recorded::Outcome(Err(e))) => Err(Errno::from_raw(e)),
            _ => Ok(None),
        }
    }

    /// Decides every change that a dead server had begun.
    pub fn resolve(&self) -> Result<(), String> {
        let journal = self.store.state.journal();
        let made = self.store.changes();
        for intent in journal.unresolved() {
            let id = intent.id;
            let Some(mut slot) = journal.resume(id) else {
                return Err(format!(
                    "journal entry {id:#x} vanished while it was resolved"
                ));
            };
            reach("decided");
            if intent.args[0] <= made {
                slot.outcome(&Ok(Success::default()))
                    .map_err(|e| format!("journal entry {id:#x}: {e}"))?;
            } else {
                slot.cancel();
            }
        }
        Ok(())
    }
}
