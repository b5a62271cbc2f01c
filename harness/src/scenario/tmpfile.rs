// SPDX-License-Identifier: GPL-2.0
//! Files without a name (`O_TMPFILE`), made while the server dies: there is no name by which to ask again.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::help::{expect_errno, expect_resent, populated, still_serves};
use super::late::{consumed_in, WHEN};
use super::Scenario;
use crate::raw::app::App;
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::msg::Message;
use crate::raw::ops::{self, Done};
use crate::raw::trap::Trap;
use crate::raw::wire::{op, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "tmpfile/in-flight",
            "an O_TMPFILE that was not answered, or begun while requests are held, makes one file that can be used",
            in_flight,
        ),
        Scenario::series(
            "tmpfile/answered",
            "one whose answer nobody had consumed is EIO in any phase, asks for no name and leaves nothing behind",
            answered,
        ),
    ]
}

fn tmpfile(dir: &Path) -> Done<RawFd> {
    ops::open(dir, OFlag::O_TMPFILE | OFlag::O_RDWR)
}

/// Where the request is when the server dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Crash {
    Unread,
    Read,
    /// It was executed, and not answered.
    Executed,
    /// It is begun only then.
    Begun,
}

fn in_flight(env: &Env<'_>) -> Result<()> {
    for crash in [Crash::Unread, Crash::Read, Crash::Executed, Crash::Begun] {
        flight(env, crash).with_context(|| format!("{crash:?}"))?;
    }
    Ok(())
}

fn flight(env: &Env<'_>, crash: Crash) -> Result<()> {
    let mut kit = populated(env, 2)?;
    if crash == Crash::Begun {
        kit.restarted()?;
    }
    let app = kit.parked(
        "O_TMPFILE in",
        "",
        1 + u64::from(crash == Crash::Begun),
        tmpfile,
    )?;
    let old = match crash {
        Crash::Read | Crash::Executed => Some(kit.until_op(op::TMPFILE)?),
        Crash::Unread | Crash::Begun => None,
    };
    if let Some(m) = old.as_ref().filter(|_| crash == Crash::Executed) {
        kit.tree.apply(m)?;
    }
    let held = match crash {
        Crash::Begun => {
            let recovered = kit.answer_replays(&mut |_, _| None)?;
            kit.commit(&recovered)?;
            recovered.report.held
        }
        _ => kit.recover()?.report.held,
    };
    ensure!(held == 1, "{held} held");
    let new = kit.until_op(op::TMPFILE)?;
    if let Some(old) = &old {
        expect_resent(&kit, old, &new)?;
    }
    let node = kit.tree.next;
    kit.answer(&new)?;
    let fd = kit.serve(&app)?.context("O_TMPFILE")?;
    usable(&mut kit, node, fd)
}

/// The file can be written, survives another server, gets a name, and goes when nobody has it.
fn usable(kit: &mut Kit<'_>, node: u64, fd: RawFd) -> Result<()> {
    let wrote = kit.run("write", move || ops::pwrite(fd, b"nameless", 0))?;
    ensure!(wrote == Ok(8), "write: {wrote:?}");
    let recovered = kit.check_counts()?;
    let shown = recovered.replays.iter().any(|r| r.nodeid == node);
    ensure!(shown, "the file without a name was not replayed");
    let read = kit.run("read", move || ops::pread(fd, 100, 0))?;
    ensure!(read == Ok(b"nameless".to_vec()), "read: {read:?}");
    let linked = kit.run_on("link", "named", move |p| {
        ops::link(&PathBuf::from(format!("/proc/self/fd/{fd}")), p)
    })?;
    ensure!(linked == Ok(()), "link: {linked:?}");
    ensure!(kit.tree.child(ROOT, "named") == Some(node), "another file");
    ensure!(
        kit.run_on("unlink", "named", ops::unlink)? == Ok(()),
        "unlink"
    );
    let closed = kit.run("close", move || ops::close(fd))?;
    ensure!(closed == Ok(()), "close: {closed:?}");
    kit.serve_until("FORGET of the file", |kit| {
        Ok(!kit.tree.nodes.contains_key(&node))
    })?;
    kit.check_counts()?;
    still_serves(kit)
}

fn answered(env: &Env<'_>) -> Result<()> {
    for phase in WHEN {
        let mut kit = populated(env, 2)?;
        let trap = Trap::arm("create_answered")?;
        let app: App<Done<RawFd>> = kit.on("O_TMPFILE in", "", tmpfile)?;
        let m = kit.until_op(op::TMPFILE)?;
        let node = kit.tree.next;
        kit.answer(&m)?;
        trap.wait(kit.patience)?;
        kit.served.clear();
        consumed_in(&mut kit, &app, trap, phase).with_context(|| format!("{phase:?}"))?;
        let result = kit.serve(&app)?;
        expect_errno(
            &format!("O_TMPFILE, consumed in {phase:?},"),
            result,
            Errno::EIO,
        )?;
        let asked = kit.served.iter().find(|m: &&Message| m.is(op::LOOKUP));
        ensure!(
            asked.is_none(),
            "consumed in {phase:?}, it asked for a name: {}",
            asked.unwrap()
        );
        kit.check_counts()
            .with_context(|| format!("consumed in {phase:?}"))?;
        ensure!(
            !kit.tree.nodes.contains_key(&node),
            "consumed in {phase:?}, node {node} is still counted"
        );
        // What failed is no reason for the next one to fail.
        let node = kit.tree.next;
        let fd = kit
            .run_on("O_TMPFILE in", "", tmpfile)?
            .context("the next O_TMPFILE")?;
        usable(&mut kit, node, fd).with_context(|| format!("consumed in {phase:?}"))?;
    }
    Ok(())
}
