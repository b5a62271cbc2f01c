// SPDX-License-Identifier: GPL-2.0

//! The engine: what happens when.
//!
//! The engine never waits for a server. [`Engine::notify`] runs in the `write()` of whoever says
//! RESTARTED or COMMIT, sweeps the queues and kicks. [`Engine::run`] runs in a work item whenever
//! it was kicked: by a notification, by an answer to a replay, by a request that settled, by an
//! abort. Each time it collects what has landed, does what the phase asks for, and returns.
//!
//! Who holds what: both take the engine's lock, a mutex, and under it only spinlocks of fuse and
//! of the list of inodes. `end()` of the engine's requests takes no lock.

use super::{
    conn::{name, now, Alone, Mounted, Restart},
    flight::{shown, Berth, Replay, Report},
    inode::{Claim, InodeRef},
    proto::{
        phase::{Machine, Phase},
        tally::{Tally, Totals},
        verdict::{judge, Answer, Verdict},
        window::{Window, SLOTS},
        wire::{Demand, Refusal, RestartedOut}, //
    }, //
};
use core::mem;
use kernel::{
    bindings,
    new_mutex,
    pr_notice_once,
    prelude::*,
    sync::Mutex, //
};

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Malformed | Refusal::Gone => EINVAL,
            Refusal::WrongIdentity | Refusal::WrongEpoch => ESTALE,
        }
    }
}

/// A replay that was sent.
struct Sent {
    inode: InodeRef,
    claim: Claim,
    epoch: u32,
    is_root: bool,
}

/// What the lock protects.
struct State {
    machine: Machine,
    window: Window,
    slots: KVec<Berth<Replay>>,
    report: Berth<Report>,
    /// What is in each slot that the window says is taken.
    sent: KVec<Option<Sent>>,
    /// The inode up to which the walk has come.
    place: Option<InodeRef>,
    alone: Alone,
    /// An inode that could not be sent for lack of memory.
    unsent: Option<InodeRef>,
    walked: bool,
    cookie: u64,
    /// When the phase began.
    since: u64,
    tally: Tally,
    totals: Totals,
}

/// The recovery of one connection.
#[pin_data]
pub(super) struct Engine {
    restart: Restart,
    identity: [u64; 2],
    #[pin]
    state: Mutex<State>,
}

