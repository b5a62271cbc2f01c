// SPDX-License-Identifier: GPL-2.0
//! The part of the new instance: RESTARTED, the replays, the report, COMMIT.

use std::collections::HashSet;

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;

use super::kit::Kit;
use super::msg::{Message, Replay};
use super::tree::{Answer, Tree};
use super::wire::{self, Report, RestartedOut, COOKIE_BIT, RESTARTED_COMMIT, ROOT};

/// One recovery, as the new server saw it.
#[derive(Clone, Debug)]
pub struct Recovered {
    pub replays: Vec<Replay>,
    /// Nodes whose replay was answered with an error.
    pub failed: HashSet<u64>,
    pub report: Report,
}

impl Recovered {
    /// A recovery that a scenario took apart: what it saw and confirmed, and the report.
    pub fn of(replays: Vec<Replay>, report: Report) -> Recovered {
        Recovered {
            replays,
            failed: HashSet::new(),
            report,
        }
    }

    /// (nodeid, generation, count) of every inode shown, sorted.
    pub fn shown(&self) -> Vec<(u64, u32, u64)> {
        let mut all: Vec<_> = self
            .replays
            .iter()
            .map(|r| (r.nodeid, r.generation, r.nlookup))
            .collect();
        all.sort_unstable();
        all
    }
}

/// How the new server answers the replay of one inode: `None` is the honest answer.
pub type Policy<'p> = &'p mut dyn FnMut(&Tree, &Replay) -> Option<Answer>;

