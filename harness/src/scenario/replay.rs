// SPDX-License-Identifier: GPL-2.0
//! The replay: every cached inode once, with generation and count; verdicts; who is revoked and who is not.

use std::os::fd::AsFd;

use anyhow::{ensure, Context, Result};
use libc::{S_IFDIR, S_IFREG};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::help::{expect_errno, expect_report, open, populate, populated, still_serves};
use super::Scenario;
use crate::raw::app::{faults_kill, Proc};
use crate::raw::dev::poll_one;
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::ops;
use crate::raw::recover::Recovered;
use crate::raw::tree::{Answer, Tree};
use crate::raw::wire::{Attr, AttrOut, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    let lie = |name: &str, guards, change: fn(&mut Attr)| {
        Scenario::series(format!("replay/{name}"), guards, move |env| {
            lying(env, change)
        })
    };
    vec![
        Scenario::series(
            "replay/empty",
            "a mount nobody has used recovers by its root alone",
            empty,
        ),
        Scenario::series(
            "replay/exact-set",
            "exactly the cached inodes are shown, with generation and count",
            exact_set,
        ),
        Scenario::series(
            "replay/thousands",
            "a window smaller than the set comes to its end",
            thousands,
        ),
        Scenario::series("replay/window", "replays in flight are bounded", window),
        Scenario::series(
            "replay/any-order",
            "answers may come in any order",
            any_order,
        ),
        Scenario::series(
            "replay/failing",
            "an error revokes that inode, no other, and no FORGET follows",
            failing,
        ),
        Scenario::series(
            "replay/every-error",
            "whatever the errno (ENOTCONN too) it is the server's answer",
            every_error,
        ),
        Scenario::series(
            "replay/reused-nodeid",
            "the same nodeid may return with a new generation",
            reused,
        ),
        lie(
            "wrong-type",
            "another type revokes; FORGET gives the lookups back",
            |a| a.mode = S_IFDIR | 0o755,
        ),
        lie(
            "wrong-ino",
            "another inode number revokes; FORGET gives the lookups back",
            |a| a.ino += 1,
        ),
        lie(
            "invalid-mode",
            "an invalid attribute revokes; FORGET gives the lookups back",
            |a| a.mode = 0o644,
        ),
        lie(
            "invalid-size",
            "an impossible size revokes; FORGET gives the lookups back",
            |a| a.size = u64::MAX,
        ),
        Scenario::series(
            "replay/short-answer",
            "an answer of the wrong length is a failed replay",
            short_answer,
        ),
        Scenario::series(
            "replay/attributes",
            "no attribute of a replay is applied",
            attributes,
        ),
        Scenario::series(
            "replay/page-cache",
            "pages of a revoked inode are gone, of a confirmed one kept",
            page_cache,
        ),
        Scenario::series(
            "replay/mmap",
            "a mapping of a revoked file is torn down",
            mapping,
        ),
        Scenario::series(
            "replay/all-revoked",
            "every inode but the root may be lost",
            all_revoked,
        ),
        Scenario::series(
            "replay/bad-already",
            "an inode that is bad is not shown again",
            bad_already,
        ),
    ]
}

fn empty(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted(env)?;
    let recovered = kit.check_counts()?;
    ensure!(
        recovered.replays.len() == 1,
        "{} replays on an unused mount",
        recovered.replays.len()
    );
    expect_report(&recovered, 0)?;
    still_serves(&mut kit)
}

