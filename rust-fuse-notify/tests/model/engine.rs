// SPDX-License-Identifier: GPL-2.0

//! The engine: `kernel/engine.rs` without what needs a kernel. The decisions are the core's.

use super::seeds::Seed;
use super::sizes::Size;
use super::state::{Answer, Fault, Inode, Key, Op, Req, Rid, Slot, State, REPLAYS, ROOT};
use rust_fuse_notify::proto::phase::Phase;
use rust_fuse_notify::proto::tally::Tally;
use rust_fuse_notify::proto::verdict::{self, judge, Known, Shown, Verdict};
use rust_fuse_notify::proto::wire::{Demand, Refusal, RestartedOut, COMMIT, COOKIE};

const IDENTITY: [u64; 2] = [0x11, 0x22];
const FILE: u32 = 0o100644;
const DIR: u32 = 0o040755;

/// `attr.ino` of each file that ever had the nodeid.
fn ino(file: u8, gen: u8) -> u64 {
    u64::from(file) * 100 + u64::from(gen)
}

fn shown(answer: Answer) -> Option<Shown> {
    match answer {
        Answer::Attr {
            file: Some(file),
            gen,
        } => Some(Shown {
            mode: FILE,
            ino: ino(file, gen),
            size: 0,
        }),
        Answer::Attr { file: None, .. } => Some(Shown {
            mode: DIR,
            ino: 1,
            size: 0,
        }),
        _ => None,
    }
}

impl State {
    /// `Engine::notify()`: RESTARTED.
    pub fn say_restarted(&mut self, m: &Size) {
        let refused = self.notify(m, 0, 0).err();
        assert_eq!(refused, (!self.kernel.connected).then_some(Refusal::Gone));
    }

    /// `Engine::notify()`: COMMIT.
    pub fn say_commit(&mut self, m: &Size, epoch: u32) -> Result<(), Refusal> {
        self.notify(m, COMMIT, epoch)
    }

    fn notify(&mut self, m: &Size, flags: u32, epoch: u32) -> Result<(), Refusal> {
        let out = RestartedOut {
            cookie: COOKIE,
            flags,
            epoch,
            identity: IDENTITY,
        };
        match out.demand(IDENTITY)? {
            Demand::Restarted => self.restarted(m)?,
            Demand::Commit(epoch) => {
                let epoch = match m.seed {
                    Some(Seed::CommitAnyEpoch) => self.epoch(),
                    _ => epoch,
                };
                self.kernel.core.0.commit(epoch)?;
                self.kernel.committed = epoch;
            }
        }
        self.kernel.kicked = true;
        Ok(())
    }

    fn restarted(&mut self, m: &Size) -> Result<(), Refusal> {
        // fuse_chan_hold()
        if !self.kernel.connected {
            return Err(Refusal::Gone);
        }
        if self.phase() != Phase::Serving && m.seed != Some(Seed::NoReset) {
            for inode in &mut self.kernel.inodes {
                inode.revoked = None;
            }
        }
        // The sweep counts the epoch and changes it before it takes anything.
        self.kernel.core.0.restarted(self.epoch() + 1)?;
        self.hold(m);
        self.kernel.place = None;
        self.kernel.walked = false;
        self.kernel.tally.0 = Tally::default();
        Ok(())
    }

    /// `Engine::run()`.
    pub fn run(&mut self, m: &Size) {
        self.kernel.kicked = false;
        self.collect(m);
        if !self.kernel.connected {
            return self.abandon();
        }
        loop {
            let before = self.phase();
            match before {
                Phase::Held => self.send_root(m),
                Phase::Replay => self.send_more(m),
                Phase::Settle => self.send_report(m),
                Phase::Release => self.release(m),
                _ => {}
            }
            if self.phase() == before {
                break;
            }
        }
    }

    /// `Engine::abandon()`.
    fn abandon(&mut self) {
        self.kernel.core.0.end();
        self.kernel.place = None;
        for inode in &mut self.kernel.inodes {
            inode.revoked = None;
        }
    }

    fn collect(&mut self, m: &Size) {
        if self.kernel.report.is_some_and(|r| r.answer.is_some()) {
            self.kernel.report = None;
        }
        let (landed, flying): (Vec<_>, Vec<_>) = self
            .kernel
            .slots
            .drain(..)
            .partition(|s| s.req.answer.is_some());
        self.kernel.slots = flying;
        for slot in landed {
            self.kernel.window.0.give(slot.index.into());
            self.apply(m, slot);
        }
    }

