// SPDX-License-Identifier: GPL-2.0

//! What can happen in a state, and what must hold in all of them.

use super::reached::REACHED;
use super::server::Say;
use super::sizes::Size;
use super::state::{Budget, Fault, Key, Op, State, Way};
use rust_fuse_notify::proto::phase::Phase;
use stateright::{Model, Property};

/// One step of somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// An application begins its next step.
    Go(u8),
    /// It goes on with an answer.
    Consume(u8),
    /// The same, but it gives the entry back.
    GiveBack(u8),
    Kill(u8),
    Evict(Key),
    Evicted(usize),
    /// The engine's work item runs.
    Run,
    /// A reader takes the first request off the queue.
    Dequeue,
    /// It has copied it, or could not as it is being killed.
    Read {
        index: usize,
        copied: bool,
    },
    ReadForget,
    /// An operation takes effect in the store.
    Execute(usize),
    /// The server answers, and its write finds the request or not.
    Answer(usize),
    AnswerReplay(usize, Say),
    /// The answer is copied, or could not be as the writer is being killed.
    Wrote {
        index: usize,
        copied: bool,
    },
    Commit,
    /// A thread of a dead server writes what it had begun to write.
    Late(usize),
    /// The server dies; one of its threads may be late, with an answer or with COMMIT.
    Crash(Option<usize>),
    /// A server that was refused gives up.
    Exit,
    /// The next server says RESTARTED.
    Start {
        wrong: bool,
    },
    /// The keeper says it before there is one.
    KeeperRestarted,
    /// Anybody does.
    Restarted,
    /// A device that the dead server had cloned is closed.
    CloseDevice,
    Abort,
    /// Somebody writes COMMIT though there was no report.
    Probe,
    /// The file of this nodeid is another one now.
    Replace(u8),
}

impl Size {
    /// What happens by itself.
    pub fn progress(&self, s: &State, to: &mut Vec<Action>) {
        for (at, app) in (0..).zip(&s.apps) {
            match &app.req {
                None if usize::from(app.step) < self.scripts[usize::from(at)].len() => {
                    to.push(Action::Go(at));
                }
                Some(req) if req.answer.is_some() && !s.waits_for_eviction(req) => {
                    to.push(Action::Consume(at));
                }
                _ => {}
            }
        }
        to.extend((0..s.kernel.evicting.len()).map(Action::Evicted));
        if s.kernel.kicked {
            to.push(Action::Run);
        }
        for (index, t) in s.kernel.transit.iter().enumerate() {
            for copied in [true, false] {
                if copied || t.dying {
                    to.push(match t.way {
                        Way::Read => Action::Read { index, copied },
                        Way::Write => Action::Wrote { index, copied },
                    });
                }
            }
        }
        to.extend((0..s.late.len()).map(Action::Late));
        if !s.kernel.connected {
            return;
        }
        if !s.server.alive {
            return to.push(Action::Start { wrong: false });
        }
        if s.may_read() {
            if s.can_read() {
                to.push(Action::Dequeue);
            }
            if !s.holding() && !s.kernel.forgets.is_empty() {
                to.push(Action::ReadForget);
            }
        }
        for (index, message) in s.server.inbox.iter().enumerate() {
            match message.op {
                Op::Replay { .. } if s.server.wrong => {
                    to.push(Action::AnswerReplay(index, Say::Stale));
                }
                Op::Replay { file, gen, .. } => {
                    to.push(Action::AnswerReplay(index, Say::Found));
                    if file.is_some_and(|f| s.store.gens[usize::from(f)] != gen) {
                        to.push(Action::AnswerReplay(index, Say::Stale));
                    }
                }
                op if State::has_effect(op) && message.answer.is_none() => {
                    to.push(Action::Execute(index));
                }
                _ => to.push(Action::Answer(index)),
            }
        }
        if s.server.report.is_some() {
            to.push(Action::Commit);
        }
        if s.server.wrong && s.phase() == Phase::Refused {
            to.push(Action::Exit);
        }
    }

