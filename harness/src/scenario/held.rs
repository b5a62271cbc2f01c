// SPDX-License-Identifier: GPL-2.0
//! While the connection recovers nothing reaches a server but replays: new requests, FORGETs, INTERRUPTs and other
//! notifications wait or are refused.

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use zerocopy::IntoBytes;

use super::help::{
    enter, expect_errno, expect_report, expect_resent, leave, open, populated, still_serves, Phase,
    PHASES,
};
use super::Scenario;
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::ops;
use crate::raw::wire::*;

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "held/new-requests",
            "requests of a recovery are held, then delivered",
            new_requests,
        ),
        Scenario::series(
            "held/unread",
            "requests nobody had read are held too, and are no resends",
            unread,
        ),
        Scenario::series(
            "held/thousand",
            "a thousand held requests keep their order",
            thousand,
        ),
        Scenario::series(
            "held/forgets",
            "FORGETs queued at death never reach the successor",
            forgets,
        ),
        Scenario::series(
            "held/evictions",
            "an eviction during a recovery sends no FORGET of the past",
            evictions,
        ),
        Scenario::series(
            "held/last-reference",
            "an inode that only the recovery refers to is evicted after COMMIT, and its count comes back once",
            last_reference,
        ),
        Scenario::series(
            "held/notifications",
            "other notifications are EBUSY until COMMIT, POLL is not",
            notifications,
        ),
        Scenario::series(
            "held/interrupt",
            "an INTERRUPT is not delivered while held, and never for an old id",
            interrupt,
        ),
        Scenario::series(
            "held/nonblock",
            "read and poll agree that a held request is none",
            nonblocking,
        ),
        Scenario::series(
            "held/release",
            "RELEASE of a descriptor closed during recovery arrives",
            release,
        ),
        Scenario::series(
            "held/report-adds-up",
            "report, recovery file and server agree on every number",
            adds_up,
        ),
    ]
}

fn new_requests(env: &Env<'_>) -> Result<()> {
    for phase in PHASES {
        let mut kit = populated(env, 3)?;
        let left = enter(&mut kit, phase)?;
        let base = kit.conn.waiting()?;
        let made = kit
            .parked("mkdir", "during", base + 1, ops::mkdir)
            .with_context(|| format!("in {phase:?}"))?;
        let seen = kit.parked("stat", "f0", base + 2, |p| ops::stat(p).map(drop))?;
        if matches!(phase, Phase::Root | Phase::Reported) {
            ensure!(!kit.readable()?, "a request can be read in {phase:?}");
        }
        leave(&mut kit, left.as_ref())?;
        // A whole new recovery: answer_replays insists that nothing but replays is delivered.
        let recovered = kit.recover()?;
        // Who slept in a copy gave back a READ; if it was answered after all then a RELEASE follows.
        let more = u64::from(phase.copying().is_some());
        ensure!(
            recovered.report.held == 2 + more,
            "two requests were held, and {more} of a sleeper, the report says {} in {phase:?}",
            recovered.report.held
        );
        let m = kit.until("a held request", |m| more == 0 || !m.is(op::READ))?;
        ensure!(
            m.unique() & UNIQUE_RESEND == 0,
            "{m} was never read by anybody, yet carries the RESEND bit"
        );
        ensure!(
            m.is(op::LOOKUP) || m.is_named(op::MKDIR, "during"),
            "the first held request is {m}"
        );
        kit.answer(&m)?;
        let results = (kit.serve(&made)?, kit.serve(&seen)?);
        ensure!(
            results == (Ok(()), Ok(())),
            "the held operations gave {results:?} in {phase:?}"
        );
        kit.check_counts()?;
    }
    Ok(())
}

fn unread(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let read = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    let old = kit.until_op(op::GETATTR)?;
    let unread = kit.parked("stat", "f0", 2, |p| ops::stat(p).map(drop))?;
    kit.recover()?;
    let first = kit.next_request()?;
    expect_resent(&kit, &old, &first)?;
    let second = kit.next_request()?;
    ensure!(
        second.unique() < 1 << 48,
        "{second} was never read, yet its id is no fresh one"
    );
    ensure!(
        second.original() > first.original(),
        "{second} comes after {first}"
    );
    kit.answer(&second)?;
    kit.answer(&first)?;
    ensure!(
        (kit.serve(&read)?, kit.serve(&unread)?) == (Ok(()), Ok(())),
        "the stats failed"
    );
    still_serves(&mut kit)
}

