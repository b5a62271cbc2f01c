// SPDX-License-Identifier: GPL-2.0
//! The fuzzed server: executes the steps of a script, and knows at each moment what an honest kernel may do.

mod check;
mod recover;

use std::collections::{HashMap, HashSet};
use std::os::fd::RawFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Result};
use nix::errno::Errno;
use nix::poll::PollFlags;

use super::hand;
use super::script::{How, Mode, Note, Op, Who};
use super::shared::Shared;
use crate::raw::answer::is_entry_reply;
use crate::raw::app::Proc;
use crate::raw::dev::{Device, Read1};
use crate::raw::kit::Kit;
use crate::raw::msg::{Message, Replay};
use crate::raw::tree::Answer;

use crate::raw::wait::Rng;
use crate::raw::wire::{self, notify, op};

/// A message that was read and not answered.
struct Kept {
    /// Which descriptor it was read from; 0 is the mount's own.
    dev: u32,
    m: Message,
    executed: Option<Answer>,
    /// The kernel has taken it back: an answer must be refused.
    stale: bool,
}

pub struct Server<'k, 'e> {
    pub kit: &'k mut Kit<'e>,
    mode: Mode,
    shared: &'static Shared,
    rng: Rng,
    clones: Vec<(u32, Device)>,
    next_clone: u32,
    pool: Vec<Kept>,
    /// Outcomes of what was executed, by original id: what a journal is for.
    journal: HashMap<u64, Answer>,
    /// RESTARTED was accepted and COMMIT was not. Unknown when a rival is at work.
    recovering: bool,
    /// Somebody else says RESTARTED as well.
    pub rivalled: bool,
    /// The server has lied before it was replaced by a good one: inodes may be revoked.
    lied: bool,
    /// The mount may go any moment, and the device with it.
    pub ending: bool,
    shown: Vec<Replay>,
    /// How many that were since RESTARTED: `shown` ends with COMMIT, the report may be read later.
    answered: u64,
    /// Nodes whose replay was answered with an error.
    refused: HashSet<u64>,
    report: Option<wire::Report>,
    /// The last original id since COMMIT: they come in order.
    last_id: Option<u64>,
    /// Processes that wait inside a notification.
    notifiers: Vec<Proc>,
}

pub use check::sums;

impl<'k, 'e> Server<'k, 'e> {
    pub fn new(kit: &'k mut Kit<'e>, mode: Mode, seed: u64, shared: &'static Shared) -> Self {
        Server {
            kit,
            mode,
            shared,
            rng: Rng(seed),
            clones: Vec::new(),
            next_clone: 1,
            pool: Vec::new(),
            journal: HashMap::new(),
            recovering: false,
            rivalled: false,
            lied: mode == Mode::Hostile,
            ending: false,
            refused: HashSet::new(),
            shown: Vec::new(),
            answered: 0,
            report: None,
            last_id: None,
            notifiers: Vec::new(),
        }
    }

    /// Every descriptor of the device, which applications must not inherit.
    pub fn descriptors(&self) -> Vec<RawFd> {
        let clones = self.clones.iter().map(|(_, dev)| dev.raw());
        clones.chain([self.kit.dev.raw()]).collect()
    }

    fn honest(&self) -> bool {
        self.mode == Mode::Honest
    }