    /// What may happen or not.
    fn mischief(&self, s: &State, to: &mut Vec<Action>) {
        let left: &Budget = &s.left;
        for (at, app) in (0..).zip(&s.apps) {
            let Some(req) = &app.req else { continue };
            if left.kills > 0 && req.answer.is_none() {
                to.push(Action::Kill(at));
            }
            let entry = matches!(req.op, Op::Lookup(_)) && req.answer.is_some();
            if left.given_back > 0 && entry {
                to.push(Action::GiveBack(at));
            }
        }
        if left.evictions > 0 {
            let unused = s.kernel.inodes.iter().filter(|i| s.is_unused(i));
            to.extend(unused.map(|i| Action::Evict(i.key)));
        }
        if !s.kernel.connected {
            return;
        }
        if left.aborts > 0 {
            to.push(Action::Abort);
        }
        if left.probes > 0 && s.phase() != Phase::Prepared {
            to.push(Action::Probe);
        }
        if left.extra > 0 {
            to.push(Action::Restarted);
        }
        if !s.server.alive {
            if left.wrong > 0 {
                to.push(Action::Start { wrong: true });
            }
            if left.keeper && !s.told {
                to.push(Action::KeeperRestarted);
            }
            let copying = s.kernel.transit.iter().any(|t| t.dying);
            if left.closes > 0 && !copying && !s.kernel.processing.is_empty() {
                to.push(Action::CloseDevice);
            }
            if left.replaced > 0 {
                let files = (0..).zip(&s.store.gens).filter(|(_, gen)| **gen > 0);
                to.extend(files.map(|(file, _)| Action::Replace(file)));
            }
            return;
        }
        if left.crashes > 0 {
            to.push(Action::Crash(None));
            let late = s.server.inbox.len() + usize::from(s.server.report.is_some());
            to.extend((0..late).map(|index| Action::Crash(Some(index))));
        }
        if left.errors > 0 {
            for (index, message) in s.server.inbox.iter().enumerate() {
                if matches!(message.op, Op::Replay { file: Some(_), .. }) {
                    to.push(Action::AnswerReplay(index, Say::Stale));
                }
            }
        }
    }

    /// Nothing happens any more unless somebody does mischief.
    fn is_over(&self, s: &State) -> bool {
        let mut actions = Vec::new();
        self.progress(s, &mut actions);
        actions.is_empty()
    }

    fn step(&self, s: &mut State, action: Action) -> bool {
        match action {
            Action::Go(app) => s.go(self, app),
            Action::Consume(app) => s.consume(self, app, false),
            Action::GiveBack(app) => {
                s.left.given_back -= 1;
                s.consume(self, app, true);
            }
            Action::Kill(app) => {
                s.left.kills -= 1;
                return s.kill(self, app);
            }
            Action::Evict(key) => {
                s.left.evictions -= 1;
                s.evict(key);
            }
            Action::Evicted(index) => s.evicted(self, index),
            Action::Run => s.run(self),
            Action::Dequeue => s.dequeue(),
            Action::Read { index, copied } => {
                if let Some(rid) = s.read_end(self, index, copied) {
                    s.read(rid);
                }
            }
            Action::ReadForget => s.read_forget(),
            Action::Execute(index) => s.execute(index),
            Action::Answer(index) => s.answer(index),
            Action::AnswerReplay(index, say) => {
                let Op::Replay { file, gen, .. } = s.server.inbox[index].op else {
                    return false;
                };
                let same = file.is_some_and(|f| s.store.gens[usize::from(f)] == gen);
                if say == Say::Stale && same {
                    s.left.errors -= 1;
                }
                s.answer_replay(self, index, say);
            }
            Action::Wrote { index, copied } => s.write_end(self, index, copied),
            Action::Commit => s.commit(self),
            Action::Late(index) => s.late(self, index),
            Action::Crash(late) => {
                s.left.crashes -= 1;
                s.crash(late);
            }
            Action::Exit => s.crash(None),
            Action::Start { wrong } => {
                s.left.wrong -= u8::from(wrong);
                s.start(self, wrong);
            }
            Action::KeeperRestarted => {
                s.told = true;
                s.say_restarted(self);
            }
            Action::Restarted => {
                s.left.extra -= 1;
                s.say_restarted(self);
            }
            Action::CloseDevice => {
                s.left.closes -= 1;
                s.close_device(self);
            }
            Action::Abort => {
                s.left.aborts -= 1;
                s.abort();
            }
            Action::Probe => {
                s.left.probes -= 1;
                // It is refused; if not, then other properties fail.
                let _ = s.say_commit(self, s.epoch());
            }
            Action::Replace(file) => {
                s.left.replaced -= 1;
                s.store.gens[usize::from(file)] += 1;
            }
        }
        true
    }
}

