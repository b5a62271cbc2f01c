// SPDX-License-Identifier: GPL-2.0

//! What one state of the model consists of.

use rust_fuse_notify::proto::{
    ids,
    phase::{Machine, Phase},
    tally::Tally,
    window::Window,
};
use std::hash::{Hash, Hasher};

/// How many names there are below the root. The file of name `n` has the nodeid `n`.
pub const FILES: usize = 2;

/// Names an inode of the kernel, as its address does.
pub type Key = u8;

/// The root is not in the list of inodes: it is never evicted and never bad.
pub const ROOT: Key = 0;

/// Names a request, as its address does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rid {
    /// The one that this application waits for.
    App(u8),
    /// The replay in this slot.
    Slot(u8),
    /// The report.
    Report,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    Lookup(u8),
    Create(u8),
    /// Any operation that names an inode and must take effect once, and on that file.
    Touch {
        file: u8,
        /// What the server is not told, but what the application means.
        gen: u8,
    },
    /// `None` is the root.
    Replay {
        file: Option<u8>,
        gen: u8,
        nlookup: u8,
    },
    Report {
        epoch: u32,
        replayed: u8,
        held: u8,
        lowest_owed: u8,
    },
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    Entry {
        file: u8,
        gen: u8,
    },
    Done,
    /// To a replay, and the root's has no generation.
    Attr {
        file: Option<u8>,
        gen: u8,
    },
    NoEntry,
    /// `ESTALE` to a replay.
    Stale,
    Io,
    /// The kernel ended it, its recovery is over.
    Void,
    /// The kernel ended it, the connection is gone.
    Aborted,
}

/// `struct fuse_req`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Req {
    pub unique: u64,
    /// The epoch in which it was taken off the queue; of the engine's own, that of the recovery.
    pub epoch: u32,
    pub op: Op,
    /// The inode that it names.
    pub inode: Option<Key>,
    pub answer: Option<Answer>,
    /// Ghost: it was held when the last recovery was completed.
    pub was_held: bool,
}

impl Req {
    pub fn id(&self) -> u8 {
        ids::original(self.unique) as u8
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    Read,
    Write,
}

/// A request that a reader or writer of the device has in its hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Transit {
    pub rid: Rid,
    pub way: Way,
    /// What is being written.
    pub answer: Option<Answer>,
    /// The thread is being killed: copies may fail.
    pub dying: bool,
}

/// A FORGET, or a lookup count that is about to become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Forget {
    pub file: u8,
    pub nlookup: u8,
    pub epoch: u32,
}

/// `struct fuse_inode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Inode {
    pub key: Key,
    pub file: u8,
    pub gen: u8,
    pub nlookup: u8,
    pub lookup_epoch: u32,
    pub walk_epoch: u32,
    pub bad: bool,
    pub hashed: bool,
    /// To be revoked at RELEASE; true if the server has its count.
    pub revoked: Option<bool>,
}

/// A replay that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot {
    pub index: u8,
    pub inode: Key,
    pub epoch: u32,
    pub req: Req,
}

/// The core's state machine, with the hash that the checker needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Core(pub Machine);

impl Hash for Core {
    fn hash<H: Hasher>(&self, h: &mut H) {
        (self.0.phase() as u8, self.0.epoch()).hash(h);
    }
}

/// The core's window. What is taken is told by [`Slot::index`], which is hashed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slots(pub Window);

impl Hash for Slots {
    fn hash<H: Hasher>(&self, h: &mut H) {
        self.0.in_flight().hash(h);
    }
}

/// The core's numbers of this recovery; there is no time in the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbers(pub Tally);

