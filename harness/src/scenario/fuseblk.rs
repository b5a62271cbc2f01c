// SPDX-License-Identifier: GPL-2.0
//! Unmount of a `fuseblk` mount, which asks the server to end (DESTROY) and waits for its answer: not for one that
//! is no more.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;
use nix::mount::{umount2, MntFlags};
use nix::poll::PollFlags;

use super::help::{enter, populate, wake_dead, Phase, PHASES};
use super::Scenario;
use crate::raw::app::App;
use crate::raw::dev::Read1;
use crate::raw::env::{skip, Env};
use crate::raw::kit::{Config, Kit};
use crate::raw::ops::Done;
use crate::raw::trap::Trap;
use crate::raw::wire::{op, RestartedOut, COOKIE_BIT, RESTARTED_COMMIT};

pub fn scenarios() -> Vec<Scenario> {
    type Story = fn(&mut Kit<'_>, Phase) -> Result<()>;
    let mut all = vec![
        Scenario::series(
            "fuseblk/serving",
            "umount asks a server that lives to end, and waits for its answer",
            |env| with_mount(env, serving),
        ),
        Scenario::series(
            "fuseblk/destroy-read",
            "umount that waits for DESTROY in dead hands goes on when somebody says RESTARTED, which fails",
            |env| with_mount(env, destroy_read),
        ),
        Scenario::series(
            "fuseblk/init-late",
            "the same if its server answers INIT only when the unmount has begun",
            init_late,
        ),
    ];
    let kinds: [(&str, &'static str, Story); 2] = [
        (
            "plain",
            "umount does not ask a server that is no more",
            plain,
        ),
        (
            "force",
            "umount -f does not ask a server that is no more",
            force,
        ),
    ];
    for (kind, guards, story) in kinds {
        for phase in PHASES {
            all.push(Scenario::series(
                format!("fuseblk/{kind}-{}", phase.name()),
                guards,
                move |env| with_mount(env, |kit| story(kit, phase)),
            ));
        }
    }
    all
}

/// A loop device of a megabyte, until drop.
struct Loop(PathBuf);

impl Loop {
    fn new(env: &Env<'_>) -> Result<Loop> {
        if !Path::new("/dev/loop-control").exists() {
            return skip("needs loop devices");
        }
        let image = env.scratch.join("image");
        std::fs::File::create(&image)
            .and_then(|f| f.set_len(1 << 20))
            .with_context(|| format!("cannot make {}", image.display()))?;
        let out = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&image)
            .output()
            .context("cannot start losetup (package mount)")?;
        ensure!(
            out.status.success(),
            "losetup: {}",
            String::from_utf8_lossy(&out.stderr).trim()
        );
        // It is not used any more once it has its descriptor.
        std::fs::remove_file(&image).context("the image")?;
        Ok(Loop(String::from_utf8(out.stdout)?.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
    }
}

/// Plays `story` on a `fuseblk` mount with ten files.
fn with_mount(env: &Env<'_>, story: impl FnOnce(&mut Kit<'_>) -> Result<()>) -> Result<()> {
    with_mount_of(env, Config::default(), story)
}

/// The same with a server of this kind.
pub(super) fn with_mount_of(
    env: &Env<'_>,
    config: Config,
    story: impl FnOnce(&mut Kit<'_>) -> Result<()>,
) -> Result<()> {
    let device = Loop::new(env)?;
    let device = Some(device.0.clone());
    let mut kit = Kit::mount(env, Config { device, ..config })?;
    populate(&mut kit, 10)?;
    story(&mut kit)
}

fn umount(kit: &mut Kit<'_>, flags: MntFlags) -> Result<App<Done<()>>> {
    let mnt = kit.mnt.clone();
    kit.app("umount", move || umount2(&mnt, flags))
}

/// The unmount has ended well, and nothing was asked of the server.
fn ended(kit: &mut Kit<'_>, umount: &App<Done<()>>) -> Result<()> {
    wake_dead(kit)?;
    let result = umount.finish(kit.patience)?;
    ensure!(result == Ok(()), "umount gave {result:?}");
    kit.was_unmounted();
    match kit.dev.read(kit.patience)? {
        Read1::Failed(Errno::ENODEV | Errno::ECONNABORTED) => Ok(()),
        Read1::Failed(e) => bail!("reading a dead connection gives {e}"),
        Read1::Nothing => bail!("reading a dead connection blocks"),
        Read1::Message(m) => bail!("a dead connection still brings {m}"),
    }
}

fn serving(kit: &mut Kit<'_>) -> Result<()> {
    let app = umount(kit, MntFlags::empty())?;
    let destroy = kit.until_op(op::DESTROY)?;
    ensure!(!app.done(), "umount did not wait for DESTROY");
    kit.answer(&destroy)?;
    ended(kit, &app)
}

fn destroy_read(kit: &mut Kit<'_>) -> Result<()> {
    let app = umount(kit, MntFlags::empty())?;
    kit.until_op(op::DESTROY)?;
    // Of another file system: no reason to end anything, and it is not told more than before.
    let other = kit.restarted_as([1, 1]);
    ensure!(
        other == Err(Errno::ESTALE),
        "RESTARTED of another file system during umount gives {other:?}"
    );
    // Nor is COMMIT, which is how one asks whether a restart would work.
    let commit = kit.dev.restarted(RestartedOut {
        cookie: COOKIE_BIT | 1,
        flags: RESTARTED_COMMIT,
        epoch: 1,
        identity: kit.config.identity,
    });
    ensure!(
        commit == Err(Errno::EINVAL),
        "COMMIT during umount gives {commit:?}"
    );
    let ready = kit.dev.poll(PollFlags::POLLIN, Duration::ZERO)?;
    ensure!(
        !ready.contains(PollFlags::POLLERR),
        "a COMMIT ended the connection"
    );
    ensure!(!app.done(), "umount did not wait for DESTROY");
    // The server dies here. There is nothing left to recover, and who keeps the descriptor is told so.
    let said = kit.restarted_as(kit.config.identity);
    ensure!(
        said == Err(Errno::EINVAL),
        "RESTARTED during umount gives {said:?}"
    );
    ended(kit, &app)
}

fn init_late(env: &Env<'_>) -> Result<()> {
    let device = Loop::new(env)?;
    let config = Config {
        device: Some(device.0.clone()),
        answer_init: false,
        ..Config::default()
    };
    let mut kit = Kit::mount(env, config)?;
    let init = kit.read_init()?;
    let trap = Trap::arm("unmount")?;
    let app = umount(&mut kit, MntFlags::empty())?;
    trap.wait(kit.patience)?;
    kit.answer_init(&init)?;
    trap.go();
    kit.until_op(op::DESTROY)?;
    let said = kit.restarted_as(kit.config.identity);
    ensure!(
        said == Err(Errno::EINVAL),
        "RESTARTED during umount gives {said:?}"
    );
    ended(&mut kit, &app)
}

fn plain(kit: &mut Kit<'_>, phase: Phase) -> Result<()> {
    enter(kit, phase)?;
    let app = umount(kit, MntFlags::empty())?;
    ended(kit, &app)
}

fn force(kit: &mut Kit<'_>, phase: Phase) -> Result<()> {
    enter(kit, phase)?;
    let app = umount(kit, MntFlags::MNT_FORCE)?;
    ended(kit, &app)
}
