// SPDX-License-Identifier: GPL-2.0
//! One case: a fresh mount, the workload, the deaths, and what is to be seen of it afterwards.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::sys::wait::WaitStatus;

use super::app;
use super::dim::Dim;
use super::kept::{Kept, Setup};
use super::op::Workload;
use super::plan::{Deaths, Kill};
use super::rest::{excused, Rest};
use super::tree;
use crate::crash_points::Seen;
use crate::raw::app::{describe, Proc};
use crate::scenario::runner::interrupted;

/// What must be the same with crashes and without.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Each process's number and its results, line by line.
    pub logs: Vec<(usize, Vec<String>)>,
    /// The tree at the end, through the mount and, when that is gone, below it.
    pub mounted: Vec<String>,
    pub backing: Vec<String>,
}

impl Observed {
    /// One that ends at its first command would do so with a crash, too, and be equal.
    pub fn program_that_failed(&self) -> Option<&str> {
        let lines = self.logs.iter().flat_map(|(_, lines)| lines);
        let mut programs = lines.filter(|line| line.starts_with("Run("));
        programs
            .find(|line| !line.contains(" = exit status: 0: "))
            .map(String::as_str)
    }
}

pub struct Run {
    pub observed: Observed,
    /// How often each point was reached until the applications had ended and the server was idle.
    pub seen: Vec<Seen>,
    /// What is left that should not be; nobody can tell of a kernel that only sends again.
    pub rest: Option<Rest>,
    /// The deaths that came.
    pub died: Vec<Kill>,
    /// Too few of them: where the server did not come to.
    pub unreached: Option<String>,
    /// Where other threads were with a request in their hands when they died with it.
    pub beside: Vec<String>,
}

/// Runs a workload while the server dies.
///
/// # Errors
/// Whatever must not happen: somebody hangs, the keeper miscounts, something is left over.
pub fn run(setup: &Setup, dim: &Dim, workload: &Workload, deaths: Deaths<'_>) -> Result<Run> {
    let mut kept = Kept::start(setup, dim, workload, deaths)?;
    let blocks = !dim.writeback;
    let logs = applications(&mut kept, workload, blocks)?;
    let (died, unreached) = wait_for_deaths(&mut kept, deaths)?;
    let seen = kept.table.all();
    let beside = seen.iter().filter(|seen| seen.beside > 0);
    let beside = beside.map(|seen| seen.name.clone()).collect();
    let mounted = onlooker(&mut kept, blocks)?;
    kept.wait_until_idle()?;
    kept.check_restarts(died.len() as u64)?;
    let rest = match setup.mode.sign {
        true => {
            kept.ensure_recoverable()?;
            Some(kept.at_rest(excused(dim, &kept.table.all()))?)
        }
        false => None,
    };
    kept.stop()?;
    let backing = tree::of(&kept.back(), blocks);
    Ok(Run {
        observed: Observed {
            logs,
            mounted,
            backing,
        },
        seen,
        rest,
        died,
        unreached,
        beside,
    })
}

fn applications(
    kept: &mut Kept,
    workload: &Workload,
    blocks: bool,
) -> Result<Vec<(usize, Vec<String>)>> {
    let mut running = Vec::new();
    for proc in &workload.procs {
        let dir = kept.mnt().join(format!("p{}", proc.id));
        let log = kept.file(&format!("log{}", proc.id));
        let child = Proc::spawn(&format!("process {}", proc.id), &[], || {
            match app::log(&log) {
                Ok(log) => app::run(proc, &dir, log, blocks),
                Err(_) => 3,
            }
        })?;
        running.push((proc.id, child));
    }
    let files = running.iter().map(|(id, _)| kept.file(&format!("log{id}")));
    let mut progress = Progress::begin(files.collect());
    let mut logs = Vec::new();
    for (id, child) in &mut running {
        let ended = end_of(child, &mut progress, kept).with_context(|| {
            format!(
                "its last result: {}",
                last_line(&kept.file(&format!("log{id}")))
            )
        })?;
        // Where a death may be noticed it may be noticed as early as that.
        let noticed = !kept.setup().mode.whole() && kept.table.all().iter().any(|s| s.killed > 0);
        if ended == WaitStatus::Exited(child.pid, app::CANNOT_BEGIN) && !noticed {
            bail!(
                "process {id}: {}",
                last_line(&kept.file(&format!("log{id}")))
            );
        }
        let mut lines = lines_of(&kept.file(&format!("log{id}")));
        if ended != WaitStatus::Exited(child.pid, 0) {
            lines.push(format!("ended with {}", how(ended)));
        }
        logs.push((*id, lines));
    }
    Ok(logs)
}