impl Engine {
    /// Creates the engine of a connection whose file system has this identity.
    pub(super) fn new(
        restart: Restart,
        alone: Alone,
        identity: [u64; 2],
    ) -> Result<Pin<KBox<Self>>> {
        let mut slots = KVec::with_capacity(SLOTS, GFP_KERNEL_ACCOUNT)?;
        let mut sent = KVec::with_capacity(SLOTS, GFP_KERNEL_ACCOUNT)?;
        for _ in 0..SLOTS {
            slots.push(Berth::new(restart)?, GFP_KERNEL_ACCOUNT)?;
            sent.push(None, GFP_KERNEL_ACCOUNT)?;
        }
        let state = State {
            machine: Machine::new(),
            window: Window::new(),
            slots,
            report: Berth::new(restart)?,
            sent,
            place: None,
            alone,
            unsent: None,
            walked: false,
            cookie: 0,
            since: 0,
            tally: Tally::default(),
            totals: Totals::default(),
        };
        KBox::pin_init(
            pin_init!(Self {
                restart,
                identity,
                state <- new_mutex!(state, "fuse_restart_engine"),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Handles a notification.
    ///
    /// # Errors
    ///
    /// See [`Refusal`]. No error changes any state.
    pub(super) fn notify(&self, out: &RestartedOut) -> Result {
        let demand = out.demand(self.identity)?;
        let mut guard = self.state.lock();
        let state = &mut *guard;
        match demand {
            Demand::Restarted => self.restarted(state, out.cookie)?,
            Demand::Commit(epoch) => {
                state.machine.commit(epoch)?;
                self.restart.commit(epoch);
                state.since = now();
            }
        }
        self.restart
            .trace_phase(state.machine.epoch(), state.machine.phase());
        self.restart.kick();
        Ok(())
    }

    fn restarted(&self, state: &mut State, cookie: u64) -> Result {
        if state.machine.phase() == Phase::Gone {
            return Err(Refusal::Gone.into());
        }
        let began = now();
        let epoch = self.restart.hold().ok_or(Refusal::Gone)?;
        // What the server before this one confirmed or not is void, if it did not commit.
        if state.machine.phase() != Phase::Serving {
            state.totals.add(&state.tally, false);
            self.restart.reset(&mut state.alone);
        }
        state.machine.restarted(epoch)?;
        state.place = None;
        state.unsent = None;
        state.walked = false;
        state.cookie = cookie;
        state.tally = Tally::default();
        state.since = began;
        self.restart.arm(&mut state.alone);
        Ok(())
    }

    /// Does what can be done.
    pub(super) fn run(&self, mounted: &Mounted) {
        let mut guard = self.state.lock();
        let state = &mut *guard;

        self.collect(state);
        if !self.restart.is_connected() {
            self.abandon(state);
            return;
        }
        loop {
            let before = state.machine.phase();
            match before {
                Phase::Held => self.send_root(state, mounted),
                Phase::Replay => self.send_more(state, mounted),
                Phase::Settle => self.send_report(state),
                Phase::Release => self.release(state),
                Phase::Serving | Phase::Root | Phase::Refused | Phase::Prepared | Phase::Gone => {}
            }
            let phase = state.machine.phase();
            if phase == before {
                break;
            }
            self.restart.trace_phase(state.machine.epoch(), phase);
        }
    }

    /// Collects what has landed.
    fn collect(&self, state: &mut State) {
        // Only the report's next use asks whether it has landed.
        let _ = state.report.take();

        let mut late = false;
        for index in 0..SLOTS {
            let Some((error, attr)) = state.slots[index].take() else {
                continue;
            };
            state.window.give(index);
            let Some(sent) = state.sent[index].take() else {
                continue;
            };
            let over = !state.machine.is_current(sent.epoch) || !self.restart.is_connected();
            late |= over;
            let answer = match error {
                _ if over => Answer::Over,
                0 => Answer::Attr(shown(&attr)),
                _ => Answer::Error,
            };
            self.apply(state, sent, answer, &attr);
        }
        // The teardown may be over, and what has landed since have had a last reference.
        if late && state.machine.phase() == Phase::Serving {
            self.restart.teardown();
        }
    }

    /// Judges an answer and acts on it.
    fn apply(&self, state: &mut State, sent: Sent, answer: Answer, attr: &bindings::fuse_attr) {
        let verdict = judge(sent.claim.known, answer);
        self.restart
            .trace_verdict(sent.epoch, sent.claim.nodeid, verdict);
        if verdict == Verdict::Void {
            // It may belong to a recovery whose tally is closed.
            state.totals.void += 1;
            return;
        }
        // Nothing is revoked if it does not even know the root.
        if verdict == Verdict::Confirmed || !sent.is_root {
            state.tally.count(verdict);
        }
        if verdict == Verdict::Confirmed {
            sent.inode.confirm(sent.epoch, attr);
        } else if !sent.is_root {
            sent.inode.revoke(verdict == Verdict::RevokedCounted);
        }
        if sent.is_root {
            let confirmed = verdict == Verdict::Confirmed;
            state.machine.root_answered(confirmed);
            state.tally.root_ns = lap(&mut state.since);
            self.restart.trace_phase(sent.epoch, state.machine.phase());
            if !confirmed {
                pr_notice_once!("a restarted server does not know the root, nothing is revoked\n");
                self.restart.refuse(sent.epoch);
            }
        }
    }

    /// Sends the root, alone.
    fn send_root(&self, state: &mut State, mounted: &Mounted) {
        // Whatever lands of an older epoch kicks.
        if state.window.in_flight() >= SLOTS as u32 {
            return;
        }
        let epoch = state.machine.epoch();
        let Some(root) = self.restart.root(&mut state.alone, mounted, epoch) else {
            return;
        };
        if self.send(state, root, true) {
            state.tally.hold_ns = lap(&mut state.since);
            state.machine.root_sent();
        } else {
            self.restart.retry();
        }
    }

    /// Sends as many inodes as there are slots.
    fn send_more(&self, state: &mut State, mounted: &Mounted) {
        let epoch = state.machine.epoch();
        while !state.walked && state.window.in_flight() < SLOTS as u32 {
            let next = match state.unsent.take() {
                Some(inode) => Some(inode),
                None => {
                    let (alone, last) = (&mut state.alone, state.place.as_ref());
                    let next = self.restart.next(alone, mounted, last, epoch);
                    state.place = next.as_ref().map(InodeRef::duplicate);
                    next
                }
            };
            let Some(inode) = next else {
                state.walked = true;
                break;
            };
            if !self.send(state, inode, false) {
                // One that is in flight will kick as well.
                self.restart.retry();
                return;
            }
        }
        // Slots of an older epoch may still be in flight, and are not waited for.
        let waiting = state.sent.iter().flatten().any(|s| s.epoch == epoch);
        if state.walked && !waiting && state.machine.replayed() {
            state.tally.replay_ns = lap(&mut state.since);
        }
    }

    /// Sends one inode. Returns false if there was no memory or no slot; it is kept then.
    fn send(&self, state: &mut State, inode: InodeRef, is_root: bool) -> bool {
        let epoch = state.machine.epoch();
        let Some(index) = state.window.take() else {
            state.unsent = (!is_root).then_some(inode);
            return false;
        };
        let claim = inode.claim();
        match state.slots[index].send(Replay::new(&claim), epoch) {
            Ok(()) => {
                state.sent[index] = Some(Sent {
                    inode,
                    claim,
                    epoch,
                    is_root,
                });
                true
            }
            Err(_) => {
                state.window.give(index);
                state.unsent = (!is_root).then_some(inode);
                false
            }
        }
    }

    /// Sends the report, once no request is in anybody's hands.
    fn send_report(&self, state: &mut State) {
        // Both kick when they change.
        if !state.report.is_idle() || !self.restart.is_settled() {
            return;
        }
        let epoch = state.machine.epoch();
        let (held, lowest) = self.restart.owed();
        state.tally.held = held;
        state.tally.settle_ns += lap(&mut state.since);
        let report = Report::new(&state.tally.report(epoch, lowest));
        match state.report.send(report, state.cookie, epoch) {
            Ok(()) => {
                state.machine.prepared();
            }
            Err(_) => self.restart.retry(),
        }
    }

    /// Revokes what failed, then lets the server serve.
    fn release(&self, state: &mut State) {
        let epoch = state.machine.epoch();
        state.place = None;
        self.restart.release(&mut state.alone, epoch);
        // It fails only if the connection is gone, and then the engine was kicked.
        let Some(resent) = self.restart.unhold(epoch) else {
            return;
        };
        state.tally.resent = resent;
        state.tally.release_ns = lap(&mut state.since);
        state.totals.add(&state.tally, true);
        state.machine.released();
        self.restart.disarm(&mut state.alone);
        self.restart.teardown();
    }

    /// The connection was aborted: there is nothing to recover.
    fn abandon(&self, state: &mut State) {
        if state.machine.phase() == Phase::Gone {
            // What has landed since had a reference.
            self.restart.teardown();
            return;
        }
        Self::give_up(state);
        state.place = None;
        state.unsent = None;
        self.restart.trace_phase(state.machine.epoch(), Phase::Gone);
        self.restart.disarm(&mut state.alone);
        self.restart.reset(&mut state.alone);
        self.restart.teardown();
    }

    /// Ends any recovery for good. References are kept until [`Engine::drop_inodes`].
    pub(super) fn end(&self) {
        let mut guard = self.state.lock();
        Self::give_up(&mut guard);
    }

    /// Ends the recovery that is under way, if one is.
    fn give_up(state: &mut State) {
        if !matches!(state.machine.phase(), Phase::Serving | Phase::Gone) {
            state.totals.add(&state.tally, false);
        }
        state.machine.end();
    }

    /// Whether a recovery is under way.
    pub(super) fn is_recovering(&self) -> bool {
        !matches!(
            self.state.lock().machine.phase(),
            Phase::Serving | Phase::Gone
        )
    }

    /// Drops all references. No request may be in flight.
    pub(super) fn drop_inodes(&self) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        self.collect(state);
        state.place = None;
        state.unsent = None;
        for sent in state.sent.iter_mut() {
            drop(mem::take(sent));
        }
    }

    /// Tells the state and the numbers.
    pub(super) fn stats(&self, stats: &mut bindings::fuse_restart_stats) {
        let state = self.state.lock();
        let (t, all) = (&state.tally, &state.totals);
        stats.state = name(state.machine.phase()).as_char_ptr();
        stats.epoch = state.machine.epoch();
        stats.last = [
            t.replayed(),
            t.confirmed,
            t.revoked,
            t.held,
            t.hold_ns,
            t.root_ns,
            t.replay_ns,
            t.settle_ns,
            t.release_ns,
        ];
        stats.totals = [
            all.recoveries,
            all.replayed,
            all.confirmed,
            all.revoked,
            all.resent,
            all.void,
        ];
    }
}

/// Returns the time since the last lap, and begins the next.
fn lap(since: &mut u64) -> u64 {
    let now = now();
    let ns = now - *since;
    *since = now;
    ns
}
