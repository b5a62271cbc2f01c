// SPDX-License-Identifier: GPL-2.0
//! A bad inode answers EIO to everything, at once, and no request that names it reaches a server.
//!
//! The inode is made bad the way any kernel knows: a GETATTR that suddenly tells another file type.

use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags};

use super::help::{expect_errno, open, still_serves};
use super::{Needs, Scenario};
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::msg::Message;
use crate::raw::ops::{self, Done};
use crate::raw::rare;
use crate::raw::tree::Answer;
use crate::raw::wire::{init, op, ROOT};

/// What is tried: on descriptors of a bad file, a good file and a bad directory, and on the mount point.
type Try = fn(&Tools) -> Done<()>;

struct Tools {
    bad: i32,
    good: i32,
    mnt: PathBuf,
    /// The bad directory, by its descriptor: a walk would look it up anew.
    dir: PathBuf,
}

pub fn scenarios() -> Vec<Scenario> {
    // Kernels without the series check these already.
    let known: [(&str, Try); 6] = [
        ("read", |t| ops::pread(t.bad, 10, 0).map(drop)),
        ("write", |t| ops::pwrite(t.bad, b"x", 0).map(drop)),
        ("fstat", |t| ops::fstat(t.bad).map(drop)),
        ("truncate", |t| ops::ftruncate(t.bad, 1)),
        ("fsync", |t| ops::fsync(t.bad)),
        ("mkdir-in", |t| ops::mkdir(&t.dir.join("new"))),
    ];
    // These it does not: a patch of its own at the front of the series.
    let fixed: [(&str, Try); 13] = [
        ("lseek", |t| ops::seek_data(t.bad, 0).map(drop)),
        ("fallocate", |t| ops::fallocate(t.bad, 0, 100)),
        ("copy-from", |t| {
            ops::copy_file_range(t.bad, t.good, 10).map(drop)
        }),
        ("copy-to", |t| {
            ops::copy_file_range(t.good, t.bad, 10).map(drop)
        }),
        ("setlk", |t| ops::lock(t.bad)),
        ("getlk", |t| getlk(t.bad)),
        ("statfs", |t| {
            let path = format!("/proc/self/fd/{}", t.bad);
            nix::sys::statfs::statfs(path.as_str()).map(drop)
        }),
        ("tmpfile", |t| {
            ops::open(&t.dir, OFlag::O_TMPFILE | OFlag::O_RDWR).map(drop)
        }),
        ("mmap", |t| rare::map_untouched(t.bad).map(drop)),
        ("splice-read", |t| ops::splice_read(t.bad, 10).map(drop)),
        ("poll", |t| match ops::poll_now(t.bad)? & libc::POLLERR {
            0 => Ok(()),
            _ => Err(Errno::EIO),
        }),
        ("link", |t| {
            ops::link(
                Path::new(&format!("/proc/self/fd/{}", t.bad)),
                &t.mnt.join("new"),
            )
        }),
        ("rename-into", |t| {
            ops::rename(
                &t.mnt.join("good"),
                &t.dir.join("new"),
                RenameFlags::empty(),
            )
        }),
    ];
    let mut all = Vec::new();
    for (name, attempt) in known {
        let guards = "an operation on a bad inode is EIO and is not sent";
        all.push(Scenario::new(
            format!("bad-inode/{name}"),
            Needs::Nothing,
            guards,
            move |env| bad(env, attempt),
        ));
    }
    for (name, attempt) in fixed {
        let guards = "the check that was missing: EIO, and nothing is sent";
        all.push(Scenario::series(
            format!("bad-inode/{name}"),
            guards,
            move |env| bad(env, attempt),
        ));
    }
    all.push(Scenario::series(
        "bad-inode/fault",
        "a page fault on a bad file is SIGBUS and is not sent",
        fault,
    ));
    for next_server in [false, true] {
        let who = ["looked-up-again", "next-server"][usize::from(next_server)];
        all.push(Scenario::series(
            format!("bad-inode/{who}"),
            "what has the nodeid and the generation of a bad inode next is another inode",
            move |env| again(env, next_server),
        ));
    }
    all.push(Scenario::series(
        "bad-inode/handle",
        "a file handle does not lead to a bad inode",
        handle,
    ));
    all
}

