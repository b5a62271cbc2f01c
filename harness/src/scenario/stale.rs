// SPDX-License-Identifier: GPL-2.0
//! Nothing stale is served after a recovery: names, listings, links, attributes, ACLs, what is known of privileges.
//!
//! Each scenario caches something without limit, changes it while there is no server, and asks again. Cached file
//! data is in [`super::stale_data`].

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use anyhow::{ensure, Context, Result};
use libc::{S_IFDIR, S_IFREG};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::{sched_setaffinity, CpuSet};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use super::help::{expect_errno, open, populate, still_serves};
use super::lost::{as_user, drop_node, node, Staged};
use super::Scenario;
use crate::raw::env::{skip, Env};
use crate::raw::kit::{Config, Kit};
use crate::raw::ops;
use crate::raw::rare;
use crate::raw::recover::Recovered;
use crate::raw::trap::Trap;
use crate::raw::wire::{fopen, init, op, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "stale/names-for-ever",
            "names that were valid for ever, existing or not, are asked for again",
            names,
        ),
        Scenario::series(
            "stale/readdirplus",
            "names that a listing brought along are asked for again",
            readdirplus,
        ),
        Scenario::series(
            "stale/dir-stream",
            "an open directory stream does not go on with a listing from before",
            dir_stream,
        ),
        Scenario::series("stale/symlink", "a cached link is read again", symlink),
        Scenario::series(
            "stale/mode",
            "permissions that the kernel checks are those of the new server",
            |env| mode(env, true),
        ),
        Scenario::series(
            "stale/mode-of-root",
            "also for the root, which is never looked up",
            |env| mode(env, false),
        ),
        Scenario::series("stale/acl", "a cached ACL is asked for again", acl),
        Scenario::series(
            "stale/capability",
            "a file that got capabilities meanwhile loses them when it is written to",
            capability,
        ),
        Scenario::series(
            "stale/late-getattr",
            "attributes of the dead server, consumed late, are not kept",
            |env| late(env, false),
        ),
        Scenario::series(
            "stale/late-setattr",
            "attributes of the dead server after a change, consumed late, are not kept",
            |env| late(env, true),
        ),
    ]
}

