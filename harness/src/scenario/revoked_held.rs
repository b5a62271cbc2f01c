// SPDX-License-Identifier: GPL-2.0
//! What is held of a revoked inode without reading or writing it: locks, leases, inotify marks, file handles, and the
//! lookups that are given back.

use std::os::fd::AsRawFd;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::help::{expect_errno, open, populated, still_serves};
use super::lost::{evict, lose, never_asked, node, settled_asleep, succeed, Staged};
use super::Scenario;
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::ops;
use crate::raw::rare::{self, Lock};
use crate::raw::tree::Answer;
use crate::raw::wire::{init, op, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    let mut all = vec![
        Scenario::series(
            "revoked/lock-remote",
            "who waits for a remote lock gets EIO",
            lock_remote,
        ),
        Scenario::series(
            "revoked/lease",
            "a lease on a revoked file can be given back",
            lease,
        ),
        Scenario::series(
            "revoked/marks",
            "an inotify mark stays with the old inode and lets go of it",
            marks,
        ),
        Scenario::series(
            "revoked/same-nodeid-forgets",
            "old and new inode under one nodeid: the FORGETs are those of the new one",
            same_nodeid_forgets,
        ),
        Scenario::series(
            "revoked/same-generation",
            "what the server has again after all is a new inode, also under nodeid and generation of the old one",
            same_generation,
        ),
        Scenario::series(
            "revoked/looked-up-meanwhile",
            "also for a name that was being looked up when its old inode was revoked",
            looked_up_meanwhile,
        ),
        Scenario::series(
            "revoked/handle",
            "a file handle of a revoked inode is stale, one of its successor is good",
            handle,
        ),
    ];
    for lock in [Lock::Posix, Lock::Ofd, Lock::Flock] {
        all.push(Scenario::series(
            format!("revoked/lock-local-{lock:?}").to_lowercase(),
            "a local lock can be given back, and nobody gets a new one",
            move |env| lock_local(env, lock),
        ));
    }
    all
}

/// The kernel keeps the locks itself. A server's death does not concern them, a revoked inode does: who holds one
/// may give it back, but nobody gets one on a file that is no more.
fn lock_local(env: &Env<'_>, lock: Lock) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let path = kit.path("f0");
    let (fd, other) = (
        open(&mut kit, "f0", OFlag::O_RDWR)?,
        open(&mut kit, "f0", OFlag::O_RDWR)?,
    );
    let held = kit.run("lock", move || lock.try_lock(fd))?;
    ensure!(held == Ok(()), "the lock before anything gave {held:?}");
    // A process of its own: POSIX locks are the process's.
    let waiting = kit.path("f0");
    let mut waiter = crate::raw::app::Proc::spawn("a waiter", &[kit.dev.raw()], || {
        let Ok(fd) = ops::open(&waiting, OFlag::O_RDWR) else {
            return 10;
        };
        match lock.set(fd, true, true) {
            Ok(()) => 0,
            Err(e) => e as i32,
        }
    })?;
    kit.serve_until("OPEN of the waiter", |kit| {
        Ok(kit
            .served
            .iter()
            .any(|m| m.header.pid == waiter.tid() as u32 && m.is(op::OPEN)))
    })?;
    settled_asleep(&mut kit, waiter.tid())?;
    let victim = node(&kit, "f0")?;
    lose(&mut kit, &[victim])?;
    let mut asker = Staged::start(
        &mut kit,
        "an asker",
        || Ok(()),
        |()| {
            // Inherited: the same open file, so ask with the other one.
            match lock.try_lock(other) {
                Ok(()) => 0,
                Err(e) => e as i32,
            }
        },
    )?;
    ensure!(!asker.child.ended()?, "the asker did not wait");
    asker.child.what = "an asker for the lock".into();
    let status = asker.go(&mut kit)?;
    ensure!(
        matches!(status, nix::sys::wait::WaitStatus::Exited(_, code) if code == libc::EIO),
        "a lock of the revoked file gave {status:?}, not EIO ({})",
        libc::EIO
    );
    let back = kit.run("unlock", move || lock.unlock(fd))?;
    ensure!(back == Ok(()), "giving the lock back gave {back:?}");
    kit.serve_until("the end of the waiter", |_| waiter.ended())?;
    let code = waiter.wait_code(kit.patience)?;
    // flock() waits inside the kernel's own loop and gets what it waited for.
    let wanted = if lock == Lock::Flock { 0 } else { libc::EIO };
    ensure!(code == wanted, "the waiter ended with {code}, not {wanted}");
    kit.tree.file(ROOT, "f0", b"the next one");
    let fresh = kit.run("lock the new f0", move || {
        let fd = ops::open(&path, OFlag::O_RDWR)?;
        lock.try_lock(fd)
    })?;
    ensure!(fresh == Ok(()), "a lock of the new f0 gave {fresh:?}");
    never_asked(&kit, victim)?;
    still_serves(&mut kit)
}

