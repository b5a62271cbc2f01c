// SPDX-License-Identifier: GPL-2.0
//! Writes, and where a file ends meanwhile (of the family `stale-data`).

use std::os::fd::RawFd;

use anyhow::{ensure, Context, Result};
use nix::fcntl::OFlag;

use super::help::{expect_resent, open};
use super::lost::node;
use super::stale_data::cached;
use super::stale_drop::{map, reads, store_and_sync, store_byte};
use super::stale_write::{server_has, synced, uncache};
use super::Scenario;
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::ops;
use crate::raw::trap::Trap;
use crate::raw::wire::{init, notify, op, StoreOut, WriteIn};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "stale-data/truncated-under-way",
            "what is written is not zeroes because the file was truncated before the WRITE is read",
            truncated,
        ),
        Scenario::series(
            "stale-data/told-under-way",
            "but whatever else a server says of a file is heard while a write is under way",
            told,
        ),
        Scenario::series(
            "stale-data/truncated-beside",
            "what is behind the size that a file had for a while is not what it was, also if that size is not heard",
            |env| truncated_beside(env, 0, false),
        ),
        Scenario::series(
            "stale-data/truncated-beside-explicit",
            "also if all else that is cached stays until the server says so",
            |env| truncated_beside(env, init::EXPLICIT_INVAL_DATA, false),
        ),
        Scenario::series(
            "stale-data/truncated-and-read",
            "and a write is there when it is over, also if its page was read meanwhile, where nothing was",
            |env| truncated_beside(env, 0, true),
        ),
        Scenario::series(
            "stale-data/asked-at-begin",
            "what is cached stays if attributes that show no change come when an append begins",
            asked_at_begin,
        ),
        Scenario::series(
            "stale-data/append-keeps-page",
            "an append leaves the page in the cache in which it begins",
            |env| append(env, false),
        ),
        Scenario::series(
            "stale-data/append-and-store",
            "and what the server has stored there after it, also if that page is to be written",
            |env| append(env, true),
        ),
        Scenario::series(
            "stale-data/append-and-store-zeroed",
            "and what it has not stored there is what was appended, though the page was made zeroes before",
            append_zeroed,
        ),
        Scenario::series(
            "stale-data/truncated-append",
            "what is appended after a write that a truncation has overtaken is where the file ends",
            truncated_append,
        ),
        Scenario::series(
            "stale-data/shorter-at-begin",
            "nor does it go because the file was truncated when a write began",
            shorter_at_begin,
        ),
    ]
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

/// No server dies. Somebody else appends to the file.
fn told(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let app = kit.app("a write", move || ops::pwrite(fd, b"XYZ", 6))?;
    let write = kit.until_op(op::WRITE)?;
    let f0 = node(&kit, "f0")?;
    kit.tree.node_mut(f0).data.extend_from_slice(b", another's");
    let asked = kit.run("fstat", move || ops::fstat(fd))?;
    ensure!(asked.is_ok(), "fstat gave {:?}", asked.err());
    kit.served.clear();
    let size = kit.run("fstat", move || ops::fstat_cached(fd))??.stx_size;
    ensure!(
        size == 23 && kit.served.is_empty(),
        "f0 has {size} bytes; {} requests",
        kit.served.len()
    );
    kit.answer(&write)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(3), "the write gave {wrote:?}");
    reads(&mut kit, fd, 0, b"contenXYZf 0, another's")
}

/// No server dies. The file was truncated by somebody else, and the WRITE makes it as long as it was.
fn truncated_beside(env: &Env<'_>, asked: u64, read: bool) -> Result<()> {
    let (mut kit, fd) = cached(env, asked)?;
    let f0 = node(&kit, "f0")?;
    kit.tree.node_mut(f0).data = vec![b'd'; 2 * 4096];
    // The mount knows the new size, and has read it all.
    ensure!(kit.run("fstat", move || ops::fstat(fd))?.is_ok(), "fstat");
    uncache(&mut kit, fd)?;
    let all = kit.run("pread", move || ops::pread(fd, 2 * 4096, 0))?;
    ensure!(
        all.as_deref() == Ok([b'd'; 2 * 4096].as_slice()),
        "f0 is not read anew"
    );
    kit.settle()?;
    let app = kit.app("a write", move || ops::pwrite(fd, &[b'X'; 4096], 4096))?;
    let write = kit.until_op(op::WRITE)?;
    kit.tree.node_mut(f0).data.truncate(2048);
    ensure!(kit.run("fstat", move || ops::fstat(fd))?.is_ok(), "fstat");
    if read {
        kit.run("a read before", move || ops::pread(fd, 4096, 4096))??;
    }
    kit.answer(&write)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(4096), "the write gave {wrote:?}");
    reads(&mut kit, fd, 4000, &[[0; 96].as_slice(), b"XXXX"].concat())
}

/// No server dies. Somebody asks for attributes between the first two steps of an append.
fn asked_at_begin(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let begun = Trap::arm("write_begun")?;
    let app = kit.app("an append", move || ops::pwrite(fd, b"XYZ", 12))?;
    kit.serve_until("an append to begin", |_| Ok(begun.stopped()))?;
    ensure!(kit.run("fstat", move || ops::fstat(fd))?.is_ok(), "fstat");
    begun.go();
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(3), "the append gave {wrote:?}");
    is_cached(&mut kit, fd, 0, b"content of 0XYZ")
}

