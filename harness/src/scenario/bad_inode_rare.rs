// SPDX-License-Identifier: GPL-2.0
//! Ways to a bad inode (of the family `bad-inode`) that need more than a descriptor: a mapping that is there already, a
//! block device, the parents of a file handle.

use std::os::fd::AsRawFd;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use super::bad_inode::{mounted, spoil, unsigned_with};
use super::fuseblk::with_mount_of;
use super::help::open;
use super::Scenario;
use crate::raw::app::{faults_kill, Proc};
use crate::raw::env::{skip, Env};
use crate::raw::kit::{Config, Kit};
use crate::raw::msg::Message;
use crate::raw::ops;
use crate::raw::rare;
use crate::raw::tree::Answer;
use crate::raw::wire::{fopen, init, op, ROOT};

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
            |env| with_mount_of(env, Config::unsigned(), bmap),
        ),
        Scenario::series(
            "bad-inode/parent",
            "on the way up from a file handle nobody is asked for the parent of a bad directory",
            parent,
        ),
        Scenario::series(
            "bad-inode/passthrough",
            "splice() of a bad file does not get past the check to its backing file",
            passthrough,
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
    let mut kit = unsigned_with(env, init::EXPORT_SUPPORT)?;
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

/// `struct fuse_backing_map`.
#[repr(C)]
struct BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

/// `FUSE_DEV_IOC_BACKING_OPEN`: the id that OPEN names the backing file by.
fn backing_open(kit: &Kit<'_>, file: &std::fs::File) -> Result<i32> {
    let map = BackingMap {
        fd: file.as_raw_fd(),
        flags: 0,
        padding: 0,
    };
    const BACKING_OPEN: libc::c_ulong = 0x4010_e501;
    // SAFETY: the kernel reads the structure, which lives until the call returns.
    let id = unsafe { libc::ioctl(kit.dev.raw(), BACKING_OPEN as _, &map) };
    Errno::result(id).context("FUSE_DEV_IOC_BACKING_OPEN")
}

fn passthrough(env: &Env<'_>) -> Result<()> {
    const SECRET: &[u8] = b"of the backing file";
    let base = Config::unsigned();
    let mut kit = Kit::mount(
        env,
        Config {
            flags: base.flags | init::PASSTHROUGH,
            max_stack_depth: 1,
            ..base
        },
    )?;
    if kit.offered & init::PASSTHROUGH == 0 {
        return skip("this kernel has no FUSE_PASSTHROUGH");
    }
    let path = env.scratch.join("backing");
    std::fs::write(&path, SECRET).context("the backing file")?;
    let backing = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .context("the backing file")?;
    kit.tree.file(ROOT, "bad", &[1; 100]);
    kit.tree.open_flags = fopen::PASSTHROUGH;
    kit.tree.backing_id = backing_open(&kit, &backing)?;
    let fd = open(&mut kit, "bad", OFlag::O_RDWR)?;
    let good = kit.run("pread", move || ops::pread(fd, 100, 0))?;
    ensure!(
        good == Ok(SECRET.to_vec()),
        "there is no passthrough: {good:?}"
    );
    spoil(&mut kit, "bad")?;
    let out = kit.run("splice", move || ops::splice_read(fd, 10))?;
    ensure!(
        out == Err(Errno::EIO),
        "splice from a bad file gave {out:?}"
    );
    let into = kit.run("splice", move || rare::splice_from_pipe(fd, b"new"))?;
    ensure!(
        into == Err(Errno::EIO),
        "splice into a bad file gave {into:?}"
    );
    let now = std::fs::read(&path).context("the backing file")?;
    ensure!(
        now == SECRET,
        "the backing file says {:?} now",
        String::from_utf8_lossy(&now)
    );
    Ok(())
}