    /// One step, but for those that concern applications.
    pub fn step(&mut self, op: Op) -> Result<()> {
        self.shared.server_op();
        self.reap_notifiers(false)?;
        match op {
            Op::Serve(n) => {
                for _ in 0..n {
                    if !self.serve_one(How::Truth)? {
                        break;
                    }
                }
            }
            Op::Take(n) => {
                for _ in 0..n {
                    match self.read()? {
                        Some((dev, m)) if !m.wants_no_reply() => self.keep(dev, m, None),
                        Some(_) => {}
                        None => break,
                    }
                }
            }
            Op::Execute(which) => self.execute(which)?,
            Op::Answer(which, how) => self.answer_kept(which, how)?,
            Op::Restarted(who, salt) => self.restarted(who, salt)?,
            Op::Flood(n) => {
                for i in 0..n {
                    self.restarted(Who::Right, u64::from(i) << 20)?;
                }
            }
            Op::Commit(which) => self.commit(hand::epoch(which, self.kit.epoch))?,
            Op::Replays(n, how) => {
                for _ in 0..n {
                    let busy = self.recovering || self.rivalled;
                    if !busy || !self.serve_one(how)? {
                        break;
                    }
                }
            }
            Op::Recover => self.recover()?,
            Op::Notify(note) => self.notify(note)?,
            Op::Raw(len, seed) => {
                self.shared.write();
                let result = hand::raw(&self.kit.dev, len, seed);
                if hand::is_resend(len, seed) {
                    self.notified(result, notify::RESEND)?;
                } else {
                    ensure!(
                        !self.honest() || result.is_err(),
                        "{len} bytes of nonsense (seed {seed}) were accepted"
                    );
                }
            }
            Op::BadRead(small) => hand::bad_read(&self.kit.dev, small),
            Op::Clone => {
                if self.clones.len() < 4 {
                    if let Ok(dev) = self.kit.dev.clone_queue() {
                        self.clones.push((self.next_clone, dev));
                        self.next_clone += 1;
                    }
                }
            }
            Op::CloseClone(which) => self.close_clone(which),
            Op::KilledReader => self.killed_reader()?,
            Op::Wait(ms) => {
                let limit = Duration::from_millis(ms.into());
                self.kit.dev.poll(PollFlags::POLLIN, limit)?;
            }
            Op::Shrink => {
                let _ = std::fs::write("/proc/sys/vm/drop_caches", "2");
            }
            Op::Probe => {
                self.shared.write();
                let errno = self.kit.dev.probe();
                ensure!(errno == Errno::ESTALE, "the probe says {errno}");
            }
            Op::Look => self.look()?,
            Op::Kill(_) | Op::Signal(_) | Op::Spawn(_) => {}
        }
        Ok(())
    }

    // ---- reading -------------------------------------------------------------------------------

    fn read(&mut self) -> Result<Option<(u32, Message)>> {
        self.read_within(Duration::from_millis(2))
    }

    fn read_within(&mut self, limit: Duration) -> Result<Option<(u32, Message)>> {
        let pick = self.rng.below(1 + self.clones.len());
        let (id, dev) = match pick.checked_sub(1) {
            Some(i) => (self.clones[i].0, &mut self.clones[i].1),
            None => (0, &mut self.kit.dev),
        };
        let m = match dev.read(limit)? {
            Read1::Message(m) => m,
            Read1::Nothing => return Ok(None),
            // The root was refused, or the connection has been aborted.
            Read1::Failed(Errno::ESTALE) => return Ok(None),
            Read1::Failed(Errno::ENODEV) if self.ending => return Ok(None),
            Read1::Failed(e) => bail!("reading the device failed: {e}{}", self.kit.situation()),
        };
        self.shared.message();
        self.check(&m)?;
        if matches!(m.opcode(), op::FORGET | op::BATCH_FORGET) {
            let forgotten = self.kit.tree.apply(&m);
            if self.honest() {
                forgotten?;
            }
        }
        if let Some(report) = m.report(self.kit.cookie()) {
            self.report = Some(report);
        }
        Ok(Some((id, m)))
    }

    fn keep(&mut self, dev: u32, m: Message, executed: Option<Answer>) {
        if self.pool.len() >= 200 {
            self.pool.remove(0);
        }
        self.pool.push(Kept {
            dev,
            m,
            executed,
            stale: false,
        });
    }

    // ---- answering -----------------------------------------------------------------------------