/// No server dies. The file is truncated by somebody else between the first two steps of a write, which makes it as long as it
/// was, and attributes say so once more.
fn shorter_at_begin(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let f0 = node(&kit, "f0")?;
    kit.tree.node_mut(f0).data = vec![b'd'; 2 * 4096];
    let begun = Trap::arm("write_begun")?;
    ensure!(kit.run("fstat", move || ops::fstat(fd))?.is_ok(), "fstat");
    let app = kit.app("a write", move || ops::pwrite(fd, &[b'X'; 4096], 4096))?;
    kit.serve_until("a write to begin", |_| Ok(begun.stopped()))?;
    kit.tree.node_mut(f0).data.truncate(2048);
    ensure!(kit.run("fstat", move || ops::fstat(fd))?.is_ok(), "fstat");
    begun.go();
    let write = kit.until_op(op::WRITE)?;
    ensure!(kit.run("fstat", move || ops::fstat(fd))?.is_ok(), "fstat");
    kit.answer(&write)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(4096), "the write gave {wrote:?}");
    is_cached(&mut kit, fd, 4096, &[b'X'; 100])
}

/// No server dies. The server may have executed the WRITE of somebody else after this one, and store that before its answer.
fn append(env: &Env<'_>, store: bool) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let begins = if store { b'C' } else { b'c' };
    if store {
        let (at, _) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
        store_byte(&mut kit, at, 0, b'C')?;
    }
    let app = kit.app("an append", move || ops::pwrite(fd, b"XYZ", 12))?;
    let write = kit.until_op(op::WRITE)?;
    let answer = kit.tree.apply(&write)?;
    let wanted: &[u8] = if store {
        store_new(&mut kit, b"new")?;
        b"ontent of 0new"
    } else {
        b"ontent of 0XYZ"
    };
    let wanted = &[&[begins], wanted].concat();
    kit.send(&write, &answer)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(3), "the append gave {wrote:?}");
    if !store {
        return is_cached(&mut kit, fd, 0, wanted);
    }
    kit.run("fsync", move || ops::fsync(fd))??;
    server_has(&mut kit, &String::from_utf8_lossy(wanted))?;
    reads(&mut kit, fd, 0, wanted)
}

/// Somebody else writes behind what the kernel knew to be the end, and the server stores that.
fn store_new(kit: &mut Kit<'_>, new: &[u8; 3]) -> Result<()> {
    let nodeid = node(kit, "f0")?;
    kit.tree.node_mut(nodeid).data[12..15].copy_from_slice(new);
    let place = StoreOut {
        nodeid,
        offset: 12,
        size: 3,
        padding: 0,
    };
    kit.dev.notify(notify::STORE, &place, new).context("STORE")
}

/// No server dies. The page in which the append begins is written, up to where the file has ended before.
fn append_zeroed(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let (at, _) = map(&mut kit, fd, libc::PROT_READ | libc::PROT_WRITE, 1)?;
    let app = kit.app("an append", move || ops::pwrite(fd, b"XYZXYZ", 12))?;
    let write = kit.until_op(op::WRITE)?;
    let answer = kit.tree.apply(&write)?;
    let mapped = store_and_sync(&mut kit, fd, at)?;
    synced(&mut kit, &mapped)?;
    store_new(&mut kit, b"n\0w")?;
    kit.send(&write, &answer)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(6), "the append gave {wrote:?}");
    reads(&mut kit, fd, 0, b"cXntent of 0n\0wXYZ")
}

/// No server dies. The file ends behind the write once that is executed, and before where the mount thinks that it ends.
fn truncated_append(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let f0 = node(&kit, "f0")?;
    kit.tree.node_mut(f0).data = vec![b'd'; 100];
    let end = open(&mut kit, "f0", OFlag::O_WRONLY | OFlag::O_APPEND)?;
    ensure!(kit.run("fstat", move || ops::fstat(fd))?.is_ok(), "fstat");
    let app = kit.app("a write", move || ops::pwrite(fd, b"XYZ", 6))?;
    let write = kit.until_op(op::WRITE)?;
    kit.tree.node_mut(f0).data.truncate(8);
    ensure!(kit.run("fstat", move || ops::fstat(fd))?.is_ok(), "fstat");
    kit.answer(&write)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(3), "the write gave {wrote:?}");
    let app = kit.app("an append", move || ops::pwrite(end, b"end", 0))?;
    let write = kit.until_op(op::WRITE)?;
    // Not every server looks for the end itself.
    let offset = write.arg::<WriteIn>()?.offset;
    ensure!(offset == 9, "{write} is for offset {offset}");
    kit.answer(&write)?;
    let wrote = kit.serve(&app)?;
    ensure!(wrote == Ok(3), "the append gave {wrote:?}");
    server_has(&mut kit, "ddddddXYZend")?;
    reads(&mut kit, fd, 0, b"ddddddXYZend")
}

fn is_cached(kit: &mut Kit<'_>, fd: RawFd, at: i64, wanted: &[u8]) -> Result<()> {
    kit.served.clear();
    kit.run("a read", move || ops::pread(fd, 100, at))??;
    ensure!(
        !kit.served.iter().any(|m| m.is(op::READ)),
        "what was cached is gone"
    );
    reads(kit, fd, at, wanted)
}
