// SPDX-License-Identifier: GPL-2.0
//! Killed (of the family `kill`) in I/O past the page cache, or behind the lock of somebody who waits.

use std::os::fd::{AsFd, RawFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::PollFlags;
use nix::sys::signal::Signal;

use super::help::{populate, populated, still_serves};
use super::kill::{dies, grace, mkdir_process};
use super::lost::{node, Staged};
use super::stale_data::cached;
use super::stale_drop::{change_mapped, crash_in_write, map, reads, store_and_sync};
use super::stale_write::synced;
use super::Scenario;
use crate::raw::aio::Aio;
use crate::raw::app::Proc;
use crate::raw::dev::poll_one;
use crate::raw::env::{skip, Env};
use crate::raw::kit::{Config, Kit};
use crate::raw::ops;
use crate::raw::wire::{fopen, init, op};

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
        Scenario::series(
            "kill/write-put-back",
            "a task can be killed that waits at the end of a write() to drop what it put back after a recovery",
            write_put_back,
        ),
        Scenario::series(
            "kill/write-unheard",
            "or to drop what is cached, as a size was not heard during it",
            write_unheard,
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

/// A process that writes by a descriptor of its own.
fn writer(kit: &mut Kit<'_>, fd: RawFd, data: &[u8], at: i64) -> Result<Proc> {
    // Who dies would wait for the answer to its FLUSH, which nobody gives.
    kit.tree.open_flags |= fopen::NOFLUSH;
    let path = kit.path("f0");
    let staged = Staged::start(
        kit,
        "a write",
        || {
            // What it has from its parent.
            ops::close(fd).map_err(|_| 9)?;
            ops::open(&path, OFlag::O_WRONLY).map_err(|_| 10)
        },
        |own| i32::from(ops::pwrite(own, data, at).is_err()),
    )?;
    kit.settle()?;
    Ok(staged.let_go())
}

/// It was sent once more from what was put back, and that is being written for a mapping when it is answered.
fn write_put_back(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let mut app = writer(&mut kit, fd, b"C", 0)?;
    let write = crash_in_write(&mut kit)?;
    let mapped = change_mapped(&mut kit, fd)?;
    let whole = kit.until_op(op::WRITE)?;
    kit.answer(&whole)?;
    synced(&mut kit, &mapped)?;
    kit.answer(&write)?;
    let again = kit.until_op(op::WRITE)?;
    let (at, _) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    let mapped = store_and_sync(&mut kit, fd, at)?;
    kit.until_op(op::WRITE)?;
    kit.answer(&again)?;
    dies_waiting(&mut kit, &mut app)?;
    synced(&mut kit, &mapped)?;
    reads(&mut kit, fd, 0, b"CXntent of 0")
}

/// The file was truncated, and became as long again by the write. Another page of it is being written.
fn write_unheard(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let f0 = node(&kit, "f0")?;
    kit.tree.node_mut(f0).data = vec![b'd'; 2 * 4096];
    ensure!(kit.run("fstat", move || ops::fstat(fd))?.is_ok(), "fstat");
    let mut app = writer(&mut kit, fd, &[b'X'; 4096], 4096)?;
    let write = kit.until_op(op::WRITE)?;
    // Not before: a process that has the mapping waits for its pages when it ends.
    let (at, _) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    kit.tree.node_mut(f0).data.truncate(2048);
    ensure!(kit.run("fstat", move || ops::fstat(fd))?.is_ok(), "fstat");
    let mapped = store_and_sync(&mut kit, fd, at)?;
    kit.until_op(op::WRITE)?;
    kit.answer(&write)?;
    let asked = kit.until_op(op::GETATTR)?;
    kit.answer(&asked)?;
    dies_waiting(&mut kit, &mut app)?;
    synced(&mut kit, &mapped)?;
    reads(&mut kit, fd, 0, &[b"dX".as_slice(), &[b'd'; 98]].concat())
}

/// Killed in a wait without a request of its own while there is no server, for a page that a server is to write.
fn dies_waiting(kit: &mut Kit<'_>, app: &mut Proc) -> Result<()> {
    app.wait_asleep(kit.patience)?;
    kit.restarted()?;
    dies(kit, app, "at the end of a write()")?;
    kit.recover()?;
    Ok(())
}
