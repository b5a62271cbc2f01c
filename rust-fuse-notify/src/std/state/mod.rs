// SPDX-License-Identifier: GPL-2.0
//! State in a memfd that outlives the server.
//!
//! What SIGKILL leaves of a process is every store that it completed, in program order. So nothing here is synced,
//! locked or logged: a record is written first, then *one* 8-byte store makes it valid, and one 8-byte store makes
//! it invalid again. A server can die between any two stores, and the next instance finds a state that some
//! completed sequence of calls would have made (plus, at most, bytes that nothing points to).
//!
//! The memfd is sparse (but for the journal, which is allocated at once). Tables have a fixed, large capacity and no
//! place that only grows: slots are used again, lowest first, and pages of the node table that are free as a whole are
//! given back. Each version of this crate reads what the next and the previous one write; the rule is in `header.rs`.
//!
//! * [`NodeTable`]: nodeid to file, with lookup counts.
//! * [`HandleTable`]: `fh` to file and open flags.
//! * [`Journal`]: what must not be executed twice.
//! * [`Arena`]: memory of the server's own.
//! * [`Flights`]: what the server has in its hands, against requests that kill it and for keepers that watch it.
//! * the handshake, which [`super::adopt`] plays again to every new instance.

mod arena;
mod discard;
mod error;
mod flights;
#[cfg(test)]
mod flights_tests;
mod handles;
mod header;
mod init;
mod journal;
mod journal_error;
mod nodes;
mod opcodes;
mod record;
mod region;
mod slots;
mod trial;

#[cfg(test)]
mod compat_tests;
#[cfg(test)]
pub(crate) mod crash_tests;
#[cfg(test)]
mod discard_tests;
#[cfg(test)]
mod journal_tests;
#[cfg(test)]
mod previous;
#[cfg(test)]
mod table_tests;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, SealFlag};
use nix::sys::memfd::{memfd_create, MFdFlags};

pub use arena::Arena;
pub use error::StateError;
pub use flights::{blame, pulse, Flight, Flights, InFlight, Pulse, DEFAULT_MAX_TRIES};
pub use handles::{Handle, HandleKind, HandleTable, NewHandle};
pub use journal::{Journal, Slot};
pub use journal_error::JournalError;
pub use nodes::{FileHandle, NewNode, Node, NodeFlags, NodeTable};
pub use record::{Intent, IntentRecord, Outcome, Recorded, Success};

use super::message::Report;
use super::wire::Identity;
use header::{Found, Layout};
use init::InitStore;
use region::Region;

/// How many slots each table has. The memfd is sparse: what is never used takes no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Inodes known at one time; 256 bytes each once used.
    pub nodes: u32,
    /// Open files and directories at one time; 64 bytes each once used.
    pub handles: u32,
    /// Operations in flight at one time, and outcomes that are owed from before a crash: four times as many as the
    /// server has threads. 1280 bytes each, allocated at the start.
    pub journal: u32,
    /// Pages of 4 KiB for the server's own use, see [`Arena`].
    pub arena_pages: u32,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            nodes: 4 << 20,
            handles: 1 << 20,
            journal: 1024,
            arena_pages: 0,
        }
    }
}

/// How far the handshake of the connection came; what a keeper wants to know of a dead server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The kernel's INIT may not have been answered. If a notification is refused with
    /// [`NotUnderstood`](super::notify::NotifyError::NotUnderstood) too, it was not; the next instance can still
    /// answer it, or the keeper makes a fresh mount with a fresh memfd.
    BeforeInit,
    /// INIT was answered, or its answer is kept and the next instance gives it once more: the connection can be
    /// recovered.
    Serving,
}

/// What the hook of [`State::settle`] decides about a node that the kernel does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Stays, with a lookup count of 0.
    Keep,
    /// Goes, with its handles; but not if the kernel may have got a handle of it by a late answer.
    Drop,
    /// Goes in any case: it has no name, so nobody can look it up again, and what is in the way of a late answer is of no use.
    Remove,
}

/// Numbers of a [`State::settle`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// Nodes that were dropped.
    pub dropped: u64,
    /// Nodes that stay with lookup count 0.
    pub kept_unused: u64,
    /// Handles that were dropped, since the kernel does not know their node.
    pub handles_dropped: u64,
    /// Outcomes that were dropped from the journal.
    pub outcomes_dropped: u64,
}

/// The memfd, mapped and checked.
#[derive(Debug)]
pub struct State {
    identity: Identity,
    fresh: bool,
    nodes: NodeTable,
    handles: HandleTable,
    journal: Journal,
    arena: Arena,
    init: InitStore,
    flights: Flights,
    region: Arc<Region>,
}

