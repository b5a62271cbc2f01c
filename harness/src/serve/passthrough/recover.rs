// SPDX-License-Identifier: GPL-2.0
//! What this server says when it takes over from a dead one.

use std::os::fd::AsFd;
use std::sync::Arc;

use nix::errno::Errno;
use rust_fuse_notify::std::adopt::{Recover, ServerError};
use rust_fuse_notify::std::message::{Replay, Report};
use rust_fuse_notify::std::state::{Keep, State, Success};
use rust_fuse_notify::std::wire::{Attr, Identity};

use crate::crash_points::reach;

use super::intent::{fate_of_name, fate_of_rename, fate_of_xattr, Fate, Intent, Place, Seen};
use super::nodes::ROOT;
use super::server::Server;
use super::sys::{self, Res};

pub struct Recovery {
    server: Arc<Server>,
    /// Nodes whose lookups were counted differently here and in the kernel.
    differed: u64,
}

impl Recovery {
    pub fn new(server: Arc<Server>) -> Recovery {
        Recovery {
            server,
            differed: 0,
        }
    }
}

impl Recover for Recovery {
    fn identity(&self) -> Identity {
        Identity(self.server.backing.identity)
    }

    fn resolve(&mut self, _state: &State) -> Result<(), ServerError> {
        reach("restarted");
        self.server.resolve_journal()?;
        reach("resolved");
        Ok(())
    }

    fn replay(&mut self, state: &State, replay: &Replay) -> Result<Attr, i32> {
        reach("replay");
        let attr = self
            .server
            .confirmed(replay.nodeid, replay.generation)
            .map_err(|e| e as i32)?;
        let counted = state.nodes().get(replay.nodeid).map(|node| node.lookups);
        if replay.nodeid != ROOT && counted != Some(replay.nlookup) {
            // Between an answer and what the application made of it; at rest they are equal.
            self.differed += 1;
            tracing::debug!(
                "node {}: {counted:?}, kernel {}",
                replay.nodeid,
                replay.nlookup
            );
        }
        if replay.nodeid != ROOT && !state.nodes().confirm(replay.nodeid, replay.nlookup) {
            return Err(libc::ESTALE);
        }
        Ok(attr)
    }

    fn finish(&mut self, state: &State, report: Option<&Report>) -> Result<(), ServerError> {
        reach("reported");
        if let Some(report) = report {
            // An owed outcome names no node here: its resend looks the name up again.
            let settled = state.settle(report, |_| Keep::Drop);
            for orphan in state.take_orphans() {
                state.nodes().remove(orphan.nodeid);
            }
            tracing::info!(
                "{} nodes are not known to the kernel any more, {} were looked up another number \
                 of times, {} outcomes are not owed any more",
                settled.dropped,
                self.differed,
                settled.outcomes_dropped
            );
        }
        reach("settled");
        self.server.sweep_graves();
        reach("swept");
        tracing::info!("{} nodes in the table", state.nodes().len());
        Ok(())
    }
}

impl Server {
    /// The node's attributes, if it is still the file that the kernel was told of.
    pub fn confirmed(&self, nodeid: u64, generation: u32) -> Res<Attr> {
        let node = self.node(nodeid)?;
        if node.info.generation != generation {
            return Err(Errno::ESTALE);
        }
        let attr = if nodeid == ROOT {
            self.attr(ROOT)?
        } else {
            // Not through the cache: there is no use in keeping the last few of a hundred thousand.
            let fd = self.open_node(nodeid, libc::O_PATH)?;
            self.visible(nodeid, &sys::fstat(fd.as_fd())?)
        };
        let kind = libc::S_IFMT;
        if attr.ino != node.info.ino || attr.mode & kind != node.info.mode & kind {
            return Err(Errno::ESTALE);
        }
        if attr.nlink == 0 && nodeid != ROOT && !self.yard.contains(nodeid) {
            return Err(Errno::ESTALE); // removed in the backing, and still open somewhere else
        }
        Ok(attr)
    }

