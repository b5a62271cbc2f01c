// SPDX-License-Identifier: GPL-2.0
//! Who may take over: the root is the fence, and a wrong server changes nothing.

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::PollFlags;
use std::time::Duration;

use super::help::{
    enter, expect_errno, expect_report, expect_resent, open, populated, readable, still_serves,
    Phase,
};
use super::Scenario;
use crate::raw::dev::Read1;
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::ops;
use crate::raw::recover::Recovered;
use crate::raw::tree::Answer;
use crate::raw::wire::{op, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    let mut all = vec![
        Scenario::series(
            "handover/refused",
            "a refused root revokes nothing; read is ESTALE, poll IN and ERR",
            refused,
        ),
        Scenario::series(
            "handover/refused-often",
            "wrong servers one after the other, then the right one",
            refused_often,
        ),
        Scenario::series(
            "handover/read-wakes",
            "a reader that blocks gets ESTALE when the root is refused",
            read_wakes,
        ),
        Scenario::series(
            "handover/read-into-nothing",
            "what could not be copied to the server is read again: the root refuses nothing, no inode is revoked, the report comes",
            read_into_nothing,
        ),
        Scenario::series(
            "handover/root-alone",
            "nothing but the root is shown before the root is confirmed",
            root_alone,
        ),
        Scenario::series(
            "handover/root-unfetched",
            "a root whose attributes were never fetched is confirmed by any ino",
            root_unfetched,
        ),
        Scenario::series(
            "handover/unsigned-mount",
            "a mount without identity takes any server's RESTARTED",
            no_identity,
        ),
        Scenario::series(
            "handover/readers-wake",
            "COMMIT wakes every reader, not one",
            readers_wake,
        ),
    ];
    for (name, answer) in [("error", 0), ("type", 1), ("ino", 2)] {
        let guards = "whatever is wrong with the root refuses the server";
        all.push(Scenario::series(
            format!("handover/root-wrong-{name}"),
            guards,
            move |env| root_wrong(env, answer),
        ));
    }
    all
}

fn expect_refused(kit: &mut Kit<'_>) -> Result<()> {
    kit.conn.wait_state(&["refused"], kit.patience)?;
    for _ in 0..3 {
        let ready = kit.dev.poll(PollFlags::POLLIN, Duration::ZERO)?;
        ensure!(
            ready.contains(PollFlags::POLLIN | PollFlags::POLLERR),
            "poll says {ready:?}, not IN and ERR"
        );
        match kit.dev.read_blocking()? {
            Read1::Failed(Errno::ESTALE) => {}
            Read1::Failed(e) => anyhow::bail!("read says {e}, not ESTALE"),
            _ => anyhow::bail!("read brought a message to a refused server"),
        }
    }
    Ok(())
}

fn refused(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 5)?;
    let fd = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    let app = kit.on("stat", "f1", |p| ops::stat(p).map(drop))?;
    let old = kit.until_op(op::GETATTR)?;
    enter(&mut kit, Phase::Refused)?;
    expect_refused(&mut kit)?;
    let told = kit.conn.recovery()?.context("no recovery file")?;
    let numbers = (told.get("replayed")?, told.get("revoked")?);
    ensure!(numbers == (0, 0), "the kernel tells of {numbers:?}");
    ensure!(!app.done(), "the application was told of a refused server");
    let epoch = kit.epoch;
    expect_errno(
        "COMMIT of a refused server",
        kit.commit_epoch(epoch),
        Errno::ESTALE,
    )?;
    let recovered = kit.recover()?;
    expect_report(&recovered, 0)?;
    ensure!(
        recovered.replays.len() == 6,
        "{} replays of 6 after a refused server",
        recovered.replays.len()
    );
    let new = kit.next_request()?;
    expect_resent(&kit, &old, &new)?;
    kit.answer(&new)?;
    ensure!(kit.serve(&app)? == Ok(()), "the parked stat");
    let read = kit.run("pread", move || ops::pread(fd, 100, 0))?;
    ensure!(
        read == Ok(b"content of 0".to_vec()),
        "the open file reads {read:?}"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn refused_often(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 5)?;
    let app = kit.parked("mkdir", "d", 1, ops::mkdir)?;
    for _ in 0..20 {
        enter(&mut kit, Phase::Refused)?;
        expect_refused(&mut kit)?;
    }
    expect_report(&kit.recover()?, 0)?;
    ensure!(kit.serve(&app)? == Ok(()), "mkdir");
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn read_wakes(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 5)?;
    kit.restarted()?;
    let (m, _) = kit.next_replay()?;
    let mut dev = kit.dev.duplicate()?;
    let reader = kit.app("a blocked read", move || match dev.read_blocking() {
        Ok(Read1::Failed(e)) => e,
        _ => Errno::UnknownErrno,
    })?;
    reader.wait_asleep(kit.patience)?;
    kit.send(&m, &Answer::Err(libc::EIO))?;
    let woken = reader.finish(kit.patience)?;
    ensure!(
        woken == Errno::ESTALE,
        "the blocked read ended with {woken}"
    );
    kit.recover()?;
    still_serves(&mut kit)
}

