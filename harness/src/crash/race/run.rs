// SPDX-License-Identifier: GPL-2.0
//! Many histories: which, until when, and what is told of them.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};

use super::case::{find_kills, Case, Kills, Outcome, Race, KILLS, MEET};
use super::results::{Results, Run};
use super::shared::MOST;
use super::Args;
use crate::crash::dim::{Dim, Mode, DIMS};
use crate::crash::kept::Setup;
use crate::crash::kmsg;
use crate::crash::run::Scratch;
use crate::crash::tally;
use crate::raw::wait::Rng;
use crate::scenario::runner::{self, interrupted};

const TELL_EVERY: Duration = Duration::from_secs(15);

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
    /// Seconds of earlier runs.
    before: f64,
}

impl<'a> All<'a> {
    fn new(args: &'a Args, race: &'a Race<'a>) -> Result<All<'a>> {
        let run = Run {
            kernel: runner::kernel()?,
            build: runner::build()?,
            seed: race.seed,
            mode: race.setup.mode.name().into(),
            processes: race.processes,
            calls: race.operations,
        };
        println!("kernel {}, seed {}, {}", run.kernel, run.seed, run.mode);
        let results = match &args.resume {
            Some(path) => Results::resume(path, &run)?,
            None => Results {
                run,
                ..Results::default()
            },
        };
        Ok(All {
            args,
            race,
            before: results.seconds,
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
        let todo = self.results.todo(cases);
        for (n, case) in todo.iter().enumerate() {
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
                self.tell(n + 1, todo.len());
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
        let reason = self.results.add(case, outcome, &self.log.complaints());
        if !reason.is_empty() {
            println!("{case}:\n{reason}    again: {}", self.again(case));
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
        self.results.seconds = self.before + self.began.elapsed().as_secs_f64();
        match &self.args.json {
            Some(path) => tally::write(&self.results, path),
            None => Ok(()),
        }
    }
}
