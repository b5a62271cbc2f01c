// SPDX-License-Identifier: GPL-2.0
//! What a dead server said, consumed when the next one serves and has given its nodeid to another file: the count of the
//! first was void, so it may. Nothing of the other file may suffer.

use std::os::fd::RawFd;

use anyhow::{ensure, Context, Result};
use libc::{S_IFDIR, S_IFREG};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::help::{expect_errno, expect_report, open, populated, still_serves};
use super::lost::{drop_node, node, succeed};
use super::Scenario;
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::ops;
use crate::raw::trap::Trap;
use crate::raw::wire::{fopen, init, op, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "late/nodeid-reused",
            "a LOOKUP that a dead server answered says nothing of the file that has its nodeid by now",
            nodeid_reused,
        ),
        Scenario::series(
            "late/nodeid-reused-listed",
            "nor does a listing",
            nodeid_reused_listed,
        ),
        Scenario::series(
            "late/held-of-bad",
            "a held request of a file that was bad before does not get to the one that has its nodeid",
            held_of_bad,
        ),
        Scenario::series(
            "late/linked",
            "attributes that a dead server gave with a new link of a file are not those of the next",
            linked,
        ),
        Scenario::series(
            "late/listing",
            "what a dead server listed does not get into the cache of a directory",
            listing,
        ),
        Scenario::series(
            "late/listing-begun",
            "a cache that was begun with a dead server is begun anew, not given up",
            listing_begun,
        ),
        Scenario::series(
            "late/reference",
            "the last reference to an inode that an answer drops when all is over is not kept",
            reference,
        ),
    ]
}

