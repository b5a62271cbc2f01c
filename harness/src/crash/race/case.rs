// SPDX-License-Identifier: GPL-2.0
//! One case: a history, made with or without deaths, and what the judge says of it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use nix::sys::wait::WaitStatus;

use super::app::{self, Work};
use super::draw;
use super::judge::{judge, Verdict};
use super::killer::{Killer, Way};
use super::model::State;
use super::op::{Op, Record};
use super::shared::Shared;
use super::window;
use crate::crash::dim::Dim;
use crate::crash::kept::{Kept, Setup};
use crate::crash::op::{sum, Workload};
use crate::crash::plan::Deaths;
use crate::raw::app::{describe, Proc};
use crate::raw::wait::Rng;
use crate::scenario::runner::interrupted;

/// After so many operations all processes wait for each other.
pub const MEET: usize = 10;
const TURN: Duration = Duration::from_micros(200);

/// What happens to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kills {
    /// There is none: the processes race on the tmpfs itself.
    Tmpfs,
    /// It lives.
    None,
    /// It dies, at points of its own or by signals.
    By(Way),
}

pub const KILLS: [(&str, Kills); 4] = [
    ("tmpfs", Kills::Tmpfs),
    ("none", Kills::None),
    ("points", Kills::By(Way::Points)),
    ("signals", Kills::By(Way::Signals)),
];

/// `t4-wt/points/17`: everything about a case that the seed does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    pub dim: Dim,
    pub kills: Kills,
    pub round: u64,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = KILLS.iter().find(|(_, kills)| *kills == self.kills);
        let name = name.map_or("", |(name, _)| name);
        write!(f, "{}/{name}/{}", self.dim.name, self.round)
    }
}

pub fn find_kills(name: &str) -> Result<Kills> {
    match KILLS.iter().find(|(known, _)| *known == name) {
        Some((_, kills)) => Ok(*kills),
        None => bail!(
            "{name:?} is none of {}",
            KILLS.map(|(name, _)| name).join(", ")
        ),
    }
}

impl FromStr for Case {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Case> {
        let parts: Vec<&str> = text.split('/').collect();
        let [dim, kills, round] = parts[..] else {
            bail!("{text:?} is no case; one looks like t4-wt/points/17");
        };
        Ok(Case {
            dim: Dim::find(dim)?,
            kills: find_kills(kills)?,
            round: round
                .parse()
                .with_context(|| format!("{round:?} is no round"))?,
        })
    }
}

/// What all cases of a run have in common.
pub struct Race<'a> {
    pub setup: Setup<'a>,
    pub seed: u64,
    pub processes: usize,
    /// Of each process.
    pub operations: usize,
}

/// What came of a case.
#[derive(Debug, Default)]
pub struct Outcome {
    pub operations: u64,
    pub deaths: u64,
    /// How often the server died at each point.
    pub points: BTreeMap<String, u64>,
    /// The largest set of the judge.
    pub most: usize,
    /// The history is not linearizable: why.
    pub violation: Option<String>,
}

impl Case {
    /// Another one for each case, and always the same.
    pub fn seed(&self, seed: u64) -> u64 {
        sum(self.to_string().as_bytes()) ^ Rng(seed).next()
    }

    /// What each process does.
    pub fn workload(&self, seed: u64, processes: usize, operations: usize) -> Vec<Vec<Op>> {
        draw::workload(self.seed(seed), processes, operations)
    }
}

