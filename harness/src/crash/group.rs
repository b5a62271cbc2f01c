// SPDX-License-Identifier: GPL-2.0
//! All cases of one workload: it is run without a crash first, which tells what must come out and what is reached.

use anyhow::{bail, Context, Result};

use super::case::{self, difference, Observed, Run};
use super::cells::{self, Expected};
use super::dim::{Mode, DIMS};
use super::generate::{self, Focus, FOCUSES, JOURNALLED, MANY, MIXED};
use super::kept::Setup;
use super::op::Workload;
use super::plan;
use super::plan::{Case, Deaths, Group, Kill};
use super::rest::Rest;
use super::tally::Verdict;
use crate::crash_points::Seen;
use crate::raw::wait::Rng;

/// Points of a long workload that are tried in one round.
const OF_MIXED: usize = 16;

/// Cases of a workload with many deaths, and deaths of a case at most.
const OF_MANY: usize = 3;
const DEATHS: usize = 40;

/// Where an instance can die while it recovers. Nobody recovers without a crash, so these are not among what is reached
/// then.
const RECOVERY: &[&str] = &[
    "recover.start",
    "recover.restarted",
    "recover.resolved",
    "recover.replay",
    "recover.reported",
    "recover.settled",
    "recover.swept",
    "recover.init",
    "recover.decided",
    "recover.resolved-one",
    "recover.end",
];

/// Two of these are reached only if a server died with an intent.
fn of_every_recovery(point: &str) -> bool {
    RECOVERY.contains(&point) && !["recover.decided", "recover.resolved-one"].contains(&point)
}

/// The names that stand where a focus can.
pub fn names() -> Vec<&'static str> {
    let special = ["adopt", "twice", "mixed", plan::KEEPER, plan::MANY];
    FOCUSES.iter().map(|f| f.name).chain(special).collect()
}

/// A group that is being run.
pub struct Running<'a> {
    pub setup: &'a Setup<'a>,
    pub group: Group,
    pub workload: Workload,
    want: Observed,
    seen: Vec<Seen>,
    rng: Rng,
    /// Opcode whose points are tried.
    opcode: &'static str,
}

pub struct Judged {
    pub case: Case,
    pub verdict: Verdict,
    pub reason: String,
    /// What was reached, if anything was.
    seen: Vec<Seen>,
    /// The deaths that came.
    pub died: Vec<Kill>,
    /// What can be told of the deaths that came.
    pub expected: Expected,
    /// The case that it counts as: of the deaths that came, if it differs without the others.
    pub counted: Case,
}

/// Which workload a group has.
fn focus_of(group: &Group) -> Result<&'static Focus> {
    let name = match group.focus.as_str() {
        "mixed" | plan::KEEPER => return Ok(&MIXED),
        plan::MANY => return Ok(&MANY),
        "adopt" => "statfs",
        "twice" => {
            let dim = DIMS.iter().position(|dim| *dim == group.dim).unwrap_or(0) as u64;
            let nth = group.round * DIMS.len() as u64 + dim;
            JOURNALLED[(nth % JOURNALLED.len() as u64) as usize]
        }
        name => name,
    };
    generate::find(name).with_context(|| {
        format!(
            "no kind of workload is called {name:?}; there are {}",
            names().join(", ")
        )
    })
}

/// Seed of a group: another one for each, and always the same.
fn seed_of(group: &Group, seed: u64) -> u64 {
    let name = group.to_string();
    super::op::sum(name.as_bytes()) ^ Rng(seed).next()
}

pub fn workload(group: &Group, seed: u64) -> Result<Workload> {
    let focus = focus_of(group)?;
    Ok(generate::workload(
        focus,
        seed_of(group, seed),
        group.dim.procs(),
    ))
}

