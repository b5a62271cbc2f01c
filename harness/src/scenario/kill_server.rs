// SPDX-License-Identifier: GPL-2.0
//! A server that is killed inside of a notification (of the family `kill`): what it waits for there may be an answer
//! that only the next server can give.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{ensure, Context, Result};
use nix::fcntl::OFlag;
use nix::mount::{umount2, MntFlags};

use super::help::{expect_resent, open, populate, read_ahead, still_serves};
use super::kill::{dies, syscall_of};
use super::Scenario;
use crate::raw::app::{App, Proc};
use crate::raw::dev::Device;
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::ops::{self, Done};
use crate::raw::trap::Trap;
use crate::raw::wait::wait_for;
use crate::raw::wire::{init, notify, op, DeleteOut, InvalEntryOut, InvalInodeOut, StoreOut, ROOT};

/// `None`: there is none, as the request is sent by the notification itself.
type Application = Option<App<Done<()>>>;

/// A notification, what an application does that it then waits for, and which request that is.
struct Row {
    name: &'static str,
    guards: &'static str,
    flags: u64,
    /// It is told the nodeid of `f0`.
    say: fn(&Device, u64) -> Done<()>,
    application: fn(&mut Kit<'_>) -> Result<Application>,
    opcode: u32,
}

const ROWS: [Row; 5] = [
    Row {
        name: "kill/server-in-inval-entry",
        guards: "a server that waits in INVAL_ENTRY behind a held MKDIR can be killed",
        flags: 0,
        say: |dev, _| {
            let entry = InvalEntryOut {
                parent: ROOT,
                namelen: 2,
                flags: 0,
            };
            dev.notify(notify::INVAL_ENTRY, &entry, b"f0\0")
        },
        application: |kit| kit.on("mkdir", "d", ops::mkdir).map(Some),
        opcode: op::MKDIR,
    },
    Row {
        name: "kill/server-in-delete",
        guards: "a server that waits in DELETE behind a write to the child can be killed",
        flags: 0,
        say: |dev, f0| {
            let delete = DeleteOut {
                parent: ROOT,
                child: f0,
                namelen: 2,
                padding: 0,
            };
            dev.notify(notify::DELETE, &delete, b"f0\0")
        },
        application: |kit| {
            let fd = open(kit, "f0", OFlag::O_RDWR)?;
            let write = move || ops::pwrite(fd, b"new", 0).map(drop);
            kit.app("write", write).map(Some)
        },
        opcode: op::WRITE,
    },
    Row {
        name: "kill/server-in-inval-inode",
        guards: "a server that waits in INVAL_INODE for a locked page can be killed",
        flags: 0,
        say: say_inval_inode,
        application: read_f0,
        opcode: op::READ,
    },
    Row {
        name: "kill/server-in-launder",
        guards: "a server that writes a dirty page in INVAL_INODE can be killed",
        flags: init::WRITEBACK_CACHE,
        say: say_inval_inode,
        application: |kit| {
            let fd = open(kit, "f0", OFlag::O_RDWR)?;
            let page = vec![b'n'; 4096];
            let wrote = kit.run("write", move || ops::pwrite(fd, &page, 0))?;
            ensure!(wrote == Ok(4096), "the write gave {wrote:?}");
            Ok(None)
        },
        opcode: op::WRITE,
    },
    Row {
        name: "kill/server-in-store",
        guards: "a server that waits in STORE for a locked page can be killed",
        flags: 0,
        say: |dev, f0| {
            let store = StoreOut {
                nodeid: f0,
                offset: 0,
                size: 4,
                padding: 0,
            };
            dev.notify(notify::STORE, &store, b"data")
        },
        application: read_f0,
        opcode: op::READ,
    },
];

pub fn scenarios() -> Vec<Scenario> {
    let mut all: Vec<_> = ROWS
        .iter()
        .map(|row| Scenario::series(row.name, row.guards, move |env| killed_in(env, row)))
        .collect();
    all.push(Scenario::series(
        "kill/server-behind-unmount",
        "a server whose notification waits for an unmount, which waits for another of its threads, can be killed",
        behind_unmount,
    ));
    all
}

pub fn say_inval_inode(dev: &Device, nodeid: u64) -> Done<()> {
    let all = InvalInodeOut {
        ino: nodeid,
        off: 0,
        len: 0,
    };
    dev.notify(notify::INVAL_INODE, &all, &[])
}

/// The page under read is locked until the READ is answered.
fn read_f0(kit: &mut Kit<'_>) -> Result<Application> {
    let fd = open(kit, "f0", OFlag::O_RDONLY)?;
    let read = move || ops::pread(fd, 10, 0).map(drop);
    kit.app("read", read).map(Some)
}

/// A second process that holds the device and, when told to, writes one notification, as a server's thread does.
///
/// It is made before any file is open: a server that inherits an application's descriptor waits for itself when it
/// dies.
struct Notifier {
    server: Proc,
    tell: OwnedFd,
}

impl Notifier {
    fn new(kit: &Kit<'_>, say: impl FnOnce(&Device) -> Done<()>) -> Result<Notifier> {
        let (go, tell) = nix::unistd::pipe()?;
        let server = Proc::spawn("a notification", &[tell.as_raw_fd()], || {
            let _ = nix::unistd::read(&go, &mut [0]);
            i32::from(say(&kit.dev).is_err())
        })?;
        Ok(Notifier { server, tell })
    }

