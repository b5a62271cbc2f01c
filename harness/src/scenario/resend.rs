// SPDX-License-Identifier: GPL-2.0
//! What the dead server read and did not answer comes again after COMMIT: the same request, under its original id
//! with the RESEND bit and the epoch, in the original order; and nobody can answer it under an older id.

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags};

use super::help::{expect_errno, expect_resent, open, populated, still_serves};
use super::{Needs, Scenario};
use crate::raw::app::App;
use crate::raw::env::{skip, Env};
use crate::raw::kit::{Config, Kit};
use crate::raw::msg::Message;
use crate::raw::ops::{self, Done};
use crate::raw::recover::Recovered;
use crate::raw::wait::Rng;
use crate::raw::wire::{notify, op, original_id, resent_id, ROOT, UNIQUE_RESEND};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "resend/every-opcode",
            "requests of every kind are sent again whole and succeed",
            every_opcode,
        ),
        Scenario::series(
            "resend/order",
            "the original order, across hash buckets",
            order,
        ),
        Scenario::series(
            "resend/late-answer",
            "an answer of the dead server is ENOENT in every phase",
            late_answer,
        ),
        Scenario::series(
            "resend/two-crashes",
            "after a second crash the second server's answer is ENOENT too",
            two_crashes,
        ),
        Scenario::series(
            "resend/epoch-byte",
            "the epoch's low byte wraps, the id stays",
            epoch_byte,
        ),
        Scenario::series(
            "resend/short-answer-again",
            "a WRITE and a READ that were sent again keep their lengths",
            lengths,
        ),
        Scenario::series(
            "resend/failed-copy",
            "a reader whose buffer faults ends one request, in no state twice",
            failed_copy,
        ),
        Scenario::series(
            "resend/notified",
            "what NOTIFY_RESEND sends again carries the epoch as well",
            notified,
        ),
        Scenario::new(
            "resend/stock",
            Needs::Nothing,
            "NOTIFY_RESEND alone still works while serving",
            stock,
        ),
    ]
}

pub(super) type Job = App<Done<()>>;

/// Starts the operation and takes its request away unanswered.
fn park(
    kit: &mut Kit<'_>,
    what: &str,
    opcode: u32,
    run: impl FnOnce() -> Done<()> + Send + 'static,
) -> Result<(Job, Message)> {
    let app = kit.app(what, run)?;
    let m = kit
        .until(what, |m| m.is(opcode))
        .with_context(|| format!("{what}, whose result is {:?}", app.take()))?;
    Ok((app, m))
}

