// SPDX-License-Identifier: GPL-2.0
//! Unloading the module: refused while anybody is there, in every phase; then nothing of a recovery is left behind
//! that would run, or be freed, without its code.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{anyhow, ensure, Context, Result};
use nix::errno::Errno;
use nix::kmod::{delete_module, finit_module, DeleteModuleFlags, ModuleInitFlags};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sched::{setns, unshare, CloneFlags};

use super::help::{enter, populated, still_serves, Phase, PHASES};
use super::Scenario;
use crate::raw::dev::Device;
use crate::raw::env::{skip, Env};
use crate::raw::ops;
use crate::raw::wait::wait_for;
use crate::raw::wire::op;

/// Where the runner of guests says which file the module is.
const MODULE: &str = "FUSE_RESTART_MODULE";
const FUSECTL: &str = "/sys/fs/fuse/connections";

pub fn scenarios() -> Vec<Scenario> {
    PHASES
        .into_iter()
        .map(|phase| {
            Scenario::series(
                format!("module/unload-{}", phase.name()),
                "the module cannot be unloaded during a recovery, and can once everybody has left",
                move |env| unload(env, phase),
            )
        })
        .collect()
}

/// `rmmod fuse`, without waiting.
fn remove() -> Result<(), Errno> {
    delete_module(c"fuse", DeleteModuleFlags::O_NONBLOCK)
}

/// Mount namespaces that have fusectl, a file system of the module's as well: the guest's, the runner's, and this
/// scenario's own.
fn namespaces() -> Result<Vec<File>> {
    let (mut seen, mut found) = (BTreeSet::new(), Vec::new());
    for entry in std::fs::read_dir("/proc")? {
        let process = entry?.path();
        // A process may have ended meanwhile.
        let Ok(mounts) = std::fs::read_to_string(process.join("mounts")) else {
            continue;
        };
        let Ok(space) = File::open(process.join("ns/mnt")) else {
            continue;
        };
        if mounts.contains(FUSECTL) && seen.insert(space.metadata()?.ino()) {
            found.push(space);
        }
    }
    Ok(found)
}

fn inside(space: &File, run: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    std::thread::scope(|scope| {
        let there = scope.spawn(|| {
            unshare(CloneFlags::CLONE_FS).context("unshare")?;
            setns(space, CloneFlags::CLONE_NEWNS).context("setns")?;
            run()
        });
        there.join().map_err(|_| anyhow!("a panic"))?
    })
}

/// Puts back what the next scenario needs, however this one ended.
struct Loaded {
    path: PathBuf,
    /// Where fusectl has been unmounted.
    without: Vec<File>,
}

impl Loaded {
    fn unmount_fusectl(&mut self) -> Result<()> {
        for space in namespaces()? {
            inside(&space, || {
                umount2(FUSECTL, MntFlags::empty()).context("umount of fusectl")
            })?;
            self.without.push(space);
        }
        Ok(())
    }

    fn restore(&mut self) -> Result<()> {
        if !Path::new("/sys/module/fuse").exists() {
            let path = &self.path;
            let file = File::open(path).with_context(|| path.display().to_string())?;
            finit_module(&file, c"", ModuleInitFlags::empty())
                .with_context(|| format!("cannot load {}", path.display()))?;
        }
        for space in self.without.drain(..) {
            inside(&space, || {
                let (kind, none) = (Some("fusectl"), None::<&str>);
                mount(kind, FUSECTL, kind, MsFlags::empty(), none).context("fusectl")
            })?;
        }
        Ok(())
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if let Err(e) = self.restore() {
            eprintln!("fuse cannot be had back: {e:#}");
        }
    }
}

fn unload(env: &Env<'_>, phase: Phase) -> Result<()> {
    let Some(path) = std::env::var_os(MODULE) else {
        return skip("fuse is built in here (--kernel module)");
    };
    let mut loaded = Loaded {
        path: path.into(),
        without: Vec::new(),
    };
    let mut kit = populated(env, 10)?;
    let old = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    kit.until_op(op::GETATTR)?;
    enter(&mut kit, phase)?;
    let refused = remove();
    ensure!(
        matches!(refused, Err(Errno::EBUSY | Errno::EWOULDBLOCK)),
        "rmmod in {phase:?} gave {refused:?}"
    );
    // Abort, and everybody leaves at once: work of the recovery may still be queued.
    kit.conn.abort().context("abort")?;
    let result = old.finish(kit.patience)?;
    ensure!(result.is_err(), "stat of a dead mount gave {result:?}");
    let patience = kit.patience;
    drop(kit);
    loaded.unmount_fusectl()?;
    wait_for("the module to have no users", patience, || match remove() {
        Ok(()) => Ok(true),
        Err(Errno::EBUSY | Errno::EWOULDBLOCK) => Ok(false),
        Err(e) => Err(e).context("rmmod fuse"),
    })?;
    ensure!(Device::open("/dev/fuse").is_err(), "/dev/fuse without fuse");
    loaded.restore()?;
    let mut kit = populated(env, 3)?;
    kit.recover()?;
    still_serves(&mut kit)
}
