// SPDX-License-Identifier: GPL-2.0
//! What is dropped of a file that was changed while there was no server (of the family `stale-data`), and who uses it at
//! that moment.

use std::os::fd::RawFd;

use anyhow::{ensure, Context, Result};
use nix::fcntl::OFlag;

use super::help::{expect_resent, open, populate, read_ahead, still_serves};
use super::kill::dies;
use super::lost::node;
use super::patience::Knob;
use super::stale::changed_meanwhile;
use super::stale_data::{cached, FAULT_AROUND};
use super::Scenario;
use crate::raw::app::{times_asleep, App, Proc};
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::msg::Message;
use crate::raw::ops::{self, Done};
use crate::raw::trap::Trap;
use crate::raw::wait::wait_for;
use crate::raw::wire::{fopen, init, op, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "stale-data/write-under-way",
            "who reads while a write is under way leaves nothing of before it in the cache",
            overwrite,
        ),
        Scenario::series(
            "stale-data/write-begun",
            "nor if what is stale was dropped before the WRITE is made",
            write_begun,
        ),
        Scenario::series(
            "stale-data/append-under-way",
            "nor zeroes, where the file ended",
            append,
        ),
        Scenario::series(
            "stale-data/direct-read-under-way",
            "what a direct read brings into a mapping of such a file is not lost",
            |env| direct_read(env, 0),
        ),
        Scenario::series(
            "stale-data/direct-read-auto-inval",
            "nor if the server has said itself that the file was changed",
            |env| direct_read(env, init::AUTO_INVAL_DATA),
        ),
        Scenario::series(
            "stale-data/direct-read-meanwhile",
            "nor what one brings that begins while a page is being dropped",
            direct_read_meanwhile,
        ),
        Scenario::series(
            "stale-data/mapped-under-way",
            "a page that came back too early, and was changed in a mapping and written, does not undo a write",
            mapped_under_way,
        ),
        Scenario::series(
            "stale-data/direct-write-under-way",
            "a page that is only read from is dropped all the same",
            direct_write,
        ),
        Scenario::series(
            "stale-data/fault-beside-direct-read",
            "as long as such a page stays a fault takes away no other page",
            fault_beside,
        ),
        Scenario::series(
            "stale-data/overlapped",
            "what is stale is dropped once, however many begin to drop it meanwhile",
            overlapped,
        ),
        Scenario::series(
            "stale-data/killed-write",
            "what a task wrote that was killed before a server had it is not read",
            killed_write,
        ),
        Scenario::series(
            "stale-data/killed-write-in-drop",
            "nor if stale data is being dropped at that moment",
            killed_write_in_drop,
        ),
    ]
}

/// The server that read a WRITE of f0 dies, and f0 looks changed to the next one. That WRITE, sent again.
pub(super) fn crash_in_write(kit: &mut Kit<'_>) -> Result<Message> {
    let old = kit.until_op(op::WRITE)?;
    let f0 = node(kit, "f0")?;
    kit.tree.node_mut(f0).mtime += 10;
    kit.recover()?;
    let write = kit.next_request()?;
    expect_resent(kit, &old, &write)?;
    Ok(write)
}

/// A READ is answered before the WRITE, as a server of several threads may do.
fn read_first(kit: &mut Kit<'_>, fd: RawFd, write: &Message, app: &App<Done<usize>>) -> Result<()> {
    let early = kit.app("a read before", move || ops::pread(fd, 100, 0))?;
    let read = kit.until_op(op::READ)?;
    kit.answer(&read)?;
    let found = kit.serve(&early)?;
    ensure!(
        found == Ok(b"content of 0".to_vec()),
        "before the WRITE f0 reads {found:?}"
    );
    kit.served.clear();
    kit.answer(write)?;
    let wrote = kit.serve(app)?;
    ensure!(wrote.is_ok(), "the write gave {wrote:?}");
    ensure!(
        !kit.served.iter().any(|m| m.is(op::WRITE)),
        "what was answered was sent once more, though nobody has a mapping"
    );
    Ok(())
}

pub(super) fn reads(kit: &mut Kit<'_>, fd: RawFd, at: i64, wanted: &[u8]) -> Result<()> {
    let found = kit.run("a read after", move || ops::pread(fd, 100, at))?;
    ensure!(
        found.as_deref() == Ok(wanted),
        "after the WRITE f0 reads {:?}",
        found.map(|b| String::from_utf8_lossy(&b).into_owned())
    );
    kit.check_counts()?;
    still_serves(kit)
}