    fn apply(&mut self, m: &Size, slot: Slot) {
        let root = slot.inode == ROOT;
        let known = match slot.req.op {
            Op::Replay {
                file: Some(file),
                gen,
                ..
            } => Known {
                kind: FILE,
                ino: Some(ino(file, gen)),
            },
            _ => Known {
                kind: DIR,
                ino: None,
            },
        };
        let answer = slot.req.answer.expect("it has landed");
        let current = self.kernel.core.0.is_current(slot.epoch) && self.kernel.connected;
        let answer = match shown(answer) {
            _ if !current && m.seed != Some(Seed::JudgeOld) => verdict::Answer::Over,
            Some(shown) => verdict::Answer::Attr(shown),
            None => verdict::Answer::Error,
        };
        let verdict = judge(known, answer);
        if verdict == Verdict::Void {
            return;
        }
        self.kernel.tally.0.count(verdict);
        if root {
            self.kernel
                .core
                .0
                .root_answered(verdict == Verdict::Confirmed || m.seed == Some(Seed::NoFence));
            return;
        }
        let Some(inode) = self.inode(slot.inode) else {
            return;
        };
        match verdict {
            Verdict::Confirmed => inode.lookup_epoch = slot.epoch,
            Verdict::RevokedCounted => inode.revoked = Some(true),
            Verdict::RevokedUnknown => inode.revoked = Some(false),
            Verdict::Void => {}
        }
        if m.seed == Some(Seed::RevokeAtOnce) {
            self.revoke(m);
        }
    }

    fn send_root(&mut self, m: &Size) {
        let op = Op::Replay {
            file: None,
            gen: 0,
            nlookup: 1,
        };
        self.send_replay(m, ROOT, op);
        self.kernel.core.0.root_sent();
    }

    /// `fuse_restart_next()`.
    fn next(&mut self) -> Option<Inode> {
        let epoch = self.epoch();
        let place = self.kernel.place;
        let inodes = &mut self.kernel.inodes;
        let from = match inodes.iter().position(|i| Some(i.key) == place) {
            Some(at) => at + 1,
            None => 0,
        };
        let found = inodes[from..].iter_mut().find_map(|inode| {
            if inode.walk_epoch == epoch || inode.bad {
                return None;
            }
            inode.walk_epoch = epoch;
            (inode.nlookup > 0).then_some(*inode)
        });
        self.kernel.place = found.map(|i| i.key);
        found
    }

    fn send_more(&mut self, m: &Size) {
        let epoch = self.epoch();
        while !self.kernel.walked && self.kernel.window.0.in_flight() < m.window {
            let Some(inode) = self.next() else {
                self.kernel.walked = true;
                break;
            };
            let op = Op::Replay {
                file: Some(inode.file),
                gen: inode.gen,
                nlookup: inode.nlookup,
            };
            self.send_replay(m, inode.key, op);
        }
        let waiting = self.kernel.slots.iter().any(|s| s.epoch == epoch);
        if self.kernel.walked && !waiting {
            self.kernel.core.0.replayed();
        }
    }

    /// `Engine::send()` and `fuse_chan_send_replay()`.
    fn send_replay(&mut self, m: &Size, inode: Key, op: Op) {
        let epoch = self.epoch();
        let index = self.kernel.window.0.take().expect("the window has room") as u8;
        self.kernel.slots.push(Slot {
            index,
            inode,
            epoch,
            req: Req {
                unique: u64::from(REPLAYS + inode),
                epoch,
                op,
                inode: None,
                answer: None,
                was_held: false,
            },
        });
        self.kernel.slots.sort_by_key(|s| s.index);
        self.queue(m, Rid::Slot(index));
    }

    fn send_report(&mut self, m: &Size) {
        let settled = self.kernel.transit.is_empty() || m.seed == Some(Seed::ReportUnsettled);
        if self.kernel.report.is_some() || !settled {
            return;
        }
        let epoch = self.epoch();
        self.kernel.tally.0.held = self.kernel.held.len() as u64;
        let lowest = self.lowest_owed();
        let report = self.kernel.tally.0.report(epoch, lowest.into());
        self.kernel.report = Some(Req {
            unique: COOKIE,
            epoch,
            op: Op::Report {
                epoch: report.epoch,
                replayed: report.replayed as u8,
                held: report.held as u8,
                lowest_owed: report.lowest_owed as u8,
            },
            inode: None,
            answer: None,
            was_held: false,
        });
        self.queue(m, Rid::Report);
        self.kernel.core.0.prepared();
    }

    /// `fuse_restart_release()`.
    fn revoke(&mut self, m: &Size) {
        let epoch = self.epoch();
        if self.kernel.committed != epoch && self.kernel.inodes.iter().any(|i| i.revoked.is_some())
        {
            self.fail(Fault::Uncommitted);
        }
        for inode in &mut self.kernel.inodes {
            let Some(counted) = inode.revoked.take() else {
                continue;
            };
            inode.bad = true;
            inode.hashed = false;
            if counted || m.seed == Some(Seed::KeepUnknownCount) {
                inode.lookup_epoch = epoch;
            } else {
                inode.nlookup = 0;
            }
        }
    }

    fn release(&mut self, m: &Size) {
        self.kernel.place = None;
        self.revoke(m);
        self.kernel.tally.0.resent = self.unhold(m) as u64;
        self.kernel.core.0.released();
    }
}