impl Kit<'_> {
    /// Says RESTARTED with the right identity, as the server itself does.
    pub fn restarted(&mut self) -> Result<()> {
        self.restarted_as(self.config.identity)
            .context("the kernel refused RESTARTED")
    }

    /// Says RESTARTED with the identity given ({0, 0}: none, as a keeper does it).
    pub fn restarted_as(&mut self, identity: [u64; 2]) -> Result<(), Errno> {
        let cookie = COOKIE_BIT | u64::from(self.epoch + 1);
        self.dev.restarted(RestartedOut {
            cookie,
            identity,
            ..Default::default()
        })?;
        self.epoch += 1;
        self.cookie = cookie;
        Ok(())
    }

    /// The kernel has accepted a RESTARTED that was not said through [`Kit::restarted`].
    pub fn accepted(&mut self, cookie: u64) {
        self.epoch = self.epoch.wrapping_add(1);
        self.cookie = cookie;
    }

    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// The next message, which must be a replay of the current epoch.
    pub fn next_replay(&mut self) -> Result<(Message, Replay)> {
        let m = self.next()?;
        let replay = m
            .replay()
            .with_context(|| format!("expected a replay, got {m}"))?;
        self.check_replay(&m, &replay)?;
        Ok((m, replay))
    }

    fn check_replay(&self, m: &Message, replay: &Replay) -> Result<()> {
        ensure!(
            m.unique() & wire::UNIQUE_RESEND != 0,
            "the replay of node {} does not carry the RESEND bit",
            replay.nodeid
        );
        ensure!(
            wire::epoch_byte(m.unique()) == self.epoch as u8,
            "the replay of node {} carries epoch {}, it is {} now",
            replay.nodeid,
            wire::epoch_byte(m.unique()),
            self.epoch
        );
        ensure!(
            m.header.pid == 0,
            "a replay comes from nobody, this one from pid {}",
            m.header.pid
        );
        ensure!(
            (m.header.uid, m.header.gid) == (0, 0),
            "the replay of node {} has uid {} and gid {}, not the mounter's",
            replay.nodeid,
            m.header.uid,
            m.header.gid
        );
        Ok(())
    }

    /// Answers one replay honestly.
    pub fn confirm(&mut self, m: &Message, replay: &Replay) -> Result<()> {
        let answer = self.tree.replay(replay);
        self.send(m, &answer)
    }

    /// Reads and answers the root's replay, which must come first and alone.
    pub fn confirm_root(&mut self) -> Result<Replay> {
        let (m, replay) = self.next_replay()?;
        ensure!(
            replay.nodeid == ROOT,
            "the first replay is of node {}, not of the root",
            replay.nodeid
        );
        ensure!(
            !self.readable()?,
            "something can be read before the root's replay was answered"
        );
        self.confirm(&m, &replay)?;
        Ok(replay)
    }

    /// Answers replays until the report comes. Nothing else may be delivered meanwhile.
    pub fn answer_replays(&mut self, policy: Policy<'_>) -> Result<Recovered> {
        let mut replays: Vec<Replay> = Vec::new();
        let mut seen = HashSet::new();
        let mut failed = HashSet::new();
        loop {
            let m = self
                .next()
                .context("while waiting for a replay or the report")?;
            if let Some(report) = m.report(self.cookie) {
                ensure!(
                    report.epoch == self.epoch,
                    "the report is of epoch {}, it is {} now",
                    report.epoch,
                    self.epoch
                );
                return Ok(Recovered {
                    replays,
                    failed,
                    report,
                });
            }
            let Some(replay) = m.replay() else {
                bail!(
                    "{m} was delivered during the recovery, after {} replays",
                    replays.len()
                );
            };
            self.check_replay(&m, &replay)?;
            ensure!(
                !replays.is_empty() || replay.nodeid == ROOT,
                "node {} is replayed before the root",
                replay.nodeid
            );
            ensure!(
                seen.insert(replay.nodeid),
                "node {} is replayed twice",
                replay.nodeid
            );
            let answer = policy(&self.tree, &replay).unwrap_or_else(|| self.tree.replay(&replay));
            if matches!(answer, Answer::Err(_)) {
                failed.insert(replay.nodeid);
            }
            self.send(&m, &answer)?;
            replays.push(replay);
        }
    }

    /// Writes COMMIT for the report and waits until the connection is serving again; the server's table becomes the
    /// replayed set.
    pub fn commit(&mut self, recovered: &Recovered) -> Result<()> {
        ensure!(
            !self.readable()?,
            "something can be read between the report and COMMIT"
        );
        self.commit_epoch(recovered.report.epoch)
            .context("the kernel refused COMMIT")?;
        self.tree.adopt(
            recovered
                .replays
                .iter()
                .filter(|r| !recovered.failed.contains(&r.nodeid)),
        );
        self.wait_serving()
    }

    pub fn commit_epoch(&mut self, epoch: u32) -> Result<(), Errno> {
        self.dev.restarted(RestartedOut {
            cookie: self.cookie,
            flags: RESTARTED_COMMIT,
            epoch,
            identity: self.config.identity,
        })
    }

    /// A whole honest recovery.
    pub fn recover(&mut self) -> Result<Recovered> {
        self.recover_with(&mut |_, _| None)
    }

    pub fn recover_with(&mut self, policy: Policy<'_>) -> Result<Recovered> {
        self.restarted()?;
        let recovered = self.answer_replays(policy)?;
        self.commit(&recovered)?;
        Ok(recovered)
    }

    /// Waits until the kernel says it is serving again.
    pub fn wait_serving(&self) -> Result<()> {
        self.conn.wait_state(&["serving"], self.patience)
    }

    /// The rest of a recovery that somebody else has begun: it must show what the server's table holds.
    pub fn check_counts_in_recovery(&mut self) -> Result<Recovered> {
        let expected = self.tree.held();
        let recovered = self.answer_replays(&mut |_, _| None)?;
        self.commit(&recovered)?;
        ensure!(
            recovered.shown() == expected,
            "replayed {:?}, the server's table has {expected:?}",
            recovered.shown()
        );
        self.wait_serving()?;
        Ok(recovered)
    }

    /// Quiescence: a recovery shows exactly what the server's own table holds.
    pub fn check_counts(&mut self) -> Result<Recovered> {
        self.settle()?;
        let expected = self.tree.held();
        let recovered = self.recover()?;
        let shown = recovered.shown();
        if shown != expected {
            let extra: Vec<_> = shown.iter().filter(|x| !expected.contains(x)).collect();
            let missing: Vec<_> = expected.iter().filter(|x| !shown.contains(x)).collect();
            bail!("replayed but not so in the server's table: {extra:?}; in the table but not replayed so: {missing:?} \
                   (node, generation, lookups)");
        }
        self.wait_serving()?;
        Ok(recovered)
    }
}
