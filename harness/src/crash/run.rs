// SPDX-License-Identifier: GPL-2.0
//! The whole matrix: which groups, in which order, until when, and what is told of it.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use nix::mount::{mount, umount2, MntFlags, MsFlags};

use super::dim::{Dim, Mode, DIMS};
use super::explained::Explained;
use super::group::{self, Judged, Running};
use super::kept::Setup;
use super::kmsg;
use super::ledger::Ledger;
use super::plan::{Case, Group, MANY};
use super::programs;
use super::tally::{Failure, Tally, Verdict};
use super::{Args, Switch};
use crate::raw::env::Env;
use crate::raw::wait::Rng;
use crate::scenario::runner::{self, interrupted};

/// How often the shortest workload is asked for.
const TRIES: usize = 60;
/// The same of a case that is broken: each try may wait in vain for as long as one waits.
const TRIES_OF_BROKEN: usize = 20;
/// How often a case is run at most whose point is not reached.
const ATTEMPTS: usize = 3;
const TELL_EVERY: Duration = Duration::from_secs(15);

pub fn run(args: &Args) -> Result<ExitCode> {
    let seed = args.seed.unwrap_or_else(runner::clock_seed);
    let case = args.case.as_deref().map(str::parse::<Case>).transpose()?;
    if let (true, Some(case)) = (args.print, &case) {
        print!("seed {seed}\n{}", group::workload(&case.group, seed)?);
        return Ok(ExitCode::SUCCESS);
    }
    let groups = groups(args, seed)?;
    let mode = Mode {
        journal: args.journal == Switch::On,
        sign: !args.resend_only,
    };
    let patience = args.patience.unwrap_or(if mode.sign { 120 } else { 10 });
    runner::with_env(Duration::from_secs(patience), seed, |env| {
        ensure!(
            env.support.series || !mode.sign,
            "this kernel does not offer FUSE_RESTARTABLE: boot one with the series (scripts/vm), or say --resend-only"
        );
        let scratch = Scratch::new(env)?;
        let setup = Setup {
            binary: std::fs::read_link("/proc/self/exe").context("which program is this")?,
            mode,
            patience: env.patience,
            scratch: &scratch.0,
        };
        let mut matrix = Matrix::new(args, &setup, seed)?;
        match &case {
            Some(case) => matrix.one(case),
            None => matrix.all(&groups),
        }
    })
}

/// Each round in an order of its own, so that a run that is ended early has something of everything.
fn groups(args: &Args, seed: u64) -> Result<Vec<Group>> {
    let known = group::names();
    for name in &args.only {
        if !known.contains(&name.as_str()) {
            bail!(
                "no kind of workload is called {name:?}; there are {}",
                known.join(", ")
            );
        }
    }
    let dims: Vec<Dim> = match args.dims.is_empty() {
        true => DIMS.into(),
        false => args
            .dims
            .iter()
            .map(|name| Dim::find(name))
            .collect::<Result<_>>()?,
    };
    let mut groups = Vec::new();
    for round in args.from..args.from + args.rounds {
        let first = groups.len();
        for focus in &known {
            // A workload of it takes as long as twenty others.
            let wanted = match args.only.is_empty() {
                true => *focus != MANY,
                false => args.only.iter().any(|name| name == focus),
            };
            if !wanted {
                continue;
            }
            if let Some(program) = programs::needed(focus).filter(|p| !programs::is_there(p)) {
                if round == args.from {
                    println!("{focus} is left out: there is no {program} here");
                }
                continue;
            }
            groups.extend(dims.iter().map(|dim| Group {
                dim: *dim,
                focus: (*focus).into(),
                round,
            }));
        }
        Rng(seed.wrapping_add(round)).shuffle(&mut groups[first..]);
    }
    Ok(groups)
}