    /// What an honest server answers; executes the request unless its outcome is known.
    fn truth(&mut self, m: &Message) -> Result<Answer> {
        if let Some(replay) = m.replay() {
            return Ok(self.kit.tree.replay(&replay));
        }
        if let Some(known) = self.journal.get(&m.original()).cloned() {
            // The lookup of an answer that is given again counts again: the table is the replayed one since.
            if let (true, Answer::Ok(payload)) = (is_entry_reply(m.opcode()), &known) {
                let id = payload.get(..8).and_then(|b| b.try_into().ok());
                let id = id.map_or(0, u64::from_ne_bytes);
                if let Some(node) = self.kit.tree.nodes.get_mut(&id) {
                    node.nlookup += 1;
                    return Ok(known);
                }
            } else {
                return Ok(known);
            }
        }
        // A hostile server makes the tree contradict itself; that is no failure of the kernel.
        let kit = &mut *self.kit;
        let applied = match self.mode {
            Mode::Honest => kit.tree.apply(m),
            Mode::Hostile => catch_unwind(AssertUnwindSafe(|| kit.tree.apply(m)))
                .unwrap_or_else(|_| bail!("the tree contradicts itself")),
        };
        match applied {
            Ok(answer) => {
                if !matches!(m.opcode(), op::READDIRPLUS | op::READ) {
                    self.journal.insert(m.original(), answer.clone());
                }
                Ok(answer)
            }
            Err(_) if !self.honest() => Ok(Answer::Err(libc::EIO)),
            Err(e) => Err(e),
        }
    }

    fn serve_one(&mut self, how: How) -> Result<bool> {
        let Some((dev, m)) = self.read()? else {
            return Ok(false);
        };
        if !m.wants_no_reply() {
            let truth = self.truth(&m)?;
            self.answer(
                Kept {
                    dev,
                    m,
                    executed: Some(truth),
                    stale: false,
                },
                how,
            )?;
        }
        Ok(true)
    }

    fn execute(&mut self, which: u8) -> Result<()> {
        if self.pool.is_empty() {
            return Ok(());
        }
        let i = usize::from(which) % self.pool.len();
        if self.pool[i].executed.is_none() && !self.pool[i].stale {
            let m = self.pool[i].m.clone();
            self.pool[i].executed = Some(self.truth(&m)?);
        }
        Ok(())
    }

    fn answer_kept(&mut self, which: u8, how: How) -> Result<()> {
        if self.pool.is_empty() {
            return Ok(());
        }
        let mut kept = self.pool.remove(usize::from(which) % self.pool.len());
        if kept.executed.is_none() && !kept.stale {
            kept.executed = Some(self.truth(&kept.m)?);
        }
        self.answer(kept, how)
    }

    fn answer(&mut self, kept: Kept, how: How) -> Result<()> {
        let device = match kept.dev {
            0 => &self.kit.dev,
            id => match self.clones.iter().find(|(i, _)| *i == id) {
                Some((_, dev)) => dev,
                None => return Ok(()),
            },
        };
        let truth = kept.executed.clone().unwrap_or(Answer::Err(libc::EIO));
        self.shared.write();
        let result = hand::answer(device, &kept.m, &truth, how, &mut self.rng);
        ensure!(
            result != Err(Errno::EALREADY),
            "the kernel took the answer to {} twice",
            kept.m
        );
        if self.rivalled || !self.honest() {
            return Ok(());
        }
        let m = &kept.m;
        let taken = matches!(
            how,
            How::Truth | How::Twice | How::Pieces | How::Splice | How::Drown
        );
        match result {
            Ok(()) => {
                ensure!(!kept.stale, "a late answer to {m} was taken");
                ensure!(taken, "the answer to {m}, {how:?}, was taken");
                self.journal.remove(&m.original());
                if let Some(replay) = m.replay() {
                    self.shown.push(replay);
                    self.answered += 1;
                    if matches!(truth, Answer::Err(_)) {
                        self.refused.insert(replay.nodeid);
                    }
                }
            }
            // It will come again, at once or after the next RESTARTED.
            Err(Errno::EINPROGRESS) => self.last_id = None,
            // The requester is gone, or the server is known to be.
            Err(Errno::ENOENT) => {
                if taken && !kept.stale {
                    self.kit.tree.undo(m, &truth);
                }
                if !taken {
                    self.pool.push(kept);
                }
            }
            Err(Errno::EINVAL) if matches!(how, How::Length(_)) => self.pool.push(kept),
            Err(e) => bail!("the answer to {m}, {how:?}, gave {e}"),
        }
        Ok(())
    }

