// SPDX-License-Identifier: GPL-2.0
//! The waits for an answer themselves: each can be ended by death, and each can be frozen.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};

use super::help::{populate, populated, still_serves};
use super::kill::{dies, grace, mkdir_process};
use super::kill_io::{direct_io, Direct};
use super::Scenario;
use crate::raw::app::{state, Proc};
use crate::raw::dev::poll_one;
use crate::raw::env::{skip, Env};
use crate::raw::kit::{Config, Kit};
use crate::raw::msg::Message;
use crate::raw::ops;
use crate::raw::trap::Trap;
use crate::raw::wait::wait_for;
use crate::raw::wire::{init, op, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "kill/while-sorting",
            "a task killed while held requests are sorted tears nothing out of the list, and goes when it is one again",
            while_sorting,
        ),
        Scenario::series(
            "kill/flush-unread",
            "a task that died before RESTARTED, whose FLUSH nobody had read, goes with it",
            flush_unread,
        ),
        Scenario::series(
            "kill/exit",
            "a task that exits by itself does not wait either, and the next server gets its FLUSH",
            exit_while_held,
        ),
        Scenario::series(
            "kill/flush-after-signal",
            "a close() that an ordinary signal has disturbed can still be killed",
            flush_after_signal,
        ),
        Scenario::series(
            "kill/no-interrupt",
            "a close() can be killed where the server knows no INTERRUPT",
            no_interrupt,
        ),
        Scenario::series(
            "kill/closed-clone",
            "a killed task whose request a closed clone gave back goes with RESTARTED",
            closed_clone,
        ),
        Scenario::series(
            "kill/dirty-pages",
            "the limit: a killed task with a file of dirty pages ends when they are written, not before, and loses none",
            dirty_pages,
        ),
        Scenario::series(
            "system/freezer",
            "tasks whose requests are held can be frozen, and go on when thawed",
            freezer,
        ),
        Scenario::series(
            "system/suspend",
            "suspend gets past tasks whose requests are held",
            suspend,
        ),
    ]
}

/// A process that opens `name`, tells so, and then does what `run` does with the descriptor.
fn with_open_file(
    kit: &mut Kit<'_>,
    name: &str,
    run: impl FnOnce(i32) -> i32,
) -> Result<(Proc, OwnedFd)> {
    let path = kit.path(name);
    let (told, tell) = nix::unistd::pipe()?;
    let app = Proc::spawn("an application with an open file", &[kit.dev.raw()], || {
        let Ok(fd) = ops::open(&path, OFlag::O_RDWR) else {
            return 1;
        };
        let _ = nix::unistd::write(&tell, b"!");
        run(fd)
    })?;
    kit.serve_until("the file to be open", |_| {
        let ready = poll_one(told.as_fd(), nix::poll::PollFlags::POLLIN, Duration::ZERO)?;
        Ok(ready.contains(nix::poll::PollFlags::POLLIN))
    })?;
    kit.settle()?;
    Ok((app, told))
}

fn pause(_: i32) -> i32 {
    loop {
        nix::unistd::pause();
    }
}

fn gone(kit: &Kit<'_>, app: &mut Proc, when: &str) -> Result<()> {
    app.wait(grace(kit))
        .with_context(|| format!("a dead task, {when}"))
        .map(drop)
}

fn flush_unread(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let (mut app, _told) = with_open_file(&mut kit, "f0", pause)?;
    // The server is dead, and nobody has said so: the FLUSH stays in the queue.
    app.signal(Signal::SIGKILL)?;
    kit.conn.wait_waiting(1, kit.patience)?;
    app.wait_asleep(kit.patience)?;
    ensure!(!app.ended()?, "it did not wait for its FLUSH");
    kit.restarted()?;
    gone(&kit, &mut app, "whose FLUSH nobody had read at RESTARTED")?;
    kit.recover()?;
    flushed_then_released(&mut kit)?;
    still_serves(&mut kit)
}

