// SPDX-License-Identifier: GPL-2.0
//! Mappings of revoked files, and programs that run from one: SIGBUS, never old data, from the moment on in which the
//! connection serves again.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use anyhow::{ensure, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::PollFlags;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use super::help::{expect_errno, expect_resent, open, populate, populated, still_serves};
use super::lost::{lose, never_asked, node, Staged};
use super::Scenario;
use crate::raw::app::{faults_kill, state, Proc};
use crate::raw::dev::poll_one;
use crate::raw::env::{skip, Env};
use crate::raw::kit::{Config, Kit};
use crate::raw::ops;
use crate::raw::rare;
use crate::raw::trap::Trap;
use crate::raw::tree::Answer;
use crate::raw::wait::wait_for;
use crate::raw::wire::{fopen, init, op, ROOT};

/// What a process has done to its mapping before the file was revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Touch {
    Nothing,
    Read,
    Written,
}

pub fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for shared in [true, false] {
        for touch in [Touch::Nothing, Touch::Read, Touch::Written] {
            let kind = if shared { "shared" } else { "private" };
            all.push(Scenario::series(
                format!("revoked-map/{kind}-{touch:?}").to_lowercase(),
                "a mapping of a revoked file is SIGBUS, one of a confirmed file goes on",
                move |env| mapping(env, shared, touch),
            ));
        }
    }
    for look_at in [LookAt::Mapped, LookAt::Cached, LookAt::Read, LookAt::Splice] {
        all.push(Scenario::series(
            format!("revoked-map/at-once-{look_at:?}").to_lowercase(),
            "no old data once the connection serves, however late the teardown is",
            move |env| at_once(env, look_at),
        ));
    }
    all.extend([
        Scenario::series(
            "revoked-map/copied-late",
            "nor does a private copy stay that a fault under way had begun to make",
            copied_late,
        ),
        Scenario::series(
            "revoked-map/exec",
            "a program that runs from a revoked file dies of SIGBUS",
            exec,
        ),
        Scenario::series(
            "revoked-map/fsync",
            "lost dirty pages: fsync says EIO, syncfs says it once per descriptor",
            fsync,
        ),
        Scenario::series(
            "revoked-map/syncfs-late",
            "syncfs says it also of a page whose WRITE is made when the file is revoked already",
            syncfs_late,
        ),
        Scenario::series(
            "revoked-map/syncfs-clean",
            "where no data is lost syncfs says nothing",
            syncfs_clean,
        ),
        Scenario::series(
            "revoked-map/syncfs-unlinked",
            "nor of the times of a file that the dead server had removed",
            syncfs_unlinked,
        ),
    ]);
    all
}

const PAGE: usize = 4096;

/// Maps the first page of a file; the descriptor is closed again.
fn map(path: &std::path::Path, shared: bool) -> Result<*mut u8, i32> {
    let fd = ops::open(path, OFlag::O_RDWR).map_err(|_| 10)?;
    let flags = if shared {
        libc::MAP_SHARED
    } else {
        libc::MAP_PRIVATE
    };
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a fresh mapping where the kernel likes.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, prot, flags, fd, 0) };
    ops::close(fd).map_err(|_| 11)?;
    if at == libc::MAP_FAILED {
        return Err(12);
    }
    Ok(at.cast())
}

fn look(at: *mut u8) -> u8 {
    // SAFETY: mapped; if the file is gone then the process dies here, as it should.
    unsafe { at.read_volatile() }
}

