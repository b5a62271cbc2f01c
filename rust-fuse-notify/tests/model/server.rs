// SPDX-License-Identifier: GPL-2.0

//! Servers that keep the contract, and the store that survives them.

use super::sizes::{Order, Size};
use super::state::{Answer, Fault, Late, Message, Op, Rid, Server, State, Way, FILES};
use rust_fuse_notify::proto::ids;
use rust_fuse_notify::proto::phase::Phase;

/// What a server may say of a replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Say {
    /// What it finds under the nodeid, without a look at the generation.
    Found,
    /// `ESTALE`.
    Stale,
}

impl State {
    /// A message was read.
    pub fn read(&mut self, rid: Rid) {
        let (unique, op, epoch) = self.describe(rid);
        let root = matches!(op, Op::Replay { file: None, .. });
        if self.server.wrong && !root {
            self.fail(Fault::Stranger);
        }
        if root {
            // A recovery begins: the table will be what is shown now, and nobody waits for what
            // was read before.
            self.server.inbox.clear();
            self.server.shown = [0; FILES];
            self.server.replays = 0;
            self.server.report = None;
        }
        self.server.inbox.push(Message {
            unique,
            op,
            rid,
            epoch,
            answer: None,
        });
        self.server.inbox.sort_by_key(|m| m.rid);
    }

    /// The report was read. What nobody asks for again is dropped from the journal.
    pub fn read_report(&mut self, op: Op) {
        let Op::Report {
            epoch,
            replayed,
            lowest_owed,
            ..
        } = op
        else {
            return;
        };
        if self.server.wrong {
            return self.fail(Fault::Stranger);
        }
        if replayed != self.server.replays {
            self.fail(Fault::Report);
        }
        self.server.report = Some(epoch);
        self.store
            .journal
            .retain(|id| lowest_owed > 0 && *id >= lowest_owed);
    }

    /// An operation takes effect, once: the journal has the ids of those that did.
    pub fn execute(&mut self, index: usize) {
        let message = self.server.inbox[index];
        let answer = self.effect(message);
        self.server.inbox[index].answer = Some(answer);
    }

    /// Whether the operation changes anything that survives the server.
    pub fn has_effect(op: Op) -> bool {
        matches!(op, Op::Create(_) | Op::Touch { .. })
    }

    fn effect(&mut self, message: Message) -> Answer {
        let id = ids::original(message.unique) as u8;
        // Who may have seen it before is told by the RESEND bit; without it there is no need to look.
        let done = ids::is_resent(message.unique) && self.store.journal.contains(&id);
        if Self::has_effect(message.op) && !done {
            if self.store.effects.contains(&id) {
                self.fail(Fault::Twice);
            }
            self.store.journal.push(id);
            self.store.effects.push(id);
        }
        match message.op {
            Op::Lookup(file) => self.entry(file),
            Op::Create(file) => {
                if !done {
                    self.store.gens[usize::from(file)] += 1;
                }
                self.entry(file)
            }
            Op::Touch { file, gen } => {
                let at = usize::from(file);
                if self.store.gens[at] != gen {
                    self.fail(Fault::Successor);
                }
                if self.server.table[at] == 0 {
                    self.fail(Fault::Untold);
                }
                if self.apps.iter().filter_map(|a| a.req).any(|r| {
                    r.op == message.op && r.unique == message.unique && self.is_bad(r.inode)
                }) {
                    self.fail(Fault::Revoked);
                }
                Answer::Done
            }
            Op::Replay { .. } | Op::Report { .. } => Answer::Stale,
        }
    }

    fn entry(&mut self, file: u8) -> Answer {
        let at = usize::from(file);
        let gen = self.store.gens[at];
        if gen == 0 {
            return Answer::NoEntry;
        }
        self.server.table[at] += 1;
        Answer::Entry { file, gen }
    }

    /// The server answers a replay.
    pub fn answer_replay(&mut self, m: &Size, index: usize, say: Say) {
        let message = self.server.inbox.remove(index);
        let Op::Replay { file, nlookup, .. } = message.op else {
            return;
        };
        if !self.server.wrong {
            self.server.replays += 1;
        }
        let answer = match (file, say) {
            (_, Say::Stale) => Answer::Stale,
            (None, Say::Found) => Answer::Attr { file, gen: 0 },
            (Some(at), Say::Found) => {
                let at = usize::from(at);
                self.server.shown[at] += nlookup;
                if m.order == Order::ResendFirst {
                    // There is no moment at which the table could be exchanged.
                    self.server.table[at] = nlookup;
                }
                let gen = self.store.gens[at];
                Answer::Attr { file, gen }
            }
        };
        self.write(message, answer, false);
    }

