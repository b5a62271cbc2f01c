// SPDX-License-Identifier: GPL-2.0
//! What several families share: phases of a recovery, populated mounts, checks.

use std::fmt::Debug;
use std::os::fd::RawFd;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::{posix_fadvise, OFlag, PosixFadviseAdvice};
use nix::poll::PollFlags;

use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::msg::Message;
use crate::raw::ops;
use crate::raw::recover::Recovered;
use crate::raw::sleeper::{Copying, Sleeper};
use crate::raw::tree::Answer;
use crate::raw::wait::wait_for;
use crate::raw::wire::{op, resent_id, ROOT};

/// How far a recovery has come when something happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// RESTARTED was said; nobody has read anything.
    Said,
    /// The root's replay was read and not answered.
    Root,
    /// The root is confirmed; another replay was read and not answered.
    Replay,
    /// Every replay is answered; the report waits to be read.
    Prepared,
    /// The report was read; COMMIT was not written.
    Reported,
    /// The root's replay was answered with an error.
    Refused,
    /// Every replay is answered; a reader of the dead server sleeps with a request in its hands, so there is no report.
    Settle,
    /// The same, but the server sleeps in the middle of its answer.
    SettleAnswer,
}

pub const PHASES: [Phase; 8] = [
    Phase::Said,
    Phase::Root,
    Phase::Replay,
    Phase::Prepared,
    Phase::Reported,
    Phase::Refused,
    Phase::Settle,
    Phase::SettleAnswer,
];

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Said => "said",
            Phase::Root => "root",
            Phase::Replay => "replay",
            Phase::Prepared => "prepared",
            Phase::Reported => "reported",
            Phase::Refused => "refused",
            Phase::Settle => "settle",
            Phase::SettleAnswer => "settle-answer",
        }
    }

    /// In the middle of what a server sleeps in this phase.
    pub fn copying(self) -> Option<Copying> {
        match self {
            Phase::Settle => Some(Copying::Request),
            Phase::SettleAnswer => Some(Copying::Answer),
            _ => None,
        }
    }
}

/// Says RESTARTED and goes to `phase`. What was read and not answered there is returned.
///
/// Who sleeps in a copy sleeps on, see [`leave`]. It has a READ of `f0`, which is owed if it was not being answered.
pub fn enter(kit: &mut Kit<'_>, phase: Phase) -> Result<Option<Message>> {
    if let Some(copying) = phase.copying().filter(|_| kit.sleeper.is_none()) {
        kit.sleeper = Some(Sleeper::over(kit, "f0", copying)?);
    }
    let others = (kit.tree.held().len() as u64 - 1).min(64);
    kit.restarted()?;
    Ok(match phase {
        Phase::Said => {
            // The worker has begun, so that nothing is added behind the scenario's back.
            readable(kit, "the root's replay")?;
            None
        }
        Phase::Root => Some(kit.next_replay()?.0),
        Phase::Refused => {
            let (m, replay) = kit.next_replay()?;
            ensure!(
                replay.nodeid == ROOT,
                "the first replay is of node {}",
                replay.nodeid
            );
            kit.send(&m, &Answer::Err(libc::EIO))?;
            kit.conn.wait_state(&["refused"], kit.patience)?;
            None
        }
        Phase::Replay => {
            let (root, replay) = kit.next_replay()?;
            let waiting = kit.conn.waiting()? - 1;
            kit.confirm(&root, &replay)?;
            let m = kit.next_replay()?.0;
            kit.conn.wait_waiting(waiting + others, kit.patience)?;
            Some(m)
        }
        Phase::Prepared => {
            kit.confirm_root()?;
            answer_until_prepared(kit)?;
            None
        }
        Phase::Reported => Some(read_report(kit)?),
        Phase::Settle | Phase::SettleAnswer => {
            kit.confirm_root()?;
            answer_all_but_root(kit)?;
            kit.conn.wait_state(&["settle"], kit.patience)?;
            ensure!(
                !kit.readable()?,
                "the report can be read while a request is in somebody's hands"
            );
            None
        }
    })
}