fn mapping(env: &Env<'_>, shared: bool, touch: Touch) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let (bad, good) = (kit.path("f1"), kit.path("f0"));
    let staged = Staged::start(
        &mut kit,
        "a process with mappings",
        || {
            faults_kill();
            let maps = [map(&bad, shared)?, map(&good, shared)?];
            for at in maps {
                match touch {
                    Touch::Nothing => {}
                    Touch::Read if look(at) != b'c' => return Err(13),
                    Touch::Read => {}
                    // SAFETY: mapped writable.
                    Touch::Written => unsafe { at.write_volatile(b'W') },
                }
            }
            Ok(maps.map(|at| at as usize))
        },
        |[bad, good]| {
            let wanted = if touch == Touch::Written { b'W' } else { b'c' };
            if look(good as *mut u8) != wanted {
                return 14;
            }
            match look(bad as *mut u8) {
                b'c' => 15,
                b'W' => 16,
                _ => 17,
            }
        },
    )?;
    kit.settle()?;
    let victim = node(&kit, "f1")?;
    lose(&mut kit, &[victim])?;
    expect_sigbus(staged.go(&mut kit)?)?;
    never_asked(&kit, victim)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn expect_sigbus(status: WaitStatus) -> Result<()> {
    ensure!(
        matches!(status, WaitStatus::Signaled(_, Signal::SIGBUS, _)),
        "the process with the mapping ended with {status:?}, not by SIGBUS \
         (14: the confirmed file is wrong; 15, 16, 17: it still sees old, its own, other data)"
    );
    Ok(())
}

/// The page cache of a revoked file goes in the background, which may have to wait for a request that no server has
/// read yet. What applications see must not wait for that: here nothing is read from the device between COMMIT and
/// the look. The page is in the cache, and in the process's table or not.
fn at_once(env: &Env<'_>, look_at: LookAt) -> Result<()> {
    let trap = Trap::arm("teardown")?;
    let mut kit = Kit::granted_with(env, Config::with(init::WRITEBACK_CACHE))?;
    kit.tree.open_flags = fopen::KEEP_CACHE;
    // Looked up last, and so the first in the background's list.
    populate(&mut kit, 2)?;
    let (cached, dirty) = (node(&kit, "f0")?, node(&kit, "f1")?);
    let fd = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    kit.run("pread", move || ops::pread(fd, 10, 0))??;
    let path = kit.path("f0");
    let staged = Staged::start(
        &mut kit,
        "a process with a mapping",
        || {
            faults_kill();
            let at = map(&path, true)?;
            if look_at == LookAt::Mapped && look(at) != b'c' {
                return Err(13);
            }
            Ok(at as usize)
        },
        |at| match look_at {
            LookAt::Read => i32::from(ops::pread(fd, 10, 0) != Err(Errno::EIO)),
            LookAt::Splice => i32::from(ops::splice_read(fd, 10) != Err(Errno::EIO)),
            LookAt::Mapped | LookAt::Cached => match look(at as *mut u8) {
                b'c' => 15,
                _ => 17,
            },
        },
    )?;
    let fd = open(&mut kit, "f1", OFlag::O_RDWR)?;
    let wrote = kit.run("write", move || ops::pwrite(fd, &[7; 4096], 0))?;
    ensure!(wrote == Ok(4096), "the write gave {wrote:?}");
    let sync = kit.app("fsync", move || ops::fsync(fd))?;
    kit.until_op(op::WRITE)?;
    lose(&mut kit, &[cached, dirty])?;
    trap.wait(kit.patience)?;
    // Nobody serves: its end sends nothing that is waited for.
    let status = staged.go_alone(kit.patience)?;
    trap.go();
    match look_at {
        LookAt::Read | LookAt::Splice => ensure!(
            matches!(status, WaitStatus::Exited(_, 0)),
            "{look_at:?} of a revoked file gave data from its cache"
        ),
        LookAt::Mapped | LookAt::Cached => expect_sigbus(status)?,
    }
    expect_errno("fsync", kit.serve(&sync)?, Errno::EIO)?;
    never_asked(&kit, cached)?;
    never_asked(&kit, dirty)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// By what an application may see what is cached of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LookAt {
    /// A mapping, whose page it has touched.
    Mapped,
    /// A mapping, whose page is only in the cache.
    Cached,
    Read,
    Splice,
}

/// A program of two pages that sleeps a millisecond, for ever; its code is in the second one.
#[cfg(target_arch = "x86_64")]
fn program() -> Vec<u8> {
    let mut elf = vec![0u8; 2 * PAGE];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    // Executable, x86-64, version 1; entry; program header right behind.
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &0x40_1000u64.to_ne_bytes());
    put(32, &64u64.to_ne_bytes());
    put(52, &[64, 0, 56, 0, 1, 0]);
    // One segment, read and execute, all of the file.
    put(64, &[1, 0, 0, 0, 5, 0, 0, 0]);
    put(80, &0x40_0000u64.to_ne_bytes());
    put(88, &0x40_0000u64.to_ne_bytes());
    put(96, &(2 * PAGE as u64).to_ne_bytes());
    put(104, &(2 * PAGE as u64).to_ne_bytes());
    put(112, &(PAGE as u64).to_ne_bytes());
    let code = [
        0xb8, 35, 0, 0, 0, // mov eax, nanosleep
        0x48, 0x8d, 0x3d, 12, 0, 0, 0, // lea rdi, [rip + 12]
        0x31, 0xf6, // xor esi, esi
        0x0f, 0x05, // syscall
        0xeb, 0xee, // jmp to the beginning
    ];
    put(PAGE, &code);
    put(PAGE + 32, &1_000_000u64.to_ne_bytes());
    elf
}

#[cfg(not(target_arch = "x86_64"))]
fn program() -> Vec<u8> {
    Vec::new()
}

