// SPDX-License-Identifier: GPL-2.0
//! Writes, mappings and faults while the data of a file is stale (of the family `stale-data`).

use std::os::fd::{AsFd, RawFd};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use nix::fcntl::OFlag;
use nix::poll::PollFlags;

use super::help::{expect_resent, open, still_serves};
use super::kill::dies;
use super::lost::{node, Staged};
use super::patience::Knob;
use super::stale::changed_meanwhile;
use super::stale_data::{cached, FAULT_AROUND};
use super::stale_drop::{
    change_mapped, crash_in_write, map, reads, store_and_sync, store_byte, Beside,
};
use super::windows::reading_ahead;
use super::Scenario;
use crate::raw::app::{App, Proc};
use crate::raw::dev::poll_one;
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::msg::Message;
use crate::raw::ops::{self, Done};
use crate::raw::rare;
use crate::raw::trap::Trap;
use crate::raw::tree::Answer;
use crate::raw::wait::wait_for;
use crate::raw::wire::{fopen, notify, op, InvalInodeOut, WriteOut};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "stale-data/append-mode-under-way",
            "what the server appends is not appended twice",
            append_mode,
        ),
        Scenario::series(
            "stale-data/append-mode-dirty",
            "nor overwritten by a page that came back too early, and is written later",
            append_mode_dirty,
        ),
        Scenario::series(
            "stale-data/append-dirty",
            "nor made zeroes in the cache, before the kernel knows where the file ends by then",
            append_dirty,
        ),
        Scenario::series(
            "stale-data/append-held",
            "what is appended while requests are held is not zeroes if its page is written meanwhile",
            append_held,
        ),
        Scenario::series(
            "stale-data/evicted-under-way",
            "a write that was sent once more is not undone by a page that comes back once more",
            evicted,
        ),
        Scenario::series(
            "stale-data/fault-waits",
            "who waits in a fault for what is stale has no lock that others need",
            |env| fault_waits(env, op::WRITE, false),
        ),
        Scenario::series(
            "stale-data/fault-waits-again",
            "nor if what was stale had been dropped a moment ago as well",
            |env| fault_waits(env, op::WRITE, true),
        ),
        Scenario::series(
            "stale-data/fault-reads",
            "nor has he while his page is read again",
            |env| fault_waits(env, op::READ, false),
        ),
        Scenario::series(
            "stale-data/short-under-way",
            "of a write that is sent once more, only what was taken is",
            short,
        ),
        Scenario::series(
            "stale-data/invalidated-under-way",
            "what a server has invalidated is not put back",
            invalidated,
        ),
        Scenario::series(
            "stale-data/populate",
            "who wants pages in a mapping gets them, though something else stays stale",
            populate_beside,
        ),
        Scenario::series(
            "stale-data/put-back",
            "a write that ends leaves alone what was stored meanwhile where the file has always been",
            put_back,
        ),
        Scenario::series(
            "stale-data/write-keeps-page",
            "as long as a write is under way its page stays in the cache, also where the file ends",
            write_keeps_page,
        ),
        Scenario::series(
            "stale-data/killed-write-behind",
            "what a killed write leaves is no reason for others to wait",
            killed_write_behind,
        ),
        Scenario::series(
            "stale-data/killed-write-mapped",
            "nor does a mapping go on to show what no server has got",
            killed_write_mapped,
        ),
    ]
}

pub(super) type Synced = App<nix::Result<i32>>;

pub(super) fn synced(kit: &mut Kit<'_>, mapped: &Synced) -> Result<()> {
    let synced = kit.serve(mapped)?;
    ensure!(synced == Ok(0), "sync_file_range gave {synced:?}");
    Ok(())
}

pub(super) fn server_has(kit: &mut Kit<'_>, wanted: &str) -> Result<()> {
    let f0 = node(kit, "f0")?;
    let there = String::from_utf8_lossy(&kit.tree.node_mut(f0).data).into_owned();
    ensure!(there == wanted, "the server has {there:?}");
    Ok(())
}

