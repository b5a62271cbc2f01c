// SPDX-License-Identifier: GPL-2.0
//! Cloned descriptors: each has a queue of its own, and a crash may close some of them.

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;

use super::help::{expect_errno, expect_resent, populated, still_serves};
use super::resend::{all_ok, Job};
use super::Scenario;
use crate::raw::dev::Read1;
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::msg::Message;
use crate::raw::ops;
use crate::raw::tree::Answer;
use crate::raw::wire::op;

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "clones/closed",
            "requests of a closed clone are sent again, not ECONNABORTED",
            closed,
        ),
        Scenario::series(
            "clones/closed-order",
            "what was read on a clone that is closed comes to the others in the order in which it was sent",
            closed_order,
        ),
        Scenario::series(
            "clones/open",
            "requests of a clone that stays open are swept as well",
            open,
        ),
        Scenario::series(
            "clones/answer",
            "a resent request can be answered on a clone",
            answer,
        ),
    ]
}

/// A mount with one request read on a clone and one on the first device.
fn two_queues<'a>(
    env: &'a Env<'a>,
) -> Result<(Kit<'a>, crate::raw::dev::Device, Vec<Job>, Vec<Message>)> {
    let mut kit = populated(env, 2)?;
    let mut clone = kit.dev.clone_queue().context("FUSE_DEV_IOC_CLONE")?;
    let mut jobs = vec![];
    let mut messages = vec![];
    for _ in 0..3 {
        jobs.push(kit.on("stat", "f0", |p| ops::stat(p).map(drop))?);
        let Read1::Message(m) = clone.read(kit.patience)? else {
            anyhow::bail!("nothing to read on the clone")
        };
        ensure!(m.is(op::GETATTR), "{m} on the clone");
        messages.push(m);
        jobs.push(kit.on("stat", "f1", |p| ops::stat(p).map(drop))?);
        messages.push(kit.until_op(op::GETATTR)?);
    }
    Ok((kit, clone, jobs, messages))
}

fn resent_on_main(kit: &mut Kit<'_>, jobs: &[Job], old: &[Message]) -> Result<()> {
    ensure!(
        jobs.iter().all(|j| !j.done()),
        "an application was answered by nobody"
    );
    let recovered = kit.recover()?;
    ensure!(
        recovered.report.held == old.len() as u64,
        "{} requests are owed, the report says {}",
        old.len(),
        recovered.report.held
    );
    for m in old {
        let new = kit.next_request()?;
        expect_resent(kit, m, &new)?;
        kit.answer(&new)?;
    }
    all_ok(kit, jobs)?;
    kit.check_counts()?;
    still_serves(kit)
}

fn closed(env: &Env<'_>) -> Result<()> {
    let (mut kit, clone, jobs, old) = two_queues(env)?;
    drop(clone);
    resent_on_main(&mut kit, &jobs, &old)
}

/// No server dies as a whole.
fn closed_order(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let mut clone = kit.dev.clone_queue().context("FUSE_DEV_IOC_CLONE")?;
    let (mut jobs, mut sent) = (Vec::new(), Vec::new());
    for _ in 0..40 {
        jobs.push(kit.on("stat", "f0", |p| ops::stat(p).map(drop))?);
        let Read1::Message(m) = clone.read(kit.patience)? else {
            anyhow::bail!("nothing to read on the clone")
        };
        sent.push(m.original());
    }
    drop(clone);
    let mut read = Vec::new();
    for _ in &sent {
        let m = kit.next_request()?;
        read.push(m.original());
        kit.answer(&m)?;
    }
    all_ok(&mut kit, &jobs)?;
    ensure!(read == sent, "sent as {sent:?}, they came as {read:?}");
    still_serves(&mut kit)
}

fn open(env: &Env<'_>) -> Result<()> {
    let (mut kit, _clone, jobs, old) = two_queues(env)?;
    resent_on_main(&mut kit, &jobs, &old)
}

fn answer(env: &Env<'_>) -> Result<()> {
    let (mut kit, clone, jobs, old) = two_queues(env)?;
    kit.restarted()?;
    drop(clone);
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    kit.commit(&recovered)?;
    let mut clone = kit.dev.clone_queue()?;
    for m in &old {
        let Read1::Message(new) = clone.read(kit.patience)? else {
            anyhow::bail!("nothing to read on the clone")
        };
        expect_resent(&kit, m, &new)?;
        let Answer::Ok(bytes) = kit.tree.apply(&new)? else {
            anyhow::bail!("{new} fails")
        };
        expect_errno(
            "an answer on the wrong queue",
            kit.dev.reply_ok(new.unique(), &bytes),
            Errno::ENOENT,
        )?;
        clone
            .reply_ok(new.unique(), &bytes)
            .context("the answer on the clone")?;
    }
    all_ok(&mut kit, &jobs)?;
    still_serves(&mut kit)
}
