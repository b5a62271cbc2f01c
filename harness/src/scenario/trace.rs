// SPDX-License-Identifier: GPL-2.0
//! The tracepoints: what they tell of a recovery is what the report and the `recovery` file tell.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};
use nix::mount::{mount, MsFlags};

use super::help::{enter, populated, still_serves, Phase};
use super::Scenario;
use crate::raw::env::{skip, Env};
use crate::raw::tree::Answer;
use crate::raw::wire::ROOT;

pub fn scenarios() -> Vec<Scenario> {
    vec![Scenario::series(
        "trace/adds-up",
        "phases and verdicts in the trace are those of the report, also of a recovery that was begun anew",
        adds_up,
    )]
}

const TRACEFS: &str = "/sys/kernel/tracing";

/// A trace of its own with the two events, until drop.
struct Instance(PathBuf);

impl Instance {
    fn new() -> Result<Instance> {
        let root = Path::new(TRACEFS);
        if !root.exists() {
            return skip("this kernel traces no events");
        }
        if !root.join("instances").exists() {
            mount(
                Some("tracefs"),
                root,
                Some("tracefs"),
                MsFlags::empty(),
                None::<&str>,
            )
            .context("mounting tracefs")?;
        }
        let this = Instance(
            root.join("instances")
                .join(format!("scenario-{}", std::process::id())),
        );
        fs::create_dir(&this.0).with_context(|| format!("making {}", this.0.display()))?;
        for event in ["fuse_restart_phase", "fuse_restart_verdict"] {
            let knob = this.0.join("events/fuse").join(event).join("enable");
            if fs::metadata(&knob).is_err() {
                return skip(format!("this kernel does not trace {event}"));
            }
            fs::write(&knob, "1").with_context(|| format!("writing {}", knob.display()))?;
        }
        Ok(this)
    }

    /// What follows `event: connection N epoch M ` in every line, by epoch.
    fn told(&self, event: &str, connection: u32) -> Result<BTreeMap<u32, Vec<String>>> {
        let text = fs::read_to_string(self.0.join("trace")).context("the trace")?;
        let mut told: BTreeMap<u32, Vec<String>> = BTreeMap::new();
        let marker = format!("{event}: connection {connection} epoch ");
        for line in text.lines() {
            let Some((_, rest)) = line.split_once(&marker) else {
                continue;
            };
            let (epoch, what) = rest.split_once(' ').context("an epoch")?;
            told.entry(epoch.parse()?)
                .or_default()
                .push(what.to_owned());
        }
        Ok(told)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

fn adds_up(env: &Env<'_>) -> Result<()> {
    const FILES: usize = 10;
    let trace = Instance::new()?;
    let mut kit = populated(env, FILES)?;
    let lost = kit.tree.child(ROOT, "f3").context("f3")?;
    // The root is confirmed, one replay is read, and another server begins anew.
    enter(&mut kit, Phase::Replay)?;
    let recovered =
        kit.recover_with(&mut |_, r| (r.nodeid == lost).then_some(Answer::Err(libc::ESTALE)))?;
    still_serves(&mut kit)?;

    let phases = trace.told("fuse_restart_phase", kit.conn.id)?;
    let shown = |epoch: u32| phases.get(&epoch).map(|p| p.join(" ")).unwrap_or_default();
    ensure!(
        shown(1) == "held root replay",
        "the first recovery's phases are {:?}",
        shown(1)
    );
    ensure!(
        shown(2) == "held root replay settle prepared release serving",
        "the second recovery's phases are {:?}",
        shown(2)
    );
    ensure!(
        phases.keys().all(|e| (1..=2).contains(e)),
        "epochs {:?} were traced",
        phases.keys()
    );

    let verdicts = trace.told("fuse_restart_verdict", kit.conn.id)?;
    let count = |epoch: u32, what: &str| {
        let of = verdicts.get(&epoch).into_iter().flatten();
        of.filter(|v| v.ends_with(what)).count() as u64
    };
    let report = &recovered.report;
    let pairs = [
        ("epoch 1, confirmed", count(1, " confirmed"), 1),
        ("epoch 1, void", count(1, " void"), FILES as u64),
        ("confirmed", count(2, " confirmed"), report.confirmed),
        ("revoked", count(2, " revoked, unknown"), report.revoked),
        ("all of epoch 2", count(2, ""), report.replayed),
        (
            "revoked nodes",
            count(2, &format!("nodeid {lost} revoked, unknown")),
            1,
        ),
    ];
    for (what, traced, wanted) in pairs {
        ensure!(
            traced == wanted,
            "{what}: {traced} in the trace, {wanted} wanted\n{verdicts:#?}"
        );
    }
    Ok(())
}
