// SPDX-License-Identifier: GPL-2.0
//! Abort and unmount in every phase: nobody hangs, nothing is left.

use std::fs;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::mount::{umount2, MntFlags};
use nix::sys::signal::Signal;

use super::help::{enter, populated, read_ahead, wake, wake_dead, Phase, PHASES};
use super::kill_server::say_inval_inode;
use super::lost::node;
use super::Scenario;
use crate::raw::app::{App, Proc};
use crate::raw::dev::Read1;
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::ops::{self, Done};
use crate::raw::trap::{self, Trap};
use crate::raw::wait::wait_for;
use crate::raw::wire::op;

pub fn scenarios() -> Vec<Scenario> {
    type Story = fn(&Env<'_>, Phase) -> Result<()>;
    let kinds: [(&str, &'static str, Story); 5] = [
        (
            "abort",
            "abort ends a recovery and everybody who waits",
            abort,
        ),
        ("plain", "umount of an idle mount ends a recovery", plain),
        (
            "force",
            "umount -f ends a recovery and everybody who waits",
            force,
        ),
        (
            "lazy",
            "umount -l with a held application, which is then killed",
            lazy,
        ),
        (
            "close",
            "closing the last descriptor ends a recovery and everybody who waits",
            close,
        ),
    ];
    let mut all = Vec::new();
    for (kind, guards, story) in kinds {
        for phase in PHASES {
            all.push(Scenario::series(
                format!("unmount/{kind}-{}", phase.name()),
                guards,
                move |env| story(env, phase),
            ));
        }
    }
    all.push(Scenario::series(
        "unmount/abort-replay-in-transit",
        "an inode whose replay was in somebody's hands at the abort does not stay in memory",
        abort_replay_in_transit,
    ));
    all.push(Scenario::series(
        "unmount/abort-in-send",
        "the connection is aborted when the root, a replay or the report is made and not queued",
        abort_in_send,
    ));
    all.push(Scenario::series(
        "unmount/close-root-in-hands",
        "closing the last descriptor is no answer to the replay of the root",
        close_root,
    ));
    all.push(Scenario::series(
        "unmount/committed-in-notification",
        "umount does not wait for a notification that waits for what is held, when nothing lets that go any more",
        committed_in_notification,
    ));
    all
}

/// Inodes in memory, of all file systems, and nothing among them that the kernel could do without.
fn inodes() -> Result<i64> {
    fs::write("/proc/sys/vm/drop_caches", "2").context("drop_caches")?;
    trap::touch();
    let numbers = fs::read_to_string("/proc/sys/fs/inode-nr").context("inode-nr")?;
    let first = numbers.split_whitespace().next().context("inode-nr")?;
    first.parse().context("inode-nr")
}

/// Which inodes are in memory only shows by their number, so this one must have gone down by one.
fn abort_replay_in_transit(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 10)?;
    kit.restarted()?;
    kit.confirm_root()?;
    let trap = Trap::arm("read_dequeued")?;
    let mut dev = kit.dev.duplicate()?;
    let reader = kit.app("a read(2) of a replay", move || {
        dev.read_blocking().map(drop).map_err(|e| e.to_string())
    })?;
    trap.wait(kit.patience)?;
    kit.conn.abort().context("abort")?;
    kit.conn.wait_state(&["dead"], kit.patience)?;
    let mut least = i64::MAX;
    // What was used lately is only marked the first time.
    for _ in 0..10 {
        least = least.min(inodes()?);
    }
    trap.go();
    reader.finish(kit.patience)?.map_err(anyhow::Error::msg)?;
    wait_for("the inode to leave memory", kit.patience, || {
        Ok(inodes()? < least)
    })
}

fn abort_in_send(env: &Env<'_>) -> Result<()> {
    const INODES: u64 = 11;
    for nth in [0, 1, INODES] {
        let mut kit = populated(env, INODES as usize - 1)?;
        let old = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
        kit.until_op(op::GETATTR)?;
        let mut trap = None;
        if nth == 0 {
            trap = Some(Trap::arm("send_internal")?);
        }
        kit.restarted()?;
        for shown in 1..=nth {
            let (m, replay) = kit.next_replay()?;
            if shown == nth {
                trap = Some(Trap::arm("send_internal")?);
            }
            kit.confirm(&m, &replay)?;
        }
        let trap = trap.context("just armed")?;
        trap.wait(kit.patience)?;
        // The kernel says nothing about a connection while its worker is stopped.
        let conn = kit.conn.clone();
        let abort = kit.app("abort", move || conn.abort().is_ok())?;
        all_fail(&kit, &[old])?;
        trap.go();
        ensure!(abort.finish(kit.patience)?, "abort");
        kit.conn.wait_state(&["dead"], kit.patience)?;
    }
    Ok(())
}

/// COMMIT is said, and nothing is done about it yet. Read ahead, so that a page is locked and the mount is not busy.
fn committed_in_notification(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let f0 = node(&kit, "f0")?;
    read_ahead(&mut kit, "f0")?;
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    let work = Trap::arm("work")?;
    let epoch = recovered.report.epoch;
    kit.commit_epoch(epoch).context("COMMIT")?;
    work.wait(kit.patience)?;
    let dev = kit.dev.duplicate()?;
    let said = kit.app("INVAL_INODE", move || say_inval_inode(&dev, f0))?;
    said.wait_asleep(kit.patience)?;
    let over = Trap::arm_beside("unmount_over")?;
    let app = umount(&mut kit, MntFlags::empty())?;
    over.wait(kit.patience)?;
    ensure!(!said.done(), "nobody waits for the page of the held READ");
    work.go();
    over.go();
    let result = app.finish(kit.patience)?;
    ensure!(result == Ok(()), "umount gave {result:?}");
    kit.was_unmounted();
    let told = said.finish(kit.patience)?;
    ensure!(
        matches!(told, Ok(()) | Err(Errno::ENOENT | Errno::ENOTCONN)),
        "INVAL_INODE gave {told:?}"
    );
    dead(&mut kit)
}

/// A recovery in `phase` with two applications in it: one whose request was in dead hands, one that came later.
fn busy<'a>(env: &'a Env<'a>, phase: Phase) -> Result<(Kit<'a>, Vec<App<Done<()>>>)> {
    let mut kit = populated(env, 10)?;
    let old = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    kit.until_op(op::GETATTR)?;
    enter(&mut kit, phase)?;
    let base = kit.conn.waiting()?;
    let new = kit.parked("mkdir", "d", base + 1, ops::mkdir)?;
    Ok((kit, vec![old, new]))
}