fn overwrite(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    // Or what came back too early is dropped once more.
    let _late = Trap::arm_if_any("teardown")?;
    let app = kit.app("a write", move || ops::pwrite(fd, b"C", 0))?;
    let write = crash_in_write(&mut kit)?;
    read_first(&mut kit, fd, &write, &app)?;
    reads(&mut kit, fd, 0, b"Content of 0")
}

/// The page is filled, and dropped and read again, before there is a WRITE.
fn write_begun(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let filled = Trap::arm("write_filled")?;
    let done = Trap::arm_beside("drop_over")?;
    let app = kit.app("a write", move || ops::pwrite(fd, b"C", 0))?;
    kit.serve_until("the write to fill its page", |_| Ok(filled.stopped()))?;
    changed_meanwhile(&mut kit, |kit| {
        let f0 = kit.tree.child(ROOT, "f0").expect("populated");
        kit.tree.node_mut(f0).mtime += 10;
    })?;
    done.wait(kit.patience)?;
    done.go();
    let found = kit.run("a read before", move || ops::pread(fd, 100, 0))?;
    ensure!(
        found == Ok(b"content of 0".to_vec()),
        "before the WRITE f0 reads {found:?}"
    );
    filled.go();
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(1), "the write gave {wrote:?}");
    reads(&mut kit, fd, 0, b"Content of 0")
}

fn append(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let _late = Trap::arm_if_any("teardown")?;
    let app = kit.app("a write", move || ops::pwrite(fd, b", and more", 12))?;
    let write = crash_in_write(&mut kit)?;
    read_first(&mut kit, fd, &write, &app)?;
    reads(&mut kit, fd, 0, b"content of 0, and more")
}

/// A mapping of a whole file of at most three pages, and the first byte of each of the first `touched` pages.
pub(super) fn map(
    kit: &mut Kit<'_>,
    fd: RawFd,
    prot: i32,
    touched: usize,
) -> Result<(usize, Vec<u8>)> {
    kit.run("mmap", move || {
        // SAFETY: a fresh mapping where the kernel likes.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                3 * 4096,
                prot,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        let first = |page: usize| {
            // SAFETY: mapped, and the file is as long as that.
            unsafe { at.cast::<u8>().add(page * 4096).read_volatile() }
        };
        (at as usize, (0..touched).map(first).collect())
    })
    .context("a mapping of f0")
}

/// f1 is read past the cache, into page `page` of a mapping of f0, which looks changed meanwhile. The READ, sent again.
fn into_mapping(
    kit: &mut Kit<'_>,
    from: RawFd,
    at: usize,
) -> Result<(App<nix::Result<isize>>, Message)> {
    let app = kit.app("a direct read", move || {
        // SAFETY: the mapping is longer than that, and nobody has a reference to it.
        let got = unsafe { libc::pread(from, at as *mut libc::c_void, 12, 0) };
        nix::errno::Errno::result(got)
    })?;
    let old = kit.until_op(op::READ)?;
    let f0 = node(kit, "f0")?;
    kit.tree.node_mut(f0).mtime += 10;
    kit.recover()?;
    let read = kit.next_request()?;
    expect_resent(kit, &old, &read)?;
    Ok((app, read))
}

/// f1 past the page cache, f0 through it.
pub(super) fn direct_and_cached<'a>(
    env: &'a Env<'a>,
    flags: OFlag,
    asked: u64,
) -> Result<(Kit<'a>, RawFd, RawFd)> {
    let mut kit = Kit::granted_with(env, Config::with(asked))?;
    populate(&mut kit, 2)?;
    kit.tree.open_flags = fopen::DIRECT_IO;
    let direct = open(&mut kit, "f1", OFlag::O_RDWR)?;
    kit.tree.open_flags = fopen::KEEP_CACHE;
    let fd = open(&mut kit, "f0", flags)?;
    Ok((kit, direct, fd))
}

