// SPDX-License-Identifier: GPL-2.0
//! One case, from the mount to the oracle.

use std::path::Path;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags};
use nix::mount::{umount2, MntFlags};
use nix::sys::signal::Signal;

use super::script::{End, Mode, Op, Script};
use super::server::{sums, Server};
use super::shared::Shared;
use super::{apps, rival};
use crate::raw::app::Proc;
use crate::raw::dev::{Device, Read1};
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::ops::{self, Done};
use crate::raw::wait::wait_for;
use crate::raw::wire::{init, ROOT};

pub fn run(env: &Env<'_>, script: &Script, seed: u64, shared: &'static Shared) -> Result<()> {
    if script.mode == Mode::Hostile {
        // Its tree may contradict itself, which is caught, and of no interest.
        std::panic::set_hook(Box::new(|_| {}));
    }
    let mut kit = mount(env, script)?;
    let story = story(&mut kit, script, seed, shared);
    // Before anything else is torn down, so that nobody is left to begin something new.
    shared.stop();
    story
}

fn mount<'a>(env: &'a Env<'a>, script: &Script) -> Result<Kit<'a>> {
    let mut flags = init::POSIX_LOCKS;
    if script.writeback {
        flags |= init::WRITEBACK_CACHE;
    }
    if script.readdirplus {
        flags |= init::DO_READDIRPLUS | init::READDIRPLUS_AUTO;
    }
    let config = Config {
        max_background: script.max_background,
        ..Config::with(flags)
    };
    let mut kit = Kit::granted_with(env, config)?;
    kit.tree.entry_valid = if script.cached_names { 3600 } else { 0 };
    kit.tree.attr_valid = kit.tree.entry_valid;
    for n in 0..6 {
        kit.tree.file(ROOT, &format!("f{n}"), b"shared by all");
    }
    Ok(kit)
}

fn story(kit: &mut Kit<'_>, script: &Script, seed: u64, shared: &'static Shared) -> Result<()> {
    let mnt = kit.mnt.clone();
    // The rival first: it must not inherit what applications have open.
    let mut rival = match script.rival.as_slice() {
        [] => None,
        ops => Some(rival::start(kit, ops, seed, shared)?),
    };
    let mut server = Server::new(kit, script.mode, seed, shared);
    server.rivalled = rival.is_some();
    let mut running = Vec::new();
    for index in 0..script.apps.len() {
        running.push(Some(start(index, script, &mnt, &server, shared)?));
    }
    for (step, op) in script.server.iter().enumerate() {
        let done = match *op {
            Op::Kill(which) => signal(&running, which, Signal::SIGKILL),
            Op::Signal(which) => signal(&running, which, Signal::SIGURG),
            Op::Spawn(which) => respawn(&mut running, which, script, &mnt, &server, shared),
            op => server.step(op),
        };
        done.with_context(|| format!("step {step}, {op:?}"))?;
        unharmed(script, shared).with_context(|| format!("seen after step {step}, {op:?}"))?;
    }
    if let Some(rival) = &mut rival {
        rival.signal(Signal::SIGKILL)?;
        rival.wait(server.kit.patience).context("the rival")?;
    }
    server.reform()?;
    server.look()?;
    match script.end {
        End::TakeOver => {
            server.take_over().context("the good server")?;
            shared.stop();
            server.serve_until("the end of the applications", || all_ended(&running))?;
            reap(&mut running, script, server.kit.patience)?;
            unharmed(script, shared)?;
            drop(server);
            works(kit, script)
        }
        End::Detach => {
            umount2(&mnt, MntFlags::MNT_DETACH).context("umount -l")?;
            server.kit.was_unmounted();
            server.ending = true;
            if !all_ended(&running)? && server.kit.conn.exists() {
                match server.take_over() {
                    // Its last user is gone since: nothing is recovered any more, and nobody minds.
                    Err(_) if unmounted(&server, &running)? => {}
                    done => done.context("the good server of a detached mount")?,
                }
            }
            shared.stop();
            server.serve_until("the end of the applications", || all_ended(&running))?;
            reap(&mut running, script, server.kit.patience)?;
            unharmed(script, shared)?;
            drop(server);
            drop(running);
            gone(kit)
        }
        End::Abort => {
            server.kit.conn.abort()?;
            shared.stop();
            let patience = server.kit.patience;
            all_end(&running, patience).context("after abort")?;
            reap(&mut running, script, patience)
        }
        End::Close => {
            umount2(&mnt, MntFlags::MNT_DETACH).context("umount -l")?;
            server.kit.was_unmounted();
            server.kit.dev = Device::open("/dev/null")?;
            shared.stop();
            let patience = server.kit.patience;
            all_end(&running, patience).context("after the last descriptor was closed")?;
            reap(&mut running, script, patience)
        }
    }
}

fn start(
    index: usize,
    script: &Script,
    mnt: &Path,
    server: &Server<'_, '_>,
    shared: &'static Shared,
) -> Result<Proc> {
    apps::start(
        index,
        &script.apps[index],
        mnt,
        &server.descriptors(),
        script.mode,
        shared,
    )
}

fn signal(running: &[Option<Proc>], which: u8, signal: Signal) -> Result<()> {
    match &running[usize::from(which) % running.len()] {
        Some(app) if !app.ended()? => app.signal(signal),
        _ => Ok(()),
    }
}

fn respawn(
    running: &mut [Option<Proc>],
    which: u8,
    script: &Script,
    mnt: &Path,
    server: &Server<'_, '_>,
    shared: &'static Shared,
) -> Result<()> {
    let index = usize::from(which) % running.len();
    let ended = running[index]
        .as_ref()
        .is_none_or(|app| app.ended().unwrap_or(false));
    if ended {
        drop(running[index].take());
        running[index] = Some(start(index, script, mnt, server, shared)?);
    }
    Ok(())
}

