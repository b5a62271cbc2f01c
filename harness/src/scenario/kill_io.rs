// SPDX-License-Identifier: GPL-2.0
//! Killed (of the family `kill`) in I/O past the page cache, or behind the lock of somebody who waits.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::PollFlags;
use nix::sys::signal::Signal;

use super::help::{populate, populated, still_serves};
use super::kill::{dies, grace, mkdir_process};
use super::Scenario;
use crate::raw::aio::Aio;
use crate::raw::app::Proc;
use crate::raw::dev::poll_one;
use crate::raw::env::{skip, Env};
use crate::raw::kit::{Config, Kit};
use crate::raw::ops;
use crate::raw::wire::{init, op};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "kill/direct",
            "a task that reads or writes with O_DIRECT can be killed, also where the server takes several at once",
            direct,
        ),
        Scenario::series(
            "kill/aio",
            "the limit: a killed task with asynchronous I/O under way ends when that has, as ever",
            aio,
        ),
        Scenario::series(
            "kill/behind-lock",
            "the limit: who waits for the lock of somebody held ends when that one does, who can be killed",
            behind_lock,
        ),
    ]
}

/// How somebody comes past the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direct {
    Read,
    /// It makes the file longer.
    Write,
    /// The same by `io_submit(2)`: asynchronous it is only in name, as the file becomes longer.
    Submit,
}

/// Reads or writes `f0` past the page cache.
pub(super) fn direct_io(path: &Path, how: Direct) -> i32 {
    let Ok(fd) = ops::open(path, OFlag::O_RDWR | OFlag::O_DIRECT) else {
        return 1;
    };
    i32::from(match how {
        Direct::Read => ops::pread(fd, 4096, 0).is_err(),
        Direct::Write => ops::pwrite(fd, &[7; 4096], 4096).is_err(),
        Direct::Submit => match Aio::write(fd, &[7; 4096], 4096) {
            // A kernel without asynchronous I/O.
            Err(Errno::ENOSYS) => ops::pwrite(fd, &[7; 4096], 4096).is_err(),
            other => other.is_err(),
        },
    })
}

fn direct(env: &Env<'_>) -> Result<()> {
    for how in [Direct::Read, Direct::Write, Direct::Submit] {
        for read in [false, true] {
            let mut kit = Kit::granted_with(env, Config::with(init::ASYNC_DIO))?;
            populate(&mut kit, 3)?;
            let opcode = match how {
                Direct::Read => op::READ,
                Direct::Write | Direct::Submit => op::WRITE,
            };
            let path = kit.path("f0");
            let mut app = Proc::spawn("O_DIRECT", &[kit.dev.raw()], || direct_io(&path, how))?;
            let open = kit.until_op(op::OPEN)?;
            kit.answer(&open)?;
            let when = format!("in an O_DIRECT {}", op::name(opcode));
            if read {
                kit.until_op(opcode)?;
            } else {
                kit.conn.wait_waiting(1, kit.patience)?;
            }
            app.wait_asleep(kit.patience)?;
            kit.restarted()?;
            dies(&kit, &mut app, &when)?;
            let recovered = kit.recover()?;
            // The FLUSH and the RELEASE of its file.
            ensure!(
                recovered.report.held <= 2,
                "{} requests are held for a task that is gone",
                recovered.report.held
            );
            kit.settle()?;
            ensure!(
                !kit.served.iter().any(|m| m.is(opcode)),
                "{when}: what a killed task wanted was sent to the next server"
            );
            kit.check_counts()?;
            still_serves(&mut kit)?;
        }
    }
    Ok(())
}

fn aio(env: &Env<'_>) -> Result<()> {
    const NO_AIO: i32 = 77;
    let mut kit = Kit::granted_with(env, Config::with(init::ASYNC_DIO))?;
    populate(&mut kit, 3)?;
    let path = kit.path("f0");
    let (told, tell) = nix::unistd::pipe()?;
    let mut app = Proc::spawn("AIO", &[kit.dev.raw()], || {
        let Ok(fd) = ops::open(&path, OFlag::O_RDWR | OFlag::O_DIRECT) else {
            return 1;
        };
        let Ok(_read) = Aio::read(fd, 10) else {
            return NO_AIO;
        };
        let _ = nix::unistd::write(&tell, b"!");
        loop {
            nix::unistd::pause();
        }
    })?;
    let open = kit.until_op(op::OPEN)?;
    kit.answer(&open)?;
    let ready = poll_one(told.as_fd(), PollFlags::POLLIN, kit.patience)?;
    if !ready.contains(PollFlags::POLLIN) || app.ended()? {
        let code = app.wait_code(kit.patience)?;
        ensure!(code == NO_AIO, "the application ended with {code}");
        return skip("no io_submit(2) in this kernel");
    }
    kit.until_op(op::READ)?;
    kit.restarted()?;
    // From here on nobody may look at it in procfs: who does has its memory for a moment, may be the last to let go of it,
    // and then waits for the read in its place. Here that would be the server.
    app.signal(Signal::SIGKILL)?;
    ensure!(
        !app.ended_within(Duration::from_millis(300))?,
        "it ended before its read did: the limit has gone, and so has to go from the documents"
    );
    kit.recover()?;
    kit.serve_until("the end of the killed task", |_| app.ended())?;
    app.wait(kit.patience)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn behind_lock(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let mut first = mkdir_process(&kit, "d")?;
    kit.until_op(op::MKDIR)?;
    first.wait_asleep(kit.patience)?;
    // It waits for the lock of the directory: there is no request of its own.
    let mut second = mkdir_process(&kit, "e")?;
    second.wait_asleep(kit.patience)?;
    kit.restarted()?;
    kit.confirm_root()?;
    second.signal(Signal::SIGKILL)?;
    ensure!(
        !second.ended_within(Duration::from_millis(100))?,
        "it did not wait for the lock: the limit has gone, and so has to go from the documents"
    );
    dies(
        &kit,
        &mut first,
        "held, and with a lock that another one waits for",
    )?;
    second
        .wait(grace(&kit))
        .context("killed behind the lock of who is gone")?;
    kit.recover()?;
    kit.settle()?;
    ensure!(
        !kit.served.iter().any(|m| m.is(op::MKDIR)),
        "what killed tasks wanted was sent to the next server"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}
