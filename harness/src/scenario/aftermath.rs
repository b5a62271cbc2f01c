// SPDX-License-Identifier: GPL-2.0
//! What applications find after a recovery: of files the new server knows, of those it does not, and of those that
//! only a server did not know that never committed.

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::help::{expect_errno, expect_resent, open, populated, still_serves};
use super::Scenario;
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::ops;
use crate::raw::tree::Answer;
use crate::raw::wire::{init, notify, op, InvalInodeOut, PollOut, RetrieveOut, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "aftermath/void-verdict",
            "what a server that never committed did not know is not revoked",
            void_verdict,
        ),
        Scenario::series(
            "aftermath/polls-wake",
            "who polls a file is woken, and asks the new server",
            polls_wake,
        ),
        Scenario::series(
            "aftermath/dirty-revoked",
            "dirty pages nobody has begun to write: fsync of the revoked file says EIO",
            dirty_revoked,
        ),
        Scenario::series(
            "aftermath/mapped-dirty",
            "a shared mapping that was dirty at the crash reaches the server that confirms the file",
            mapped_dirty,
        ),
        Scenario::series(
            "aftermath/copy-into-revoked",
            "a held COPY_FILE_RANGE into a revoked file does not reach its successor",
            copy_into_revoked,
        ),
        Scenario::series(
            "aftermath/successor-same-generation",
            "a name leads to the successor even if it has nodeid and generation of the revoked inode",
            successor_same_generation,
        ),
        Scenario::series(
            "aftermath/notified-by-nodeid",
            "a notification about the nodeid of a revoked inode does not find it: it may be meant for a successor",
            notified_by_nodeid,
        ),
        Scenario::series(
            "aftermath/bad-not-shown",
            "an inode that is bad is shown to no server, though the kernel has a count to give back",
            bad_not_shown,
        ),
    ]
}

fn void_verdict(env: &Env<'_>) -> Result<()> {
    for counted in [false, true] {
        let mut kit = populated(env, 3)?;
        let f0 = kit.tree.child(ROOT, "f0").context("f0")?;
        let fd = open(&mut kit, "f0", OFlag::O_RDONLY)?;
        kit.settle()?;
        kit.restarted()?;
        // It knows nothing of f0, says so up to the report, and dies.
        let tree = &kit.tree;
        let mut lie = tree.attr_out(f0).context("attributes")?;
        lie.attr.mode = libc::S_IFDIR | 0o755;
        kit.answer_replays(&mut |_, r| {
            (r.nodeid == f0).then(|| match counted {
                true => Answer::of(&lie),
                false => Answer::Err(libc::ESTALE),
            })
        })?;
        let recovered = kit.recover()?;
        ensure!(
            (recovered.report.revoked, recovered.report.confirmed) == (0, 4),
            "{:?}",
            recovered.report
        );
        let stat = kit.run("fstat", move || ops::fstat(fd).map(drop))?;
        ensure!(
            stat == Ok(()),
            "a file that the serving server knows gives {stat:?}: a dead one did not"
        );
        let bytes = kit.run("read", move || ops::pread(fd, 7, 0))?;
        ensure!(bytes == Ok(b"content".to_vec()), "{bytes:?}");
        kit.check_counts()?;
    }
    Ok(())
}

fn polls_wake(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let fd = open(&mut kit, "f0", OFlag::O_RDWR)?;
    let nothing = Answer::of(&PollOut {
        revents: 0,
        padding: 0,
    });
    let something = Answer::of(&PollOut {
        revents: libc::POLLPRI as u32,
        padding: 0,
    });
    let poller = kit.app("poll", move || {
        let mut fds = libc::pollfd {
            fd,
            events: libc::POLLPRI,
            revents: 0,
        };
        // SAFETY: one structure, which lives until the call returns.
        Errno::result(unsafe { libc::poll(&mut fds, 1, -1) }).map(|_| fds.revents)
    })?;
    let m = kit.until_op(op::POLL)?;
    kit.send(&m, &nothing)?;
    poller.wait_asleep(kit.patience)?;
    kit.recover()?;
    let again = kit
        .until_op(op::POLL)
        .context("who polls was not woken: the new server does not know of it")?;
    kit.send(&again, &something)?;
    let got = kit.serve(&poller)?;
    ensure!(got == Ok(libc::POLLPRI), "poll gave {got:?}");
    still_serves(&mut kit)
}

fn dirty_revoked(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted_with(env, Config::with(init::WRITEBACK_CACHE))?;
    let f = kit.tree.file(ROOT, "f", b"");
    let fds = [
        open(&mut kit, "f", OFlag::O_RDWR)?,
        open(&mut kit, "f", OFlag::O_RDWR)?,
    ];
    let fd = fds[0];
    let wrote = kit.run("write", move || ops::pwrite(fd, &[7; 10_000], 0))?;
    ensure!(wrote == Ok(10_000), "write: {wrote:?}");
    kit.settle()?;
    ensure!(
        kit.tree.node(f).data.is_empty(),
        "the pages were written already: this scenario shows nothing"
    );
    kit.recover_with(&mut |_, r| (r.nodeid == f).then_some(Answer::Err(libc::ESTALE)))?;
    for fd in fds {
        let sync = kit.run("fsync", move || ops::fsync(fd))?;
        expect_errno("fsync of what is lost", sync, Errno::EIO)?;
    }
    still_serves(&mut kit)
}

