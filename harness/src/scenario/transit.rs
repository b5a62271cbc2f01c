// SPDX-License-Identifier: GPL-2.0
//! Requests that are on no list when the sweep comes: between two lists, or half copied.

use std::sync::Arc;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use zerocopy::IntoBytes;

use super::help::{expect_resent, populated, readable, still_serves};
use super::kill::syscall_of;
use super::Scenario;
use crate::raw::app::{state, App, Proc};
use crate::raw::dev::Read1;
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::msg::Message;
use crate::raw::ops::{self, Done};
use crate::raw::trap::Trap;
use crate::raw::tree::Answer;
use crate::raw::uffd::Abyss;
use crate::raw::wait::wait_for;
use crate::raw::wire::{notify, op, OutHeader, RetrieveOut, ROOT, UNIQUE_RESEND};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "transit/between-lists",
            "a request dequeued before the sweep and copied after it is owed, and the report waits for it",
            |env| between_lists(env, 1),
        ),
        Scenario::series(
            "transit/between-lists-for-long",
            "also when its reader sleeps through a hundred RESTARTEDs",
            |env| between_lists(env, 100),
        ),
        Scenario::series(
            "transit/reader-killed",
            "a reader killed while it copies loses no request, whether RESTARTED came before or after",
            reader_killed,
        ),
        Scenario::series(
            "transit/writer-killed",
            "a writer killed while its answer is copied has answered nothing",
            writer_killed,
        ),
        Scenario::series(
            "transit/writer-killed-short",
            "nor has its short answer left anything behind for the next one",
            writer_killed_short,
        ),
        Scenario::series(
            "transit/answer-completes",
            "an answer half copied at the sweep completes, and is not owed any more",
            answer_completes,
        ),
        Scenario::series(
            "transit/notify-reply",
            "the answer to a dead server's RETRIEVE goes to nobody",
            |env| notify_reply(env, false),
        ),
        Scenario::series(
            "transit/notify-reply-pending",
            "nor does one that waits to be read at RESTARTED",
            |env| notify_reply(env, true),
        ),
        Scenario::series(
            "transit/forget-asleep",
            "a reader that sleeps in the copy of a FORGET is not waited for, through whole recoveries",
            forget_asleep,
        ),
        Scenario::series(
            "transit/forced-forget",
            "a FORGET that gives back an entry of a dead server goes to nobody",
            forced_forget,
        ),
    ]
}

/// A thread of the old server: it reads one message, and tells what came of it.
fn old_reader(kit: &mut Kit<'_>) -> Result<App<Result<Message, Errno>>> {
    let mut dev = kit.dev.duplicate()?;
    kit.app("the old server's read", move || match dev.read_blocking() {
        Ok(Read1::Message(m)) => Ok(m),
        Ok(Read1::Failed(e)) => Err(e),
        _ => Err(Errno::UnknownErrno),
    })
}

/// Goes on until the kernel has nothing left to do but to wait for what is in transit.
fn answer_until_settling(kit: &mut Kit<'_>) -> Result<Vec<crate::raw::msg::Replay>> {
    let mut replays = Vec::new();
    for _ in 0..kit.tree.held().len() {
        let (m, replay) = kit.next_replay()?;
        kit.confirm(&m, &replay)?;
        replays.push(replay);
    }
    kit.conn.wait_state(&["settle"], kit.patience)?;
    ensure!(
        !kit.readable()?,
        "the report can be read while a request is in somebody's hands"
    );
    Ok(replays)
}

