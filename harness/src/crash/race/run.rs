// SPDX-License-Identifier: GPL-2.0
//! Many histories: which, until when, and what is told of them.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use serde::Serialize;

use super::case::{find_kills, Case, Kills, Outcome, Race, KILLS, MEET};
use super::shared::MOST;
use super::Args;
use crate::crash::dim::{Dim, Mode, DIMS};
use crate::crash::kept::Setup;
use crate::crash::kmsg;
use crate::crash::run::Scratch;
use crate::raw::wait::Rng;
use crate::scenario::runner::{self, interrupted};

const TELL_EVERY: Duration = Duration::from_secs(15);

#[derive(Serialize)]
struct Failure {
    case: String,
    reason: String,
}

/// What is written as JSON.
#[derive(Default, Serialize)]
struct Results {
    kernel: String,
    seed: u64,
    mode: String,
    seconds: f64,
    histories: u64,
    operations: u64,
    /// Deaths of servers.
    crashes: u64,
    /// Histories that are not linearizable.
    not_linearizable: u64,
    /// Somebody hangs, something is left over, counts are wrong, the kernel complains.
    broken: u64,
    /// Histories in which the server was to die, and in how many of them it did not: these tested little.
    with_kills: u64,
    without_a_crash: u64,
    /// For each kind of case its histories, and how many of them failed.
    kinds: BTreeMap<String, (u64, u64)>,
    points: BTreeMap<String, u64>,
    /// The largest set of the judge.
    largest_set: usize,
    failures: Vec<Failure>,
}

impl Results {
    fn failed(&self) -> u64 {
        self.not_linearizable + self.broken
    }