fn all_fail(kit: &Kit<'_>, apps: &[App<Done<()>>]) -> Result<()> {
    for app in apps {
        let result = app.finish(kit.patience)?;
        let fine = matches!(result, Err(Errno::ECONNABORTED | Errno::ENOTCONN));
        ensure!(
            fine,
            "{} gave {result:?}, not ECONNABORTED or ENOTCONN",
            app.what
        );
    }
    Ok(())
}

fn dead(kit: &mut Kit<'_>) -> Result<()> {
    match kit.dev.read(kit.patience)? {
        Read1::Failed(Errno::ENODEV | Errno::ECONNABORTED) => {}
        Read1::Failed(e) => anyhow::bail!("reading a dead connection gives {e}"),
        Read1::Nothing => anyhow::bail!("reading a dead connection blocks"),
        Read1::Message(m) => anyhow::bail!("a dead connection still brings {m}"),
    }
    let said = kit.restarted_as(kit.config.identity);
    ensure!(
        matches!(said, Err(Errno::EINVAL | Errno::ENODEV)),
        "RESTARTED on a dead connection gives {said:?}"
    );
    Ok(())
}

fn abort(env: &Env<'_>, phase: Phase) -> Result<()> {
    let (mut kit, apps) = busy(env, phase)?;
    kit.conn.abort().context("abort")?;
    all_fail(&kit, &apps)?;
    dead(&mut kit)?;
    wake_dead(&mut kit)?;
    kit.conn.wait_waiting(0, kit.patience)?;
    // The engine sees it in a work item.
    kit.conn.wait_state(&["dead"], kit.patience)?;
    Ok(())
}