impl<'a> Running<'a> {
    /// Runs the workload without a crash.
    pub fn begin(setup: &'a Setup<'a>, group: &Group, seed: u64) -> Result<Running<'a>> {
        let workload = workload(group, seed)?;
        let oracle = case::run(setup, &group.dim, &workload, Deaths::NONE)
            .with_context(|| format!("{group}/, without a crash"))?;
        if let Some(problem) = problem(&oracle) {
            bail!("{group}/, without a crash:\n{problem}");
        }
        if let Some(line) = oracle.observed.program_that_failed() {
            bail!("{group}/, without a crash a program fails:\n{line}");
        }
        let opcode = match group.focus.as_str() {
            "adopt" => "adopt",
            _ => focus_of(group)?.opcode,
        };
        Ok(Running {
            setup,
            group: group.clone(),
            workload,
            want: oracle.observed,
            seen: oracle.seen,
            rng: Rng(seed_of(group, seed) ^ 0x6372_6173_6821),
            opcode,
        })
    }

    /// What comes out and what is reached without a crash, for somebody who looks for a case.
    pub fn told(&self) -> String {
        let logs = self.want.logs.iter().flat_map(|(id, lines)| {
            let process = [format!("  process {id}:")].into_iter();
            process.chain(lines.iter().map(|line| format!("    {line}")))
        });
        let reached = self.seen.iter().filter(|seen| seen.reached > 0);
        let reached = reached.map(|seen| format!("  {} {}", seen.name, seen.reached));
        logs.chain(reached).collect::<Vec<_>>().join("\n")
    }

    /// The cases with one death that this workload can have, one for each point that it reaches.
    pub fn cases(&mut self) -> Vec<Case> {
        if self.group.focus == plan::MANY {
            return (0..OF_MANY).map(|_| self.many()).collect();
        }
        let all = self.opcode.is_empty();
        let mut reached: Vec<Seen> = self.seen.clone();
        reached.retain(|seen| {
            let opcode = seen.name.split('.').next().unwrap_or_default();
            seen.reached > 0 && (opcode == self.opcode || (all && opcode != "adopt"))
        });
        if all || self.group.focus == "twice" {
            self.rng.shuffle(&mut reached);
            reached.truncate(if all { OF_MIXED } else { 1 });
        }
        let points = reached.into_iter();
        points
            .map(|seen| {
                let nth = 1 + self.rng.below(self.often(&seen) as usize) as u64;
                self.case(vec![Kill::new(&seen.name, nth)])
            })
            .collect()
    }

    /// How often a point is reached for sure: several threads do not come to it as often each time.
    fn often(&self, seen: &Seen) -> u64 {
        match self.group.dim.threads {
            1 => seen.reached,
            _ => seen.reached - seen.reached / 4,
        }
    }

    /// A case in which the server dies at some forty points of its work, and some instances at once again.
    fn many(&mut self) -> Case {
        let mut points: Vec<(String, u64)> = self
            .seen
            .iter()
            .filter(|seen| seen.reached > 0 && !seen.name.starts_with("adopt."))
            .map(|seen| (seen.name.clone(), seen.reached))
            .collect();
        self.rng.shuffle(&mut points);
        points.truncate(DEATHS - RECOVERY.len());
        // As many recoveries as there are deaths, and more inodes than that.
        let recovery = RECOVERY
            .iter()
            .map(|name| ((*name).to_owned(), DEATHS as u64 / 2));
        points.extend(recovery);
        let kills = points.into_iter().map(|(name, reached)| {
            let nth = 1 + self.rng.below(reached as usize) as u64;
            Kill::new(&name, nth)
        });
        let kills = kills.collect();
        self.case(kills)
    }

    /// The cases in which the next instance dies as well, of one whose deaths are known.
    pub fn then(&mut self, first: &Judged) -> Vec<Case> {
        let keeper = self.group.focus == plan::KEEPER;
        let twice = keeper || self.group.focus == "twice";
        if !twice || first.case.kills.len() != 1 || first.died.is_empty() {
            return Vec::new();
        }
        let kill = first.case.kills[0].clone();
        let opcode = kill.parts().0.to_owned();
        if keeper && ["none", "adopt"].contains(&opcode.as_str()) {
            // Whether the server came so far that the next one has something to recover is chance.
            return Vec::new();
        }
        let again = first.seen.iter().filter(|seen| {
            let of = seen.name.split('.').next().unwrap_or_default();
            // A point can hold one order at a time. Whether a request is sent again when its server went on for a moment
            // after the keeper's death, is chance.
            let again = of == "recover" || (of == opcode && !keeper);
            // Nor is it sure what it left: an intent, a grave.
            let sure = !keeper || of_every_recovery(&seen.name);
            seen.since_death > 0 && again && sure && seen.name != kill.point
        });
        let mut again: Vec<Seen> = again.cloned().collect();
        if keeper {
            // What a server is doing then matters less.
            self.rng.shuffle(&mut again);
            again.truncate(1);
        }
        let mut cases = Vec::new();
        for seen in again {
            // How many inodes are shown, say, is not the same each time with several threads.
            let often = match self.group.dim.threads == 1 && !keeper {
                true => seen.since_death,
                false => seen.since_death.div_ceil(2),
            };
            let nth = 1 + self.rng.below(often as usize) as u64;
            cases.push(self.case(vec![kill.clone(), Kill::new(&seen.name, nth)]));
        }
        cases
    }

    fn case(&self, kills: Vec<Kill>) -> Case {
        Case {
            group: self.group.clone(),
            kills,
        }
    }

    pub fn judge(&self, case: &Case) -> Judged {
        self.judge_on(case, &self.workload, &self.want)
    }

    fn judge_on(&self, case: &Case, workload: &Workload, want: &Observed) -> Judged {
        let result = case::run(self.setup, &case.group.dim, workload, case.deaths());
        let none = Judged {
            case: case.clone(),
            verdict: Verdict::Unreached,
            reason: String::new(),
            seen: Vec::new(),
            died: Vec::new(),
            expected: cells::expected(self.setup.mode, case, &[]),
            counted: case.clone(),
        };
        match result {
            Ok(run) => {
                let mode = self.setup.mode;
                let (verdict, reason) = verdict(mode, &case.group, want, &run);
                let counted = counted(case, verdict, &run);
                Judged {
                    verdict,
                    reason,
                    expected: cells::expected(mode, &counted, &run.beside),
                    counted,
                    seen: run.seen,
                    died: run.died,
                    ..none
                }
            }
            // What else it was told to die of may not have come.
            Err(e) => Judged {
                verdict: Verdict::Broken,
                reason: format!("{e:#}"),
                died: case.kills.first().cloned().into_iter().collect(),
                ..none
            },
        }
    }

    /// Whether the oracle says the same once more; if not, that is the defect.
    pub fn oracle_is_stable(&self) -> Result<Option<String>> {
        let again = case::run(self.setup, &self.group.dim, &self.workload, Deaths::NONE)?;
        Ok(difference(&self.want, &again.observed))
    }

    /// As few of many deaths as still show what `judged` is about, in the same workload.
    fn fewer_deaths(&self, judged: &Judged, tries: usize) -> Option<(Case, String)> {
        let mut found = None;
        let mut best = judged.died.clone();
        let mut left = tries;
        let mut size = best.len().div_ceil(2);
        while size > 0 && left > 0 {
            let mut from = 0;
            while from < best.len() && best.len() > size && left > 0 {
                let mut fewer = best.clone();
                fewer.drain(from..(from + size).min(best.len()));
                let again = self.judge(&self.case(fewer));
                left -= 1;
                if again.verdict == judged.verdict {
                    best = again.case.kills.clone();
                    found = Some((again.case, again.reason));
                } else {
                    from += size;
                }
            }
            size /= 2;
        }
        found
    }

    /// The shortest workload that still shows what `judged` is about, and at which reach.
    pub fn shortest(&self, judged: &Judged, tries: usize) -> Option<(Workload, Case, String)> {
        let together = judged.case.deaths().together;
        let mut found = together.then(|| self.fewer_deaths(judged, tries)).flatten();
        let kills = match &found {
            Some((case, _)) => case.kills.clone(),
            None if together => judged.died.clone(),
            None => judged.case.kills.clone(),
        };
        let best = super::minimise::shortest(&self.workload, tries, |candidate| {
            let Ok(oracle) = case::run(self.setup, &self.group.dim, candidate, Deaths::NONE) else {
                return false;
            };
            let reached = |point: &str| {
                let of_point = oracle.seen.iter().find(|seen| seen.name == point);
                of_point.map_or(0, |seen| seen.reached)
            };
            for kills in elsewhere(&kills, together, reached) {
                let case = self.case(kills);
                let again = self.judge_on(&case, candidate, &oracle.observed);
                if again.verdict == judged.verdict {
                    found = Some((case, again.reason));
                    return true;
                }
            }
            false
        });
        found.map(|(case, reason)| (best, case, reason))
    }
}

