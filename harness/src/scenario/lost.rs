// SPDX-License-Identifier: GPL-2.0
//! What the families about revoked inodes share: losing files, and applications in a process of their own that do
//! something before a recovery and something after it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::wait::WaitStatus;

use super::help::expect_report;
use crate::raw::app::{state, Proc};
use crate::raw::dev::poll_one;
use crate::raw::kit::Kit;
use crate::raw::ops::Done;
use crate::raw::recover::Recovered;
use crate::raw::tree::Answer;
use crate::raw::wire::{op, ROOT};

/// A recovery after which the server has no idea of `nodes`: neither of the nodes nor of their names.
pub fn lose(kit: &mut Kit<'_>, nodes: &[u64]) -> Result<Recovered> {
    kit.served.clear();
    let recovered = kit.recover_with(&mut |_, r| {
        nodes
            .contains(&r.nodeid)
            .then_some(Answer::Err(libc::ESTALE))
    })?;
    expect_report(&recovered, nodes.len() as u64)?;
    for node in nodes {
        drop_node(kit, *node);
    }
    Ok(recovered)
}

/// Takes a node and its names out of the server's tree.
pub fn drop_node(kit: &mut Kit<'_>, node: u64) {
    kit.tree.nodes.remove(&node);
    for parent in kit.tree.nodes.values_mut() {
        parent.children.retain(|_, child| *child != node);
    }
}

/// Gives what is named `name` in the root, just made as node `made`, the nodeid `old`, with another generation.
pub fn succeed(kit: &mut Kit<'_>, name: &str, made: u64, old: u64) -> Result<()> {
    let mut node = kit.tree.nodes.remove(&made).context("just made")?;
    node.generation += 5000;
    kit.tree.nodes.insert(old, node);
    kit.tree.node_mut(ROOT).children.insert(name.into(), old);
    Ok(())
}

/// The node of a name in the root.
pub fn node(kit: &Kit<'_>, name: &str) -> Result<u64> {
    kit.tree
        .child(ROOT, name)
        .with_context(|| format!("the toy tree has no {name}"))
}

/// Nothing that was served may have named the node, but RELEASE: handles are given back.
pub fn never_asked(kit: &Kit<'_>, node: u64) -> Result<()> {
    let tidy = [op::RELEASE, op::RELEASEDIR];
    let asked = kit
        .served
        .iter()
        .find(|m| m.nodeid() == node && !tidy.contains(&m.opcode()));
    ensure!(
        asked.is_none(),
        "the new server was asked about the revoked node: {}",
        asked.map_or(String::new(), ToString::to_string)
    );
    Ok(())
}

/// An application in a process of its own that has done its first part and waits for the word to go on.
pub struct Staged {
    pub child: Proc,
    go: OwnedFd,
}

impl Staged {
    /// Runs `before`, and returns when it has succeeded; `after` runs when the scenario says [`Staged::go`]. Both
    /// end the process by an exit code if something is not as it should be.
    pub fn start<S>(
        kit: &mut Kit<'_>,
        what: &str,
        before: impl FnOnce() -> Result<S, i32>,
        after: impl FnOnce(S) -> i32,
    ) -> Result<Staged> {
        let (ready, tell) = nix::unistd::pipe()?;
        let (wait, go) = nix::unistd::pipe()?;
        let close = [kit.dev.raw(), go.as_raw_fd(), ready.as_raw_fd()];
        let child = Proc::spawn(what, &close, || match before() {
            Ok(state) => {
                let _ = nix::unistd::write(&tell, b"!");
                // Ends when the scenario closes its end.
                let _ = nix::unistd::read(&wait, &mut [0]);
                after(state)
            }
            Err(code) => code,
        })?;
        drop((tell, wait));
        kit.serve_until(what, |_| {
            Ok(poll_one(ready.as_fd(), PollFlags::POLLIN, Duration::ZERO)?
                .intersects(PollFlags::POLLIN | PollFlags::POLLHUP))
        })?;
        let mut byte = [0];
        if nix::unistd::read(&ready, &mut byte)? == 0 {
            let mut child = child;
            let status = child.wait(kit.patience)?;
            anyhow::bail!("{what} ended before the recovery, with {status:?}");
        }
        Ok(Staged { child, go })
    }

    /// Lets it go on, and serves until it has ended.
    pub fn go(self, kit: &mut Kit<'_>) -> Result<WaitStatus> {
        let Staged { mut child, go } = self;
        drop(go);
        let what = format!("the end of {}", child.what);
        kit.serve_until(&what, |_| child.ended())?;
        child.wait(kit.patience)
    }

    /// What keeps it waiting, as long as any process has it open.
    pub fn rein(&self) -> RawFd {
        self.go.as_raw_fd()
    }

    /// Lets it go on; the scenario has something else to do before it serves.
    pub fn let_go(self) -> Proc {
        let Staged { child, go } = self;
        drop(go);
        child
    }

    /// Lets it go on while nobody serves.
    pub fn go_alone(self, limit: Duration) -> Result<WaitStatus> {
        let Staged { mut child, go } = self;
        drop(go);
        child.wait(limit)
    }
}

/// Serves until the task sleeps in the kernel without a request of its own under way.
pub fn settled_asleep(kit: &mut Kit<'_>, tid: i32) -> Result<()> {
    kit.serve_until(&format!("task {tid} to sleep"), |kit| {
        Ok(!kit.readable()? && kit.conn.waiting()? == 0 && matches!(state(tid), Some('S' | 'D')))
    })
}

/// Lets go of every dentry and inode that nobody uses, until the server has no lookup of `gone` left.
pub fn evict(kit: &mut Kit<'_>, gone: u64) -> Result<()> {
    kit.serve_until("the eviction", |kit| {
        // What was used lately is only marked the first time.
        std::fs::write("/proc/sys/vm/drop_caches", "2").context("drop_caches")?;
        Ok(kit.tree.nodes.get(&gone).is_none_or(|n| n.nlookup == 0))
    })
}

/// Runs the call, in this thread alone, as another user and group in the directory `inside`, for relative paths: what leads there
/// is not for everybody.
pub fn as_user<T>(inside: &Path, uid: u32, call: impl FnOnce() -> Done<T>) -> Done<T> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
    nix::unistd::chdir(inside)?;
    for id in [libc::SYS_setresgid, libc::SYS_setresuid] {
        // The bare system call: that of the C library would change every thread of the process.
        // SAFETY: plain numbers.
        Errno::result(unsafe { libc::syscall(id, -1, uid, -1) })?;
    }
    call()
}
