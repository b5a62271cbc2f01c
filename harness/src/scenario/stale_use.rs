// SPDX-License-Identifier: GPL-2.0
//! Reads, faults and writes at the moment at which the data of a file changes (of the family `stale-data`).

use anyhow::{ensure, Result};
use nix::fcntl::OFlag;

use super::help::expect_resent;
use super::kill::dies;
use super::lost::{node, Staged};
use super::stale::changed_meanwhile;
use super::stale_data::cached;
use super::stale_drop::{crash_in_write, map, reads, store_and_sync};
use super::stale_write::{server_has, synced};
use super::Scenario;
use crate::raw::env::Env;
use crate::raw::ops;
use crate::raw::rare;
use crate::raw::trap::Trap;
use crate::raw::tree::Answer;
use crate::raw::wire::{fopen, op};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "stale-data/killed-fault",
            "who waits in a fault for a page that somebody else reads can be killed",
            killed_fault,
        ),
        Scenario::series(
            "stale-data/truncated-under-way",
            "what is written is not zeroes because the file was truncated before the WRITE is read",
            truncated,
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

/// The server that read a GETATTR and a WRITE dies. The next one answers the first before it reads the other.
fn truncated(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let stat = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    let getattr = kit.until_op(op::GETATTR)?;
    let app = kit.app("a write", move || ops::pwrite(fd, b"XYZ", 6))?;
    let write = kit.until_op(op::WRITE)?;
    // What is stale is dropped in the background, too, which would take the page away from who truncates.
    let teardown = Trap::arm("teardown")?;
    let f0 = node(&kit, "f0")?;
    kit.tree.node_mut(f0).data.truncate(4);
    kit.recover()?;
    let asked = kit.next_request()?;
    expect_resent(&kit, &getattr, &asked)?;
    kit.answer(&asked)?;
    ensure!(stat.finish(kit.patience)?.is_ok(), "stat f0");
    let last = kit.next_request()?;
    expect_resent(&kit, &write, &last)?;
    kit.answer(&last)?;
    let wrote = kit.serve(&app)?;
    teardown.go();
    ensure!(wrote == Ok(3), "the write gave {wrote:?}");
    server_has(&mut kit, "cont\0\0XYZ")?;
    reads(&mut kit, fd, 0, b"cont\0\0XYZ")
}

/// The WRITE was executed, undone by the write-back of a page that came back too early, and is to be sent once more. Its page
/// is in the cache, but a READ has failed, and the next one brings back what the server has by then.
fn unread(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let app = kit.app("a write", move || ops::pwrite(fd, b"C", 0))?;
    let write = crash_in_write(&mut kit)?;
    let (at, first) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    ensure!(first == b"c", "before the WRITE f0 begins with {first:?}");
    let mapped = store_and_sync(&mut kit, fd, at)?;
    let whole = kit.until_op(op::WRITE)?;
    let answer = kit.tree.apply(&write)?;
    kit.answer(&whole)?;
    synced(&mut kit, &mapped)?;
    kit.run("munmap, and fadvise", move || {
        // SAFETY: nobody uses that mapping any more.
        unsafe { libc::munmap(at as *mut libc::c_void, 3 * 4096) };
        // SAFETY: plain numbers.
        unsafe { libc::posix_fadvise(fd, 0, 0, libc::POSIX_FADV_DONTNEED) }
    })?;
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