fn mapped_dirty(env: &Env<'_>) -> Result<()> {
    for flags in [0, init::WRITEBACK_CACHE] {
        let mut kit = Kit::granted_with(env, Config::with(flags))?;
        let f = kit.tree.file(ROOT, "f", &[1; 8192]);
        let fd = open(&mut kit, "f", OFlag::O_RDWR)?;
        let dirty = kit.app("mmap and write", move || -> ops::Done<usize> {
            // SAFETY: a new mapping of two pages of a file of that size.
            let at = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    8192,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED,
                    fd,
                    0,
                )
            };
            if at == libc::MAP_FAILED {
                return Err(Errno::last());
            }
            // SAFETY: inside the mapping, which nobody else has.
            unsafe { at.cast::<u8>().add(4096).write_volatile(9) };
            Ok(at as usize)
        })?;
        let at = kit.serve(&dirty)?.context("mmap")?;
        kit.settle()?;
        let sync = kit.app("msync", move || {
            // SAFETY: the mapping made above.
            Errno::result(unsafe { libc::msync(at as *mut _, 8192, libc::MS_SYNC) }).map(drop)
        })?;
        let old = kit.until_op(op::WRITE)?;
        kit.recover()?;
        let again = kit.until_op(op::WRITE)?;
        expect_resent(&kit, &old, &again)?;
        kit.answer(&again)?;
        ensure!(kit.serve(&sync)? == Ok(()), "msync");
        ensure!(
            kit.tree.node(f).data[4096] == 9,
            "what was written to the mapping is lost"
        );
        // And what is dirty, but not yet being written, when the server dies.
        // SAFETY: inside the mapping.
        unsafe { (at as *mut u8).write_volatile(8) };
        kit.recover()?;
        let sync = kit.run("msync", move || {
            // SAFETY: the mapping made above.
            Errno::result(unsafe { libc::msync(at as *mut _, 8192, libc::MS_SYNC) }).map(drop)
        })?;
        ensure!(sync == Ok(()), "msync: {sync:?}");
        ensure!(kit.tree.node(f).data[0] == 8, "the second write is lost");
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn copy_into_revoked(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let f1 = kit.tree.child(ROOT, "f1").context("f1")?;
    let from = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    let to = open(&mut kit, "f1", OFlag::O_RDWR)?;
    let app = kit.app("copy", move || ops::copy_file_range(from, to, 5))?;
    kit.until("COPY_FILE_RANGE", |m| {
        m.is(op::COPY_FILE_RANGE) || op::name(m.opcode()).contains("COPY_FILE_RANGE")
    })?;
    kit.recover_with(&mut |_, r| (r.nodeid == f1).then_some(Answer::Err(libc::ESTALE)))?;
    kit.served.clear();
    kit.serve_until("the copy", |_| Ok(app.done()))?;
    if let Some(m) = kit
        .served
        .iter()
        .find(|m| op::name(m.opcode()).contains("COPY_FILE_RANGE"))
    {
        anyhow::bail!("{m} names the successor of its target");
    }
    let result = app.take().context("the result")?;
    expect_errno("copy_file_range", result, Errno::EIO)?;
    still_serves(&mut kit)
}

fn successor_same_generation(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let f0 = kit.tree.child(ROOT, "f0").context("f0")?;
    let old = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    // To the new server f0 is another file: it counts nothing under this nodeid, and says so by an error.
    kit.recover_with(&mut |_, r| (r.nodeid == f0).then_some(Answer::Err(libc::ESTALE)))?;
    kit.tree.node_mut(f0).data = b"the successor".to_vec();
    let read = kit.run_on("read", "f0", ops::read_file)?;
    ensure!(
        read == Ok(b"the successor".to_vec()),
        "the name leads to {read:?}"
    );
    let stale = kit.run("read", move || ops::pread(old, 5, 0))?;
    expect_errno("the old descriptor", stale, Errno::EIO)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn notified_by_nodeid(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let f0 = kit.tree.child(ROOT, "f0").context("f0")?;
    let old = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    // So that there is data that RETRIEVE could give away.
    kit.run("read", move || ops::pread(old, 5, 0))??;
    kit.settle()?;
    kit.recover_with(&mut |_, r| (r.nodeid == f0).then_some(Answer::Err(libc::ESTALE)))?;
    kit.wait_serving()?;
    let inval = InvalInodeOut {
        ino: f0,
        off: 0,
        len: 0,
    };
    let retrieve = RetrieveOut {
        notify_unique: 1,
        nodeid: f0,
        offset: 0,
        size: 5,
        padding: 0,
    };
    for (what, said) in [
        (
            "INVAL_INODE",
            kit.dev.notify(notify::INVAL_INODE, &inval, &[]),
        ),
        ("RETRIEVE", kit.dev.notify(notify::RETRIEVE, &retrieve, &[])),
    ] {
        expect_errno(what, said, Errno::ENOENT)?;
    }
    still_serves(&mut kit)
}

fn bad_not_shown(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let f0 = kit.tree.child(ROOT, "f0").context("f0")?;
    let fd = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    let app = kit.app("fstat", move || ops::fstat(fd).map(drop))?;
    let m = kit.until_op(op::GETATTR)?;
    let mut lie = kit.tree.attr_out(f0).context("attributes")?;
    lie.attr.mode = libc::S_IFDIR | 0o755;
    kit.send(&m, &Answer::of(&lie))?;
    expect_errno(
        "a file that became a directory",
        kit.serve(&app)?,
        Errno::EIO,
    )?;
    let recovered = kit.recover()?;
    ensure!(
        !recovered.replays.iter().any(|r| r.nodeid == f0),
        "the bad inode was shown"
    );
    still_serves(&mut kit)
}
