// SPDX-License-Identifier: GPL-2.0
//! Reads, faults and writes at the moment at which the data of a file changes (of the family `stale-data`).

use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Result};
use nix::fcntl::OFlag;
use nix::mount::{umount2, MntFlags};

use super::help::{expect_resent, still_serves};
use super::kill::dies;
use super::lost::{node, Staged};
use super::stale::changed_meanwhile;
use super::stale_data::cached;
use super::stale_drop::{
    crash_in_write, direct_and_cached, from_mapping, map, reads, store_and_sync, store_byte,
};
use super::stale_write::{evict, server_has, sleeps, synced, Undone};
use super::Scenario;
use crate::raw::env::Env;
use crate::raw::ops;
use crate::raw::rare;
use crate::raw::trap::Trap;
use crate::raw::tree::Answer;
use crate::raw::wire::{fopen, init, op, WriteIn};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "stale-data/killed-fault",
            "who waits in a fault for a page that somebody else reads can be killed",
            killed_fault,
        ),
        Scenario::series(
            "stale-data/in-use",
            "what stayed because it was in use goes when it is not, also if nobody reads the file",
            |env| in_use(env, false),
        ),
        Scenario::series(
            "stale-data/in-use-auto-inval",
            "also if it is a server that serves who says that the file was changed",
            |env| in_use(env, true),
        ),
        Scenario::series(
            "stale-data/in-use-unmount",
            "an unmount does not wait until what was in use is tried again, and leaves no inode behind",
            in_use_unmount,
        ),
        Scenario::series(
            "stale-data/evicted-again",
            "nor is one lost whose page comes back, is written and goes again while it is sent once more",
            evicted_again,
        ),
        Scenario::series(
            "stale-data/told-while-resent",
            "a write is not sent again and again while a server that serves says that the file was changed",
            told_while_resent,
        ),
        Scenario::series(
            "stale-data/moved-under-way",
            "a page that a server moves into the cache too early does not hide a write",
            moved,
        ),
        Scenario::series(
            "stale-data/another-client",
            "what another client wrote meanwhile is not covered by a write whose page a recovery dropped",
            another_client,
        ),
        Scenario::series(
            "stale-data/told-is-no-recovery",
            "a server that serves and says that the file was changed is no reason to send a write once more",
            told_is_no_recovery,
        ),
        Scenario::series(
            "stale-data/unread-under-way",
            "a write is not sent once more from a page that is read meanwhile",
            unread,
        ),
    ]
}

/// What was stale is dropped, and somebody else reads the page before the fault comes to that.
fn killed_fault(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    // Who dies would wait for the answer to its FLUSH, which nobody gives.
    kit.tree.open_flags |= fopen::NOFLUSH;
    let path = kit.path("f0");
    let staged = Staged::start(
        &mut kit,
        "a process with a mapping",
        || {
            // What it has from its parent.
            ops::close(fd).map_err(|_| 9)?;
            let fd = ops::open(&path, OFlag::O_RDWR).map_err(|_| 10)?;
            rare::map_untouched(fd).map_err(|_| 11)
        },
        |at| {
            // SAFETY: the page is mapped and the file is not empty.
            i32::from(unsafe { (at as *const u8).read_volatile() })
        },
    )?;
    kit.settle()?;
    let teardown = Trap::arm("teardown")?;
    let f0 = node(&kit, "f0")?;
    changed_meanwhile(&mut kit, |kit| kit.tree.node_mut(f0).mtime += 10)?;
    let dropped = Trap::arm_beside("fault_dropped")?;
    let mut child = staged.let_go();
    dropped.wait(kit.patience)?;
    let reader = kit.app("a read", move || ops::pread(fd, 12, 0))?;
    let read = kit.until_op(op::READ)?;
    dropped.go();
    child.wait_asleep(kit.patience)?;
    let died = dies(&kit, &mut child, "in a fault");
    kit.answer(&read)?;
    kit.serve(&reader)??;
    teardown.go();
    died?;
    kit.settle()?;
    reads(&mut kit, fd, 0, b"content of 0")
}

/// The READ was executed before the WRITE that was sent again, and its answer comes as a page that takes the place of the one for
/// which the writer waits.
fn moved(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let f0 = node(&kit, "f0")?;
    kit.tree.node_mut(f0).data = vec![b'd'; 4096];
    ensure!(kit.run("fstat", move || ops::fstat(fd))?.is_ok(), "fstat");
    kit.run("pread", move || ops::pread(fd, 4096, 0))??;
    let app = kit.app("a write", move || ops::pwrite(fd, b"XYZ", 6))?;
    let teardown = Trap::arm_if_any("teardown")?;
    let write = crash_in_write(&mut kit)?;
    let early = kit.app("a read before", move || ops::pread(fd, 12, 0))?;
    let read = kit.until_op(op::READ)?;
    let Answer::Ok(page) = kit.tree.apply(&read)? else {
        bail!("the answer to {read}")
    };
    ensure!(page.len() == 4096, "{read} of {} bytes", page.len());
    kit.answer(&write)?;
    let tid = app.tid;
    kit.serve_until("the writer to wait for the page", |_| Ok(sleeps(tid)))?;
    kit.dev.reply_moved(read.unique(), &page)?;
    // The writer may be the first to get hold of that page.
    let found = kit.serve(&early)?;
    ensure!(found.is_ok(), "the read gave {found:?}");
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(3), "the write gave {wrote:?}");
    let mut wanted = [b'd'; 100];
    wanted[6..9].copy_from_slice(b"XYZ");
    let found = reads(&mut kit, fd, 0, &wanted);
    drop(teardown);
    found
}

