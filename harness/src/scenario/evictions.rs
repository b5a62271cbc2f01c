// SPDX-License-Identifier: GPL-2.0
//! Evictions (of the family `late`) which begin in one phase and end in another: a FORGET goes to the server that has
//! the count, or to nobody.

use anyhow::{ensure, Context, Result};

use super::help::{enter, leave, populated, still_serves, Phase, PHASES};
use super::Scenario;
use crate::raw::app::App;
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::msg::{Message, Replay};
use crate::raw::ops;
use crate::raw::trap::Trap;
use crate::raw::wire::ROOT;

pub fn scenarios() -> Vec<Scenario> {
    let mut all: Vec<_> = [None]
        .into_iter()
        .chain(PHASES.map(Some))
        .map(|begin| {
            let name = begin.map_or("serving", Phase::name);
            Scenario::series(
                format!("late/eviction-{name}"),
                "an eviction may begin in any phase and end in any",
                move |env| eviction(env, begin),
            )
        })
        .collect();
    all.push(Scenario::series(
        "late/eviction-in-flight",
        "an inode that is being shown is not evicted, but when the new server serves",
        in_flight,
    ));
    all
}

/// More than are shown at a time: the recovery keeps the inodes whose replays are in flight.
const MANY: usize = 100;
const WINDOW: usize = 64;

/// When an eviction ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// In the phase in which it has begun.
    AtOnce,
    /// When this recovery has come to its report, and COMMIT was not said.
    Reported,
    /// When COMMIT was said, and nothing is revoked or sent yet.
    Released,
    /// When the server serves to which this recovery led.
    Serving,
    /// In a recovery after this one.
    NextRecovery,
    /// When the server serves to which the next one led.
    NextServing,
}

const ENDS: [End; 6] = [
    End::AtOnce,
    End::Reported,
    End::Released,
    End::Serving,
    End::NextRecovery,
    End::NextServing,
];

/// Starts to evict what nobody uses. What was used lately is only marked the first time.
fn drop_caches(kit: &mut Kit<'_>) -> Result<App<bool>> {
    kit.app("drop_caches", || {
        (0..3).all(|_| std::fs::write("/proc/sys/vm/drop_caches", "2").is_ok())
    })
}

fn eviction(env: &Env<'_>, begin: Option<Phase>) -> Result<()> {
    for end in ENDS {
        // Where there is no recovery none goes on, and a refused server does not get to serve.
        let none = match begin {
            None => matches!(
                end,
                End::AtOnce | End::Reported | End::Released | End::NextServing
            ),
            Some(Phase::Refused) => matches!(end, End::Reported | End::Released | End::Serving),
            // The same as at once.
            Some(Phase::Reported) => end == End::Reported,
            Some(_) => false,
        };
        if !none {
            begun(env, begin, end).with_context(|| format!("begun in {begin:?}, ended {end:?}"))?;
        }
    }
    Ok(())
}

