// SPDX-License-Identifier: GPL-2.0
//! Why a state cannot be used, or a table takes no more.

use std::io;

use crate::std::wire::Identity;

/// Why a state cannot be used, or a table takes no more.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A system call failed.
    #[error("{doing} the memfd of state: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody else could shrink the file, and every access would then be a SIGBUS.
    #[error(
        "the state cannot be sealed ({0}): pass a memfd that was created with MFD_ALLOW_SEALING"
    )]
    NoSeals(io::Error),
    /// Two live instances on one descriptor would steal each other's messages.
    #[error("process {pid} uses this state: end it before another instance starts")]
    InUse {
        /// The process that holds the lock; 0 if it is in another pid namespace.
        pid: i32,
    },
    /// Not a state at all.
    #[error("this is no state of a restartable FUSE server ({0}): pass the memfd that the last instance used; or unmount, and start with an empty one")]
    Foreign(&'static str),
    /// Laid out by a newer version of this crate.
    #[error("the state has layout {found}, this server knows {ours}: start the newer server again, discard the state (what applications have open fails with EIO then), or unmount")]
    Newer {
        /// Version of the layout found.
        found: u32,
        /// Version of the layout that this crate writes.
        ours: u32,
    },
    /// Laid out by an older version of this crate, which this one no longer reads.
    #[error("the state has layout {found}, this server knows only {ours}: start the older server again, discard the state (what applications have open fails with EIO then), or unmount")]
    Older {
        /// Version of the layout found.
        found: u32,
        /// Version of the layout that this crate writes.
        ours: u32,
    },
    /// A state, but of another file system.
    #[error("the state belongs to file system {found}, this server serves {ours}: start the server that made it")]
    WrongIdentity {
        /// Identity in the state.
        found: Identity,
        /// Identity that the server named.
        ours: Identity,
    },
    /// A state cannot be discarded without what the kernel said in INIT and was answered.
    #[error("nobody can go on with this memfd, for the handshake with the kernel is not in it ({0}): unmount, and mount again with an empty one")]
    NoHandshake(&'static str),
    /// Cannot have been written by this crate.
    #[error("the state is damaged: {what}, slot {slot} of the {table}: discard it (what applications have open fails with EIO then), or unmount")]
    Damaged {
        /// Which table.
        table: &'static str,
        /// Which slot.
        slot: u32,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Capacities that no state can have.
    #[error("a state cannot have {capacity} slots for {table}: 2 to {max} are possible")]
    Capacity {
        /// Which table.
        table: &'static str,
        /// What was asked for.
        capacity: u32,
        /// Largest possible.
        max: u32,
    },
    /// No slot is free. A server answers with `ENFILE` or `ENOMEM`.
    #[error("all {capacity} slots of the {table} are in use")]
    Full {
        /// Which table.
        table: &'static str,
        /// Its slots.
        capacity: u32,
    },
}

impl StateError {
    /// Whether [`super::State::discard`] may help: the content is to blame, and it is not that of another file system.
    pub fn is_discardable(&self) -> bool {
        matches!(
            self,
            StateError::Foreign(_)
                | StateError::Newer { .. }
                | StateError::Older { .. }
                | StateError::Damaged { .. }
                | StateError::Capacity { .. }
        )
    }

    /// For `map_err` around a system call.
    pub(super) fn io<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> StateError {
        move |source| StateError::Io {
            doing,
            source: source.into(),
        }
    }
}