/// The server appends where the file ends by then, and that is not where the kernel thinks.
fn append_mode(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let log = open(&mut kit, "f0", OFlag::O_RDWR | OFlag::O_APPEND)?;
    let app = kit.app("a write", move || ops::pwrite(log, b", mine", 0))?;
    let old = kit.until_op(op::WRITE)?;
    let f0 = node(&kit, "f0")?;
    let file = kit.tree.node_mut(f0);
    file.data.extend_from_slice(b", another's");
    file.mtime += 10;
    kit.recover()?;
    let write = kit.next_request()?;
    expect_resent(&kit, &old, &write)?;
    let mapped = change_mapped(&mut kit, fd)?;
    let whole = kit.until_op(op::WRITE)?;
    kit.answer(&whole)?;
    synced(&mut kit, &mapped)?;
    kit.answer(&write)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(6), "the write gave {wrote:?}");
    let wanted = "cXntent of 0, another's, mine";
    server_has(&mut kit, wanted)?;
    reads(&mut kit, fd, 0, wanted.as_bytes())
}

/// A page that was read before the WRITE was executed is changed in a mapping, and written after it was.
fn append_mode_dirty(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let log = open(&mut kit, "f0", OFlag::O_RDWR | OFlag::O_APPEND)?;
    let app = kit.app("a write", move || ops::pwrite(log, b", mine", 0))?;
    let write = crash_in_write(&mut kit)?;
    let (at, _) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    store_byte(&mut kit, at, 1, b'X')?;
    kit.answer(&write)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(6), "the write gave {wrote:?}");
    kit.run("fsync", move || ops::fsync(fd))??;
    let wanted = "cXntent of 0, mine";
    server_has(&mut kit, wanted)?;
    reads(&mut kit, fd, 0, wanted.as_bytes())
}

/// No server dies. The page where the file has ended is changed in a mapping, and written as soon as the WRITE is answered.
fn append_dirty(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let (at, _) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    let app = kit.app("a write", move || ops::pwrite(fd, b", and more", 12))?;
    let write = kit.until_op(op::WRITE)?;
    let restored = Trap::arm("write_restored")?;
    kit.answer(&write)?;
    restored.wait(kit.patience)?;
    let mapped = store_and_sync(&mut kit, fd, at)?;
    synced(&mut kit, &mapped)?;
    restored.go();
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(10), "the write gave {wrote:?}");
    server_has(&mut kit, "cXntent of 0, and more")?;
    reads(&mut kit, fd, 0, b"cXntent of 0, and more")
}

/// The page where the file ends is dirty, and is written while the WRITE that goes past its end waits for a server.
fn append_held(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let (at, _) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    let app = kit.app("a write", move || ops::pwrite(fd, b", and more", 12))?;
    kit.until_op(op::WRITE)?;
    kit.restarted()?;
    let mapped = store_and_sync(&mut kit, fd, at)?;
    mapped.wait_asleep(kit.patience)?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    kit.commit(&recovered)?;
    let (write, whole) = (kit.next_request()?, kit.next_request()?);
    kit.answer(&write)?;
    // It waits for the page that is being written, and has nothing behind the old end.
    app.wait_asleep(kit.patience)?;
    let early = kit.app("a read before", move || ops::pread(fd, 100, 0))?;
    kit.until_op(op::GETATTR).and_then(|m| kit.answer(&m))?;
    let early = early.finish(kit.patience)?;
    ensure!(
        early == Ok(b"cXntent of 0".to_vec()),
        "before the end of the write f0 reads {early:?}"
    );
    kit.answer(&whole)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(10), "the write gave {wrote:?}");
    synced(&mut kit, &mapped)?;
    server_has(&mut kit, "cXntent of 0, and more")?;
    reads(&mut kit, fd, 0, b"cXntent of 0, and more")
}

/// A WRITE to f0 that was executed, and undone by the write-back of a page that came back too early. It is to be answered.
pub(super) struct Undone<'a> {
    pub kit: Kit<'a>,
    pub fd: RawFd,
    /// Where f0 is mapped.
    pub at: usize,
    pub app: App<Done<usize>>,
    pub write: Message,
    pub answer: Answer,
}

impl<'a> Undone<'a> {
    pub fn by_write_back(env: &'a Env<'a>, asked: u64) -> Result<Undone<'a>> {
        let (mut kit, fd) = cached(env, asked)?;
        let app = kit.app("a write", move || ops::pwrite(fd, b"C", 0))?;
        let write = crash_in_write(&mut kit)?;
        let (at, first) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
        ensure!(first == b"c", "before the WRITE f0 begins with {first:?}");
        let mapped = store_and_sync(&mut kit, fd, at)?;
        let whole = kit.until_op(op::WRITE)?;
        let answer = kit.tree.apply(&write)?;
        kit.answer(&whole)?;
        synced(&mut kit, &mapped)?;
        Ok(Undone {
            kit,
            fd,
            at,
            app,
            write,
            answer,
        })
    }
}