impl State {
    /// A memfd to keep state in, empty, close-on-exec, sealable. This is what a keeper calls.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn create_memfd() -> Result<OwnedFd, StateError> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let noexec = flags | MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL);
        memfd_create(c"fusestate", noexec)
            // Kernels before 6.3 do not know the last flag.
            .or_else(|_| memfd_create(c"fusestate", flags))
            .map_err(StateError::io("creating"))
    }

    /// How far a server came with this memfd; changes nothing.
    ///
    /// # Errors
    /// As [`State::open`].
    pub fn peek(fd: BorrowedFd<'_>) -> Result<Stage, StateError> {
        match header::inspect(fd, size_of_file(fd)?)? {
            Found::State { answered: true, .. } | Found::State { replied: true, .. } => {
                Ok(Stage::Serving)
            }
            _ => Ok(Stage::BeforeInit),
        }
    }

    /// The file system that the state in this memfd belongs to, if there is one; changes nothing. For servers whose file
    /// system is nowhere else: they make up an identity when there is none.
    ///
    /// # Errors
    /// As [`State::open`].
    pub fn identity_in(fd: BorrowedFd<'_>) -> Result<Option<Identity>, StateError> {
        match header::inspect(fd, size_of_file(fd)?)? {
            Found::State { identity, .. } => Ok(Some(identity)),
            _ => Ok(None),
        }
    }

    /// The INIT of the kernel and its answer, from a memfd that another process may use; changes nothing. `None`: it was
    /// not answered yet.
    pub(crate) fn handshake_in(
        fd: BorrowedFd<'_>,
        identity: Identity,
    ) -> Result<Option<init::Pair>, StateError> {
        match header::inspect(fd, size_of_file(fd)?)? {
            Found::State {
                identity: found, ..
            } if found != identity => Err(StateError::WrongIdentity {
                found,
                ours: identity,
            }),
            Found::State { answered: true, .. } => init::pair_in(fd).map(Some),
            _ => Ok(None),
        }
    }

    /// Maps the memfd and checks it; an empty one is laid out for `config`, another keeps its own capacities.
    ///
    /// `identity` names the file system, 128 bits that no other has, say a UUID, and the same in every
    /// instance.
    ///
    /// # Errors
    /// [`StateError`] says why the memfd is not the state of this file system; its content was not changed then.
    pub fn open(fd: OwnedFd, identity: Identity, config: &Config) -> Result<State, StateError> {
        let size = size_of_file(fd.as_fd())?;
        lock(fd.as_fd())?;
        let found = header::inspect(fd.as_fd(), size)?;
        let layout = match found {
            Found::Discarding => return State::discard(fd, identity, config),
            Found::Empty => Layout::of(config)?,
            Found::State {
                identity: found, ..
            } if found != identity => {
                return Err(StateError::WrongIdentity {
                    found,
                    ours: identity,
                });
            }
            Found::State { layout, .. } => layout,
        };
        let fresh = found == Found::Empty;
        if fresh {
            if size != 0 && size != layout.len as u64 {
                return Err(StateError::Foreign(
                    "it has no magic number and not the size of a state",
                ));
            }
            can_seal(fd.as_fd())?;
            nix::unistd::ftruncate(&fd, layout.len as i64).map_err(StateError::io("sizing"))?;
        }
        seal(fd.as_fd())?;
        let region = Region::map(fd, layout.len).map_err(StateError::io("mapping"))?;
        if fresh {
            layout.write(&region, identity);
        }
        State::on(region, layout, identity, fresh)
    }

    /// The state in a region that has one of this layout.
    fn on(
        region: Region,
        layout: Layout,
        identity: Identity,
        fresh: bool,
    ) -> Result<State, StateError> {
        // An entry of the journal is made when it is too late to find out that there is no memory.
        let journal = layout.handles - layout.journal;
        region
            .allocate(layout.journal, journal)
            .map_err(StateError::io("allocating the journal of"))?;
        let region = Arc::new(region);
        Ok(State {
            identity,
            fresh,
            nodes: NodeTable::open(region.clone(), layout.nodes, layout.config.nodes)?,
            handles: HandleTable::open(region.clone(), layout.handles, layout.config.handles)?,
            journal: Journal::open(region.clone(), layout.journal, layout.config.journal)?,
            arena: Arena::new(region.clone(), layout.arena, layout.len - layout.arena),
            init: InitStore::new(region.clone()),
            flights: Flights::open(region.clone()),
            region,
        })
    }

    /// Whether the memfd was empty: no instance served with it before.
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// The file system that the state belongs to.
    pub fn identity(&self) -> Identity {
        self.identity
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

    /// Memory of the server's own; empty unless [`Config::arena_pages`] asked for some.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// The requests that are being worked on, and those that an earlier instance may have died of.
    pub fn flights(&self) -> &Flights {
        &self.flights
    }

    pub(crate) fn init(&self) -> &InitStore {
        &self.init
    }

    /// The end of a replay: outcomes that are no longer owed are dropped, and what was not confirmed
    /// in the replay gets lookup count 0 and, if `keep` says so, goes together with its handles.
    ///
    /// A node that an owed outcome names is not shown to `keep`: the kernel has yet to be told of it. It goes, if
    /// the answer is never asked for, through [`State::take_orphans`] or at the next recovery.
    ///
    /// One that the kernel did not ask for, and of which a handle is left, goes by [`Keep::Remove`] only: the kernel may
    /// have got the handle by an answer to CREATE that was late for the recovery, looks the name up again, and goes on to
    /// use it. [`State::release`] tells when it has given it back.
    pub fn settle(&self, report: &Report, mut keep: impl FnMut(&Node) -> Keep) -> Settled {
        let mut settled = Settled {
            outcomes_dropped: self.journal.drop_below(report.lowest_owed),
            ..Settled::default()
        };
        self.flights.drop_below(report.lowest_owed);
        // Every node is looked at below, those of dropped outcomes too.
        self.journal.take_orphans();
        let owed = self.journal.nodes_named();
        self.nodes.for_each(|node| {
            if !self.nodes.disown(node.nodeid) {
                return;
            }
            let node = Node {
                lookups: 0,
                ..*node
            };
            let stays = owed.contains(&node.nodeid)
                || match keep(&node) {
                    Keep::Keep => true,
                    Keep::Drop => self.is_late(&node),
                    Keep::Remove => false,
                };
            if stays {
                settled.kept_unused += 1;
            } else if self.nodes.remove(node.nodeid) {
                settled.dropped += 1;
            }
        });
        self.handles.for_each(|handle| {
            if self.nodes.get(handle.info.nodeid).is_none()
                && self.handles.remove(handle.fh).is_some()
            {
                settled.handles_dropped += 1;
            }
        });
        settled
    }

    fn is_late(&self, node: &Node) -> bool {
        !self.nodes.was_shown(node.nodeid) && !self.handles.of_node(node.nodeid).is_empty()
    }

    /// RELEASE: frees the handle. Some: its node, if that has neither lookups nor other handles any more: the server
    /// removes what it holds for it, then calls [`State::remove_node`].
    pub fn release(&self, fh: u64) -> Option<Node> {
        let nodeid = self.handles.remove(fh)?.info.nodeid;
        self.nodes
            .get(nodeid)
            .filter(|node| node.lookups == 0 && self.handles.of_node(nodeid).is_empty())
            .filter(|_| !self.journal.nodes_named().contains(&nodeid))
    }

    /// Frees a node that [`NodeTable::forget`] gave back (or [`State::take_orphans`]), and what handles are left of
    /// it: a file that is not cached is not open. `false` if it was looked up again meanwhile.
    pub fn remove_node(&self, nodeid: u64) -> bool {
        let removed = self.nodes.remove(nodeid);
        if removed {
            for handle in self.handles.of_node(nodeid) {
                self.handles.remove(handle.fh);
            }
        }
        removed
    }

    /// Nodes with lookup count 0 whose last reason to stay (an outcome in the journal) has gone. The server
    /// removes what it holds for them (a file in the graveyard), then calls [`State::remove_node`]. Cheap when there
    /// are none; call it now and then, for instance at every FORGET.
    pub fn take_orphans(&self) -> Vec<Node> {
        let candidates = self.journal.take_orphans();
        if candidates.is_empty() {
            return Vec::new();
        }
        let owed = self.journal.nodes_named();
        let unused = candidates
            .into_iter()
            .filter(|nodeid| !owed.contains(nodeid));
        unused
            .filter_map(|nodeid| self.nodes.get(nodeid))
            .filter(|node| node.lookups == 0)
            .collect()
    }
}

