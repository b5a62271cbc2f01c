// SPDX-License-Identifier: GPL-2.0
//! Requests (of the family `transit`) that were built before their inode was revoked and are queued when its nodeid
//! names another one, which the kernel has looked up meanwhile.

use std::os::fd::RawFd;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use libc::{S_IFDIR, S_IFMT, S_IFREG};
use nix::fcntl::{OFlag, RenameFlags};

use super::help::{expect_errno, open, still_serves};
use super::lost::{lose, succeed};
use super::Scenario;
use crate::raw::app::App;
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::ops::{self, Done};
use crate::raw::trap::Trap;
use crate::raw::wire::{op, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    let all = CASES.iter().flat_map(|case| {
        case.nodes.iter().map(move |lost| {
            Scenario::series(
                format!("transit/bad-check-before-sending-{}-{lost}", case.what),
                "a request built before its inode was revoked and queued afterwards reaches no successor",
                move |env| {
                    reaches(env, case).context("with nothing lost")?;
                    reaches_nobody(env, case, lost)
                },
            )
        })
    });
    all.collect()
}

struct Case {
    what: &'static str,
    opcode: u32,
    /// What the application asks for on the way there: whether a name is taken, what a file's capabilities are.
    before: &'static [u32],
    /// Whose nodeids the request has: any of them may be lost.
    nodes: &'static [&'static str],
    /// The mount and the open files `f0` and `f1`.
    run: fn(&Path, [RawFd; 2]) -> Done<()>,
}

static CASES: [Case; 7] = [
    Case {
        what: "setxattr",
        opcode: op::SETXATTR,
        before: &[],
        nodes: &["f0"],
        run: |mnt, _| ops::setxattr(&mnt.join("f0"), "user.x", b"x"),
    },
    Case {
        what: "chmod",
        opcode: op::SETATTR,
        before: &[],
        nodes: &["f0"],
        run: |mnt, _| ops::chmod(&mnt.join("f0"), 0o600),
    },
    Case {
        what: "stat",
        opcode: op::GETATTR,
        before: &[],
        nodes: &["f0"],
        run: |mnt, _| ops::stat(&mnt.join("f0")).map(drop),
    },
    Case {
        what: "write",
        opcode: op::WRITE,
        before: &[op::GETXATTR],
        nodes: &["f0"],
        run: |_, [f0, _]| ops::pwrite(f0, b"for nobody else", 0).map(drop),
    },
    Case {
        what: "copy",
        opcode: op::COPY_FILE_RANGE_64,
        before: &[op::GETXATTR],
        nodes: &["f0", "f1"],
        run: |_, [f0, f1]| ops::copy_file_range(f0, f1, 5).map(drop),
    },
    Case {
        what: "link",
        opcode: op::LINK,
        before: &[op::LOOKUP],
        nodes: &["f0", "d1"],
        run: |mnt, _| ops::link(&mnt.join("f0"), &mnt.join("d1/new")),
    },
    Case {
        what: "rename",
        opcode: op::RENAME,
        before: &[op::LOOKUP],
        nodes: &["d0", "d1"],
        run: |mnt, _| ops::rename(&mnt.join("d0/x"), &mnt.join("d1/y"), RenameFlags::empty()),
    },
];

/// The application of the case, stopped with its request built and not queued.
fn built<'a>(env: &'a Env<'a>, case: &Case) -> Result<(Kit<'a>, App<Done<()>>, Trap)> {
    let mut kit = Kit::granted(env)?;
    for name in ["f0", "f1"] {
        kit.tree.file(ROOT, name, name.as_bytes());
    }
    let dirs = ["d0", "d1"].map(|name| kit.tree.dir(ROOT, name));
    kit.tree.file(dirs[0], "x", b"");
    for name in ["f0", "f1", "d0/x", "d1"] {
        ensure!(kit.run_on("stat", name, ops::stat)?.is_ok(), "stat {name}");
    }
    let mut files = [0; 2];
    for (fd, name) in files.iter_mut().zip(["f0", "f1"]) {
        *fd = open(&mut kit, name, OFlag::O_RDWR)?;
    }
    kit.settle()?;
    let (mnt, run) = (kit.mnt.clone(), case.run);
    let mut trap = Trap::arm("queue_req")?;
    let app = kit.app(case.what, move || run(&mnt, files))?;
    for opcode in case.before {
        trap.wait(kit.patience)?;
        trap = trap.then("queue_req")?;
        let m = kit.until_op(*opcode)?;
        kit.answer(&m)?;
    }
    trap.wait(kit.patience)?;
    Ok((kit, app, trap))
}

/// The other way round: it is this request that has stopped, and if nothing is lost then it is served.
fn reaches(env: &Env<'_>, case: &Case) -> Result<()> {
    let (mut kit, app, trap) = built(env, case)?;
    kit.recover()?;
    kit.served.clear();
    trap.go();
    let result = kit.serve(&app)?;
    ensure!(result == Ok(()), "it gave {result:?}");
    let first = kit.served.iter().find(|m| !m.wants_no_reply());
    ensure!(
        first.is_some_and(|m| m.is(case.opcode)),
        "the request that had stopped is {first:?}: this shows nothing"
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn reaches_nobody(env: &Env<'_>, case: &Case, lost: &str) -> Result<()> {
    let (mut kit, app, trap) = built(env, case)?;
    let node = kit.tree.child(ROOT, lost).context("the tree has it")?;
    let is_dir = kit.tree.node(node).mode & S_IFMT == S_IFDIR;
    lose(&mut kit, &[node])?;
    let mode = if is_dir {
        S_IFDIR | 0o755
    } else {
        S_IFREG | 0o644
    };
    let made = kit.tree.add(ROOT, "successor", mode, b"");
    succeed(&mut kit, "successor", made, node)?;
    // Its nodeid has a live inode again, which is not bad.
    let looked = kit.run_on("stat", "successor", ops::stat)?;
    let ino = looked.context("stat of the successor")?.stx_ino;
    ensure!(
        ino == kit.tree.node(node).ino && kit.tree.node(node).nlookup == 1,
        "the successor was not looked up: inode {ino}"
    );
    kit.served.clear();
    trap.go();
    let result = kit.serve(&app)?;
    if let Some(m) = kit.served.iter().find(|m| m.is(case.opcode)) {
        anyhow::bail!("{m} reached the successor of what it was meant for");
    }
    expect_errno(case.what, result, nix::errno::Errno::EIO)?;
    let now = kit.run_on("stat", "successor", ops::stat)?;
    ensure!(now.is_ok(), "the successor: {:?}", now.map(drop));
    kit.check_counts()?;
    still_serves(&mut kit)
}