/// The mapping goes, and what is cached.
pub(super) fn evict(kit: &mut Kit<'_>, fd: RawFd, at: usize) -> Result<()> {
    kit.run("munmap", move || {
        // SAFETY: nobody uses that mapping any more.
        unsafe { libc::munmap(at as *mut libc::c_void, 3 * 4096) }
    })?;
    uncache(kit, fd)
}

/// What is cached goes.
pub(super) fn uncache(kit: &mut Kit<'_>, fd: RawFd) -> Result<()> {
    let code = kit.run("fadvise", move || {
        // SAFETY: plain numbers.
        unsafe { libc::posix_fadvise(fd, 0, 0, libc::POSIX_FADV_DONTNEED) }
    })?;
    ensure!(code == 0, "posix_fadvise gave {code}");
    Ok(())
}

/// It is sent once more. Before the server executes it somebody wants its page to leave the cache, and to come back as it
/// is there.
fn evicted(env: &Env<'_>) -> Result<()> {
    let Undone {
        mut kit,
        fd,
        at,
        app,
        write,
        answer,
    } = Undone::by_write_back(env, 0)?;
    kit.send(&write, &answer)?;
    let again = kit.until_op(op::WRITE)?;
    evict(&mut kit, fd, at)?;
    let (at, _) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    store_byte(&mut kit, at, 2, b'Y')?;
    kit.answer(&again)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(1), "the write gave {wrote:?}");
    kit.run("fsync", move || ops::fsync(fd))??;
    server_has(&mut kit, "CXYtent of 0")?;
    reads(&mut kit, fd, 0, b"CXYtent of 0")
}

/// Whether thread `tid` of this process sleeps.
pub(super) fn sleeps(tid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    state.starts_with(['D', 'S'])
}

/// A thread touches a page that is dirty and stale, and waits for an answer to `opcode`; another one changes the mapping.
fn fault_waits(env: &Env<'_>, opcode: u32, again: bool) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let f0 = node(&kit, "f0")?;
    let path = kit.path("f0");
    if again {
        changed_meanwhile(&mut kit, |kit| kit.tree.node_mut(f0).mtime += 10)?;
        let page = rare::map_untouched(fd)?;
        wait_for("f0 to leave the page cache", kit.patience, || {
            Ok(!rare::in_page_cache(page)?)
        })?;
    }
    kit.tree.open_flags |= fopen::NOFLUSH;
    let (done, tell) = nix::unistd::pipe()?;
    let (told, go_on) = nix::unistd::pipe()?;
    let staged = Staged::start(
        &mut kit,
        "a process with a mapping",
        || map_dirty(&path),
        |at| {
            let (tid, theirs) = std::sync::mpsc::channel();
            let toucher = thread::spawn(move || {
                let _ = tid.send(nix::unistd::gettid().as_raw());
                // SAFETY: mapped.
                unsafe { (at as *const u8).read_volatile() }
            });
            let Ok(tid) = theirs.recv() else { return 20 };
            let _ = nix::unistd::read(&told, &mut [0]);
            while !sleeps(tid) {
                thread::yield_now();
            }
            let behind = (at + 4096) as *mut libc::c_void;
            // SAFETY: the second page of that mapping, which nobody uses.
            if unsafe { libc::mprotect(behind, 4096, libc::PROT_READ) } != 0 {
                return 21;
            }
            let _ = nix::unistd::write(&tell, b"!");
            toucher.join().map_or(22, i32::from)
        },
    )?;
    drop((tell, told));
    kit.settle()?;
    let late = Trap::arm_if_any("teardown")?;
    changed_meanwhile(&mut kit, |kit| kit.tree.node_mut(f0).mtime += 10)?;
    let mut child = staged.let_go();
    // The page is being written because it is to be dropped.
    let mut last = kit.until_op(op::WRITE)?;
    if opcode == op::READ {
        kit.answer(&last)?;
        last = kit.until_op(op::READ)?;
    }
    nix::unistd::write(&go_on, b"!")?;
    let changed = wait_for("another thread to change the mapping", kit.patience, || {
        Ok(!poll_one(done.as_fd(), PollFlags::POLLIN, Duration::ZERO)?.is_empty())
    });
    kit.answer(&last)?;
    drop(late);
    kit.serve_until("the end of the process", |_| child.ended())?;
    changed?;
    let code = child.wait_code(kit.patience)?;
    ensure!(code == i32::from(b'X'), "the process ended with {code}");
    kit.settle()?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// The WRITE that was sent again is answered with less than was asked for.
fn short(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let app = kit.app("a write", move || ops::pwrite(fd, b"CONTENT", 0))?;
    let write = crash_in_write(&mut kit)?;
    let mapped = change_mapped(&mut kit, fd)?;
    let whole = kit.until_op(op::WRITE)?;
    let f0 = node(&kit, "f0")?;
    kit.tree.node_mut(f0).data[0] = b'C';
    let one = WriteOut {
        size: 1,
        padding: 0,
    };
    kit.send(&write, &Answer::of(&one))?;
    kit.answer(&whole)?;
    synced(&mut kit, &mapped)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(1), "the write gave {wrote:?}");
    server_has(&mut kit, "CXntent of 0")?;
    reads(&mut kit, fd, 0, b"CXntent of 0")
}

