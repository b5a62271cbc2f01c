// SPDX-License-Identifier: GPL-2.0
//! Background requests: the slots are in dead hands, and still everything gets through.

use anyhow::{ensure, Context, Result};
use nix::fcntl::OFlag;

use super::help::{expect_resent, open, still_serves};
use super::Scenario;
use crate::raw::dev::MAX_WRITE;
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::msg::Message;
use crate::raw::ops;
use crate::raw::trap::Trap;
use crate::raw::tree::Answer;
use crate::raw::wire::{init, op, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "background/slots-full",
            "replays pass though every background slot is taken",
            slots_full,
        ),
        Scenario::series(
            "background/readahead",
            "readahead under way at the crash ends with the right bytes",
            readahead,
        ),
        Scenario::series(
            "background/writeback",
            "dirty pages survive the crash and are written once each",
            writeback,
        ),
        Scenario::series(
            "background/writeback-revoked",
            "dirty pages of a revoked file go nowhere; fsync says EIO",
            writeback_revoked,
        ),
        Scenario::series(
            "background/held-write-revoked",
            "a held WRITE of a revoked file never reaches a server",
            held_write,
        ),
        Scenario::series(
            "background/revoked-unread",
            "who waits for a revoked file gets EIO, and its pages back, though the new server reads nothing",
            revoked_unread,
        ),
        Scenario::series(
            "background/writeback-revoked-unread",
            "the same for dirty pages whose WRITEs wait for a background slot",
            writeback_revoked_unread,
        ),
        Scenario::series(
            "background/write-made-late-unread",
            "the same for dirty pages whose WRITE is made when all is over",
            write_made_late,
        ),
        Scenario::series(
            "background/read-made-late-unread",
            "the same for a READ in the background",
            read_made_late,
        ),
        Scenario::series(
            "background/stat-made-late-unread",
            "the same for a request that its caller waits for",
            stat_made_late,
        ),
        Scenario::series(
            "background/abort",
            "abort in a recovery ends also what waits for a background slot",
            aborted,
        ),
        Scenario::series(
            "background/held-two-inodes",
            "a held LINK or RENAME that names a revoked inode gets EIO",
            two_inodes,
        ),
    ]
}