fn exact_set(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 10)?;
    let dir = kit.tree.dir(ROOT, "d");
    let sub = kit.tree.dir(dir, "sub");
    kit.tree.file(sub, "deep", b"");
    kit.tree.symlink(ROOT, "link", "f0");
    kit.tree.file(ROOT, "never-looked-at", b"");
    let looked = kit.run_on("stat", "d/sub/deep", ops::stat)?.is_ok()
        && kit.run_on("readlink", "link", ops::readlink)?.is_ok();
    ensure!(looked, "the set-up failed");
    // Several lookups of one inode: a second name, and names that may not be kept.
    kit.tree.entry_valid = 0;
    ensure!(
        kit.run("link f1 f1b", {
            let (a, b) = (kit.path("f1"), kit.path("f1b"));
            move || ops::link(&a, &b)
        })? == Ok(())
    );
    for _ in 0..3 {
        ensure!(kit.run_on("stat", "f1b", ops::stat)?.is_ok(), "stat f1b");
    }
    ensure!(
        kit.run_on("unlink", "f2", ops::unlink)? == Ok(()),
        "unlink f2"
    );
    let fd = open(&mut kit, "f3", OFlag::O_RDONLY)?;
    ensure!(
        kit.run_on("unlink", "f3", ops::unlink)? == Ok(()),
        "unlink f3"
    );
    let recovered = kit.check_counts()?;
    expect_report(&recovered, 0)?;
    ensure!(
        recovered.replays.iter().any(|r| r.nlookup > 2),
        "no inode had more than two lookups: {:?}",
        recovered.shown()
    );
    let read = kit.run("read the unlinked file", move || ops::pread(fd, 100, 0))?;
    ensure!(
        read == Ok(b"content of 3".to_vec()),
        "the unlinked file reads {read:?}"
    );
    still_serves(&mut kit)
}

fn thousands(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3000)?;
    let recovered = kit.check_counts()?;
    ensure!(
        recovered.replays.len() == 3001,
        "{} replays",
        recovered.replays.len()
    );
    expect_report(&recovered, 0)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn window(env: &Env<'_>) -> Result<()> {
    let n = 2000;
    let mut kit = populated(env, n)?;
    kit.restarted()?;
    kit.confirm_root()?;
    // Take what comes without answering, until nothing comes any more.
    let mut taken = Vec::new();
    while kit
        .dev
        .poll(
            nix::poll::PollFlags::POLLIN,
            std::time::Duration::from_millis(500),
        )?
        .contains(nix::poll::PollFlags::POLLIN)
    {
        taken.push(kit.next_replay()?);
        ensure!(taken.len() < n, "all {n} replays were sent at once");
    }
    ensure!(
        taken.len() <= 64,
        "{} replays are in flight at once",
        taken.len()
    );
    ensure!(
        taken.len() >= 2,
        "only {} replay in flight: nothing is gained by a second thread",
        taken.len()
    );
    for (m, replay) in &taken {
        kit.confirm(m, replay)?;
    }
    let mut recovered = kit_rest(&mut kit, taken.len())?;
    ensure!(
        recovered.report.replayed == n as u64 + 1,
        "{} replayed",
        recovered.report.replayed
    );
    recovered.replays.extend(taken.iter().map(|t| t.1));
    kit.commit(&recovered)?;
    still_serves(&mut kit)
}

/// The rest of a recovery whose root was already answered.
fn kit_rest(kit: &mut Kit<'_>, before: usize) -> Result<Recovered> {
    let mut replays = vec![];
    loop {
        let m = kit.next()?;
        if let Some(report) = m.report(kit.cookie()) {
            return Ok(Recovered::of(replays, report));
        }
        let replay = m
            .replay()
            .with_context(|| format!("{m} after {before} replays"))?;
        kit.confirm(&m, &replay)?;
        replays.push(replay);
    }
}

fn any_order(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 200)?;
    let mut rng = crate::raw::wait::Rng(env.seed);
    kit.restarted()?;
    let root = kit.confirm_root()?;
    let mut open = Vec::new();
    let mut replays = vec![root];
    let report = loop {
        // Hold back up to five, answer a random one of them.
        while open.len() < 5 && replays.len() + open.len() < 201 {
            open.push(kit.next_replay()?);
        }
        if open.is_empty() {
            let m = kit.next()?;
            break m
                .report(kit.cookie())
                .with_context(|| format!("expected the report, got {m}"))?;
        }
        let (m, replay) = open.swap_remove(rng.below(open.len()));
        kit.confirm(&m, &replay)?;
        replays.push(replay);
    };
    kit.commit(&Recovered::of(replays, report))?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// Revokes `f1` of three by `answer`; returns after COMMIT with descriptors of all three.
