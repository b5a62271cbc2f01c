// SPDX-License-Identifier: GPL-2.0
//! Servers that mean harm hurt only their own mount: as root, and as root of a user namespace.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use nix::fcntl::OFlag;
use nix::mount::{mount, MsFlags};
use nix::poll::PollFlags;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use super::help::{open, populate, populated, still_serves};
use super::patience::{Knob, MAX_REQUEST};
use super::unprivileged::{Server, Who};
use super::waits::Freezer;
use super::Scenario;
use crate::raw::app::{describe, Proc};
use crate::raw::ctl::Connection;
use crate::raw::dev::{poll_one, Read1};
use crate::raw::env::{skip, Env};
use crate::raw::kit::{Config, Kit};
use crate::raw::msg::Message;
use crate::raw::ops;
use crate::raw::tree::Answer;
use crate::raw::wait::wait_for;
use crate::raw::wire::{init, op, AttrOut, RestartedOut, COOKIE_BIT, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    let of = |who: Who, family: &'static str| {
        MEANNESS.map(|mean| {
            Scenario::series(
                format!("{family}/{}", mean.name()),
                match who {
                    Who::Root => "a hostile server delays nobody but its own mount's users: sync, reclaim, OOM kills, the freezer, other mounts go on",
                    Who::Somebody => "the same for a hostile server in a user namespace",
                },
                move |env| bystanders(env, who, mean),
            )
        })
    };
    let mut all = Vec::from(of(Who::Root, "hostile"));
    all.extend(of(Who::Somebody, "unprivileged"));
    all.extend(MEANNESS.map(|mean| {
        Scenario::series(
            format!("unprivileged/bounded-{}", mean.name()),
            "the administrator's max_request_timeout ends it",
            move |env| bounded(env, Who::Somebody, mean),
        )
    }));
    all
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
                while let Read1::Message(m) = kit.dev.read(Duration::ZERO)? {
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

/// A hostile mount with dirty pages and waiting applications: a process of its own, so that it need not wait for
/// anybody and may be in a user namespace.
struct Hostile {
    // Ends before the process: who waits for a mount of his own cannot be killed otherwise.
    mount: Mount,
    server: Server,
    mean: Mean,
    talk: UnixStream,
}

struct Mount(Connection);

impl Drop for Mount {
    fn drop(&mut self) {
        if self.0.exists() {
            let _ = self.0.abort();
        }
    }
}

impl Hostile {
    /// It is in recovery when this returns.
    fn start(env: &Env<'_>, who: Who, mean: Mean, close: &[RawFd]) -> Result<Hostile> {
        let (mut talk, its) = UnixStream::pair()?;
        let server = Server::spawn(env, who, "the hostile server", close, |env| {
            be_hostile(env, mean, its)
        })?;
        talk.set_read_timeout(Some(env.patience * 3))?;
        let mut id = [0; 4];
        if let Err(e) = talk.read_exact(&mut id) {
            server.finish(env.patience)?;
            return Err(e).context("the hostile server said nothing");
        }
        let id = u32::from_ne_bytes(id);
        let hostile = Hostile {
            mount: Mount(Connection { id }),
            server,
            mean,
            talk,
        };
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user"));
        let its = namespace(&hostile.server.proc.pid.to_string())?;
        ensure!(
            (its == namespace("self")?) == (who == Who::Root),
            "{who:?} has the user namespace {}",
            its.display()
        );
        hostile.in_recovery()?;
        Ok(hostile)
    }

    /// Whether what was seen was seen during its recovery.
    fn in_recovery(&self) -> Result<()> {
        let recovery = self.mount.0.recovery()?.context("no `recovery` file")?;
        let wrong = match self.mean {
            Mean::ForEver => ["dead", "unsupported"],
            _ => ["dead", "serving"],
        };
        ensure!(
            !wrong.contains(&recovery.state()),
            "the hostile mount is {}",
            recovery.state()
        );
        Ok(())
    }

    /// The end of its mount, which ends whoever waits for it.
    fn stop(mut self, patience: Duration) -> Result<()> {
        self.talk.write_all(b"!").context("it is gone already")?;
        self.server.finish(patience * 3)
    }
}

fn be_hostile(env: &Env<'_>, mean: Mean, mut talk: UnixStream) -> Result<()> {
    let mut bad = Kit::granted_with(env, Config::with(init::WRITEBACK_CACHE))?;
    populate(&mut bad, 100)?;
    let fd = open(&mut bad, "f0", OFlag::O_RDWR)?;
    let dirty = bad.run("write", move || ops::pwrite(fd, &[1; 64 << 10], 0))?;
    ensure!(dirty.is_ok(), "dirty pages: {dirty:?}");
    bad.settle()?;
    for n in 1..5 {
        bad.on("stat", &format!("f{n}"), |p| ops::stat(p).map(drop))?;
    }
    bad.conn.wait_waiting(4, bad.patience)?;
    bad.restarted()?;
    talk.write_all(&bad.conn.id.to_ne_bytes())?;
    let mut read = Vec::new();
    let pause = Duration::from_millis(1);
    while poll_one(talk.as_fd(), PollFlags::POLLIN, pause)?.is_empty() {
        mean.act(&mut bad, &mut read)?;
    }
    Ok(())
}

/// How long it takes until the connection is at its end.
fn bounded(env: &Env<'_>, who: Who, mean: Mean) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(3);
    let _knob = Knob::set(MAX_REQUEST, &LIMIT.as_secs().to_string())?;
    let begun = Instant::now();
    let bad = Hostile::start(env, who, mean, &[])?;
    let limit = match mean {
        // Each recovery ends in time, so this is the requests' own limit, which begins anew once, is 15 s at least, and
        // is looked at every 15 s.
        Mean::ForEver => Duration::from_secs(45),
        _ => LIMIT,
    };
    wait_for("the end of the hostile mount", limit + env.patience, || {
        let recovery = bad.mount.0.recovery();
        Ok(!bad.mount.0.exists()
            || recovery.map_or(true, |r| r.is_none_or(|r| r.state() == "dead")))
    })?;
    let took = begun.elapsed();
    ensure!(
        took >= LIMIT,
        "it ended after {took:?}, which is not because of the limit"
    );
    Ok(())
}

/// A hostile mount, and everybody else.
fn bystanders(env: &Env<'_>, who: Who, mean: Mean) -> Result<()> {
    let group = Memcg::new(env)?;
    let freezer = Freezer::new(env)?;
    let (start, go) = nix::unistd::pipe()?;
    let gun = (start.as_raw_fd(), go.as_raw_fd());
    let procs = group.group.join("cgroup.procs");
    let mut others = vec![
        bystander("sync", gun, || {
            nix::unistd::sync();
            0
        })?,
        bystander("drop_caches", gun, || {
            i32::from(fs::write("/proc/sys/vm/drop_caches", "3").is_err())
        })?,
        bystander(GLUTTON, gun, move || glutton(&procs))?,
    ];
    let bad = Hostile::start(env, who, mean, &[go.as_raw_fd()])?;
    let mut good = populated(env, 20)?;
    others.push(freeze_and_thaw(&mut good, &freezer, &bad, go.as_raw_fd())?);
    let app = good.on("make and read", "fresh", |p| {
        ops::mkdir(p)?;
        ops::listdir(p).map(drop)
    })?;
    drop(go);
    good.serve_until("the end of everybody else's work", |_| {
        let mut ended = app.done();
        for other in &others {
            ended &= other.ended()?;
        }
        Ok(ended)
    })
    .with_context(|| {
        let stuck = others.iter().filter(|o| !o.ended().unwrap_or(true));
        let stuck: Vec<String> = stuck
            .map(|o| format!("{}: {}", o.what, describe(o.tid())))
            .collect();
        stuck.join("\n  ")
    })?;
    bad.in_recovery()?;
    for other in &mut others {
        let status = other.wait(good.patience)?;
        let expected = match other.what.as_str() {
            GLUTTON => matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)),
            _ => matches!(status, WaitStatus::Exited(_, 0)),
        };
        ensure!(expected, "{} ended with {status:?}", other.what);
    }
    group.has_killed()?;
    ensure!(
        app.take() == Some(Ok(())),
        "an application of the other mount failed"
    );
    good.check_counts().context("the other mount")?;
    still_serves(&mut good)?;
    bad.stop(env.patience)
}