fn size_of_file(fd: BorrowedFd<'_>) -> Result<u64, StateError> {
    let stat = nix::sys::stat::fstat(fd).map_err(StateError::io("looking at"))?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Err(StateError::Foreign("it is not a regular file"));
    }
    Ok(stat.st_size as u64)
}

/// Refuses a state that another process uses. The lock ends with the process, however it ends.
fn lock(fd: BorrowedFd<'_>) -> Result<(), StateError> {
    let mut whole = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(fd, FcntlArg::F_SETLK(&whole)) {
        Ok(_) => return Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => {}
        Err(other) => return Err(StateError::io("locking")(other)),
    }
    fcntl(fd, FcntlArg::F_GETLK(&mut whole)).map_err(StateError::io("locking"))?;
    Err(StateError::InUse {
        pid: whole.l_pid.max(0),
    })
}

/// So that a file that cannot be a state is not even resized.
fn can_seal(fd: BorrowedFd<'_>) -> Result<(), StateError> {
    let has =
        fcntl(fd, FcntlArg::F_GET_SEALS).map_err(|errno| StateError::NoSeals(errno.into()))?;
    if SealFlag::from_bits_retain(has).contains(SealFlag::F_SEAL_SEAL) {
        return Err(StateError::NoSeals(
            std::io::ErrorKind::PermissionDenied.into(),
        ));
    }
    Ok(())
}

/// From now on nobody can make the file smaller than what is mapped of it.
fn seal(fd: BorrowedFd<'_>) -> Result<(), StateError> {
    let wanted = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    let has =
        fcntl(fd, FcntlArg::F_GET_SEALS).map_err(|errno| StateError::NoSeals(errno.into()))?;
    if SealFlag::from_bits_retain(has).contains(wanted) {
        return Ok(());
    }
    fcntl(fd, FcntlArg::F_ADD_SEALS(wanted))
        .map(drop)
        .map_err(|errno| StateError::NoSeals(errno.into()))
}
