// SPDX-License-Identifier: GPL-2.0
//! Transfers that are under way when their file is revoked: the request is with the dead server, its answer must be
//! `EIO` for the application and no request for the next server.

use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::sync::{mpsc, Arc};

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::help::{expect_errno, open, populate, still_serves};
use super::lost::{lose, never_asked, node};
use super::Scenario;
use crate::raw::aio::{Aio, Uring};
use crate::raw::env::{skip, Env};
use crate::raw::kit::{Config, Kit};
use crate::raw::ops::{self, Done};
use crate::raw::rare;
use crate::raw::uffd::Abyss;
use crate::raw::wire::{fopen, init, op};

/// What an application does with the first bytes of `f1`; `usize` is how many it got.
type Transfer = fn(RawFd, RawFd) -> Done<usize>;

pub fn scenarios() -> Vec<Scenario> {
    let waits = "who waits for a transfer of a revoked file gets EIO";
    // Name, opcode that the dead server has, flags of OPEN, and the call; the second descriptor is of `f0`.
    let transfers: [(&str, u32, u32, Transfer); 8] = [
        ("read", op::READ, 0, |fd, _| {
            ops::pread(fd, 10, 0).map(|b| b.len())
        }),
        ("read-direct", op::READ, fopen::DIRECT_IO, |fd, _| {
            ops::pread(fd, 10, 0).map(|b| b.len())
        }),
        ("write", op::WRITE, 0, |fd, _| ops::pwrite(fd, b"new", 0)),
        ("write-direct", op::WRITE, fopen::DIRECT_IO, |fd, _| {
            ops::pwrite(fd, b"new", 0)
        }),
        ("splice", op::READ, 0, |fd, _| ops::splice_read(fd, 10)),
        ("sendfile", op::READ, 0, |fd, _| {
            let (_read, write) = nix::unistd::pipe()?;
            rare::sendfile(write.as_raw_fd(), fd, 10)
        }),
        ("copy-from", op::COPY_FILE_RANGE, 0, |fd, other| {
            ops::copy_file_range(fd, other, 10)
        }),
        ("copy-to", op::COPY_FILE_RANGE, 0, |fd, other| {
            ops::copy_file_range(other, fd, 10)
        }),
    ];
    let mut all: Vec<Scenario> = transfers
        .into_iter()
        .map(|(name, opcode, flags, call)| {
            Scenario::series(format!("revoked-io/{name}"), waits, move |env| {
                under_way(env, opcode, flags, call)
            })
        })
        .collect();
    for direct in [false, true] {
        let kind = if direct { "direct" } else { "buffered" };
        all.push(Scenario::series(
            format!("revoked-io/uring-{kind}"),
            "an io_uring read of a revoked file ends with EIO",
            move |env| asynchronous(env, direct, true),
        ));
    }
    all.extend([
        Scenario::series(
            "revoked-io/aio",
            "an asynchronous read of a revoked file ends with EIO",
            |env| asynchronous(env, true, false),
        ),
        Scenario::series(
            "revoked-io/same-page",
            "all who wait for one page of a revoked file get EIO",
            same_page,
        ),
        Scenario::series(
            "revoked-io/write-under-way",
            "a long write to the cache of a revoked file ends with EIO or short, and leaves nothing dirty",
            write_under_way,
        ),
        Scenario::series(
            "revoked-io/in-a-pipe",
            "what was spliced into a pipe before is what was read before",
            in_a_pipe,
        ),
    ]);
    all
}

/// `f0` and `f1`, opened without `O_APPEND`, nothing cached.
fn two_files<'a>(env: &'a Env<'a>, flags: u64, open_flags: u32) -> Result<(Kit<'a>, [RawFd; 2])> {
    let mut kit = Kit::granted_with(env, Config::with(flags))?;
    kit.tree.open_flags = open_flags;
    populate(&mut kit, 2)?;
    let fds = [
        open(&mut kit, "f0", OFlag::O_RDWR)?,
        open(&mut kit, "f1", OFlag::O_RDWR)?,
    ];
    kit.settle()?;
    Ok((kit, fds))
}

