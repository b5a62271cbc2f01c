// SPDX-License-Identifier: GPL-2.0
//! RESTARTED again: in every phase, very often, and by somebody who is no server yet.

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;

use super::help::{
    enter, expect_errno, expect_report, expect_resent, populated, readable, still_serves, wake,
    Phase, PHASES,
};
use super::lost::drop_node;
use super::resend::park_stats;
use super::Scenario;
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::ops;
use crate::raw::trap::Trap;
use crate::raw::tree::Answer;
use crate::raw::wait::wait_for;
use crate::raw::wire::{op, RestartedOut, COOKIE_BIT, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    let mut all: Vec<Scenario> = PHASES
        .into_iter()
        .map(|phase| {
            let guards = "a second RESTARTED voids what the first had begun, and completes";
            Scenario::series(format!("again/{}", phase.name()), guards, move |env| {
                again(env, phase)
            })
        })
        .collect();
    all.extend([
        Scenario::series(
            "again/every-pair",
            "crashes in two phases one after the other",
            pairs,
        ),
        Scenario::series(
            "again/200-times",
            "RESTARTED 200 times without a reader neither hangs nor leaks",
            many,
        ),
        Scenario::series(
            "again/200-recoveries",
            "200 whole recoveries in a row",
            recoveries,
        ),
        Scenario::series(
            "again/keeper-early",
            "the keeper says RESTARTED long before a server runs",
            keeper_early,
        ),
        Scenario::series(
            "again/in-release",
            "RESTARTED in the middle of a release waits for its end, and begins afresh",
            |env| in_window(env, "release"),
        ),
        Scenario::series(
            "again/in-sorting",
            "so does RESTARTED while held requests are sorted",
            |env| in_window(env, "unhold_sort"),
        ),
        Scenario::series(
            "again/threads",
            "RESTARTED from many threads at once",
            threads,
        ),
    ]);
    all
}