fn revoke<'a>(
    env: &'a Env<'a>,
    answer: impl Fn(&Tree, u64) -> Answer,
) -> Result<(Kit<'a>, u64, [i32; 3])> {
    let mut kit = populated(env, 3)?;
    let fds = [
        open(&mut kit, "f0", OFlag::O_RDWR)?,
        open(&mut kit, "f1", OFlag::O_RDWR)?,
        open(&mut kit, "f2", OFlag::O_RDWR)?,
    ];
    kit.settle()?;
    let victim = kit.tree.child(ROOT, "f1").context("f1")?;
    let recovered = kit.recover_with(&mut |tree, replay| {
        (replay.nodeid == victim).then(|| answer(tree, victim))
    })?;
    expect_report(&recovered, 1)?;
    Ok((kit, victim, fds))
}

/// The old descriptor of `f1` is dead, everything else lives.
fn only_the_victim(kit: &mut Kit<'_>, fds: [i32; 3]) -> Result<()> {
    kit.wait_serving()?;
    for (i, fd) in fds.iter().copied().enumerate() {
        let read = kit.run("pread", move || ops::pread(fd, 100, 0))?;
        let stat = kit.run("fstat", move || ops::fstat(fd).map(|s| s.stx_size))?;
        let write = kit.run("pwrite", move || ops::pwrite(fd, b"C", 0))?;
        if i == 1 {
            expect_errno("reading the revoked file", read, Errno::EIO)?;
            expect_errno("fstat of the revoked file", stat, Errno::EIO)?;
            expect_errno("writing the revoked file", write, Errno::EIO)?;
        } else {
            ensure!(
                read.is_ok() && stat.is_ok() && write == Ok(1),
                "f{i} was not revoked, yet: {read:?}, {stat:?}, {write:?}"
            );
        }
    }
    Ok(())
}

fn failing(env: &Env<'_>) -> Result<()> {
    let (mut kit, victim, fds) = revoke(env, |_, _| Answer::Err(libc::ENOENT))?;
    only_the_victim(&mut kit, fds)?;
    let new = kit.tree.file(ROOT, "f1", b"another file");
    let read = kit.run_on("read", "f1", ops::read_file)?;
    ensure!(
        read == Ok(b"another file".to_vec()),
        "the fresh lookup of f1 reads {read:?}"
    );
    ensure!(kit.tree.node(new).nlookup > 0, "f1 was not looked up again");
    // Close the revoked one: RELEASE still comes, FORGET must not, for the server's count belongs to nobody.
    kit.run("close", move || ops::close(fds[1]))?.ok();
    kit.check_counts()?;
    ensure!(
        !kit.forgotten.iter().any(|f| f.nodeid == victim),
        "a FORGET of node {victim} followed its failed replay"
    );
    still_serves(&mut kit)
}

fn every_error(env: &Env<'_>) -> Result<()> {
    for errno in [
        libc::ENOTCONN,
        libc::ECONNABORTED,
        libc::EINTR,
        libc::ESTALE,
        libc::ENOMEM,
        libc::EAGAIN,
        libc::ENOSYS,
        libc::EIO,
    ] {
        let (mut kit, _, fds) =
            revoke(env, |_, _| Answer::Err(errno)).with_context(|| format!("errno {errno}"))?;
        only_the_victim(&mut kit, fds).with_context(|| format!("errno {errno}"))?;
    }
    Ok(())
}

fn reused(env: &Env<'_>) -> Result<()> {
    let (mut kit, victim, fds) = revoke(env, |_, _| Answer::Err(libc::ESTALE))?;
    // The successor lives under the very same node id.
    kit.tree.nodes.remove(&victim);
    let new = kit.tree.file(ROOT, "f1", b"successor");
    let mut node = kit.tree.nodes.remove(&new).context("just made")?;
    node.generation = 5000;
    kit.tree.nodes.insert(victim, node);
    kit.tree.node_mut(ROOT).children.insert("f1".into(), victim);
    let read = kit.run_on("read", "f1", ops::read_file)?;
    ensure!(
        read == Ok(b"successor".to_vec()),
        "the successor reads {read:?}"
    );
    expect_errno(
        "the old descriptor",
        kit.run("pread", move || ops::pread(fds[1], 10, 0))?,
        Errno::EIO,
    )?;
    kit.run("close", move || ops::close(fds[1]))?.ok();
    kit.check_counts()?;
    let again = kit.run_on("read", "f1", ops::read_file)?;
    ensure!(
        again == Ok(b"successor".to_vec()),
        "after another recovery the successor reads {again:?}"
    );
    Ok(())
}

