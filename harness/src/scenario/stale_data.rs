// SPDX-License-Identifier: GPL-2.0
//! File data that is cached beyond close (`FOPEN_KEEP_CACHE`), of a file that was changed while there was no server.
//!
//! If size or mtime show the change then the kernel drops what it has, whatever was negotiated of invalidation. With
//! the writeback cache data, size and mtime are the kernel's own, and only the server can invalidate them.

use std::os::fd::RawFd;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use super::help::{expect_resent, open, populate, still_serves};
use super::kill::grace;
use super::lost::{node, Staged};
use super::patience::Knob;
use super::stale::{changed_meanwhile, changed_meanwhile_late};
use super::windows::reading_ahead;
use super::Scenario;
use crate::raw::app::{faults_kill, Proc};
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::ops;
use crate::raw::rare;
use crate::raw::trap::Trap;
use crate::raw::wait::wait_for;
use crate::raw::wire::{fopen, init, notify, op, InvalInodeOut, ROOT};

pub(super) const FAULT_AROUND: &str = "/sys/kernel/debug/fault_around_bytes";
const OLD: &[u8] = b"content of 0";
const NEW: &[u8] = b"Content of 0";

pub fn scenarios() -> Vec<Scenario> {
    let ways: [(&str, u64); 3] = [
        ("plain", 0),
        ("auto-inval", init::AUTO_INVAL_DATA),
        ("explicit-inval", init::EXPLICIT_INVAL_DATA),
    ];
    let mut all = Vec::new();
    for (name, flags) in ways {
        all.push(Scenario::series(
            format!("stale-data/mtime-{name}"),
            "data of a file whose mtime changed meanwhile is read again",
            move |env| keep_cache(env, flags, NEW),
        ));
        all.push(Scenario::series(
            format!("stale-data/size-{name}"),
            "data of a file whose size changed meanwhile is read again",
            move |env| keep_cache(env, flags, b"longer than what was there before"),
        ));
    }
    all.extend([
        Scenario::series(
            "stale-data/unchanged",
            "data of a file that did not change stays cached",
            unchanged,
        ),
        Scenario::series(
            "stale-data/mmap",
            "a mapping shows the changed data, and goes on",
            mapping,
        ),
        Scenario::series(
            "stale-data/fault-under-way",
            "nor does a page stay mapped that a fault had found before the change was known",
            fault_under_way,
        ),
        Scenario::series(
            "stale-data/killed",
            "who waits until what is stale is dropped can be killed",
            killed,
        ),
        Scenario::series("stale-data/splice", "splice gives the changed data", splice),
        Scenario::series(
            "stale-data/not-committed",
            "what a server showed that did not commit drops nothing for ever",
            not_committed,
        ),
        Scenario::series(
            "stale-data/dirty-mmap",
            "what was written to a mapping is not lost with what is stale",
            dirty_mmap,
        ),
        Scenario::series(
            "stale-data/writeback",
            "with the writeback cache data stays until the server invalidates it after COMMIT",
            writeback,
        ),
    ]);
    all
}

/// A mount with f0 in the page cache, and a descriptor of it.
pub(super) fn cached<'a>(env: &'a Env<'a>, flags: u64) -> Result<(Kit<'a>, RawFd)> {
    let mut kit = Kit::granted_with(env, Config::with(flags))?;
    kit.tree.open_flags = fopen::KEEP_CACHE;
    // No handle is flushed with a request that would be in the way.
    populate(&mut kit, 1)?;
    let fd = open(&mut kit, "f0", OFlag::O_RDWR)?;
    let read = kit.run("pread", move || ops::pread(fd, 12, 0))?;
    ensure!(read == Ok(OLD.to_vec()), "f0 reads {read:?}");
    kit.settle()?;
    Ok((kit, fd))
}

fn reads_of(kit: &Kit<'_>) -> usize {
    kit.served.iter().filter(|m| m.is(op::READ)).count()
}

fn change(kit: &mut Kit<'_>, data: &[u8]) {
    let file = kit.tree.child(ROOT, "f0").expect("populated");
    let node = kit.tree.node_mut(file);
    node.data = data.to_vec();
    node.mtime += 10;
}

