// SPDX-License-Identifier: GPL-2.0
//! Names after a recovery: the next walk asks, negatives are gone, and nothing that hangs below the mount is lost.

use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{mount, umount2, MntFlags, MsFlags};

use super::help::{expect_errno, populated, still_serves};
use super::Scenario;
use crate::raw::app::{state, Proc};
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::ops;
use crate::raw::wire::{op, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "dentries/positive",
            "a name known before the recovery is looked up again",
            positive,
        ),
        Scenario::series(
            "dentries/replaced",
            "a name that means another file now opens that one",
            replaced,
        ),
        Scenario::series("dentries/negative", "a negative entry dies", negative),
        Scenario::series(
            "dentries/attributes",
            "cached attributes are asked for again",
            attributes,
        ),
        Scenario::series(
            "dentries/readdir-cache",
            "a directory listing cached before is read again",
            readdir_cache,
        ),
        Scenario::series(
            "dentries/mount-below",
            "what is mounted below stays mounted",
            mount_below,
        ),
        Scenario::series(
            "dentries/cwd",
            "a process whose directory is inside goes on",
            |env| inside(env, false),
        ),
        Scenario::series(
            "dentries/root",
            "a process whose root is inside goes on",
            |env| inside(env, true),
        ),
        Scenario::series(
            "dentries/cached-stays",
            "a second walk after the recovery is answered from the cache",
            cached,
        ),
    ]
}

/// Runs the operation and counts the LOOKUPs it needs.
fn lookups_of<T: Send + 'static>(
    kit: &mut Kit<'_>,
    name: &str,
    run: impl FnOnce(&Path) -> T + Send + 'static,
) -> Result<(T, Vec<String>)> {
    kit.served.clear();
    let result = kit.run_on("walk", name, run)?;
    let asked = kit
        .served
        .iter()
        .filter(|m| m.is(op::LOOKUP))
        .map(|m| Ok(m.name()?.to_string_lossy().into_owned()));
    let asked = asked.collect::<Result<_>>()?;
    Ok((result, asked))
}

fn positive(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let (_, before) = lookups_of(&mut kit, "f0", ops::stat_cached)?;
    ensure!(
        before.is_empty(),
        "f0 is looked up though its entry is valid for an hour: {before:?}"
    );
    kit.recover()?;
    let (stat, after) = lookups_of(&mut kit, "f0", ops::stat_cached)?;
    ensure!(
        stat.is_ok(),
        "stat f0 after the recovery gave {:?}",
        stat.err()
    );
    ensure!(
        after == ["f0"],
        "after the recovery the walk to f0 asked {after:?}"
    );
    kit.check_counts()?;
    Ok(())
}

fn cached(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    kit.recover()?;
    lookups_of(&mut kit, "f0", ops::stat_cached)?
        .0
        .context("stat")?;
    let (_, second) = lookups_of(&mut kit, "f0", ops::stat_cached)?;
    ensure!(
        second.is_empty(),
        "the second walk after the recovery asked again: {second:?}"
    );
    Ok(())
}