    /// Lets it speak.
    fn tell(&self) -> Result<()> {
        nix::unistd::write(&self.tell, b"!").context("telling the notifier")?;
        Ok(())
    }

    /// Returns when it waits inside the notification.
    fn wait_inside(&self, kit: &Kit<'_>) -> Result<()> {
        let tid = self.server.tid();
        wait_for(
            "the server to sleep in its notification",
            kit.patience,
            || Ok(self.server.ended()? || is_in(tid, &WRITES)),
        )?;
        ensure!(
            !self.server.ended()?,
            "the notification did not wait: this scenario shows nothing"
        );
        Ok(())
    }
}

const WRITES: [libc::c_long; 2] = [libc::SYS_write, libc::SYS_writev];

/// Whether the task sleeps in one of these system calls.
fn is_in(tid: i32, calls: &[libc::c_long]) -> bool {
    syscall_of(tid)
        .parse()
        .is_ok_and(|number| calls.contains(&number))
}

fn killed_in(env: &Env<'_>, row: &Row) -> Result<()> {
    let mut kit = Kit::granted_with(env, Config::with(row.flags))?;
    populate(&mut kit, 3)?;
    let f0 = kit.tree.child(ROOT, "f0").context("f0")?;
    let say = row.say;
    let mut notifier = Notifier::new(&kit, move |dev| say(dev, f0))?;
    let app = (row.application)(&mut kit)?;
    let old = if app.is_none() {
        notifier.tell()?;
        kit.until_op(row.opcode)?
    } else {
        let old = kit.until_op(row.opcode)?;
        notifier.tell()?;
        old
    };
    notifier.wait_inside(&kit)?;
    dies(
        &kit,
        &mut notifier.server,
        "in a notification, behind what nobody answers",
    )?;
    kit.recover()?;
    let new = kit.next_request()?;
    expect_resent(&kit, &old, &new)?;
    kit.answer(&new)?;
    if let Some(app) = app {
        let result = kit.serve(&app)?;
        ensure!(
            result == Ok(()),
            "what the notification waited for gave {result:?}"
        );
    }
    // Killed in DELETE the name is asked for again, and there.
    let stat = kit.run_on("stat", "f0", |p| ops::stat(p).map(drop))?;
    ensure!(stat == Ok(()), "stat of f0 gave {stat:?}");
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn behind_unmount(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted(env)?;
    populate(&mut kit, 3)?;
    let f0 = kit.tree.child(ROOT, "f0").context("f0")?;
    let mut first = Notifier::new(&kit, move |dev| say_inval_inode(dev, f0))?;
    let mut second = Notifier::new(&kit, move |dev| say_inval_inode(dev, f0))?;
    let read = read_ahead(&mut kit, "f0")?;
    first.tell()?;
    first.wait_inside(&kit)?;
    let trap = Trap::arm_if_any("unmount")?;
    let mnt = kit.mnt.clone();
    let umount = kit.app("umount", move || umount2(&mnt, MntFlags::empty()))?;
    if let Some(trap) = trap {
        // It has slept before, for the mount table.
        trap.wait(kit.patience)?;
        umount.wait_asleep(kit.patience)?;
        let before = umount.times_asleep()?;
        trap.go();
        wait_for("umount to wait again", kit.patience, || {
            Ok(umount.times_asleep()? > before)
        })?;
    }
    umount.wait_asleep(kit.patience)?;
    ensure!(!umount.done(), "umount did not wait for the notification");
    second.tell()?;
    second.wait_inside(&kit)?;
    dies(
        &kit,
        &mut second.server,
        "in a notification, behind an unmount",
    )?;
    ensure!(
        !umount.done(),
        "umount did not wait for the READ {read}: this scenario shows nothing"
    );
    dies(
        &kit,
        &mut first.server,
        "in a notification, which an unmount waits for",
    )?;
    let result = umount.finish(kit.patience)?;
    ensure!(result == Ok(()), "umount gave {result:?}");
    kit.was_unmounted();
    Ok(())
}
