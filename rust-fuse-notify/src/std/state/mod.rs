// SPDX-License-Identifier: GPL-2.0
//! State in a memfd that outlives the server.

pub mod handles;
pub mod journal;
pub mod nodes;

use std::os::fd::{BorrowedFd, OwnedFd};

pub use handles::{Handle, HandleKind, HandleTable, NewHandle};
pub use journal::{Intent, IntentRecord, Journal, JournalError, Outcome, Recorded, Slot, Success};
pub use nodes::{FileHandle, NewNode, Node, NodeFlags, NodeTable};

use super::message::Report;
use super::wire::Identity;

/// Why a state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Not implemented.
    #[error("not yet")]
    NotYet,
}

/// How many slots each table has. The memfd is sparse: what is never used takes no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Inodes known at one time.
    pub nodes: u32,
    /// Open files and directories at one time.
    pub handles: u32,
    /// Operations in flight at one time; at least as many as the server has threads.
    pub journal: u32,
}

impl Default for Config {
    fn default() -> Self {
        Config { nodes: 4 << 20, handles: 1 << 20, journal: 4096 }
    }
}

/// How far the handshake of the connection came; what a keeper wants to know of a dead server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// No server has answered INIT: the mount is of no use, make a fresh one (and a fresh memfd).
    BeforeInit,
    /// INIT was answered: the connection can be recovered.
    Serving,
}

/// What the hook of [`State::settle`] decides about a node that the kernel does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Stays, with a lookup count of 0.
    Keep,
    /// Goes, with its handles.
    Drop,
}

/// The memfd, mapped.
#[derive(Debug)]
pub struct State {
    nodes: NodeTable,
    handles: HandleTable,
    journal: Journal,
}

impl State {
    /// A memfd to keep state in, empty, close-on-exec. This is what a keeper calls.
    ///
    /// # Errors
    /// The kernel's, as [`StateError`].
    pub fn create_memfd() -> Result<OwnedFd, StateError> {
        Err(StateError::NotYet)
    }

    /// How far a server came with this memfd; changes nothing.
    ///
    /// # Errors
    /// As [`State::open`].
    pub fn peek(_fd: BorrowedFd<'_>) -> Result<Stage, StateError> {
        Err(StateError::NotYet)
    }

    /// Maps the memfd and checks it; an empty one is laid out.
    ///
    /// # Errors
    /// [`StateError`] says why the memfd is not the state of this file system; it was not changed then.
    pub fn open(_fd: OwnedFd, _identity: Identity, _config: &Config) -> Result<State, StateError> {
        Err(StateError::NotYet)
    }

    /// The inodes that the kernel was told of.
    pub fn nodes(&self) -> &NodeTable {
        &self.nodes
    }

    /// The open files and directories.
    pub fn handles(&self) -> &HandleTable {
        &self.handles
    }

    /// The operations that must not be executed twice.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// The end of a replay: outcomes that are no longer owed are dropped, and what was not confirmed by
    /// [`NodeTable::confirm`] gets lookup count 0 and, if `keep` says so, goes. Nodes that an owed outcome names stay.
    pub fn settle(&self, _report: &Report, _keep: impl FnMut(&Node) -> Keep) -> Settled {
        Settled::default()
    }

    /// Nodes with lookup count 0 whose last reason to stay (an outcome in the journal) has gone. The server
    /// removes what it holds for them (a file in the graveyard), then calls [`NodeTable::remove`].
    pub fn take_orphans(&self) -> Vec<Node> {
        Vec::new()
    }
}

/// Numbers of a [`State::settle`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// Nodes that were dropped.
    pub dropped: u64,
    /// Nodes that stay with lookup count 0.
    pub kept_unused: u64,
    /// Outcomes that were dropped from the journal.
    pub outcomes_dropped: u64,
}