fn replaced(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let old = super::help::open(&mut kit, "f1", OFlag::O_RDONLY)?;
    kit.settle()?;
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    // While the server was away f1 became another file; the old one lives on under its own id.
    kit.tree.file(ROOT, "f1", b"the new one");
    kit.commit(&recovered)?;
    let read = kit.run_on("read", "f1", ops::read_file)?;
    ensure!(read == Ok(b"the new one".to_vec()), "f1 reads {read:?}");
    let read = kit.run("pread", move || ops::pread(old, 100, 0))?;
    ensure!(
        read == Ok(b"content of 1".to_vec()),
        "the descriptor of the old f1 reads {read:?}"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn negative(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    kit.tree.cache_negative = true;
    for _ in 0..2 {
        expect_errno(
            "stat of a missing file",
            kit.run_on("stat", "ghost", |p| ops::stat_cached(p).map(drop))?,
            Errno::ENOENT,
        )?;
    }
    let (_, before) = lookups_of(&mut kit, "ghost", |p| ops::stat_cached(p).map(drop))?;
    ensure!(
        before.is_empty(),
        "the negative entry was not cached: {before:?}"
    );
    kit.settle()?;
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    kit.tree.file(ROOT, "ghost", b"boo");
    kit.commit(&recovered)?;
    let read = kit.run_on("read", "ghost", ops::read_file)?;
    ensure!(
        read == Ok(b"boo".to_vec()),
        "the file made meanwhile reads {read:?}"
    );
    kit.check_counts()?;
    Ok(())
}

fn attributes(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let f0 = kit.tree.child(ROOT, "f0").context("f0")?;
    let fd = super::help::open(&mut kit, "f0", OFlag::O_RDONLY)?;
    kit.settle()?;
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    kit.tree.node_mut(f0).data = b"twice as long, and then some more".to_vec();
    kit.commit(&recovered)?;
    let size = kit.run("fstat", move || {
        // SAFETY: an all-zero stat is valid and fstat fills it.
        unsafe {
            let mut out: libc::stat = std::mem::zeroed();
            Errno::result(libc::fstat(fd, &mut out)).map(|_| out.st_size)
        }
    })?;
    ensure!(
        size == Ok(33),
        "after the recovery fstat says {size:?}, from before it"
    );
    Ok(())
}

fn readdir_cache(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted(env)?;
    kit.tree.open_flags = (1 << 1) | (1 << 3); // FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR
    let dir = kit.tree.dir(ROOT, "d");
    kit.tree.file(dir, "one", b"");
    for _ in 0..2 {
        ensure!(
            kit.run_on("list", "d", ops::listdir)? == Ok(vec!["one".into()]),
            "listing d"
        );
    }
    kit.settle()?;
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    kit.tree.file(dir, "two", b"");
    kit.commit(&recovered)?;
    let names = kit.run_on("list", "d", ops::listdir)?;
    ensure!(
        names == Ok(vec!["one".into(), "two".into()]),
        "after the recovery d lists {names:?}"
    );
    still_serves(&mut kit)
}

fn mount_below(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let dir = kit.tree.dir(ROOT, "d");
    kit.tree.dir(dir, "point");
    let done = kit.run_on("mount tmpfs on", "d/point", |p| {
        mount(
            Some("below"),
            p,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
    })?;
    done.context("mounting tmpfs below")?;
    let inner = kit.path("d/point/file");
    kit.run("write below", move || {
        std::fs::write(inner, b"below").map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))
    })?
    .context("a file below")?;
    for _ in 0..3 {
        kit.recover()?;
        let read = kit.run_on("read", "d/point/file", ops::read_file)?;
        ensure!(
            read == Ok(b"below".to_vec()),
            "the file on the mount below reads {read:?}"
        );
        let table = std::fs::read_to_string("/proc/self/mountinfo")?;
        let path = kit.path("d/point").display().to_string();
        ensure!(
            table.lines().any(|l| l.contains(&path)),
            "the mount below is gone from the mount table"
        );
    }
    kit.check_counts()?;
    kit.run_on("umount", "d/point", |p| umount2(p, MntFlags::empty()))?
        .context("umount of the mount below")?;
    still_serves(&mut kit)
}

fn inside(env: &Env<'_>, root: bool) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let dir = kit.tree.dir(ROOT, "d");
    kit.tree.file(dir, "file", b"inside");
    // What `..` leads to: from its root nobody gets out.
    let up = if root { "../file" } else { "../f0" };
    let path = kit.path("d");
    let (read, write) = nix::unistd::pipe()?;
    let mut child = Proc::spawn(
        "a process inside d",
        &[kit.dev.raw(), write.as_raw_fd()],
        || {
            if std::env::set_current_dir(&path).is_err()
                || root && nix::unistd::chroot(".").is_err()
            {
                return 10;
            }
            // Sleeps until the scenario closes the other end: the recovery is over then.
            let _ = nix::unistd::read(&read, &mut [0]);
            let file = if root { "/file" } else { "file" };
            let found = ops::read_file(Path::new(file)) == Ok(b"inside".to_vec());
            let up = ops::stat(Path::new(up)).is_ok();
            let here = std::env::current_dir()
                .is_ok_and(|d| d == if root { Path::new("/") } else { &path });
            i32::from(!found) + 2 * i32::from(!up) + 4 * i32::from(!here)
        },
    )?;
    let tid = child.tid();
    kit.serve_until("the process to sleep inside d", |_| {
        let link = if root { "root" } else { "cwd" };
        let there =
            std::fs::read_link(format!("/proc/{tid}/{link}")).is_ok_and(|p| p.ends_with("d"));
        Ok(there && state(tid) == Some('S'))
    })?;
    kit.recover()?;
    drop(write);
    kit.serve_until("the end of the process inside d", |_| child.ended())?;
    let code = child.wait_code(kit.patience)?;
    ensure!(
        code == 0,
        "the process inside d says {code} (1: open, 2: through .., 4: getcwd, 10: chdir or chroot)"
    );
    still_serves(&mut kit)
}
