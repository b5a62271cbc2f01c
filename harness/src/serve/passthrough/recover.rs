// SPDX-License-Identifier: GPL-2.0
//! What this server says when it takes over from a dead one.

use std::os::fd::AsFd;
use std::sync::Arc;

use nix::errno::Errno;
use rust_fuse_notify::std::adopt::{Recover, ServerError};
use rust_fuse_notify::std::message::{Replay, Report};
use rust_fuse_notify::std::state::{Keep, Node, State, Success};
use rust_fuse_notify::std::wire::Attr;

use crate::crash_points::reach;

use super::handle::Handle;
use super::intent::{fate_of_name, fate_of_rename, fate_of_xattr, Fate, Intent, Place};
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
    fn resolve(&mut self, _state: &State) -> Result<(), ServerError> {
        reach("restarted");
        self.server.resolve_journal()?;
        reach("resolved");
        Ok(())
    }

    fn replay(&mut self, state: &State, replay: &Replay) -> Result<Attr, i32> {
        reach("replay");
        crate::crash_points::poison_replay();
        let node = state.nodes().replayed(replay)?;
        let attr = self.server.confirmed(&node).map_err(|e| e as i32)?;
        if replay.nodeid != ROOT && node.lookups != replay.nlookup {
            // Between an answer and what the application made of it; at rest they are equal.
            self.differed += 1;
            tracing::debug!(
                "node {}: {}, kernel {}",
                replay.nodeid,
                node.lookups,
                replay.nlookup
            );
        }
        Ok(attr)
    }

    fn finish(&mut self, state: &State, report: Option<&Report>) -> Result<(), ServerError> {
        reach("reported");
        let settled = report.map(|report| {
            // An owed outcome names no node here: its resend looks the name up again.
            let settled = state.settle(report, |node| {
                // Without a name it cannot be looked up again.
                match self.server.yard.contains(node.nodeid) {
                    true => Keep::Remove,
                    false => Keep::Drop,
                }
            });
            for orphan in state.take_orphans() {
                state.nodes().remove(orphan.nodeid);
            }
            settled
        });
        reach("settled");
        let graves = self.server.sweep_graves();
        if let Some(settled) = settled {
            // The crash matrix reads it: at rest all of these are 0.
            tracing::info!(
                "{} nodes are not known to the kernel any more, {} were looked up another number \
                 of times, {} outcomes are not owed any more, {graves} graves had no node, \
                 {} handles had none either, {} handles are in the table",
                settled.dropped,
                self.differed,
                settled.outcomes_dropped,
                settled.handles_dropped,
                state.handles().len()
            );
        }
        reach("swept");
        tracing::info!("{} nodes in the table", state.nodes().len());
        Ok(())
    }
}