    fn close_clone(&mut self, which: u8) {
        if self.clones.is_empty() {
            return;
        }
        let (id, dev) = self.clones.remove(usize::from(which) % self.clones.len());
        drop(dev);
        self.pool.retain(|k| k.dev != id);
        // What it had read comes again, ahead of the others.
        self.last_id = None;
    }

    // ---- other things --------------------------------------------------------------------------

    fn notify(&mut self, note: Note) -> Result<()> {
        let nodes: Vec<u64> = self.kit.tree.nodes.keys().copied().collect();
        let bytes = hand::note(note, &nodes);
        self.shared.write();
        let waits = matches!(
            note.code,
            notify::INVAL_INODE
                | notify::INVAL_ENTRY
                | notify::STORE
                | notify::DELETE
                | notify::PRUNE
                | notify::INC_EPOCH
        );
        if waits {
            // It may wait for what only the server can end, so it is another process of the server.
            if self.notifiers.len() >= 4 {
                self.reap_notifiers(true)?;
            }
            let dev = &self.kit.dev;
            let notifier = Proc::spawn("a notification", &[], || {
                i32::from(dev.write_raw(&bytes).is_err())
            })?;
            self.notifiers.push(notifier);
            return Ok(());
        }
        let result = self.kit.dev.write_raw(&bytes).map(drop);
        self.notified(result, note.code)
    }

    /// What follows from a notification that does not wait.
    fn notified(&mut self, result: Result<(), Errno>, code: i32) -> Result<()> {
        if code == notify::RESEND && result.is_ok() {
            self.last_id = None;
            // What a recovery has sent again keeps its id when it is sent once more, so the first
            // answer to it is taken, whichever of the two messages it is for.
            self.pool
                .retain(|kept| kept.m.unique() & wire::UNIQUE_RESEND == 0);
            for kept in &mut self.pool {
                kept.stale = true;
            }
        }
        if self.recovering && !self.rivalled && code != notify::POLL && code != 12 {
            ensure!(
                result.is_err(),
                "notification {code} was accepted during a recovery"
            );
        }
        Ok(())
    }

    /// Ends the processes that wait in a notification: they must be killable whatever happens.
    pub fn reap_notifiers(&mut self, all: bool) -> Result<()> {
        let mut left = Vec::new();
        for mut notifier in self.notifiers.drain(..) {
            if notifier.ended()? {
                notifier.wait(Duration::ZERO)?;
            } else if all {
                notifier.signal(nix::sys::signal::Signal::SIGKILL)?;
                notifier.wait(self.kit.patience)?;
            } else {
                left.push(notifier);
            }
        }
        self.notifiers = left;
        Ok(())
    }

    fn killed_reader(&mut self) -> Result<()> {
        let mut reader = hand::reader(&self.kit.dev)?;
        self.last_id = None;
        reader.signal(nix::sys::signal::Signal::SIGKILL)?;
        reader.wait(self.kit.patience).map(drop)
    }

    /// The numbers that the kernel publishes must add up at any moment.
    pub fn look(&mut self) -> Result<()> {
        if self.kit.conn.exists() {
            sums(self.kit)?;
        }
        Ok(())
    }

    /// Serves until `done`, as long as there is progress.
    pub fn serve_until(
        &mut self,
        what: &str,
        mut done: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let mut deadline = Instant::now() + self.kit.patience;
        while !done()? {
            if self.serve_one(How::Truth)? {
                deadline = Instant::now() + self.kit.patience;
            } else {
                self.kit
                    .dev
                    .poll(PollFlags::POLLIN, Duration::from_millis(1))?;
            }
            ensure!(
                Instant::now() < deadline,
                "{what} does not come{}",
                self.kit.situation()
            );
        }
        Ok(())
    }
}