/// Goes on where [`enter`] stopped: what was left is confirmed, and who sleeps in a copy wakes up.
pub fn leave(kit: &mut Kit<'_>, left: Option<&Message>) -> Result<()> {
    if let Some((m, replay)) = left.and_then(|m| m.replay().map(|r| (m, r))) {
        kit.confirm(m, &replay)?;
    }
    let state = kit.conn.recovery()?.context("recovery file")?;
    let settles = kit.sleeper.is_some() && state.state() == "settle";
    wake(kit)?;
    if settles {
        kit.conn.wait_state(&["prepared"], kit.patience)?;
    }
    Ok(())
}

/// Wakes who sleeps in a copy for a server that was replaced: a request is not for it, an answer is complete.
pub fn wake(kit: &mut Kit<'_>) -> Result<()> {
    let Some(sleeper) = kit.sleeper.take() else {
        return Ok(());
    };
    let copying = sleeper.copying;
    ensure!(sleeper.sleeps(), "who slept in a copy woke up by itself");
    let result = sleeper.wake(kit.patience)?;
    let fine = match copying {
        Copying::Request => result == Err(Errno::ENOENT),
        Copying::Answer => result.is_ok(),
    };
    ensure!(
        fine,
        "a dead server, in the middle of a copy ({copying:?}), got {result:?}"
    );
    Ok(())
}

/// Wakes who sleeps in a copy when the connection has come to its end, which does not wait for that.
pub fn wake_dead(kit: &mut Kit<'_>) -> Result<()> {
    if kit.sleeper.is_none() {
        return Ok(());
    }
    wait_for("the end of the connection", kit.patience, || {
        Ok(kit
            .dev
            .poll(PollFlags::POLLIN, Duration::ZERO)?
            .contains(PollFlags::POLLERR))
    })?;
    let sleeper = kit.sleeper.take().context("just seen")?;
    ensure!(sleeper.sleeps(), "who slept in a copy woke up by itself");
    let result = sleeper.wake(kit.patience)?;
    ensure!(
        matches!(
            result,
            Err(Errno::ENOENT | Errno::ENODEV | Errno::ECONNABORTED)
        ),
        "a server of a dead connection, in the middle of a copy, got {result:?}"
    );
    Ok(())
}

/// Answers replays honestly as long as the kernel has any; the report is left unread.
fn answer_until_prepared(kit: &mut Kit<'_>) -> Result<()> {
    answer_all_but_root(kit)?;
    kit.conn.wait_state(&["prepared"], kit.patience)?;
    readable(kit, "the report")
}

pub fn answer_all_but_root(kit: &mut Kit<'_>) -> Result<()> {
    for _ in 1..kit.tree.held().len() {
        let (m, replay) = kit.next_replay()?;
        kit.confirm(&m, &replay)?;
    }
    Ok(())
}

/// Waits until a message can be read, and leaves it there.
pub fn readable(kit: &Kit<'_>, what: &str) -> Result<()> {
    let ready = kit.dev.poll(PollFlags::POLLIN, kit.patience)?;
    ensure!(
        ready.contains(PollFlags::POLLIN),
        "{what} cannot be read{}",
        kit.situation()
    );
    Ok(())
}

/// Answers replays honestly until there is the report.
pub fn read_report(kit: &mut Kit<'_>) -> Result<Message> {
    loop {
        let m = kit.next()?;
        if m.report(kit.cookie()).is_some() {
            return Ok(m);
        }
        let Some(replay) = m.replay() else {
            bail!("{m} was delivered during the recovery")
        };
        kit.confirm(&m, &replay)?;
    }
}

/// A granted mount with `n` files `f0`.. that the kernel has looked up and keeps.
pub fn populated<'a>(env: &'a Env<'a>, n: usize) -> Result<Kit<'a>> {
    let mut kit = Kit::granted(env)?;
    populate(&mut kit, n)?;
    Ok(kit)
}