/// A recovery before which the files were changed, while there was no server.
///
/// What is stale is dropped in the background, too: where there are traps not before the one that is returned is gone,
/// so that nobody gets old data however late that is.
pub(super) fn changed_meanwhile_late(
    kit: &mut Kit<'_>,
    change: impl FnOnce(&mut Kit<'_>),
) -> Result<Option<Trap>> {
    kit.settle()?;
    let trap = Trap::arm_if_any("teardown")?;
    changed_meanwhile(kit, change)?;
    if let Some(trap) = &trap {
        trap.wait(kit.patience)?;
    }
    Ok(trap)
}

/// A recovery before which the files were changed, while there was no server.
pub(super) fn changed_meanwhile(
    kit: &mut Kit<'_>,
    change: impl FnOnce(&mut Kit<'_>),
) -> Result<Recovered> {
    kit.settle()?;
    kit.restarted()?;
    change(kit);
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    kit.commit(&recovered)?;
    kit.served.clear();
    Ok(recovered)
}

fn names(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted(env)?;
    kit.tree.entry_valid = u64::MAX;
    kit.tree.attr_valid = u64::MAX;
    kit.tree.cache_negative = true;
    populate(&mut kit, 2)?;
    for _ in 0..2 {
        kit.served.clear();
        let ghost = kit.run_on("stat", "ghost", |p| ops::stat_cached(p).map(drop))?;
        expect_errno("stat of a missing file", ghost, Errno::ENOENT)?;
        let f0 = kit.run_on("stat", "f0", ops::stat_cached)?;
        ensure!(f0.is_ok(), "stat f0 gave {:?}", f0.err());
    }
    ensure!(
        kit.served.is_empty(),
        "nothing was cached: {:?}",
        kit.served
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
    );
    changed_meanwhile(&mut kit, |kit| {
        kit.tree.file(ROOT, "ghost", b"boo");
        let old = kit.tree.child(ROOT, "f1").expect("populated");
        kit.tree.file(ROOT, "f1", b"another one");
        // Alive as an inode without a name; the kernel holds it.
        kit.tree.node_mut(old).nlink = 0;
        let gone = kit.tree.child(ROOT, "f0").expect("populated");
        kit.tree
            .node_mut(ROOT)
            .children
            .remove(std::ffi::OsStr::new("f0"));
        kit.tree.node_mut(gone).nlink = 0;
    })?;
    let ghost = kit.run_on("read", "ghost", ops::read_file)?;
    ensure!(ghost == Ok(b"boo".to_vec()), "ghost reads {ghost:?}");
    let f1 = kit.run_on("read", "f1", ops::read_file)?;
    ensure!(f1 == Ok(b"another one".to_vec()), "f1 reads {f1:?}");
    let f0 = kit.run_on("stat", "f0", |p| ops::stat_cached(p).map(drop))?;
    expect_errno("stat of the removed f0", f0, Errno::ENOENT)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn readdirplus(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted_with(env, Config::with(init::DO_READDIRPLUS))?;
    let dir = kit.tree.dir(ROOT, "d");
    let old = kit.tree.file(dir, "x", b"the old one");
    kit.run_on("list", "d", ops::listdir)?.context("list")?;
    kit.served.clear();
    kit.run_on("stat", "d/x", ops::stat_cached)?
        .context("stat")?;
    ensure!(
        !kit.served.iter().any(|m| m.is_named(op::LOOKUP, "x")),
        "the listing did not bring the name along"
    );
    changed_meanwhile(&mut kit, |kit| {
        kit.tree.file(dir, "x", b"the new one");
        kit.tree.node_mut(old).nlink = 0;
    })?;
    let read = kit.run_on("read", "d/x", ops::read_file)?;
    ensure!(read == Ok(b"the new one".to_vec()), "d/x reads {read:?}");
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn dir_stream(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted(env)?;
    kit.tree.open_flags = fopen::KEEP_CACHE | fopen::CACHE_DIR;
    let dir = kit.tree.dir(ROOT, "d");
    let name = |i: u32| format!("entry-number-{i:03}");
    for i in 0..100 {
        kit.tree.file(dir, &name(i), b"");
    }
    kit.run_on("list", "d", ops::listdir)?.context("list")?;
    let fd = open(&mut kit, "d", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    kit.served.clear();
    let mut names = kit.run("getdents", move || rare::getdents(fd, 512))??;
    ensure!(
        kit.served.is_empty() && (1..60).contains(&names.len()),
        "{} names, by {} requests: the listing is not cached",
        names.len(),
        kit.served.len()
    );
    changed_meanwhile(&mut kit, |kit| {
        for i in 60..100 {
            let gone = kit.tree.child(dir, &name(i)).expect("made above");
            drop_node(kit, gone);
        }
    })?;
    loop {
        let more = kit.run("getdents", move || rare::getdents(fd, 512))??;
        if more.is_empty() {
            break;
        }
        names.extend(more);
    }
    let wanted: Vec<String> = [".".into(), "..".into()]
        .into_iter()
        .chain((0..60).map(name))
        .collect();
    ensure!(
        names == wanted,
        "the stream has {} names, not {}; its last is {:?}",
        names.len(),
        wanted.len(),
        names.last()
    );
    still_serves(&mut kit)
}

fn symlink(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted_with(env, Config::with(init::CACHE_SYMLINKS))?;
    populate(&mut kit, 2)?;
    let link = kit.tree.symlink(ROOT, "link", "f0");
    for _ in 0..2 {
        kit.served.clear();
        let target = kit.run_on("readlink", "link", ops::readlink)?;
        ensure!(target == Ok("f0".into()), "link points to {target:?}");
    }
    ensure!(
        !kit.served.iter().any(|m| m.is(op::READLINK)),
        "the link was not cached"
    );
    // As long as before, and no time stamp tells.
    let _late = changed_meanwhile_late(&mut kit, |kit| {
        kit.tree.node_mut(link).data = b"f1".to_vec();
    })?;
    let read = kit.run_on("read through", "link", ops::read_file)?;
    ensure!(
        read == Ok(b"content of 1".to_vec()),
        "through the link one reads {read:?}"
    );
    let target = kit.run_on("readlink", "link", ops::readlink)?;
    ensure!(target == Ok("f1".into()), "link points to {target:?}");
    let asked = kit.served.iter().filter(|m| m.is(op::READLINK)).count();
    ensure!(asked == 1, "{asked} READLINKs: it is not cached any more");
    still_serves(&mut kit)
}

/// By a process whose directory it is: nobody looks the directory itself up again, so only its attributes decide.
fn mode(env: &Env<'_>, below: bool) -> Result<()> {
    let config = Config {
        options: "default_permissions",
        ..Config::default()
    };
    let mut kit = Kit::granted_with(env, config)?;
    let dir = if below { kit.tree.dir(ROOT, "d") } else { ROOT };
    kit.tree.file(dir, "x", b"");
    let inside = kit.path(if below { "d" } else { "" });
    let look = || ops::stat_cached(Path::new("x"));
    let staged = Staged::start(
        &mut kit,
        "a user in the directory",
        || match as_user(&inside, 1000, look) {
            Ok(_) => Ok(()),
            Err(e) => Err(e as i32),
        },
        |()| look().map_or_else(|e| e as i32, |_| 0),
    )?;
    changed_meanwhile(&mut kit, |kit| {
        kit.tree.node_mut(dir).mode = S_IFDIR | 0o700;
    })?;
    let status = staged.go(&mut kit)?;
    ensure!(
        matches!(status, WaitStatus::Exited(_, code) if code == libc::EACCES),
        "a walk that the new mode forbids gave {status:?}, not {}",
        libc::EACCES
    );
    still_serves(&mut kit)
}

/// An access ACL that gives user 1000 these rights, on a file of mode 0660.
fn acl_of_user(rights: u16) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    let nobody = u32::MAX;
    for (tag, perm, id) in [
        (0x01u16, 6u16, nobody),
        (0x02, rights, 1000),
        (0x04, 0, nobody),
        (0x10, 6, nobody),
        (0x20, 0, nobody),
    ] {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(perm.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn acl(env: &Env<'_>) -> Result<()> {
    const NAME: &str = "system.posix_acl_access";
    let mut kit = Kit::granted_with(env, Config::with(init::POSIX_ACL))?;
    populate(&mut kit, 1)?;
    let file = node(&kit, "f0")?;
    let set = |kit: &mut Kit<'_>, rights| {
        let node = kit.tree.node_mut(file);
        node.mode = S_IFREG | 0o660;
        node.xattrs.insert(NAME.into(), acl_of_user(rights));
    };
    set(&mut kit, 6);
    kit.run_on("stat", "f0", ops::stat)?.context("stat")?;
    let fd = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    let mnt = kit.mnt.clone();
    let by_user = move || {
        let read_write = || ops::open(Path::new("f0"), OFlag::O_RDWR).map(drop);
        as_user(&mnt, 1000, read_write)
    };
    for _ in 0..2 {
        kit.served.clear();
        let before = kit.run("open", by_user.clone())?;
        ensure!(before == Ok(()), "the ACL did not open f0: {before:?}");
        let shown = kit.run("getfacl", move || rare::fgetxattr(fd, NAME))?;
        ensure!(shown == Ok(acl_of_user(6)), "the ACL is {shown:?}");
    }
    let asked: Vec<String> = kit.served.iter().map(ToString::to_string).collect();
    ensure!(
        !kit.served
            .iter()
            .any(|m| m.is(op::GETXATTR) && m.nodeid() == file),
        "the ACL was not cached: {asked:?}"
    );
    changed_meanwhile(&mut kit, |kit| set(kit, 0))?;
    // First by the descriptor, which checks no permission that would refresh anything.
    let shown = kit.run("getfacl", move || rare::fgetxattr(fd, NAME))?;
    ensure!(
        shown == Ok(acl_of_user(0)),
        "after the recovery the ACL is {shown:?}"
    );
    let after = kit.run("open", by_user.clone())?;
    expect_errno("open of what the ACL forbids", after, Errno::EACCES)?;
    still_serves(&mut kit)
}

fn capability(env: &Env<'_>) -> Result<()> {
    const NAME: &str = "security.capability";
    let mut kit = Kit::granted_with(env, Config::with(init::HANDLE_KILLPRIV_V2))?;
    populate(&mut kit, 1)?;
    let file = node(&kit, "f0")?;
    let fd = open(&mut kit, "f0", OFlag::O_RDWR)?;
    for _ in 0..2 {
        kit.served.clear();
        let wrote = kit.run("write", move || ops::pwrite(fd, b"x", 0))?;
        ensure!(wrote == Ok(1), "the write gave {wrote:?}");
    }
    ensure!(
        !kit.served.iter().any(|m| m.is(op::GETXATTR)),
        "the kernel does not remember that there are no capabilities: nothing is shown"
    );
    changed_meanwhile(&mut kit, |kit| {
        let node = kit.tree.node_mut(file);
        node.xattrs
            .insert(NAME.into(), vec![1, 0, 0, 2, 0, 0, 0, 0]);
    })?;
    let wrote = kit.run("write", move || ops::pwrite(fd, b"x", 0))?;
    ensure!(wrote == Ok(1), "the write gave {wrote:?}");
    ensure!(
        !kit.tree
            .node(file)
            .xattrs
            .contains_key(std::ffi::OsStr::new(NAME)),
        "the file was written to and keeps its capabilities"
    );
    still_serves(&mut kit)
}

/// The dead server's answer is in the kernel, and the application runs again only when the next server serves, which
/// shows other attributes. By descriptor: nobody looks the name up meanwhile.
fn late(env: &Env<'_>, change: bool) -> Result<()> {
    // Even what is starved gets a little time now and then.
    for _ in 0..10 {
        if late_once(env, change)? {
            return Ok(());
        }
    }
    skip("the application was never late")
}

/// What keeps an application from its answer: a trap, or nothing better than the want of a processor.
enum Kept {
    Trapped(Trap),
    Starved(#[allow(dead_code)] Starved),
}

/// False if the application was not late, which shows nothing.
fn late_once(env: &Env<'_>, change: bool) -> Result<bool> {
    let mut kit = super::help::populated(env, 1)?;
    let file = node(&kit, "f0")?;
    let fd = open(&mut kit, "f0", OFlag::O_RDONLY)?;
    kit.settle()?;
    let trap = Trap::arm_if_any(if change {
        "setattr_answered"
    } else {
        "getattr_answered"
    })?;
    let app = kit.app("fchmod or fstat", move || {
        if change {
            rare::fchmod(fd, 0o640)
        } else {
            ops::fstat(fd).map(drop)
        }
    })?;
    let m = kit.until_op(if change { op::SETATTR } else { op::GETATTR })?;
    let kept = match trap {
        Some(trap) => Kept::Trapped(trap),
        None => Kept::Starved(Starved::on_last_cpu(app.tid)?),
    };
    kit.answer(&m)?;
    if let Kept::Trapped(trap) = &kept {
        trap.wait(kit.patience)?;
    }
    kit.restarted()?;
    kit.tree.node_mut(file).mode = S_IFREG | 0o604;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    kit.commit(&recovered)?;
    let early = app.done();
    drop(kept);
    if early {
        return Ok(false);
    }
    let result = kit.serve(&app)?;
    ensure!(result == Ok(()), "the late one gave {result:?}");
    let mode = kit.run("fstat", move || {
        // SAFETY: an all-zero stat is valid and fstat fills it.
        unsafe {
            let mut out: libc::stat = std::mem::zeroed();
            Errno::result(libc::fstat(fd, &mut out)).map(|_| out.st_mode)
        }
    })?;
    ensure!(
        mode == Ok(S_IFREG | 0o604),
        "the mode is {mode:?}, which the dead server said"
    );
    kit.check_counts()?;
    still_serves(&mut kit)?;
    Ok(true)
}

/// A task that gets no processor: it is bound to the last one, where a thread of real-time priority spins.
struct Starved {
    stop: Arc<AtomicBool>,
    spinner: Option<std::thread::JoinHandle<()>>,
}

impl Starved {
    fn on_last_cpu(tid: i32) -> Result<Starved> {
        let cpus = std::thread::available_parallelism()?.get();
        if cpus < 2 {
            return skip("needs two processors: on one nobody else would run either");
        }
        let mut last = CpuSet::new();
        last.set(cpus - 1)?;
        sched_setaffinity(Pid::from_raw(tid), &last).context("sched_setaffinity")?;
        let stop = Arc::new(AtomicBool::new(false));
        let (end, ready) = (stop.clone(), std::sync::mpsc::channel());
        let spinner = std::thread::spawn(move || {
            let param = libc::sched_param { sched_priority: 50 };
            // SAFETY: the parameter lives until the call returns; 0 is this thread.
            let rc = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &param) };
            let bound = sched_setaffinity(Pid::from_raw(0), &last).is_ok();
            let _ = ready.0.send(rc == 0 && bound);
            while !end.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let starved = Starved {
            stop,
            spinner: Some(spinner),
        };
        ensure!(
            ready.1.recv()?,
            "no real-time priority on the last processor"
        );
        Ok(starved)
    }
}

impl Drop for Starved {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(spinner) = self.spinner.take() {
            let _ = spinner.join();
        }
    }
}
