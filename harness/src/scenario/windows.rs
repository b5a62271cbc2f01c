// SPDX-License-Identifier: GPL-2.0
//! Windows between two steps of the kernel's own: while held requests are sorted, between COMMIT and the first
//! delivery.

use std::os::fd::RawFd;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{umount2, MntFlags};
use nix::poll::PollFlags;
use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};

use super::evictions::evict_all;
use super::help::{expect_errno, expect_resent, open, populated, still_serves};
use super::resend::park_stats;
use super::Scenario;
use crate::raw::app::{App, Proc};
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::ops::{self, Done};
use crate::raw::sleeper::{Copying, Sleeper};
use crate::raw::trap::Trap;
use crate::raw::tree::Answer;
use crate::raw::wait::wait_for;
use crate::raw::wire::{notify, op, InvalInodeOut, RetrieveOut, ROOT, UNIQUE_RESEND};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "windows/abort-while-sorting",
            "abort ends what is just being sorted as well",
            abort_while_sorting,
        ),
        Scenario::series(
            "windows/new-while-sorting",
            "what is sent while held requests are sorted comes after them",
            new_while_sorting,
        ),
        Scenario::series(
            "windows/notify-after-commit",
            "notifications are accepted from COMMIT on, before the first request is delivered",
            notify_after_commit,
        ),
        Scenario::series(
            "windows/retrieve-after-commit",
            "an answer to RETRIEVE carries the server's cookie, whatever bits that has",
            retrieve_after_commit,
        ),
        Scenario::series(
            "windows/unmount-in-release",
            "umount waits for a release under way, and for nothing else",
            unmount_in_release,
        ),
        Scenario::series(
            "windows/abort-in-release",
            "abort in the middle of a release ends the recovery and everybody who waits",
            abort_in_release,
        ),
        Scenario::series(
            "windows/force-in-release",
            "so does umount -f",
            |env| force(in_release(env)?, true),
        ),
        Scenario::series(
            "windows/lazy-in-release",
            "umount -l in the middle of a release, and the death of its last user, end the recovery",
            |env| lazy(env, "release"),
        ),
        Scenario::series(
            "windows/unmount-while-sorting",
            "umount waits for what is just being sorted, and ends it",
            unmount_while_sorting,
        ),
        Scenario::series(
            "windows/force-while-sorting",
            "umount -f ends what is just being sorted as well",
            |env| {
                let (kit, jobs, _, trap) = sorting(env)?;
                force((kit, jobs, trap), false)
            },
        ),
        Scenario::series(
            "windows/lazy-while-sorting",
            "umount -l while held requests are sorted, and the death of its last users, end the recovery",
            |env| lazy(env, "unhold_sort"),
        ),
        Scenario::series(
            "windows/teardown-late",
            "the worker does not wait for the page cache of a revoked inode, which a held READ has locked",
            teardown_late,
        ),
        Scenario::series(
            "windows/forget-while-held",
            "a FORGET of what the new server has confirmed waits until it serves",
            forget_while_held,
        ),
        Scenario::series(
            "windows/interrupt-while-held",
            "who is interrupted while held is interrupted when the request is sent again, not before",
            interrupt_while_held,
        ),
        Scenario::series(
            "windows/interrupt-of-killed",
            "the INTERRUPT of a request whose task was killed while held is gone with it",
            interrupt_of_killed,
        ),
        Scenario::series(
            "windows/closed-clone-wakes",
            "a server that waits on another descriptor gets what a closed clone gave back",
            closed_clone_wakes,
        ),
    ]
}

/// Four requests in dead hands, a new server that has just committed, and the kernel between two of them.
fn sorting<'a>(
    env: &'a Env<'a>,
) -> Result<(
    Kit<'a>,
    Vec<super::resend::Job>,
    Vec<crate::raw::msg::Message>,
    Trap,
)> {
    let mut kit = populated(env, 3)?;
    let (jobs, old) = park_stats(&mut kit, 4)?;
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    let trap = Trap::arm("unhold_sort")?;
    kit.commit_epoch(recovered.report.epoch)?;
    kit.tree.adopt(&recovered.replays);
    trap.wait(kit.patience)?;
    Ok((kit, jobs, old, trap))
}