/// No server dies. The WRITE was executed, then the file was changed by somebody else, and the server said so.
fn invalidated(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let app = kit.app("a write", move || ops::pwrite(fd, &[b'A'; 20], 0))?;
    let write = kit.until_op(op::WRITE)?;
    let answer = kit.tree.apply(&write)?;
    let f0 = node(&kit, "f0")?;
    kit.tree.node_mut(f0).data = vec![b'b'; 20];
    let inval = InvalInodeOut {
        ino: f0,
        off: 0,
        len: 0,
    };
    kit.dev
        .notify(notify::INVAL_INODE, &inval, &[])
        .context("INVAL_INODE")?;
    let early = kit.run("a read before", move || ops::pread(fd, 12, 0))?;
    ensure!(early == Ok(vec![b'b'; 12]), "f0 reads {early:?}");
    let (at, _) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    store_byte(&mut kit, at, 1, b'X')?;
    kit.send(&write, &answer)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(20), "the write gave {wrote:?}");
    kit.run("fsync", move || ops::fsync(fd))??;
    server_has(&mut kit, "bXbbbbbbbbbbbbbbbbbb")?;
    reads(&mut kit, fd, 0, b"bXbbbbbbbbbbbbbbbbbb")
}

fn map_dirty(path: &Path) -> std::result::Result<usize, i32> {
    let fd = ops::open(path, OFlag::O_RDWR).map_err(|_| 10)?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a fresh mapping where the kernel likes.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            2 * 4096,
            prot,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(11);
    }
    // SAFETY: mapped, and the file is not empty.
    unsafe { at.cast::<u8>().write_volatile(b'X') };
    Ok(at as usize)
}

/// A page stays for a direct read, and all others are dropped by faults only now and then.
fn populate_beside(env: &Env<'_>) -> Result<()> {
    let mut beside = Beside::a_direct_read(env)?;
    let at = beside.at;
    let locked = beside.kit.run("mlock", move || {
        // SAFETY: mapped.
        nix::errno::Errno::result(unsafe { libc::mlock(at as *const libc::c_void, 2 * 4096) })
    })?;
    ensure!(locked == Ok(0), "mlock gave {locked:?}");
    beside.end()
}

/// No server dies. The WRITE begins before the old end of the file and goes past it.
fn put_back(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let (at, _) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    let app = kit.app("a write", move || ops::pwrite(fd, &[b'A'; 20], 0))?;
    let write = kit.until_op(op::WRITE)?;
    store_byte(&mut kit, at, 1, 0)?;
    kit.answer(&write)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(20), "the write gave {wrote:?}");
    kit.run("fsync", move || ops::fsync(fd))??;
    server_has(&mut kit, "A\0AAAAAAAAAAAAAAAAAA")?;
    reads(&mut kit, fd, 0, b"A\0AAAAAAAAAAAAAAAAAA")
}

