// SPDX-License-Identifier: GPL-2.0
//! What many histories come to: counted, kept in a file, and gone on with.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::case::{Case, Kills, Outcome};
use crate::earlier::{self, Of};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub case: String,
    pub reason: String,
}

/// What a run is of. Results of another one do not add up with its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub kernel: String,
    /// Of kernel and program, see [`crate::scenario::runner::build`].
    pub build: String,
    pub seed: u64,
    pub mode: String,
    pub processes: usize,
    /// Of each process.
    pub calls: usize,
}

impl Run {
    fn of(&self) -> Of<'_> {
        Of {
            kernel: &self.kernel,
            build: &self.build,
            asked: format!(
                "seed {}, {}, {} processes with {} operations",
                self.seed, self.mode, self.processes, self.calls
            ),
        }
    }
}

/// What is written as JSON.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Results {
    #[serde(flatten)]
    pub run: Run,
    pub seconds: f64,
    pub histories: u64,
    pub operations: u64,
    /// Deaths of servers.
    pub crashes: u64,
    /// Histories that are not linearizable.
    pub not_linearizable: u64,
    /// Somebody hangs, something is left over, counts are wrong, the kernel complains.
    pub broken: u64,
    /// Histories in which the server was to die, and in how many of them it did not: these tested little.
    pub with_kills: u64,
    pub without_a_crash: u64,
    /// For each kind of case its histories, and how many of them failed.
    pub kinds: BTreeMap<String, (u64, u64)>,
    pub points: BTreeMap<String, u64>,
    /// The largest set of the judge.
    pub largest_set: usize,
    pub failures: Vec<Failure>,
    /// How often each case was run.
    pub done: BTreeMap<String, u64>,
}

impl Results {
    /// Goes on with what an earlier run has left.
    pub fn resume(path: &Path, run: &Run) -> Result<Results> {
        let old: Results = earlier::read(path, "race")?;
        earlier::ensure_same(path, &old.run.of(), &run.of())?;
        Ok(old)
    }