fn between_lists(env: &Env<'_>, restarts: u32) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let trap = Trap::arm("read_dequeued")?;
    let reader = old_reader(&mut kit)?;
    reader.wait_asleep(kit.patience)?;
    let app = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    trap.wait(kit.patience)?;
    for i in 0..restarts {
        kit.restarted()?;
        // Some of them get further than others.
        if i % 3 == 1 {
            kit.confirm_root()?;
        }
    }
    answer_until_settling(&mut kit)?;
    trap.go();
    let read = reader.finish(kit.patience)?;
    ensure!(
        matches!(read, Err(Errno::ENOENT)),
        "the old reader got {read:?}: a request of the next server's"
    );
    let m = kit.next()?;
    let report = m
        .report(kit.cookie())
        .with_context(|| format!("expected the report, got {m}"))?;
    ensure!(report.held == 1, "one request is owed, not {}", report.held);
    kit.commit_epoch(report.epoch)?;
    kit.wait_serving()?;
    let again = kit.next_request()?;
    ensure!(again.is(op::GETATTR), "expected the GETATTR, got {again}");
    ensure!(
        again.unique() & UNIQUE_RESEND != 0,
        "{again}: a server may have seen it, and its id does not say so"
    );
    ensure!(
        report.lowest_owed == again.original(),
        "the report says that {:#x} is owed, and {:#x} comes",
        report.lowest_owed,
        again.original()
    );
    kit.answer(&again)?;
    ensure!(kit.serve(&app)? == Ok(()), "stat");
    still_serves(&mut kit)
}

fn reader_killed(env: &Env<'_>) -> Result<()> {
    for restarted_first in [false, true] {
        let mut kit = populated(env, 3)?;
        let dev = kit.dev.raw();
        let mut reader = Proc::spawn("a reader into the abyss", &[], move || {
            Abyss::new(1 << 20).map_or(99, |a| a.read_from(dev))
        })?;
        reader.wait_asleep(kit.patience)?;
        let app = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
        app.wait_asleep(kit.patience)?;
        in_the_abyss(&kit, &reader, libc::SYS_read)?;
        if restarted_first {
            kit.restarted()?;
            answer_until_settling(&mut kit)?;
            kill(&kit, &mut reader)?;
            let m = kit.next()?;
            let report = m.report(kit.cookie()).context("the report")?;
            ensure!(report.held == 1, "{} held, not 1", report.held);
            kit.commit_epoch(report.epoch)?;
            kit.wait_serving()?;
        } else {
            kill(&kit, &mut reader)?;
            let recovered = kit.recover()?;
            ensure!(recovered.report.held == 1, "{:?}", recovered.report);
        }
        let result = kit.serve(&app)?;
        ensure!(
            result == Ok(()),
            "stat, whose reader was killed (RESTARTED first: {restarted_first}), gave {result:?}"
        );
        still_serves(&mut kit)?;
    }
    Ok(())
}

/// Waits until a server sleeps in the middle of a copy: in its system call, and not for a request.
fn in_the_abyss(kit: &Kit<'_>, who: &Proc, call: libc::c_long) -> Result<()> {
    wait_for("the server to sleep in its copy", kit.patience, || {
        let there = syscall_of(who.tid()) == call.to_string()
            && matches!(state(who.tid()), Some('S' | 'D'))
            && !kit.readable()?;
        Ok(there || who.ended()?)
    })?;
    ensure!(!who.ended()?, "{} ended instead of faulting", who.what);
    Ok(())
}

fn kill(kit: &Kit<'_>, who: &mut Proc) -> Result<()> {
    who.signal(Signal::SIGKILL)?;
    who.wait(kit.patience)?;
    Ok(())
}

/// Spawns a server that answers `m` with `len` bytes of which it never gets hold.
fn abysmal_answer(kit: &Kit<'_>, m: &Message, len: usize) -> Result<Proc> {
    let header = OutHeader {
        len: (16 + len) as u32,
        error: 0,
        unique: m.unique(),
    };
    let dev = kit.dev.raw();
    let writer = Proc::spawn("a writer out of the abyss", &[], move || {
        Abyss::new(1 << 16).map_or(99, |a| a.write_to(dev, header.as_bytes(), len))
    })?;
    in_the_abyss(kit, &writer, libc::SYS_writev)?;
    Ok(writer)
}