fn getlk(fd: std::os::fd::RawFd) -> Done<()> {
    // SAFETY: an all-zero flock is valid; it lives until the call returns.
    unsafe {
        let mut lock: libc::flock = std::mem::zeroed();
        lock.l_type = libc::F_WRLCK as i16;
        Errno::result(libc::fcntl(fd, libc::F_GETLK, &mut lock)).map(drop)
    }
}

/// Makes the node bad in the kernel's eyes: the next GETATTR of `path` tells another type.
pub(super) fn spoil(kit: &mut Kit<'_>, name: &str) -> Result<()> {
    let app = kit.on("stat", name, |p| ops::stat(p).map(drop))?;
    let m = kit.until_op(op::GETATTR)?;
    let mut out = kit.tree.attr_out(m.nodeid()).context("the node")?;
    out.attr.mode = libc::S_IFIFO | 0o600;
    kit.send(&m, &Answer::of(&out))?;
    let result = kit.serve(&app)?;
    ensure!(
        result == Err(Errno::EIO),
        "a GETATTR of another type gave {result:?}"
    );
    Ok(())
}

pub(super) fn mounted<'a>(env: &'a Env<'a>) -> Result<Kit<'a>> {
    mounted_with(env, init::POSIX_LOCKS | init::FLOCK_LOCKS)
}

fn mounted_with<'a>(env: &'a Env<'a>, flags: u64) -> Result<Kit<'a>> {
    if env.support.series {
        mounted_of(env, Config::default(), flags)
    } else {
        unsigned_with(env, flags)
    }
}

/// Not restartable, where a request for a bad inode is not looked at when it is queued.
pub(super) fn unsigned_with<'a>(env: &'a Env<'a>, flags: u64) -> Result<Kit<'a>> {
    mounted_of(env, Config::unsigned(), flags)
}

fn mounted_of<'a>(env: &'a Env<'a>, base: Config, flags: u64) -> Result<Kit<'a>> {
    let flags = base.flags | flags;
    let mut kit = Kit::mount(env, Config { flags, ..base })?;
    kit.tree.file(ROOT, "bad", &[1; 1000]);
    kit.tree.file(ROOT, "good", &[2; 1000]);
    kit.tree.dir(ROOT, "dir");
    for name in ["bad", "good", "dir"] {
        ensure!(kit.run_on("stat", name, ops::stat)?.is_ok(), "stat {name}");
    }
    Ok(kit)
}