    /// What is yet to be run. A case that is there more than once is another try each time.
    pub fn todo<'a>(&self, cases: &'a [Case]) -> Vec<&'a Case> {
        let mut done = self.done.clone();
        let mut is_done = |case: &Case| match done.get_mut(&case.to_string()) {
            Some(times) if *times > 0 => {
                *times -= 1;
                true
            }
            _ => false,
        };
        cases.iter().filter(|case| !is_done(case)).collect()
    }

    /// Why it failed; empty if it did not.
    pub fn add(&mut self, case: &Case, outcome: Result<Outcome>, complaints: &[String]) -> String {
        self.histories += 1;
        let mut reason = String::new();
        match outcome {
            Ok(outcome) => {
                self.operations += outcome.operations;
                self.crashes += outcome.deaths;
                for (point, times) in &outcome.points {
                    *self.points.entry(point.clone()).or_default() += times;
                }
                self.largest_set = self.largest_set.max(outcome.most);
                if matches!(case.kills, Kills::By(_)) {
                    self.with_kills += 1;
                    self.without_a_crash += u64::from(outcome.deaths == 0);
                }
                if let Some(violation) = outcome.violation {
                    self.not_linearizable += 1;
                    reason = violation;
                }
            }
            Err(e) => {
                self.broken += 1;
                reason = format!("    {e:#}\n");
            }
        }
        if !complaints.is_empty() {
            self.broken += u64::from(reason.is_empty());
            reason += &format!("    the kernel: {}\n", complaints.join("\n    "));
        }
        let name = case.to_string();
        let kind = name.split('/').nth(1).unwrap_or_default();
        let (histories, failed) = self.kinds.entry(kind.into()).or_default();
        *histories += 1;
        *failed += u64::from(!reason.is_empty());
        *self.done.entry(name.clone()).or_default() += 1;
        if !reason.is_empty() && self.failures.len() < 200 {
            let reason = reason.clone();
            self.failures.push(Failure { case: name, reason });
        }
        reason
    }

    pub fn failed(&self) -> u64 {
        self.not_linearizable + self.broken
    }

    /// A point may never be reached; but where nobody dies nothing is tested.
    pub fn enough_died(&self) -> bool {
        self.without_a_crash * 4 <= self.with_kills
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crash::tally;

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

    fn this() -> Run {
        Run {
            kernel: "7.3.4".into(),
            build: "#1".into(),
            seed: 3,
            mode: "whole".into(),
            processes: 4,
            calls: 100,
        }
    }

    /// Another one for each case, of every kind.
    fn outcome(case: &Case) -> (Result<Outcome>, Vec<String>) {
        let fine = Outcome {
            operations: 400 + case.round,
            deaths: u64::from(case.round % 2 == 1),
            points: BTreeMap::from([(format!("mkdir.{}", case.round % 3), 2)]),
            most: 10 * case.round as usize,
            violation: (case.round == 2).then(|| "    mkdir = EEXIST\n".into()),
        };
        let complaints = (case.round == 4).then(|| "WARNING".to_owned());
        match case.round {
            3 => (Err(anyhow::anyhow!("hangs")), Vec::new()),
            _ => (Ok(fine), complaints.into_iter().collect()),
        }
    }

    /// As it is done, until so many cases were run.
    fn go_on(results: &mut Results, cases: &[Case], left: usize) {
        for case in results.todo(cases).into_iter().take(left) {
            let (outcome, complaints) = outcome(case);
            results.add(case, outcome, &complaints);
        }
    }

    #[test]
    fn a_run_that_is_gone_on_with_counts_nothing_twice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("result.json");
        let names = |names: &[&str]| -> Vec<Case> {
            names.iter().map(|name| name.parse().unwrap()).collect()
        };
        let each_once = names(&[
            "t4-wt/points/0",
            "c4-wb/points/1",
            "t1-wt/tmpfs/2",
            "t4-wt/signals/3",
            "t4-wt/signals/4",
            "t4-wt/none/5",
        ]);
        // As by --case: each is another try.
        let one_again = names(&["t4-wt/points/2"; 6]);
        for cases in [each_once, one_again] {
            let fresh = Results {
                run: this(),
                ..Results::default()
            };
            let mut undisturbed = fresh.clone();
            go_on(&mut undisturbed, &cases, usize::MAX);
            assert_eq!(undisturbed.histories, 6);
            assert!(undisturbed.failed() >= 3, "{undisturbed:?}");
            for ended_after in 0..=6 {
                let mut first = fresh.clone();
                go_on(&mut first, &cases, ended_after);
                assert_eq!(first.histories, ended_after as u64);
                tally::write(&first, &path).unwrap();
                let mut second = Results::resume(&path, &this()).unwrap();
                assert_eq!(second, first);
                go_on(&mut second, &cases, usize::MAX);
                assert_eq!(second, undisturbed, "ended after {ended_after}");
            }
        }
    }

    #[test]
    fn a_run_is_gone_on_with_only_if_it_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("result.json");
        let results = Results {
            run: this(),
            ..Results::default()
        };
        tally::write(&results, &path).unwrap();
        assert_eq!(Results::resume(&path, &this()).unwrap(), results);
        type Change = fn(&mut Run);
        let others: [(Change, &str); 6] = [
            (|run| run.kernel = "7.4.0".into(), "kernel 7.3.4"),
            (|run| run.build = "#2".into(), "another build"),
            (|run| run.seed = 4, "seed 3"),
            (|run| run.mode = "without journal".into(), "give the same"),
            (|run| run.processes = 5, "4 processes"),
            (|run| run.calls = 60, "100 operations"),
        ];
        for (change, said) in others {
            let mut other = this();
            change(&mut other);
            let refused = Results::resume(&path, &other).unwrap_err().to_string();
            assert!(refused.contains(said), "{refused}");
        }
        assert!(Results::resume(&dir.path().join("none"), &this()).is_err());
        std::fs::write(&path, "{}").unwrap();
        let refused = Results::resume(&path, &this()).unwrap_err().to_string();
        assert!(refused.contains("no result of"), "{refused}");
    }
}
