// SPDX-License-Identifier: GPL-2.0

//! The queue: `dev_restart.c` and its hooks in `dev.c`. Each function is what is done under one
//! taking of `fiq->lock` or `fpq->lock`.

use super::seeds::Seed;
use super::sizes::{Order, Size};
use super::state::{Answer, Fault, Forget, Op, Rid, State, Transit, Way, REPLAYS};
use rust_fuse_notify::proto::ids;
use rust_fuse_notify::proto::phase::Phase;
use std::mem;

impl State {
    /// `fiq->holding`.
    pub fn holding(&self) -> bool {
        self.phase() != Phase::Serving
    }

    fn is_internal(rid: Rid) -> bool {
        !matches!(rid, Rid::App(_))
    }

    /// `fuse_replay_is_current()`.
    fn replay_is_current(&mut self, rid: Rid) -> bool {
        let (phase, epoch) = (self.phase(), self.epoch());
        phase != Phase::Serving && self.req(rid).epoch == epoch
    }

    /// `fuse_resent_unique()`.
    fn mark_resent(&mut self, m: &Size, rid: Rid) {
        let epoch = self.epoch();
        let fresh = self.next_id();
        let req = self.req(rid);
        let own = !Self::is_internal(rid);
        req.unique = match m.seed {
            Some(Seed::ResendBitOnly) if own => ids::original(req.unique) | ids::RESEND,
            Some(Seed::NewIds) if own => ids::resent(fresh.into(), epoch),
            _ => ids::resent(req.unique, epoch),
        };
    }

    /// `fuse_dev_queue_req()`.
    pub fn queue(&mut self, m: &Size, rid: Rid) {
        if !self.kernel.connected {
            return self.end(rid, Answer::Aborted);
        }
        if self.is_revoked(m, rid) {
            return self.end(rid, Answer::Io);
        }
        if Self::is_internal(rid) {
            if !self.replay_is_current(rid) {
                return self.end(rid, Answer::Void);
            }
            if rid != Rid::Report {
                self.mark_resent(m, rid);
            }
        } else if self.holding() && m.seed != Some(Seed::DeliverEarly) {
            return self.kernel.held.push(rid);
        }
        self.kernel.pending.push(rid);
    }

    /// `fuse_queue_bad()`: the inode became bad after the request was built.
    fn is_revoked(&mut self, m: &Size, rid: Rid) -> bool {
        let inode = self.req(rid).inode;
        self.is_bad(inode) && m.seed != Some(Seed::BadBeforeSendOnly)
    }

    /// `fuse_request_end()`.
    pub fn end(&mut self, rid: Rid, answer: Answer) {
        if self.req(rid).answer.replace(answer).is_some() {
            self.fail(Fault::Twice);
        }
        if Self::is_internal(rid) {
            self.kernel.kicked = true;
        }
    }

    /// `fuse_chan_hold()`: takes everything away from the server that is gone. The caller has
    /// advanced the epoch, which is under the same lock.
    pub fn hold(&mut self, m: &Size) {
        self.kernel.delivered = 0;
        let mut ended = Vec::new();
        let mut taken = Vec::new();
        for rid in mem::take(&mut self.kernel.processing) {
            if Self::is_internal(rid) && m.seed != Some(Seed::SweepReplays) {
                ended.push(rid);
            } else {
                self.mark_resent(m, rid);
                taken.push(rid);
            }
        }
        let pending = mem::take(&mut self.kernel.pending);
        self.kernel.held.extend(pending);
        if m.seed != Some(Seed::SweepReplays) {
            self.kernel.held.retain(|rid| {
                let own = !Self::is_internal(*rid);
                if !own {
                    ended.push(*rid);
                }
                own
            });
        }
        self.kernel.held.extend(taken);
        if m.seed != Some(Seed::KeepForgets) {
            self.kernel.forgets.clear();
        }
        for rid in ended {
            self.end(rid, Answer::Void);
        }
        if m.order == Order::ResendFirst {
            self.unhold(m);
        }
    }

    /// `fuse_chan_unhold()`: what is held becomes pending, in the order of issue.
    pub fn unhold(&mut self, m: &Size) -> usize {
        let mut sorted = mem::take(&mut self.kernel.held);
        if m.seed != Some(Seed::Unsorted) {
            sorted.sort_by_key(|rid| self.req(*rid).id());
        }
        if m.seed != Some(Seed::BadNotInHeld) {
            let (bad, good): (Vec<_>, Vec<_>) =
                sorted.into_iter().partition(|rid| self.is_revoked(m, *rid));
            for rid in bad {
                self.end(rid, Answer::Io);
            }
            sorted = good;
        }
        for rid in &sorted {
            if ids::is_resent(self.req(*rid).unique) {
                self.mark_resent(m, *rid);
            }
            self.req(*rid).was_held = true;
        }
        let resent = sorted.len();
        sorted.append(&mut self.kernel.pending);
        self.kernel.pending = sorted;
        resent
    }

    /// `fuse_chan_owed()`: the lowest original id among what is held, or zero.
    pub fn lowest_owed(&mut self) -> u8 {
        let held = self.kernel.held.clone();
        let ids = held.into_iter().map(|rid| self.req(rid).id());
        ids.filter(|id| *id < REPLAYS).min().unwrap_or(0)
    }

