// SPDX-License-Identifier: GPL-2.0
//! Killing: whoever waits for a server that is not there can be killed, application or server.

use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use super::help::{enter, expect_resent, leave, open, populated, still_serves, Phase, PHASES};
use super::waits::flushed_then_released;
use super::Scenario;
use crate::raw::app::{state, Proc};
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::ops;
use crate::raw::trap::Trap;
use crate::raw::wait::wait_for;
use crate::raw::wire::{op, UNIQUE_RESEND};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "kill/held",
            "an application held by a recovery can be killed, in every phase",
            held,
        ),
        Scenario::series(
            "kill/was-read",
            "also when a dead server had read its request",
            was_read,
        ),
        Scenario::series(
            "kill/before",
            "also when it was killed before RESTARTED",
            before,
        ),
        Scenario::series(
            "kill/open-file",
            "also when it has a file open whose FLUSH nobody answers",
            open_file,
        ),
        Scenario::series(
            "kill/late-create",
            "also when its open(O_CREAT) was answered by the dead server, and the file is to be released",
            late_create,
        ),
        Scenario::series(
            "kill/not-resent",
            "the request of a killed application is not sent again",
            not_resent,
        ),
        Scenario::series(
            "kill/server-reading",
            "a server killed while it waits in read(2) loses nothing",
            server_reading,
        ),
        Scenario::series(
            "kill/worker-waits",
            "unanswered replays do not keep anybody else from dying",
            worker_waits,
        ),
    ]
}

/// How long a killed task may take to go: the promise is a second, debug kernels get more by --patience.
pub(super) fn grace(kit: &Kit<'_>) -> Duration {
    Duration::from_secs(1).max(kit.patience / 10)
}

pub(super) fn dies(kit: &Kit<'_>, app: &mut Proc, when: &str) -> Result<()> {
    let start = Instant::now();
    app.signal(Signal::SIGKILL)?;
    let status = app
        .wait(grace(kit))
        .with_context(|| format!("killed {when}"))?;
    ensure!(
        matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)),
        "killed {when} it ended with {status:?}"
    );
    tracing::debug!(
        "{} was gone {:?} after SIGKILL, {when}",
        app.what,
        start.elapsed()
    );
    Ok(())
}

pub(super) fn mkdir_process(kit: &Kit<'_>, name: &str) -> Result<Proc> {
    let path = kit.path(name);
    Proc::spawn(&format!("mkdir {name}"), &[kit.dev.raw()], move || {
        i32::from(ops::mkdir(&path).is_err())
    })
}