fn lock_remote(env: &Env<'_>) -> Result<()> {
    let flags = init::POSIX_LOCKS | init::FLOCK_LOCKS;
    let mut kit = Kit::granted_with(env, Config::with(flags))?;
    super::help::populate(&mut kit, 1)?;
    let (fd, other) = (
        open(&mut kit, "f0", OFlag::O_RDWR)?,
        open(&mut kit, "f0", OFlag::O_RDWR)?,
    );
    let held = kit.run("lock", move || Lock::Ofd.try_lock(fd))?;
    ensure!(held == Ok(()), "the lock before anything gave {held:?}");
    let waiter = kit.app("wait for the lock", move || {
        Lock::Ofd.set(other, true, true)
    })?;
    let m = kit.until_op(op::SETLKW)?;
    let victim = m.nodeid();
    lose(&mut kit, &[victim])?;
    expect_errno("who waited", kit.serve(&waiter)?, Errno::EIO)?;
    for lock in [Lock::Ofd, Lock::Posix, Lock::Flock] {
        let result = kit.run("lock", move || lock.try_lock(fd))?;
        expect_errno("a new lock", result, Errno::EIO)?;
    }
    for fd in [fd, other] {
        kit.run("close", move || ops::close(fd))?.ok();
    }
    never_asked(&kit, victim)?;
    still_serves(&mut kit)
}

