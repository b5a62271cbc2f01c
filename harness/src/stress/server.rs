// SPDX-License-Identifier: GPL-2.0
//! The server that is killed: a process that carries messages between the device and what survives it.
//!
//! The tree and the journal live in the process that kills, as they would live in a memfd. So a server can die between
//! any two system calls: after it read a message, after it was executed, before and after the answer.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use nix::sys::socket::{recv, send, socketpair, AddressFamily, MsgFlags, SockFlag, SockType};
use zerocopy::IntoBytes;

use crate::raw::answer::is_entry_reply;
use crate::raw::app::Proc;
use crate::raw::dev::MAX_WRITE;
use crate::raw::kit::Kit;
use crate::raw::msg::{Message, Replay};
use crate::raw::tree::{Answer, Tree};
use crate::raw::wire::{notify, op, OutHeader, Report, RestartedOut, COOKIE_BIT, RESTARTED_COMMIT};

const BUFFER: usize = MAX_WRITE as usize + 4096;
/// Every server says RESTARTED with the same one: the epoch tells them apart.
const COOKIE: u64 = COOKIE_BIT | 1;

struct Brain {
    tree: Tree,
    /// Outcomes of changes that may be asked for again, by original id.
    journal: HashMap<u64, Answer>,
    shown: Vec<Replay>,
    identity: [u64; 2],
    contradictions: u64,
}

/// What survives the servers.
#[derive(Clone)]
pub struct State(Arc<Mutex<Brain>>);

impl State {
    pub fn new(identity: [u64; 2]) -> State {
        State(Arc::new(Mutex::new(Brain {
            tree: Tree::default(),
            journal: HashMap::new(),
            shown: Vec::new(),
            identity,
            contradictions: 0,
        })))
    }

    /// FORGETs of more than was given out, and other things that must not come.
    pub fn contradictions(&self) -> u64 {
        self.0.lock().expect("nobody panics with it").contradictions
    }
}

/// Starts a server. `again`: it takes over from one that is dead.
pub fn spawn(kit: &Kit<'_>, state: &State, again: bool) -> Result<Server> {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    let identity = kit.config.identity;
    let process = Proc::spawn("the server", &[ours.as_raw_fd()], || {
        if again && say(kit, 0, 0, identity).is_err() {
            return 1;
        }
        carry(kit, &theirs).map_or(1, |()| 0)
    })?;
    drop(theirs);
    let brain = state.0.clone();
    let mind = std::thread::Builder::new()
        .name("brain".into())
        .spawn(move || think(&brain, &ours))
        .context("a thread")?;
    Ok(Server { process, mind })
}

/// A process, and the thread that executes what it carries.
pub struct Server {
    process: Proc,
    mind: JoinHandle<()>,
}

impl Server {
    /// Kills it. When this returns nothing is executed for it any more.
    pub fn kill(mut self, patience: Duration) -> Result<()> {
        self.process.signal(Signal::SIGKILL)?;
        self.process.wait(patience)?;
        self.mind
            .join()
            .map_err(|_| anyhow::anyhow!("the brain has panicked"))
    }
}

fn say(kit: &Kit<'_>, flags: u32, epoch: u32, identity: [u64; 2]) -> Result<(), nix::Error> {
    kit.dev.restarted(RestartedOut {
        cookie: COOKIE,
        flags,
        epoch,
        identity,
    })
}

/// The server's life: message in, answer out, until somebody ends it.
fn carry(kit: &Kit<'_>, brain: &OwnedFd) -> io::Result<()> {
    let mut buffer = vec![0u8; BUFFER];
    loop {
        let n = match nix::unistd::read(&kit.dev, &mut buffer) {
            Ok(n) => n,
            Err(nix::Error::ENOENT | nix::Error::EINTR | nix::Error::EAGAIN) => continue,
            Err(e) => return Err(e.into()),
        };
        send(brain.as_raw_fd(), &buffer[..n], MsgFlags::MSG_NOSIGNAL)?;
        let n = recv(brain.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if n > 1 {
            // ENOENT: the requester is gone.
            let _ = kit.dev.write_raw(&buffer[..n]);
        }
    }
}

fn think(brain: &Mutex<Brain>, server: &OwnedFd) {
    let mut buffer = vec![0u8; BUFFER];
    while let Ok(n @ 1..) = recv(server.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
        let Ok(m) = Message::parse(&buffer[..n]) else {
            return;
        };
        let out = brain.lock().expect("nobody panics with it").handle(&m);
        if send(server.as_raw_fd(), &out, MsgFlags::MSG_NOSIGNAL).is_err() {
            return;
        }
    }
}

impl Brain {
    /// What is to be written for a message; one byte stands for nothing.
    fn handle(&mut self, m: &Message) -> Vec<u8> {
        if let Some(report) = m.report(COOKIE) {
            return self.commit(&report);
        }
        if let Some(replay) = m.replay() {
            if replay.nodeid == crate::raw::wire::ROOT {
                self.shown.clear();
            }
            let answer = self.tree.replay(&replay);
            if matches!(answer, Answer::Ok(_)) {
                self.shown.push(replay);
            }
            return reply(m.unique(), &answer);
        }
        if let Some(known) = self.journal.get(&m.original()).cloned() {
            self.count_again(m, &known);
            return reply(m.unique(), &known);
        }
        let answer = self.tree.apply(m).unwrap_or_else(|e| {
            self.contradictions += 1;
            println!("WRONG: {e:#}");
            Answer::Err(libc::EIO)
        });
        if m.wants_no_reply() {
            return vec![0];
        }
        let changes = matches!(
            m.opcode(),
            op::MKDIR
                | op::CREATE
                | op::MKNOD
                | op::UNLINK
                | op::RMDIR
                | op::RENAME
                | op::RENAME2
                | op::LINK
                | op::SYMLINK
        );
        if changes {
            self.journal.insert(m.original(), answer.clone());
        }
        reply(m.unique(), &answer)
    }

    /// The lookup of an answer that is given again counts again: the table is the replayed one since.
    fn count_again(&mut self, m: &Message, known: &Answer) {
        let Answer::Ok(payload) = known else { return };
        let id = payload
            .get(..8)
            .and_then(|b| b.try_into().ok())
            .map(u64::from_ne_bytes);
        if let (true, Some(node)) = (
            is_entry_reply(m.opcode()),
            id.and_then(|id| self.tree.nodes.get_mut(&id)),
        ) {
            node.nlookup += 1;
        }
    }

    fn commit(&mut self, report: &Report) -> Vec<u8> {
        self.tree.adopt(&self.shown);
        let lowest = report.lowest_owed;
        self.journal.retain(|id, _| lowest != 0 && *id >= lowest);
        let out = RestartedOut {
            cookie: COOKIE,
            flags: RESTARTED_COMMIT,
            epoch: report.epoch,
            identity: self.identity,
        };
        let header = OutHeader {
            len: 48,
            error: notify::RESTARTED,
            unique: 0,
        };
        [header.as_bytes(), out.as_bytes()].concat()
    }
}

fn reply(unique: u64, answer: &Answer) -> Vec<u8> {
    let (error, payload) = match answer {
        Answer::Ok(payload) => (0, payload.as_slice()),
        Answer::Err(errno) => (-errno, &[][..]),
        Answer::Nothing => return vec![0],
    };
    let header = OutHeader {
        len: (16 + payload.len()) as u32,
        error,
        unique,
    };
    [header.as_bytes(), payload].concat()
}