/// Without its pid, which is another one in every run.
fn how(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, code) => format!("status {code}"),
        WaitStatus::Signaled(_, signal, _) => signal.to_string(),
        other => format!("{other:?}"),
    }
}

/// When it last was seen that things go on. Forty deaths take a slow machine minutes, and then nobody hangs.
struct Progress {
    logs: Vec<PathBuf>,
    /// Bytes of the logs, deaths of the server.
    last: (u64, u64),
    since: Instant,
}

impl Progress {
    fn begin(logs: Vec<PathBuf>) -> Progress {
        Progress {
            logs,
            last: (0, 0),
            since: Instant::now(),
        }
    }

    /// How long no process has had a result, and no server has died.
    fn none_for(&mut self, deaths: u64) -> Duration {
        let len = |log| fs::metadata(log).map_or(0, |log: fs::Metadata| log.len());
        let now = (self.logs.iter().map(len).sum(), deaths);
        if now != self.last {
            self.last = now;
            self.since = Instant::now();
        }
        self.since.elapsed()
    }
}

fn end_of(child: &mut Proc, progress: &mut Progress, kept: &Kept) -> Result<WaitStatus> {
    while !child.ended_within(Duration::from_millis(200))? {
        if interrupted() {
            bail!("interrupted");
        }
        let deaths = kept.table.all().iter().map(|seen| seen.killed).sum();
        if progress.none_for(deaths) > kept.setup().patience {
            bail!(
                "{} hangs: {}\n      {}",
                child.what,
                describe(child.tid()),
                kept.scene()
            );
        }
    }
    child.wait(Duration::from_secs(1))
}