fn all_ended(running: &[Option<Proc>]) -> Result<bool> {
    for app in running.iter().flatten() {
        if !app.ended()? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a detached mount goes, soon, with the last of its users.
fn unmounted(server: &Server<'_, '_>, running: &[Option<Proc>]) -> Result<bool> {
    let patience = server.kit.patience;
    let gone = wait_for("an unmount", patience, || {
        Ok(all_ended(running)? && !server.kit.conn.exists())
    });
    Ok(gone.is_ok())
}

/// Nobody may be stuck: not one task, however it is asked to end.
fn all_end(running: &[Option<Proc>], patience: Duration) -> Result<()> {
    wait_for("the applications to end", patience, || all_ended(running)).with_context(|| {
        let stuck = running
            .iter()
            .flatten()
            .filter(|app| !app.ended().unwrap_or(true));
        let stuck: Vec<String> = stuck
            .map(|app| crate::raw::app::describe(app.tid()))
            .collect();
        stuck.join("\n  ")
    })
}

/// Takes the exit codes. A fault at a mapping is an application's due only where inodes are revoked.
fn reap(running: &mut [Option<Proc>], script: &Script, patience: Duration) -> Result<()> {
    use nix::sys::wait::WaitStatus;
    for app in running.iter_mut().flatten() {
        let status = app.wait(patience)?;
        match status {
            WaitStatus::Exited(_, 0) | WaitStatus::Signaled(_, Signal::SIGKILL, _) => {}
            WaitStatus::Signaled(_, Signal::SIGBUS, _)
                if script.mode == Mode::Hostile || script.end != End::TakeOver => {}
            other => bail!("{} ended with {other:?}", app.what),
        }
    }
    Ok(())
}

/// No application of an honest server has seen what must not be. After an abort anything may be.
fn unharmed(script: &Script, shared: &Shared) -> Result<()> {
    match shared.wrong() {
        Some((app, step, errno)) if script.mode == Mode::Honest => {
            let op = script.apps[app].ops.get(step);
            let what = match errno {
                0 => "wrong data, or a change made twice".to_owned(),
                n => Errno::from_raw(n).to_string(),
            };
            bail!("application {app} got {what} from its operation {step} ({op:?}; backwards for its twin)")
        }
        _ => Ok(()),
    }
}

/// A fixed workload gives what it should, and the counts of both sides are equal.
fn works(kit: &mut Kit<'_>, script: &Script) -> Result<()> {
    let base = kit.path("work");
    let result = kit.run("the fixed workload", move || workload(&base))?;
    if let Err(why) = result {
        bail!("the fixed workload: {why}");
    }
    // An inode that was revoked because of a lie keeps its lookups until it is evicted, and is not replayed. To evict
    // it takes a look at it for each reference to its age, so more than one.
    let rounds = match script.mode {
        Mode::Hostile => 5,
        Mode::Honest => 0,
    };
    let mut counts = kit.check_counts();
    for _ in 0..rounds {
        if counts.is_ok() {
            break;
        }
        kit.run("drop_caches", || {
            std::fs::write("/proc/sys/vm/drop_caches", "2")
        })??;
        kit.settle()?;
        counts = kit.check_counts();
    }
    counts.context("counts after the good server took over")?;
    sums(kit)
}

fn workload(base: &Path) -> Result<(), String> {
    let name = |n: usize| base.join(format!("file{n}"));
    let data = |n: usize| vec![n as u8 ^ 0x5c; 1000 * n + 1];
    let step = |what: &str, n: usize, done: Done<bool>| match done {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!("{what} {n} gave something else")),
        Err(e) => Err(format!("{what} {n}: {e}")),
    };
    let yes = |()| true;
    step("mkdir", 0, ops::mkdir(base).map(yes))?;
    for n in 0..8 {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT;
        let made = ops::open(&name(n), flags).and_then(|fd| {
            let wrote = ops::pwrite(fd, &data(n), 0).map(|len| len == data(n).len());
            ops::close(fd).and(wrote)
        });
        step("create and write", n, made)?;
    }
    for n in 0..8 {
        step(
            "read",
            n,
            ops::read_file(&name(n)).map(|read| read == data(n)),
        )?;
    }
    let renamed = ops::rename(&name(0), &name(1), RenameFlags::empty());
    step("rename", 0, renamed.map(yes))?;
    step("unlink", 2, ops::unlink(&name(2)).map(yes))?;
    let left: Vec<String> = [1, 3, 4, 5, 6, 7].map(|n| format!("file{n}")).into();
    let listed = ops::listdir(base).map(|mut names| {
        names.sort();
        names == left
    });
    step("list", 0, listed)?;
    step(
        "read",
        1,
        ops::read_file(&name(1)).map(|read| read == data(0)),
    )?;
    let removed = matches!(ops::stat(&name(2)), Err(Errno::ENOENT));
    step("stat of the removed", 2, Ok(removed))
}

/// The last user of a detached mount is gone, so it is unmounted; the server sees that.
fn gone(kit: &mut Kit<'_>) -> Result<()> {
    let patience = kit.patience;
    wait_for("a detached mount to go", patience, || loop {
        match kit.dev.read(Duration::ZERO)? {
            Read1::Failed(Errno::ENODEV) => return Ok(true),
            Read1::Failed(e) => bail!("reading the device failed: {e}"),
            Read1::Nothing => return Ok(false),
            Read1::Message(m) if m.wants_no_reply() => {}
            Read1::Message(m) => {
                let answer = kit.tree.apply(&m)?;
                let _ = kit.send(&m, &answer);
            }
        }
    })
}