fn every_opcode(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted(env)?;
    // One directory an operation: namespace operations lock theirs until they are answered.
    let names = [
        "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r",
        "s", "t", "u",
    ];
    for dir in names {
        let id = kit.tree.dir(ROOT, dir);
        kit.tree.file(id, "file", b"0123456789");
        kit.tree.dir(id, "dir");
        kit.tree.symlink(id, "link", "file");
        ensure!(kit.run_on("stat", dir, ops::stat)?.is_ok(), "stat {dir}");
    }
    let root = kit.mnt.clone();
    let p = move |dir: &str, name: &str| root.join(dir).join(name);
    let mut fds = vec![];
    for dir in ["m", "n", "o", "p", "q", "r"] {
        fds.push(open(&mut kit, &format!("{dir}/file"), OFlag::O_RDWR)?);
    }
    for (dir, name) in [("c", "file"), ("d", "link"), ("t", "file"), ("u", "file")] {
        ensure!(
            kit.run_on("stat", &format!("{dir}/{name}"), ops::stat)?
                .is_ok(),
            "stat {dir}/{name}"
        );
    }
    kit.settle()?;

    type Run = Box<dyn FnOnce() -> Done<()> + Send>;
    let [w, r, s, fl, ls, fa] = fds[..] else {
        anyhow::bail!("six descriptors")
    };
    let jobs: Vec<(u32, Run)> = vec![
        (
            op::LOOKUP,
            Box::new({
                let x = p("a", "file");
                move || ops::stat_cached(&x).map(drop)
            }),
        ),
        (
            op::GETATTR,
            Box::new({
                let x = p("b", "");
                move || ops::stat(&x).map(drop)
            }),
        ),
        (
            op::SETATTR,
            Box::new({
                let x = p("c", "file");
                move || ops::chmod(&x, 0o600)
            }),
        ),
        (
            op::READLINK,
            Box::new({
                let x = p("d", "link");
                move || ops::readlink(&x).map(drop)
            }),
        ),
        (
            op::SYMLINK,
            Box::new({
                let x = p("e", "new");
                move || ops::symlink("there", &x)
            }),
        ),
        (
            op::MKDIR,
            Box::new({
                let x = p("f", "new");
                move || ops::mkdir(&x)
            }),
        ),
        (
            op::UNLINK,
            Box::new({
                let x = p("g", "file");
                move || ops::unlink(&x)
            }),
        ),
        (
            op::RMDIR,
            Box::new({
                let x = p("h", "dir");
                move || ops::rmdir(&x)
            }),
        ),
        (
            op::RENAME2,
            Box::new({
                let (x, y) = (p("i", "file"), p("i", "moved"));
                move || ops::rename(&x, &y, RenameFlags::RENAME_NOREPLACE)
            }),
        ),
        (
            op::LINK,
            Box::new({
                let (x, y) = (p("j", "file"), p("j", "second"));
                move || ops::link(&x, &y)
            }),
        ),
        (
            op::CREATE,
            Box::new({
                let x = p("k", "new");
                move || ops::open(&x, OFlag::O_CREAT | OFlag::O_WRONLY).map(drop)
            }),
        ),
        (
            op::OPEN,
            Box::new({
                let x = p("l", "file");
                move || ops::open(&x, OFlag::O_RDONLY).map(drop)
            }),
        ),
        (
            op::WRITE,
            Box::new(move || ops::pwrite(w, b"abc", 3).map(drop)),
        ),
        (op::READ, Box::new(move || ops::pread(r, 10, 0).map(drop))),
        (op::FSYNC, Box::new(move || ops::fsync(s))),
        (op::FLUSH, Box::new(move || ops::close(fl))),
        (op::LSEEK, Box::new(move || ops::seek_data(ls, 0).map(drop))),
        (op::FALLOCATE, Box::new(move || ops::fallocate(fa, 0, 100))),
        (
            op::OPENDIR,
            Box::new({
                let x = p("s", "");
                move || ops::open(&x, OFlag::O_DIRECTORY).map(drop)
            }),
        ),
        (
            op::SETXATTR,
            Box::new({
                let x = p("t", "file");
                move || ops::setxattr(&x, "user.x", b"v")
            }),
        ),
        (
            op::RENAME,
            Box::new({
                let (x, y) = (p("u", "file"), p("u", "moved"));
                move || ops::rename(&x, &y, RenameFlags::empty())
            }),
        ),
    ];
    let mut parked = Vec::new();
    for (opcode, run) in jobs {
        parked.push(park(&mut kit, &op::name(opcode), opcode, run)?);
    }
    let recovered = kit.recover()?;
    ensure!(
        recovered.report.held == parked.len() as u64,
        "{} requests are held, the report says {}",
        parked.len(),
        recovered.report.held
    );
    let lowest = parked[0].1.original();
    ensure!(
        recovered.report.lowest_owed == lowest,
        "lowest owed {:#x}, expected {lowest:#x}",
        recovered.report.lowest_owed
    );
    let mut again = Vec::new();
    for (_, old) in &parked {
        let new = kit.next_request()?;
        expect_resent(&kit, old, &new)?;
        again.push(new);
    }
    // Answers in another order than the questions.
    Rng(env.seed).shuffle(&mut again);
    for m in &again {
        kit.answer(m)?;
    }
    for (app, m) in &parked {
        let result = kit.serve(app)?;
        ensure!(result == Ok(()), "{m}, sent again, gave {result:?}");
    }
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// `n` GETATTRs of one file, taken away unanswered.
pub(super) fn park_stats(kit: &mut Kit<'_>, n: usize) -> Result<(Vec<Job>, Vec<Message>)> {
    let mut jobs = Vec::new();
    let mut messages = Vec::new();
    for _ in 0..n {
        jobs.push(kit.on("stat", "f0", |p| ops::stat(p).map(drop))?);
        messages.push(kit.until_op(op::GETATTR)?);
    }
    Ok((jobs, messages))
}

pub(super) fn all_ok(kit: &mut Kit<'_>, jobs: &[Job]) -> Result<()> {
    for job in jobs {
        let result = kit.serve(job)?;
        ensure!(result == Ok(()), "{} gave {result:?}", job.what);
    }
    Ok(())
}

fn order(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let (jobs, old) = park_stats(&mut kit, 300)?;
    // Some were answered before the crash, so that the rest is no plain sequence.
    let mut rng = Rng(env.seed);
    let mut owed = Vec::new();
    for m in &old {
        if rng.below(3) == 0 {
            kit.answer(m)?;
        } else {
            owed.push(m.clone());
        }
    }
    let recovered = kit.recover()?;
    ensure!(
        recovered.report.held == owed.len() as u64,
        "{} are owed, the report says {}",
        owed.len(),
        recovered.report.held
    );
    for m in &owed {
        let new = kit.next_request()?;
        expect_resent(&kit, m, &new).context("out of order")?;
        kit.answer(&new)?;
    }
    all_ok(&mut kit, &jobs)?;
    still_serves(&mut kit)
}

fn late_answer(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let (jobs, old) = park_stats(&mut kit, 1)?;
    let late = |kit: &Kit<'_>, when: &str| {
        let said = kit.dev.reply_ok(old[0].unique(), &[0; 104]);
        expect_errno(
            &format!("the dead server's answer {when}"),
            said,
            Errno::ENOENT,
        )?;
        let guessed = kit
            .dev
            .reply_ok(resent_id(old[0].unique(), kit.epoch), &[0; 104]);
        expect_errno(
            &format!("an answer {when} that guesses the next id"),
            guessed,
            Errno::ENOENT,
        )
    };
    kit.restarted()?;
    late(&kit, "after RESTARTED")?;
    kit.confirm_root()?;
    late(&kit, "during the replays")?;
    let (m, replay) = kit.next_replay()?;
    kit.confirm(&m, &replay)?;
    let mut recovered = loop {
        let m = kit.next()?;
        if let Some(report) = m.report(kit.cookie()) {
            break Recovered::of(vec![], report);
        }
        let replay = m.replay().context("a replay")?;
        kit.confirm(&m, &replay)?;
    };
    late(&kit, "before COMMIT")?;
    kit.commit_epoch(recovered.report.epoch)?;
    let new = kit.next_request()?;
    expect_resent(&kit, &old[0], &new)?;
    let said = kit.dev.reply_ok(old[0].unique(), &[0; 104]);
    expect_errno("the dead server's answer after COMMIT", said, Errno::ENOENT)?;
    let bare = kit.dev.reply_ok(old[0].unique() | UNIQUE_RESEND, &[0; 104]);
    expect_errno(
        "an answer with the RESEND bit but no epoch",
        bare,
        Errno::ENOENT,
    )?;
    ensure!(
        !jobs[0].done(),
        "the application was answered by a dead server"
    );
    kit.answer(&new)?;
    all_ok(&mut kit, &jobs)?;
    expect_errno(
        "a second answer",
        kit.dev.reply_ok(new.unique(), &[0; 104]),
        Errno::ENOENT,
    )?;
    recovered.replays.clear();
    still_serves(&mut kit)
}