/// A tmpfs of our own, in our own namespace: it has file handles, and nothing of it is left.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn new(env: &Env<'_>) -> Result<Scratch> {
        let dir = env.scratch.join("crash");
        std::fs::create_dir(&dir)?;
        // Not everybody in a workload is root.
        std::fs::set_permissions(env.scratch, Permissions::from_mode(0o755))?;
        // Access times that only somebody who sets them changes.
        let flags = MsFlags::MS_NOATIME;
        mount(Some("crash"), &dir, Some("tmpfs"), flags, Some("mode=755"))
            .with_context(|| format!("cannot mount a tmpfs on {}", dir.display()))?;
        Ok(Scratch(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

struct Matrix<'a> {
    args: &'a Args,
    setup: &'a Setup<'a>,
    seed: u64,
    ledger: Ledger,
    log: kmsg::Log,
    began: Instant,
    told: Instant,
    /// Of earlier runs.
    before: f64,
}

impl<'a> Matrix<'a> {
    fn new(args: &'a Args, setup: &'a Setup<'a>, seed: u64) -> Result<Matrix<'a>> {
        let mut tally = Tally {
            kernel: runner::kernel()?,
            build: runner::build()?,
            seed,
            mode: setup.mode.name().into(),
            ..Tally::default()
        };
        if let Some(path) = &args.resume {
            tally = Tally::resume(path, &tally)?;
        }
        println!("kernel {}, seed {seed}, {}", tally.kernel, tally.mode);
        Ok(Matrix {
            args,
            setup,
            seed,
            before: tally.seconds,
            ledger: Ledger::new(tally),
            log: kmsg::Log::open(),
            began: Instant::now(),
            told: Instant::now(),
        })
    }

    fn one(&mut self, case: &Case) -> Result<ExitCode> {
        let running = Running::begin(self.setup, &case.group, self.seed)?;
        if case.kills.is_empty() {
            println!("without a crash:\n{}", running.told());
            return Ok(ExitCode::SUCCESS);
        }
        let mut judged = running.judge(case);
        self.complaints(&mut judged);
        println!("{case}: {:?}\n{}", judged.verdict, judged.reason);
        if self.count(&judged) {
            println!("  (against the reason of its cell)");
        }
        if judged.verdict == Verdict::Differs && !self.args.no_shortest {
            println!("{}", shortest(&running, &judged, TRIES).unwrap_or_default());
        }
        Ok(exit(judged.verdict == Verdict::Same))
    }

    fn all(&mut self, groups: &[Group]) -> Result<ExitCode> {
        let whole = self.setup.mode.whole();
        let enough = self
            .args
            .failures
            .unwrap_or(if whole { 10 } else { u64::MAX });
        let todo: Vec<&Group> = groups
            .iter()
            .filter(|group| !self.ledger.is_done(group))
            .collect();
        let mut ended = "";
        for (n, group) in todo.iter().enumerate() {
            if self.time_is_up() {
                ended = " (the time was up)";
                break;
            }
            self.tell(n, todo.len());
            if self.group(group, enough)? {
                self.ledger.end(group);
            }
            if interrupted() {
                ended = " (interrupted)";
                break;
            }
            if self.ledger.failed() >= enough {
                ended = " (enough failed)";
                break;
            }
        }
        self.save()?;
        let shown = self.shown();
        let total = shown.total();
        print!("{}", shown.table(false));
        let mut cells = String::new();
        if let Some(explained) = &shown.explained {
            print!("\n{}", explained.table());
            cells = format!("; {}", explained.summary());
        }
        if self.ledger.unfinished() > 0 {
            println!(
                "{} of the cases are of a workload that was not done to the end: who goes on begins it again",
                self.ledger.unfinished()
            );
        }
        if whole && self.ledger.once() > 0 {
            println!(
                "{} failures are kept of workloads that were ended, and did not come again",
                self.ledger.once()
            );
        }
        println!(
            "{} cases, {} crashes, {} differ, {} broken, {} not reached ({} times once more){cells}, {:.0} s{ended}",
            total.cases,
            shown.crashes,
            total.differ,
            total.broken,
            total.unreached,
            shown.again,
            shown.seconds
        );
        // Without the journal, or without the series, each difference must be where one can be, and there must be one
        // wherever one can be. (In a short run there is not.)
        let fine = match &shown.explained {
            None => shown.failures.is_empty() && shown.failed() == 0 && total.cases > 0,
            Some(explained) => explained.fine(),
        };
        Ok(exit(fine))
    }

    fn time_is_up(&self) -> bool {
        let limit = self.args.seconds;
        limit.is_some_and(|s| self.began.elapsed().as_secs() >= s)
    }

    /// All cases of a group; false if it was ended before.
    fn group(&mut self, group: &Group, enough: u64) -> Result<bool> {
        let mut running = match Running::begin(self.setup, group, self.seed) {
            Ok(running) => running,
            Err(_) if interrupted() => return Ok(false),
            Err(e) => {
                self.not_an_oracle(group, format!("{e:#}"));
                return Ok(true);
            }
        };
        let mut cases = running.cases();
        if cases.is_empty() {
            self.not_an_oracle(
                group,
                "its workload comes to no point that is to be tried".into(),
            );
        }
        while let Some(case) = cases.pop() {
            // A program's workload can take minutes.
            if self.time_is_up() {
                return Ok(false);
            }
            let mut judged = running.judge(&case);
            // How often several threads, or a program, come to a point is not always the same.
            for _ in 1..ATTEMPTS {
                if judged.verdict != Verdict::Unreached || interrupted() {
                    break;
                }
                if self.setup.mode.whole() {
                    println!("once more: {case}: {}", judged.reason);
                }
                self.ledger.again();
                judged = running.judge(&case);
            }
            if interrupted() {
                return Ok(false);
            }
            self.complaints(&mut judged);
            let refuted = self.count(&judged);
            if judged.verdict != Verdict::Same {
                self.failed(&running, &judged, refuted);
                if self.ledger.failed() >= enough {
                    return Ok(false);
                }
            }
            cases.extend(running.then(&judged));
        }
        Ok(true)
    }

    /// Whether it differs although there is a reason why it cannot.
    fn count(&mut self, judged: &Judged) -> bool {
        let expected = judged.expected;
        self.ledger
            .add(&judged.counted, &judged.died, judged.verdict, expected);
        judged.verdict == Verdict::Differs && expected.surprise() && !self.setup.mode.whole()
    }

    /// A workload that tests nothing is a failure.
    fn not_an_oracle(&mut self, group: &Group, reason: String) {
        println!("{group}/: {reason}");
        self.ledger.add_oracle(group);
        self.ledger.keep(Failure {
            case: format!("{group}/"),
            verdict: Verdict::Broken,
            reason,
            shortest: None,
        });
    }

    fn complaints(&mut self, judged: &mut Judged) {
        let complaints = self.log.complaints();
        if !complaints.is_empty() {
            judged.verdict = Verdict::Broken;
            judged.reason += &format!("    the kernel: {}", complaints.join("\n    "));
        }
    }

    fn failed(&mut self, running: &Running<'_>, judged: &Judged, refuted: bool) {
        let whole = self.setup.mode.whole();
        let expected = !whole && judged.verdict == Verdict::Differs && !refuted;
        let case = judged.case.to_string();
        let mut reason = judged.reason.clone();
        let mut short = None;
        if !expected {
            let against = if refuted { ", against the reason" } else { "" };
            println!("{:?}{against}: {case}\n{reason}", judged.verdict);
            println!(
                "  again: fuse-restart crash --seed {}{} --case {case}",
                self.seed,
                self.setup.mode.asked()
            );
        }
        if whole && judged.verdict == Verdict::Differs {
            match running.oracle_is_stable() {
                Ok(None) => {}
                Ok(Some(other)) => {
                    reason +=
                        &format!("\n    and without a crash it is not always the same:\n{other}");
                    println!("  the oracle is not stable:\n{other}");
                }
                Err(e) => reason += &format!("\n    and without a crash: {e:#}"),
            }
        }
        let tries = match judged.verdict {
            Verdict::Differs => TRIES,
            Verdict::Broken => TRIES_OF_BROKEN,
            _ => 0,
        };
        if whole && tries > 0 && !self.args.no_shortest {
            short = shortest(running, judged, tries);
            println!("{}", short.clone().unwrap_or_default());
        }
        // There are thousands of these.
        if !expected || self.ledger.whole().failures.len() < 200 {
            self.ledger.keep(Failure {
                case,
                verdict: judged.verdict,
                reason,
                shortest: short,
            });
        }
    }

    fn tell(&mut self, group: usize, groups: usize) {
        if self.told.elapsed() < TELL_EVERY {
            return;
        }
        self.told = Instant::now();
        let total = self.ledger.whole().total();
        let took = self.began.elapsed().as_secs_f64();
        let left = took / group.max(1) as f64 * (groups - group) as f64;
        let left = match self.args.seconds {
            Some(limit) => left.min(limit as f64 - took),
            None => left,
        };
        println!(
            "{} cases, {} differ, {} broken, {} not reached; workload {group} of {groups}, {took:.0} s, about {:.0} min left",
            total.cases,
            total.differ,
            total.broken,
            total.unreached,
            (left / 60.0).max(0.0).ceil()
        );
        if let Err(e) = self.save() {
            println!("{e:#}");
        }
    }

    /// With the group that was not done to the end.
    fn shown(&self) -> Tally {
        self.explained(self.ledger.shown())
    }

    fn explained(&self, mut tally: Tally) -> Tally {
        let mode = self.setup.mode;
        tally.explained = (!mode.whole()).then(|| Explained::of(&tally, mode));
        tally
    }

    fn save(&mut self) -> Result<()> {
        self.ledger
            .took(self.before + self.began.elapsed().as_secs_f64());
        if let Some(path) = &self.args.json {
            self.explained(self.ledger.whole().clone()).write(path)?;
        }
        if let Some(path) = &self.args.markdown {
            let shown = self.shown();
            let mut text = shown.table(true);
            if let Some(explained) = &shown.explained {
                text += &format!("\n{}", explained.markdown());
            }
            write(path, &text)?;
        }
        Ok(())
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn shortest(running: &Running<'_>, judged: &Judged, tries: usize) -> Option<String> {
    let (workload, case, reason) = running.shortest(judged, tries)?;
    Some(format!(
        "  shortest workload that shows it ({} operations, killed at {}):\n{workload}{reason}",
        workload.len(),
        case.to_string().rsplit('/').next().unwrap_or_default()
    ))
}

fn exit(fine: bool) -> ExitCode {
    if fine {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
