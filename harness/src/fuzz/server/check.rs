// SPDX-License-Identifier: GPL-2.0
//! What an honest kernel may deliver, and publish.

use anyhow::{ensure, Context, Result};

use super::Server;
use crate::raw::kit::Kit;
use crate::raw::msg::Message;
use crate::raw::wire::{self, op, UNIQUE_RESEND};

impl Server<'_, '_> {
    /// What may be delivered now?
    pub(super) fn check(&mut self, m: &Message) -> Result<()> {
        if self.rivalled {
            return Ok(());
        }
        let epoch = self.kit.epoch as u8;
        let replay = m.replay();
        let report = m.report(self.kit.cookie());
        if self.recovering {
            ensure!(
                replay.is_some() || report.is_some(),
                "{m} was delivered during a recovery"
            );
        } else {
            ensure!(
                // Who commits without having read the report gets it later.
                replay.is_none() && (report.is_none() || self.report.is_none()),
                "{m} belongs to a recovery, and there is none"
            );
        }
        if m.unique() & UNIQUE_RESEND != 0 && !m.is(op::NOTIFY_REPLY) && !m.is(op::INTERRUPT) {
            // RESEND on its own sets the bit and nothing else.
            let byte = wire::epoch_byte(m.unique());
            ensure!(
                byte == epoch || byte == 0,
                "{m} carries epoch {byte}, it is {epoch} now"
            );
        }
        if let Some(r) = replay {
            ensure!(
                !self.shown.iter().any(|s| s.nodeid == r.nodeid) || !self.honest(),
                "node {} is replayed twice",
                r.nodeid
            );
        }
        if let Some(report) = report {
            ensure!(
                report.confirmed + report.revoked == report.replayed,
                "the report does not add up: {report:?}"
            );
            ensure!(
                self.lied || report.revoked == 0,
                "an honest server's inodes were revoked: {report:?}"
            );
            ensure!(
                !self.honest() || report.replayed == self.answered,
                "{} replays were answered, the report says {}",
                self.answered,
                report.replayed
            );
        }
        if !self.recovering && !m.wants_no_reply() {
            if let Some(last) = self.last_id {
                ensure!(
                    m.original() > last,
                    "{m} comes after request {last:#x}, which was sent later"
                );
                self.last_id = Some(m.original());
            }
        }
        Ok(())
    }
}

/// The `recovery` file adds up.
pub fn sums(kit: &Kit<'_>) -> Result<()> {
    let r = kit
        .conn
        .recovery()?
        .context("there is no `recovery` file")?;
    for prefix in ["", "total_"] {
        let get = |what: &str| r.get(&format!("{prefix}{what}"));
        let (replayed, confirmed, revoked) = (get("replayed")?, get("confirmed")?, get("revoked")?);
        ensure!(
            replayed == confirmed + revoked,
            "{prefix}replayed {replayed} is not {confirmed} confirmed and {revoked} revoked"
        );
    }
    ensure!(
        r.get("epoch")? >= r.get("total_recoveries")?,
        "more recoveries than epochs: {r:?}"
    );
    Ok(())
}