pub fn populate(kit: &mut Kit<'_>, n: usize) -> Result<()> {
    for i in 0..n {
        kit.tree
            .file(ROOT, &format!("f{i}"), format!("content of {i}").as_bytes());
    }
    let names: Vec<_> = (0..n).map(|i| kit.path(&format!("f{i}"))).collect();
    let looked = kit.run("look everything up", move || {
        names.iter().try_for_each(|p| ops::stat(p).map(drop))
    })?;
    looked.context("a lookup failed before anything was wrong")?;
    kit.settle()
}

/// Opens a file of the mount; the descriptor is never closed by itself.
pub fn open(kit: &mut Kit<'_>, name: &str, flags: OFlag) -> Result<RawFd> {
    kit.run_on("open", name, move |p| ops::open(p, flags))?
        .with_context(|| format!("cannot open {name}"))
}

/// Lets `name` be read ahead, and closes it: its first page is locked until the READ is answered, and nobody waits.
pub fn read_ahead(kit: &mut Kit<'_>, name: &str) -> Result<Message> {
    let fd = open(kit, name, OFlag::O_RDONLY)?;
    let ahead = kit.app("read ahead", move || {
        // SAFETY: the descriptor stays open until the close below.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        posix_fadvise(fd, 0, 0, PosixFadviseAdvice::POSIX_FADV_WILLNEED)
    })?;
    let read = kit.until_op(op::READ)?;
    ensure!(kit.serve(&ahead)? == Ok(()), "posix_fadvise");
    ensure!(kit.run("close", move || ops::close(fd))? == Ok(()), "close");
    Ok(read)
}

/// The connection does its work: a lookup, a change and a read, from end to end.
pub fn still_serves(kit: &mut Kit<'_>) -> Result<()> {
    let name = format!("still-serves-{}", kit.tree.next);
    kit.tree.file(ROOT, &name, b"alive");
    let read = kit.run_on("read", &name, ops::read_file)?;
    ensure!(
        read == Ok(b"alive".to_vec()),
        "reading {name} gave {read:?}"
    );
    let made = kit.run_on("mkdir", &format!("{name}.d"), ops::mkdir)?;
    ensure!(made == Ok(()), "mkdir {name}.d gave {made:?}");
    Ok(())
}

pub fn expect_errno<T: Debug>(what: &str, result: Result<T, Errno>, wanted: Errno) -> Result<()> {
    match result {
        Err(e) if e == wanted => Ok(()),
        other => bail!("{what} gave {other:?}, not {wanted}"),
    }
}

/// The message must be `old`, sent again in the current epoch.
pub fn expect_resent(kit: &Kit<'_>, old: &Message, new: &Message) -> Result<()> {
    let wanted = resent_id(old.unique(), kit.epoch);
    ensure!(
        new.unique() == wanted,
        "{old} came again as {new}; its id should be {wanted:#x}"
    );
    ensure!(
        (new.opcode(), new.nodeid(), &new.body) == (old.opcode(), old.nodeid(), &old.body),
        "{old} came again with other contents, as {new}"
    );
    Ok(())
}

/// The kernel's numbers agree with what the server saw.
pub fn expect_report(recovered: &Recovered, revoked: u64) -> Result<()> {
    let report = &recovered.report;
    ensure!(
        report.replayed == recovered.replays.len() as u64,
        "{} replays were answered, the report says {}",
        recovered.replays.len(),
        report.replayed
    );
    ensure!(
        report.confirmed + report.revoked == report.replayed,
        "{} confirmed and {} revoked are not {} replayed",
        report.confirmed,
        report.revoked,
        report.replayed
    );
    ensure!(
        report.revoked == revoked,
        "{} inodes are revoked, expected {revoked}",
        report.revoked
    );
    Ok(())
}