impl Model for Size {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.start()]
    }

    fn actions(&self, s: &State, to: &mut Vec<Action>) {
        if s.fault.is_none() {
            self.progress(s, to);
            self.mischief(s, to);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut s = last.clone();
        if !self.step(&mut s, action) {
            return None;
        }
        s.forget_the_past();
        Some(s)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all = vec![
            Property::always(WAITS, |m: &Self, s: &State| {
                s.fault.is_some() || !m.is_over(s) || s.is_good(m)
            }),
            Property::always(COUNTS, |_, s: &State| {
                let agree = s.fault.is_some() || !s.is_quiet() || s.counts_agree();
                agree && s.fault != Some(Fault::Counts)
            }),
        ];
        all.extend(FAULTS.map(|(name, check)| Property::always(name, check)));
        // The checker notes each time that it gets there, which takes time.
        if self.small {
            all.extend(REACHED.map(|(name, check)| Property::sometimes(name, check)));
        }
        all
    }
}

impl State {
    /// What a good end is: nobody waits, and a good server serves.
    fn is_good(&self, m: &Size) -> bool {
        let done = |(app, script): (&super::state::App, &&[_])| {
            app.req.is_none() && usize::from(app.step) == script.len()
        };
        let gone = self.phase() == Phase::Gone && self.kernel.slots.is_empty();
        self.apps.iter().zip(m.scripts).all(done)
            && (self.kernel.connected || gone)
            && (self.is_served() || gone)
            && self.kernel.held.is_empty()
            && self.kernel.transit.is_empty()
    }

    fn is_served(&self) -> bool {
        self.server.alive && !self.server.wrong && self.phase() == Phase::Serving
    }

    /// Drops what nobody can ask for any more, so that fewer states differ.
    fn forget_the_past(&mut self) {
        let waiting = self.apps.iter().filter_map(|a| a.req);
        let open: Vec<u8> = waiting
            .filter(|r| r.answer.is_none())
            .map(|r| r.id())
            .collect();
        self.store.journal.retain(|id| open.contains(id));
        self.store.effects.retain(|id| open.contains(id));
        self.store.journal.sort_unstable();
        self.store.effects.sort_unstable();
    }
}

pub const WAITS: &str = "nobody waits for ever once a good server stays up";
pub const COUNTS: &str = "counts agree at quiescence";
pub const REPLY: &str = "no reply reaches the wrong request";
pub const SUCCESSOR: &str = "no request reaches a successor";
pub const REVOKED: &str = "a revoked inode never serves";
pub const UNTOLD: &str = "a server is asked only for what it was told of";
pub const ORDER: &str = "held requests are delivered in the order of issue";
pub const TWICE: &str = "nothing is answered or done twice";
pub const ERRORS: &str = "what fails names a revoked inode, nothing is lost";
pub const REPORT: &str = "the report adds up";
pub const COMMITTED: &str = "only a server that committed revokes";
pub const STRANGER: &str = "a server that is refused sees the root only";

/// A property, or what has to be reached.
pub type Check = fn(&Size, &State) -> bool;

const FAULTS: [(&str, Check); 10] = [
    (REPLY, |_, s| s.fault != Some(Fault::WrongReply)),
    (SUCCESSOR, |_, s| s.fault != Some(Fault::Successor)),
    (REVOKED, |_, s| s.fault != Some(Fault::Revoked)),
    (UNTOLD, |_, s| s.fault != Some(Fault::Untold)),
    (ORDER, |_, s| s.fault != Some(Fault::Order)),
    (TWICE, |_, s| s.fault != Some(Fault::Twice)),
    (ERRORS, |_, s| s.fault != Some(Fault::WrongError)),
    (REPORT, |_, s| s.fault != Some(Fault::Report)),
    (COMMITTED, |_, s| s.fault != Some(Fault::Uncommitted)),
    (STRANGER, |_, s| s.fault != Some(Fault::Stranger)),
];