fn two_crashes(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let (jobs, old) = park_stats(&mut kit, 4)?;
    let mut seen: Vec<Vec<Message>> = vec![old.clone()];
    for _ in 0..3 {
        kit.recover()?;
        let mut round = Vec::new();
        for m in &old {
            let new = kit.next_request()?;
            expect_resent(&kit, m, &new)?;
            round.push(new);
        }
        for earlier in seen.iter().flatten() {
            let said = kit.dev.reply_ok(earlier.unique(), &[0; 104]);
            expect_errno(
                &format!("an answer under the old id {:#x}", earlier.unique()),
                said,
                Errno::ENOENT,
            )?;
        }
        seen.push(round);
    }
    ensure!(
        jobs.iter().all(|j| !j.done()),
        "an application was answered by a dead server"
    );
    for m in &seen[3] {
        kit.answer(m)?;
    }
    all_ok(&mut kit, &jobs)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn epoch_byte(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let (jobs, old) = park_stats(&mut kit, 2)?;
    for _ in 0..254 {
        kit.restarted()?;
    }
    for _ in 0..4 {
        kit.recover()?;
        for m in &old {
            let new = kit.next_request()?;
            expect_resent(&kit, m, &new)?;
            ensure!(
                new.original() == original_id(m.unique()),
                "the original id is gone"
            );
        }
    }
    // The last round was read and not answered, so one more recovery must bring it again.
    kit.recover()?;
    all_ok(&mut kit, &jobs)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn lengths(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let data: Vec<u8> = (0..60_000u32).map(|i| i as u8).collect();
    let f0 = kit.tree.child(ROOT, "f0").context("f0")?;
    kit.tree.node_mut(f0).data = data.clone();
    let fd = open(&mut kit, "f0", OFlag::O_RDWR | OFlag::O_DIRECT)?;
    let reader = kit.app("read 60000", move || ops::pread(fd, 60_000, 0))?;
    let read = kit.until_op(op::READ)?;
    kit.recover()?;
    let again = kit.next_request()?;
    expect_resent(&kit, &read, &again)?;
    // A short answer, then the rest: the kernel must have kept how long the request was.
    expect_errno(
        "too long an answer",
        kit.dev.reply_ok(again.unique(), &vec![1; 90_000]),
        Errno::EINVAL,
    )?;
    expect_errno("the read", kit.serve(&reader)?, Errno::EIO)?;
    let reader = kit.app("read 60000", move || ops::pread(fd, 60_000, 0))?;
    let first = kit.until_op(op::READ)?;
    kit.recover()?;
    let again = kit.next_request()?;
    expect_resent(&kit, &first, &again)?;
    kit.answer(&again)?;
    ensure!(
        kit.serve(&reader)? == Ok(data),
        "the read that was sent again brought other bytes"
    );
    let bytes: Vec<u8> = (0..50_000u32).map(|i| (i * 7) as u8).collect();
    let sent = bytes.clone();
    let writer = kit.app("write 50000", move || ops::pwrite(fd, &sent, 0))?;
    let write = kit.until_op(op::WRITE)?;
    kit.recover()?;
    let again = kit.next_request()?;
    expect_resent(&kit, &write, &again)?;
    kit.answer(&again)?;
    ensure!(kit.serve(&writer)? == Ok(50_000), "the write");
    ensure!(
        kit.tree.node(f0).data[..50_000] == bytes[..],
        "the write that was sent again carried other bytes"
    );
    still_serves(&mut kit)
}

/// A read(2) whose buffer is not mapped fails; the request it took ends with EIO as ever, and recovery goes on.
fn failed_copy(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let app = kit.parked("stat", "f0", 1, |p| ops::stat(p).map(drop))?;
    // SAFETY: the address is not mapped; the kernel answers EFAULT and touches nothing.
    let n = unsafe { libc::read(kit.dev.raw(), 4096 as *mut libc::c_void, 1 << 20) };
    expect_errno("a read into nothing", Errno::result(n), Errno::EFAULT)?;
    let result = app.finish(kit.patience)?;
    expect_errno("the stat whose request was lost", result, Errno::EIO)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn notified(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    for _ in 0..3 {
        kit.recover()?;
    }
    let (jobs, old) = park_stats(&mut kit, 3)?;
    kit.dev
        .notify(notify::RESEND, &[0u8; 0], &[])
        .context("NOTIFY_RESEND")?;
    for old in &old {
        let new = kit.next_request()?;
        expect_resent(&kit, old, &new)?;
        kit.answer(&new)?;
    }
    all_ok(&mut kit, &jobs)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn stock(env: &Env<'_>) -> Result<()> {
    let config = if env.support.series {
        Config::default()
    } else {
        Config::unsigned()
    };
    let mut kit = Kit::mount(env, config)?;
    kit.tree.file(ROOT, "f0", b"");
    ensure!(kit.run_on("stat", "f0", ops::stat)?.is_ok(), "stat");
    let (jobs, old) = park_stats(&mut kit, 3)?;
    match kit.dev.notify(notify::RESEND, &[0u8; 0], &[]) {
        Err(Errno::EINVAL) => return skip("this kernel has no FUSE_NOTIFY_RESEND"),
        other => other.context("NOTIFY_RESEND")?,
    }
    let mut ids: Vec<u64> = Vec::new();
    for _ in &old {
        let new = kit.next_request()?;
        ensure!(
            new.unique() & UNIQUE_RESEND != 0,
            "{new} does not carry the RESEND bit"
        );
        ids.push(new.original());
        expect_errno(
            "an answer under the old id",
            kit.dev.reply_ok(new.original(), &[0; 104]),
            Errno::ENOENT,
        )?;
        kit.answer(&new)?;
    }
    ids.sort_unstable();
    let mut wanted: Vec<u64> = old.iter().map(Message::original).collect();
    wanted.sort_unstable();
    ensure!(ids == wanted, "sent again were {ids:x?}, not {wanted:x?}");
    all_ok(&mut kit, &jobs)?;
    still_serves(&mut kit)
}
