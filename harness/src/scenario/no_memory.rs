// SPDX-License-Identifier: GPL-2.0
//! An allocation fails at the worst moment: the kernel's fault injection (`fail-nth`) fails the n-th one of a task, and
//! `fail_sends` of the test kernels those of the engine, which runs in a worker.

use std::fs;
use std::path::Path;

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::help::{populated, still_serves};
use super::Scenario;
use crate::raw::env::{skip, Env};
use crate::raw::ops::{self, Done};
use crate::raw::trap::{NoMemory, Trap};
use crate::raw::wire::op;

pub fn scenarios() -> Vec<Scenario> {
    let kinds: [(&str, u32, Call); 2] = [
        ("mkdir", op::MKDIR, ops::mkdir),
        ("create", op::CREATE, |p| {
            let fd = ops::open(p, OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR)?;
            ops::close(fd)
        }),
    ];
    let mut all: Vec<_> = kinds
        .into_iter()
        .map(|(name, opcode, call)| {
            Scenario::series(
                format!("no-memory/late-{name}"),
                "what was made is asked for again and there is no memory: the lookup is given back once",
                move |env| late(env, opcode, call),
            )
        })
        .collect();
    for place in [Place::Root, Place::Replays, Place::Report] {
        all.push(Scenario::series(
            format!("no-memory/{}", place.name()),
            "the kernel has no memory for what it sends to the new server: it tries again, and leaves nothing out",
            move |env| sends(env, place),
        ));
    }
    all
}

/// What there is no memory for.
#[derive(Clone, Copy)]
enum Place {
    Root,
    Replays,
    Report,
}

impl Place {
    fn name(self) -> &'static str {
        match self {
            Place::Root => "root",
            Place::Replays => "replays",
            Place::Report => "report",
        }
    }
}

/// More than are sent at a time.
const INODES: u64 = 101;

fn sends(env: &Env<'_>, place: Place) -> Result<()> {
    const TIMES: u32 = 5;
    let mut kit = populated(env, INODES as usize - 1)?;
    let mut none = None;
    if matches!(place, Place::Root) {
        none = Some(NoMemory::for_sends(TIMES)?);
    }
    kit.restarted()?;
    let (mut shown, mut skipped) = (0, None);
    let recovered = kit.answer_replays(&mut |_, _| {
        shown += 1;
        let now = match place {
            Place::Root => false,
            Place::Replays => shown == 1,
            Place::Report => shown == INODES,
        };
        if now {
            match NoMemory::for_sends(TIMES) {
                Ok(knob) => none = Some(knob),
                Err(e) => skipped = Some(e),
            }
        }
        None
    })?;
    if let Some(e) = skipped {
        return Err(e);
    }
    let left = none.context("nothing failed")?.left()?;
    ensure!(left == 0, "{left} of {TIMES} requests were never tried");
    ensure!(
        recovered.report.replayed == INODES && recovered.replays.len() as u64 == INODES,
        "{} inodes were shown: {:?}",
        recovered.replays.len(),
        recovered.report
    );
    kit.commit(&recovered)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

type Call = fn(&Path) -> Done<()>;

/// Allocations after the answer of the dead server, more than there are.
const MOST: u32 = 24;

/// Lets allocations fail that may wait, too, until drop.
struct FailSlab;

const KNOB: &str = "/sys/kernel/debug/failslab/ignore-gfp-wait";

impl FailSlab {
    fn on() -> Result<FailSlab> {
        if fs::write(KNOB, "N").is_err() {
            return skip("needs a kernel with fault injection");
        }
        Ok(FailSlab)
    }
}

impl Drop for FailSlab {
    fn drop(&mut self) {
        let _ = fs::write(KNOB, "Y");
    }
}

fn late(env: &Env<'_>, opcode: u32, call: Call) -> Result<()> {
    let _knob = FailSlab::on()?;
    let (mut failed, mut spared) = (0, 0);
    for nth in 1..=MOST {
        let mut kit = populated(env, 2)?;
        let trap = Trap::arm("create_answered")?;
        let app: crate::raw::app::App<Done<()>> = kit.on("make", "new", call)?;
        let m = kit.until_op(opcode)?;
        kit.answer(&m)?;
        trap.wait(kit.patience)?;
        kit.recover()?;
        let knob = format!("/proc/self/task/{}/fail-nth", app.tid);
        fs::write(&knob, nth.to_string()).with_context(|| knob.clone())?;
        trap.go();
        match kit.serve(&app)? {
            Ok(()) => spared += 1,
            Err(Errno::ENOMEM) => failed += 1,
            other => bail!("allocation {nth} failed, and it gave {other:?}"),
        }
        kit.check_counts()
            .with_context(|| format!("allocation {nth} failed"))?;
        still_serves(&mut kit)?;
    }
    ensure!(
        failed > 1 && spared > 1,
        "{failed} calls failed, {spared} did not: nothing was shown"
    );
    Ok(())
}