fn writer_killed(env: &Env<'_>) -> Result<()> {
    for restarted_first in [false, true] {
        let mut kit = populated(env, 3)?;
        let app = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
        let old = kit.until_op(op::GETATTR)?;
        let mut writer = abysmal_answer(&kit, &old, 104)?;
        let report = if restarted_first {
            kit.restarted()?;
            answer_until_settling(&mut kit)?;
            kill(&kit, &mut writer)?;
            let m = kit.next()?;
            let report = m.report(kit.cookie()).context("the report")?;
            kit.commit_epoch(report.epoch)?;
            kit.wait_serving()?;
            report
        } else {
            kill(&kit, &mut writer)?;
            kit.recover()?.report
        };
        ensure!(report.held == 1, "{} held, not 1", report.held);
        let new = kit.next_request()?;
        expect_resent(&kit, &old, &new)?;
        kit.answer(&new)?;
        let result = kit.serve(&app)?;
        ensure!(result == Ok(()), "stat gave {result:?}");
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn writer_killed_short(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let f0 = kit.tree.child(ROOT, "f0").context("f0")?;
    let value = b"forty-two bytes of an attribute, no less ..".to_vec();
    kit.tree
        .node_mut(f0)
        .xattrs
        .insert("user.x".into(), value.clone());
    let app = kit.on("getxattr", "f0", |p| getxattr(p, 64))?;
    let old = kit.until_op(op::GETXATTR)?;
    let mut writer = abysmal_answer(&kit, &old, 3)?;
    kill(&kit, &mut writer)?;
    kit.recover()?;
    let new = kit.next_request()?;
    expect_resent(&kit, &old, &new)?;
    kit.answer(&new)?;
    let result = kit.serve(&app)?;
    ensure!(result == Ok(value), "getxattr gave {result:?}");
    still_serves(&mut kit)
}

fn getxattr(path: &std::path::Path, size: usize) -> Done<Vec<u8>> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).expect("no NUL");
    let mut value = vec![0u8; size];
    // SAFETY: strings end with NUL, the buffer has `size` bytes.
    let n = unsafe {
        libc::getxattr(
            path.as_ptr(),
            c"user.x".as_ptr(),
            value.as_mut_ptr().cast(),
            size,
        )
    };
    value.truncate(Errno::result(n)? as usize);
    Ok(value)
}

fn answer_completes(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let app = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    let old = kit.until_op(op::GETATTR)?;
    let owed = kit.on("stat", "f1", |p| ops::stat(p).map(drop))?;
    let other = kit.until_op(op::GETATTR)?;
    let Answer::Ok(bytes) = kit.tree.apply(&old)? else {
        anyhow::bail!("GETATTR fails")
    };
    let trap = Trap::arm("write_copied")?;
    let dev = kit.dev.duplicate()?;
    let unique = old.unique();
    let writer = kit.app("the old server's write", move || {
        dev.reply_ok(unique, &bytes)
    })?;
    trap.wait(kit.patience)?;
    kit.restarted()?;
    let confirmed = answer_until_settling(&mut kit)?;
    ensure!(!app.done(), "stat ended before its answer was complete");
    trap.go();
    let wrote = writer.finish(kit.patience)?;
    ensure!(wrote == Ok(()), "the old server's answer gave {wrote:?}");
    let result = app.finish(kit.patience)?;
    ensure!(result == Ok(()), "stat gave {result:?}");
    let m = kit.next()?;
    let report = m.report(kit.cookie()).context("the report")?;
    ensure!(
        (report.held, report.lowest_owed) == (1, other.original()),
        "{} held, lowest {:#x}: one is answered, {:#x} is owed",
        report.held,
        report.lowest_owed,
        other.original()
    );
    ensure!(confirmed.len() == 4, "{} replays", confirmed.len());
    kit.commit_epoch(report.epoch)?;
    kit.wait_serving()?;
    let new = kit.next_request()?;
    expect_resent(&kit, &other, &new)?;
    kit.answer(&new)?;
    ensure!(kit.serve(&owed)? == Ok(()), "the other stat");
    still_serves(&mut kit)
}