impl Race<'_> {
    /// # Errors
    /// Whatever must not happen but a history that is not linearizable: somebody hangs, the keeper miscounts, something
    /// is left over.
    pub fn run(&self, case: &Case, before: &BTreeMap<String, u64>) -> Result<Outcome> {
        let workload = case.workload(self.seed, self.processes, self.operations);
        match case.kills {
            Kills::Tmpfs => self.on_tmpfs(&workload),
            Kills::None => self.on_a_mount(case, &workload, None),
            Kills::By(way) => self.on_a_mount(case, &workload, Some((way, before))),
        }
    }

    fn on_tmpfs(&self, workload: &[Vec<Op>]) -> Result<Outcome> {
        let dir = nix::unistd::mkdtemp(&self.setup.scratch.join("race.XXXXXX"))
            .context("no directory for a case")?;
        let result = (|| {
            let root = dir.join("root");
            fs::create_dir(&root)?;
            app::prepare(&root)?;
            let shared = Shared::new()?;
            let mut history = Vec::new();
            let racing = self.spawn(workload, &root, &dir, &shared)?;
            self.ends(racing, &mut history, || Ok(()), String::new)?;
            self.onlooker(workload.len(), &root, &dir, &shared, &mut history, || {
                String::new()
            })?;
            Ok(self.judged(&history, &[]))
        })();
        let _ = fs::remove_dir_all(&dir);
        result
    }

    fn on_a_mount(
        &self,
        case: &Case,
        workload: &[Vec<Op>],
        kills: Option<(Way, &BTreeMap<String, u64>)>,
    ) -> Result<Outcome> {
        let nobody = Workload { procs: Vec::new() };
        let mut kept = Kept::start(&self.setup, &case.dim, &nobody, Deaths::NONE)?;
        let (mnt, back, logs) = (kept.mnt(), kept.back(), kept.file(""));
        let shared = Shared::new()?;
        let scene = |kept: &Kept<'_>| kept.scene();
        let mut first = Proc::spawn("the one who prepares", &[], || {
            i32::from(app::prepare(&mnt).is_err())
        })?;
        ensure!(
            first.wait_code(self.setup.patience)? == 0,
            "the directories cannot be made"
        );
        let none = BTreeMap::new();
        let (way, before) = kills.unwrap_or((Way::Points, &none));
        let mut killer = Killer::new(way, case.seed(self.seed) ^ 0x6b69_6c6c, &shared, before);
        let mut history = Vec::new();
        let racing = self.spawn(workload, &mnt, &logs, &shared)?;
        let turn = || match kills {
            Some(_) => killer.turn(&kept),
            None => Ok(()),
        };
        self.ends(racing, &mut history, turn, || scene(&kept))?;
        killer.stop(&kept)?;
        // Whoever is dying has died when the keeper has counted it.
        kept.wait_until("the keeper has started the last server", |kept| {
            Ok(kept.status()?.keeper.restarts >= killer.deaths(kept))
        })?;
        self.onlooker(workload.len(), &mnt, &logs, &shared, &mut history, || {
            scene(&kept)
        })?;
        kept.wait_until_idle()?;
        killer.stop(&kept)?;
        let deaths = killer.deaths(&kept);
        kept.check_restarts(deaths)?;
        if self.setup.mode.sign {
            kept.ensure_recoverable()?;
            // A signal comes at any moment, to all threads.
            let excused = deaths * u64::from(case.dim.threads);
            kept.at_rest(excused)?.ensure_nothing()?;
        }
        let seen = kept.table.all();
        let killed = seen.into_iter().filter(|seen| seen.killed > 0);
        let points = killed.map(|seen| (seen.name, seen.killed)).collect();
        kept.stop()?;
        // Below the mount there must be the same, and nothing was done to it meanwhile.
        let process = workload.len() + 1;
        self.onlooker(process, &back, &logs, &shared, &mut history, String::new)?;
        Ok(Outcome {
            deaths,
            points,
            ..self.judged(&history, &killer.marks)
        })
    }

    fn spawn(
        &self,
        workload: &[Vec<Op>],
        root: &Path,
        logs: &Path,
        shared: &Shared,
    ) -> Result<Vec<(Proc, std::path::PathBuf)>> {
        let all = workload.len() as u64;
        let mut racing = Vec::new();
        for (process, ops) in workload.iter().enumerate() {
            let work = Work {
                process: process as u8,
                ops,
                meet: Some((MEET, all)),
            };
            let log = logs.join(format!("race{process}"));
            let child = Proc::spawn(&format!("process {process}"), &[], || {
                app::run(&work, root, &log, shared)
            })?;
            racing.push((child, log));
        }
        Ok(racing)
    }

    /// Waits for all, while `turn` is called again and again, and adds their logs to the history.
    fn ends(
        &self,
        mut racing: Vec<(Proc, std::path::PathBuf)>,
        history: &mut Vec<Record>,
        mut turn: impl FnMut() -> Result<()>,
        scene: impl Fn() -> String,
    ) -> Result<()> {
        let deadline = Instant::now() + self.setup.patience;
        loop {
            turn()?;
            let running = racing.iter().map(|(child, _)| child.ended());
            let running: Vec<bool> = running.collect::<Result<_>>()?;
            if running.iter().all(|ended| *ended) {
                break;
            }
            ensure!(!interrupted(), "interrupted");
            if Instant::now() >= deadline {
                let hangs = racing.iter().zip(running).filter(|(_, ended)| !ended);
                let hangs = hangs.map(|((child, log), _)| {
                    format!("{}: {}", last_line(log), describe(child.tid()))
                });
                let hangs: Vec<String> = hangs.collect();
                bail!("hangs after {}\n      {}", hangs.join("\n      "), scene());
            }
            std::thread::sleep(TURN);
        }
        for (child, log) in &mut racing {
            let ended = child.wait(Duration::from_secs(1))?;
            ensure!(
                ended == WaitStatus::Exited(child.pid, 0),
                "{} ended with {ended:?} after {}",
                child.what,
                last_line(log)
            );
            for line in fs::read_to_string(&*log)?.lines() {
                history.push(serde_json::from_str(line).context("a log")?);
            }
        }
        Ok(())
    }

    /// What a process sees that has done nothing before.
    fn onlooker(
        &self,
        process: usize,
        root: &Path,
        logs: &Path,
        shared: &Shared,
        history: &mut Vec<Record>,
        scene: impl Fn() -> String,
    ) -> Result<()> {
        let ops = app::looks();
        let work = Work {
            process: process as u8,
            ops: &ops,
            meet: None,
        };
        let log = logs.join(format!("race{process}"));
        let child = Proc::spawn("the onlooker", &[], || app::run(&work, root, &log, shared))?;
        self.ends(vec![(child, log)], history, || Ok(()), scene)
    }

    fn judged(&self, history: &[Record], marks: &[(u64, String)]) -> Outcome {
        let mut outcome = Outcome {
            operations: history.len() as u64,
            ..Outcome::default()
        };
        match judge(history, &[State::empty()]) {
            Verdict::Fine(fine) => outcome.most = fine.most,
            Verdict::Not(violation) => {
                outcome.violation = Some(window::cut(history, violation).told(marks));
            }
            Verdict::TooMany => {
                outcome.violation = Some("    too many calls overlap to be judged\n".into());
            }
        }
        outcome
    }
}

fn last_line(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().last().unwrap_or("nothing").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read_again() {
        for text in ["t4-wt/points/17", "c4-wb/signals/0", "t1-wt/tmpfs/3"] {
            assert_eq!(text.parse::<Case>().unwrap().to_string(), text);
        }
        for text in ["", "t4-wt/points", "t9/points/1", "t4-wt/never/1"] {
            assert!(text.parse::<Case>().is_err(), "{text}");
        }
    }
}
