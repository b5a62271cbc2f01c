// SPDX-License-Identifier: GPL-2.0
//! Replies that a dead server wrote and nobody had consumed: in every phase the counts come out right. Evictions, which
//! may also begin before and end after, are in `evictions`.

use anyhow::{bail, ensure, Context, Result};
use nix::fcntl::OFlag;

use super::help::{populated, readable, still_serves, Phase};
use super::Scenario;
use crate::raw::app::App;
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::msg::{Message, Replay};
use crate::raw::ops::{self, Done};
use crate::raw::recover::Recovered;
use crate::raw::trap::Trap;
use crate::raw::tree::Answer;
use crate::raw::wait::wait_for;
use crate::raw::wire::{op, Report, ROOT};

const DO_READDIRPLUS: u64 = 1 << 13;

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "late/lookup",
            "a LOOKUP consumed in any phase after its server died is asked again",
            lookup,
        ),
        Scenario::series(
            "late/stamp",
            "an answer is of the server that read the request, whoever serves when it is consumed",
            stamp,
        ),
        Scenario::series(
            "late/revalidate",
            "the same for a name that was cached",
            revalidate,
        ),
        Scenario::series(
            "late/create",
            "the same for MKDIR, CREATE, MKNOD, SYMLINK and LINK: what was made is found, and counted once",
            create,
        ),
        Scenario::series(
            "late/readdirplus",
            "the same for the entries of a listing",
            readdirplus,
        ),
        Scenario::series(
            "late/readdirplus-undone",
            "a count is only taken back from the server that has it",
            undone,
        ),
        Scenario::series(
            "late/attributes",
            "attributes that a dead server gave are not taken for those of the next",
            attributes,
        ),
        Scenario::series(
            "late/new-inode",
            "an inode that is being set up during the walk keeps nobody from anything",
            new_inode,
        ),
        Scenario::series(
            "late/new-inode-waiter",
            "who waits for an inode that its maker gives up gets another",
            new_inode_waiter,
        ),
    ]
}

/// When the reply is consumed.
#[derive(Clone, Copy, Debug)]
pub(super) enum When {
    /// In this phase, of a recovery that goes on.
    Same(Phase),
    /// In this phase, of a recovery that another RESTARTED ends.
    Again(Phase),
    /// When the server has committed, and nothing is revoked or sent yet.
    Release,
    /// When the next server serves.
    Serving,
}

pub(super) const WHEN: [When; 13] = [
    When::Same(Phase::Said),
    When::Same(Phase::Root),
    When::Same(Phase::Replay),
    When::Same(Phase::Prepared),
    When::Same(Phase::Reported),
    When::Again(Phase::Said),
    When::Again(Phase::Root),
    When::Again(Phase::Replay),
    When::Again(Phase::Prepared),
    When::Again(Phase::Reported),
    When::Again(Phase::Refused),
    When::Release,
    When::Serving,
];

/// Lets the application that stopped in `trap` go on when it is time, waits until it has consumed its answer, and
/// completes the recovery.
pub(super) fn consumed_in<T: Send + 'static>(
    kit: &mut Kit<'_>,
    app: &App<T>,
    trap: Trap,
    when: When,
) -> Result<()> {
    let (phase, goes_on) = match when {
        When::Same(phase) => (phase, true),
        When::Again(phase) => (phase, false),
        When::Release => return consumed_in_release(kit, app, trap),
        When::Serving => {
            kit.recover()?;
            trap.go();
            return Ok(());
        }
    };
    let mut under_way = UnderWay::come_to(kit, phase)?;
    consume(kit, app, trap)?;
    if goes_on {
        under_way.complete(kit)
    } else {
        under_way.confirm_left(kit)?;
        // What was consumed meanwhile must not have done anything.
        kit.recover().map(drop)
    }
}

/// Lets who has an answer go on with it. Then it is either through, or waits for what it asked then: that is held.
fn consume<T: Send + 'static>(kit: &Kit<'_>, app: &App<T>, trap: Trap) -> Result<()> {
    app.wait_asleep(kit.patience)?;
    let before = app.times_asleep()?;
    trap.go();
    wait_for("the answer to be consumed", kit.patience, || {
        Ok(app.done() || app.times_asleep()? > before)
    })
}

