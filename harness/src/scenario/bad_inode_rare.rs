// SPDX-License-Identifier: GPL-2.0
//! Ways to a bad inode (of the family `bad-inode`) that need more than a descriptor: a mapping that is there already, a
//! block device, the parents of a file handle.

use std::os::fd::AsRawFd;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use super::bad_inode::{mounted, mounted_with, spoil};
use super::fuseblk::with_mount;
use super::help::open;
use super::Scenario;
use crate::raw::app::{faults_kill, Proc};
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::msg::Message;
use crate::raw::ops;
use crate::raw::rare;
use crate::raw::tree::Answer;
use crate::raw::wire::{init, op, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "bad-inode/mkwrite",
            "the first write to a page of a bad file that is mapped already is SIGBUS: it would be lost",
            mkwrite,
        ),
        Scenario::series(
            "bad-inode/bmap",
            "FIBMAP of a bad file on a block device tells no block and is not sent",
            |env| with_mount(env, bmap),
        ),
        Scenario::series(
            "bad-inode/parent",
            "on the way up from a file handle nobody is asked for the parent of a bad directory",
            parent,
        ),
    ]
}

/// What the server was asked that `wanted` describes.
fn asked(kit: &Kit<'_>, wanted: impl Fn(&Message) -> bool) -> Vec<String> {
    let found = kit.served.iter().filter(|m| wanted(m));
    found.map(Message::to_string).collect()
}

fn mkwrite(env: &Env<'_>) -> Result<()> {
    let mut kit = mounted(env)?;
    let fd = open(&mut kit, "bad", OFlag::O_RDWR)?;
    let (read, tell_read) = nix::unistd::pipe()?;
    let (go, tell_go) = nix::unistd::pipe()?;
    let close = [kit.dev.raw(), read.as_raw_fd(), tell_go.as_raw_fd()];
    let mut child = Proc::spawn("write to a mapping", &close, || {
        faults_kill();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping where the kernel likes; what is read and written is inside of it.
        unsafe {
            let at = libc::mmap(std::ptr::null_mut(), 4096, prot, libc::MAP_SHARED, fd, 0);
            if at == libc::MAP_FAILED {
                return 2;
            }
            // Mapped from here on, but not for writing.
            at.cast::<u8>().read_volatile();
            drop(tell_read);
            let _ = nix::unistd::read(&go, &mut [0]);
            at.cast::<u8>().write_volatile(b'!');
        }
        0
    })?;
    // Once more in here, as the child has its own.
    drop(go);
    kit.serve_until("the page fault", |_| {
        let ready = crate::raw::dev::poll_one(
            std::os::fd::AsFd::as_fd(&read),
            nix::poll::PollFlags::POLLIN,
            std::time::Duration::ZERO,
        )?;
        Ok(!ready.is_empty())
    })?;
    spoil(&mut kit, "bad")?;
    drop(tell_go);
    kit.serve_until("the write", |_| child.ended())?;
    let status = child.wait(kit.patience)?;
    ensure!(
        matches!(status, WaitStatus::Signaled(_, Signal::SIGBUS, _)),
        "the write ended with {status:?}, not SIGBUS"
    );
    Ok(())
}

fn bmap(kit: &mut Kit<'_>) -> Result<()> {
    let fd = open(kit, "f0", OFlag::O_RDONLY)?;
    spoil(kit, "f0")?;
    kit.served.clear();
    let block = kit.run("FIBMAP", move || {
        let mut block: libc::c_int = 0;
        // SAFETY: FIBMAP reads and writes one int, which lives until the call returns.
        Errno::result(unsafe { libc::ioctl(fd, 1, &mut block) }).map(|_| block)
    })?;
    let sent = asked(kit, |m| m.is(op::BMAP));
    ensure!(
        sent.is_empty(),
        "reached the server although its inode is bad: {sent:?}"
    );
    ensure!(block == Ok(0), "FIBMAP gave {block:?}");
    Ok(())
}

/// The directory is made bad when its own child is found in it, and it has to be found in its parent next.
fn parent(env: &Env<'_>) -> Result<()> {
    let mut kit = mounted_with(env, init::EXPORT_SUPPORT)?;
    let a = kit.tree.dir(ROOT, "a");
    let b = kit.tree.dir(a, "b");
    kit.tree.dir(b, "c");
    kit.tree.file(ROOT, "x", b"");
    let mount = open(&mut kit, "", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let handle = kit.run_on("name_to_handle_at", "a/b/c", rare::name_to_handle)??;
    kit.serve_until("the eviction of the directories", |kit| {
        std::fs::write("/proc/sys/vm/drop_caches", "2").context("drop_caches")?;
        Ok(kit.tree.node(a).nlookup == 0)
    })?;
    let app = kit.app("open_by_handle_at", move || {
        rare::open_by_handle(mount, &handle)
    })?;
    let child = kit.until("the child to be looked up in its directory", |m| {
        m.is(op::LOOKUP) && m.nodeid() == b && m.name().is_ok_and(|n| n == "c")
    })?;
    // The server gives its nodeid to a file.
    let stat = kit.on("stat", "x", ops::stat_cached)?;
    let x = kit.until("x to be looked up", |m| {
        m.is(op::LOOKUP) && m.name().is_ok_and(|n| n == "x")
    })?;
    let mut entry = kit.tree.entry(b).context("b")?;
    entry.attr.mode = libc::S_IFREG | 0o644;
    kit.send(&x, &Answer::of(&entry))?;
    kit.serve(&stat)?.context("stat of x")?;
    kit.served.clear();
    kit.answer(&child)?;
    let opened = kit.serve(&app)?;
    let sent = asked(&kit, |m| {
        m.is(op::LOOKUP) && m.nodeid() == b && m.name().is_ok_and(|n| n == "..")
    });
    ensure!(
        sent.is_empty(),
        "reached the server although its inode is bad: {sent:?} (the handle gave {opened:?})"
    );
    ensure!(
        opened == Err(Errno::ESTALE),
        "the handle below a bad directory gave {opened:?}"
    );
    Ok(())
}