/// `pending`: it is in the queue, or else just before that.
fn notify_reply(env: &Env<'_>, pending: bool) -> Result<()> {
    const ASKED: u64 = 4711;
    let mut kit = populated(env, 3)?;
    let f0 = kit.tree.child(ROOT, "f0").context("f0")?;
    let content = kit.run_on("read", "f0", ops::read_file)?;
    ensure!(content.is_ok(), "read f0");
    kit.settle()?;
    let retrieve = RetrieveOut {
        notify_unique: ASKED,
        nodeid: f0,
        offset: 0,
        size: 64,
        padding: 0,
    };
    if pending {
        kit.dev.notify(notify::RETRIEVE, &retrieve, &[])?;
        readable(&kit, "the answer to RETRIEVE")?;
        kit.restarted()?;
    } else {
        let trap = Trap::arm("queue_notify_reply")?;
        let dev = kit.dev.duplicate()?;
        let said = kit.app("RETRIEVE", move || {
            dev.notify(notify::RETRIEVE, &retrieve, &[])
        })?;
        trap.wait(kit.patience)?;
        kit.restarted()?;
        trap.go();
        said.finish(kit.patience)?.ok();
    }
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    ensure!(
        recovered.report.held == 0,
        "{} requests are held: the answer to RETRIEVE is none that the next server owes",
        recovered.report.held
    );
    kit.commit(&recovered)?;
    kit.served.clear();
    still_serves(&mut kit)?;
    if let Some(m) = kit.served.iter().find(|m| m.is(op::NOTIFY_REPLY)) {
        anyhow::bail!("{m} reached a server that had not asked");
    }
    Ok(())
}

fn forget_asleep(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let abyss = Arc::new(Abyss::new(1 << 18)?);
    let (dev, there) = (kit.dev.duplicate()?, abyss.clone());
    let reader = kit.app("a read(2) into the abyss", move || there.read(dev.raw()))?;
    reader.wait_asleep(kit.patience)?;
    let before = reader.times_asleep()?;
    // What was used lately is only marked the first time.
    for _ in 0..3 {
        std::fs::write("/proc/sys/vm/drop_caches", "2").context("drop_caches")?;
    }
    wait_for("a reader to sleep in its copy", kit.patience, || {
        Ok(reader.done() || (reader.times_asleep()? > before && !kit.readable()?))
    })?;
    ensure!(
        !reader.done(),
        "it did not sleep, but gave {:?}",
        reader.take()
    );
    for _ in 0..2 {
        let recovered = kit.recover()?;
        ensure!(
            recovered.replays.len() == 1,
            "{} inodes are shown, one of which was evicted",
            recovered.replays.len()
        );
    }
    ensure!(!reader.done(), "who slept in a copy woke up by itself");
    abyss.fill(&[])?;
    let read = reader.finish(kit.patience)?;
    ensure!(read.is_ok(), "the dead server's read gave {read:?}");
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn forced_forget(env: &Env<'_>) -> Result<()> {
    const DO_READDIRPLUS: u64 = 1 << 13;
    let mut kit = Kit::granted_with(env, crate::raw::kit::Config::with(DO_READDIRPLUS))?;
    let dir = kit.tree.dir(ROOT, "d");
    let file = kit.tree.file(dir, "x", b"");
    ensure!(kit.run_on("stat", "d", ops::stat)?.is_ok(), "stat d");
    let app = kit.on("list", "d", ops::listdir)?;
    let m = kit.until_op(op::READDIRPLUS)?;
    // An entry without a type is none the kernel can use: it gives it back.
    let mode = std::mem::replace(&mut kit.tree.node_mut(file).mode, 0);
    let trap = Trap::arm("queue_forget")?;
    kit.answer(&m)?;
    kit.tree.node_mut(file).mode = mode;
    trap.wait(kit.patience)?;
    kit.recover()?;
    trap.go();
    // Tree::forget refuses what the server never counted.
    ensure!(kit.serve(&app)?.is_ok(), "listing d");
    kit.check_counts()?;
    still_serves(&mut kit)
}