fn keep_cache(env: &Env<'_>, flags: u64, data: &'static [u8]) -> Result<()> {
    let (mut kit, fd) = cached(env, flags)?;
    kit.served.clear();
    kit.run("pread", move || ops::pread(fd, 12, 0))??;
    ensure!(reads_of(&kit) == 0, "the data was not cached");
    let _late = changed_meanwhile_late(&mut kit, |kit| change(kit, data))?;
    let read = kit.run("pread", move || ops::pread(fd, 12, 0))?;
    ensure!(
        read == Ok(data[..12].to_vec()),
        "the descriptor reads {:?}",
        read.map(|b| String::from_utf8_lossy(&b).into_owned())
    );
    let read = kit.run_on("read", "f0", ops::read_file)?;
    ensure!(read == Ok(data.to_vec()), "opened anew f0 reads {read:?}");
    // Where no trap holds it up, the worker may come only now, and drop it once more.
    for _ in 0..2 {
        kit.served.clear();
        kit.run("pread", move || ops::pread(fd, 12, 0))??;
        if reads_of(&kit) == 0 {
            break;
        }
    }
    ensure!(reads_of(&kit) == 0, "the new data is not cached");
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn unchanged(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    changed_meanwhile(&mut kit, |_| {})?;
    let read = kit.run("pread", move || ops::pread(fd, 12, 0))?;
    ensure!(read == Ok(OLD.to_vec()), "f0 reads {read:?}");
    ensure!(reads_of(&kit) == 0, "data that did not change was dropped");
    still_serves(&mut kit)
}

/// A process that looks at the first byte of f0 in a shared mapping, before and after.
fn looker(kit: &mut Kit<'_>) -> Result<Staged> {
    let path = kit.path("f0");
    let look = |at: usize| {
        // SAFETY: the page is mapped and the file is not empty.
        unsafe { (at as *const u8).read_volatile() }
    };
    Staged::start(
        kit,
        "a process with a mapping",
        || {
            faults_kill();
            let fd = ops::open(&path, OFlag::O_RDWR).map_err(|_| 10)?;
            let at = rare::map_untouched(fd).map_err(|_| 11)?;
            match look(at) {
                b'c' => Ok(at),
                _ => Err(12),
            }
        },
        move |at| i32::from(look(at)),
    )
}

fn mapping(env: &Env<'_>) -> Result<()> {
    let (mut kit, _) = cached(env, 0)?;
    let staged = looker(&mut kit)?;
    let _late = changed_meanwhile_late(&mut kit, |kit| change(kit, NEW))?;
    let status = staged.go(&mut kit)?;
    ensure!(
        matches!(status, WaitStatus::Exited(_, code) if code == i32::from(b'C')),
        "in its mapping the process saw {status:?}, not {}",
        b'C'
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// The fault has seen that nothing is stale, and maps its page when the recovery is over.
fn fault_under_way(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let path = kit.path("f0");
    // SAFETY: the page is mapped and the file is not empty.
    let look = |at: usize| unsafe { (at as *const u8).read_volatile() };
    let staged = Staged::start(
        &mut kit,
        "a process with a mapping",
        || {
            faults_kill();
            let fd = ops::open(&path, OFlag::O_RDWR).map_err(|_| 10)?;
            rare::map_untouched(fd).map_err(|_| 11)
        },
        move |at| {
            // Whatever the first look gave, it began before the recovery did.
            look(at);
            i32::from(look(at))
        },
    )?;
    kit.settle()?;
    // Or what is cached is mapped under RCU, where nobody can be stopped.
    let _knob = Knob::set(FAULT_AROUND, "4096")?;
    let trap = Trap::arm("fault_checked")?;
    let mut child = staged.let_go();
    trap.wait(kit.patience)?;
    changed_meanwhile(&mut kit, |kit| change(kit, NEW))?;
    let at = rare::map_untouched(fd)?;
    let dropped = wait_for("f0 to leave the page cache", kit.patience, || {
        Ok(!rare::in_page_cache(at)?)
    });
    trap.go();
    kit.serve_until("the end of the process", |_| child.ended())?;
    let status = child.wait(kit.patience)?;
    ensure!(
        matches!(status, WaitStatus::Exited(_, code) if code == i32::from(b'C')),
        "in its mapping the process saw {status:?}, not {}",
        b'C'
    );
    dropped?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// A page of the file is being read, which the new server does not answer, and nothing can be dropped before that.
fn killed(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd, old) = reading_ahead(env)?;
    kit.restarted()?;
    let big = node(&kit, "big")?;
    kit.tree.node_mut(big).mtime += 10;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    kit.commit(&recovered)?;
    let read = kit.next_request()?;
    expect_resent(&kit, &old, &read)?;
    let mut reader = Proc::spawn("pread", &[kit.dev.raw()], || {
        i32::from(ops::pread(fd, 12, 0).is_err())
    })?;
    reader.wait_asleep(kit.patience)?;
    ensure!(
        !kit.readable()?,
        "the reader waits for the server, not for the page"
    );
    reader.signal(Signal::SIGKILL)?;
    let killed = Instant::now();
    kit.serve_until("the end of who waits for a page that is being read", |_| {
        reader.ended()
    })?;
    let took = killed.elapsed();
    ensure!(took <= grace(&kit), "it took {took:?} to die");
    reader.wait(kit.patience)?;
    kit.answer(&read)?;
    kit.settle()?;
    still_serves(&mut kit)
}

fn splice(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let _late = changed_meanwhile_late(&mut kit, |kit| change(kit, NEW))?;
    let spliced = kit.run("splice", move || {
        let (read, write) = nix::unistd::pipe()?;
        use std::os::fd::AsRawFd;
        rare::splice_into(fd, write.as_raw_fd(), 12)?;
        rare::read(read.as_raw_fd(), 100)
    })?;
    ensure!(spliced == Ok(NEW.to_vec()), "splice gave {spliced:?}");
    still_serves(&mut kit)
}

fn not_committed(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    kit.restarted()?;
    let mut shown = 0;
    // This server says that everything changed, and dies before it commits.
    kit.answer_replays(&mut |tree, r| {
        let mut out = tree.attr_out(r.nodeid)?;
        out.attr.mtime += 99;
        shown += 1;
        Some(crate::raw::tree::Answer::of(&out))
    })?;
    ensure!(shown >= 2, "{shown} replays");
    let while_held = kit.app("pread", move || ops::pread(fd, 6, 0))?;
    while_held.wait_asleep(kit.patience)?;
    kit.recover()?;
    kit.served.clear();
    let read = kit.serve(&while_held)?;
    ensure!(read == Ok(OLD[..6].to_vec()), "meanwhile f0 reads {read:?}");
    let read = kit.run("pread", move || ops::pread(fd, 6, 0))?;
    ensure!(read == Ok(OLD[..6].to_vec()), "f0 reads {read:?}");
    ensure!(
        reads_of(&kit) == 0,
        "data was dropped though the server that served on showed no change"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn dirty_mmap(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let path = kit.path("f0");
    let staged = Staged::start(
        &mut kit,
        "a process that writes to its mapping",
        || {
            faults_kill();
            let fd = ops::open(&path, OFlag::O_RDWR).map_err(|_| 10)?;
            // SAFETY: a fresh mapping where the kernel likes; written within the file.
            unsafe {
                let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
                let at = libc::mmap(std::ptr::null_mut(), 4096, prot, flags, fd, 0);
                if at == libc::MAP_FAILED {
                    return Err(11);
                }
                at.cast::<u8>().add(11).write_volatile(b'!');
                Ok(at as usize)
            }
        },
        // SAFETY: still mapped.
        |at| i32::from(unsafe { (at as *const u8).add(11).read_volatile() }),
    )?;
    changed_meanwhile(&mut kit, |kit| change(kit, NEW))?;
    // Dropping it writes what is dirty first, as ever the whole page: who writes to a mapping while the file changes
    // elsewhere wins.
    let read = kit.run("pread", move || ops::pread(fd, 12, 0))?;
    ensure!(
        read.as_ref().is_ok_and(|b| b[11] == b'!'),
        "what was written to the mapping is lost: {read:?}"
    );
    let file = node(&kit, "f0")?;
    ensure!(
        kit.tree.node(file).data[11] == b'!',
        "the server did not get what was written to the mapping"
    );
    let status = staged.go(&mut kit)?;
    ensure!(
        matches!(status, WaitStatus::Exited(_, code) if code == i32::from(b'!')),
        "in its mapping the process saw {status:?}"
    );
    still_serves(&mut kit)
}

fn writeback(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, init::WRITEBACK_CACHE)?;
    changed_meanwhile(&mut kit, |kit| change(kit, NEW))?;
    let read = kit.run("pread", move || ops::pread(fd, 12, 0))?;
    ensure!(
        read == Ok(OLD.to_vec()),
        "the limit is gone, say so in the documentation: f0 reads {read:?}"
    );
    let inval = InvalInodeOut {
        ino: node(&kit, "f0")?,
        off: 0,
        len: 0,
    };
    kit.dev
        .notify(notify::INVAL_INODE, &inval, &[])
        .context("INVAL_INODE after COMMIT")?;
    let read: Result<Vec<u8>, Errno> = kit.run("pread", move || ops::pread(fd, 12, 0))?;
    ensure!(
        read == Ok(NEW.to_vec()),
        "after the invalidation f0 reads {read:?}"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}
