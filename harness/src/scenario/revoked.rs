// SPDX-License-Identifier: GPL-2.0
//! Revocation is complete: whatever an application holds of a file that the new server does not know, it gets `EIO`
//! from it, at once, and the server never hears of it but by RELEASE. Descriptors, directories, polls.
//!
//! Locks, marks and handles are in [`super::revoked_held`], mappings and programs in [`super::revoked_map`], transfers
//! in [`super::revoked_io`].

use std::path::Path;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{mount, MsFlags};

use super::help::{expect_errno, open, populated, still_serves};
use super::lost::{lose, never_asked, node, settled_asleep, succeed, Staged};
use super::Scenario;
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::ops;
use crate::raw::rare;
use crate::raw::tree::Answer;
use crate::raw::wire::{fopen, op, PollOut, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    let mut all = vec![
        Scenario::series(
            "revoked/descriptor",
            "every call on an open descriptor is EIO, close gives the handle back",
            descriptor,
        ),
        Scenario::series(
            "revoked/unlinked",
            "an open file without a name is revoked like any other",
            unlinked,
        ),
        Scenario::series(
            "revoked/o-path",
            "a descriptor of O_PATH leads nowhere any more",
            o_path,
        ),
        Scenario::series(
            "revoked/cwd",
            "a process in a revoked directory gets EIO and can leave",
            cwd,
        ),
        Scenario::series(
            "revoked/mount-below",
            "what is mounted below a revoked directory goes when it is looked up anew",
            mount_below,
        ),
        Scenario::series(
            "revoked/poll",
            "poll and epoll wake up: POLLERR if revoked, the new server's answer if not",
            poll,
        ),
    ];
    for cached in [false, true] {
        all.push(Scenario::series(
            format!(
                "revoked/dir-stream-{}",
                if cached { "cached" } else { "uncached" }
            ),
            "a directory stream ends with EIO",
            move |env| dir_stream(env, cached),
        ));
    }
    all
}