/// No server dies. If the page went, a READ could bring back what was there before.
fn write_keeps_page(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let app = kit.app("a write", move || ops::pwrite(fd, &[b'A'; 20], 0))?;
    let write = kit.until_op(op::WRITE)?;
    kit.served.clear();
    kit.run("fadvise", move || {
        // SAFETY: plain numbers.
        unsafe { libc::posix_fadvise(fd, 0, 0, libc::POSIX_FADV_DONTNEED) }
    })?;
    let early = kit.run("a read before", move || ops::pread(fd, 12, 0))?;
    ensure!(
        early == Ok(vec![b'A'; 12]) && !kit.served.iter().any(|m| m.is(op::READ)),
        "the page has left the cache, f0 reads {early:?}"
    );
    kit.answer(&write)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(20), "the write gave {wrote:?}");
    reads(&mut kit, fd, 0, &[b'A'; 20])
}

/// Pages of the same file are being read, which the next server does not answer. Another file is revoked.
fn killed_write_behind(env: &Env<'_>) -> Result<()> {
    let (mut kit, _, old) = reading_ahead(env)?;
    kit.tree.open_flags = fopen::KEEP_CACHE | fopen::NOFLUSH;
    let big = open(&mut kit, "big", OFlag::O_RDWR)?;
    let small = open(&mut kit, "small", OFlag::O_RDWR)?;
    kit.run("pread", move || ops::pread(small, 5, 0))??;
    let page = kit.run("mmap", move || rare::map_untouched(small))??;
    ensure!(rare::in_page_cache(page)?, "nothing was cached");
    let mut writer = Proc::spawn("a write", &[kit.dev.raw()], || {
        i32::from(ops::pwrite(big, b"X", 512 << 10).is_err())
    })?;
    kit.until_op(op::WRITE)?;
    writer.wait_asleep(kit.patience)?;
    kit.restarted()?;
    dies(&kit, &mut writer, "in a write")?;
    let lost = node(&kit, "small")?;
    let recovered =
        kit.answer_replays(&mut |_, r| (r.nodeid == lost).then_some(Answer::Err(libc::ESTALE)))?;
    kit.commit(&recovered)?;
    let read = kit.next_request()?;
    expect_resent(&kit, &old, &read)?;
    let gone = kit.serve_until("the pages of the revoked file to go", |_| {
        Ok(!rare::in_page_cache(page)?)
    });
    kit.answer(&read)?;
    kit.settle()?;
    gone?;
    still_serves(&mut kit)
}

/// A fault has found the page with what a task has written that is killed meanwhile, and maps it.
fn killed_write_mapped(env: &Env<'_>) -> Result<()> {
    let (mut kit, _) = cached(env, 0)?;
    kit.tree.open_flags |= fopen::NOFLUSH;
    let quiet = open(&mut kit, "f0", OFlag::O_RDWR)?;
    let path = kit.path("f0");
    let staged = Staged::start(
        &mut kit,
        "a process with a mapping",
        || {
            let fd = ops::open(&path, OFlag::O_RDWR).map_err(|_| 10)?;
            rare::map_untouched(fd).map_err(|_| 11)
        },
        |at| {
            // SAFETY: mapped, and the file is not empty.
            let look = || unsafe { (at as *const u8).read_volatile() };
            look();
            // Mapped by then. What is not, is asked for again.
            while look() == b'X' {
                thread::yield_now();
            }
            i32::from(look())
        },
    )?;
    kit.settle()?;
    let close = [kit.dev.raw(), staged.rein()];
    let mut writer = Proc::spawn("a write", &close, || {
        i32::from(ops::pwrite(quiet, b"X", 0).is_err())
    })?;
    kit.until_op(op::WRITE)?;
    writer.wait_asleep(kit.patience)?;
    kit.restarted()?;
    // Or what is cached is mapped under RCU, where nobody can be stopped.
    let _knob = Knob::set(FAULT_AROUND, "4096")?;
    let found = Trap::arm("fault_found")?;
    let mut child = staged.let_go();
    found.wait(kit.patience)?;
    dies(&kit, &mut writer, "in a write")?;
    found.go();
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    kit.commit(&recovered)?;
    kit.serve_until("the mapping to show what the server has", |_| child.ended())?;
    let code = child.wait_code(kit.patience)?;
    ensure!(
        code == i32::from(b'c'),
        "in its mapping the process saw {code}"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}