fn held(env: &Env<'_>) -> Result<()> {
    for phase in PHASES {
        let mut kit = populated(env, 3)?;
        let left = enter(&mut kit, phase)?;
        let base = kit.conn.waiting()?;
        let mut app = mkdir_process(&kit, "d")?;
        kit.conn.wait_waiting(base + 1, kit.patience)?;
        app.wait_asleep(kit.patience)?;
        dies(&kit, &mut app, &format!("while held in {phase:?}"))?;
        leave(&mut kit, left.as_ref())?;
        kit.recover().with_context(|| format!("in {phase:?}"))?;
        kit.check_counts()
            .with_context(|| format!("in {phase:?}"))?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn was_read(env: &Env<'_>) -> Result<()> {
    for phase in PHASES {
        let mut kit = populated(env, 3)?;
        let mut app = mkdir_process(&kit, "d")?;
        kit.until_op(op::MKDIR)?;
        app.wait_asleep(kit.patience)?;
        enter(&mut kit, phase)?;
        dies(
            &kit,
            &mut app,
            &format!("in {phase:?}, its request in dead hands"),
        )?;
        leave(&mut kit, None)?;
        kit.recover().with_context(|| format!("in {phase:?}"))?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn before(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let mut app = mkdir_process(&kit, "d")?;
    kit.until_op(op::MKDIR)?;
    app.wait_asleep(kit.patience)?;
    // Killed while a server has its request: it must wait, that is how FUSE is ...
    app.signal(Signal::SIGKILL)?;
    let tid = app.tid();
    wait_for(
        "the killed application to wait uninterruptibly",
        kit.patience,
        || Ok(state(tid) == Some('D')),
    )?;
    // ... until the server is known to be dead.
    kit.restarted()?;
    let status = app.wait(grace(&kit)).context("killed before RESTARTED")?;
    ensure!(
        matches!(status, WaitStatus::Signaled(..)),
        "it ended with {status:?}"
    );
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    kit.commit(&recovered)?;
    still_serves(&mut kit)
}

fn open_file(env: &Env<'_>) -> Result<()> {
    for phase in PHASES {
        let mut kit = populated(env, 3)?;
        // Who sleeps in a copy has f0.
        let path = kit.path("f1");
        let (fd_of, file_open) = nix::unistd::pipe()?;
        let mut app = Proc::spawn("an application with an open file", &[kit.dev.raw()], || {
            let Ok(_fd) = ops::open(&path, OFlag::O_RDWR) else {
                return 1;
            };
            let _ = nix::unistd::write(&file_open, b"!");
            loop {
                nix::unistd::pause();
            }
        })?;
        kit.serve_until("the file to be open", |_| {
            let ready = crate::raw::dev::poll_one(
                std::os::fd::AsFd::as_fd(&fd_of),
                nix::poll::PollFlags::POLLIN,
                Duration::ZERO,
            )?;
            Ok(ready.contains(nix::poll::PollFlags::POLLIN))
        })?;
        kit.settle()?;
        enter(&mut kit, phase)?;
        dies(&kit, &mut app, &format!("with an open file in {phase:?}"))?;
        leave(&mut kit, None)?;
        kit.recover()?;
        flushed_then_released(&mut kit)?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn late_create(env: &Env<'_>) -> Result<()> {
    // The others count on the server's table, which has a file that nobody consumed.
    for phase in [Phase::Said, Phase::Root, Phase::Reported] {
        let mut kit = populated(env, 3)?;
        let trap = Trap::arm("create_answered")?;
        let path = kit.path("new");
        let mut app = Proc::spawn("open(O_CREAT)", &[kit.dev.raw()], move || {
            i32::from(ops::open(&path, OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR).is_err())
        })?;
        let m = kit.until_op(op::CREATE)?;
        kit.answer(&m)?;
        trap.wait(kit.patience)?;
        enter(&mut kit, phase)?;
        // The answer counts for nobody, so the next server is asked for the name, once it serves.
        let base = kit.conn.waiting()?;
        trap.go();
        kit.conn.wait_waiting(base + 1, kit.patience)?;
        app.wait_asleep(kit.patience)?;
        dies(&kit, &mut app, &format!("in open(O_CREAT) in {phase:?}"))?;
        leave(&mut kit, None)?;
        kit.recover().with_context(|| format!("in {phase:?}"))?;
        let released = |kit: &Kit<'_>| kit.served.iter().any(|m| m.is(op::RELEASE));
        kit.serve_until("RELEASE of what was opened", |kit| Ok(released(kit)))?;
        kit.check_counts()
            .with_context(|| format!("in {phase:?}"))?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn not_resent(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let mut doomed = mkdir_process(&kit, "doomed")?;
    kit.until_op(op::MKDIR)?;
    doomed.wait_asleep(kit.patience)?;
    let other = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    let old = kit.until_op(op::GETATTR)?;
    kit.restarted()?;
    dies(&kit, &mut doomed, "while held")?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    ensure!(
        recovered.report.held == 1,
        "one request is owed, the report says {}",
        recovered.report.held
    );
    kit.commit(&recovered)?;
    let new = kit.next_request()?;
    expect_resent(&kit, &old, &new)?;
    kit.answer(&new)?;
    ensure!(kit.serve(&other)? == Ok(()), "stat");
    kit.served.clear();
    kit.settle()?;
    let resent = kit.served.iter().any(|m| m.unique() & UNIQUE_RESEND != 0);
    ensure!(
        !resent,
        "the request of the killed application was sent again"
    );
    kit.check_counts()?;
    Ok(())
}

/// The number of the system call a sleeping task is in; "running" and the like otherwise.
pub(super) fn syscall_of(tid: i32) -> String {
    let text = std::fs::read_to_string(format!("/proc/{tid}/syscall")).unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

fn server_reading(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    for round in 0..20 {
        // Or what is counted below is the last round's request, which is answered but not gone yet.
        kit.conn.wait_waiting(0, kit.patience)?;
        let mut dev = kit.dev.duplicate()?;
        let mut server = Proc::spawn("a server in read(2)", &[], move || {
            i32::from(dev.read_blocking().is_err())
        })?;
        server.wait_asleep(kit.patience)?;
        // The request may or may not reach the server before it dies: either way it is owed.
        let app = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
        server.signal(Signal::SIGKILL)?;
        server.wait(kit.patience)?;
        kit.conn.wait_waiting(1, kit.patience)?;
        // It is counted before it is queued.
        app.wait_asleep(kit.patience)?;
        let recovered = kit.recover()?;
        ensure!(
            recovered.report.held == 1,
            "round {round}: {} requests are owed, not 1",
            recovered.report.held
        );
        ensure!(kit.serve(&app)? == Ok(()), "round {round}: stat");
    }
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn worker_waits(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 10)?;
    // None of them is evicted, at whatever moment.
    for n in 0..10 {
        open(&mut kit, &format!("f{n}"), OFlag::O_RDONLY)?;
    }
    kit.restarted()?;
    kit.confirm_root()?;
    kit.next_replay()?;
    // Dropping caches and syncing walks the same inodes as the replay: neither may wait for the server.
    let path = kit.mnt.clone();
    let mut others = vec![Proc::spawn("drop_caches", &[], || {
        i32::from(std::fs::write("/proc/sys/vm/drop_caches", "3").is_err())
    })?];
    others.push(Proc::spawn("stat of the parent", &[], move || {
        i32::from(path.parent().is_none_or(|p| p.metadata().is_err()))
    })?);
    for other in &mut others {
        let code = other.wait_code(kit.patience)?;
        ensure!(code == 0, "{} failed", other.what);
    }
    kit.recover()?;
    kit.check_counts()?;
    still_serves(&mut kit)
}