/// Where to die in a shorter workload.
fn elsewhere(kills: &[Kill], together: bool, reached: impl Fn(&str) -> u64) -> Vec<Vec<Kill>> {
    let Some((first, later)) = kills.split_first() else {
        return Vec::new();
    };
    if together && !later.is_empty() {
        return all_elsewhere(kills, reached);
    }
    one_after_the_other(first, later, reached(&first.point))
}

/// Many deaths, each of which is counted from the start: where they were; each at the last time that the workload comes to
/// its point, if that is earlier. What it does not come to may be a point of a recovery.
fn all_elsewhere(kills: &[Kill], reached: impl Fn(&str) -> u64) -> Vec<Vec<Kill>> {
    let earlier = kills.iter().map(|kill| match reached(&kill.point) {
        0 => kill.clone(),
        times => Kill::new(&kill.point, kill.nth.min(times)),
    });
    let mut all = vec![kills.to_vec(), earlier.collect()];
    all.dedup();
    all
}

/// The workload comes to the point of the first death so many times: near to where it was, the last time, the first time.
/// Each death after that one is counted from it on, so it may be where it was, or the first.
fn one_after_the_other(first: &Kill, later: &[Kill], reached: u64) -> Vec<Vec<Kill>> {
    let mut nths = vec![first.nth.min(reached), reached, 1.min(reached)];
    nths.dedup();
    let at_once: Vec<_> = later.iter().map(|kill| Kill::new(&kill.point, 1)).collect();
    let mut laters = vec![later.to_vec(), at_once];
    laters.dedup();
    nths.into_iter()
        .filter(|nth| *nth > 0)
        .flat_map(|nth| {
            let first = Kill::new(&first.point, nth);
            laters
                .iter()
                .map(move |later| [std::slice::from_ref(&first), later].concat())
        })
        .collect()
}