fn content(n: usize) -> Vec<u8> {
    (0..n as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

/// A mount with two background slots and one big file.
fn narrow<'a>(env: &'a Env<'a>, flags: u64) -> Result<Kit<'a>> {
    let config = Config {
        max_background: 2,
        max_readahead: 64 << 10,
        ..Config::with(flags)
    };
    let mut kit = Kit::granted_with(env, config)?;
    kit.tree.file(ROOT, "big", &content(1 << 20));
    kit.tree.file(ROOT, "small", b"small");
    for name in ["big", "small"] {
        ensure!(kit.run_on("stat", name, ops::stat)?.is_ok(), "stat {name}");
    }
    Ok(kit)
}

type Reader = (i64, crate::raw::app::App<ops::Done<Vec<u8>>>);

/// Six readers of "big" whose requests are in dead hands as far as there are slots, and wait for one otherwise.
fn six_readers(kit: &mut Kit<'_>) -> Result<(Vec<Reader>, Vec<Message>)> {
    let fd = open(kit, "big", OFlag::O_RDONLY)?;
    // Readers far apart: each starts background reads of its own, two of which fill the slots.
    let mut readers = Vec::new();
    for i in 0..6i64 {
        readers.push((
            i,
            kit.app("read", move || ops::pread(fd, 4096, i * 150_000))?,
        ));
    }
    let mut read: Vec<Message> = Vec::new();
    let patience = kit.patience;
    read.push(kit.until_op(op::READ)?);
    // Whatever else can be read is taken away as well; the rest waits for a slot.
    crate::raw::wait::wait_for("all readers to sleep", patience, || {
        Ok(readers
            .iter()
            .all(|(_, r)| matches!(crate::raw::app::state(r.tid), Some('S' | 'D'))))
    })?;
    while kit.readable()? {
        read.push(kit.until_op(op::READ)?);
    }
    Ok((readers, read))
}

/// Nothing is read from the device after COMMIT.
fn revoked_unread(env: &Env<'_>) -> Result<()> {
    let mut kit = narrow(env, 0)?;
    let big = kit.tree.child(ROOT, "big").context("big")?;
    let (readers, read) = six_readers(&mut kit)?;
    ensure!(read.len() < 6, "no request waits for a slot");
    let other = kit.on("stat", "small", |p| ops::stat(p).map(drop))?;
    let old = kit.until_op(op::GETATTR)?;
    kit.recover_with(&mut |_, r| (r.nodeid == big).then_some(Answer::Err(libc::ESTALE)))?;
    for (i, reader) in &readers {
        let result = reader
            .finish(kit.patience)
            .with_context(|| format!("reader {i} waits for a server that was not asked"))?;
        super::help::expect_errno(&format!("reader {i}"), result, nix::errno::Errno::EIO)?;
    }
    // What is left is what the server owes.
    kit.conn.wait_waiting(1, kit.patience)?;
    let new = kit.next_request()?;
    expect_resent(&kit, &old, &new)?;
    kit.answer(&new)?;
    ensure!(kit.serve(&other)? == Ok(()), "stat");
    // The slots are free again.
    kit.tree.file(ROOT, "next", &content(1 << 20));
    let got = kit.run_on("read", "next", ops::read_file)?;
    ensure!(
        got == Ok(content(1 << 20)),
        "another file reads other bytes"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn aborted(env: &Env<'_>) -> Result<()> {
    let mut kit = narrow(env, 0)?;
    let (readers, read) = six_readers(&mut kit)?;
    ensure!(read.len() < 6, "no request waits for a slot");
    kit.restarted()?;
    kit.conn.abort().context("abort")?;
    for (i, reader) in &readers {
        let result = reader
            .finish(kit.patience)
            .with_context(|| format!("reader {i} waits for a connection that was aborted"))?;
        ensure!(
            result.is_err(),
            "reader {i} of a connection that was aborted got {} bytes",
            result.map_or(0, |b| b.len())
        );
    }
    kit.conn.wait_waiting(0, kit.patience)
}

fn slots_full(env: &Env<'_>) -> Result<()> {
    let mut kit = narrow(env, 0)?;
    let (readers, read) = six_readers(&mut kit)?;
    let recovered = kit.recover()?;
    ensure!(
        recovered.replays.len() == 3,
        "{} replays",
        recovered.replays.len()
    );
    for old in &read {
        let new = kit.next_request()?;
        expect_resent(&kit, old, &new)?;
        kit.answer(&new)?;
    }
    let wanted = content(1 << 20);
    for (i, reader) in &readers {
        let start = (*i * 150_000) as usize;
        let got = kit.serve(reader)?.with_context(|| format!("reader {i}"))?;
        ensure!(
            got == wanted[start..start + 4096],
            "reader {i} got other bytes"
        );
    }
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn readahead(env: &Env<'_>) -> Result<()> {
    let mut kit = narrow(env, 0)?;
    let app = kit.on("read", "big", ops::read_file)?;
    let mut crashes = 0;
    while !app.done() {
        let m = kit.until_op_or_end(op::READ, &app)?;
        let Some(m) = m else { break };
        if crashes < 8 && m.unique() % 4 == 0 {
            crashes += 1;
            kit.recover()?;
        } else {
            kit.answer(&m)?;
        }
    }
    let got = kit.serve(&app)?.context("reading big")?;
    ensure!(crashes > 0, "no crash was reached");
    ensure!(
        got == content(1 << 20),
        "after {crashes} crashes big reads other bytes"
    );
    kit.check_counts()?;
    Ok(())
}

fn writeback(env: &Env<'_>) -> Result<()> {
    let mut kit = narrow(env, init::WRITEBACK_CACHE)?;
    let big = kit.tree.child(ROOT, "big").context("big")?;
    let fd = open(&mut kit, "big", OFlag::O_RDWR)?;
    let mut data = content(1 << 20);
    data.reverse();
    let bytes = data.clone();
    ensure!(
        kit.run("write 1 MiB", move || ops::pwrite(fd, &bytes, 0))? == Ok(1 << 20),
        "the write"
    );
    let sync = kit.app("fsync", move || ops::fsync(fd))?;
    let mut owed = Vec::new();
    let old = kit.until_op(op::WRITE)?;
    owed.push(old);
    let recovered = kit.recover()?;
    ensure!(recovered.report.held >= 1, "nothing was held");
    let again = kit.until("the WRITE to come again", |m| m.is(op::WRITE))?;
    expect_resent(&kit, &owed[0], &again)?;
    kit.answer(&again)?;
    ensure!(kit.serve(&sync)? == Ok(()), "fsync");
    ensure!(
        kit.tree.node(big).data == data,
        "the server has other bytes than were written"
    );
    // Offset and length are behind the handle.
    let writes = kit.served.iter().filter(|m| m.is(op::WRITE));
    let mut parts: Vec<(u64, u64)> = writes
        .chain([&again])
        .map(|m| {
            let word = |at: usize| u64::from_ne_bytes(m.body[at..at + 8].try_into().expect("8"));
            (word(8), word(16) & u64::from(u32::MAX))
        })
        .collect();
    parts.sort_unstable();
    let mut end = 0;
    for (offset, length) in &parts {
        ensure!(
            *offset == end,
            "what was written is not each byte once: {parts:?}"
        );
        end += length;
    }
    ensure!(end == 1 << 20, "{end} bytes were written, not 1 MiB");
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn writeback_revoked(env: &Env<'_>) -> Result<()> {
    let mut kit = narrow(env, init::WRITEBACK_CACHE)?;
    let big = kit.tree.child(ROOT, "big").context("big")?;
    let fd = open(&mut kit, "big", OFlag::O_RDWR)?;
    ensure!(
        kit.run("write", move || ops::pwrite(fd, &[7; 200_000], 0))? == Ok(200_000),
        "the write"
    );
    let sync = kit.app("fsync", move || ops::fsync(fd))?;
    kit.until_op(op::WRITE)?;
    kit.recover_with(&mut |_, r| (r.nodeid == big).then_some(Answer::Err(libc::ESTALE)))?;
    no_request_names(&mut kit, big, || sync.done())?;
    let result = sync.take().context("fsync")?;
    ensure!(
        result.is_err(),
        "fsync of a revoked file says {result:?}: the data is nowhere"
    );
    no_request_names(&mut kit, big, || true)?;
    still_serves(&mut kit)
}

/// WRITEs are not kept from being made by full slots, so that most of them wait behind the two.
///
/// All of them are made before RELEASE: what is made later is tested when the server reads it, which this one does not.
fn writeback_revoked_unread(env: &Env<'_>) -> Result<()> {
    let mut kit = narrow(env, init::WRITEBACK_CACHE)?;
    let big = kit.tree.child(ROOT, "big").context("big")?;
    let fd = open(&mut kit, "big", OFlag::O_RDWR)?;
    let wrote = kit.run("write", move || ops::pwrite(fd, &[7; 1 << 20], 0))?;
    ensure!(wrote == Ok(1 << 20), "the write gave {wrote:?}");
    let sync = kit.app("fsync", move || ops::fsync(fd))?;
    kit.until_op(op::WRITE)?;
    let writes = (1u64 << 20).div_ceil(u64::from(MAX_WRITE));
    kit.conn.wait_waiting(writes, kit.patience)?;
    sync.wait_asleep(kit.patience)?;
    kit.recover_with(&mut |_, r| (r.nodeid == big).then_some(Answer::Err(libc::ESTALE)))?;
    let result = sync
        .finish(kit.patience)
        .context("fsync waits for a server that was not asked")?;
    super::help::expect_errno("fsync", result, nix::errno::Errno::EIO)?;
    kit.conn.wait_waiting(0, kit.patience)?;
    no_request_names(&mut kit, big, || true)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// `app` stops at the trap, with its request not queued; its file is revoked, and nothing is read after COMMIT.
fn made_late<T: Send + 'static + std::fmt::Debug>(
    kit: &mut Kit<'_>,
    trap: &'static str,
    what: &str,
    app: impl FnOnce() -> ops::Done<T> + Send + 'static,
) -> Result<()> {
    let big = kit.tree.child(ROOT, "big").context("big")?;
    let trap = Trap::arm(trap)?;
    let app = kit.app(what, app)?;
    trap.wait(kit.patience)?;
    kit.recover_with(&mut |_, r| (r.nodeid == big).then_some(Answer::Err(libc::ESTALE)))?;
    kit.wait_serving()?;
    trap.go();
    let result = app
        .finish(kit.patience)
        .with_context(|| format!("{what} waits for a server that was not asked"))?;
    super::help::expect_errno(what, result, nix::errno::Errno::EIO)?;
    kit.conn.wait_waiting(0, kit.patience)?;
    no_request_names(kit, big, || true)?;
    kit.check_counts()?;
    still_serves(kit)
}

fn write_made_late(env: &Env<'_>) -> Result<()> {
    let mut kit = narrow(env, init::WRITEBACK_CACHE)?;
    let fd = open(&mut kit, "big", OFlag::O_RDWR)?;
    let wrote = kit.run("write", move || ops::pwrite(fd, &[7; 4096], 0))?;
    ensure!(wrote == Ok(4096), "the write gave {wrote:?}");
    made_late(&mut kit, "queue_writes", "fsync", move || ops::fsync(fd))
}

fn read_made_late(env: &Env<'_>) -> Result<()> {
    let mut kit = narrow(env, init::ASYNC_READ)?;
    let fd = open(&mut kit, "big", OFlag::O_RDONLY)?;
    made_late(&mut kit, "queue_bg", "read", move || {
        ops::pread(fd, 100_000, 0).map(|bytes| bytes.len())
    })
}

fn stat_made_late(env: &Env<'_>) -> Result<()> {
    let mut kit = narrow(env, 0)?;
    let fd = open(&mut kit, "big", OFlag::O_RDONLY)?;
    made_late(&mut kit, "queue_req", "fstat", move || {
        ops::fstat(fd).map(drop)
    })
}

/// Serves; nothing that is delivered may name the revoked node, but what tidies up.
fn no_request_names(kit: &mut Kit<'_>, node: u64, done: impl Fn() -> bool) -> Result<()> {
    kit.served.clear();
    kit.serve_until("the end of who used the revoked file", |_| Ok(done()))?;
    let tidying = |m: &Message| {
        matches!(
            m.opcode(),
            op::RELEASE | op::RELEASEDIR | op::FORGET | op::BATCH_FORGET
        )
    };
    match kit
        .served
        .iter()
        .find(|m| m.nodeid() == node && !tidying(m))
    {
        Some(m) => anyhow::bail!("{m} reached the server although its inode is revoked"),
        None => Ok(()),
    }
}

fn held_write(env: &Env<'_>) -> Result<()> {
    let mut kit = narrow(env, 0)?;
    let big = kit.tree.child(ROOT, "big").context("big")?;
    let fd = open(&mut kit, "big", OFlag::O_RDWR)?;
    // The first is in dead hands, the second sleeps behind it for the inode's lock, the third reads.
    let first = kit.app("write 1", move || ops::pwrite(fd, b"one", 0))?;
    kit.until_op(op::WRITE)?;
    let second = kit.app("write 2", move || ops::pwrite(fd, b"two", 10))?;
    second.wait_asleep(kit.patience)?;
    let reader = kit.app("read", move || ops::pread(fd, 10, 500_000))?;
    reader.wait_asleep(kit.patience)?;
    kit.recover_with(&mut |_, r| (r.nodeid == big).then_some(Answer::Err(libc::ESTALE)))?;
    no_request_names(&mut kit, big, || {
        first.done() && second.done() && reader.done()
    })?;
    let results = (
        first.take(),
        second.take(),
        reader.take().map(|r| r.map(|b| b.len())),
    );
    let eio = nix::errno::Errno::EIO;
    ensure!(
        results == (Some(Err(eio)), Some(Err(eio)), Some(Err(eio))),
        "the held requests gave {results:?}, not EIO"
    );
    ensure!(
        kit.tree.node(big).data == content(1 << 20),
        "a held WRITE was executed"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn two_inodes(env: &Env<'_>) -> Result<()> {
    type Run = fn(&std::path::Path) -> ops::Done<()>;
    let cases: [(&str, u32, &str, Run); 3] = [
        ("link of a revoked file", op::LINK, "small", |p| {
            ops::link(&p.join("small"), &p.join("d/new"))
        }),
        ("rename into a revoked directory", op::RENAME, "d", |p| {
            ops::rename(
                &p.join("small"),
                &p.join("d/new"),
                nix::fcntl::RenameFlags::empty(),
            )
        }),
        ("mkdir in a revoked directory", op::MKDIR, "d", |p| {
            ops::mkdir(&p.join("d/new"))
        }),
    ];
    for (what, opcode, victim, run) in cases {
        let mut kit = narrow(env, 0)?;
        kit.tree.dir(ROOT, "d");
        ensure!(kit.run_on("stat", "d", ops::stat)?.is_ok(), "stat d");
        let victim = kit.tree.child(ROOT, victim).context("the victim")?;
        let app = kit.on(what, "", run)?;
        kit.until_op(opcode)?;
        kit.recover_with(&mut |_, r| (r.nodeid == victim).then_some(Answer::Err(libc::ESTALE)))?;
        kit.served.clear();
        kit.serve_until(what, |_| Ok(app.done()))?;
        if let Some(m) = kit.served.iter().find(|m| m.is(opcode)) {
            anyhow::bail!("{what}: {m} reached the server");
        }
        let result = app.take().context("the result")?;
        ensure!(
            result == Err(nix::errno::Errno::EIO),
            "{what} gave {result:?}, not EIO"
        );
        kit.check_counts()?;
    }
    Ok(())
}