fn abort_while_sorting(env: &Env<'_>) -> Result<()> {
    let (kit, jobs, _, trap) = sorting(env)?;
    kit.conn.abort().context("abort")?;
    trap.go();
    for job in &jobs {
        let result = job.finish(kit.patience)?;
        ensure!(
            matches!(result, Err(Errno::ECONNABORTED | Errno::ENOTCONN)),
            "{} gave {result:?}",
            job.what
        );
    }
    kit.conn.wait_waiting(0, kit.patience)
}

fn new_while_sorting(env: &Env<'_>) -> Result<()> {
    let (mut kit, jobs, old, trap) = sorting(env)?;
    let base = kit.conn.waiting()?;
    let young = kit.parked("stat", "f1", base + 1, |p| ops::stat(p).map(drop))?;
    trap.go();
    kit.wait_serving()?;
    for m in &old {
        let new = kit.next_request()?;
        expect_resent(&kit, m, &new).context("the young one is before its elders")?;
        kit.answer(&new)?;
    }
    super::resend::all_ok(&mut kit, &jobs)?;
    // Cached names are asked for again first.
    ensure!(kit.serve(&young)? == Ok(()), "the young stat");
    still_serves(&mut kit)
}

fn in_release<'a>(env: &'a Env<'a>) -> Result<(Kit<'a>, Vec<super::resend::Job>, Trap)> {
    let mut kit = populated(env, 3)?;
    let (jobs, trap) = into_release(&mut kit)?;
    Ok((kit, jobs, trap))
}

/// Two requests in dead hands, a new server that has committed, and the kernel before it revokes anything.
fn into_release(kit: &mut Kit<'_>) -> Result<(Vec<super::resend::Job>, Trap)> {
    let (jobs, _) = park_stats(kit, 2)?;
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    let trap = Trap::arm("release")?;
    kit.commit_epoch(recovered.report.epoch)?;
    kit.tree.adopt(&recovered.replays);
    trap.wait(kit.patience)?;
    Ok((jobs, trap))
}

fn notify_after_commit(env: &Env<'_>) -> Result<()> {
    let (mut kit, jobs, trap) = in_release(env)?;
    let node = kit.tree.child(ROOT, "f1").context("f1")?;
    let inval = InvalInodeOut {
        ino: node,
        off: 0,
        len: 0,
    };
    let said = kit.dev.notify(notify::INVAL_INODE, &inval, &[]);
    ensure!(
        !kit.readable()?,
        "a request can be read before the release is complete"
    );
    trap.go();
    ensure!(said == Ok(()), "INVAL_INODE after COMMIT gave {said:?}");
    super::resend::all_ok(&mut kit, &jobs)?;
    still_serves(&mut kit)
}

fn retrieve_after_commit(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    // So that there is data that RETRIEVE could give away.
    let read = kit.run_on("read", "f1", ops::read_file)?;
    ensure!(read.is_ok(), "read: {read:?}");
    kit.settle()?;
    let (jobs, trap) = into_release(&mut kit)?;
    let cookie = UNIQUE_RESEND | 0x00ab_cdef_0123_4567;
    let retrieve = RetrieveOut {
        notify_unique: cookie,
        nodeid: kit.tree.child(ROOT, "f1").context("f1")?,
        offset: 0,
        size: 10,
        padding: 0,
    };
    let said = kit.dev.notify(notify::RETRIEVE, &retrieve, &[]);
    trap.go();
    ensure!(said == Ok(()), "RETRIEVE after COMMIT gave {said:?}");
    kit.wait_serving()?;
    let answer = kit.until("the answer to RETRIEVE", |m| m.is(op::NOTIFY_REPLY))?;
    ensure!(
        answer.unique() == cookie,
        "the answer to RETRIEVE carries {:#x}, not {cookie:#x}",
        answer.unique()
    );
    super::resend::all_ok(&mut kit, &jobs)?;
    still_serves(&mut kit)
}

