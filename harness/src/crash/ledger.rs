// SPDX-License-Identifier: GPL-2.0
//! Which results count. A run may be ended within a group, and who goes on with it runs that group again whole: so what
//! a group comes to enters the tally when it has ended, and is only shown before that.

use super::cells::Expected;
use super::plan::{Case, Group, Kill};
use super::tally::{Failure, Tally, Verdict};

pub struct Ledger {
    /// Of groups that were done to the end: what is written, and what a run goes on with.
    whole: Tally,
    /// Of the one that is under way, or was when the run was ended.
    part: Tally,
}

impl Ledger {
    pub fn new(whole: Tally) -> Ledger {
        Ledger {
            whole,
            part: Tally::default(),
        }
    }

    pub fn whole(&self) -> &Tally {
        &self.whole
    }

    pub fn is_done(&self, group: &Group) -> bool {
        self.whole.done.contains(&group.to_string())
    }

    /// See [`Tally::add`].
    pub fn add(&mut self, case: &Case, died: &[Kill], verdict: Verdict, expected: Expected) {
        self.part.add(case, died, verdict, expected);
    }

    /// A case is run once more.
    pub fn again(&mut self) {
        self.part.again += 1;
    }

    /// See [`Tally::add_oracle`].
    pub fn add_oracle(&mut self, group: &Group) {
        self.part.add_oracle(group);
    }

    /// A failure is kept at once: it was seen, whatever becomes of its group.
    pub fn keep(&mut self, failure: Failure) {
        self.whole.keep(failure);
    }

    /// All cases of the group were run.
    pub fn end(&mut self, group: &Group) {
        let part = std::mem::take(&mut self.part);
        self.whole.sum(&part);
        self.whole.done.insert(group.to_string());
    }

    /// What this run is told of: with the group that was not done to the end.
    pub fn shown(&self) -> Tally {
        let mut shown = self.whole.clone();
        shown.sum(&self.part);
        shown
    }

    /// Cases of the group that was not done to the end.
    pub fn unfinished(&self) -> u64 {
        self.part.total().cases
    }

    pub fn failed(&self) -> u64 {
        self.whole.failed() + self.part.failed()
    }

    /// Failures of a group that was ended, which did not come again when it was run again. (If all are kept.)
    pub fn once(&self) -> u64 {
        (self.whole.failures.len() as u64).saturating_sub(self.failed())
    }

    pub fn took(&mut self, seconds: f64) {
        self.whole.seconds = seconds;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUPS: [&str; 3] = ["t1-wt/mkdir/0", "t4-wt/twice/1", "t1-wt/none/0"];

    fn cases(group: &str) -> Vec<(Case, Verdict)> {
        let of = |points: &[(&str, Verdict)]| -> Vec<(Case, Verdict)> {
            let case = |point| format!("{group}/{point}").parse().unwrap();
            points.iter().map(|(p, v)| (case(p), *v)).collect()
        };
        match group {
            "t1-wt/mkdir/0" => of(&[
                ("mkdir.start:1", Verdict::Same),
                ("mkdir.intent:2", Verdict::Differs),
                ("mkdir.end:1", Verdict::Same),
            ]),
            "t4-wt/twice/1" => of(&[
                ("link.linkat:1", Verdict::Broken),
                ("link.linkat:1+recover.replay:4", Verdict::Same),
            ]),
            _ => Vec::new(),
        }
    }

    /// As the matrix does it, until so many cases were run.
    fn run(ledger: &mut Ledger, mut left: usize) {
        for name in GROUPS {
            let case: Case = format!("{name}/x.y:1").parse().unwrap();
            if ledger.is_done(&case.group) {
                continue;
            }
            let all = cases(name);
            if all.is_empty() {
                ledger.add_oracle(&case.group);
            }
            for (case, verdict) in all {
                if left == 0 {
                    return;
                }
                left -= 1;
                ledger.add(&case, &case.kills, verdict, Expected::default());
                if verdict != Verdict::Same {
                    ledger.keep(Failure {
                        case: case.to_string(),
                        verdict,
                        reason: format!("{left} left"),
                        shortest: None,
                    });
                }
            }
            ledger.end(&case.group);
        }
    }

    fn told(tally: &Tally) -> (String, u64, Vec<&str>) {
        let failures = tally.failures.iter().map(|f| f.case.as_str());
        (tally.table(false), tally.crashes, failures.collect())
    }

    #[test]
    fn a_run_that_is_gone_on_with_counts_nothing_twice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("result.json");
        let mut undisturbed = Ledger::new(Tally::default());
        run(&mut undisturbed, usize::MAX);
        assert_eq!(undisturbed.unfinished(), 0);
        for ended_after in 0..=5 {
            let mut first = Ledger::new(Tally::default());
            run(&mut first, ended_after);
            // All of it is told of, and only whole groups are gone on with.
            let shown = first.shown().total();
            let oracles = u64::from(first.is_done(&group(GROUPS[2])));
            assert_eq!(shown.cases, ended_after as u64 + oracles);
            first.whole().write(&path).unwrap();

            let mut second = Ledger::new(Tally::resume(&path, &Tally::default()).unwrap());
            assert_eq!(
                second.shown().total().cases + first.unfinished(),
                shown.cases
            );
            run(&mut second, usize::MAX);
            assert_eq!(
                told(second.whole()),
                told(undisturbed.whole()),
                "ended after {ended_after}"
            );
            assert_eq!(second.failed(), undisturbed.failed());
        }
    }

    #[test]
    fn a_failure_is_kept_once_and_although_its_group_is_run_again() {
        let mut ledger = Ledger::new(Tally::default());
        run(&mut ledger, 2);
        assert_eq!((ledger.failed(), ledger.whole().failed()), (1, 0));
        assert_eq!(ledger.whole().failures.len(), 1);
        let mut again = Ledger::new(ledger.whole().clone());
        run(&mut again, 2);
        let [failure] = &again.whole().failures[..] else {
            panic!("{:?}", again.whole().failures);
        };
        assert_eq!(failure.case, "t1-wt/mkdir/0/mkdir.intent:2");
        assert_eq!(again.once(), 0);
        // Whoever does not see it again has not refuted it.
        let mut lucky = Ledger::new(ledger.whole().clone());
        lucky.end(&group(GROUPS[0]));
        assert_eq!((lucky.failed(), lucky.once()), (0, 1));
    }

    fn group(name: &str) -> Group {
        let case: Case = format!("{name}/x.y:1").parse().unwrap();
        case.group
    }
}
