// SPDX-License-Identifier: GPL-2.0

//! A reference to a cached inode.

use super::{
    conn::Restart,
    proto::verdict::Known, //
};
use core::ptr::NonNull;
use kernel::bindings;

/// What a replay says of an inode.
#[derive(Clone, Copy)]
pub(super) struct Claim {
    pub(super) nodeid: u64,
    pub(super) generation: u32,
    pub(super) nlookup: u64,
    pub(super) known: Known,
}

/// An owned reference to an inode of the connection.
///
/// To drop it never evicts the inode, which might wait for a request that is held: a last
/// reference goes to a list, see `fuse_restart_put()`.
///
/// # Invariants
///
/// The pointer is valid and one reference belongs to this object.
pub(super) struct InodeRef {
    restart: Restart,
    inode: NonNull<bindings::inode>,
}

// SAFETY: References to inodes may be dropped by any task.
unsafe impl Send for InodeRef {}

impl InodeRef {
    /// Takes over a reference.
    ///
    /// # Safety
    ///
    /// `inode` must be null, or an inode of the connection of which the caller has a reference
    /// that it does not use any more.
    pub(super) unsafe fn from_raw(restart: Restart, inode: *mut bindings::inode) -> Option<Self> {
        // INVARIANT: By the requirements of this function.
        Some(Self {
            restart,
            inode: NonNull::new(inode)?,
        })
    }

    /// The pointer, for the abstractions of this directory.
    pub(super) fn as_ptr(&self) -> *mut bindings::inode {
        self.inode.as_ptr()
    }

    /// Another reference.
    pub(super) fn duplicate(&self) -> Self {
        // SAFETY: By the type invariants there is a reference already.
        unsafe { bindings::ihold(self.inode.as_ptr()) };
        // INVARIANT: `ihold()` made the reference.
        Self {
            restart: self.restart,
            inode: self.inode,
        }
    }

    /// What a replay has to say.
    pub(super) fn claim(&self) -> Claim {
        let mut known = bindings::fuse_restart_known::default();
        // SAFETY: By the type invariants; `known` is valid for the duration of the call.
        unsafe { bindings::fuse_restart_known(self.inode.as_ptr(), &mut known) };
        Claim {
            nodeid: known.nodeid,
            generation: known.generation,
            nlookup: known.nlookup,
            known: Known {
                kind: known.mode,
                ino: known.has_ino.then_some(known.ino),
            },
        }
    }

    /// The server of `epoch` has it, with the lookup count of the claim. `attr` is what it
    /// answered: cached data that is older is dropped when the server commits.
    pub(super) fn confirm(&self, epoch: u32, attr: &bindings::fuse_attr) {
        // SAFETY: By the type invariants.
        unsafe {
            bindings::fuse_restart_confirm(self.restart.as_ptr(), self.inode.as_ptr(), epoch, attr)
        };
    }

    /// Revokes it when the server commits; `counted` if the server has its lookup count.
    pub(super) fn revoke(self, counted: bool) {
        let this = core::mem::ManuallyDrop::new(self);
        // SAFETY: By the type invariants; the reference is passed on, since it is not dropped.
        unsafe {
            bindings::fuse_restart_revoke(this.restart.as_ptr(), this.inode.as_ptr(), counted)
        };
    }
}

impl Drop for InodeRef {
    fn drop(&mut self) {
        // SAFETY: By the type invariants; nobody uses the reference after this.
        unsafe { bindings::fuse_restart_put(self.restart.as_ptr(), self.inode.as_ptr()) };
    }
}