/// A WRITE was undone, and its page is gone when it is answered. While it is sent once more the page comes back as it was, and is
/// changed in a mapping; it is written after the WRITE, and evicted before its answer.
fn evicted_again(env: &Env<'_>) -> Result<()> {
    let Undone {
        mut kit,
        fd,
        at,
        app,
        write,
        answer,
    } = Undone::by_write_back(env, 0)?;
    evict(&mut kit, fd, at)?;
    kit.send(&write, &answer)?;
    let write = kit.until_op(op::WRITE)?;
    let (at, first) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    ensure!(first == b"c", "before the WRITE f0 begins with {first:?}");
    let mapped = store_and_sync(&mut kit, fd, at)?;
    let whole = kit.until_op(op::WRITE)?;
    let answer = kit.tree.apply(&write)?;
    kit.answer(&whole)?;
    synced(&mut kit, &mapped)?;
    evict(&mut kit, fd, at)?;
    kit.send(&write, &answer)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(1), "the write gave {wrote:?}");
    server_has(&mut kit, "CXntent of 0")?;
    reads(&mut kit, fd, 0, b"CXntent of 0")
}

/// A WRITE was undone, and is sent once more. Each time before its answer, attributes show that it was executed, and its page
/// is read again, and changed in a mapping.
fn told_while_resent(env: &Env<'_>) -> Result<()> {
    let Undone {
        mut kit,
        fd,
        at,
        app,
        mut write,
        mut answer,
    } = Undone::by_write_back(env, init::AUTO_INVAL_DATA)?;
    let f0 = node(&kit, "f0")?;
    for n in 0..2 {
        kit.send(&write, &answer)?;
        write = kit.until_op(op::WRITE)?;
        answer = kit.tree.apply(&write)?;
        kit.tree.node_mut(f0).mtime += 10;
        ensure!(kit.run("fstat", move || ops::fstat(fd))?.is_ok(), "fstat");
        store_byte(&mut kit, at, 2, b'0' + n)?;
    }
    kit.served.clear();
    kit.send(&write, &answer)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(1), "the write gave {wrote:?}");
    // What was stored is written, too, but that is the whole page.
    for m in kit.served.iter().filter(|m| m.is(op::WRITE)) {
        ensure!(m.arg::<WriteIn>()?.size > 1, "it was sent once more");
    }
    kit.run("fsync", move || ops::fsync(fd))??;
    server_has(&mut kit, "CX1tent of 0")?;
    reads(&mut kit, fd, 0, b"CX1tent of 0")
}

/// The WRITE that was sent again is executed at once and answered late. Another client overwrites it before that, which is read,
/// and nothing changes afterwards that a later look at the attributes could show.
fn another_client(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, init::AUTO_INVAL_DATA)?;
    let app = kit.app("a write", move || ops::pwrite(fd, b"XYZ", 6))?;
    // What is stale is dropped in the background, too, which would hide what is wrong.
    let teardown = Trap::arm_if_any("teardown")?;
    let write = crash_in_write(&mut kit)?;
    let answer = kit.tree.apply(&write)?;
    let f0 = node(&kit, "f0")?;
    let file = kit.tree.node_mut(f0);
    (file.data, file.mtime) = (b"another's 0.".to_vec(), file.mtime + 10);
    let early = kit.run("a read before", move || ops::pread(fd, 12, 0))?;
    ensure!(
        early.as_deref() == Ok(b"another's 0."),
        "f0 reads {early:?}"
    );
    kit.send(&write, &answer)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(3), "the write gave {wrote:?}");
    let found = reads(&mut kit, fd, 0, b"another's 0.");
    drop(teardown);
    found
}

/// No server dies. The WRITE is executed and not answered yet when somebody asks for attributes, which show that; its page is
/// read again, and changed in a mapping.
fn told_is_no_recovery(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, init::AUTO_INVAL_DATA)?;
    let (at, first) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    ensure!(first == b"c", "f0 begins with {first:?}");
    let app = kit.app("a write", move || ops::pwrite(fd, b"C", 0))?;
    let write = kit.until_op(op::WRITE)?;
    let answer = kit.tree.apply(&write)?;
    let f0 = node(&kit, "f0")?;
    kit.tree.node_mut(f0).mtime += 10;
    kit.served.clear();
    ensure!(kit.run("fstat", move || ops::fstat(fd))?.is_ok(), "fstat");
    store_byte(&mut kit, at, 1, b'X')?;
    ensure!(
        kit.served.iter().any(|m| m.is(op::READ)),
        "the page was not dropped"
    );
    kit.served.clear();
    kit.send(&write, &answer)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(1), "the write gave {wrote:?}");
    ensure!(
        !kit.served.iter().any(|m| m.is(op::WRITE)),
        "what was answered was sent once more, though no server died"
    );
    kit.run("fsync", move || ops::fsync(fd))??;
    server_has(&mut kit, "CXntent of 0")?;
    reads(&mut kit, fd, 0, b"CXntent of 0")
}

