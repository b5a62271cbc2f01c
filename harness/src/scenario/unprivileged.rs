// SPDX-License-Identifier: GPL-2.0
//! Servers without privileges, and servers that mean harm: the first get everything, the second hurt only their own
//! mount.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{mount, MsFlags};
use nix::sched::{unshare, CloneFlags};
use nix::sys::wait::WaitStatus;
use nix::unistd::{setgid, setgroups, setuid, Gid, Uid};

use super::help::{open, populate, populated, still_serves};
use super::Scenario;
use crate::raw::app::Proc;
use crate::raw::dev::Read1;
use crate::raw::env::{skip, Env};
use crate::raw::kit::{Config, Kit};
use crate::raw::msg::Message;
use crate::raw::ops;
use crate::raw::tree::Answer;
use crate::raw::wire::{init, AttrOut, RestartedOut, COOKIE_BIT, ROOT};

/// Who is nobody in particular.
const SOMEBODY: u32 = 1000;

pub fn scenarios() -> Vec<Scenario> {
    let mut all = vec![Scenario::series(
        "unprivileged/namespace",
        "a server in a user namespace is granted restartability, and its recoveries count right",
        namespace,
    )];
    all.extend(MEANNESS.map(|mean| {
        Scenario::series(
            format!("unprivileged/{}", mean.name()),
            "a hostile server delays nobody but its own mount's users: sync, reclaim, OOM kills, other mounts go on",
            move |env| bystanders(env, mean),
        )
    }));
    all
}

/// Runs `story` as an ordinary user, who is root in a user and mount namespace of his own.
fn as_somebody(env: &Env<'_>, story: impl FnOnce(&Env<'_>) -> Result<()>) -> Result<()> {
    std::os::unix::fs::chown(env.scratch, Some(SOMEBODY), Some(SOMEBODY))?;
    let (read, write) = nix::unistd::pipe()?;
    let mut somebody = Proc::spawn("the unprivileged server", &[read.as_raw_fd()], || {
        let told = become_somebody().and_then(|()| story(env));
        let problems = env.problems.borrow().join("; ");
        let text = match told {
            Ok(()) => problems,
            Err(e) => format!("{e:#} {problems}"),
        };
        let _ = fs::File::from(write).write_all(text.as_bytes());
        i32::from(!text.is_empty())
    })?;
    let mut text = String::new();
    let status = somebody.wait(env.patience * 3)?;
    if status != WaitStatus::Exited(somebody.pid, 0) {
        fs::File::from(read).read_to_string(&mut text)?;
        bail!("{text} ({status:?})");
    }
    Ok(())
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
    as_somebody(env, |env| {
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
    })
}

/// What a hostile server does while its mount is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mean {
    /// Never answers a replay.
    Silent,
    /// Answers everything with bytes that mean nothing.
    Garbage,
    /// Answers twice.
    Twice,
    /// Reads what it can, then answers the last first.
    Backwards,
    /// RESTARTED, and nothing else.
    Flood,
    /// Whole recoveries one after the other, and no request of an application is ever answered.
    ForEver,
    /// Lies about type, number and size of everything but the root.
    Lies,
}

const MEANNESS: [Mean; 7] = [
    Mean::Silent,
    Mean::Garbage,
    Mean::Twice,
    Mean::Backwards,
    Mean::Flood,
    Mean::ForEver,
    Mean::Lies,
];

impl Mean {
    fn name(self) -> &'static str {
        match self {
            Mean::Silent => "silent",
            Mean::Garbage => "garbage",
            Mean::Twice => "twice",
            Mean::Backwards => "backwards",
            Mean::Flood => "flood",
            Mean::ForEver => "for-ever",
            Mean::Lies => "lies",
        }
    }

    /// One round of it.
    fn act(self, kit: &mut Kit<'_>, read: &mut Vec<Message>) -> Result<()> {
        match self {
            Mean::Silent => {}
            Mean::Flood => {
                for i in 0..20 {
                    let cookie = COOKIE_BIT | i;
                    kit.dev.restarted(RestartedOut {
                        cookie,
                        ..Default::default()
                    })?;
                    kit.accepted(cookie);
                }
            }
            Mean::ForEver => {
                // Without waiting for the kernel to serve: the next RESTARTED may come at any moment.
                kit.restarted()?;
                let recovered = kit.answer_replays(&mut |_, _| None)?;
                kit.commit_epoch(recovered.report.epoch)?;
            }
            Mean::Garbage | Mean::Twice | Mean::Backwards | Mean::Lies => {
                while let Read1::Message(m) = kit.dev.read(std::time::Duration::ZERO)? {
                    read.push(m);
                }
                while let Some(m) = read.pop() {
                    self.answer(kit, &m);
                }
                // And from the beginning.
                kit.restarted()?;
            }
        }
        Ok(())
    }

    fn answer(self, kit: &mut Kit<'_>, m: &Message) {
        let Some(replay) = m.replay() else { return };
        let honest = kit.tree.replay(&replay);
        let _ = match (self, honest) {
            (Mean::Garbage, _) if replay.nodeid != ROOT => {
                kit.dev.reply_ok(m.unique(), &[0xa5; 104])
            }
            (Mean::Lies, Answer::Ok(_)) if replay.nodeid != ROOT => {
                let mut out: AttrOut = kit.tree.attr_out(replay.nodeid).unwrap_or_default();
                match replay.nodeid % 3 {
                    0 => out.attr.ino ^= 1,
                    1 => out.attr.mode ^= libc::S_IFREG ^ libc::S_IFDIR,
                    _ => out.attr.size = u64::MAX,
                }
                kit.dev
                    .reply_ok(m.unique(), zerocopy::IntoBytes::as_bytes(&out))
            }
            (_, Answer::Ok(payload)) => {
                let first = kit.dev.reply_ok(m.unique(), &payload);
                if self == Mean::Twice {
                    let _ = kit.dev.reply_ok(m.unique(), &payload);
                }
                first
            }
            (_, _) => kit.dev.reply_error(m.unique(), libc::ESTALE),
        };
    }
}

