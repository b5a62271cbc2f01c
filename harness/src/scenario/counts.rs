// SPDX-License-Identifier: GPL-2.0
//! Lookup counts: whatever crashed when, kernel and server agree at quiescence, to the last reference.

use std::collections::HashMap;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags};
use nix::sched::{sched_setaffinity, CpuSet};
use nix::unistd::Pid;

use super::help::{expect_resent, populated, still_serves};
use super::Scenario;
use crate::raw::answer::is_entry_reply;
use crate::raw::app::App;
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::ops::{self, Done};
use crate::raw::tree::Answer;
use crate::raw::wait::Rng;
use crate::raw::wire::{op, original_id, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "counts/quiet",
            "two recoveries in a row show the same",
            quiet,
        ),
        Scenario::series(
            "counts/drop-caches",
            "FORGETs after a recovery fit the counts it showed",
            drop_caches,
        ),
        Scenario::series(
            "counts/late-lookup",
            "a LOOKUP answered, but not consumed before RESTARTED, is not counted",
            late_lookup,
        ),
        Scenario::series(
            "counts/late-create",
            "the same for a CREATE, whose inode nobody was shown",
            late_create,
        ),
        Scenario::series(
            "counts/resent-lookup",
            "a LOOKUP sent again counts once",
            resent_lookup,
        ),
        Scenario::series(
            "counts/readdirplus",
            "entries of READDIRPLUS count, answered before or after",
            readdirplus,
        ),
        Scenario::series(
            "counts/killed-lookup",
            "the LOOKUP of a killed application counts for nobody",
            killed_lookup,
        ),
        Scenario::series("counts/random-0", "random work, random crashes", |env| {
            random(env, 0)
        }),
        Scenario::series("counts/random-1", "random work, random crashes", |env| {
            random(env, 1)
        }),
        Scenario::series("counts/random-2", "random work, random crashes", |env| {
            random(env, 2)
        }),
        Scenario::series("counts/random-3", "random work, random crashes", |env| {
            random(env, 3)
        }),
    ]
}

fn quiet(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 20)?;
    let first = kit.check_counts()?.shown();
    let second = kit.check_counts()?.shown();
    ensure!(
        first == second,
        "{first:?} became {second:?} though nothing happened"
    );
    still_serves(&mut kit)
}