fn lines_of(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn last_line(path: &Path) -> String {
    lines_of(path).pop().unwrap_or_else(|| "none".into())
}

/// Waits until the server has died as often as it was told to, or is idle and will not any more; the deaths that came, and if
/// these are too few, where the server did not come to.
fn wait_for_deaths(kept: &mut Kept, deaths: Deaths<'_>) -> Result<(Vec<Kill>, Option<String>)> {
    let kills = deaths.kills;
    let wanted = kills.len() as u64;
    kept.wait_until("the server has died and is idle", |kept| {
        // Idle or not, if it has: the next that looks at the mount waits for the recovery.
        if wanted > 0 && kept.killed(kills) >= wanted {
            return Ok(true);
        }
        // In this order: idle, and not dead yet, is idle for good.
        let idle = kept.idle()?;
        let died = kept.killed(kills);
        Ok(idle && kept.status()?.keeper.restarts == died && kept.killed(kills) == died)
    })?;
    // Whoever looks at the mount from now on is not to be disturbed.
    kept.disarm(kills)?;
    let died = kept.killed(kills);
    let enough = if deaths.together { 1 } else { wanted };
    let unreached = (died < enough).then(|| {
        let left = kills.iter().map(|kill| {
            let (opcode, point) = kill.parts();
            let seen = kept.table.seen(opcode, point);
            format!(
                "{} (reached {}, {} missing)",
                seen.name, seen.reached, seen.left
            )
        });
        left.collect::<Vec<_>>().join(", ")
    });
    let mut came = kills.to_vec();
    came.retain(|kill| kept.killed(std::slice::from_ref(kill)) > 0);
    Ok((came, unreached))
}

/// The tree as a process sees it that has done nothing before.
fn onlooker(kept: &mut Kept, blocks: bool) -> Result<Vec<String>> {
    let (mnt, out) = (kept.mnt(), kept.file("tree"));
    let mut child = Proc::spawn("the onlooker", &[], || {
        let text = tree::of(&mnt, blocks).join("\n");
        i32::from(fs::write(&out, text).is_err())
    })?;
    let ended = end_of(&mut child, &mut Progress::begin(Vec::new()), kept)?;
    if ended != WaitStatus::Exited(child.pid, 0) {
        bail!("the onlooker ended with {}", how(ended));
    }
    Ok(lines_of(&kept.file("tree")))
}

/// The first few differences, if there are any.
pub fn difference(want: &Observed, got: &Observed) -> Option<String> {
    let mut found = Vec::new();
    for ((id, want), (_, got)) in want.logs.iter().zip(&got.logs) {
        found.extend(lines_differ(&format!("process {id}"), want, got));
    }
    found.extend(lines_differ("the tree", &want.mounted, &got.mounted));
    found.extend(lines_differ(
        "the tree below the mount",
        &want.backing,
        &got.backing,
    ));
    (!found.is_empty()).then(|| found.join("\n"))
}

fn lines_differ(what: &str, want: &[String], got: &[String]) -> Vec<String> {
    const NONE: &str = "nothing";
    let line = |lines: &[String], n: usize| lines.get(n).map_or(NONE.into(), Clone::clone);
    (0..want.len().max(got.len()))
        .filter(|n| want.get(*n) != got.get(*n))
        .take(3)
        .map(|n| {
            format!(
                "    {what}, line {}:\n      without a crash: {}\n      with:            {}",
                n + 1,
                line(want, n),
                line(got, n)
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_further_does_not_hang_however_long_it_takes() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log0");
        let mut progress = Progress::begin(vec![log.clone(), dir.path().join("none yet")]);
        let a_while = Duration::from_millis(20);
        let after_a_while = |progress: &mut Progress, deaths| {
            std::thread::sleep(a_while);
            progress.none_for(deaths)
        };
        assert!(after_a_while(&mut progress, 0) >= a_while);
        fs::write(&log, "a result").unwrap();
        assert!(after_a_while(&mut progress, 0) < a_while);
        assert!(after_a_while(&mut progress, 1) < a_while, "a death");
        assert!(after_a_while(&mut progress, 1) >= a_while);
    }

    #[test]
    fn a_program_that_fails_is_no_oracle() {
        let of = |line: &str| Observed {
            logs: vec![(0, vec!["Stat(\"f\") = 0".into(), line.into()])],
            mounted: Vec::new(),
            backing: Vec::new(),
        };
        let fine = "Run(\"tar -cf t f\") = exit status: 0: t ";
        assert_eq!(of(fine).program_that_failed(), None);
        for line in [
            "Run(\"tar -cf t f\") = exit status: 2:  tar: f: no such file",
            "Run(\"tar -cf t f\") = signal: 9 (SIGKILL):  ",
            "Run(\"tar -cf t f\") = ENOENT",
        ] {
            assert_eq!(of(line).program_that_failed(), Some(line));
        }
    }

    #[test]
    fn every_part_is_compared() {
        let text =
            |lines: &[&str]| -> Vec<String> { lines.iter().map(|l| (*l).to_owned()).collect() };
        let one = Observed {
            logs: vec![(0, text(&["a", "b"])), (2, text(&["c"]))],
            mounted: text(&["t"]),
            backing: text(&["u"]),
        };
        assert_eq!(difference(&one, &one), None);
        let mut others = vec![one.clone(), one.clone(), one.clone(), one.clone()];
        others[0].logs[0].1[1] = "x".into();
        others[1].logs[1].1.push("more".into());
        others[2].mounted.clear();
        others[3].backing[0] = "x".into();
        for other in others {
            assert!(difference(&one, &other).is_some(), "{other:?}");
            assert!(difference(&other, &one).is_some(), "{other:?}");
        }
    }
}
