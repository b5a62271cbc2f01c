// SPDX-License-Identifier: GPL-2.0
//! Servers without privileges get everything.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;
use nix::sched::{unshare, CloneFlags};
use nix::sys::wait::WaitStatus;
use nix::unistd::{setgid, setgroups, setuid, Gid, Uid};

use super::help::{populated, still_serves};
use super::Scenario;
use crate::raw::app::Proc;
use crate::raw::env::Env;
use crate::raw::ops;
use crate::raw::tree::Answer;
use crate::raw::wire::ROOT;

/// Who is nobody in particular.
const SOMEBODY: u32 = 1000;

pub fn scenarios() -> Vec<Scenario> {
    vec![Scenario::series(
        "unprivileged/namespace",
        "a server in a user namespace is granted restartability, and its recoveries count right",
        namespace,
    )]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    Root,
    /// An ordinary user, who is root in a user and mount namespace of his own.
    Somebody,
}

/// A server in a process of its own, and the way it says what went wrong.
pub(super) struct Server {
    pub proc: Proc,
    told: OwnedFd,
}

impl Server {
    /// Forks; the child drops `close` and tells `story`.
    pub(super) fn spawn(
        env: &Env<'_>,
        who: Who,
        what: &str,
        close: &[RawFd],
        story: impl FnOnce(&Env<'_>) -> Result<()>,
    ) -> Result<Server> {
        if who == Who::Somebody {
            std::os::unix::fs::chown(env.scratch, Some(SOMEBODY), Some(SOMEBODY))?;
        }
        let (told, write) = nix::unistd::pipe()?;
        let close = [close, &[told.as_raw_fd()]].concat();
        let proc = Proc::spawn(what, &close, || {
            let ready = match who {
                Who::Root => Ok(()),
                Who::Somebody => become_somebody(),
            };
            let result = ready.and_then(|()| story(env));
            let problems = env.problems.borrow().join("; ");
            let text = match result {
                Ok(()) => problems,
                Err(e) => format!("{e:#} {problems}"),
            };
            let _ = fs::File::from(write).write_all(text.as_bytes());
            i32::from(!text.is_empty())
        })?;
        Ok(Server { proc, told })
    }

    /// Its end, which must be a good one.
    pub(super) fn finish(mut self, patience: Duration) -> Result<()> {
        let status = self.proc.wait(patience)?;
        if status != WaitStatus::Exited(self.proc.pid, 0) {
            let mut text = String::new();
            fs::File::from(self.told).read_to_string(&mut text)?;
            bail!("{}: {text} ({status:?})", self.proc.what);
        }
        Ok(())
    }
}

fn become_somebody() -> Result<()> {
    setgroups(&[])?;
    setgid(Gid::from_raw(SOMEBODY))?;
    setuid(Uid::from_raw(SOMEBODY))?;
    // Who changed his ids may not write to his own /proc otherwise.
    // SAFETY: a plain number.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) })?;
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)
        .context("no user namespace for an ordinary user")?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {SOMEBODY} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {SOMEBODY} 1"))?;
    Ok(())
}

fn namespace(env: &Env<'_>) -> Result<()> {
    let server = Server::spawn(env, Who::Somebody, "the unprivileged server", &[], |env| {
        let mut kit = populated(env, 20)?;
        // Held over a server that dies, a keeper's RESTARTED, and another death.
        let made = kit.on("mkdir", "d", ops::mkdir)?;
        kit.until_op(crate::raw::wire::op::MKDIR)?;
        kit.restarted_as([0; 2])?;
        kit.confirm_root()?;
        let recovered = kit.recover()?;
        ensure!(
            recovered.report.replayed == 21 && recovered.report.revoked == 0,
            "{:?}",
            recovered.report
        );
        ensure!(recovered.report.held == 1, "{} held", recovered.report.held);
        ensure!(kit.serve(&made)? == Ok(()), "mkdir");
        kit.check_counts()?;
        let recovered = kit.recover_with(&mut |tree, replay| {
            (replay.nodeid == tree.child(ROOT, "f3")?).then_some(Answer::Err(libc::ESTALE))
        })?;
        ensure!(recovered.report.revoked == 1, "{:?}", recovered.report);
        still_serves(&mut kit)
    })?;
    server.finish(env.patience * 3)
}