/// A hostile mount with dirty pages and waiting applications, and everybody else.
fn bystanders(env: &Env<'_>, mean: Mean) -> Result<()> {
    let group = Memcg::new(env)?;
    // Before anything of the hostile mount is open: who inherits a dirty file waits for it when he ends.
    let (start, go) = nix::unistd::pipe()?;
    let gun = (start.as_raw_fd(), go.as_raw_fd());
    let mut others = vec![
        bystander("sync", gun, || {
            nix::unistd::sync();
            0
        })?,
        bystander("drop_caches", gun, || {
            i32::from(fs::write("/proc/sys/vm/drop_caches", "3").is_err())
        })?,
    ];
    if let Some(group) = &group {
        let procs = group.group.join("cgroup.procs");
        others.push(bystander(GLUTTON, gun, move || glutton(&procs))?);
    }
    let mut bad = Kit::granted_with(env, Config::with(init::WRITEBACK_CACHE))?;
    populate(&mut bad, 100)?;
    let fd = open(&mut bad, "f0", OFlag::O_RDWR)?;
    let dirty = bad.run("write", move || ops::pwrite(fd, &[1; 64 << 10], 0))?;
    ensure!(dirty.is_ok(), "dirty pages: {dirty:?}");
    bad.settle()?;
    let mut good = populated(env, 20)?;
    let mut victims = Vec::new();
    for n in 1..5 {
        let asked = bad.on("stat", &format!("f{n}"), |p| ops::stat(p).map(drop));
        victims.push(asked?);
    }
    bad.conn.wait_waiting(4, bad.patience)?;
    bad.restarted()?;

    let app = good.on("make and read", "fresh", |p| {
        ops::mkdir(p)?;
        ops::listdir(p).map(drop)
    })?;
    drop(go);
    let mut read = Vec::new();
    good.serve_until("the end of everybody else's work", |_| {
        mean.act(&mut bad, &mut read)?;
        let mut ended = app.done();
        for other in &others {
            ended &= other.ended()?;
        }
        Ok(ended)
    })
    .with_context(|| {
        let stuck = others.iter().filter(|o| !o.ended().unwrap_or(true));
        let stuck: Vec<String> = stuck
            .map(|o| format!("{}: {}", o.what, crate::raw::app::describe(o.tid())))
            .collect();
        stuck.join("\n  ")
    })?;
    for other in &mut others {
        let status = other.wait(good.patience)?;
        let expected = match other.what.as_str() {
            GLUTTON => matches!(
                status,
                WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGKILL, _)
            ),
            _ => matches!(status, WaitStatus::Exited(_, 0)),
        };
        ensure!(expected, "{} ended with {status:?}", other.what);
    }
    ensure!(
        app.take() == Some(Ok(())),
        "an application of the other mount failed"
    );
    good.check_counts().context("the other mount")?;
    still_serves(&mut good)?;
    // Those who wait for the hostile server still do, or have been told; the end of the mount ends them.
    let told = victims.iter().filter(|v| v.done()).count();
    tracing::debug!(
        "{told} of {} waiting applications were answered",
        victims.len()
    );
    Ok(())
}

/// A process that does its work when nobody holds the second end of a pipe any more.
fn bystander(what: &str, (start, go): (i32, i32), work: impl FnOnce() -> i32) -> Result<Proc> {
    Proc::spawn(what, &[go], || {
        let mut byte = [0u8; 1];
        // SAFETY: the descriptor is a copy of one that is open, and the buffer is as long as said.
        match unsafe { libc::read(start, byte.as_mut_ptr().cast(), 1) } {
            0 => work(),
            _ => 97,
        }
    })
}

/// Wants more memory than its group may have, and is killed for it while others of the system wait.
fn glutton(procs: &Path) -> i32 {
    if fs::write(procs, std::process::id().to_string()).is_err() {
        return 98;
    }
    let memory = vec![0x5au8; 64 << 20];
    i32::from(memory[memory.len() / 2])
}

const GLUTTON: &str = "a process over its memory limit";

/// A memory cgroup with a small limit.
struct Memcg {
    root: PathBuf,
    group: PathBuf,
}

impl Memcg {
    /// `None` where the memory controller belongs to somebody else.
    fn new(env: &Env<'_>) -> Result<Option<Memcg>> {
        let root = nix::unistd::mkdtemp(&env.scratch.join("cgroup.XXXXXX"))?;
        if let Err(e) = mount(
            Some("cgroup2"),
            &root,
            Some("cgroup2"),
            MsFlags::empty(),
            None::<&str>,
        ) {
            let _ = fs::remove_dir(&root);
            return skip(format!("no cgroup2: {e}"));
        }
        let group = root.join(format!("hostile-{}", std::process::id()));
        let memcg = Memcg { root, group };
        let _ = fs::write(memcg.root.join("cgroup.subtree_control"), "+memory");
        fs::create_dir(&memcg.group).context("a cgroup")?;
        Ok(match fs::write(memcg.group.join("memory.max"), "16M") {
            Ok(()) => Some(memcg),
            Err(_) => None,
        })
    }
}

impl Drop for Memcg {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.group);
        let _ = nix::mount::umount2(&self.root, nix::mount::MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.root);
    }
}