fn drop_caches(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 50)?;
    kit.recover()?;
    std::fs::write("/proc/sys/vm/drop_caches", "2").context("drop_caches")?;
    kit.settle()?;
    ensure!(
        !kit.forgotten.is_empty(),
        "nothing was evicted: this scenario shows nothing"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// Runs `write_reply` and RESTARTED so that the application cannot consume the reply in between: both sit on one
/// processor, and the server's thread has a real-time priority.
fn before_the_application_runs<T>(
    kit: &mut Kit<'_>,
    tid: i32,
    both: impl FnOnce(&mut Kit<'_>) -> Result<T>,
) -> Result<T> {
    let mut cpu = CpuSet::new();
    cpu.set(0)?;
    sched_setaffinity(Pid::from_raw(tid), &cpu).context("sched_setaffinity of the application")?;
    sched_setaffinity(Pid::from_raw(0), &cpu).context("sched_setaffinity")?;
    let policy = |policy: i32, priority: i32| {
        let param = libc::sched_param {
            sched_priority: priority,
        };
        // SAFETY: the parameter lives until the call returns; 0 is this thread.
        Errno::result(unsafe { libc::sched_setscheduler(0, policy, &param) })
    };
    policy(libc::SCHED_FIFO, 50).context("SCHED_FIFO")?;
    let result = both(kit);
    policy(libc::SCHED_OTHER, 0).context("SCHED_OTHER")?;
    result
}

fn late_lookup(env: &Env<'_>) -> Result<()> {
    for warm in [false, true] {
        let mut kit = populated(env, 3)?;
        let name = if warm { "f1" } else { "cold" };
        kit.tree.file(ROOT, "cold", b"");
        let second = kit.path("f1b");
        let first = kit.path("f1");
        if warm {
            // A second name for a known inode: the reply would raise a count that is being replayed.
            ensure!(
                kit.run("link", move || ops::link(&first, &second))? == Ok(()),
                "link"
            );
            std::fs::write("/proc/sys/vm/drop_caches", "2").context("drop_caches")?;
            kit.settle()?;
        }
        let app = kit.on("stat", name, |p| ops::stat(p).map(drop))?;
        let m = kit.until_op(op::LOOKUP)?;
        before_the_application_runs(&mut kit, app.tid, |kit| {
            kit.answer(&m)?;
            kit.restarted()
        })?;
        let recovered = kit.answer_replays(&mut |_, _| None)?;
        kit.commit(&recovered)?;
        let result = kit.serve(&app)?;
        ensure!(
            result == Ok(()),
            "stat of {name}, whose lookup was answered by the dead server, gave {result:?}"
        );
        kit.check_counts()
            .with_context(|| format!("after a late answer to the lookup of {name}"))?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn late_create(env: &Env<'_>) -> Result<()> {
    for opcode in [op::CREATE, op::MKDIR] {
        let mut kit = populated(env, 3)?;
        let app = kit.on("create", "new", move |p| {
            if opcode == op::MKDIR {
                ops::mkdir(p)
            } else {
                ops::open(p, OFlag::O_CREAT | OFlag::O_RDWR).map(drop)
            }
        })?;
        let m = kit.until_op(opcode)?;
        before_the_application_runs(&mut kit, app.tid, |kit| {
            kit.answer(&m)?;
            kit.restarted()
        })?;
        let recovered = kit.answer_replays(&mut |_, _| None)?;
        kit.commit(&recovered)?;
        // The new node has no count after COMMIT; its creator must show it, or look it up again.
        let node = kit
            .tree
            .child(ROOT, "new")
            .context("the node exists on the server")?;
        let shown = recovered.replays.iter().any(|r| r.nodeid == node);
        kit.serve_until("the end of the create", |_| Ok(app.done()))
            .map_err(|e| match shown {
                true => e,
                false => e.context("its inode was not shown during the recovery"),
            })?;
        let result = app.take().context("the result")?;
        ensure!(
            result == Ok(()),
            "{}, answered by the dead server, gave {result:?}",
            op::name(opcode)
        );
        kit.settle()?;
        let stat = kit.run_on("stat", "new", |p| ops::stat(p).map(drop))?;
        ensure!(stat == Ok(()), "stat of what was created gave {stat:?}");
        kit.check_counts()?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn resent_lookup(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    kit.tree.file(ROOT, "cold", b"");
    let app = kit.on("stat", "cold", |p| ops::stat(p).map(drop))?;
    let old = kit.until_op(op::LOOKUP)?;
    // The dead server had counted it already, and died before it wrote the answer.
    kit.tree.apply(&old)?;
    kit.recover()?;
    let again = kit.next_request()?;
    expect_resent(&kit, &old, &again)?;
    kit.answer(&again)?;
    ensure!(kit.serve(&app)? == Ok(()), "stat");
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn readdirplus(env: &Env<'_>) -> Result<()> {
    const DO_READDIRPLUS: u64 = 1 << 13;
    for late in [false, true] {
        let mut kit = Kit::granted_with(env, crate::raw::kit::Config::with(DO_READDIRPLUS))?;
        let dir = kit.tree.dir(ROOT, "d");
        for i in 0..20 {
            kit.tree.file(dir, &format!("x{i}"), b"");
        }
        ensure!(kit.run_on("stat", "d/x3", ops::stat)?.is_ok(), "stat");
        let app = kit.on("list", "d", ops::listdir)?;
        let m = kit.until_op(op::READDIRPLUS)?;
        if late {
            before_the_application_runs(&mut kit, app.tid, |kit| {
                kit.answer(&m)?;
                kit.restarted()
            })?;
            let recovered = kit.answer_replays(&mut |_, _| None)?;
            kit.commit(&recovered)?;
        } else {
            kit.recover()?;
            let again = kit.next_request()?;
            expect_resent(&kit, &m, &again)?;
            kit.answer(&again)?;
        }
        let names = kit.serve(&app)?.context("listing d")?;
        ensure!(names.len() == 20, "{} names: {names:?}", names.len());
        kit.check_counts()
            .with_context(|| format!("late: {late}"))?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn killed_lookup(env: &Env<'_>) -> Result<()> {
    use nix::sys::signal::Signal;
    let mut kit = populated(env, 2)?;
    kit.tree.file(ROOT, "cold", b"");
    let path = kit.path("cold");
    let mut app = crate::raw::app::Proc::spawn("stat cold", &[kit.dev.raw()], || {
        i32::from(ops::stat(&path).is_err())
    })?;
    kit.until_op(op::LOOKUP)?;
    app.wait_asleep(kit.patience)?;
    kit.restarted()?;
    app.signal(Signal::SIGKILL)?;
    app.wait(kit.patience)?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    kit.commit(&recovered)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// One application: operations in a directory of its own, whose outcome is known without a crash.
fn workload(dir: std::path::PathBuf, seed: u64, rounds: usize) -> Result<(), String> {
    let mut rng = Rng(seed);
    let fail = |what: String, e: Errno| format!("{what}: {e}");
    ops::mkdir(&dir).map_err(|e| fail(format!("mkdir {}", dir.display()), e))?;
    for i in 0..rounds {
        let file = dir.join(format!("file{}", rng.below(3)));
        let data = format!("{seed} {i}");
        let step = || -> Done<()> {
            let fd = ops::open(&file, OFlag::O_CREAT | OFlag::O_RDWR)?;
            ops::pwrite(fd, data.as_bytes(), 0)?;
            let back = ops::pread(fd, data.len(), 0)?;
            if back != data.as_bytes() {
                return Err(Errno::EUCLEAN);
            }
            ops::close(fd)?;
            ops::stat(&file).map(drop)
        };
        step().map_err(|e| fail(format!("round {i} on {}", file.display()), e))?;
        match rng.below(4) {
            0 => ops::unlink(&file).map_err(|e| fail(format!("unlink in round {i}"), e))?,
            1 => {
                let to = dir.join("moved");
                ops::rename(&file, &to, RenameFlags::empty())
                    .map_err(|e| fail(format!("rename in round {i}"), e))?;
            }
            2 => {
                let second = dir.join(format!("link{i}"));
                ops::link(&file, &second).map_err(|e| fail(format!("link in round {i}"), e))?;
            }
            _ => {
                let sub = dir.join(format!("sub{i}"));
                ops::mkdir(&sub).map_err(|e| fail(format!("mkdir in round {i}"), e))?;
                ops::rmdir(&sub).map_err(|e| fail(format!("rmdir in round {i}"), e))?;
            }
        }
    }
    Ok(())
}

/// Applications at work; the server executes requests and dies at random, sometimes between doing and answering.
fn random(env: &Env<'_>, salt: u64) -> Result<()> {
    let mut rng = Rng(env.seed.wrapping_add(salt));
    let mut kit = populated(env, 4)?;
    kit.patience *= 3;
    let mut apps: Vec<App<Result<(), String>>> = Vec::new();
    for i in 0..4u64 {
        let dir = kit.path(&format!("work{i}"));
        let seed = rng.next();
        apps.push(kit.app(&format!("workload {i}"), move || workload(dir, seed, 25))?);
    }
    // What was executed and not answered, by original id: a server's journal.
    let mut journal: HashMap<u64, Answer> = HashMap::new();
    let mut crashes = 0;
    let deadline = std::time::Instant::now() + kit.patience;
    while !apps.iter().all(App::done) {
        ensure!(
            std::time::Instant::now() < deadline,
            "the workload does not end{}",
            kit.situation()
        );
        if !kit
            .dev
            .poll(
                nix::poll::PollFlags::POLLIN,
                std::time::Duration::from_millis(20),
            )?
            .contains(nix::poll::PollFlags::POLLIN)
        {
            continue;
        }
        let m = kit.next()?;
        if m.wants_no_reply() {
            continue;
        }
        let answer = match journal.remove(&original_id(m.unique())) {
            // Executed by a predecessor: the same outcome, and one more lookup, for COMMIT has wiped the count.
            Some(Answer::Ok(bytes)) if is_entry_reply(m.opcode()) => {
                let node = u64::from_ne_bytes(bytes[..8].try_into()?);
                kit.tree.node_mut(node).nlookup += 1;
                Answer::Ok(bytes)
            }
            Some(answer) => answer,
            None => kit.tree.apply(&m)?,
        };
        match rng.below(25) {
            0 => {
                journal.insert(original_id(m.unique()), answer);
                crashes += 1;
                for _ in 0..rng.below(3) {
                    kit.restarted()?;
                    for _ in 0..rng.below(4) {
                        let (m, replay) = kit.next_replay()?;
                        kit.confirm(&m, &replay)?;
                    }
                }
                keep_journalled(&mut kit, &journal)?;
            }
            _ => kit.send(&m, &answer)?,
        }
    }
    for app in &apps {
        if let Err(e) = app.take().context("a result")? {
            anyhow::bail!("{} after {crashes} crashes: {e}", app.what);
        }
    }
    ensure!(
        crashes > 0,
        "the server never crashed: this run shows nothing"
    );
    kit.check_counts()
        .with_context(|| format!("after {crashes} crashes"))?;
    still_serves(&mut kit)
}

/// A recovery that keeps the nodes a journalled answer names, whatever their count is.
fn keep_journalled(kit: &mut Kit<'_>, journal: &HashMap<u64, Answer>) -> Result<()> {
    let before = kit.tree.nodes.clone();
    kit.recover()?;
    for answer in journal.values() {
        if let Answer::Ok(bytes) = answer {
            let Some(Ok(id)) = bytes.get(..8).map(|b| b.try_into().map(u64::from_ne_bytes)) else {
                continue;
            };
            if let Some(node) = before.get(&id) {
                kit.tree.nodes.entry(id).or_insert_with(|| {
                    let mut node = node.clone();
                    node.nlookup = 0;
                    node
                });
            }
        }
    }
    Ok(())
}