fn consumed_in_release<T: Send + 'static>(
    kit: &mut Kit<'_>,
    app: &App<T>,
    trap: Trap,
) -> Result<()> {
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    let release = Trap::arm_beside("release")?;
    kit.commit_epoch(recovered.report.epoch)
        .context("COMMIT was refused")?;
    kit.tree.adopt(&recovered.replays);
    release.wait(kit.patience)?;
    consume(kit, app, trap)?;
    release.go();
    kit.wait_serving()
}

/// A recovery that has come to some phase. The server's table is no guide to what is shown: it has what nobody consumed.
struct UnderWay {
    shown: Vec<Replay>,
    left: Option<Message>,
    report: Option<Report>,
}

impl UnderWay {
    fn come_to(kit: &mut Kit<'_>, phase: Phase) -> Result<UnderWay> {
        let mut this = UnderWay {
            shown: Vec::new(),
            left: None,
            report: None,
        };
        kit.restarted()?;
        match phase {
            Phase::Said => readable(kit, "the root's replay")?,
            Phase::Root => this.left = Some(kit.next_replay()?.0),
            Phase::Replay => {
                this.shown.push(kit.confirm_root()?);
                this.left = Some(kit.next_replay()?.0);
            }
            Phase::Prepared => {
                loop {
                    // In this order: what could be read before the state was another one is no report.
                    let ready = kit.readable()?;
                    let recovery = kit.conn.recovery()?.context("recovery file")?;
                    if recovery.state() == "prepared" {
                        break;
                    }
                    if ready {
                        let (m, replay) = kit.next_replay()?;
                        kit.confirm(&m, &replay)?;
                        this.shown.push(replay);
                    }
                }
                readable(kit, "the report")?;
            }
            Phase::Reported => this.go_to_report(kit)?,
            Phase::Refused => {
                enter_refused(kit)?;
            }
            Phase::Settle | Phase::SettleAnswer => bail!("nobody comes to {phase:?} here"),
        }
        Ok(this)
    }

    fn confirm_left(&mut self, kit: &mut Kit<'_>) -> Result<()> {
        if let Some(m) = self.left.take() {
            let replay = m.replay().context("a replay was left")?;
            kit.confirm(&m, &replay)?;
            self.shown.push(replay);
        }
        Ok(())
    }

    fn go_to_report(&mut self, kit: &mut Kit<'_>) -> Result<()> {
        while self.report.is_none() {
            let m = kit.next()?;
            match m.report(kit.cookie()) {
                Some(report) => self.report = Some(report),
                None => self.left = Some(m),
            }
            self.confirm_left(kit)?;
        }
        Ok(())
    }

    fn complete(mut self, kit: &mut Kit<'_>) -> Result<()> {
        self.confirm_left(kit)?;
        self.go_to_report(kit)?;
        let report = self.report.context("just read")?;
        kit.commit(&Recovered::of(self.shown, report))
    }
}

fn enter_refused(kit: &mut Kit<'_>) -> Result<()> {
    let (m, _) = kit.next_replay()?;
    kit.send(&m, &Answer::Err(libc::EIO))?;
    kit.conn.wait_state(&["refused"], kit.patience)
}

fn lookup(env: &Env<'_>) -> Result<()> {
    for phase in WHEN {
        for name in ["cold", "again"] {
            let mut kit = populated(env, 3)?;
            kit.tree.file(ROOT, "cold", b"");
            // A second name of an inode the kernel knows.
            let f1 = kit.tree.child(ROOT, "f1").context("f1")?;
            kit.tree.insert(ROOT, "again".as_ref(), f1);
            kit.tree.node_mut(f1).nlink += 1;
            let trap = Trap::arm("lookup_answered")?;
            let app = kit.on("stat", name, |p| ops::stat(p).map(drop))?;
            let m = kit.until_op(op::LOOKUP)?;
            kit.answer(&m)?;
            trap.wait(kit.patience)?;
            consumed_in(&mut kit, &app, trap, phase)
                .with_context(|| format!("{name}, {phase:?}"))?;
            let result = kit.serve(&app)?;
            ensure!(
                result == Ok(()),
                "stat of {name}, consumed in {phase:?}, gave {result:?}"
            );
            kit.check_counts()
                .with_context(|| format!("{name}, consumed in {phase:?}"))?;
            still_serves(&mut kit)?;
        }
    }
    Ok(())
}