/// What was compared counts, whether all deaths came or not: a request that was lost with the first is one that never comes
/// to the point of the second.
fn verdict(mode: Mode, group: &Group, want: &Observed, run: &Run) -> (Verdict, String) {
    let (verdict, reason) = judge(want, run);
    let Some(unreached) = &run.unreached else {
        return (verdict, reason);
    };
    let came = Case {
        group: group.clone(),
        kills: run.died.clone(),
    };
    let counts = match verdict {
        Verdict::Broken => true,
        Verdict::Differs => mode.whole() || cells::expected(mode, &came, &run.beside).surprise(),
        Verdict::Same | Verdict::Unreached => false,
    };
    match counts {
        true => (verdict, format!("{reason}\n    not reached: {unreached}")),
        false => (Verdict::Unreached, format!("not reached: {unreached}")),
    }
}

/// What differs although not all deaths came says something of those that did.
fn counted(case: &Case, verdict: Verdict, run: &Run) -> Case {
    let some = run.unreached.is_some() && verdict == Verdict::Differs && !run.died.is_empty();
    Case {
        group: case.group.clone(),
        kills: match some {
            true => run.died.clone(),
            false => case.kills.clone(),
        },
    }
}

fn judge(want: &Observed, run: &Run) -> (Verdict, String) {
    let problem = problem(run);
    if let Some(found) = difference(want, &run.observed) {
        let parts = [Some(found), problem].into_iter().flatten();
        return (Verdict::Differs, parts.collect::<Vec<_>>().join("\n"));
    }
    match problem {
        Some(problem) => (Verdict::Broken, problem),
        None => (Verdict::Same, String::new()),
    }
}

