// SPDX-License-Identifier: GPL-2.0
//! What a held request is answered: it was asked for before the recovery, but whoever answered came after it, and is
//! believed. The opposite, answers of the dead server that are consumed late, is in [`super::late`] and
//! [`super::stale`].

use std::os::fd::RawFd;
use std::path::Path;

use anyhow::{ensure, Result};
use libc::{S_IFDIR, S_IFREG};
use nix::fcntl::OFlag;

use super::help::{open, still_serves};
use super::lost::{as_user, node};
use super::Scenario;
use crate::raw::app::App;
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::ops::{self, Done};
use crate::raw::rare;
use crate::raw::wire::{init, op, ROOT};

/// Starts the application whose request is held; f0 is open under the descriptor.
type Ask = fn(&mut Kit<'_>, RawFd) -> Result<App<Done<()>>>;

struct Held {
    name: &'static str,
    guards: &'static str,
    opcode: u32,
    ask: Ask,
    /// What f0 is then, as the new server says.
    mode: u32,
}

const CHANGED: u32 = S_IFREG | 0o604;

const HELD: [Held; 4] = [
    Held {
        name: "getattr",
        guards: "the answer to a held GETATTR is kept, and nobody has to ask again",
        opcode: op::GETATTR,
        ask: |kit, fd| kit.app("fstat", move || ops::fstat(fd).map(drop)),
        mode: CHANGED,
    },
    Held {
        name: "setattr",
        guards: "the same for a held SETATTR",
        opcode: op::SETATTR,
        ask: |kit, fd| kit.app("fchmod", move || rare::fchmod(fd, 0o640)),
        mode: S_IFREG | 0o640,
    },
    Held {
        name: "lookup",
        guards: "the same for a held LOOKUP of a name that was cached",
        opcode: op::LOOKUP,
        ask: |kit, _| kit.on("open", "f0", |p| ops::open(p, OFlag::O_PATH).map(drop)),
        mode: CHANGED,
    },
    Held {
        name: "readdirplus",
        guards: "the same for what a held READDIRPLUS says of a name that was cached",
        opcode: op::READDIRPLUS,
        ask: |kit, _| kit.on("list", "", |p| ops::listdir(p).map(drop)),
        mode: CHANGED,
    },
];

pub fn scenarios() -> Vec<Scenario> {
    let mut all: Vec<Scenario> = HELD
        .iter()
        .map(|held| {
            Scenario::series(format!("answer/{}", held.name), held.guards, |env| {
                believed(env, held)
            })
        })
        .collect();
    all.push(Scenario::series(
        "answer/permission",
        "a walk whose GETATTR is held goes by what the new server answers",
        permission,
    ));
    for (name, off) in [("async", 0), ("sync", init::ASYNC_READ)] {
        all.push(Scenario::series(
            format!("answer/short-read-{name}"),
            "a held READ of what the new server does not have reads nothing, not zeros",
            move |env| short_read(env, off),
        ));
    }
    all
}

fn believed(env: &Env<'_>, held: &Held) -> Result<()> {
    let mut kit = Kit::granted_with(env, Config::with(init::DO_READDIRPLUS))?;
    kit.tree.attr_valid = u64::MAX;
    kit.tree.entry_valid = 0;
    let file = kit.tree.file(ROOT, "f0", b"content");
    let fd = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    kit.settle()?;
    let app = (held.ask)(&mut kit, fd)?;
    kit.until_op(held.opcode)?;
    kit.tree.node_mut(file).mode = CHANGED;
    kit.recover()?;
    let result = kit.serve(&app)?;
    ensure!(result == Ok(()), "{} gave {result:?}", app.what);
    kit.settle()?;
    kit.served.clear();
    let mode = kit.run("fstat", move || {
        ops::fstat_cached(fd).map(|s| u32::from(s.stx_mode))
    })?;
    ensure!(
        mode == Ok(held.mode),
        "the mode is {mode:?}, not {:o}",
        held.mode
    );
    let asked = kit.served.iter().find(|m| m.is(op::GETATTR));
    ensure!(
        asked.is_none(),
        "what the new server had answered was not kept: it was asked again"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// What the kernel checks is what it keeps: `stat(2)` would show the answer in any case.
fn permission(env: &Env<'_>) -> Result<()> {
    let config = Config {
        options: "default_permissions",
        ..Config::default()
    };
    let mut kit = Kit::granted_with(env, config)?;
    kit.tree.attr_valid = u64::MAX;
    kit.tree.entry_valid = u64::MAX;
    let dir = kit.tree.dir(ROOT, "d");
    kit.tree.file(dir, "x", b"");
    kit.tree.node_mut(dir).mode = S_IFDIR | 0o700;
    kit.run_on("stat", "d", ops::stat)??;
    kit.run_on("stat", "d/x", ops::stat_cached)??;
    kit.settle()?;
    let inside = kit.path("d");
    let app = kit.app("a user's stat of d/x", move || {
        as_user(&inside, 1000, || ops::stat_cached(Path::new("x"))).map(drop)
    })?;
    // A denial is checked with the server first.
    let m = kit.until_op(op::GETATTR)?;
    ensure!(m.nodeid() == dir, "asked for {m}, not for the directory");
    kit.tree.node_mut(dir).mode = S_IFDIR | 0o755;
    kit.recover()?;
    let result = kit.serve(&app)?;
    ensure!(
        result == Ok(()),
        "a walk that the new mode allows gave {result:?}"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// The file became shorter while there was no server.
/// Twenty times: who reads may also be told the new size in another way, it depends on who runs when, and five were
/// not always enough to notice the mutant.
fn short_read(env: &Env<'_>, off: u64) -> Result<()> {
    (0..20).try_for_each(|_| short_read_once(env, off))
}

fn short_read_once(env: &Env<'_>, off: u64) -> Result<()> {
    const PAGE: i64 = 4096;
    let mut config = Config::default();
    config.flags &= !off;
    let mut kit = Kit::granted_with(env, config)?;
    // Nobody asks for the size before the read.
    kit.tree.attr_valid = u64::MAX;
    kit.tree.file(ROOT, "f0", &[b'x'; 3 * PAGE as usize]);
    let file = node(&kit, "f0")?;
    let fd = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    kit.settle()?;
    let app = kit.app("pread", move || ops::pread(fd, PAGE as usize, 2 * PAGE))?;
    kit.until_op(op::READ)?;
    kit.tree.node_mut(file).data.truncate(PAGE as usize);
    kit.recover()?;
    let read = kit.serve(&app)?;
    ensure!(
        read.as_ref().is_ok_and(Vec::is_empty),
        "reading behind the end gave {:?} bytes",
        read.map(|r| r.len())
    );
    let read = kit.run_on("read", "f0", ops::read_file)?;
    ensure!(
        read == Ok(vec![b'x'; PAGE as usize]),
        "the file has {:?} bytes",
        read.map(|r| r.len())
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}