fn unmount_in_release(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    let trap = Trap::arm("release")?;
    kit.commit_epoch(recovered.report.epoch)?;
    trap.wait(kit.patience)?;
    let unmount = umount(&mut kit, MntFlags::empty())?;
    unmount.wait_asleep(kit.patience)?;
    std::thread::sleep(Duration::from_millis(50));
    let early = unmount.done();
    trap.go();
    let result = unmount.finish(kit.patience)?;
    ensure!(result == Ok(()), "umount gave {result:?}");
    ensure!(!early, "umount did not wait for the worker");
    kit.was_unmounted();
    Ok(())
}

fn abort_in_release(env: &Env<'_>) -> Result<()> {
    let (kit, jobs, trap) = in_release(env)?;
    kit.conn.abort().context("abort")?;
    for job in &jobs {
        let result = job.finish(kit.patience)?;
        ensure!(result.is_err(), "{} gave {result:?}", job.what);
    }
    trap.go();
    kit.conn.wait_state(&["dead"], kit.patience)
}

fn umount(kit: &mut Kit<'_>, flags: MntFlags) -> Result<App<Done<()>>> {
    let mnt = kit.mnt.clone();
    kit.app("umount", move || umount2(&mnt, flags))
}

/// The connection is at its end; reading it says so.
fn is_dead(kit: &Kit<'_>) -> Result<()> {
    wait_for("the end of the connection", kit.patience, || {
        let ready = kit.dev.poll(PollFlags::POLLIN, Duration::ZERO)?;
        Ok(ready.contains(PollFlags::POLLERR))
    })
}

/// `held`: what waits is on a list, and ends without the worker.
fn force(
    (mut kit, jobs, trap): (Kit<'_>, Vec<super::resend::Job>, Trap),
    held: bool,
) -> Result<()> {
    let forced = umount(&mut kit, MntFlags::MNT_FORCE)?;
    // It aborts before it looks who is inside, and does not wait for the worker to do that.
    is_dead(&kit)?;
    let trap = held.then_some(trap);
    for job in &jobs {
        let result = job.finish(kit.patience)?;
        ensure!(
            matches!(result, Err(Errno::ECONNABORTED | Errno::ENOTCONN)),
            "{} gave {result:?}",
            job.what
        );
    }
    drop(trap);
    match forced.finish(kit.patience)? {
        Ok(()) => {}
        // The applications were still inside.
        Err(Errno::EBUSY) => {
            let again = umount(&mut kit, MntFlags::empty())?.finish(kit.patience)?;
            ensure!(again == Ok(()), "umount after umount -f gave {again:?}");
        }
        Err(e) => anyhow::bail!("umount -f gave {e}"),
    }
    kit.was_unmounted();
    Ok(())
}

fn lazy(env: &Env<'_>, point: &'static str) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let mut apps = Vec::new();
    for name in ["f0", "f1"] {
        let path = kit.path(name);
        let app = Proc::spawn(&format!("stat {name}"), &[kit.dev.raw()], move || {
            i32::from(ops::stat(&path).is_err())
        })?;
        kit.until_op(op::GETATTR)?;
        app.wait_asleep(kit.patience)?;
        apps.push(app);
    }
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    let trap = Trap::arm(point)?;
    kit.commit_epoch(recovered.report.epoch)?;
    trap.wait(kit.patience)?;
    let detached = umount(&mut kit, MntFlags::MNT_DETACH)?.finish(kit.patience)?;
    ensure!(detached == Ok(()), "umount -l gave {detached:?}");
    kit.was_unmounted();
    apps[0].signal(Signal::SIGKILL)?;
    // What is sorted is on no list: then they die later.
    if point == "release" {
        apps[0].wait(super::kill::grace(&kit))?;
    }
    apps[1].signal(Signal::SIGKILL)?;
    // Who dies last waits for the worker.
    std::thread::sleep(Duration::from_millis(50));
    trap.go();
    for app in &mut apps {
        app.wait(kit.patience)?;
    }
    is_dead(&kit)
}