    /// The server answers a request.
    pub fn answer(&mut self, index: usize) {
        let message = self.server.inbox.remove(index);
        let answer = message.answer.unwrap_or_else(|| self.effect(message));
        self.write(message, answer, false);
    }

    /// A reply finds its request, or nothing.
    fn write(&mut self, message: Message, answer: Answer, dying: bool) {
        let Some(rid) = self.find(message.unique) else {
            return;
        };
        if rid != message.rid || self.req(rid).epoch != message.epoch {
            self.fail(Fault::WrongReply);
        }
        self.write_begin(rid, answer, dying);
    }

    /// A thread of a dead server gets to what it had begun.
    pub fn late(&mut self, m: &Size, index: usize) {
        match self.late.remove(index) {
            Late::Reply(message) => {
                let answer = message.answer.expect("what is late had been answered");
                self.write(message, answer, true);
            }
            // It is refused or not, there is nobody to be told.
            Late::Commit(epoch) => {
                let _ = self.say_commit(m, epoch);
            }
        }
    }

    /// The server writes COMMIT.
    pub fn commit(&mut self, m: &Size) {
        let Some(epoch) = self.server.report.take() else {
            return;
        };
        if self.say_commit(m, epoch).is_ok() && m.order == Order::ReplayFirst {
            self.server.table = self.server.shown;
        }
    }

    /// The server dies, and one of its threads may be late.
    pub fn crash(&mut self, late: Option<usize>) {
        if let Some(index) = late {
            let late = match self.server.inbox.get(index).copied() {
                Some(mut message) => {
                    let answer = match message.op {
                        Op::Replay { file, .. } => {
                            let gen = file.map_or(0, |f| self.store.gens[usize::from(f)]);
                            Answer::Attr { file, gen }
                        }
                        _ => message.answer.unwrap_or_else(|| self.effect(message)),
                    };
                    message.answer = Some(answer);
                    Late::Reply(message)
                }
                None => Late::Commit(self.server.report.expect("asked for only if there is one")),
            };
            self.late.push(late);
        }
        for transit in &mut self.kernel.transit {
            transit.dying = true;
        }
        self.server = Server::default();
        self.told = false;
    }

    /// A new instance is there, and says RESTARTED.
    pub fn start(&mut self, m: &Size, wrong: bool) {
        self.server = Server {
            alive: true,
            wrong,
            ..Server::default()
        };
        self.say_restarted(m);
    }

    /// Whether a thread of the live server may read: the model has one that does.
    pub fn may_read(&self) -> bool {
        let busy = |t: &super::state::Transit| t.way == Way::Read && !t.dying;
        self.server.alive && !self.kernel.transit.iter().any(busy)
    }

    /// The server gets a FORGET.
    pub fn read_forget(&mut self) {
        let forget = self.kernel.forgets.remove(0);
        if self.server.wrong {
            return self.fail(Fault::Stranger);
        }
        let count = &mut self.server.table[usize::from(forget.file)];
        match count.checked_sub(forget.nlookup) {
            Some(rest) => *count = rest,
            None => self.fail(Fault::Counts),
        }
    }

    /// Whether the counts of kernel and server can be compared: a good server serves, and no
    /// lookup and no FORGET is under way.
    pub fn is_quiet(&self) -> bool {
        let lookups = self.apps.iter().filter_map(|a| a.req.as_ref());
        self.server.alive
            && !self.server.wrong
            && self.kernel.connected
            && self.phase() == Phase::Serving
            && self.kernel.forgets.is_empty()
            && self.kernel.evicting.is_empty()
            && lookups.clone().all(|r| matches!(r.op, Op::Touch { .. }))
    }

    /// Whether the server's counts are the kernel's. An inode that was revoked under an earlier
    /// server is not shown again, so the FORGET of what that server counted is void.
    pub fn counts_agree(&self) -> bool {
        let epoch = self.epoch();
        (0..FILES).all(|file| {
            let of = |i: &&super::state::Inode| {
                usize::from(i.file) == file && (!i.bad || i.lookup_epoch == epoch)
            };
            let count: u8 = self
                .kernel
                .inodes
                .iter()
                .filter(of)
                .map(|i| i.nlookup)
                .sum();
            count == self.server.table[file]
        })
    }
}