fn bad(env: &Env<'_>, attempt: Try) -> Result<()> {
    let mut kit = unsigned_with(env, init::POSIX_LOCKS | init::FLOCK_LOCKS)?;
    let bad = open(&mut kit, "bad", OFlag::O_RDWR)?;
    let good = open(&mut kit, "good", OFlag::O_RDWR)?;
    let dir = open(&mut kit, "dir", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    spoil(&mut kit, "bad")?;
    spoil(&mut kit, "dir")?;
    kit.settle()?;
    kit.served.clear();
    let tools = Tools {
        bad,
        good,
        mnt: kit.mnt.clone(),
        dir: PathBuf::from(format!("/proc/self/fd/{dir}")),
    };
    let result = kit.run("an operation on a bad inode", move || attempt(&tools))?;
    // Walks are fine, and so is what concerns the good file alone.
    let walking = |m: &Message| matches!(m.opcode(), op::LOOKUP | op::GETATTR | op::GETXATTR);
    let sent: Vec<String> = kit
        .served
        .iter()
        .filter(|m| !walking(m))
        .map(Message::to_string)
        .collect();
    ensure!(
        sent.is_empty(),
        "reached the server although an inode is bad: {sent:?} (the operation gave {result:?})"
    );
    ensure!(
        result == Err(Errno::EIO),
        "an operation on a bad inode gave {result:?}, not EIO"
    );
    Ok(())
}

fn again(env: &Env<'_>, next_server: bool) -> Result<()> {
    let mut kit = mounted(env)?;
    let node = kit.tree.child(ROOT, "bad").context("bad")?;
    let old = open(&mut kit, "bad", OFlag::O_RDWR)?;
    let dir = open(&mut kit, "dir", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    spoil(&mut kit, "bad")?;
    spoil(&mut kit, "dir")?;
    if next_server {
        // It is not shown the bad inode, so the nodeid and the generation are free to it.
        let shown = kit.recover()?.replays;
        ensure!(!shown.iter().any(|r| r.nodeid == node), "{shown:?}");
    }
    kit.tree.node_mut(node).data = b"another file".to_vec();
    let read = kit.run_on("read", "bad", ops::read_file)?;
    ensure!(read == Ok(b"another file".to_vec()), "it reads {read:?}");
    let made = kit.run_on("mkdir", "dir/new", ops::mkdir)?;
    ensure!(made == Ok(()), "mkdir in the directory gave {made:?}");
    let stale = kit.run("read", move || ops::pread(old, 5, 0))?;
    expect_errno("the old descriptor", stale, Errno::EIO)?;
    let inside = PathBuf::from(format!("/proc/self/fd/{dir}/more"));
    let made = kit.run("mkdir", move || ops::mkdir(&inside))?;
    expect_errno("the old directory", made, Errno::EIO)?;
    // Both inodes' lookups are given back.
    give_back(&mut kit, &[old, dir])
}

/// Closes what is open of bad inodes, has them evicted and compares the counts.
fn give_back(kit: &mut Kit<'_>, fds: &[i32]) -> Result<()> {
    for &fd in fds {
        // EIO, but closed.
        let _ = kit.run("close", move || ops::close(fd))?;
    }
    std::fs::write("/proc/sys/vm/drop_caches", "2").context("drop_caches")?;
    kit.check_counts()?;
    still_serves(kit)
}

fn handle(env: &Env<'_>) -> Result<()> {
    let mut kit = mounted_with(env, init::EXPORT_SUPPORT)?;
    let mount = open(&mut kit, "", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let named = kit.run_on("name_to_handle_at", "bad", rare::name_to_handle)??;
    let old = open(&mut kit, "bad", OFlag::O_RDWR)?;
    spoil(&mut kit, "bad")?;
    let opened = kit.run("open_by_handle_at", move || {
        rare::open_by_handle(mount, &named)
    })?;
    let fd = opened.context("the file by its handle")?;
    let read = kit.run("read", move || ops::pread(fd, 5, 0))?;
    ensure!(read == Ok(vec![1; 5]), "it reads {read:?}");
    give_back(&mut kit, &[old])
}

fn fault(env: &Env<'_>) -> Result<()> {
    use nix::sys::mman::{mmap, MapFlags, ProtFlags};
    use nix::sys::signal::Signal;
    use nix::sys::wait::WaitStatus;
    let mut kit = mounted(env)?;
    let node = kit.tree.child(ROOT, "bad").context("bad")?;
    let fd = open(&mut kit, "bad", OFlag::O_RDONLY)?;
    let length = std::num::NonZeroUsize::new(4096).context("not zero")?;
    // SAFETY: the descriptor is open for the time of the call.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    // SAFETY: a fresh mapping chosen by the kernel; only the child below touches it.
    let at = unsafe {
        mmap(
            None,
            length,
            ProtFlags::PROT_READ,
            MapFlags::MAP_SHARED,
            borrowed,
            0,
        )
    }?
    .as_ptr() as usize;
    spoil(&mut kit, "bad")?;
    let mut child = crate::raw::app::Proc::spawn("touch the mapping", &[kit.dev.raw()], || {
        crate::raw::app::faults_kill();
        // SAFETY: mapped, but not yet faulted in; SIGBUS ends the child, which is what is looked for.
        i32::from(unsafe { (at as *const u8).read_volatile() })
    })?;
    kit.served.clear();
    kit.serve_until("the page fault", |_| child.ended())?;
    if let Some(m) = kit
        .served
        .iter()
        .find(|m| m.nodeid() == node && m.is(op::READ))
    {
        anyhow::bail!("{m} reached the server although its inode is bad");
    }
    let status = child.wait(kit.patience)?;
    ensure!(
        matches!(status, WaitStatus::Signaled(_, Signal::SIGBUS, _)),
        "the fault ended with {status:?}, not SIGBUS"
    );
    Ok(())
}