fn descriptor(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let fd = open(&mut kit, "f1", OFlag::O_RDWR)?;
    let good = open(&mut kit, "f0", OFlag::O_RDWR)?;
    let second = open(&mut kit, "f1", OFlag::O_RDONLY)?;
    kit.settle()?;
    let victim = node(&kit, "f1")?;
    lose(&mut kit, &[victim])?;
    type Call = (&'static str, fn(i32, i32) -> ops::Done<()>);
    let calls: [Call; 16] = [
        ("pread", |fd, _| ops::pread(fd, 10, 0).map(drop)),
        ("pwrite", |fd, _| ops::pwrite(fd, b"x", 0).map(drop)),
        ("fstat", |fd, _| ops::fstat(fd).map(drop)),
        ("ftruncate", |fd, _| ops::ftruncate(fd, 1)),
        ("fallocate", |fd, _| ops::fallocate(fd, 0, 100)),
        ("fsync", |fd, _| ops::fsync(fd)),
        ("fdatasync", |fd, _| rare::fdatasync(fd)),
        ("lseek", |fd, _| ops::seek_data(fd, 0).map(drop)),
        ("fchmod", |fd, _| rare::fchmod(fd, 0o600)),
        ("fgetxattr", |fd, _| rare::fgetxattr(fd, "user.x").map(drop)),
        ("mmap", |fd, _| rare::map_untouched(fd).map(drop)),
        ("splice", |fd, _| ops::splice_read(fd, 10).map(drop)),
        ("sendfile", |fd, good| {
            rare::sendfile(good, fd, 10).map(drop)
        }),
        ("sendfile to", |fd, good| {
            rare::sendfile(fd, good, 10).map(drop)
        }),
        ("copy_file_range", |fd, good| {
            ops::copy_file_range(fd, good, 10).map(drop)
        }),
        ("copy_file_range to", |fd, good| {
            ops::copy_file_range(good, fd, 10).map(drop)
        }),
    ];
    for (name, call) in calls {
        let result = kit.run(name, move || call(fd, good))?;
        expect_errno(&format!("{name} of the revoked file"), result, Errno::EIO)?;
    }
    never_asked(&kit, victim)?;
    // close says EIO as well, and closes; the handle is given back.
    for fd in [fd, second] {
        expect_errno(
            "close",
            kit.run("close", move || ops::close(fd))?,
            Errno::EIO,
        )?;
    }
    kit.serve_until("both RELEASEs", |kit| {
        let released = |m: &&crate::raw::msg::Message| m.is(op::RELEASE) && m.nodeid() == victim;
        Ok(kit.served.iter().filter(released).count() == 2)
    })?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn unlinked(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let fd = open(&mut kit, "f1", OFlag::O_RDWR)?;
    let victim = node(&kit, "f1")?;
    let done = kit.run_on("unlink", "f1", ops::unlink)?;
    ensure!(done == Ok(()), "unlink gave {done:?}");
    kit.settle()?;
    lose(&mut kit, &[victim])?;
    expect_errno(
        "pread of the file without a name",
        kit.run("pread", move || ops::pread(fd, 10, 0))?,
        Errno::EIO,
    )?;
    kit.run("close", move || ops::close(fd))?.ok();
    kit.serve_until("RELEASE", |kit| {
        Ok(kit
            .served
            .iter()
            .any(|m| m.is(op::RELEASE) && m.nodeid() == victim))
    })?;
    never_asked(&kit, victim)?;
    kit.check_counts()?;
    ensure!(
        !kit.forgotten.iter().any(|f| f.nodeid == victim),
        "a FORGET of node {victim}, of which the server has no count"
    );
    still_serves(&mut kit)
}

fn o_path(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let dir = kit.tree.dir(ROOT, "d");
    kit.tree.file(dir, "inside", b"");
    let file = open(&mut kit, "f1", OFlag::O_PATH)?;
    let below = open(&mut kit, "d", OFlag::O_PATH | OFlag::O_DIRECTORY)?;
    kit.settle()?;
    let victim = node(&kit, "f1")?;
    lose(&mut kit, &[victim, dir])?;
    let reopen = move || {
        let path = format!("/proc/self/fd/{file}");
        ops::open(Path::new(&path), OFlag::O_RDONLY)
    };
    let inside = move || {
        let path = format!("/proc/self/fd/{below}/inside");
        ops::open(Path::new(&path), OFlag::O_RDONLY)
    };
    expect_errno(
        "fstat",
        kit.run("fstat", move || ops::fstat(file).map(drop))?,
        Errno::EIO,
    )?;
    expect_errno("opening it again", kit.run("reopen", reopen)?, Errno::EIO)?;
    expect_errno("a walk from it", kit.run("openat", inside)?, Errno::EIO)?;
    for fd in [file, below] {
        let done = kit.run("close", move || ops::close(fd))?;
        ensure!(done == Ok(()), "closing an O_PATH descriptor gave {done:?}");
    }
    never_asked(&kit, victim)?;
    never_asked(&kit, dir)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn cwd(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let dir = kit.tree.dir(ROOT, "d");
    kit.tree.file(dir, "file", b"inside");
    let (path, mnt) = (kit.path("d"), kit.mnt.clone());
    let staged = Staged::start(
        &mut kit,
        "a process inside d",
        || std::env::set_current_dir(&path).map_err(|_| 10),
        |()| {
            let refused = |r: ops::Done<()>| r == Err(Errno::EIO);
            let relative = refused(ops::read_file(Path::new("file")).map(drop));
            let create = refused(ops::mkdir(Path::new("new")));
            let here = refused(ops::stat(Path::new(".")).map(drop));
            let list = refused(ops::listdir(Path::new(".")).map(drop));
            // The way up begins in the directory that is lost; an absolute path does not.
            let up = refused(ops::stat(Path::new("../f0")).map(drop));
            let out = std::env::set_current_dir(&mnt).is_ok() && ops::stat(Path::new("f0")).is_ok();
            i32::from(!relative)
                + 2 * i32::from(!create)
                + 4 * i32::from(!here)
                + 8 * i32::from(!list)
                + 16 * i32::from(!up)
                + 32 * i32::from(!out)
        },
    )?;
    lose(&mut kit, &[dir])?;
    let status = staged.go(&mut kit)?;
    ensure!(
        matches!(status, nix::sys::wait::WaitStatus::Exited(_, 0)),
        "the process in the revoked directory says {status:?} \
         (1: relative open, 2: mkdir, 4: stat ., 8: list, 16: through .., 32: leaving)"
    );
    never_asked(&kit, dir)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn mount_below(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let dir = kit.tree.dir(ROOT, "d");
    kit.tree.dir(dir, "point");
    let none = None::<&str>;
    kit.run_on("mount tmpfs on", "d/point", move |p| {
        mount(Some("below"), p, Some("tmpfs"), MsFlags::empty(), none)
    })?
    .context("mounting tmpfs below")?;
    let (table, path) = ("/proc/self/mountinfo", kit.path("d/point"));
    let mounted = move || -> Result<bool> {
        let path = path.display().to_string();
        Ok(std::fs::read_to_string(table)?.contains(&path))
    };
    lose(&mut kit, &[dir])?;
    // Nobody has walked there yet: the kernel has no reason to touch it.
    ensure!(mounted()?, "the mount below went with the recovery itself");
    // Under the same nodeid: nothing but its state tells that the old one is another directory.
    let made = kit.tree.dir(ROOT, "d");
    kit.tree.dir(made, "point");
    succeed(&mut kit, "d", made, dir)?;
    let stat = kit.run_on("stat", "d/point", ops::stat)?;
    ensure!(
        stat.is_ok(),
        "stat of the new d/point gave {:?}",
        stat.err()
    );
    ensure!(
        !mounted()?,
        "something is mounted on a directory that is no more"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn poll(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let bad = open(&mut kit, "f1", OFlag::O_RDONLY)?;
    let good = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    let epolled = open(&mut kit, "f1", OFlag::O_RDONLY)?;
    let wait_poll = |fd: i32| {
        move || {
            let mut one = libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd, one entry.
            Errno::result(unsafe { libc::poll(&mut one, 1, -1) }).map(|_| one.revents)
        }
    };
    let wait_epoll = move || {
        // SAFETY: a fresh epoll instance, one event, which outlives the calls.
        unsafe {
            let epoll = Errno::result(libc::epoll_create1(libc::EPOLL_CLOEXEC))?;
            let mut event = libc::epoll_event {
                events: libc::EPOLLIN as u32,
                u64: 0,
            };
            Errno::result(libc::epoll_ctl(
                epoll,
                libc::EPOLL_CTL_ADD,
                epolled,
                &mut event,
            ))?;
            Errno::result(libc::epoll_wait(epoll, &mut event, 1, -1))?;
            Ok::<u32, Errno>(event.events)
        }
    };
    let on_bad = kit.app("poll of f1", wait_poll(bad))?;
    let on_good = kit.app("poll of f0", wait_poll(good))?;
    let by_epoll = kit.app("epoll of f1", wait_epoll)?;
    for tid in [on_bad.tid, on_good.tid, by_epoll.tid] {
        settled_asleep(&mut kit, tid)?;
    }
    let polls = kit.served.iter().filter(|m| m.is(op::POLL)).count();
    ensure!(polls >= 3, "only {polls} POLLs: nobody waits in poll");
    let victim = node(&kit, "f1")?;
    lose(&mut kit, &[victim])?;
    // The confirmed one asks the new server, which has something for it.
    let m = kit.until_op(op::POLL)?;
    let out = PollOut {
        revents: libc::POLLIN as u32,
        padding: 0,
    };
    kit.send(&m, &Answer::of(&out))?;
    let events = kit.serve(&on_good)?.context("poll")?;
    ensure!(events == libc::POLLIN, "poll of f0 gave {events:#x}");
    let events = kit.serve(&on_bad)?.context("poll")?;
    ensure!(
        events & libc::POLLERR != 0,
        "poll of the revoked file gave {events:#x}"
    );
    let events = kit.serve(&by_epoll)?.context("epoll")?;
    ensure!(
        events & libc::EPOLLERR as u32 != 0,
        "epoll of the revoked file gave {events:#x}"
    );
    never_asked(&kit, victim)?;
    still_serves(&mut kit)
}

fn dir_stream(env: &Env<'_>, cached: bool) -> Result<()> {
    let mut kit = Kit::granted(env)?;
    if cached {
        kit.tree.open_flags = fopen::KEEP_CACHE | fopen::CACHE_DIR;
    }
    let dir = kit.tree.dir(ROOT, "d");
    for i in 0..100 {
        kit.tree.file(dir, &format!("entry-number-{i:03}"), b"");
    }
    if cached {
        // Twice: the second one is read from the cache that the first one filled.
        kit.run_on("list", "d", ops::listdir)?.context("list")?;
    }
    let fd = open(&mut kit, "d", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let some = kit
        .run("getdents", move || rare::getdents(fd, 512))?
        .context("getdents")?;
    ensure!(
        (1..60).contains(&some.len()),
        "{} names at once",
        some.len()
    );
    kit.settle()?;
    lose(&mut kit, &[dir])?;
    expect_errno(
        "the rest of the stream",
        kit.run("getdents", move || rare::getdents(fd, 512))?,
        Errno::EIO,
    )?;
    expect_errno(
        "the stream from its beginning",
        kit.run("rewind", move || {
            rare::rewind(fd)?;
            rare::getdents(fd, 512)
        })?,
        Errno::EIO,
    )?;
    let done = kit.run("closedir", move || ops::close(fd))?;
    ensure!(done == Ok(()), "closing the stream gave {done:?}");
    kit.serve_until("RELEASEDIR", |kit| {
        Ok(kit.served.iter().any(|m| m.is(op::RELEASEDIR)))
    })?;
    never_asked(&kit, dir)?;
    kit.tree.dir(ROOT, "d");
    let names = kit.run_on("list", "d", ops::listdir)?;
    ensure!(names == Ok(vec![]), "the new d lists {names:?}");
    kit.check_counts()?;
    still_serves(&mut kit)
}
