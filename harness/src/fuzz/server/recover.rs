// SPDX-License-Identifier: GPL-2.0
//! RESTARTED and COMMIT, rightly and wrongly, and the good server that takes over.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;
use nix::poll::PollFlags;

use super::Server;
use crate::fuzz::hand;
use crate::fuzz::script::{How, Mode, Who};
use crate::raw::tree::Tree;
use crate::raw::wire::{self, RestartedOut, COOKIE_BIT, RESTARTED_COMMIT};

impl Server<'_, '_> {
    pub(super) fn restarted(&mut self, who: Who, salt: u64) -> Result<()> {
        let identity = hand::identity(who, self.kit.config.identity);
        let cookie = COOKIE_BIT | (salt & !(1 << 62));
        let out = RestartedOut {
            cookie,
            identity,
            ..Default::default()
        };
        self.shared.write();
        let result = self.kit.dev.restarted(out);
        if who == Who::Stranger {
            ensure!(
                result == Err(Errno::ESTALE),
                "a stranger's RESTARTED gave {result:?}"
            );
            return Ok(());
        }
        result.with_context(|| format!("RESTARTED{}", self.kit.situation()))?;
        self.kit.accepted(cookie);
        self.recovering = true;
        self.report = None;
        self.last_id = None;
        self.shown.clear();
        self.answered = 0;
        self.refused.clear();
        for kept in &mut self.pool {
            kept.stale = true;
        }
        Ok(())
    }

    pub(super) fn commit(&mut self, epoch: u32) -> Result<()> {
        let out = RestartedOut {
            cookie: self.kit.cookie() | COOKIE_BIT,
            flags: RESTARTED_COMMIT,
            epoch,
            identity: self.kit.config.identity,
        };
        self.shared.write();
        let result = self.kit.dev.restarted(out);
        if self.rivalled {
            return Ok(());
        }
        let right = self.recovering && epoch == self.kit.epoch;
        match result {
            Ok(()) => {
                ensure!(
                    right,
                    "COMMIT of epoch {epoch} was accepted, it is {}",
                    self.kit.epoch
                );
                self.recovering = false;
                self.last_id = self.honest().then_some(0);
                let shown = std::mem::take(&mut self.shown);
                let refused = std::mem::take(&mut self.refused);
                let confirmed = shown.iter().filter(|r| !refused.contains(&r.nodeid));
                self.kit.tree.adopt(confirmed);
                self.shared.recovery();
            }
            Err(Errno::ESTALE) => ensure!(
                !right || self.report.is_none(),
                "the report was read, and COMMIT of its epoch {epoch} is refused{}",
                self.kit.situation()
            ),
            Err(e) => bail!("COMMIT gave {e}"),
        }
        Ok(())
    }

    pub(super) fn recover(&mut self) -> Result<()> {
        self.restarted(Who::Right, 1)?;
        let rounds = 3000;
        for _ in 0..rounds {
            if self.report.is_some() {
                break;
            }
            if !self.serve_one(How::Truth)? {
                self.kit
                    .dev
                    .poll(PollFlags::POLLIN, Duration::from_millis(2))?;
                // A clone may be what can be read; and the root is refused if it was misrepresented.
                if self.rivalled
                    || self
                        .kit
                        .conn
                        .recovery()?
                        .is_some_and(|r| r.state() == "refused")
                {
                    break;
                }
            }
        }
        self.commit(self.kit.epoch)
    }

    /// Fuzzing is over: one device, and from here on an honest server.
    pub fn reform(&mut self) -> Result<()> {
        self.reap_notifiers(true)?;
        self.clones.clear();
        self.pool.clear();
        self.rivalled = false;
        if self.mode == Mode::Hostile {
            heal(&mut self.kit.tree);
            self.journal.clear();
        }
        self.mode = Mode::Honest;
        Ok(())
    }

    /// The good server takes over.
    pub fn take_over(&mut self) -> Result<()> {
        // A rival may have said RESTARTED as well.
        let recovery = self
            .kit
            .conn
            .recovery()?
            .context("there is no `recovery` file")?;
        self.kit.epoch = recovery.get("epoch")? as u32;
        self.restarted(Who::Right, 2)?;
        let mut deadline = Instant::now() + self.kit.patience;
        while self.report.is_none() {
            if self.serve_one(How::Truth)? {
                deadline = Instant::now() + self.kit.patience;
            }
            ensure!(!self.ending || self.kit.conn.exists(), "it was unmounted");
            ensure!(
                Instant::now() < deadline,
                "the recovery does not end{}",
                self.kit.situation()
            );
        }
        self.commit(self.kit.epoch)?;
        self.kit.wait_serving()
    }
}

/// Makes a tree that lies have torn apart consistent again.
fn heal(tree: &mut Tree) {
    let known: HashSet<u64> = tree.nodes.keys().copied().collect();
    let mut links: HashMap<u64, u32> = HashMap::new();
    for node in tree.nodes.values_mut() {
        node.children
            .retain(|_, id| known.contains(id) && *id != wire::ROOT);
        for id in node.children.values() {
            *links.entry(*id).or_default() += 1;
        }
    }
    for (id, node) in &mut tree.nodes {
        let found = links.get(id).copied().unwrap_or(0);
        let dir = node.mode & libc::S_IFMT == libc::S_IFDIR;
        node.nlink = if dir && (found > 0 || *id == wire::ROOT) {
            2
        } else {
            found
        };
    }
}