    /// A point may never be reached; but where nobody dies nothing is tested.
    fn enough_died(&self) -> bool {
        self.without_a_crash * 4 <= self.with_kills
    }
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let seed = args.seed.unwrap_or_else(runner::clock_seed);
    ensure!(
        (1..=MOST - 2).contains(&args.processes),
        "--processes: 1 to {}",
        MOST - 2
    );
    ensure!(args.operations >= MEET, "--operations: at least {MEET}");
    let mode = Mode {
        journal: !args.no_journal,
        sign: !args.resend_only,
    };
    let cases = cases(args, seed)?;
    if let (true, Some(case)) = (args.print, cases.first()) {
        let workload = case.workload(seed, args.processes, args.operations);
        for (process, ops) in workload.iter().enumerate() {
            let ops: Vec<String> = ops.iter().map(ToString::to_string).collect();
            println!("process {process}:\n  {}", ops.join("\n  "));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let patience = Duration::from_secs(args.patience);
    runner::with_env(patience, seed, |env| {
        let mounts = cases.iter().any(|case| case.kills != Kills::Tmpfs);
        ensure!(
            env.support.series || !mode.sign || !mounts,
            "this kernel does not offer FUSE_RESTARTABLE: boot one with the series (scripts/vm), or say --resend-only"
        );
        let scratch = Scratch::new(env)?;
        let race = Race {
            setup: Setup {
                binary: std::fs::read_link("/proc/self/exe").context("which program is this")?,
                mode,
                patience,
                scratch: scratch.path(),
            },
            seed,
            processes: args.processes,
            operations: args.operations,
        };
        All::new(args, &race)?.run(&cases)
    })
}

fn cases(args: &Args, seed: u64) -> Result<Vec<Case>> {
    if let Some(case) = &args.case {
        return Ok(vec![case.parse()?; args.rounds as usize]);
    }
    let dims: Vec<Dim> = match args.dims.is_empty() {
        true => DIMS.into(),
        false => args
            .dims
            .iter()
            .map(|name| Dim::find(name))
            .collect::<Result<_>>()?,
    };
    let kinds: Vec<Kills> = match args.kills.is_empty() {
        true => KILLS.iter().map(|(_, kills)| *kills).collect(),
        false => args
            .kills
            .iter()
            .map(|name| find_kills(name))
            .collect::<Result<_>>()?,
    };
    let mut cases = Vec::new();
    for round in 0..args.rounds {
        let first = cases.len();
        for kills in &kinds {
            for (n, dim) in dims.iter().enumerate() {
                // What proves the oracle is done in one column a round, the tmpfs has none.
                let alone = matches!(kills, Kills::Tmpfs | Kills::None);
                if alone && args.kills.is_empty() && n as u64 != round % dims.len() as u64 {
                    continue;
                }
                if *kills == Kills::Tmpfs && n > 0 && !args.kills.is_empty() {
                    continue;
                }
                cases.push(Case {
                    dim: *dim,
                    kills: *kills,
                    round,
                });
            }
        }
        Rng(seed.wrapping_add(round)).shuffle(&mut cases[first..]);
    }
    Ok(cases)
}

struct All<'a> {
    args: &'a Args,
    race: &'a Race<'a>,
    results: Results,
    log: kmsg::Log,
    began: Instant,
}

impl<'a> All<'a> {
    fn new(args: &'a Args, race: &'a Race<'a>) -> Result<All<'a>> {
        let results = Results {
            kernel: runner::kernel()?,
            seed: race.seed,
            mode: race.setup.mode.name().into(),
            ..Results::default()
        };
        println!(
            "kernel {}, seed {}, {}",
            results.kernel, results.seed, results.mode
        );
        Ok(All {
            args,
            race,
            results,
            log: kmsg::Log::open(),
            began: Instant::now(),
        })
    }

    fn run(&mut self, cases: &[Case]) -> Result<ExitCode> {
        let whole = self.race.setup.mode.whole();
        let enough = self
            .args
            .failures
            .unwrap_or(if whole { 5 } else { u64::MAX });
        let mut told = Instant::now();
        let mut ended = "";
        for (n, case) in cases.iter().enumerate() {
            if self
                .args
                .seconds
                .is_some_and(|s| self.began.elapsed().as_secs() >= s)
            {
                ended = " (the time was up)";
                break;
            }
            let outcome = self.race.run(case, &self.results.points);
            if interrupted() {
                ended = " (interrupted)";
                break;
            }
            self.add(case, outcome);
            if told.elapsed() > TELL_EVERY {
                told = Instant::now();
                self.tell(n + 1, cases.len());
            }
            if self.results.failed() >= enough {
                ended = " (enough failed)";
                break;
            }
        }
        self.save()?;
        let r = &self.results;
        for (kind, (histories, failed)) in &r.kinds {
            println!("{kind:<10} {histories:>6} histories, {failed} failed");
        }
        println!(
            "{} histories, {} operations, largest set {}, {} crashes at {} points, {} not linearizable, {} broken, {} of {} without a crash, {:.0} s{ended}",
            r.histories,
            r.operations,
            r.largest_set,
            r.crashes,
            r.points.len(),
            r.not_linearizable,
            r.broken,
            r.without_a_crash,
            r.with_kills,
            r.seconds
        );
        // Without the journal there must be something to find.
        let fine = match whole {
            true => r.failed() == 0 && r.histories > 0 && r.enough_died(),
            false => r.not_linearizable > 0,
        };
        Ok(match fine {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        })
    }

    fn add(&mut self, case: &Case, outcome: Result<Outcome>) {
        let r = &mut self.results;
        r.seconds = self.began.elapsed().as_secs_f64();
        r.histories += 1;
        let mut reason = String::new();
        match outcome {
            Ok(outcome) => {
                r.operations += outcome.operations;
                r.crashes += outcome.deaths;
                for (point, times) in &outcome.points {
                    *r.points.entry(point.clone()).or_default() += times;
                }
                r.largest_set = r.largest_set.max(outcome.most);
                if matches!(case.kills, Kills::By(_)) {
                    r.with_kills += 1;
                    r.without_a_crash += u64::from(outcome.deaths == 0);
                }
                if let Some(violation) = outcome.violation {
                    r.not_linearizable += 1;
                    reason = violation;
                }
            }
            Err(e) => {
                r.broken += 1;
                reason = format!("    {e:#}\n");
            }
        }
        let complaints = self.log.complaints();
        if !complaints.is_empty() {
            r.broken += u64::from(reason.is_empty());
            reason += &format!("    the kernel: {}\n", complaints.join("\n    "));
        }
        let name = case.to_string();
        let kind = name.split('/').nth(1).unwrap_or_default();
        let (histories, failed) = r.kinds.entry(kind.into()).or_default();
        *histories += 1;
        if reason.is_empty() {
            return;
        }
        *failed += 1;
        println!("{name}:\n{reason}    again: {}", self.again(case));
        if self.results.failures.len() < 200 {
            self.results.failures.push(Failure { case: name, reason });
        }
    }

    /// The same calls and the same deaths; the order is the machine's, so it is tried more than once.
    fn again(&self, case: &Case) -> String {
        format!(
            "fuse-restart race --seed {} --case {case} --processes {} --operations {}{}{} --rounds 20",
            self.race.seed,
            self.race.processes,
            self.race.operations,
            if self.args.no_journal { " --no-journal" } else { "" },
            if self.args.resend_only { " --resend-only" } else { "" },
        )
    }

    fn tell(&mut self, n: usize, of: usize) {
        let took = self.began.elapsed().as_secs_f64();
        let left = took / n as f64 * (of - n) as f64;
        let left = match self.args.seconds {
            Some(limit) => left.min(limit as f64 - took),
            None => left,
        };
        println!(
            "{n} of {of} histories, {} crashes, {} failed, {took:.0} s, about {:.0} min left",
            self.results.crashes,
            self.results.failed(),
            (left / 60.0).max(0.0).ceil()
        );
        if let Err(e) = self.save() {
            println!("{e:#}");
        }
    }

    fn save(&mut self) -> Result<()> {
        self.results.seconds = self.began.elapsed().as_secs_f64();
        let Some(path) = &self.args.json else {
            return Ok(());
        };
        let text = serde_json::to_string_pretty(&self.results)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_in_which_hardly_anybody_dies_tests_nothing() {
        let of = |with_kills, without_a_crash| Results {
            with_kills,
            without_a_crash,
            ..Results::default()
        };
        assert!(of(0, 0).enough_died() && of(8, 2).enough_died());
        assert!(!of(8, 3).enough_died() && !of(1, 1).enough_died());
    }
}
