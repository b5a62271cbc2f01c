// SPDX-License-Identifier: GPL-2.0
//! The server: what all its threads share.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use rust_fuse_notify::std::state::{HandleKind, NewHandle, Recorded, Slot, State, Success};
use rust_fuse_notify::std::wire::FUSE_UNIQUE_RESEND;

use crate::crash_points;

use super::backing::Backing;
use super::fdcache::FdCache;
use super::graveyard::Graveyard;
use super::handle::Handle;
use super::intent::Intent;
use super::make::Kept;
use super::nodes::ROOT;
use super::sys::Res;
use super::wire::Device;

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub writeback: bool,
    pub timeout: Duration,
    /// What cannot be resolved gets EIO, instead of keeping the server from starting.
    pub discard: bool,
    /// Changes are entered in the journal. Off for measurements only.
    pub journal: bool,
    /// False in the crash matrix: the contract is not signed, so the kernel only sends again.
    pub sign: bool,
}

pub struct Server {
    pub backing: Backing,
    /// What the table of nodes has for the backing's device: its number when the mount was made. A number that is not
    /// the disk's own (btrfs) may be another when the backing was mounted again while no server ran.
    pub domain: u64,
    pub yard: Graveyard,
    pub state: Arc<State>,
    pub device: Device,
    pub opts: Options,
    /// `O_PATH` descriptors by nodeid.
    pub paths: FdCache,
    /// Open files and directories by `fh`.
    pub files: FdCache,
}

impl Server {
    pub fn new(
        backing: Backing,
        yard: Graveyard,
        state: Arc<State>,
        device: Device,
        opts: Options,
        nofile: u64,
    ) -> Server {
        // Each can be half as many for a moment: 3/4 together, the rest for what operations open in passing.
        let nofile = usize::try_from(nofile).unwrap_or(usize::MAX);
        let root = state.nodes().get(ROOT);
        Server {
            domain: root.map_or(backing.dev, |root| root.info.domain),
            backing,
            yard,
            state,
            device,
            opts,
            paths: FdCache::new((nofile / 6).min(16 * 1024)),
            files: FdCache::new((nofile / 3).min(256 * 1024)),
        }
    }

    /// Enters the intent, runs `change`, enters that it is done. The caller answers the request and
    /// then gives the slot back with `done()`.
    pub fn once<T>(
        &self,
        unique: u64,
        intent: impl FnOnce() -> Intent,
        change: impl FnOnce() -> Res<T>,
    ) -> Kept<'_, T> {
        if !self.opts.journal {
            return Ok((change()?, None));
        }
        let record = intent().record();
        let mut slot = self
            .state
            .journal()
            .begin(unique, &record.as_journal())
            .map_err(|e| {
                tracing::error!("cannot enter request {unique:#x} in the journal: {e}");
                Errno::EIO
            })?;
        crash_points::reach("intent");
        match change() {
            Ok(value) => {
                if let Err(e) = slot.outcome(&Ok(Success::default())) {
                    tracing::error!("cannot enter the outcome of request {unique:#x}: {e}");
                }
                crash_points::reach("outcome");
                Ok((value, Some(slot)))
            }
            Err(e) => {
                slot.cancel();
                Err(e)
            }
        }
    }

    /// For a resent request: its slot and outcome, if it was executed by an earlier instance; the error, if that is
    /// what is to be answered. That one stays in the journal: it goes when it is not owed any more.
    pub fn outcome(&self, unique: u64) -> Res<Option<(Success, Slot<'_>)>> {
        if unique & FUSE_UNIQUE_RESEND == 0 {
            return Ok(None);
        }
        match self.state.journal().lookup(unique) {
            Some(Recorded::Outcome(Ok(success))) => Ok(self
                .state
                .journal()
                .resume(unique)
                .map(|slot| (success, slot))),
            Some(Recorded::Outcome(Err(e))) => Err(Errno::from_raw(e)),
            _ => Ok(None),
        }
    }

    /// As [`Server::outcome`], for operations whose answer is found by looking again.
    pub fn answered(&self, unique: u64) -> Res<Option<Slot<'_>>> {
        Ok(self.outcome(unique)?.map(|(_, slot)| slot))
    }

    /// What is at a name now.
    pub fn look(&self, parent: u64, name: &std::ffi::CStr) -> Res<Option<Handle>> {
        let dir = self.node_fd(parent)?;
        match Handle::at(dir.as_fd(), name) {
            Ok(handle) => Ok(Some(handle)),
            Err(Errno::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The flags with which the backing file is opened for an application's `flags`.
    ///
    /// Offsets come with every request, so O_APPEND would only misplace data that is written
    /// again; O_TRUNC is a request of its own; O_DIRECT would ask for aligned buffers. With the
    /// write-back cache the kernel reads through descriptors that applications only write to.
    pub fn backing_flags(&self, flags: i32) -> i32 {
        let mut access = flags & libc::O_ACCMODE;
        if self.opts.writeback && access == libc::O_WRONLY {
            access = libc::O_RDWR;
        }
        access | flags & (libc::O_SYNC | libc::O_DSYNC | libc::O_NOATIME)
    }

    /// Gives out an `fh` for an open file, so that any later instance can open it again.
    pub fn new_handle(
        &self,
        unique: u64,
        nodeid: u64,
        flags: i32,
        kind: HandleKind,
        fd: OwnedFd,
    ) -> Res<u64> {
        let new = NewHandle {
            nodeid,
            flags,
            kind,
            opener: unique,
            aux: [0; 2],
        };
        let fh = self.state.handles().insert(&new).map_err(|e| {
            tracing::error!("cannot remember another open file: {e}");
            Errno::ENFILE
        })?;
        self.files.insert(fh, Arc::new(fd));
        crash_points::reach("handle");
        Ok(fh)
    }

    /// The handle that the same request got from an earlier instance.
    pub fn handle_of_resend(&self, unique: u64, nodeid: u64) -> Option<u64> {
        if unique & FUSE_UNIQUE_RESEND == 0 {
            return None;
        }
        let handle = self.state.handles().opened_by(unique)?;
        (handle.info.nodeid == nodeid).then_some(handle.fh)
    }

    /// The open file of `fh`, opened again if it was opened by an earlier instance.
    pub fn file(&self, nodeid: u64, fh: u64) -> Res<Arc<OwnedFd>> {
        if let Some(fd) = self.files.get(fh) {
            return Ok(fd);
        }
        let handle = self.state.handles().get(fh).ok_or(Errno::EBADF)?;
        if handle.info.nodeid != nodeid {
            return Err(Errno::EBADF);
        }
        let fd = Arc::new(self.open_node(nodeid, handle.info.flags)?);
        self.files.insert(fh, fd.clone());
        Ok(fd)
    }

    pub fn close(&self, fh: u64) {
        let orphan = self.state.release(fh);
        self.files.remove(fh);
        if let Some(node) = orphan {
            self.bury_node(node.nodeid);
        }
    }
}