fn exec(env: &Env<'_>) -> Result<()> {
    let program = program();
    if program.is_empty() {
        return crate::raw::env::skip("the program of this scenario is for x86-64");
    }
    let mut kit = Kit::granted(env)?;
    let victim = kit.tree.file(ROOT, "program", &program);
    kit.tree.node_mut(victim).mode |= 0o111;
    let path = kit.path("program");
    let mut child = Proc::spawn("a program of the mount", &[kit.dev.raw()], || {
        faults_kill();
        let _ = std::io::stdout().flush();
        let c = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).expect("no NUL");
        let _ = nix::unistd::execv(&c, &[&c]);
        10
    })?;
    let tid = child.tid();
    let path = kit.path("program");
    kit.serve_until("the program to run", |kit| {
        let runs = std::fs::read_link(format!("/proc/{tid}/exe")).is_ok_and(|p| p == path);
        Ok(runs && !kit.readable()? && kit.conn.waiting()? == 0 && state(tid) == Some('S'))
    })?;
    kit.recover()?;
    ensure!(!child.ended()?, "a confirmed program ended");
    lose(&mut kit, &[victim])?;
    kit.serve_until("the end of the program", |_| child.ended())?;
    let status = child.wait(kit.patience)?;
    ensure!(
        matches!(status, WaitStatus::Signaled(_, Signal::SIGBUS, _)),
        "the program ended with {status:?}, not by SIGBUS"
    );
    never_asked(&kit, victim)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn fsync(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted_with(env, Config::with(init::WRITEBACK_CACHE))?;
    populate(&mut kit, 1)?;
    let dir = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    let roots = [open(&mut kit, "", dir)?, open(&mut kit, "", dir)?];
    let fds = [
        open(&mut kit, "f0", OFlag::O_RDWR)?,
        open(&mut kit, "f0", OFlag::O_RDWR)?,
    ];
    let fd = fds[0];
    let wrote = kit.run("write", move || ops::pwrite(fd, &[7; 10_000], 0))?;
    ensure!(wrote == Ok(10_000), "the write gave {wrote:?}");
    let page = kit.run("mmap", move || rare::map_untouched(fd))??;
    ensure!(rare::in_page_cache(page)?, "nothing was cached");
    let victim = node(&kit, "f0")?;
    lose(&mut kit, &[victim])?;
    // Every descriptor says it, and goes on saying it: there is nothing that could become right again.
    for fd in fds.into_iter().chain(fds) {
        expect_errno(
            "fsync",
            kit.run("fsync", move || ops::fsync(fd))?,
            Errno::EIO,
        )?;
    }
    kit.serve_until("the pages to go", |_| Ok(!rare::in_page_cache(page)?))?;
    let late = open(&mut kit, "", dir)?;
    for root in roots {
        let first = kit.run("syncfs", move || rare::syncfs(root))?;
        expect_errno("syncfs after data was lost", first, Errno::EIO)?;
        let second = kit.run("syncfs", move || rare::syncfs(root))?;
        ensure!(second == Ok(()), "the second syncfs says {second:?}");
    }
    // Whoever opened later has seen nothing get lost: errseq's rule, an error nobody had seen yet is told once more.
    let third = kit.run("syncfs", move || rare::syncfs(late))?;
    ensure!(
        matches!(third, Ok(()) | Err(Errno::EIO)),
        "syncfs of a later descriptor says {third:?}"
    );
    let again = kit.run("syncfs", move || rare::syncfs(late))?;
    ensure!(again == Ok(()), "its second syncfs says {again:?}");
    never_asked(&kit, victim)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// The page is under writeback until its WRITE is refused, and clean when the cache is looked at.
fn syncfs_late(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted_with(env, Config::with(init::WRITEBACK_CACHE))?;
    populate(&mut kit, 1)?;
    let root = open(&mut kit, "", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let fd = open(&mut kit, "f0", OFlag::O_RDWR)?;
    let wrote = kit.run("write", move || ops::pwrite(fd, &[7; 4096], 0))?;
    ensure!(wrote == Ok(4096), "the write gave {wrote:?}");
    let page = kit.run("mmap", move || rare::map_untouched(fd))??;
    let writes = Trap::arm("queue_writes")?;
    let sync = kit.app("fsync", move || ops::fsync(fd))?;
    writes.wait(kit.patience)?;
    let teardown = Trap::arm_beside("teardown")?;
    let victim = node(&kit, "f0")?;
    lose(&mut kit, &[victim])?;
    teardown.wait(kit.patience)?;
    writes.go();
    expect_errno("fsync", kit.serve(&sync)?, Errno::EIO)?;
    teardown.go();
    kit.serve_until("the pages to go", |_| Ok(!rare::in_page_cache(page)?))?;
    let told = kit.run("syncfs", move || rare::syncfs(root))?;
    expect_errno("syncfs after data was lost", told, Errno::EIO)?;
    never_asked(&kit, victim)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// It did so, and could not say it: the next one knows nothing of the file, and that it is gone.
fn syncfs_unlinked(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted_with(env, Config::with(init::WRITEBACK_CACHE))?;
    populate(&mut kit, 1)?;
    let root = open(&mut kit, "", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let unlink = kit.on("unlink", "f0", ops::unlink)?;
    let old = kit.until_op(op::UNLINK)?;
    let victim = node(&kit, "f0")?;
    lose(&mut kit, &[victim])?;
    let new = kit.next_request()?;
    expect_resent(&kit, &old, &new)?;
    kit.send(&new, &Answer::Ok(Vec::new()))?;
    let result = kit.serve(&unlink)?;
    ensure!(result == Ok(()), "unlink gave {result:?}");
    let sync = kit.run("syncfs", move || rare::syncfs(root))?;
    ensure!(sync == Ok(()), "no data was lost, yet syncfs says {sync:?}");
    still_serves(&mut kit)
}

fn syncfs_clean(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted(env)?;
    kit.tree.open_flags = fopen::KEEP_CACHE;
    populate(&mut kit, 1)?;
    let root = open(&mut kit, "", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let fd = open(&mut kit, "f0", OFlag::O_RDWR)?;
    kit.run("pread", move || ops::pread(fd, 10, 0))??;
    let page = kit.run("mmap", move || rare::map_untouched(fd))??;
    ensure!(rare::in_page_cache(page)?, "nothing was cached");
    kit.settle()?;
    let victim = node(&kit, "f0")?;
    lose(&mut kit, &[victim])?;
    kit.serve_until("the pages to go", |_| Ok(!rare::in_page_cache(page)?))?;
    let sync = kit.run("syncfs", move || rare::syncfs(root))?;
    ensure!(sync == Ok(()), "no data was lost, yet syncfs says {sync:?}");
    expect_errno(
        "fsync",
        kit.run("fsync", move || ops::fsync(fd))?,
        Errno::EIO,
    )?;
    still_serves(&mut kit)
}

fn copied_late(env: &Env<'_>) -> Result<()> {
    for _ in 0..5 {
        if copies_late(env)? {
            return Ok(());
        }
    }
    skip("the fault began anew each time, and found the file revoked")
}

/// A fault that has its page, and copies it when the file is revoked already: only then can the page cache be dropped.
/// Returns false if the kernel made it begin anew, as it may.
fn copies_late(env: &Env<'_>) -> Result<bool> {
    let mut kit = populated(env, 2)?;
    let path = kit.path("f1");
    let fd = open(&mut kit, "f1", OFlag::O_RDONLY)?;
    let at = rare::map_untouched(fd)?;
    let (touched, tell) = nix::unistd::pipe()?;
    let (wait, go) = nix::unistd::pipe()?;
    let close = [kit.dev.raw(), go.as_raw_fd()];
    let trap = Trap::arm("fault_found")?;
    let mut app = Proc::spawn("a process with a private mapping", &close, || {
        faults_kill();
        let Ok(at) = map(&path, false) else {
            return 1;
        };
        // SAFETY: mapped, and within the file.
        unsafe { at.add(1).write_volatile(b'!') };
        let _ = nix::unistd::write(&tell, b"!");
        // Ends when the scenario closes its end.
        let _ = nix::unistd::read(&wait, &mut [0]);
        i32::from(look(at))
    })?;
    drop((tell, wait));
    kit.serve_until("a fault to have its page", |_| Ok(trap.stopped()))?;
    let f1 = node(&kit, "f1")?;
    lose(&mut kit, &[f1])?;
    trap.go();
    let ready = poll_one(touched.as_fd(), PollFlags::POLLIN, kit.patience)?;
    ensure!(!ready.is_empty(), "the fault did not end");
    let anew = !ready.contains(PollFlags::POLLIN);
    if !anew {
        wait_for("f1 to leave the page cache", kit.patience, || {
            Ok(!rare::in_page_cache(at)?)
        })?;
        // What follows in the kernel is one call, of which nothing tells the end.
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(go);
    kit.serve_until("the end of the process", |_| app.ended())?;
    let status = app.wait(kit.patience)?;
    ensure!(
        matches!(status, WaitStatus::Signaled(_, Signal::SIGBUS, _)),
        "the process ended with {status:?}, not by SIGBUS: it sees a file that is revoked"
    );
    kit.check_counts()?;
    still_serves(&mut kit)?;
    Ok(!anew)
}