impl Hash for Numbers {
    fn hash<H: Hasher>(&self, h: &mut H) {
        let t = &self.0;
        (t.confirmed, t.revoked, t.void, t.held, t.resent).hash(h);
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// The connection was not aborted.
    pub connected: bool,
    pub core: Core,
    pub window: Slots,
    pub tally: Numbers,
    /// The engine's work item is queued.
    pub kicked: bool,
    pub pending: Vec<Rid>,
    pub held: Vec<Rid>,
    pub processing: Vec<Rid>,
    pub transit: Vec<Transit>,
    pub forgets: Vec<Forget>,
    /// Inodes that are being evicted, whose FORGET is not queued yet.
    pub evicting: Vec<Forget>,
    /// `s_inodes`: the newest is the first.
    pub inodes: Vec<Inode>,
    pub slots: Vec<Slot>,
    /// The report that is in flight, or has landed.
    pub report: Option<Req>,
    pub place: Option<Key>,
    pub walked: bool,
    /// Ghost: the epoch of the last server that committed.
    pub committed: u32,
    /// Ghost: the original id of the last held request that was delivered.
    pub delivered: u8,
}

/// What a server has read and not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Message {
    pub unique: u64,
    pub op: Op,
    /// Ghost: the request, and as whom it was sent.
    pub rid: Rid,
    pub epoch: u32,
    /// What to answer, once it has taken effect.
    pub answer: Option<Answer>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Server {
    pub alive: bool,
    /// It serves another file system.
    pub wrong: bool,
    pub inbox: Vec<Message>,
    /// Lookup counts by nodeid.
    pub table: [u8; FILES],
    /// Those that replays showed; the table from COMMIT on.
    pub shown: [u8; FILES],
    pub replays: u8,
    /// The epoch to be committed.
    pub report: Option<u32>,
}

/// What survives a server: the backing store and the journal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Store {
    /// The generation of the file that has this nodeid; zero if there is none.
    pub gens: [u8; FILES],
    /// Original ids of operations that took effect and were not pruned.
    pub journal: Vec<u8>,
    /// Ghost: the same, never pruned.
    pub effects: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct App {
    pub step: u8,
    pub inode: Option<Key>,
    /// It has looked whether its inode is bad, built its request, and waits for a lock, say.
    pub built: bool,
    pub req: Option<Req>,
}

/// What a thread of a dead server may still do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Late {
    Reply(Message),
    Commit(u32),
}

/// How often what is not progress may still happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Budget {
    pub crashes: u8,
    /// RESTARTED by the keeper as soon as the server is dead: once for each death.
    pub keeper: bool,
    /// RESTARTED by anybody at any time.
    pub extra: u8,
    /// Servers of another file system.
    pub wrong: u8,
    /// Files that are replaced under the same nodeid while no server runs.
    pub replaced: u8,
    /// Replays that a server answers with an error though it knows the file.
    pub errors: u8,
    /// Waiting applications that are killed.
    pub kills: u8,
    /// Lookups that are given back instead of counted.
    pub given_back: u8,
    /// Evictions of inodes that nobody uses.
    pub evictions: u8,
    /// Cloned devices that are closed by a crash, before anybody says RESTARTED.
    pub closes: u8,
    /// COMMITs of the present epoch when nobody was asked for one, as probes are.
    pub probes: u8,
    /// Aborts of the connection.
    pub aborts: u8,
}

/// What went wrong; nothing happens after that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    WrongReply,
    Successor,
    Revoked,
    Untold,
    Counts,
    Order,
    Twice,
    WrongError,
    Report,
    Uncommitted,
    Stranger,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub kernel: Kernel,
    pub server: Server,
    pub store: Store,
    pub apps: Vec<App>,
    pub late: Vec<Late>,
    pub left: Budget,
    /// The keeper has said RESTARTED for this death.
    pub told: bool,
    pub fault: Option<Fault>,
}

impl State {
    /// Notes the first thing that goes wrong.
    pub fn fail(&mut self, fault: Fault) {
        self.fault.get_or_insert(fault);
    }

    pub fn phase(&self) -> Phase {
        self.kernel.core.0.phase()
    }

    pub fn epoch(&self) -> u32 {
        self.kernel.core.0.epoch()
    }

    /// # Panics
    ///
    /// If there is none: no list names a request that has gone.
    pub fn req(&mut self, rid: Rid) -> &mut Req {
        match rid {
            Rid::App(app) => self.apps[usize::from(app)].req.as_mut(),
            Rid::Slot(index) => self
                .kernel
                .slots
                .iter_mut()
                .find(|s| s.index == index)
                .map(|s| &mut s.req),
            Rid::Report => self.kernel.report.as_mut(),
        }
        .expect("a list names a request that has gone")
    }

    pub fn inode(&mut self, key: Key) -> Option<&mut Inode> {
        self.kernel.inodes.iter_mut().find(|i| i.key == key)
    }

    pub fn is_bad(&self, key: Option<Key>) -> bool {
        self.kernel
            .inodes
            .iter()
            .any(|i| Some(i.key) == key && i.bad)
    }

    /// The id of the next request: greater than any that somebody still knows.
    pub fn next_id(&self) -> u8 {
        let reqs = self.apps.iter().filter_map(|a| a.req).map(|r| r.unique);
        let read = self.server.inbox.iter().map(|m| m.unique);
        let late = self.late.iter().map(|l| match l {
            Late::Reply(m) => m.unique,
            Late::Commit(_) => 0,
        });
        let ids = reqs.chain(read).chain(late).map(|u| ids::original(u) as u8);
        1 + ids.filter(|id| *id < REPLAYS).max().unwrap_or(0)
    }
}

/// Replays take their ids from the same counter in the kernel. Here they have numbers of their own,
/// from this on, so that states differ less.
pub const REPLAYS: u8 = 0x80;