    /// Decides every change that the dead server had begun, and tells the journal.
    pub fn resolve_journal(&self) -> Result<(), String> {
        for record in self.state.journal().unresolved() {
            let id = record.id;
            let intent = Intent::read(&record)
                .ok_or_else(|| format!("journal entry {id:#x} makes no sense: {record:?}"))?;
            let fate = match self.resolve(&intent) {
                Ok(fate) => fate,
                Err(e) => {
                    // The place itself is gone: whoever asked for the change gets to know.
                    tracing::warn!("cannot look at {intent:?}: {}", e.desc());
                    Fate::Undone
                }
            };
            let Some(mut slot) = self.state.journal().resume(id) else {
                return Err(format!(
                    "journal entry {id:#x} vanished while it was resolved"
                ));
            };
            tracing::debug!("request {id:#x} {intent:?}: {fate:?}");
            reach("decided");
            match fate {
                Fate::Undone => slot.cancel(),
                Fate::Done | Fate::Bury => slot
                    .outcome(&Ok(Success::default()))
                    .map_err(|e| format!("journal entry {id:#x}: {e}"))?,
            }
            reach("resolved-one");
        }
        Ok(())
    }

    fn resolve(&self, intent: &Intent) -> Res<Fate> {
        match intent {
            Intent::Make { place } | Intent::Link { place, .. } => {
                Ok(fate_of_name(intent, self.look_at(place)?.as_ref()))
            }
            Intent::Remove { place, nodeid, .. } => {
                let fate = fate_of_name(intent, self.look_at(place)?.as_ref());
                if fate == Fate::Done && !self.grave_is_right(*nodeid, place)? {
                    return Ok(Fate::Undone);
                }
                Ok(fate)
            }
            Intent::Rename {
                from,
                to,
                flags,
                source,
                target,
                nodeid,
            } => {
                let (old, new) = (self.look_at(from)?, self.look_at(to)?);
                let mut fate =
                    fate_of_rename(*flags, source, target.as_ref(), old.as_ref(), new.as_ref());
                if fate == Fate::Bury {
                    fate = self.finish_over_dir(from, *nodeid)?;
                }
                if fate == Fate::Undone && *nodeid != 0 {
                    self.drop_spare(*nodeid);
                }
                Ok(fate)
            }
            Intent::SetXattr { node, name } | Intent::RemoveXattr { node, name } => {
                let fd = self.node_fd(*node)?;
                let present = match sys::get_xattr(fd.as_fd(), name, &mut []) {
                    Ok(_) => true,
                    Err(Errno::ENODATA) => false,
                    Err(e) => return Err(e),
                };
                Ok(fate_of_xattr(intent, present))
            }
        }
    }

    fn look_at(&self, place: &Place) -> Res<Option<Seen>> {
        self.look(place.parent, &place.name)
    }

    /// Whether a removed directory in its grave is empty; if not, it goes back to its name.
    fn grave_is_right(&self, nodeid: u64, place: &Place) -> Res<bool> {
        if nodeid == 0 || !self.yard.contains(nodeid) || self.grave_is_empty(nodeid)? {
            return Ok(true);
        }
        let parent = self.node_fd(place.parent)?;
        self.yard.exhume(nodeid, parent.as_fd(), &place.name)?;
        Ok(false)
    }

    fn grave_is_empty(&self, nodeid: u64) -> Res<bool> {
        let grave = self.yard.open_grave(nodeid)?;
        if sys::fstat(grave.as_fd())?.st_mode & libc::S_IFMT != libc::S_IFDIR {
            return Ok(true);
        }
        let dir = sys::reopen(grave.as_fd(), libc::O_RDONLY | libc::O_DIRECTORY)?;
        super::graveyard::is_empty(dir.as_fd())
    }

    /// An overwritten directory waits at the old name: bury it.
    fn finish_over_dir(&self, from: &Place, nodeid: u64) -> Res<Fate> {
        let parent = self.node_fd(from.parent)?;
        if nodeid != 0 && self.yard.bury(nodeid, parent.as_fd(), &from.name).is_ok() {
            return Ok(Fate::Done);
        }
        match sys::rmdir_at(parent.as_fd(), &from.name) {
            Ok(()) => Ok(Fate::Done),
            Err(e) => Err(e),
        }
    }

    /// The spare name of a file that was not overwritten after all.
    fn drop_spare(&self, nodeid: u64) {
        let spare = self
            .yard
            .open_grave(nodeid)
            .and_then(|fd| sys::fstat(fd.as_fd()))
            .is_ok_and(|st| st.st_nlink > 1 && st.st_mode & libc::S_IFMT != libc::S_IFDIR);
        if spare {
            self.yard.release(nodeid);
        }
    }

    /// Graves of nodes that the kernel does not hold any more.
    pub fn sweep_graves(&self) {
        for nodeid in self.yard.all() {
            if self.state.nodes().get(nodeid).is_none() {
                self.yard.release(nodeid);
            }
        }
    }
}