/// f1 is written past the cache, from a mapping of f0 that can be written to, and that somebody looks at meanwhile.
fn in_use(env: &Env<'_>, serves: bool) -> Result<()> {
    Trap::if_any_is_there("it takes ten seconds")?;
    let asked = if serves { init::AUTO_INVAL_DATA } else { 0 };
    let (mut kit, to, fd) = direct_and_cached(env, OFlag::O_RDWR, asked)?;
    let (at, first) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    ensure!(first == b"c", "f0 begins with {first:?}");
    let look = move || {
        // SAFETY: mapped, and the file is not empty.
        unsafe { (at as *const u8).read_volatile() }
    };
    let (app, old) = from_mapping(&mut kit, to, at)?;
    let write = if serves {
        let stat = kit.run("fstat", move || ops::fstat(fd))?;
        ensure!(stat.is_ok(), "fstat gave {:?}", stat.err());
        old
    } else {
        kit.recover()?;
        let write = kit.next_request()?;
        expect_resent(&kit, &old, &write)?;
        write
    };
    ensure!(kit.run("a look", look)? == b'c', "it was not in use");
    kit.answer(&write)?;
    let put = kit.serve(&app)?;
    ensure!(put == Ok(12), "the direct write gave {put:?}");
    let start = Instant::now();
    while kit.run("another look", look)? != b'C' {
        ensure!(
            start.elapsed() < Duration::from_secs(20) + kit.patience,
            "the mapping still shows what was there before"
        );
    }
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// The file is on the list of those to be tried again when the last one who uses it goes.
fn in_use_unmount(env: &Env<'_>) -> Result<()> {
    let (mut kit, to, fd) = direct_and_cached(env, OFlag::O_RDWR, 0)?;
    let (at, _) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    let (app, old) = from_mapping(&mut kit, to, at)?;
    let tried = Trap::arm("drop_over")?;
    kit.recover()?;
    let write = kit.next_request()?;
    expect_resent(&kit, &old, &write)?;
    // By the worker: nobody else reads.
    tried.wait(kit.patience)?;
    tried.go();
    kit.answer(&write)?;
    let put = kit.serve(&app)?;
    ensure!(put == Ok(12), "the direct write gave {put:?}");
    kit.run("munmap, and close", move || {
        // SAFETY: nobody uses that mapping any more.
        unsafe { libc::munmap(at as *mut libc::c_void, 3 * 4096) };
        ops::close(fd).and(ops::close(to))
    })??;
    kit.settle()?;
    let mnt = kit.mnt.clone();
    let gone = kit.app("umount", move || umount2(&mnt, MntFlags::empty()))?;
    let gone = gone.finish(kit.patience)?;
    ensure!(gone == Ok(()), "umount gave {gone:?}");
    kit.was_unmounted();
    Ok(())
}

/// The WRITE was executed, undone by the write-back of a page that came back too early, and is to be sent once more. Its page
/// is in the cache, but a READ has failed, and the next one brings back what the server has by then.
fn unread(env: &Env<'_>) -> Result<()> {
    let Undone {
        mut kit,
        fd,
        at,
        app,
        write,
        answer,
    } = Undone::by_write_back(env, 0)?;
    evict(&mut kit, fd, at)?;
    let failed = kit.app("a read that fails", move || ops::pread(fd, 12, 0))?;
    while !failed.done() {
        if kit.readable()? {
            let m = kit.next_request()?;
            match m.is(op::READ) {
                true => kit.send(&m, &Answer::Err(libc::EIO))?,
                false => kit.answer(&m)?,
            }
        }
    }
    let found = failed.finish(kit.patience)?;
    ensure!(found.is_err(), "the read gave {found:?}");
    kit.send(&write, &answer)?;
    let again = kit.until_op(op::WRITE)?;
    let early = kit.app("a read before", move || ops::pread(fd, 12, 0))?;
    let read = kit.until_op(op::READ)?;
    kit.answer(&read)?;
    let found = kit.serve(&early)?;
    ensure!(
        found == Ok(b"cXntent of 0".to_vec()),
        "before the WRITE f0 reads {found:?}"
    );
    // Nothing that it answers with looks changed to the next one.
    kit.recover()?;
    let last = kit.next_request()?;
    expect_resent(&kit, &again, &last)?;
    kit.answer(&last)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(1), "the write gave {wrote:?}");
    server_has(&mut kit, "CXntent of 0")?;
    reads(&mut kit, fd, 0, b"CXntent of 0")
}
