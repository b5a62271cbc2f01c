// SPDX-License-Identifier: GPL-2.0
//! What is dropped of a file that was changed while there was no server (of the family `stale-data`), and who uses it at
//! that moment.

use std::os::fd::RawFd;

use anyhow::{ensure, Context, Result};
use nix::fcntl::OFlag;

use super::help::{expect_resent, open, populate, still_serves};
use super::lost::node;
use super::stale_data::cached;
use super::Scenario;
use crate::raw::app::App;
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::msg::Message;
use crate::raw::ops::{self, Done};
use crate::raw::wire::{fopen, op};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "stale-data/write-under-way",
            "who reads while a write is under way leaves nothing of before it in the cache",
            overwrite,
        ),
        Scenario::series(
            "stale-data/append-under-way",
            "nor zeroes, where the file ended",
            append,
        ),
        Scenario::series(
            "stale-data/direct-read-under-way",
            "what a direct read brings into a mapping of such a file is not lost",
            direct_read,
        ),
    ]
}

/// The server that read a WRITE of f0 dies, and f0 looks changed to the next one. That WRITE, sent again.
fn crash_in_write(kit: &mut Kit<'_>) -> Result<Message> {
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
    kit.answer(write)?;
    let wrote = kit.serve(app)?;
    ensure!(wrote.is_ok(), "the write gave {wrote:?}");
    Ok(())
}

fn reads(kit: &mut Kit<'_>, fd: RawFd, wanted: &[u8]) -> Result<()> {
    let found = kit.run("a read after", move || ops::pread(fd, 100, 0))?;
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
    let app = kit.app("a write", move || ops::pwrite(fd, b"C", 0))?;
    let write = crash_in_write(&mut kit)?;
    read_first(&mut kit, fd, &write, &app)?;
    reads(&mut kit, fd, b"Content of 0")
}

fn append(env: &Env<'_>) -> Result<()> {
    let (mut kit, fd) = cached(env, 0)?;
    let app = kit.app("a write", move || ops::pwrite(fd, b", and more", 12))?;
    let write = crash_in_write(&mut kit)?;
    read_first(&mut kit, fd, &write, &app)?;
    reads(&mut kit, fd, b"content of 0, and more")
}

/// f1 is read past the cache, into a mapping of f0.
fn direct_read(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted_with(env, Config::default())?;
    populate(&mut kit, 2)?;
    kit.tree.open_flags = fopen::DIRECT_IO;
    let from = open(&mut kit, "f1", OFlag::O_RDONLY)?;
    kit.tree.open_flags = fopen::KEEP_CACHE;
    let fd = open(&mut kit, "f0", OFlag::O_RDWR)?;
    let at = kit
        .run("mmap", move || {
            // SAFETY: a fresh mapping where the kernel likes.
            let at = unsafe {
                let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
                libc::mmap(std::ptr::null_mut(), 4096, prot, flags, fd, 0)
            };
            // SAFETY: mapped, and the file is not empty.
            let first = unsafe { at.cast::<u8>().read_volatile() };
            (at as usize, first)
        })
        .context("a mapping of f0")?;
    ensure!(at.1 == b'c', "f0 begins with {}", at.1);
    let at = at.0;
    let app = kit.app("a direct read", move || {
        // SAFETY: the mapping is as long as said, and nobody has a reference to it.
        let got = unsafe { libc::pread(from, at as *mut libc::c_void, 12, 0) };
        nix::errno::Errno::result(got)
    })?;
    let old = kit.until_op(op::READ)?;
    let f0 = node(&kit, "f0")?;
    kit.tree.node_mut(f0).mtime += 10;
    kit.recover()?;
    let read = kit.next_request()?;
    expect_resent(&kit, &old, &read)?;
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