/// As when a name is replaced by a rename: the holder of a lease is not told, and no opener of the new file waits.
fn lease(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let fd = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    let taken = kit.run("lease", move || rare::lease(fd, true))?;
    ensure!(taken == Ok(()), "taking a lease gave {taken:?}");
    kit.settle()?;
    let victim = node(&kit, "f0")?;
    lose(&mut kit, &[victim])?;
    kit.tree.file(ROOT, "f0", b"the next one");
    let writer = open(&mut kit, "f0", OFlag::O_WRONLY)?;
    let back = kit.run("give it back", move || rare::lease(fd, false))?;
    ensure!(back == Ok(()), "giving the lease back gave {back:?}");
    for fd in [fd, writer] {
        kit.run("close", move || ops::close(fd))?.ok();
    }
    never_asked(&kit, victim)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn marks(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let inotify = rare::inotify()?;
    let raw = inotify.as_raw_fd();
    let old = kit.run_on("watch", "f0", move |p| rare::watch(raw, p))??;
    kit.settle()?;
    let victim = node(&kit, "f0")?;
    // Its number differs: the server took the lookups, so a FORGET must come once the mark lets go.
    let count = kit.tree.node(victim).nlookup;
    let recovered = kit.recover_with(&mut |tree, r| {
        let mut out = tree.attr_out(r.nodeid)?;
        out.attr.ino += 1;
        (r.nodeid == victim).then(|| Answer::of(&out))
    })?;
    ensure!(recovered.report.revoked == 1, "{:?}", recovered.report);
    kit.tree.node_mut(ROOT).children.clear();
    kit.tree.file(ROOT, "f0", b"the next one");
    rare::events(raw)?;
    let read = kit.run_on("read", "f0", ops::read_file)?;
    ensure!(read == Ok(b"the next one".to_vec()), "f0 reads {read:?}");
    let seen = rare::events(raw)?;
    ensure!(
        !seen.contains(&old),
        "the mark on the old file saw the new one"
    );
    let new = kit.run_on("watch", "f0", move |p| rare::watch(raw, p))??;
    ensure!(new != old, "the new file has the mark of the old one");
    kit.run_on("read", "f0", ops::read_file)?.ok();
    ensure!(
        rare::events(raw)?.contains(&new),
        "the mark on the new file sees nothing"
    );
    let forgotten = |kit: &Kit<'_>| -> u64 {
        let of_victim = kit.forgotten.iter().filter(|f| f.nodeid == victim);
        of_victim.map(|f| f.nlookup).sum()
    };
    ensure!(forgotten(&kit) == 0, "the mark did not hold the old inode");
    let done = kit.run("unwatch", move || rare::unwatch(raw, old))?;
    ensure!(done == Ok(()), "removing the mark gave {done:?}");
    kit.serve_until("FORGET of the old inode", |kit| Ok(forgotten(kit) == count))?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// The server gave the nodeid out again, with another generation: the kernel has two inodes of that number, and
/// only lookups of the second one count.
fn same_nodeid_forgets(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let old = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    kit.settle()?;
    let victim = node(&kit, "f0")?;
    lose(&mut kit, &[victim])?;
    let made = kit.tree.file(ROOT, "f0", b"successor");
    succeed(&mut kit, "f0", made, victim)?;
    // Each walk is a lookup.
    kit.tree.entry_valid = 0;
    for _ in 0..5 {
        let read = kit.run_on("read", "f0", ops::read_file)?;
        ensure!(read == Ok(b"successor".to_vec()), "f0 reads {read:?}");
    }
    let counted = kit.tree.node(victim).nlookup;
    ensure!(counted >= 5, "only {counted} lookups of the successor");
    kit.forgotten.clear();
    kit.run("close", move || ops::close(old))?.ok();
    kit.settle()?;
    ensure!(
        kit.forgotten.is_empty(),
        "closing the old file gave lookups of the new one back: {:?}",
        kit.forgotten
    );
    kit.check_counts()?;
    evict(&mut kit, victim)?;
    let given: u64 = kit.forgotten.iter().map(|f| f.nlookup).sum();
    ensure!(
        given == counted,
        "{counted} lookups of the successor, {given} given back"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn handle(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted_with(env, Config::with(init::EXPORT_SUPPORT))?;
    super::help::populate(&mut kit, 1)?;
    let mount = open(&mut kit, "", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let old = kit.run_on("name_to_handle_at", "f0", rare::name_to_handle)??;
    kit.settle()?;
    let victim = node(&kit, "f0")?;
    lose(&mut kit, &[victim])?;
    let by_old = old.clone();
    expect_errno(
        "the handle of a node that is no more",
        kit.run("open_by_handle_at", move || {
            rare::open_by_handle(mount, &by_old)
        })?,
        Errno::ESTALE,
    )?;
    // The same nodeid again: the generation tells them apart.
    let made = kit.tree.file(ROOT, "f0", b"successor");
    succeed(&mut kit, "f0", made, victim)?;
    for looked_up in [false, true] {
        let by_old = old.clone();
        expect_errno(
            &format!("the old handle, successor looked up: {looked_up}"),
            kit.run("open_by_handle_at", move || {
                rare::open_by_handle(mount, &by_old)
            })?,
            Errno::ESTALE,
        )?;
        let read = kit.run_on("read", "f0", ops::read_file)?;
        ensure!(read == Ok(b"successor".to_vec()), "f0 reads {read:?}");
    }
    let new = kit.run_on("name_to_handle_at", "f0", rare::name_to_handle)??;
    let fd = kit.run("open_by_handle_at", move || {
        rare::open_by_handle(mount, &new)
    })?;
    let fd = fd.context("the handle of the successor")?;
    let read = kit.run("pread", move || ops::pread(fd, 100, 0))?;
    ensure!(
        read == Ok(b"successor".to_vec()),
        "by handle it reads {read:?}"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn looked_up_meanwhile(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted(env)?;
    kit.tree.entry_valid = 0;
    super::help::populate(&mut kit, 1)?;
    let old = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    kit.settle()?;
    let victim = node(&kit, "f0")?;
    kit.restarted()?;
    let app = kit.on("read", "f0", ops::read_file)?;
    app.wait_asleep(kit.patience)?;
    let recovered =
        kit.recover_with(&mut |_, r| (r.nodeid == victim).then_some(Answer::Err(libc::ENOMEM)))?;
    ensure!(
        (recovered.report.revoked, recovered.report.held) == (1, 1),
        "{:?}",
        recovered.report
    );
    let read = kit.serve(&app)?;
    ensure!(
        read == Ok(b"content of 0".to_vec()),
        "what was looked up meanwhile reads {read:?}"
    );
    let read = kit.run("pread", move || ops::pread(old, 10, 0))?;
    expect_errno("the old descriptor", read, Errno::EIO)?;
    kit.run("close", move || ops::close(old))?.ok();
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// The server could not tell, for lack of memory, say, and finds the file later.
fn same_generation(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let old = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    kit.settle()?;
    let victim = node(&kit, "f0")?;
    let recovered =
        kit.recover_with(&mut |_, r| (r.nodeid == victim).then_some(Answer::Err(libc::ENOMEM)))?;
    ensure!(recovered.report.revoked == 1, "{:?}", recovered.report);
    let read = kit.run_on("read", "f0", ops::read_file)?;
    ensure!(
        read == Ok(b"content of 0".to_vec()),
        "looked up again f0 reads {read:?}"
    );
    let read = kit.run("pread", move || ops::pread(old, 10, 0))?;
    expect_errno("the old descriptor", read, Errno::EIO)?;
    kit.run("close", move || ops::close(old))?.ok();
    kit.check_counts()?;
    still_serves(&mut kit)
}