fn exit_while_held(env: &Env<'_>) -> Result<()> {
    for read in [false, true] {
        let mut kit = populated(env, 3)?;
        let (wait, go) = nix::unistd::pipe()?;
        let (mut app, _told) = with_open_file(&mut kit, "f0", |_| {
            let _ = nix::unistd::read(wait.as_fd(), &mut [0]);
            0
        })?;
        let exits = || nix::unistd::write(&go, b"!").map(drop);
        if read {
            // The dead server had read its FLUSH.
            exits()?;
            kit.until_op(op::FLUSH)?;
            kit.restarted()?;
        } else {
            kit.restarted()?;
            exits()?;
        }
        gone(&kit, &mut app, "which had exited by itself")?;
        kit.recover()?;
        flushed_then_released(&mut kit)?;
        kit.check_counts()?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

/// What a task left behind is sent, once, and its file is not released before that is answered.
pub(super) fn flushed_then_released(kit: &mut Kit<'_>) -> Result<()> {
    let first = kit.until_op(op::FLUSH)?;
    let is_release = |m: &Message| m.header.opcode == op::RELEASE && m.nodeid() == first.nodeid();
    while kit.readable()? {
        let other = kit.next_request()?;
        ensure!(
            !is_release(&other),
            "{other} can be read before {first} is answered"
        );
        kit.answer(&other)?;
    }
    kit.answer(&first)?;
    let last = kit.until("RELEASE of the same file", is_release)?;
    kit.answer(&last)
}

fn flush_after_signal(env: &Env<'_>) -> Result<()> {
    extern "C" fn nothing(_: i32) {}
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    for read in [false, true] {
        let mut kit = populated(env, 3)?;
        // SAFETY: the handler does nothing; the process that inherits it is the one that is signalled.
        unsafe { sigaction(Signal::SIGUSR1, &action) }?;
        let (mut app, _told) = with_open_file(&mut kit, "f0", |fd| {
            nix::unistd::pause();
            i32::from(ops::close(fd).is_err())
        })?;
        // The first ends the pause, the second disturbs the close.
        app.signal(Signal::SIGUSR1)?;
        kit.conn.wait_waiting(1, kit.patience)?;
        if read {
            kit.until_op(op::FLUSH)?;
        }
        app.wait_asleep(kit.patience)?;
        app.signal(Signal::SIGUSR1)?;
        let tid = app.tid();
        wait_for("close to have seen the signal", kit.patience, || {
            let status = std::fs::read_to_string(format!("/proc/{tid}/status"))?;
            Ok(state(tid) == Some('D') || !status.contains("SigPnd:\t0000000000000000"))
        })?;
        kit.restarted()?;
        dies(
            &kit,
            &mut app,
            &format!("in close(), after an ordinary signal (its FLUSH read: {read})"),
        )?;
        kit.recover()?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

/// The last close of a file with dirty pages writes them, as only an open file can; a task that ends closes its files,
/// and then no signal reaches it any more.
fn dirty_pages(env: &Env<'_>) -> Result<()> {
    const DATA: [u8; 8192] = [0x6b; 8192];
    let mut kit = Kit::granted_with(env, Config::with(init::WRITEBACK_CACHE))?;
    populate(&mut kit, 3)?;
    let (app, _told) = with_open_file(&mut kit, "f0", |fd| match ops::pwrite(fd, &DATA, 0) {
        Ok(_) => pause(fd),
        Err(_) => 1,
    })?;
    let syscall = format!("/proc/{}/syscall", app.tid());
    kit.serve_until("the application to have written", |_| {
        let text = std::fs::read_to_string(&syscall).unwrap_or_default();
        Ok(text.split(' ').next() == Some(&libc::SYS_pause.to_string()))
    })?;
    kit.settle()?;
    kit.restarted()?;
    app.signal(Signal::SIGKILL)?;
    app.wait_asleep(kit.patience)?;
    ensure!(
        !app.ended()?,
        "it ended before its pages were written: the limit has gone, and so has to go from the documents"
    );
    kit.recover()?;
    kit.serve_until("the end of the killed task", |_| app.ended())?;
    let node = kit.tree.child(ROOT, "f0").context("f0")?;
    ensure!(
        kit.tree.nodes[&node].data[..DATA.len()] == DATA,
        "data lost"
    );
    still_serves(&mut kit)
}

fn no_interrupt(env: &Env<'_>) -> Result<()> {
    extern "C" fn nothing(_: i32) {}
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGUSR1, &action) }?;
    let mut kit = populated(env, 3)?;
    let (mut app, _told) = with_open_file(&mut kit, "f0", |fd| {
        nix::unistd::pause();
        i32::from(ops::close(fd).is_err())
    })?;
    // Another application teaches the kernel that this server knows no INTERRUPT.
    let other = kit.on("stat", "f1", |p| ops::stat(p).map(drop))?;
    let m = kit.until_op(op::GETATTR)?;
    // SAFETY: tgkill takes plain numbers; the thread is alive, it waits for our answer.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_tgkill, libc::getpid(), other.tid, libc::SIGUSR1)
    })?;
    let interrupt = kit.until_op(op::INTERRUPT)?;
    kit.dev.reply_error(interrupt.unique(), libc::ENOSYS)?;
    kit.answer(&m)?;
    ensure!(kit.serve(&other)? == Ok(()), "stat");
    app.signal(Signal::SIGUSR1)?;
    kit.conn.wait_waiting(1, kit.patience)?;
    app.wait_asleep(kit.patience)?;
    kit.restarted()?;
    dies(&kit, &mut app, "in close(), without INTERRUPT")?;
    kit.recover()?;
    still_serves(&mut kit)
}