fn root_alone(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 20)?;
    kit.restarted()?;
    let (m, replay) = kit.next_replay()?;
    ensure!(replay.nodeid == ROOT, "node {} comes first", replay.nodeid);
    let early = kit
        .dev
        .poll(PollFlags::POLLIN, Duration::from_millis(300))?;
    ensure!(
        !early.contains(PollFlags::POLLIN),
        "something follows the root before it is confirmed"
    );
    kit.confirm(&m, &replay)?;
    kit.next_replay()?;
    kit.recover()?;
    still_serves(&mut kit)
}

fn root_unfetched(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted(env)?;
    // Nobody has asked for the root's attributes; its number is not the 1 the kernel made up.
    kit.tree.node_mut(ROOT).ino = 987_654;
    kit.recover()?;
    let ino = kit
        .run_on("stat", "", ops::stat)?
        .context("stat of the root")?
        .stx_ino;
    ensure!(ino == 987_654 || ino == 1, "the root's ino is {ino}");
    kit.recover()
        .context("a second recovery, after the attributes were fetched")?;
    still_serves(&mut kit)
}

fn no_identity(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted_with(
        env,
        Config {
            identity: [0; 2],
            ..Default::default()
        },
    )?;
    super::help::populate(&mut kit, 3)?;
    kit.recover()?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn root_wrong(env: &Env<'_>, how: u8) -> Result<()> {
    let mut kit = populated(env, 5)?;
    // The root's attributes are known, or its number could not be wrong.
    ensure!(
        kit.run_on("stat", "", ops::stat)?.is_ok(),
        "stat of the root"
    );
    kit.settle()?;
    kit.restarted()?;
    let (m, _) = kit.next_replay()?;
    let mut out = kit.tree.attr_out(ROOT).context("root")?;
    let answer = match how {
        0 => Answer::Err(libc::ENOTCONN),
        1 => {
            out.attr.mode = libc::S_IFREG | 0o644;
            Answer::of(&out)
        }
        _ => {
            out.attr.ino += 1;
            Answer::of(&out)
        }
    };
    kit.send(&m, &answer)?;
    expect_refused(&mut kit)?;
    let recovered = kit.recover()?;
    expect_report(&recovered, 0)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn readers_wake(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let mut jobs = Vec::new();
    for i in 0..4 {
        jobs.push(kit.parked("stat", "f0", i + 1, |p| ops::stat(p).map(drop))?);
    }
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    // Four readers block on the device; each must get one of the four held requests from one COMMIT.
    let mut readers = Vec::new();
    for _ in 0..4 {
        let mut dev = kit.dev.duplicate()?;
        let reader = kit.app("a reader", move || match dev.read_blocking() {
            Ok(Read1::Message(m)) => Some(m),
            _ => None,
        })?;
        reader.wait_asleep(kit.patience)?;
        readers.push(reader);
    }
    kit.commit(&recovered)?;
    for reader in &readers {
        let m = reader
            .finish(kit.patience)?
            .context("a reader got no message")?;
        kit.answer(&m)?;
    }
    for job in &jobs {
        ensure!(kit.serve(job)? == Ok(()), "{}", job.what);
    }
    still_serves(&mut kit)
}

fn read_into_nothing(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let fd = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    let into_nothing = |kit: &Kit<'_>| {
        // SAFETY: the address is not mapped; the kernel answers EFAULT and touches nothing.
        let n = unsafe { libc::read(kit.dev.raw(), 8 as *mut libc::c_void, 1 << 20) };
        expect_errno("a read into nothing", Errno::result(n), Errno::EFAULT)
    };
    kit.restarted()?;
    let mut replays = Vec::new();
    let report = loop {
        readable(&kit, "the next message of the recovery")?;
        into_nothing(&kit)?;
        let m = kit.next()?;
        if let Some(report) = m.report(kit.cookie()) {
            break report;
        }
        let replay = m
            .replay()
            .with_context(|| format!("{m} is part of no recovery"))?;
        kit.confirm(&m, &replay)?;
        replays.push(replay);
    };
    ensure!(
        (report.replayed, report.confirmed, report.revoked) == (4, 4, 0),
        "{report:?}"
    );
    kit.commit(&Recovered::of(replays, report))?;
    let read = kit.run("pread", move || ops::pread(fd, 3, 0))?;
    ensure!(read == Ok(b"con".to_vec()), "the open file gave {read:?}");
    still_serves(&mut kit)
}