impl Server {
    /// The node's attributes, if its file is still the one that the kernel was told of.
    ///
    /// A hundred thousand of these make most of an outage: the node was copied once, and nothing is looked up again.
    pub fn confirmed(&self, node: &Node) -> Res<Attr> {
        let nodeid = node.nodeid;
        let attr = if nodeid == ROOT {
            self.attr(ROOT)?
        } else {
            // Not through the cache: there is no use in keeping the last few of a hundred thousand.
            let handle = Handle(node.info.handle);
            let fd = self.backing.open_handle(&handle, libc::O_PATH)?;
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

    /// Decides every change that the dead server had begun, and tells the journal. Nothing is guessed: what cannot be
    /// decided now is left to the next instance, or, if it can never be, `EIO` is what its request gets.
    pub fn resolve_journal(&self) -> Result<(), String> {
        for record in self.state.journal().unresolved() {
            let id = record.id;
            let fate = match Intent::read(&record) {
                Some(intent) => {
                    let fate = self.resolve(&intent);
                    tracing::debug!("request {id:#x} {intent:?}: {fate:?}");
                    fate
                }
                None if self.opts.discard => Err(Errno::EPROTO),
                None => {
                    return Err(format!(
                    "journal entry {id:#x} was not written by this version of the server: start \
                         the one that wrote it, or use --discard-state to answer it with EIO \
                         ({record:?})"
                ))
                }
            };
            reach("decided");
            let Some(mut slot) = self.state.journal().resume(id) else {
                return Err(format!(
                    "journal entry {id:#x} vanished while it was resolved"
                ));
            };
            let outcome = match fate {
                Ok(Fate::Done | Fate::Bury | Fate::Whiteout) => Ok(Success::default()),
                // The place itself is gone, and that is what the resent request will be told.
                Ok(Fate::Undone) | Err(Errno::ESTALE) => {
                    slot.cancel();
                    reach("resolved-one");
                    continue;
                }
                Err(
                    e @ (Errno::EMFILE
                    | Errno::ENFILE
                    | Errno::ENOMEM
                    | Errno::EINTR
                    | Errno::EAGAIN),
                ) => {
                    return Err(format!(
                        "cannot find out whether request {id:#x} was executed: {}: another \
                         instance can",
                        e.desc()
                    ))
                }
                Err(e) => {
                    tracing::error!(
                        "request {id:#x} is answered with EIO, for nobody knows whether it was \
                         executed: {}",
                        e.desc()
                    );
                    Err(libc::EIO)
                }
            };
            slot.outcome(&outcome)
                .map_err(|e| format!("journal entry {id:#x}: {e}"))?;
            drop(slot);
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
                caller,
            } => {
                let (old, new) = (self.look_at(from)?, self.look_at(to)?);
                let fate =
                    fate_of_rename(*flags, source, target.as_ref(), old.as_ref(), new.as_ref());
                let whiteout = flags & libc::RENAME_WHITEOUT;
                let finish = || match fate {
                    Fate::Bury => self.finish_over_dir(from, to, *nodeid, whiteout),
                    Fate::Whiteout => self.finish_whiteout(from),
                    // A directory that was overwritten, and buried although something was in it.
                    Fate::Done if !self.grave_is_right_of_rename(*nodeid, from, to)? => {
                        Ok(Fate::Undone)
                    }
                    fate => Ok(fate),
                };
                let fate = match whiteout {
                    0 => finish()?,
                    _ => caller.create(0, finish)?,
                };
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

    fn look_at(&self, place: &Place) -> Res<Option<Handle>> {
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

    /// As [`Server::grave_is_right`], for a directory that was overwritten: the two change places again.
    fn grave_is_right_of_rename(&self, nodeid: u64, from: &Place, to: &Place) -> Res<bool> {
        if !self.grave_is_right(nodeid, from)? {
            self.exchange(from, to)?;
            return Ok(false);
        }
        Ok(true)
    }

    fn exchange(&self, from: &Place, to: &Place) -> Res<()> {
        let (old, new) = (self.node_fd(from.parent)?, self.node_fd(to.parent)?);
        let flags = libc::RENAME_EXCHANGE;
        sys::rename_at(old.as_fd(), &from.name, new.as_fd(), &to.name, flags)
    }

    /// An overwritten directory waits at the old name: bury it, if it is empty as it was and can be buried.
    fn finish_over_dir(&self, from: &Place, to: &Place, nodeid: u64, whiteout: u32) -> Res<Fate> {
        let parent = self.node_fd(from.parent)?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let victim = sys::open_at(parent.as_fd(), &from.name, flags, 0)?;
        if nodeid != 0 && super::graveyard::is_empty(victim.as_fd())? {
            let buried = self.yard.bury(nodeid, parent.as_fd(), &from.name, whiteout);
            if buried.is_ok() {
                return Ok(Fate::Done);
            }
        }
        self.exchange(from, to)?;
        Ok(Fate::Undone)
    }

    fn finish_whiteout(&self, from: &Place) -> Res<Fate> {
        let parent = self.node_fd(from.parent)?;
        sys::mknod_at(parent.as_fd(), &from.name, libc::S_IFCHR, 0)?;
        Ok(Fate::Done)
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

    /// Graves of nodes that the kernel does not hold any more; how many there were.
    pub fn sweep_graves(&self) -> usize {
        let mut graves = self.yard.all();
        graves.retain(|nodeid| self.state.nodes().get(*nodeid).is_none());
        for nodeid in &graves {
            self.yard.release(*nodeid);
        }
        graves.len()
    }
}