fn thousand(env: &Env<'_>) -> Result<()> {
    let n = 1000;
    let mut kit = populated(env, 1)?;
    let mut apps = Vec::new();
    let mut read = 0;
    for i in 0..n {
        apps.push(kit.on("stat", "f0", |p| ops::stat(p).map(drop))?);
        if i < n / 2 {
            kit.until_op(op::GETATTR)?;
            read += 1;
        }
    }
    kit.conn.wait_waiting(n, kit.patience)?;
    kit.restarted()?;
    // The root's replay, which the worker adds when it runs.
    let base = n + 1;
    kit.conn
        .wait_waiting(base, kit.patience)
        .context("the replay of the root")?;
    for i in 0..50 {
        apps.push(kit.parked("stat", "f0", base + i + 1, |p| ops::stat(p).map(drop))?);
    }
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    ensure!(
        recovered.report.held == n + 50,
        "{} held, expected {}",
        recovered.report.held,
        n + 50
    );
    kit.commit(&recovered)?;
    let mut last = 0;
    for i in 0..n + 50 {
        let m = kit.next_request()?;
        ensure!(m.is(op::GETATTR), "{m} among the held stats");
        ensure!(
            m.original() > last,
            "request {i} has id {:#x}, the one before {last:#x}",
            m.original()
        );
        ensure!(
            (m.unique() & UNIQUE_RESEND != 0) == (i < read),
            "request {i} of {read} that had been read is {m}"
        );
        if i == 0 {
            ensure!(
                recovered.report.lowest_owed == m.original(),
                "lowest owed is {:#x}",
                recovered.report.lowest_owed
            );
        }
        last = m.original();
        kit.answer(&m)?;
    }
    for app in apps {
        ensure!(app.finish(kit.patience)? == Ok(()), "{}", app.what);
    }
    still_serves(&mut kit)
}

/// Makes the kernel queue a FORGET of `name` that nobody reads.
fn queue_forget(kit: &mut Kit<'_>, name: &str) -> Result<u64> {
    let node = kit
        .tree
        .child(ROOT, name)
        .with_context(|| name.to_owned())?;
    let app = kit.on("unlink", name, ops::unlink)?;
    let m = kit.until_op(op::UNLINK)?;
    kit.answer(&m)?;
    ensure!(app.finish(kit.patience)? == Ok(()), "unlink {name}");
    let (dev, patience) = (&kit.dev, kit.patience);
    let ready = dev.poll(nix::poll::PollFlags::POLLIN, patience)?;
    ensure!(
        ready.contains(nix::poll::PollFlags::POLLIN),
        "no FORGET of {name} was queued"
    );
    Ok(node)
}

fn forgets(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 5)?;
    let gone = [queue_forget(&mut kit, "f1")?, queue_forget(&mut kit, "f3")?];
    // The first was read on the way to the second; that one waits in the queue now.
    kit.forgotten.clear();
    let recovered = kit.recover()?;
    for node in gone {
        ensure!(
            !recovered.replays.iter().any(|r| r.nodeid == node),
            "node {node} was evicted, yet replayed"
        );
    }
    still_serves(&mut kit)?;
    kit.settle()?;
    for node in gone {
        let told = kit.forgotten.iter().any(|f| f.nodeid == node);
        ensure!(
            !told,
            "the successor got a FORGET of node {node}, which only its predecessor knew"
        );
    }
    kit.check_counts()?;
    Ok(())
}

fn evictions(env: &Env<'_>) -> Result<()> {
    for phase in [Phase::Said, Phase::Replay, Phase::Prepared, Phase::Reported] {
        let mut kit = populated(env, 30)?;
        let left = enter(&mut kit, phase)?;
        // Drop what the kernel caches: dentries go, and with them the inodes.
        std::fs::write("/proc/sys/vm/drop_caches", "2").context("drop_caches")?;
        leave(&mut kit, left.as_ref())?;
        kit.recover().with_context(|| format!("in {phase:?}"))?;
        kit.forgotten.clear();
        // From here on the server's table is the replayed set, and every FORGET must fit into it: Tree::forget checks.
        still_serves(&mut kit)?;
        std::fs::write("/proc/sys/vm/drop_caches", "2").context("drop_caches")?;
        kit.check_counts()
            .with_context(|| format!("in {phase:?}"))?;
    }
    Ok(())
}