/// A LOOKUP stopped before its stamp is taken.
fn stamp(env: &Env<'_>) -> Result<()> {
    for phase in WHEN {
        let mut kit = populated(env, 3)?;
        kit.tree.file(ROOT, "cold", b"");
        let trap = Trap::arm("stamp")?;
        let app = kit.on("stat", "cold", |p| ops::stat(p).map(drop))?;
        let m = kit.until_op(op::LOOKUP)?;
        kit.answer(&m)?;
        trap.wait(kit.patience)?;
        consumed_in(&mut kit, &app, trap, phase).with_context(|| format!("{phase:?}"))?;
        let result = kit.serve(&app)?;
        ensure!(
            result == Ok(()),
            "stat, consumed in {phase:?}, gave {result:?}"
        );
        kit.check_counts()
            .with_context(|| format!("consumed in {phase:?}"))?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn revalidate(env: &Env<'_>) -> Result<()> {
    for phase in WHEN {
        let mut kit = Kit::granted(env)?;
        kit.tree.entry_valid = 0;
        super::help::populate(&mut kit, 3)?;
        let trap = Trap::arm("revalidate_answered")?;
        let app = kit.on("stat", "f1", |p| ops::stat(p).map(drop))?;
        let m = kit.until_op(op::LOOKUP)?;
        kit.answer(&m)?;
        trap.wait(kit.patience)?;
        consumed_in(&mut kit, &app, trap, phase).with_context(|| format!("{phase:?}"))?;
        let result = kit.serve(&app)?;
        ensure!(
            result == Ok(()),
            "stat, consumed in {phase:?}, gave {result:?}"
        );
        kit.check_counts()
            .with_context(|| format!("consumed in {phase:?}"))?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn create(env: &Env<'_>) -> Result<()> {
    type Run = fn(&std::path::Path) -> Done<()>;
    let cases: [(u32, Run); 5] = [
        (op::MKDIR, |p| ops::mkdir(&p.join("new"))),
        (op::CREATE, |p| {
            ops::open(&p.join("new"), OFlag::O_CREAT | OFlag::O_RDWR).map(drop)
        }),
        (op::MKNOD, |p| {
            nix::unistd::mkfifo(&p.join("new"), nix::sys::stat::Mode::S_IRUSR)
        }),
        (op::SYMLINK, |p| ops::symlink("f0", &p.join("new"))),
        (op::LINK, |p| ops::link(&p.join("f0"), &p.join("new"))),
    ];
    for phase in WHEN {
        for (opcode, run) in cases {
            let mut kit = populated(env, 3)?;
            let trap = Trap::arm("create_answered")?;
            let app = kit.on(&op::name(opcode), "", run)?;
            let m = kit.until_op(opcode)?;
            kit.answer(&m)?;
            trap.wait(kit.patience)?;
            let what = format!("{}, consumed in {phase:?}", op::name(opcode));
            consumed_in(&mut kit, &app, trap, phase).with_context(|| what.clone())?;
            let result = kit.serve(&app)?;
            ensure!(result == Ok(()), "{what}, gave {result:?}");
            kit.check_counts().context(what)?;
            still_serves(&mut kit)?;
        }
    }
    Ok(())
}

fn listing<'a>(env: &'a Env<'a>) -> Result<(Kit<'a>, u64)> {
    let mut kit = Kit::granted_with(env, Config::with(DO_READDIRPLUS))?;
    let dir = kit.tree.dir(ROOT, "d");
    for i in 0..8 {
        kit.tree.file(dir, &format!("x{i}"), b"");
    }
    ensure!(kit.run_on("stat", "d/x3", ops::stat)?.is_ok(), "stat");
    Ok((kit, dir))
}

fn readdirplus(env: &Env<'_>) -> Result<()> {
    for phase in WHEN {
        let (mut kit, _) = listing(env)?;
        let trap = Trap::arm("plus_answered")?;
        let app = kit.on("list", "d", ops::listdir)?;
        let m = kit.until_op(op::READDIRPLUS)?;
        kit.answer(&m)?;
        trap.wait(kit.patience)?;
        consumed_in(&mut kit, &app, trap, phase).with_context(|| format!("{phase:?}"))?;
        let names = kit.serve(&app)?.context("listing d")?;
        ensure!(names.len() == 8, "{} names", names.len());
        kit.check_counts()
            .with_context(|| format!("consumed in {phase:?}"))?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

/// An entry that cannot be linked into the tree (a directory inside itself) is counted first and then given back.
fn undone(env: &Env<'_>) -> Result<()> {
    for phase in WHEN {
        let mut kit = Kit::granted_with(env, Config::with(DO_READDIRPLUS))?;
        let outer = kit.tree.dir(ROOT, "outer");
        let inner = kit.tree.dir(outer, "inner");
        ensure!(
            kit.run_on("stat", "outer/inner", ops::stat)?.is_ok(),
            "stat"
        );
        // The server lies: the outer directory is inside the inner one.
        kit.tree.insert(inner, "loop".as_ref(), outer);
        let trap = Trap::arm("plus_counted")?;
        let app = kit.on("list", "outer/inner", ops::listdir)?;
        let m = kit.until_op(op::READDIRPLUS)?;
        kit.answer(&m)?;
        trap.wait(kit.patience)?;
        consumed_in(&mut kit, &app, trap, phase).with_context(|| format!("{phase:?}"))?;
        let names = kit.serve(&app)?.context("listing")?;
        ensure!(names == ["loop"], "{names:?}");
        kit.check_counts()
            .with_context(|| format!("undone in {phase:?}"))?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn attributes(env: &Env<'_>) -> Result<()> {
    for phase in WHEN {
        let mut kit = populated(env, 2)?;
        let f0 = kit.tree.child(ROOT, "f0").context("f0")?;
        let fd = super::help::open(&mut kit, "f0", OFlag::O_RDONLY)?;
        let trap = Trap::arm("getattr_answered")?;
        let app = kit.app("fstat", move || ops::fstat(fd).map(|s| s.stx_size))?;
        let m = kit.until_op(op::GETATTR)?;
        let before = kit.tree.node(f0).data.len() as u64;
        kit.answer(&m)?;
        trap.wait(kit.patience)?;
        kit.tree.node_mut(f0).data = vec![0; 1000];
        consumed_in(&mut kit, &app, trap, phase).with_context(|| format!("{phase:?}"))?;
        let size = kit.serve(&app)?;
        ensure!(size == Ok(before), "the stat under way gave {size:?}");
        // By the descriptor: a name would be looked up again, which brings attributes.
        let now = kit.run("fstat", move || {
            nix::sys::stat::fstat(unsafe_fd(fd)).map(|s| s.st_size)
        })?;
        ensure!(
            now == Ok(1000),
            "a stat begun under the new server gave {now:?}: what a dead server said, consumed in {phase:?}"
        );
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn unsafe_fd(fd: std::os::fd::RawFd) -> std::os::fd::BorrowedFd<'static> {
    // SAFETY: the kit's descriptors are never closed by themselves.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }
}

fn new_inode(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    kit.tree.file(ROOT, "cold", b"");
    let trap = Trap::arm("iget_new")?;
    let app = kit.on("stat", "cold", |p| ops::stat(p).map(drop))?;
    let m = kit.until_op(op::LOOKUP)?;
    kit.answer(&m)?;
    trap.wait(kit.patience)?;
    // New inodes are at the head of the list: the walk comes to this one first.
    kit.restarted()?;
    kit.confirm_root()?;
    trap.go();
    kit.recover()?;
    ensure!(kit.serve(&app)? == Ok(()), "stat of the new file");
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn new_inode_waiter(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let cold = kit.tree.file(ROOT, "cold", b"");
    kit.tree.insert(ROOT, "alias".as_ref(), cold);
    let answered = Trap::arm("lookup_answered")?;
    let maker = kit.on("stat", "cold", |p| ops::stat(p).map(drop))?;
    let m = kit.until_op(op::LOOKUP)?;
    kit.answer(&m)?;
    answered.wait(kit.patience)?;
    kit.recover()?;
    // It consumes what the dead server said, and comes as far as to a new inode that is not counted.
    let trap = answered.then("iget_new")?;
    trap.wait(kit.patience)?;
    // By another name, or it would wait for the name already.
    let waiter = kit.on("stat", "alias", |p| ops::stat(p).map(drop))?;
    let m = kit.until("the second lookup", |m| m.is_named(op::LOOKUP, "alias"))?;
    kit.answer(&m)?;
    waiter.wait_asleep(kit.patience)?;
    trap.go();
    let results = (kit.serve(&maker)?, kit.serve(&waiter)?);
    ensure!(results == (Ok(()), Ok(())), "{results:?}");
    kit.check_counts()?;
    still_serves(&mut kit)
}
