// SPDX-License-Identifier: GPL-2.0
//! NOTIFY_RESEND that one thread of a server has begun, when another one says RESTARTED.

use anyhow::{ensure, Context, Result};

use super::help::{answer_all_but_root, populated, read_report, still_serves};
use super::resend::{all_ok, park_stats, Job};
use super::Scenario;
use crate::raw::app::App;
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::msg::Message;
use crate::raw::ops::Done;
use crate::raw::trap::Trap;
use crate::raw::wire::notify;

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "resend/overtaken",
            "NOTIFY_RESEND that RESTARTED has overtaken does not take a replay from the new server",
            overtaken,
        ),
        Scenario::series(
            "resend/sorting-at-restarted",
            "the report waits for what NOTIFY_RESEND has in its hands, and counts it",
            sorting_at_restarted,
        ),
    ]
}

struct Caught<'a> {
    // Who has stopped goes on before the mount ends.
    trap: Option<Trap>,
    kit: Kit<'a>,
    jobs: Vec<Job>,
    old: Vec<Message>,
    resend: App<Done<()>>,
}

/// Two requests in the server's hands, and a thread of it in the middle of NOTIFY_RESEND.
fn caught<'a>(env: &'a Env<'a>, point: &'static str) -> Result<Caught<'a>> {
    let mut kit = populated(env, 3)?;
    let (jobs, old) = park_stats(&mut kit, 2)?;
    let trap = Trap::arm(point)?;
    let dev = kit.dev.duplicate()?;
    let resend = kit.app("NOTIFY_RESEND", move || {
        dev.notify(notify::RESEND, &[0u8; 0], &[])
    })?;
    trap.wait(kit.patience)?;
    Ok(Caught {
        kit,
        jobs,
        old,
        resend,
        trap: Some(trap),
    })
}

impl Caught<'_> {
    /// NOTIFY_RESEND goes on, to its end.
    fn go(&mut self) -> Result<()> {
        drop(self.trap.take());
        let said = self.resend.finish(self.kit.patience)?;
        ensure!(said == Ok(()), "NOTIFY_RESEND gave {said:?}");
        Ok(())
    }

    /// Both are owed and counted, and go to the server that commits.
    fn ends_well(mut self) -> Result<()> {
        let kit = &mut self.kit;
        let report = read_report(kit)?
            .report(kit.cookie())
            .context("just seen")?;
        ensure!(
            report.held == 2,
            "2 requests are held, the report says {}",
            report.held
        );
        let (lowest, wanted) = (report.lowest_owed, self.old[0].original());
        ensure!(
            lowest == wanted,
            "lowest owed {lowest:#x}, expected {wanted:#x}"
        );
        kit.commit_epoch(report.epoch)?;
        all_ok(kit, &self.jobs)?;
        kit.check_counts()?;
        still_serves(kit)
    }
}

fn overtaken(env: &Env<'_>) -> Result<()> {
    let mut caught = caught(env, "resend")?;
    caught.kit.restarted()?;
    let (m, root) = caught.kit.next_replay()?;
    caught.go()?;
    caught
        .kit
        .confirm(&m, &root)
        .context("the answer to a replay that NOTIFY_RESEND must leave alone")?;
    caught.ends_well()
}

fn sorting_at_restarted(env: &Env<'_>) -> Result<()> {
    let mut caught = caught(env, "resend_sorted")?;
    let kit = &mut caught.kit;
    kit.restarted()?;
    kit.confirm_root()?;
    answer_all_but_root(kit)?;
    kit.conn.wait_state(&["settle"], kit.patience)?;
    ensure!(
        !kit.readable()?,
        "the report can be read while NOTIFY_RESEND has requests in its hands"
    );
    caught.go()?;
    caught.ends_well()
}