/// Two requests of nobody are sorted: nobody keeps the mount busy.
fn unmount_while_sorting(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    for name in ["f0", "f1"] {
        let sleeper = Sleeper::over(&mut kit, name, Copying::Request)?;
        let read = sleeper.wake(kit.patience)?;
        ensure!(read.is_ok(), "the old server's read gave {read:?}");
    }
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    ensure!(
        recovered.report.held == 2,
        "{} held, not 2",
        recovered.report.held
    );
    let trap = Trap::arm("unhold_sort")?;
    kit.commit_epoch(recovered.report.epoch)?;
    trap.wait(kit.patience)?;
    let unmount = umount(&mut kit, MntFlags::empty())?;
    unmount.wait_asleep(kit.patience)?;
    std::thread::sleep(Duration::from_millis(50));
    let early = unmount.done();
    trap.go();
    let result = unmount.finish(kit.patience)?;
    ensure!(result == Ok(()), "umount gave {result:?}");
    ensure!(!early, "umount did not wait for the worker");
    kit.was_unmounted();
    is_dead(&kit)
}

/// A READ in dead hands that nobody waits for: readahead, whose pages stay locked until it is answered.
pub(super) fn reading_ahead<'a>(
    env: &'a Env<'a>,
) -> Result<(Kit<'a>, RawFd, crate::raw::msg::Message)> {
    let config = Config {
        max_readahead: 64 << 10,
        ..Config::default()
    };
    let mut kit = Kit::granted_with(env, config)?;
    kit.tree.file(ROOT, "big", &vec![7; 1 << 20]);
    kit.tree.file(ROOT, "small", b"small");
    for name in ["big", "small"] {
        ensure!(kit.run_on("stat", name, ops::stat)?.is_ok(), "stat {name}");
    }
    let fd: RawFd = open(&mut kit, "big", OFlag::O_RDONLY)?;
    let hint = kit.app("readahead", move || {
        // SAFETY: plain numbers.
        Errno::result(unsafe { libc::posix_fadvise(fd, 0, 65536, libc::POSIX_FADV_WILLNEED) })
            .map(drop)
    })?;
    let read = kit.until_op(op::READ)?;
    ensure!(hint.finish(kit.patience)? == Ok(()), "posix_fadvise");
    Ok((kit, fd, read))
}

fn teardown_late(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd, _) = reading_ahead(env)?;
    let big = kit.tree.child(ROOT, "big").context("big")?;
    kit.recover_with(&mut |_, r| (r.nodeid == big).then_some(Answer::Err(libc::ESTALE)))
        .context("the worker waits for a page that a held READ has locked")?;
    let read = kit.run("read", move || ops::pread(fd, 10, 0))?;
    expect_errno("read of a revoked file", read, Errno::EIO)?;
    kit.settle()?;
    still_serves(&mut kit)
}