/// umount in a thread of its own: it may hang, and then says where.
fn umount(kit: &mut Kit<'_>, flags: MntFlags) -> Result<App<Done<()>>> {
    let mnt = kit.mnt.clone();
    kit.app("umount", move || umount2(&mnt, flags))
}

fn plain(env: &Env<'_>, phase: Phase) -> Result<()> {
    let mut kit = populated(env, 10)?;
    enter(&mut kit, phase)?;
    let app = umount(&mut kit, MntFlags::empty())?;
    // As ever in FUSE, umount itself waits for who has a request in its hands.
    wake_dead(&mut kit)?;
    let result = app.finish(kit.patience)?;
    ensure!(result == Ok(()), "umount gave {result:?}");
    kit.was_unmounted();
    dead(&mut kit)
}

fn force(env: &Env<'_>, phase: Phase) -> Result<()> {
    let (mut kit, apps) = busy(env, phase)?;
    let app = umount(&mut kit, MntFlags::MNT_FORCE)?;
    all_fail(&kit, &apps)?;
    wake_dead(&mut kit)?;
    let forced = app.finish(kit.patience)?;
    match forced {
        Ok(()) => kit.was_unmounted(),
        // The applications may still have been inside when the mount was looked at.
        Err(Errno::EBUSY) => {
            let again = umount(&mut kit, MntFlags::empty())?;
            ensure!(
                again.finish(kit.patience)? == Ok(()),
                "umount after umount -f"
            );
            kit.was_unmounted();
        }
        Err(e) => anyhow::bail!("umount -f gave {e}"),
    }
    dead(&mut kit)
}

fn lazy(env: &Env<'_>, phase: Phase) -> Result<()> {
    let mut kit = populated(env, 10)?;
    enter(&mut kit, phase)?;
    let base = kit.conn.waiting()?;
    let path = kit.path("d");
    let mut app = Proc::spawn("mkdir d", &[kit.dev.raw()], || {
        i32::from(ops::mkdir(&path).is_err())
    })?;
    kit.conn.wait_waiting(base + 1, kit.patience)?;
    app.wait_asleep(kit.patience)?;
    let detach = umount(&mut kit, MntFlags::MNT_DETACH)?;
    ensure!(detach.finish(kit.patience)? == Ok(()), "umount -l");
    kit.was_unmounted();
    app.signal(Signal::SIGKILL)?;
    wake_dead(&mut kit)?;
    app.wait(kit.patience)
        .context("the held application, after umount -l")?;
    // With its last user the super block goes, and the connection with it.
    let patience = kit.patience;
    wait_for("the end of the connection", patience, || {
        Ok(kit
            .dev
            .poll(nix::poll::PollFlags::POLLIN, std::time::Duration::ZERO)?
            .contains(nix::poll::PollFlags::POLLERR)
            && kit
                .conn
                .recovery()
                .map_or(true, |r| r.is_none_or(|r| r.state() == "dead")))
    })?;
    dead(&mut kit)
}

fn close(env: &Env<'_>, phase: Phase) -> Result<()> {
    let (mut kit, apps) = busy(env, phase)?;
    let spare = crate::raw::dev::Device::open("/dev/fuse")?;
    drop(std::mem::replace(&mut kit.dev, spare));
    if phase.copying().is_some() {
        // Who is in a system call keeps the descriptor.
        ensure!(
            apps.iter().all(|app| !app.done()),
            "the connection ended while somebody was in read(2)"
        );
        wake(&mut kit)?;
    }
    all_fail(&kit, &apps)
}

/// A root whose replay nobody answers any more was not refused.
fn close_root(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    enter(&mut kit, Phase::Root)?;
    let trap = Trap::arm("close")?;
    let spare = crate::raw::dev::Device::open("/dev/fuse")?;
    let dev = std::mem::replace(&mut kit.dev, spare);
    let closing = kit.app("close", move || drop(dev))?;
    trap.wait(kit.patience)?;
    kit.conn.wait_state(&["dead", "refused"], kit.patience)?;
    let state = kit.conn.recovery()?.context("recovery file")?;
    trap.go();
    closing.finish(kit.patience)?;
    ensure!(
        state.state() == "dead",
        "with its last descriptor closed the state is {:?}",
        state.state()
    );
    Ok(())
}