fn again(env: &Env<'_>, phase: Phase) -> Result<()> {
    let mut kit = populated(env, 10)?;
    let app = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    let old = kit.until_op(op::GETATTR)?;
    let left = enter(&mut kit, phase)?;
    kit.restarted()?;
    // What belongs to the older epoch is void.
    if let Some(m) = left.filter(|m| m.replay().is_some()) {
        let answer = kit.tree.attr_out(m.nodeid()).context("the replayed node")?;
        let said = kit
            .dev
            .reply_ok(m.unique(), zerocopy::IntoBytes::as_bytes(&answer));
        expect_errno("the answer to a voided replay", said, Errno::ENOENT)?;
    }
    expect_errno(
        "COMMIT of the voided epoch",
        kit.commit_epoch(1),
        Errno::ESTALE,
    )?;
    wake(&mut kit)?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    ensure!(
        recovered.report.epoch == 2,
        "epoch {}",
        recovered.report.epoch
    );
    ensure!(
        recovered.replays.len() == 11,
        "{} replays of 11",
        recovered.replays.len()
    );
    expect_report(&recovered, 0)?;
    kit.commit(&recovered)?;
    let new = kit.next_request()?;
    expect_resent(&kit, &old, &new)?;
    kit.answer(&new)?;
    ensure!(kit.serve(&app)? == Ok(()), "the parked stat");
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// First the phases in which nobody sleeps in a copy, then what can be reached while somebody does: there is no report.
fn pairs(env: &Env<'_>) -> Result<()> {
    every_pair(env, |p| p.copying().is_none())?;
    for settle in [Phase::Settle, Phase::SettleAnswer] {
        every_pair(env, |p| {
            p == settle
                || matches!(
                    p,
                    Phase::Said | Phase::Root | Phase::Replay | Phase::Refused
                )
        })?;
    }
    Ok(())
}

fn every_pair(env: &Env<'_>, reached: impl Fn(Phase) -> bool) -> Result<()> {
    let mut kit = populated(env, 5)?;
    let app = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    let old = kit.until_op(op::GETATTR)?;
    let phases: Vec<_> = PHASES.into_iter().filter(|p| reached(*p)).collect();
    if let Some(settle) = phases.iter().find(|p| p.copying().is_some()) {
        enter(&mut kit, *settle)?;
    }
    for first in &phases {
        for second in &phases {
            enter(&mut kit, *first).with_context(|| format!("{first:?} then {second:?}"))?;
            enter(&mut kit, *second).with_context(|| format!("{first:?} then {second:?}"))?;
        }
    }
    ensure!(!app.done(), "the application was answered by nobody");
    wake(&mut kit)?;
    kit.recover()?;
    let new = kit.next_request()?;
    expect_resent(&kit, &old, &new)?;
    kit.answer(&new)?;
    ensure!(kit.serve(&app)? == Ok(()), "the parked stat");
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// After everything is served nothing may be waiting: a leaked request would be counted here for ever.
fn nothing_waits(kit: &mut Kit<'_>) -> Result<()> {
    kit.settle()?;
    kit.wait_serving()?;
    let patience = kit.patience;
    wait_for("`waiting` to become 0", patience, || {
        Ok(kit.conn.waiting()? == 0)
    })
}

fn many(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 30)?;
    let app = kit.parked("mkdir", "d", 1, ops::mkdir)?;
    for i in 0..200 {
        kit.restarted()?;
        // Some find the root's replay of the one before, some come before there is one.
        if i % 10 == 0 {
            readable(&kit, "the root's replay")?;
        }
    }
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    ensure!(
        recovered.report.epoch == 200,
        "epoch {} after 200",
        recovered.report.epoch
    );
    ensure!(
        recovered.report.replayed == 31,
        "{} replayed in the last epoch, not 31",
        recovered.report.replayed
    );
    kit.commit(&recovered)?;
    ensure!(kit.serve(&app)? == Ok(()), "mkdir");
    nothing_waits(&mut kit)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn recoveries(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 10)?;
    let app = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    let old = kit.until_op(op::GETATTR)?;
    for i in 0..200 {
        kit.recover().with_context(|| format!("recovery {i}"))?;
        let new = kit.next_request()?;
        expect_resent(&kit, &old, &new)?;
    }
    kit.recover()?;
    ensure!(kit.serve(&app)? == Ok(()), "the stat of 201 servers");
    nothing_waits(&mut kit)?;
    kit.check_counts()?;
    let file = kit.conn.recovery()?.context("recovery file")?;
    ensure!(
        file.get("total_recoveries")? == 202,
        "{} recoveries, not 202",
        file.get("total_recoveries")?
    );
    still_serves(&mut kit)
}

fn keeper_early(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 10)?;
    let parked = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    let old = kit.until_op(op::GETATTR)?;
    kit.restarted_as([0; 2]).context("the keeper's RESTARTED")?;
    // Nobody serves; applications come and wait.
    kit.conn
        .wait_waiting(2, kit.patience)
        .context("the replay of the root")?;
    let base = kit.conn.waiting()?;
    let made = kit.parked("mkdir", "d", base + 1, ops::mkdir)?;
    let second = kit.parked("stat", "f1", base + 2, |p| ops::stat(p).map(drop))?;
    // The server's own RESTARTED voids the keeper's; a wrong server in between changes nothing.
    expect_errno(
        "a server for another file system",
        kit.restarted_as([3, 4]),
        Errno::ESTALE,
    )?;
    let recovered = kit.recover()?;
    ensure!(
        recovered.report.epoch == 2 && recovered.report.held == 3,
        "{:?}",
        recovered.report
    );
    let new = kit.next_request()?;
    expect_resent(&kit, &old, &new)?;
    kit.answer(&new)?;
    let results = (kit.serve(&parked)?, kit.serve(&made)?, kit.serve(&second)?);
    ensure!(results == (Ok(()), Ok(()), Ok(())), "{results:?}");
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// Another RESTARTED when this server has committed, and has got nothing yet.
fn in_window(env: &Env<'_>, point: &'static str) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let (jobs, old) = park_stats(&mut kit, 2)?;
    let lost = kit.tree.child(ROOT, "f2").context("f2")?;
    kit.restarted()?;
    let recovered =
        kit.answer_replays(&mut |_, r| (r.nodeid == lost).then_some(Answer::Err(libc::ESTALE)))?;
    let trap = Trap::arm(point)?;
    kit.commit_epoch(recovered.report.epoch)?;
    kit.tree.adopt(&recovered.replays);
    drop_node(&mut kit, lost);
    trap.wait(kit.patience)?;
    let (dev, identity) = (kit.dev.duplicate()?, kit.config.identity);
    let cookie = COOKIE_BIT | 0x77;
    let sayer = kit.app("RESTARTED", move || {
        dev.restarted(RestartedOut {
            cookie,
            identity,
            ..Default::default()
        })
    })?;
    sayer.wait_asleep(kit.patience)?;
    ensure!(!sayer.done(), "it did not wait");
    trap.go();
    let said = sayer.finish(kit.patience)?;
    ensure!(said == Ok(()), "RESTARTED in a release gave {said:?}");
    kit.accepted(cookie);
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    kit.commit(&recovered)?;
    ensure!(
        recovered.report.held == 2 && !recovered.replays.iter().any(|r| r.nodeid == lost),
        "{:?}",
        recovered.report
    );
    for m in &old {
        let new = kit.next_request()?;
        expect_resent(&kit, m, &new)?;
        kit.answer(&new)?;
    }
    super::resend::all_ok(&mut kit, &jobs)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn threads(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 30)?;
    let app = kit.parked("mkdir", "d", 1, ops::mkdir)?;
    let each = 50;
    let mut sayers = Vec::new();
    for t in 0..4u64 {
        let dev = kit.dev.duplicate()?;
        let identity = kit.config.identity;
        sayers.push(kit.app("say RESTARTED", move || {
            (0..each).try_for_each(|i| {
                let cookie = COOKIE_BIT | (t << 32) | i;
                dev.restarted(RestartedOut {
                    cookie,
                    identity,
                    ..Default::default()
                })
            })
        })?);
    }
    for sayer in &sayers {
        let result = sayer.finish(kit.patience)?;
        ensure!(
            result == Ok(()),
            "RESTARTED from many threads gave {result:?}"
        );
    }
    kit.epoch += 4 * each as u32;
    let recovered = kit.recover()?;
    ensure!(
        recovered.replays.len() == 31,
        "{} replays",
        recovered.replays.len()
    );
    ensure!(kit.serve(&app)? == Ok(()), "mkdir");
    nothing_waits(&mut kit)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}