fn closed_clone(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let mut clone = kit.dev.clone_queue()?;
    let mut app = mkdir_process(&kit, "d")?;
    let crate::raw::dev::Read1::Message(m) = clone.read(kit.patience)? else {
        anyhow::bail!("nothing to read on the clone")
    };
    ensure!(m.is(op::LOOKUP), "{m}");
    let answer = kit.tree.apply(&m)?;
    if let crate::raw::tree::Answer::Err(e) = answer {
        clone.reply_error(m.unique(), e)?;
    }
    let crate::raw::dev::Read1::Message(m) = clone.read(kit.patience)? else {
        anyhow::bail!("nothing to read on the clone")
    };
    ensure!(m.is(op::MKDIR), "{m}");
    app.wait_asleep(kit.patience)?;
    app.signal(Signal::SIGKILL)?;
    let tid = app.tid();
    wait_for("the killed task to wait for good", kit.patience, || {
        Ok(state(tid) == Some('D'))
    })?;
    // The crash closes the clone; then, and only then, somebody says so.
    drop(clone);
    if !app.ended_within(Duration::from_millis(50))? {
        kit.restarted()?;
        gone(&kit, &mut app, "whose request a closed clone gave back")?;
    }
    kit.recover()?;
    still_serves(&mut kit)
}

/// A cgroup (version 1) of the freezer.
pub(super) struct Freezer {
    mnt: PathBuf,
    group: PathBuf,
}

impl Freezer {
    pub(super) fn new(env: &Env<'_>) -> Result<Freezer> {
        let mnt = nix::unistd::mkdtemp(&env.scratch.join("freezer.XXXXXX"))?;
        if let Err(e) = mount(
            Some("freezer"),
            &mnt,
            Some("cgroup"),
            MsFlags::empty(),
            Some("freezer"),
        ) {
            let _ = std::fs::remove_dir(&mnt);
            return skip(format!("no cgroup freezer: {e}"));
        }
        let group = mnt.join("scenario");
        std::fs::create_dir(&group)?;
        Ok(Freezer { mnt, group })
    }

    pub(super) fn add(&self, who: &Proc) -> Result<()> {
        let pid = who.pid.to_string();
        Ok(std::fs::write(self.group.join("cgroup.procs"), pid)?)
    }

    pub(super) fn set(&self, state: &str) -> Result<()> {
        Ok(std::fs::write(self.group.join("freezer.state"), state)?)
    }