fn begun(env: &Env<'_>, begin: Option<Phase>, end: End) -> Result<()> {
    let mut kit = populated(env, MANY)?;
    let left = begin.map_or(Ok(None), |phase| enter(&mut kit, phase))?;
    let trap = Trap::arm("evict_forget")?;
    let dropper = drop_caches(&mut kit)?;
    trap.wait(kit.patience)
        .context("nothing is evicted: this scenario shows nothing")?;
    match end {
        End::AtOnce => {
            trap.go();
            ensure!(dropper.finish(kit.patience)?, "drop_caches");
            go_on(&mut kit, begin, left)?;
        }
        End::Reported => {
            let reported = go_to_report(&mut kit, begin, left)?;
            trap.go();
            ensure!(dropper.finish(kit.patience)?, "drop_caches");
            reported.commit(&mut kit)?;
            kit.wait_serving()?;
        }
        End::Released => {
            let reported = go_to_report(&mut kit, begin, left)?;
            let release = Trap::arm_beside("release")?;
            reported.commit(&mut kit)?;
            release.wait(kit.patience)?;
            trap.go();
            ensure!(dropper.finish(kit.patience)?, "drop_caches");
            release.go();
            kit.wait_serving()?;
        }
        End::Serving => {
            go_on(&mut kit, begin, left)?;
            trap.go();
            ensure!(kit.serve(&dropper)?, "drop_caches");
        }
        End::NextRecovery => {
            leave(&mut kit, left.as_ref())?;
            kit.restarted()?;
            kit.confirm_root()?;
            trap.go();
            ensure!(dropper.finish(kit.patience)?, "drop_caches");
            kit.recover()?;
        }
        End::NextServing => {
            leave(&mut kit, left.as_ref())?;
            kit.recover()?;
            trap.go();
            ensure!(kit.serve(&dropper)?, "drop_caches");
        }
    }
    // Tree::forget refuses a FORGET of what this server does not count, and what it counts must be given back.
    evict_all(&mut kit)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// Until the kernel has given back everything but the root. `Tree::forget` refuses what it should not.
pub(super) fn evict_all(kit: &mut Kit<'_>) -> Result<()> {
    kit.serve_until("the eviction of every file", |kit| {
        std::fs::write("/proc/sys/vm/drop_caches", "2").context("drop_caches")?;
        Ok(kit.tree.held().len() == 1)
    })
}

/// Goes on with the recovery that is in `phase`, or with the next one if there is none to go on with, and serves.
fn go_on(kit: &mut Kit<'_>, phase: Option<Phase>, left: Option<Message>) -> Result<()> {
    if matches!(phase, None | Some(Phase::Refused)) {
        kit.recover()?;
        return Ok(());
    }
    go_to_report(kit, phase, left)?.commit(kit)?;
    kit.wait_serving()
}

/// A recovery whose report was read.
struct Reported {
    epoch: u32,
    /// What was shown, if the server's table does not have it yet.
    shown: Option<Vec<Replay>>,
}

impl Reported {
    fn commit(self, kit: &mut Kit<'_>) -> Result<()> {
        kit.commit_epoch(self.epoch).context("COMMIT was refused")?;
        if let Some(shown) = &self.shown {
            kit.tree.adopt(shown);
        }
        Ok(())
    }
}

fn go_to_report(
    kit: &mut Kit<'_>,
    phase: Option<Phase>,
    left: Option<Message>,
) -> Result<Reported> {
    // Where everything was shown before the eviction began, the tree has the counts already.
    let all_shown = !matches!(phase, Some(Phase::Said | Phase::Root | Phase::Replay));
    let mut shown = Vec::new();
    if phase == Some(Phase::Replay) {
        // `enter` has confirmed it.
        shown.push(Replay {
            unique: 0,
            nodeid: ROOT,
            generation: 0,
            nlookup: kit.tree.node(ROOT).nlookup,
        });
    }
    leave(kit, None)?;
    let mut next = left;
    let report = loop {
        let m = match next.take() {
            Some(m) => m,
            None => kit.next()?,
        };
        if let Some(report) = m.report(kit.cookie()) {
            break report;
        }
        let replay = m
            .replay()
            .with_context(|| format!("{m} was delivered during the recovery"))?;
        kit.confirm(&m, &replay)?;
        shown.push(replay);
    };
    ensure!(
        all_shown || shown.len() <= MANY,
        "all {} were shown: what was being evicted as well",
        shown.len()
    );
    ensure!(
        !kit.readable()?,
        "something can be read between the report and COMMIT"
    );
    Ok(Reported {
        epoch: report.epoch,
        shown: (!all_shown).then_some(shown),
    })
}

/// Whatever has a replay in flight is kept by the recovery, so here no eviction can begin.
fn in_flight(env: &Env<'_>) -> Result<()> {
    let files = WINDOW - 1;
    let mut kit = populated(env, files)?;
    let left = enter(&mut kit, Phase::Replay)?;
    let trap = Trap::arm("evict_forget")?;
    let dropper = drop_caches(&mut kit)?;
    ensure!(dropper.finish(kit.patience)?, "drop_caches");
    ensure!(
        !trap.stopped(),
        "an inode is evicted whose replay is in flight"
    );
    go_on(&mut kit, Some(Phase::Reported), left)?;
    // The names are gone, so these are the last references: they are dropped by a worker, once the server serves.
    trap.wait(kit.patience)
        .context("what the recovery had kept was not evicted")?;
    trap.go();
    evict_all(&mut kit)?;
    kit.run_on("stat", "f0", |p| ops::stat(p).map(drop))??;
    kit.check_counts()?;
    still_serves(&mut kit)
}