fn forget_while_held(env: &Env<'_>) -> Result<()> {
    // More than a window, so that there are replays left when the first are evicted.
    let mut kit = populated(env, 100)?;
    kit.restarted()?;
    let mut shown = vec![kit.confirm_root()?];
    for _ in 0..10 {
        let (m, replay) = kit.next_replay()?;
        kit.confirm(&m, &replay)?;
        shown.push(replay);
    }
    // A full window again: the worker has let go of those.
    kit.conn.wait_waiting(64, kit.patience)?;
    std::fs::write("/proc/sys/vm/drop_caches", "2").context("drop_caches")?;
    loop {
        let m = kit.next()?;
        if let Some(report) = m.report(kit.cookie()) {
            let nothing = kit.dev.poll(PollFlags::POLLIN, Duration::from_millis(50))?;
            ensure!(
                nothing.is_empty(),
                "after the report poll says {nothing:?}: a FORGET"
            );
            kit.commit_epoch(report.epoch)?;
            // What was evicted before its turn came was shown to nobody: no count, no FORGET.
            kit.tree.adopt(&shown);
            break;
        }
        let replay = m
            .replay()
            .with_context(|| format!("{m} was delivered during the recovery"))?;
        kit.confirm(&m, &replay)?;
        shown.push(replay);
    }
    ensure!(shown.len() > 11, "there were no replays left");
    kit.wait_serving()?;
    kit.forgotten.clear();
    kit.settle()?;
    ensure!(
        !kit.forgotten.is_empty(),
        "nothing was evicted: this scenario shows nothing"
    );
    // What the recovery had the last reference to is evicted by a worker, and FORGETs that RESTARTED finds go nowhere.
    evict_all(&mut kit)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn interrupt_while_held(env: &Env<'_>) -> Result<()> {
    extern "C" fn nothing(_: i32) {}
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGUSR1, &action) }?;
    let mut kit = populated(env, 2)?;
    let app = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    let old = kit.until_op(op::GETATTR)?;
    app.wait_asleep(kit.patience)?;
    kit.restarted()?;
    // SAFETY: tgkill takes plain numbers; the thread waits for an answer.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_tgkill, libc::getpid(), app.tid, libc::SIGUSR1)
    })?;
    wait_for("the signal to be seen", kit.patience, || {
        let status = std::fs::read_to_string(format!("/proc/self/task/{}/status", app.tid))?;
        // The last of its interruptible sleeps is over: it is in one that only death ends.
        Ok(status.contains("State:\tD"))
    })?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    kit.commit(&recovered)?;
    let first = kit.next()?;
    expect_resent(&kit, &old, &first).context("before it was sent it was interrupted")?;
    let second = kit.next()?;
    ensure!(second.is(op::INTERRUPT), "expected INTERRUPT, got {second}");
    ensure!(
        kit.interrupts.last() == Some(&first.unique()),
        "INTERRUPT of {:x?}, not of {first}",
        kit.interrupts
    );
    kit.answer(&first)?;
    ensure!(kit.serve(&app)? == Ok(()), "stat");
    still_serves(&mut kit)
}

fn interrupt_of_killed(env: &Env<'_>) -> Result<()> {
    extern "C" fn nothing(_: i32) {}
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGUSR1, &action) }?;
    let mut kit = populated(env, 2)?;
    let mut doomed = super::kill::mkdir_process(&kit, "doomed")?;
    kit.until_op(op::MKDIR)?;
    doomed.wait_asleep(kit.patience)?;
    doomed.signal(Signal::SIGUSR1)?;
    // The INTERRUPT is in the queue, and nobody reads it any more.
    super::help::readable(&kit, "the INTERRUPT")?;
    kit.restarted()?;
    doomed.signal(Signal::SIGKILL)?;
    doomed.wait(kit.patience)?;
    kit.interrupts.clear();
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    kit.commit(&recovered)?;
    still_serves(&mut kit)?;
    ensure!(
        kit.interrupts.is_empty(),
        "INTERRUPT of {:x?}, a request that was freed",
        kit.interrupts
    );
    Ok(())
}

fn closed_clone_wakes(env: &Env<'_>) -> Result<()> {
    use crate::raw::dev::Read1;
    let mut kit = populated(env, 2)?;
    let mut clone = kit.dev.clone_queue()?;
    let job = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    let Read1::Message(old) = clone.read(kit.patience)? else {
        anyhow::bail!("nothing to read on the clone")
    };
    let mut dev = kit.dev.duplicate()?;
    let reader = kit.app("a blocking read", move || match dev.read_blocking() {
        Ok(Read1::Message(m)) => Some(m),
        _ => None,
    })?;
    reader.wait_asleep(kit.patience)?;
    drop(clone);
    let again = reader
        .finish(kit.patience)
        .context("nobody told the other reader")?
        .context("the read failed")?;
    ensure!(
        again.original() == old.unique(),
        "{old} was given back, {again} was read"
    );
    kit.answer(&again)?;
    ensure!(kit.serve(&job)? == Ok(()), "stat");
    still_serves(&mut kit)
}