/// The inode is counted by then, so the next server is shown it, and nothing else says that the answer is late.
fn linked(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let fd = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    kit.settle()?;
    let trap = Trap::arm("iget_counted")?;
    let (old, new) = (kit.path("f0"), kit.path("l0"));
    let app = kit.app("link", move || ops::link(&old, &new))?;
    kit.serve_until("the answer to LINK", |_| Ok(trap.stopped()))?;
    kit.recover()?;
    let file = kit.tree.child(ROOT, "f0").context("f0")?;
    kit.tree.node_mut(file).data = b"longer than what was there before".to_vec();
    trap.go();
    let result = kit.serve(&app)?;
    ensure!(result == Ok(()), "link gave {result:?}");
    // Not by its name, of which the server would be asked.
    let stat = kit.run("fstat", move || ops::fstat_cached(fd))?;
    let size = stat.context("fstat")?.stx_size;
    ensure!(size == 33, "f0 has {size} bytes, says a dead server");
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// How the file that has the nodeid by now differs.
const OTHERS: [(&str, bool, bool); 3] = [
    ("generation", true, false),
    ("type", false, true),
    ("both", true, true),
];

/// Gives the nodeid `old`, of which the kernel does not know yet, to a new file of this name in the root.
fn reuse(kit: &mut Kit<'_>, name: &str, old: u64, generation: bool, dir: bool) -> Result<()> {
    let was = kit.tree.node(old).generation;
    drop_node(kit, old);
    let mode = if dir {
        S_IFDIR | 0o755
    } else {
        S_IFREG | 0o644
    };
    let made = kit.tree.add(ROOT, name, mode, b"");
    succeed(kit, name, made, old)?;
    kit.tree.node_mut(old).generation = was + u64::from(generation);
    Ok(())
}

/// The file is what it was when it was opened.
fn still_good(kit: &mut Kit<'_>, fd: RawFd, what: &str) -> Result<()> {
    let stat = kit.run("fstat", move || ops::fstat(fd).map(drop))?;
    ensure!(
        stat == Ok(()),
        "{what}: a good file gives {stat:?}, on the word of a dead server"
    );
    Ok(())
}

fn nodeid_reused(env: &Env<'_>) -> Result<()> {
    for (what, generation, dir) in OTHERS {
        let mut kit = populated(env, 3)?;
        let cold = kit.tree.file(ROOT, "cold", b"");
        let trap = Trap::arm("lookup_answered")?;
        let app = kit.on("stat", "cold", |p| ops::stat(p).map(drop))?;
        let m = kit.until_op(op::LOOKUP)?;
        kit.answer(&m)?;
        trap.wait(kit.patience)?;
        let recovered = kit.recover()?;
        ensure!(
            recovered.replays.iter().all(|r| r.nodeid != cold),
            "node {cold} was replayed, so nobody may use its number again"
        );
        reuse(&mut kit, "reused", cold, generation, dir)?;
        kit.tree.file(ROOT, "cold", b"");
        let fd = open(&mut kit, "reused", OFlag::O_RDONLY)?;
        trap.go();
        let result = kit.serve(&app)?;
        ensure!(result == Ok(()), "stat under way gave {result:?}");
        still_good(&mut kit, fd, what)?;
        kit.check_counts()?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn nodeid_reused_listed(env: &Env<'_>) -> Result<()> {
    for (what, generation, dir) in OTHERS {
        let mut kit = Kit::granted_with(env, Config::with(init::DO_READDIRPLUS))?;
        let cold = kit.tree.file(ROOT, "cold", b"");
        let trap = Trap::arm("plus_answered")?;
        let app = kit.on("list", "", ops::listdir)?;
        let m = kit.until_op(op::READDIRPLUS)?;
        kit.answer(&m)?;
        trap.wait(kit.patience)?;
        kit.recover()?;
        // Under the same name, so that the listing comes to it.
        reuse(&mut kit, "cold", cold, generation, dir)?;
        let fd = open(&mut kit, "cold", OFlag::O_RDONLY)?;
        trap.go();
        let names = kit.serve(&app)?;
        ensure!(names == Ok(vec!["cold".into()]), "{what}: {names:?}");
        still_good(&mut kit, fd, what)?;
        kit.check_counts()?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

/// It is the server itself that says so before it dies: nothing is revoked in the recovery.
fn held_of_bad(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let f0 = node(&kit, "f0")?;
    let fd = open(&mut kit, "f0", OFlag::O_WRONLY)?;
    let write = kit.app("write", move || ops::pwrite(fd, b"lost", 0))?;
    kit.until_op(op::WRITE)?;
    reuse(&mut kit, "successor", f0, true, false)?;
    let stat = kit.run_on("stat", "successor", |p| ops::stat(p).map(drop))?;
    ensure!(stat == Ok(()), "stat of the successor gave {stat:?}");
    kit.served.clear();
    let recovered = kit.recover()?;
    expect_report(&recovered, 0)?;
    ensure!(recovered.report.held > 0, "the WRITE was not held");
    let result = kit.serve(&write)?;
    let asked = kit.served.iter().find(|m| m.is(op::WRITE));
    ensure!(
        asked.is_none() && kit.tree.node(f0).data.is_empty(),
        "what was written to a file that is gone went to another: {asked:?}"
    );
    expect_errno("write", result, Errno::EIO)?;
    still_serves(&mut kit)
}

/// A mount whose directories are cached, with a directory of some files.
fn with_cache<'a>(env: &'a Env<'a>, files: u32) -> Result<(Kit<'a>, u64)> {
    let mut kit = Kit::granted(env)?;
    kit.tree.open_flags = fopen::KEEP_CACHE | fopen::CACHE_DIR;
    let dir = kit.tree.dir(ROOT, "d");
    for i in 0..files {
        kit.tree.file(dir, &format!("entry-number-{i:03}"), b"");
    }
    Ok((kit, dir))
}

fn listing(env: &Env<'_>) -> Result<()> {
    let (mut kit, dir) = with_cache(env, 3)?;
    let trap = Trap::arm("readdir_answered")?;
    let late = kit.on("list", "d", ops::listdir)?;
    let m = kit.until_op(op::READDIR)?;
    kit.answer(&m)?;
    trap.wait(kit.patience)?;
    let gone = kit
        .tree
        .child(dir, "entry-number-000")
        .context("made above")?;
    drop_node(&mut kit, gone);
    kit.tree.node_mut(dir).mtime += 100;
    kit.recover()?;
    // One that begins the cache, and waits for its server.
    let now = kit.on("list", "d", ops::listdir)?;
    let m = kit.until_op(op::READDIR)?;
    trap.go();
    kit.serve(&late)?.context("the late listing")?;
    kit.answer(&m)?;
    let wanted = Ok(vec!["entry-number-001".into(), "entry-number-002".into()]);
    let names = kit.serve(&now)?;
    ensure!(names == wanted, "the listing under way has {names:?}");
    let names = kit.run_on("list", "d", ops::listdir)?;
    ensure!(names == wanted, "the next listing has {names:?}");
    still_serves(&mut kit)
}

fn listing_begun(env: &Env<'_>) -> Result<()> {
    let (mut kit, _) = with_cache(env, 300)?;
    let fd = open(&mut kit, "d", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let some = kit.run("getdents", move || crate::raw::rare::getdents(fd, 512))??;
    ensure!((1..200).contains(&some.len()), "{} names", some.len());
    kit.recover()?;
    for _ in 0..2 {
        kit.served.clear();
        let names = kit.run_on("list", "d", ops::listdir)?.context("list")?;
        ensure!(names.len() == 300, "{} names", names.len());
    }
    let asked = kit.served.iter().filter(|m| m.is(op::READDIR)).count();
    ensure!(
        asked == 0,
        "{asked} READDIRs for the second listing: what a dead server began was never completed"
    );
    still_serves(&mut kit)
}

/// The writer of an answer stops when nothing waits for it any more, and its inode loses all others who hold it.
fn reference(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let f1 = kit.tree.child(ROOT, "f1").context("f1")?;
    kit.restarted()?;
    kit.confirm_root()?;
    let (m, replay) = loop {
        let (m, replay) = kit.next_replay()?;
        if replay.nodeid == f1 {
            break (m, replay);
        }
        kit.confirm(&m, &replay)?;
    };
    let trap = Trap::arm("write_settled")?;
    let dev = kit.dev.duplicate()?;
    let out = kit.tree.attr_out(replay.nodeid).context("attributes")?;
    let writer = kit.app("an answer", move || {
        dev.reply_ok(m.unique(), zerocopy::IntoBytes::as_bytes(&out))
    })?;
    trap.wait(kit.patience)?;
    kit.recover()?;
    let unlinked = kit.run_on("unlink", "f1", ops::unlink)?;
    ensure!(unlinked == Ok(()), "unlink gave {unlinked:?}");
    kit.serve_until("what unlink leaves behind", |kit| Ok(!kit.readable()?))?;
    ensure!(
        kit.tree.nodes.contains_key(&f1),
        "the inode is gone already: the answer has no reference to it"
    );
    trap.go();
    writer.finish(kit.patience)?.context("the answer")?;
    kit.serve_until("the FORGET of who had the last reference", |kit| {
        Ok(!kit.tree.nodes.contains_key(&f1))
    })?;
    kit.check_counts()?;
    still_serves(&mut kit)
}