fn direct_read(env: &Env<'_>, asked: u64) -> Result<()> {
    let (mut kit, from, fd) = direct_and_cached(env, OFlag::O_RDWR, asked)?;
    let (at, first) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    ensure!(first == b"c", "f0 begins with {first:?}");
    let (app, read) = into_mapping(&mut kit, from, at)?;
    // Drops what is stale, if that has not happened yet.
    kit.run("a read", move || ops::pread(fd, 12, 0))??;
    kit.answer(&read)?;
    let got = kit.serve(&app)?;
    ensure!(got == Ok(12), "the direct read gave {got:?}");
    let last = kit.run("a look", move || {
        // SAFETY: still mapped.
        unsafe { (at as *const u8).add(11).read_volatile() }
    })?;
    ensure!(
        last == b'1',
        "the mapping has {:?}, not what was read into it",
        char::from(last)
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// Who reads directly has dropped what is stale himself, and finds the page that somebody has read again and that the worker is
/// about to drop once more.
fn direct_read_meanwhile(env: &Env<'_>) -> Result<()> {
    let (mut kit, from, fd) = direct_and_cached(env, OFlag::O_RDWR, 0)?;
    let (at, first) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    ensure!(first == b"c", "f0 begins with {first:?}");
    let _knob = Knob::set(FAULT_AROUND, "4096")?;
    let teardown = Trap::arm("teardown")?;
    changed_meanwhile(&mut kit, |kit| {
        let f0 = kit.tree.child(ROOT, "f0").expect("populated");
        kit.tree.node_mut(f0).mtime += 10;
    })?;
    teardown.wait(kit.patience)?;
    let checked = Trap::arm_beside("fault_checked")?;
    // A process of its own: it has its memory locked until the page is there, and no thread can be made beside it.
    let mut app = Proc::spawn("a direct read", &[kit.dev.raw()], || {
        // SAFETY: the mapping is longer than that, and nobody has a reference to it.
        if unsafe { libc::pread(from, at as *mut libc::c_void, 12, 0) } != 12 {
            return 1;
        }
        // SAFETY: still mapped.
        i32::from(unsafe { (at as *const u8).add(11).read_volatile() })
    })?;
    kit.serve_until("the fault to begin anew", |_| Ok(checked.stopped()))?;
    kit.run("a read", move || ops::pread(fd, 12, 0))??;
    let decided = teardown.then("drop_decided")?;
    decided.wait(kit.patience)?;
    // It goes on to the page, which is locked, or with it to the server.
    let before = times_asleep(app.tid())?;
    checked.go();
    wait_for("the direct read to go on", kit.patience, || {
        Ok(times_asleep(app.tid())? > before)
    })?;
    app.wait_asleep(kit.patience)?;
    let done = decided.then("drop_done")?;
    // A page that was made dirty meanwhile would be written first.
    let mut later = Vec::new();
    let patience = kit.patience;
    wait_for("the page to be dropped", patience, || {
        while kit.readable()? {
            let m = kit.next_request()?;
            match m.is(op::READ) {
                true => later.push(m),
                false => kit.answer(&m)?,
            }
        }
        Ok(done.stopped())
    })?;
    for read in &later {
        kit.answer(read)?;
    }
    kit.serve_until("the end of the direct read", |_| app.ended())?;
    done.go();
    let last = app.wait_code(kit.patience)?;
    ensure!(
        last == i32::from(b'1'),
        "the direct read was for nothing: its last byte is {last}"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// The second byte of f0 is changed in a mapping, and its page is written.
pub(super) fn change_mapped(kit: &mut Kit<'_>, fd: RawFd) -> Result<App<nix::Result<i32>>> {
    let (at, first) = map(kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    ensure!(first == b"c", "before the WRITE f0 begins with {first:?}");
    store_and_sync(kit, fd, at)
}

/// Byte `offset` of a mapping of a file that is longer than that becomes `byte`.
pub(super) fn store_byte(kit: &mut Kit<'_>, at: usize, offset: usize, byte: u8) -> Result<()> {
    kit.run("a store", move || {
        // SAFETY: mapped, and not behind the page in which the file ends.
        unsafe { (at as *mut u8).add(offset).write_volatile(byte) };
    })
}

pub(super) fn store_and_sync(
    kit: &mut Kit<'_>,
    fd: RawFd,
    at: usize,
) -> Result<App<nix::Result<i32>>> {
    kit.app("a store, and sync_file_range", move || {
        // SAFETY: mapped, and the file is not empty.
        unsafe { (at as *mut u8).add(1).write_volatile(b'X') };
        // msync() would wait for the lock that the writer has.
        let how = libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        // SAFETY: plain numbers.
        let synced = unsafe { libc::sync_file_range(fd, 0, 4096, how) };
        nix::errno::Errno::result(synced)
    })
}

/// The WRITE that was sent again is executed at once and answered late. Meanwhile its page was dropped, read again as it was
/// before, changed by somebody else, and is being written as a whole.
fn mapped_under_way(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let app = kit.app("a write", move || ops::pwrite(fd, b"C", 0))?;
    let write = crash_in_write(&mut kit)?;
    let mapped = change_mapped(&mut kit, fd)?;
    let whole = kit.until_op(op::WRITE)?;
    kit.answer(&write)?;
    // The writer waits for the page that is being written, or does not know of it.
    kit.answer(&whole)?;
    let synced = kit.serve(&mapped)?;
    ensure!(synced == Ok(0), "sync_file_range gave {synced:?}");
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(1), "the write gave {wrote:?}");
    let f0 = node(&kit, "f0")?;
    let there = kit.tree.node_mut(f0).data.clone();
    ensure!(
        there == b"CXntent of 0",
        "the server has {:?}",
        String::from_utf8_lossy(&there)
    );
    reads(&mut kit, fd, 0, b"CXntent of 0")
}

/// f1 is written past the cache, from a mapping of f0, which is changed meanwhile. The WRITE.
pub(super) fn from_mapping(
    kit: &mut Kit<'_>,
    to: RawFd,
    at: usize,
) -> Result<(App<nix::Result<isize>>, Message)> {
    let app = kit.app("a direct write", move || {
        // SAFETY: the mapping is longer than that.
        let put = unsafe { libc::pwrite(to, at as *const libc::c_void, 12, 0) };
        nix::errno::Errno::result(put)
    })?;
    let old = kit.until_op(op::WRITE)?;
    let f0 = node(kit, "f0")?;
    let file = kit.tree.node_mut(f0);
    (file.data, file.mtime) = (b"Content of 0".to_vec(), file.mtime + 10);
    Ok((app, old))
}

/// f1 is written past the cache, from a mapping of f0 that cannot be written to.
fn direct_write(env: &Env<'_>) -> Result<()> {
    let (mut kit, to, fd) = direct_and_cached(env, OFlag::O_RDONLY, 0)?;
    let (at, first) = map(&mut kit, fd, libc::PROT_READ, 1)?;
    ensure!(first == b"c", "f0 begins with {first:?}");
    let (app, old) = from_mapping(&mut kit, to, at)?;
    kit.recover()?;
    let write = kit.next_request()?;
    expect_resent(&kit, &old, &write)?;
    let found = kit.run("a read", move || ops::pread(fd, 12, 0))?;
    ensure!(
        found.as_deref() == Ok(b"Content of 0"),
        "while its page is being written from f0 reads {found:?}"
    );
    kit.answer(&write)?;
    let put = kit.serve(&app)?;
    ensure!(put == Ok(12), "the direct write gave {put:?}");
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// The three pages of f0, of which the first two were read anew; the last one stays as it was, for a direct read of
/// f1 is about to fill it.
pub(super) struct Beside<'a> {
    pub kit: Kit<'a>,
    /// Where f0 is mapped.
    pub at: usize,
    late: Option<Trap>,
    app: App<nix::Result<isize>>,
    read: Message,
}

impl<'a> Beside<'a> {
    pub fn a_direct_read(env: &'a Env<'a>) -> Result<Beside<'a>> {
        let (mut kit, from, fd) = direct_and_cached(env, OFlag::O_RDWR, 0)?;
        let f0 = node(&kit, "f0")?;
        kit.tree.node_mut(f0).data = vec![b'd'; 3 * 4096];
        // The mount knows the new size.
        ensure!(kit.run_on("stat", "f0", ops::stat)?.is_ok(), "stat f0");
        let (at, first) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 3)?;
        ensure!(first == b"ddd", "f0 begins with {first:?}");
        kit.settle()?;
        let late = Trap::arm_if_any("teardown")?;
        let (app, read) = into_mapping(&mut kit, from, at + 2 * 4096)?;
        kit.run("a read", move || ops::pread(fd, 12, 0))??;
        Ok(Beside {
            kit,
            at,
            late,
            app,
            read,
        })
    }

    /// The direct read ends as if nothing had been.
    pub fn end(self) -> Result<()> {
        let mut kit = self.kit;
        drop(self.late);
        kit.answer(&self.read)?;
        let got = kit.serve(&self.app)?;
        ensure!(got == Ok(12), "the direct read gave {got:?}");
        kit.check_counts()?;
        still_serves(&mut kit)
    }
}

/// A page of f0 stays, and with it the mark of the file. An instruction that needs two other pages gets them.
fn fault_beside(env: &Env<'_>) -> Result<()> {
    let _knob = Knob::set(FAULT_AROUND, "4096")?;
    let mut beside = Beside::a_direct_read(env)?;
    let (kit, at) = (&mut beside.kit, beside.at);
    let look = move |page: usize| {
        // SAFETY: mapped, and the file is as long as that.
        move || unsafe { ((at + page * 4096) as *const u8).read_volatile() }
    };
    for page in [0, 1] {
        ensure!(kit.run("a look", look(page))? == b'd', "page {page}");
    }
    kit.served.clear();
    ensure!(kit.run("another look", look(0))? == b'd', "page 0");
    let again = kit.served.iter().filter(|m| m.is(op::READ)).count();
    ensure!(
        again == 0,
        "the fault on page 1 has taken page 0 away: {again} READs"
    );
    beside.end()
}

/// One has begun to drop and waits for a locked page, then another begins, and the first one ends.
fn overlapped(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted_with(env, Config::default())?;
    kit.tree.open_flags = fopen::KEEP_CACHE;
    populate(&mut kit, 1)?;
    let fd = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    let old = read_ahead(&mut kit, "f0")?;
    let teardown = Trap::arm("teardown")?;
    let f0 = node(&kit, "f0")?;
    kit.tree.node_mut(f0).mtime += 10;
    kit.recover()?;
    let read = kit.next_request()?;
    expect_resent(&kit, &old, &read)?;
    let first = kit.app("the first read", move || ops::pread(fd, 12, 0))?;
    first.wait_asleep(kit.patience)?;
    let begun = Trap::arm_beside("drop_begun")?;
    let second = kit.app("the second read", move || ops::pread(fd, 12, 0))?;
    begun.wait(kit.patience)?;
    kit.answer(&read)?;
    kit.serve(&first)??;
    kit.served.clear();
    kit.run("the third read", move || ops::pread(fd, 12, 0))??;
    let again = kit.served.iter().filter(|m| m.is(op::READ)).count();
    begun.go();
    kit.serve(&second)??;
    teardown.go();
    ensure!(
        again == 0,
        "what the first had dropped, and read again, the third dropped once more"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// A task that writes to f0, and is killed before a server has it.
fn write_and_die(kit: &mut Kit<'_>, fd: RawFd, len: usize, read: bool) -> Result<()> {
    let mut app = Proc::spawn("a write", &[kit.dev.raw()], || {
        i32::from(ops::pwrite(fd, &vec![b'X'; len], 0).is_err())
    })?;
    if read {
        kit.until_op(op::WRITE)?;
        app.wait_asleep(kit.patience)?;
        kit.restarted()?;
    } else {
        kit.conn.wait_waiting(1, kit.patience)?;
        app.wait_asleep(kit.patience)?;
    }
    dies(kit, &mut app, "in a write")
}

fn nobody_reads_it(kit: &mut Kit<'_>, fd: RawFd, at: i64, wanted: &[u8]) -> Result<()> {
    ensure!(
        !kit.served.iter().any(|m| m.is(op::WRITE)),
        "the WRITE of a killed task was sent"
    );
    reads(kit, fd, at, wanted)
}

fn killed_write(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    write_and_die(&mut kit, fd, 1, true)?;
    kit.served.clear();
    kit.recover()?;
    kit.settle()?;
    nobody_reads_it(&mut kit, fd, 0, b"content of 0")
}

fn killed_write_in_drop(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let f0 = node(&kit, "f0")?;
    kit.tree.node_mut(f0).data = vec![b'd'; 2 * 4096];
    let done = Trap::arm("drop_done")?;
    changed_meanwhile(&mut kit, |kit| {
        kit.tree.node_mut(f0).mtime += 10;
    })?;
    done.wait(kit.patience)?;
    // Whole in the cache again.
    kit.run("a read", move || ops::pread(fd, 2 * 4096, 0))??;
    // Who dies would wait for the answer to its FLUSH, which nobody gives.
    kit.tree.open_flags |= fopen::NOFLUSH;
    let quiet = open(&mut kit, "f0", OFlag::O_RDWR)?;
    kit.run("close", move || ops::close(fd))??;
    kit.settle()?;
    // He takes the first page away himself, for the second he has no time.
    write_and_die(&mut kit, quiet, 2 * 4096, false)?;
    let over = done.then("drop_over")?;
    over.wait(kit.patience)?;
    let result = nobody_reads_it(&mut kit, quiet, 4096, &[b'd'; 100]);
    over.go();
    result
}