    /// `fuse_dev_do_read()`, until it gives up `fiq->lock`.
    pub fn dequeue(&mut self) {
        let rid = self.kernel.pending.remove(0);
        let epoch = self.epoch();
        let req = self.req(rid);
        req.epoch = epoch;
        let (id, was_held) = (req.id(), req.was_held);
        if was_held {
            if id < self.kernel.delivered {
                self.fail(Fault::Order);
            }
            self.kernel.delivered = id;
        }
        self.put_transit(Transit {
            rid,
            way: Way::Read,
            answer: None,
            dying: false,
        });
    }

    fn put_transit(&mut self, transit: Transit) {
        self.kernel.transit.push(transit);
        self.kernel.transit.sort_by_key(|t| (t.rid, t.way));
    }

    /// `fuse_transit_end()`.
    fn take_transit(&mut self, index: usize) -> Transit {
        let transit = self.kernel.transit.remove(index);
        if self.kernel.transit.is_empty() && self.phase() != Phase::Serving {
            self.kernel.kicked = true;
        }
        transit
    }

    /// The rest of `fuse_dev_do_read()`. Returns what a server has now read.
    pub fn read_end(&mut self, m: &Size, index: usize, copied: bool) -> Option<Rid> {
        let Transit { rid, dying, .. } = self.take_transit(index);
        if !self.kernel.connected {
            self.end(rid, Answer::Aborted);
            return None;
        }
        let old = self.req(rid).epoch != self.epoch() && m.seed != Some(Seed::ReaderIgnoresEpoch);
        if old || !copied {
            if !copied && m.seed == Some(Seed::DyingCopyFails) {
                self.end(rid, Answer::Io);
            } else {
                self.requeue(m, rid, copied);
            }
            return None;
        }
        if rid == Rid::Report {
            let op = self.req(rid).op;
            self.end(rid, Answer::Done);
            if !dying {
                self.read_report(op);
            }
            return None;
        }
        self.kernel.processing.push(rid);
        self.kernel.processing.sort();
        (!dying).then_some(rid)
    }

    /// `fuse_dev_do_write()`, until it has found the request. Returns false if there is none.
    pub fn find(&mut self, unique: u64) -> Option<Rid> {
        let processing = self.kernel.processing.clone();
        processing
            .into_iter()
            .find(|rid| self.req(*rid).unique == unique)
    }

    /// It has found it.
    pub fn write_begin(&mut self, rid: Rid, answer: Answer, dying: bool) {
        self.kernel.processing.retain(|r| *r != rid);
        self.put_transit(Transit {
            rid,
            way: Way::Write,
            answer: Some(answer),
            dying,
        });
    }

    /// The rest of `fuse_dev_do_write()`.
    pub fn write_end(&mut self, m: &Size, index: usize, copied: bool) {
        let Transit { rid, answer, .. } = self.take_transit(index);
        if copied || !self.kernel.connected {
            self.end(rid, answer.expect("what is written is an answer"));
        } else if m.seed == Some(Seed::DyingCopyFails) {
            self.end(rid, Answer::Io);
        } else {
            self.requeue(m, rid, true);
        }
    }

    /// `fuse_requeue()`.
    fn requeue(&mut self, m: &Size, rid: Rid, seen: bool) {
        let internal = Self::is_internal(rid);
        if internal && !self.replay_is_current(rid) {
            return self.end(rid, Answer::Void);
        }
        if seen && !internal && m.seed != Some(Seed::RequeueUnmarked) {
            self.mark_resent(m, rid);
        }
        if self.holding() && !internal {
            self.kernel.held.push(rid);
        } else {
            self.kernel.pending.insert(0, rid);
        }
    }

    /// `fuse_requeue_dev()`: a device of several was closed. The others get its requests, or the
    /// next server does.
    pub fn close_device(&mut self, m: &Size) {
        let taken = mem::take(&mut self.kernel.processing);
        for rid in taken.into_iter().rev() {
            let internal = Self::is_internal(rid);
            if internal && !self.replay_is_current(rid) {
                self.end(rid, Answer::Void);
                continue;
            }
            if !internal {
                self.mark_resent(m, rid);
            }
            if self.holding() && !internal {
                self.kernel.held.insert(0, rid);
            } else {
                self.kernel.pending.insert(0, rid);
            }
        }
    }

    /// `fuse_chan_abort()`.
    pub fn abort(&mut self) {
        self.kernel.connected = false;
        let kernel = &mut self.kernel;
        let mut ended = mem::take(&mut kernel.pending);
        ended.append(&mut kernel.held);
        ended.append(&mut kernel.processing);
        kernel.forgets.clear();
        kernel.kicked = true;
        for rid in ended {
            self.end(rid, Answer::Aborted);
        }
    }

    /// `fuse_dev_queue_forget()`.
    pub fn queue_forget(&mut self, m: &Size, forget: Forget) {
        if !self.kernel.connected {
            return;
        }
        if forget.epoch == self.epoch() || m.seed == Some(Seed::ForgetAnyEpoch) {
            self.kernel.forgets.push(forget);
        }
    }

    /// A killed application takes its request back: `fuse_remove_pending_req()`.
    pub fn remove_pending(&mut self, rid: Rid) -> bool {
        let before = self.kernel.pending.len() + self.kernel.held.len();
        self.kernel.pending.retain(|r| *r != rid);
        self.kernel.held.retain(|r| *r != rid);
        self.kernel.pending.len() + self.kernel.held.len() < before
    }

    /// `request_pending()`, as far as requests go.
    pub fn can_read(&self) -> bool {
        !self.kernel.pending.is_empty() && self.phase() != Phase::Refused
    }

    /// What the request is for, for a message.
    pub fn describe(&mut self, rid: Rid) -> (u64, Op, u32) {
        let req = self.req(rid);
        (req.unique, req.op, req.epoch)
    }
}