/// Drops the caches while the replay of a file is out, so that the recovery has the last reference to it.
fn last_reference(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let node = kit.tree.child(ROOT, "f0").context("f0")?;
    let count = kit.tree.node(node).nlookup;
    kit.restarted()?;
    let root = kit.confirm_root()?;
    let (m, replay) = kit.next_replay()?;
    ensure!(replay.nodeid == node, "{m} is no replay of f0");
    std::fs::write("/proc/sys/vm/drop_caches", "2").context("drop_caches")?;
    ensure!(
        !kit.readable()?,
        "something can be read while the last replay is out"
    );
    kit.confirm(&m, &replay)?;
    let mut recovered = kit.answer_replays(&mut |_, _| None)?;
    ensure!(
        (recovered.report.replayed, recovered.report.confirmed) == (2, 2),
        "{:?}",
        recovered.report
    );
    recovered.replays.extend([root, replay]);
    kit.commit(&recovered)?;
    // Nobody drops caches again: that it goes now is the recovery's doing.
    kit.serve_until("FORGET of what only the recovery referred to", |kit| {
        Ok(kit.forgotten.iter().any(|f| f.nodeid == node))
    })?;
    let given_back: Vec<u64> = (kit.forgotten.iter())
        .filter(|f| f.nodeid == node)
        .map(|f| f.nlookup)
        .collect();
    ensure!(given_back == [count], "{given_back:?}, not [{count}]");
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// Every notification but POLL and RESTARTED, with what it answers when it is accepted.
fn others(kit: &Kit<'_>) -> Result<Vec<(&'static str, Result<(), Errno>)>> {
    let node = kit.tree.child(ROOT, "f0").context("f0")?;
    // Another file than the rest: its inode goes with its name.
    let entry = InvalEntryOut {
        parent: ROOT,
        namelen: 2,
        flags: 0,
    };
    let delete = DeleteOut {
        parent: ROOT,
        child: 4711,
        namelen: 2,
        padding: 0,
    };
    let store = StoreOut {
        nodeid: node,
        offset: 0,
        size: 4,
        padding: 0,
    };
    let retrieve = RetrieveOut {
        notify_unique: COOKIE_BIT | 77,
        nodeid: node,
        offset: 0,
        size: 0,
        padding: 0,
    };
    let prune = PruneOut {
        count: 1,
        ..Default::default()
    };
    let dev = &kit.dev;
    Ok(vec![
        (
            "INVAL_INODE",
            dev.notify(
                notify::INVAL_INODE,
                &InvalInodeOut {
                    ino: node,
                    off: 0,
                    len: 0,
                },
                &[],
            ),
        ),
        (
            "INVAL_ENTRY",
            dev.notify(notify::INVAL_ENTRY, &entry, b"f1\0"),
        ),
        ("DELETE", dev.notify(notify::DELETE, &delete, b"f9\0")),
        ("STORE", dev.notify(notify::STORE, &store, b"data")),
        ("RETRIEVE", dev.notify(notify::RETRIEVE, &retrieve, &[])),
        (
            "PRUNE",
            dev.notify(notify::PRUNE, &prune, 4711u64.as_bytes()),
        ),
        ("RESEND", dev.notify(notify::RESEND, &[0u8; 0], &[])),
        ("INC_EPOCH", dev.notify(notify::INC_EPOCH, &[0u8; 0], &[])),
    ])
}

fn notifications(env: &Env<'_>) -> Result<()> {
    for phase in PHASES {
        let mut kit = populated(env, 3)?;
        let left = enter(&mut kit, phase)?;
        for (what, said) in others(&kit)? {
            expect_errno(&format!("{what} in {phase:?}"), said, Errno::EBUSY)?;
        }
        let poll = kit.dev.notify(notify::POLL, &PollWakeupOut { kh: 99 }, &[]);
        ensure!(poll == Ok(()), "POLL in {phase:?} gave {poll:?}");
        leave(&mut kit, left.as_ref())?;
        kit.recover()?;
        // A READ that is owed has locked a page, for which INVAL_INODE waits.
        kit.settle()?;
        for (what, said) in others(&kit)? {
            ensure!(
                said != Err(Errno::EBUSY),
                "{what} is still EBUSY after COMMIT"
            );
            // DELETE and INVAL_ENTRY may not find their entry; everything else succeeds.
            let fine = said == Ok(())
                || (matches!(what, "DELETE" | "INVAL_ENTRY") && said == Err(Errno::ENOENT));
            ensure!(fine, "{what} after COMMIT gave {said:?}");
        }
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn interrupt(env: &Env<'_>) -> Result<()> {
    use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
    extern "C" fn nothing(_: i32) {}
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: the handler does nothing at all.
    unsafe { sigaction(Signal::SIGUSR1, &action) }?;
    let mut kit = populated(env, 2)?;
    let app = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    let old = kit.until_op(op::GETATTR)?;
    // SAFETY: tgkill takes plain numbers; the thread is alive, it waits for our answer.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_tgkill, libc::getpid(), app.tid, libc::SIGUSR1)
    })?;
    let m = kit.until_op(op::INTERRUPT)?;
    ensure!(
        kit.interrupts == [old.unique()],
        "INTERRUPT names {:x?}, the request is {:#x}",
        kit.interrupts,
        old.unique()
    );
    drop(m);
    let second = kit.on("stat", "f1", |p| ops::stat(p).map(drop))?;
    let old2 = kit.until_op(op::GETATTR)?;
    // SAFETY: as above. This INTERRUPT stays in the queue, unread, at the time of the crash.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_tgkill, libc::getpid(), second.tid, libc::SIGUSR1)
    })?;
    let ready = kit.dev.poll(nix::poll::PollFlags::POLLIN, kit.patience)?;
    ensure!(
        ready.contains(nix::poll::PollFlags::POLLIN),
        "no second INTERRUPT"
    );
    kit.interrupts.clear();
    kit.recover()?;
    ensure!(
        kit.interrupts.is_empty(),
        "an INTERRUPT was delivered during the recovery"
    );
    let wanted = [
        resent_id(old.unique(), kit.epoch),
        resent_id(old2.unique(), kit.epoch),
    ];
    for old in [&old, &old2] {
        let again = kit.next_request()?;
        expect_resent(&kit, old, &again)?;
        kit.answer(&again)?;
    }
    ensure!(
        (kit.serve(&app)?, kit.serve(&second)?) == (Ok(()), Ok(())),
        "an interrupted stat failed"
    );
    kit.settle()?;
    ensure!(
        kit.interrupts.iter().all(|id| wanted.contains(id)),
        "INTERRUPTs of old ids: {:x?}",
        kit.interrupts
    );
    still_serves(&mut kit)
}