/// Its bytes come slowly: some from before the crash, the last when the file is revoked and its pages are dropped.
fn write_under_way(env: &Env<'_>) -> Result<()> {
    const HEAD: usize = 64 << 10;
    const LATE: usize = 4096;
    let (mut kit, [_, fd]) = two_files(env, init::WRITEBACK_CACHE, 0)?;
    let page = kit.run("mmap", move || rare::map_untouched(fd))??;
    let late = Arc::new(Abyss::new(LATE)?);
    let from = late.clone();
    let app = kit.app("a write", move || from.write(fd, &[7; HEAD], LATE))?;
    kit.serve_until("the write to come to the last bytes", |_| late.is_awaited())?;
    let victim = node(&kit, "f1")?;
    lose(&mut kit, &[victim])?;
    kit.serve_until("the pages to go", |_| Ok(!rare::in_page_cache(page)?))?;
    late.fill(b"")?;
    let wrote = kit.serve(&app)?;
    ensure!(
        matches!(wrote, Err(Errno::EIO)) || wrote.is_ok_and(|n| n <= HEAD),
        "a write that goes on after its file was revoked gave {wrote:?}"
    );
    ensure!(
        !rare::in_page_cache(page)?,
        "it has put a page into the cache, which nobody will write or drop"
    );
    let again = kit.run("again", move || ops::pwrite(fd, b"new", 0))?;
    expect_errno("the next write", again, Errno::EIO)?;
    never_asked(&kit, victim)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn under_way(env: &Env<'_>, opcode: u32, open_flags: u32, call: Transfer) -> Result<()> {
    let (mut kit, [other, fd]) = two_files(env, 0, open_flags)?;
    let app = kit.app("a transfer", move || call(fd, other))?;
    let m = kit.until_op(opcode)?;
    let victim = node(&kit, "f1")?;
    let recovered = lose(&mut kit, &[victim])?;
    ensure!(recovered.report.held >= 1, "{m} was not held");
    expect_errno("the transfer", kit.serve(&app)?, Errno::EIO)?;
    expect_errno(
        "the same again",
        kit.run("again", move || call(fd, other))?,
        Errno::EIO,
    )?;
    never_asked(&kit, victim)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn asynchronous(env: &Env<'_>, direct: bool, uring: bool) -> Result<()> {
    let open_flags = if direct { fopen::DIRECT_IO } else { 0 };
    let (mut kit, fds) = two_files(env, init::ASYNC_DIO, open_flags)?;
    // io_uring asks before it reads.
    kit.tree.no_poll = true;
    let mut reads = Vec::new();
    for fd in fds {
        let (send, receive) = mpsc::channel::<()>();
        let patience = kit.patience;
        reads.push((
            kit.app("an asynchronous read", move || {
                // Submitted by the thread, and looked for when the scenario says so.
                if uring {
                    let read = Uring::read(fd, 10)?;
                    let _ = receive.recv();
                    read.wait()
                } else {
                    let read = Aio::read(fd, 10)?;
                    let _ = receive.recv();
                    read.wait(patience)
                }
            })?,
            send,
        ));
        let (app, _) = reads.last().context("just added")?;
        if kit.until_op_or_end(op::READ, app)?.is_none() {
            return match app.take() {
                Some(Err(Errno::ENOSYS | Errno::EPERM)) => skip("no such reads in this kernel"),
                other => anyhow::bail!("the read ended before it was answered, with {other:?}"),
            };
        }
    }
    let victim = node(&kit, "f1")?;
    let recovered = lose(&mut kit, &[victim])?;
    ensure!(
        recovered.report.held == 2,
        "held: {}",
        recovered.report.held
    );
    let mut results = Vec::new();
    for (app, send) in reads {
        let _ = send.send(());
        results.push(kit.serve(&app)?);
    }
    ensure!(
        results[0] == Ok(b"content of".to_vec()),
        "the read of the confirmed file gave {:?}",
        results[0]
    );
    expect_errno(
        "the read of the revoked file",
        results.remove(1),
        Errno::EIO,
    )?;
    never_asked(&kit, victim)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn same_page(env: &Env<'_>) -> Result<()> {
    let (mut kit, [_, fd]) = two_files(env, 0, 0)?;
    let first = kit.app("the first reader", move || ops::pread(fd, 10, 0))?;
    kit.until_op(op::READ)?;
    let mut others = Vec::new();
    for _ in 0..8 {
        let app = kit.app("another reader", move || ops::pread(fd, 10, 0))?;
        app.wait_asleep(kit.patience)?;
        others.push(app);
    }
    let victim = node(&kit, "f1")?;
    lose(&mut kit, &[victim])?;
    expect_errno("the first reader", kit.serve(&first)?, Errno::EIO)?;
    for app in others {
        expect_errno("another reader", kit.serve(&app)?, Errno::EIO)?;
    }
    never_asked(&kit, victim)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn in_a_pipe(env: &Env<'_>) -> Result<()> {
    let (mut kit, [_, fd]) = two_files(env, 0, fopen::KEEP_CACHE)?;
    let (read, write) = nix::unistd::pipe()?;
    let (read, write) = (read.into_raw_fd(), write.into_raw_fd());
    let n = kit.run("splice", move || rare::splice_into(fd, write, 7))?;
    ensure!(n == Ok(7), "splice before anything gave {n:?}");
    kit.settle()?;
    let victim = node(&kit, "f1")?;
    lose(&mut kit, &[victim])?;
    expect_errno(
        "splice",
        kit.run("splice", move || rare::splice_into(fd, write, 7))?,
        Errno::EIO,
    )?;
    let bytes = kit.run("read the pipe", move || rare::read(read, 100))?;
    ensure!(
        bytes == Ok(b"content".to_vec()),
        "what was in the pipe is {bytes:?}"
    );
    never_asked(&kit, victim)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}
