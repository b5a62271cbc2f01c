// SPDX-License-Identifier: GPL-2.0
//! The rest of the system while a connection is held, and the order of what comes again.

use std::os::fd::AsRawFd;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::help::{enter, open, still_serves, Phase};
use super::kill::grace;
use super::Scenario;
use crate::raw::app::Proc;
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::ops;
use crate::raw::wire::{init, op, ROOT, UNIQUE_RESEND};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "system/sync",
            "sync(2) does not wait for a server that is being replaced, and syncs everything else",
            sync,
        ),
        Scenario::series(
            "order/ten-thousand",
            "ten thousand requests in flight come again in the order in which they were sent",
            ten_thousand,
        ),
    ]
}

fn sync(env: &Env<'_>) -> Result<()> {
    for phase in [Phase::Said, Phase::Replay, Phase::Refused] {
        let mut kit = Kit::granted_with(env, Config::with(init::WRITEBACK_CACHE))?;
        super::help::populate(&mut kit, 3)?;
        let f0 = kit.tree.child(ROOT, "f0").context("f0")?;
        // Before the file is open: whoever inherits the descriptor writes its pages when it exits.
        let (go, tell) = nix::unistd::pipe()?;
        let mut syncer = Proc::spawn("sync", &[kit.dev.raw(), tell.as_raw_fd()], || {
            let _ = nix::unistd::read(&go, &mut [0]);
            nix::unistd::sync();
            0
        })?;
        let fd = open(&mut kit, "f0", OFlag::O_RDWR)?;
        let wrote = kit.run("write", move || ops::pwrite(fd, &[7; 100_000], 0))?;
        ensure!(wrote == Ok(100_000), "write: {wrote:?}");
        let left = enter(&mut kit, phase)?;
        drop(tell);
        let code = syncer
            .wait_code(grace(&kit) * 3)
            .with_context(|| format!("in {phase:?}"))?;
        ensure!(code == 0, "sync");
        if let Some((m, r)) = left.as_ref().and_then(|m| m.replay().map(|r| (m, r))) {
            kit.confirm(m, &r)?;
        }
        kit.recover()?;
        let synced = kit.run("fsync", move || ops::fsync(fd))?;
        ensure!(synced == Ok(()), "fsync: {synced:?}");
        ensure!(
            kit.tree.node(f0).data == [7; 100_000],
            "what sync had begun to write is lost"
        );
        still_serves(&mut kit)?;
    }
    Ok(())
}

/// One file of ten thousand pages, of which each is read ahead by a request of its own, in the background.
fn ten_thousand(env: &Env<'_>) -> Result<()> {
    const N: usize = 10_000;
    // The limit is what the kernel lets an unprivileged server have; the mounter here is privileged.
    let config = Config {
        max_background: u16::MAX,
        max_readahead: 4096,
        ..Config::default()
    };
    let mut kit = Kit::granted_with(env, config)?;
    let size = N * 4096;
    kit.tree.file(ROOT, "big", &vec![7; size]);
    let fd = open(&mut kit, "big", OFlag::O_RDONLY)?;
    kit.settle()?;
    // Asynchronous reads one page each, in an order of its own; nobody waits for them.
    let hints = kit.app("readahead", move || -> ops::Done<()> {
        for i in 0..N as i64 {
            // Every second page backwards, the others forwards: no two make one request.
            let page = if i % 2 == 0 { i } else { N as i64 - i };
            // SAFETY: plain numbers.
            Errno::result(unsafe {
                libc::posix_fadvise(fd, page * 4096, 4096, libc::POSIX_FADV_WILLNEED)
            })?;
        }
        Ok(())
    })?;
    let mut seen = Vec::new();
    let mut answered = 0u64;
    kit.patience *= 6;
    while seen.len() < N {
        let Some(m) = kit.until_op_or_end(op::READ, &hints)? else {
            break;
        };
        seen.push(m.original());
    }
    while kit.readable()? {
        seen.push(kit.until_op(op::READ)?.original());
    }
    ensure!(hints.finish(kit.patience)? == Ok(()), "posix_fadvise");
    while kit.readable()? {
        seen.push(kit.until_op(op::READ)?.original());
    }
    ensure!(
        seen.len() >= N,
        "only {} of {N} requests are in flight",
        seen.len()
    );
    let recovered = kit.recover()?;
    ensure!(
        recovered.report.held == seen.len() as u64,
        "{} held, {} were read",
        recovered.report.held,
        seen.len()
    );
    seen.sort_unstable();
    for (i, id) in seen.iter().enumerate() {
        let m = kit.next_request()?;
        ensure!(
            m.original() == *id && m.unique() & UNIQUE_RESEND != 0,
            "request {i} is {m}, expected {id:#x}"
        );
        kit.answer(&m)?;
        answered += 1;
    }
    ensure!(answered == seen.len() as u64, "{answered} answered");
    kit.settle()?;
    println!("{answered} requests in order");
    still_serves(&mut kit)
}