/// A task that waits for the other mount's server is frozen, sleeps through its answer, and is thawed.
fn freeze_and_thaw(
    good: &mut Kit<'_>,
    freezer: &Freezer,
    bad: &Hostile,
    go: RawFd,
) -> Result<Proc> {
    let path = good.path("frozen");
    let task = Proc::spawn(
        "a task of the other mount that was frozen",
        &[good.dev.raw(), go],
        move || i32::from(ops::mkdir(&path).is_err()),
    )?;
    let m = good.until_op(op::MKDIR)?;
    task.wait_asleep(good.patience)?;
    freezer.add(&task)?;
    freezer.set("FROZEN")?;
    freezer.wait("FROZEN", good.patience)?;
    bad.in_recovery()?;
    good.answer(&m)?;
    ensure!(
        !task.ended_within(Duration::from_millis(50))?,
        "a frozen task went on"
    );
    freezer.set("THAWED")?;
    freezer.wait("THAWED", good.patience)?;
    Ok(task)
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
    // Or a release build knows the answer without the memory.
    let memory = std::hint::black_box(vec![0x5au8; 64 << 20]);
    i32::from(memory[memory.len() / 2])
}

const GLUTTON: &str = "a process over its memory limit";

/// A memory cgroup with a small limit.
struct Memcg {
    root: PathBuf,
    group: PathBuf,
}

impl Memcg {
    fn new(env: &Env<'_>) -> Result<Memcg> {
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
        match fs::write(memcg.group.join("memory.max"), "16M") {
            Ok(()) => Ok(memcg),
            // The controller belongs to somebody else, or is off.
            Err(e) => skip(format!("no memory limit, so no OOM kill: memory.max: {e}")),
        }
    }

    fn has_killed(&self) -> Result<()> {
        let events = fs::read_to_string(self.group.join("memory.events"))?;
        let kills = events.lines().find_map(|l| l.strip_prefix("oom_kill "));
        ensure!(kills == Some("1"), "memory.events says {events:?}");
        Ok(())
    }
}

impl Drop for Memcg {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.group);
        let _ = nix::mount::umount2(&self.root, nix::mount::MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.root);
    }
}