    pub(super) fn wait(&self, state: &str, limit: Duration) -> Result<()> {
        wait_for(&format!("the group to be {state}"), limit, || {
            Ok(std::fs::read_to_string(self.group.join("freezer.state"))?.trim() == state)
        })
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let _ = self.set("THAWED");
        let _ = std::fs::remove_dir(&self.group);
        let _ = umount2(&self.mnt, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir(&self.mnt);
    }
}

/// Where O_DIRECT may have several requests under way.
fn many_at_once<'a>(env: &'a Env<'a>) -> Result<Kit<'a>> {
    let mut kit = Kit::granted_with(env, Config::with(init::ASYNC_DIO))?;
    populate(&mut kit, 3)?;
    Ok(kit)
}

/// Every kind of wait for an answer: not read yet, read, past a signal, in close(), held.
fn waiters(kit: &mut Kit<'_>) -> Result<Vec<Proc>> {
    let mut all = vec![mkdir_process(kit, "d")?];
    kit.until_op(op::MKDIR)?;
    let path = kit.path("f0");
    let (told, tell) = nix::unistd::pipe()?;
    all.push(Proc::spawn("close", &[kit.dev.raw()], || {
        let Ok(fd) = ops::open(&path, OFlag::O_RDWR) else {
            return 1;
        };
        let _ = nix::unistd::write(&tell, b"!");
        i32::from(ops::close(fd).is_err())
    })?);
    kit.until_op(op::FLUSH)?;
    drop(told);
    // Who reads past the page cache waits elsewhere.
    let path = kit.path("f0");
    all.push(Proc::spawn("O_DIRECT", &[kit.dev.raw()], move || {
        direct_io(&path, Direct::Read)
    })?);
    let open = kit.until_op(op::OPEN)?;
    kit.answer(&open)?;
    kit.until_op(op::READ)?;
    for name in ["f1", "f2"] {
        let path = kit.path(name);
        all.push(Proc::spawn("stat", &[kit.dev.raw()], move || {
            i32::from(ops::stat(&path).is_err())
        })?);
        if name == "f1" {
            kit.until_op(op::GETATTR)?;
        }
    }
    kit.conn.wait_waiting(5, kit.patience)?;
    for one in &all {
        one.wait_asleep(kit.patience)?;
    }
    Ok(all)
}

fn all_end(kit: &mut Kit<'_>, mut all: Vec<Proc>) -> Result<()> {
    for one in &mut all {
        kit.serve_until(&one.what.clone(), |_| one.ended())?;
        let code = one.wait_code(kit.patience)?;
        ensure!(code == 0, "{} ended with {code}", one.what);
    }
    Ok(())
}

fn freezer(env: &Env<'_>) -> Result<()> {
    let freezer = Freezer::new(env)?;
    for held in [false, true] {
        let mut kit = many_at_once(env)?;
        let all = waiters(&mut kit)?;
        if held {
            kit.restarted()?;
        }
        for one in &all {
            freezer.add(one)?;
        }
        freezer.set("FROZEN")?;
        freezer
            .wait("FROZEN", grace(&kit))
            .with_context(|| format!("requests held: {held}"))?;
        // A recovery is none of theirs.
        kit.interrupts.clear();
        let recovered = kit.recover()?;
        ensure!(recovered.report.held == 5, "{:?}", recovered.report);
        freezer.set("THAWED")?;
        all_end(&mut kit, all)?;
        ensure!(
            kit.interrupts.is_empty(),
            "freezing has interrupted {:x?}",
            kit.interrupts
        );
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn suspend(env: &Env<'_>) -> Result<()> {
    let state = Path::new("/sys/power/state");
    let Ok(states) = std::fs::read_to_string(state) else {
        return skip("this kernel has no suspend");
    };
    let Some(word) = ["freeze", "mem"].into_iter().find(|w| states.contains(w)) else {
        return skip(format!("/sys/power/state has {states:?}"));
    };
    std::fs::write("/sys/power/pm_test", "freezer").context("pm_test")?;
    // How long everything stays frozen.
    let _ = std::fs::write("/sys/module/suspend/parameters/pm_test_delay", "1");
    let mut kit = many_at_once(env)?;
    let all = waiters(&mut kit)?;
    kit.restarted()?;
    let said = std::fs::write(state, word);
    let _ = std::fs::write("/sys/power/pm_test", "none");
    said.context("suspend failed while requests are held")?;
    kit.recover()?;
    all_end(&mut kit, all)?;
    still_serves(&mut kit)
}

fn while_sorting(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let mut stats = Vec::new();
    for _ in 0..6 {
        stats.push(kit.on("stat", "f0", |p| ops::stat(p).map(drop))?);
        kit.until_op(op::GETATTR)?;
    }
    let mut victims = Vec::new();
    for i in 0..4 {
        let path = kit.path("f1");
        let victim = Proc::spawn(&format!("victim {i}"), &[kit.dev.raw()], move || {
            i32::from(ops::stat(&path).is_err())
        })?;
        kit.until("the victim's GETATTR", |m| {
            m.is(op::GETATTR) && m.header.pid == victim.pid.as_raw() as u32
        })?;
        victim.wait_asleep(kit.patience)?;
        victims.push(victim);
    }
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    let trap = Trap::arm("unhold_sort")?;
    kit.commit_epoch(recovered.report.epoch)?;
    kit.tree.adopt(&recovered.replays);
    trap.wait(kit.patience)?;
    for victim in &victims {
        victim.signal(Signal::SIGKILL)?;
    }
    // Killed, but in nobody's list: they wait until they are in one again.
    for victim in &victims {
        let tid = victim.tid();
        wait_for("the victim to see its end", kit.patience, || {
            Ok(matches!(state(tid), Some('D' | 'Z') | None))
        })?;
    }
    trap.go();
    kit.wait_serving()?;
    // Nobody has read their requests, nobody will.
    for victim in &mut victims {
        victim
            .wait(grace(&kit))
            .context("killed while its request was sorted")?;
    }
    for stat in &stats {
        let result = kit.serve(stat)?;
        ensure!(result == Ok(()), "{} gave {result:?}", stat.what);
    }
    still_serves(&mut kit)
}
