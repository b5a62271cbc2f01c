// SPDX-License-Identifier: GPL-2.0
//! The handle table: every `fh` that was given out.

use super::StateError;

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
pub struct HandleTable(());

impl HandleTable {
    /// Gives out an `fh`. Call it before the OPEN is answered.
    ///
    /// # Errors
    /// `Full` when no slot is free.
    pub fn insert(&self, _new: &NewHandle) -> Result<u64, StateError> {
        Err(StateError::NotYet)
    }

    /// The handle of an `fh`; `None` is what a server answers with `EBADF`.
    pub fn get(&self, _fh: u64) -> Option<Handle> {
        None
    }

    /// RELEASE: frees the slot. `None`: it was free.
    pub fn remove(&self, _fh: u64) -> Option<Handle> {
        None
    }

    /// The handle that a request with this id opened for an earlier instance, whose answer may not have arrived.
    pub fn opened_by(&self, _unique: u64) -> Option<Handle> {
        None
    }

    /// The handles of a node.
    pub fn of_node(&self, _nodeid: u64) -> Vec<Handle> {
        Vec::new()
    }

    /// Handles in the table.
    pub fn len(&self) -> usize {
        0
    }

    /// Whether nothing is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `each` with every handle, in the order of slots.
    pub fn for_each(&self, _each: impl FnMut(&Handle)) {}
}