fn nonblocking(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    queue_forget(&mut kit, "f1")?;
    let app = kit.parked("mkdir", "d", 1, ops::mkdir)?;
    let m = enter(&mut kit, Phase::Root)?.context("the root's replay")?;
    ensure!(
        !kit.readable()?,
        "poll says a held request or FORGET can be read"
    );
    kit.dev.set_nonblocking(true)?;
    let read = kit.dev.read_blocking()?;
    let empty = matches!(read, crate::raw::dev::Read1::Failed(Errno::EAGAIN));
    kit.dev.set_nonblocking(false)?;
    ensure!(
        empty,
        "a non-blocking read brought something while everything is held"
    );
    let replay = m.replay().context("replay")?;
    kit.confirm(&m, &replay)?;
    kit.recover()?;
    ensure!(kit.serve(&app)? == Ok(()), "mkdir");
    still_serves(&mut kit)
}

fn release(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let fd = open(&mut kit, "f0", OFlag::O_RDWR)?;
    kit.settle()?;
    enter(&mut kit, Phase::Said)?;
    let base = kit.conn.waiting()?;
    let app = kit.app("close", move || ops::close(fd))?;
    kit.conn.wait_waiting(base + 1, kit.patience)?;
    kit.recover()?;
    let flush = kit.next_request()?;
    ensure!(flush.is(op::FLUSH), "expected FLUSH, got {flush}");
    kit.answer(&flush)?;
    let release = kit.next_request()?;
    ensure!(release.is(op::RELEASE), "expected RELEASE, got {release}");
    kit.answer(&release)?;
    ensure!(kit.serve(&app)? == Ok(()), "close");
    still_serves(&mut kit)
}

fn adds_up(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 20)?;
    let mut totals = (0, 0, 0);
    for round in 1..=3u64 {
        let app = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
        let parked = kit.until_op(op::GETATTR)?;
        let victim = kit.tree.child(ROOT, &format!("f{}", round + 5));
        let recovered = kit.recover_with(&mut |_, r| {
            (Some(r.nodeid) == victim).then_some(crate::raw::tree::Answer::Err(libc::ESTALE))
        })?;
        expect_report(&recovered, 1)?;
        let again = kit.next_request()?;
        expect_resent(&kit, &parked, &again)?;
        kit.answer(&again)?;
        ensure!(kit.serve(&app)? == Ok(()), "stat");
        kit.wait_serving()?;
        let file = kit.conn.recovery()?.context("no `recovery` file")?;
        let report = recovered.report;
        for (key, value) in [
            ("epoch", u64::from(report.epoch)),
            ("replayed", report.replayed),
            ("confirmed", report.confirmed),
            ("revoked", report.revoked),
            ("held", report.held),
        ] {
            ensure!(
                file.get(key)? == value,
                "{key}: {} in the file, {value} in the report",
                file.get(key)?
            );
        }
        totals = (
            totals.0 + report.replayed,
            totals.1 + report.confirmed,
            totals.2 + report.revoked,
        );
        let sums = (
            file.get("total_replayed")?,
            file.get("total_confirmed")?,
            file.get("total_revoked")?,
        );
        ensure!(
            sums == totals,
            "the totals are {sums:?}, all reports together say {totals:?}"
        );
        ensure!(
            file.get("total_recoveries")? == round,
            "{} recoveries, not {round}",
            file.get("total_recoveries")?
        );
        ensure!(
            file.get("total_resent")? == round,
            "{} resent, not {round}",
            file.get("total_resent")?
        );
    }
    still_serves(&mut kit)
}