fn lying(env: &Env<'_>, change: fn(&mut Attr)) -> Result<()> {
    let (mut kit, victim, fds) = revoke(env, |tree, id| {
        let mut out = tree.attr_out(id).expect("the victim exists");
        change(&mut out.attr);
        Answer::of(&out)
    })?;
    only_the_victim(&mut kit, fds)?;
    let count = kit.tree.node(victim).nlookup;
    ensure!(count > 0, "the server took the replay, so it counts");
    kit.run("close", move || ops::close(fds[1]))?.ok();
    // f1 is looked up again, so that the old dentry goes and with it the old inode.
    let read = kit.run_on("read", "f1", ops::read_file)?;
    ensure!(read.is_ok(), "the fresh lookup of f1 reads {read:?}");
    kit.serve_until("FORGET of the revoked inode", |kit| {
        Ok(kit
            .forgotten
            .iter()
            .filter(|f| f.nodeid == victim)
            .map(|f| f.nlookup)
            .sum::<u64>()
            >= count)
    })?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn short_answer(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let fd = open(&mut kit, "f1", OFlag::O_RDONLY)?;
    kit.settle()?;
    let victim = kit.tree.child(ROOT, "f1");
    kit.restarted()?;
    let mut replays = vec![];
    let report = loop {
        let m = kit.next()?;
        if let Some(report) = m.report(kit.cookie()) {
            break report;
        }
        let replay = m
            .replay()
            .with_context(|| format!("expected a replay, got {m}"))?;
        if Some(replay.nodeid) == victim {
            expect_errno(
                "an answer that is too short",
                kit.dev.reply_ok(m.unique(), &[0; 40]),
                Errno::EINVAL,
            )?;
        } else {
            kit.confirm(&m, &replay)?;
        }
        replays.push(replay);
    };
    ensure!((report.replayed, report.revoked) == (4, 1), "{report:?}");
    kit.commit(&Recovered::of(replays, report))?;
    expect_errno(
        "pread",
        kit.run("pread", move || ops::pread(fd, 10, 0))?,
        Errno::EIO,
    )
}

fn attributes(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let f0 = kit.tree.child(ROOT, "f0").context("f0")?;
    kit.recover_with(&mut |tree, replay| {
        let mut out: AttrOut = tree.attr_out(replay.nodeid)?;
        out.attr.size = 999_999;
        out.attr.mode = (out.attr.mode & !0o7777) | 0o111;
        Some(Answer::of(&out))
    })?;
    let stat = kit
        .run_on("stat", "f0", ops::stat_cached)?
        .context("stat")?;
    let wanted = (
        kit.tree.node(f0).data.len() as u64,
        (S_IFREG | 0o644) as u16,
    );
    ensure!(
        (stat.stx_size, stat.stx_mode) == wanted,
        "size {} and mode {:o} come from the replay",
        stat.stx_size,
        stat.stx_mode
    );
    Ok(())
}

fn page_cache(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted(env)?;
    kit.tree.open_flags = 1 << 1; // FOPEN_KEEP_CACHE
    populate(&mut kit, 2)?;
    let fds = [
        open(&mut kit, "f0", OFlag::O_RDONLY)?,
        open(&mut kit, "f1", OFlag::O_RDONLY)?,
    ];
    for fd in fds {
        ensure!(
            kit.run("pread", move || ops::pread(fd, 10, 0))?.is_ok(),
            "the first read"
        );
    }
    kit.settle()?;
    let victim = kit.tree.child(ROOT, "f1");
    kit.recover_with(&mut |_, r| (Some(r.nodeid) == victim).then_some(Answer::Err(libc::ESTALE)))?;
    kit.wait_serving()?;
    expect_errno(
        "cached pages of the revoked file",
        kit.run("pread", move || ops::pread(fds[1], 10, 0))?,
        Errno::EIO,
    )?;
    let read = kit.run("pread", move || ops::pread(fds[0], 10, 0))?;
    ensure!(
        read == Ok(b"content of".to_vec()),
        "the confirmed file reads {read:?}"
    );
    Ok(())
}

/// A process that has a page of the file mapped, and touched it, must not see the old bytes for ever: the page is
/// taken away from it, and its next touch is SIGBUS.
fn mapping(env: &Env<'_>) -> Result<()> {
    use nix::sys::mman::{mmap, MapFlags, ProtFlags};
    use nix::sys::signal::Signal;
    use nix::sys::wait::WaitStatus;
    let mut kit = populated(env, 2)?;
    let (path, patience) = (kit.path("f1"), kit.patience);
    let (mapped, tell_mapped) = nix::unistd::pipe()?;
    let mut child = Proc::spawn("a process with a mapping", &[kit.dev.raw()], || {
        faults_kill();
        let Ok(file) = std::fs::File::open(&path) else {
            return 10;
        };
        let length = std::num::NonZeroUsize::new(4096).expect("not zero");
        // SAFETY: a fresh mapping chosen by the kernel, only read, through volatile reads.
        let at = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ,
                MapFlags::MAP_SHARED,
                &file,
                0,
            )
        };
        let Ok(at) = at else { return 11 };
        // SAFETY: the page is mapped and the file is not empty.
        let look = || unsafe { at.as_ptr().cast::<u8>().read_volatile() };
        if look() != b'c' {
            return 12;
        }
        let _ = nix::unistd::write(&tell_mapped, b"!");
        let deadline = std::time::Instant::now() + 2 * patience;
        while std::time::Instant::now() < deadline {
            // No new fault: the page is in this process's own table until somebody takes it out.
            if look() != b'c' {
                return 13;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        14
    })?;
    kit.serve_until("the file to be mapped", |_| {
        let events = nix::poll::PollFlags::POLLIN;
        let ready = poll_one(mapped.as_fd(), events, std::time::Duration::ZERO)?;
        Ok(ready.contains(events))
    })?;
    let victim = kit.tree.child(ROOT, "f1");
    kit.recover_with(&mut |_, r| (Some(r.nodeid) == victim).then_some(Answer::Err(libc::ESTALE)))?;
    // It dies of the fault while we serve what its end sends.
    kit.serve_until("the mapped page of the revoked file to go", |_| {
        child.ended()
    })?;
    let status = child.wait(patience)?;
    ensure!(
        matches!(status, WaitStatus::Signaled(_, Signal::SIGBUS, _)),
        "the process with the mapping ended with {status:?}, not SIGBUS"
    );
    still_serves(&mut kit)
}

fn all_revoked(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 50)?;
    let recovered =
        kit.recover_with(&mut |_, r| (r.nodeid != ROOT).then_some(Answer::Err(libc::ESTALE)))?;
    expect_report(&recovered, 50)?;
    for node in kit.tree.nodes.iter_mut().filter(|(id, _)| **id != ROOT) {
        node.1.generation += 10_000;
        node.1.nlookup = 0;
    }
    let read = kit.run_on("read", "f7", ops::read_file)?;
    ensure!(
        read == Ok(b"content of 7".to_vec()),
        "f7 under its new generation reads {read:?}"
    );
    still_serves(&mut kit)?;
    kit.check_counts()?;
    Ok(())
}

fn bad_already(env: &Env<'_>) -> Result<()> {
    let (mut kit, victim, fds) = revoke(env, |_, _| Answer::Err(libc::ESTALE))?;
    only_the_victim(&mut kit, fds)?;
    // Node and name are gone on the server; the kernel still holds the bad inode by the open descriptor.
    kit.tree
        .node_mut(ROOT)
        .children
        .remove(std::ffi::OsStr::new("f1"));
    kit.tree.nodes.remove(&victim);
    let recovered = kit.check_counts()?;
    ensure!(
        !recovered.replays.iter().any(|r| r.nodeid == victim),
        "the bad inode was shown again"
    );
    expect_report(&recovered, 0)
}
