// SPDX-License-Identifier: GPL-2.0
//! The node table: which nodeid names which file, and how often the kernel looked it up.

use super::StateError;

/// A file handle as `name_to_handle_at(2)` gives it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
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
        Some(FileHandle { kind, len: bytes.len() as u8, bytes: all })
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
    /// The last link was moved to the graveyard: unlinked, but still in use.
    pub const GRAVEYARD: NodeFlags = NodeFlags(1);

    /// Whether all of `other` is set.
    pub fn contains(self, other: NodeFlags) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What a new node is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Id that the kernel uses; never given to another file.
    pub nodeid: u64,
    /// Lookups that the kernel has not given back.
    pub lookups: u64,
    /// What the server said when it made the node.
    pub info: NewNode,
}

/// The inodes that the kernel was told of.
#[derive(Debug)]
pub struct NodeTable(());

impl NodeTable {
    /// Puts the root (nodeid 1) in, or replaces what is said of it. Its count is not kept.
    ///
    /// # Errors
    /// None yet.
    pub fn set_root(&self, _root: &NewNode) -> Result<(), StateError> {
        Err(StateError::NotYet)
    }

    /// The node of a nodeid; `None` is what a server answers with `ESTALE`.
    pub fn get(&self, _nodeid: u64) -> Option<Node> {
        None
    }

    /// One lookup: finds the node of this file (by `domain` and `handle`) or makes it, and adds 1 to its count.
    /// Call it before the LOOKUP is answered.
    ///
    /// # Errors
    /// `Full` when no slot is free.
    pub fn lookup(&self, _new: &NewNode) -> Result<Node, StateError> {
        Err(StateError::NotYet)
    }

    /// The node of a file, if there is one; counts nothing.
    pub fn find(&self, _domain: u64, _handle: &FileHandle) -> Option<Node> {
        None
    }

    /// One more lookup of a node that is known (an outcome answered again). `None`: there is no such node.
    pub fn add_lookup(&self, _nodeid: u64) -> Option<u64> {
        None
    }

    /// FORGET: subtracts. When nothing is left the node is given back to be cleaned up and then removed with
    /// [`NodeTable::remove`].
    pub fn forget(&self, _nodeid: u64, _nlookup: u64) -> Option<Node> {
        None
    }

    /// Frees a slot if its count is still 0; `false` if it was looked up again meanwhile (or is unknown).
    pub fn remove(&self, _nodeid: u64) -> bool {
        false
    }

    /// A replay is confirmed: the count is *set*. `false`: there is no such node.
    pub fn confirm(&self, _nodeid: u64, _nlookup: u64) -> bool {
        false
    }

    /// Changes the flags; `false`: there is no such node.
    pub fn set_flags(&self, _nodeid: u64, _set: NodeFlags, _clear: NodeFlags) -> bool {
        false
    }

    /// Changes the server's own words; `false`: there is no such node.
    pub fn set_aux(&self, _nodeid: u64, _aux: [u64; 4]) -> bool {
        false
    }

    /// Nodes in the table, the root among them.
    pub fn len(&self) -> usize {
        0
    }

    /// Whether there is no node, not even the root.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `each` with every node, in the order of slots.
    pub fn for_each(&self, _each: impl FnMut(&Node)) {}
}
