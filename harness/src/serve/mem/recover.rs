// SPDX-License-Identifier: GPL-2.0
//! What this server says when it takes over from a dead one.

use std::sync::Arc;

use rust_fuse_notify::std::adopt::{Recover, ServerError};
use rust_fuse_notify::std::message::{Replay, Report};
use rust_fuse_notify::std::state::{Keep, State};
use rust_fuse_notify::std::wire::Attr;

use crate::crash_points::reach;

use super::layout::inode as at;
use super::tree::Tree;

pub struct Recovery {
    pub tree: Arc<Tree>,
    /// Inodes whose lookups were counted differently here and in the kernel.
    pub differed: u64,
}

impl Recover for Recovery {
    fn resolve(&mut self, _state: &State) -> Result<(), ServerError> {
        reach("restarted");
        self.tree.resolve()?;
        reach("resolved");
        Ok(())
    }

    fn replay(&mut self, _state: &State, replay: &Replay) -> Result<Attr, i32> {
        reach("replay");
        let counted = self
            .tree
            .confirm(replay.nodeid, replay.generation, replay.nlookup)
            .ok_or(libc::ESTALE)?;
        self.differed += u64::from(replay.nodeid != 1 && counted != replay.nlookup);
        let inode = self.tree.attr(replay.nodeid).map_err(|e| e as i32)?;
        let [access, modification, change] = inode.times;
        Ok(Attr {
            ino: inode.nodeid,
            size: inode.size,
            mode: inode.mode,
            nlink: inode.nlink,
            uid: inode.uid,
            gid: inode.gid,
            rdev: inode.rdev,
            atime: access.secs as u64,
            mtime: modification.secs as u64,
            ctime: change.secs as u64,
            atimensec: access.nanos,
            mtimensec: modification.nanos,
            ctimensec: change.nanos,
            ..Attr::default()
        })
    }

    fn finish(&mut self, state: &State, report: Option<&Report>) -> Result<(), ServerError> {
        reach("reported");
        if let Some(report) = report {
            // The tables of nodes and handles are empty: this drops outcomes that are not owed.
            state.settle(report, |_| Keep::Drop);
            let gone = self.tree.settle();
            tracing::info!(
                "{gone} files without a name are not known to the kernel any more, {} were looked \
                 up another number of times",
                self.differed
            );
        }
        reach("settled");
        Ok(())
    }
}

impl Tree {
    /// The kernel knows this inode; how often it was counted here before.
    fn confirm(&self, nodeid: u64, generation: u32, lookups: u64) -> Option<u64> {
        let mut index = self.changing();
        let place = self.store.place(nodeid).ok().filter(|_| generation == 0)?;
        let counted = self.store.load(place + at::LOOKUPS);
        self.store.store(place + at::LOOKUPS, lookups);
        index.confirmed.insert(nodeid);
        Some(counted)
    }
}