fn problem(run: &Run) -> Option<String> {
    run.rest.as_ref().and_then(Rest::problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deaths_go_with_the_workload() {
        let kill = Kill::new;
        let told = |kills: &[Kill], reached| -> Vec<Vec<u64>> {
            let all = elsewhere(kills, false, |_| reached);
            all.iter()
                .map(|kills| kills.iter().map(|kill| kill.nth).collect())
                .collect()
        };
        let one = [kill("write.intent", 5)];
        assert_eq!(told(&one, 9), [vec![5], vec![9], vec![1]]);
        assert_eq!(told(&one, 3), [vec![3], vec![1]]);
        assert_eq!(told(&one, 1), [vec![1]]);
        assert!(told(&one, 0).is_empty(), "it is not reached any more");
        let two = [kill("write.intent", 5), kill("recover.replay", 2)];
        assert_eq!(
            told(&two, 3),
            [vec![3, 2], vec![3, 1], vec![1, 2], vec![1, 1]]
        );
        let at_once = [kill("write.intent", 5), kill("recover.end", 1)];
        assert_eq!(told(&at_once, 5), [vec![5, 1], vec![1, 1]]);
        assert_eq!(elsewhere(&two, false, |_| 3)[0][1].point, "recover.replay");
    }

    #[test]
    fn many_deaths_go_with_the_workload() {
        let kill = Kill::new;
        let many = [kill("write.intent", 5), kill("recover.replay", 4)];
        let told = |reached| {
            elsewhere(
                &many,
                true,
                |p| if p == "write.intent" { reached } else { 0 },
            )
        };
        assert_eq!(told(9), [many.to_vec()]);
        let fewer = vec![kill("write.intent", 3), kill("recover.replay", 4)];
        assert_eq!(told(3), [many.to_vec(), fewer]);
        assert_eq!(
            elsewhere(&many[..1], true, |_| 3).len(),
            2,
            "one alone moves as one does"
        );
    }

    /// A lost request shows in what the application got, and in that the second death does not come.
    #[test]
    fn what_died_once_is_compared_though_it_was_to_die_twice() {
        let observed = |line: &str| Observed {
            logs: vec![(0, vec![line.into()])],
            mounted: Vec::new(),
            backing: Vec::new(),
        };
        let want = observed("0");
        let group = Group {
            dim: DIMS[0],
            focus: "twice".into(),
            round: 0,
        };
        let run = |line: &str, died: &[&str], unreached: bool| Run {
            observed: observed(line),
            seen: Vec::new(),
            rest: None,
            died: died.iter().map(|point| Kill::new(point, 1)).collect(),
            unreached: unreached.then(|| "recover.replay".to_owned()),
            beside: Vec::new(),
        };
        let whole = Mode {
            journal: true,
            sign: true,
        };
        let off = Mode {
            journal: false,
            sign: true,
        };
        use Verdict::{Differs, Same, Unreached};
        for (mode, run, expected) in [
            (whole, run("0", &["mkdir.mkdirat"], true), Unreached),
            (whole, run("EIO", &["mkdir.mkdirat"], true), Differs),
            (whole, run("EIO", &[], true), Differs),
            (whole, run("0", &["mkdir.mkdirat"], false), Same),
            // Without the journal it is to differ there, and says nothing of the second death; elsewhere it is not.
            (off, run("EEXIST", &["mkdir.mkdirat"], true), Unreached),
            (off, run("EEXIST", &["mkdir.start"], true), Differs),
            (off, run("EEXIST", &[], true), Differs),
            (off, run("EEXIST", &["mkdir.mkdirat"], false), Differs),
        ] {
            let died = run.died.clone();
            let (got, reason) = verdict(mode, &group, &want, &run);
            assert_eq!(got, expected, "{mode:?} {died:?}: {reason}");
        }
        // And it is counted where it died, and against the reason of that.
        let case: Case = "t1-wt/twice/0/mkdir.start:1+mkdir.mkdirat:1"
            .parse()
            .unwrap();
        let lost = run("EEXIST", &["mkdir.start"], true);
        let (got, _) = verdict(off, &group, &want, &lost);
        let at = counted(&case, got, &lost);
        assert_eq!(at.kills, [Kill::new("mkdir.start", 1)]);
        assert!(cells::expected(off, &at, &[]).surprise());
        assert!(!cells::expected(off, &case, &[]).surprise());
        let both = run("EEXIST", &["mkdir.start", "mkdir.mkdirat"], false);
        assert_eq!(counted(&case, Differs, &both).kills, case.kills);
    }

    #[test]
    fn every_name_stands_for_a_workload() {
        for focus in names() {
            for dim in DIMS {
                let group = Group {
                    dim,
                    focus: focus.into(),
                    round: 3,
                };
                let drawn = workload(&group, 1).unwrap();
                assert!(drawn.len() > 1, "{group}");
                assert_eq!(drawn.procs.len(), dim.procs());
            }
        }
        let unknown = Group {
            dim: DIMS[0],
            focus: "none".into(),
            round: 0,
        };
        assert!(workload(&unknown, 1).is_err());
    }
}
