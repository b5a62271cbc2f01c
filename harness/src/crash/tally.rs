// SPDX-License-Identifier: GPL-2.0
//! Results: counted by opcode and point, kept in a file so that a run can be gone on with, shown as a table.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::cells::Expected;
use super::plan::{Case, Group, Kill};
use crate::earlier::{self, Of};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Same,
    /// Results or trees are others than without a crash.
    Differs,
    /// Somebody hangs, something is left over, counts are wrong, the kernel complains.
    Broken,
    /// The server did not come to the point: nothing was tested.
    Unreached,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cell {
    pub cases: u64,
    pub differ: u64,
    pub broken: u64,
    pub unreached: u64,
    /// Deaths here.
    #[serde(default)]
    pub crashes: u64,
    /// Cases that came to an end and could differ, by what [`super::cells`] says.
    #[serde(default)]
    pub could: u64,
    /// Of those that differ: another thread's request could be the reason.
    #[serde(default)]
    pub beside: u64,
    /// Of those that differ: could not.
    #[serde(default)]
    pub refuted: u64,
}

impl Cell {
    fn add(&mut self, verdict: Verdict, expected: Expected) {
        self.cases += 1;
        if verdict == Verdict::Differs {
            self.beside += u64::from(expected.beside);
            self.refuted += u64::from(expected.surprise());
        }
        let tested = matches!(verdict, Verdict::Same | Verdict::Differs);
        self.could += u64::from(tested && expected.could && !expected.chance);
        match verdict {
            Verdict::Same => {}
            Verdict::Differs => self.differ += 1,
            Verdict::Broken => self.broken += 1,
            Verdict::Unreached => self.unreached += 1,
        }
    }

    pub fn sum(&mut self, other: &Cell) {
        self.cases += other.cases;
        self.differ += other.differ;
        self.broken += other.broken;
        self.unreached += other.unreached;
        self.crashes += other.crashes;
        self.could += other.could;
        self.beside += other.beside;
        self.refuted += other.refuted;
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    pub case: String,
    pub verdict: Verdict,
    pub reason: String,
    /// The shortest workload that was found to show it.
    pub shortest: Option<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    pub kernel: String,
    /// Of kernel and program, see [`crate::scenario::runner::build`].
    #[serde(default)]
    pub build: String,
    pub seed: u64,
    pub mode: String,
    /// Groups that were done to the end.
    pub done: BTreeSet<String>,
    /// By dimension, then by point (`then POINT` for the second of two deaths).
    pub cells: BTreeMap<String, BTreeMap<String, Cell>>,
    /// Times that a server killed itself.
    pub crashes: u64,
    /// Times that a case was run once more, for its point was not reached.
    #[serde(default)]
    pub again: u64,
    pub seconds: f64,
    pub failures: Vec<Failure>,
    /// Of a mode that lacks something: what became of each cell. Found anew by who goes on.
    #[serde(skip_deserializing, skip_serializing_if = "Option::is_none")]
    pub explained: Option<super::explained::Explained>,
}

/// Writes results as JSON. Whole or not at all: a run may be ended at any time.
pub fn write(results: &impl Serialize, path: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(results)? + "\n";
    let fresh = path.with_extension("new");
    let put = || {
        std::fs::write(&fresh, &text)?;
        std::fs::rename(&fresh, path)
    };
    // The guest's OUT file may be one that cannot be replaced.
    put()
        .or_else(|_| std::fs::write(path, &text))
        .with_context(|| format!("cannot write {}", path.display()))
}

impl Tally {
    /// Goes on with what an earlier run has left.
    pub fn resume(path: &Path, new: &Tally) -> Result<Tally> {
        let old: Tally = earlier::read(path, "crash")?;
        earlier::ensure_same(path, &old.of(), &new.of())?;
        Ok(old)
    }

    fn of(&self) -> Of<'_> {
        Of {
            kernel: &self.kernel,
            build: &self.build,
            asked: format!("seed {} and mode {:?}", self.seed, self.mode),
        }
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        write(self, path)
    }

    /// Counts a case at the point of its last death, and each of the deaths that came at its own.
    pub fn add(&mut self, case: &Case, died: &[Kill], verdict: Verdict, expected: Expected) {
        self.crashes += died.len() as u64;
        let Some(last) = case.kills.last() else {
            return;
        };
        let of_dim = self.cells.entry(case.group.dim.name.into()).or_default();
        let second = |n: usize| n > 0 && !case.deaths().together;
        let of = if case.deaths().keeper { "keeper." } else { "" };
        for (n, kill) in died.iter().enumerate() {
            let then = if second(n) { "then " } else { "" };
            let name = format!("{then}{of}{}", kill.point);
            of_dim.entry(name).or_default().crashes += 1;
        }
        let name = match (case.deaths().together, case.kills.len()) {
            (true, _) => "many.case".to_owned(),
            (_, 1) => format!("{of}{}", last.point),
            _ => format!("then {of}{}", last.point),
        };
        of_dim.entry(name).or_default().add(verdict, expected);
    }

    /// Not even the run without a crash went well.
    pub fn add_oracle(&mut self, group: &Group) {
        let of_dim = self.cells.entry(group.dim.name.into()).or_default();
        of_dim
            .entry("oracle.run".into())
            .or_default()
            .add(Verdict::Broken, Expected::default());
    }

    /// The cases of another one with those of this.
    pub fn sum(&mut self, other: &Tally) {
        self.crashes += other.crashes;
        self.again += other.again;
        for (dim, cells) in &other.cells {
            let of_dim = self.cells.entry(dim.clone()).or_default();
            for (name, cell) in cells {
                of_dim.entry(name.clone()).or_default().sum(cell);
            }
        }
    }

    /// Once for each case: the same may fail again when its group is run again.
    pub fn keep(&mut self, failure: Failure) {
        let known = self.failures.iter_mut().find(|f| f.case == failure.case);
        match known {
            Some(known) => *known = failure,
            None => self.failures.push(failure),
        }
    }

    pub fn total(&self) -> Cell {
        let mut total = Cell::default();
        for cell in self.cells.values().flat_map(BTreeMap::values) {
            total.sum(cell);
        }
        total
    }

    pub fn failed(&self) -> u64 {
        let total = self.total();
        total.differ + total.broken + total.unreached
    }

    fn by_point(&self) -> BTreeMap<&str, Cell> {
        let mut points: BTreeMap<&str, Cell> = BTreeMap::new();
        for (name, cell) in self.cells.values().flatten() {
            points.entry(name).or_default().sum(cell);
        }
        points
    }

    /// A row for each opcode and point, and one for each dimension.
    pub fn table(&self, markdown: bool) -> String {
        let mut rows = Vec::new();
        for (name, cell) in self.by_point() {
            let second = name.strip_prefix("then ");
            let (opcode, point) = second.unwrap_or(name).split_once('.').unwrap_or((name, ""));
            let point = match second {
                Some(_) => format!("{point} (second death)"),
                None => point.to_owned(),
            };
            rows.push((opcode.to_owned(), point, cell));
        }
        rows.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
        for (dim, cells) in &self.cells {
            let mut all = Cell::default();
            cells.values().for_each(|cell| all.sum(cell));
            rows.push(("all".into(), dim.clone(), all));
        }
        rows.push(("all".into(), "all".into(), self.total()));
        let mut text = String::new();
        let mut line = |columns: [String; 7]| {
            text += &match markdown {
                true => format!("| {} |\n", columns.join(" | ")),
                false => format!(
                    "{:<16} {:<36} {:>7} {:>7} {:>7} {:>7} {:>9}\n",
                    columns[0],
                    columns[1],
                    columns[2],
                    columns[3],
                    columns[4],
                    columns[5],
                    columns[6]
                ),
            };
        };
        let head = [
            "opcode",
            "point",
            "crashes",
            "cases",
            "differ",
            "broken",
            "unreached",
        ];
        line(head.map(str::to_owned));
        if markdown {
            line(["---", "---", "---:", "---:", "---:", "---:", "---:"].map(str::to_owned));
        }
        for (opcode, point, cell) in rows {
            let numbers = [
                cell.crashes,
                cell.cases,
                cell.differ,
                cell.broken,
                cell.unreached,
            ];
            let [crashes, cases, differ, broken, unreached] = numbers.map(|n| n.to_string());
            line([opcode, point, crashes, cases, differ, broken, unreached]);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally() -> Tally {
        let mut tally = Tally {
            kernel: "7.3.4".into(),
            seed: 3,
            mode: "whole".into(),
            ..Tally::default()
        };
        let mut add = |text: &str, died: usize, verdict| {
            let case = text.parse::<Case>().unwrap();
            tally.add(&case, &case.kills[..died], verdict, Expected::default());
        };
        add("t1-wt/mkdir/0/mkdir.intent:1", 1, Verdict::Same);
        add("t4-wt/mkdir/0/mkdir.intent:2", 1, Verdict::Differs);
        let twice = "t1-wt/twice/0/mkdir.intent:1+recover.replay:4";
        add(twice, 2, Verdict::Broken);
        add("t1-wt/mkdir/0/mkdir.mkdirat:9", 0, Verdict::Unreached);
        let many = "t1-wt/many/0/mkdir.intent:2+mkdir.reply:3+recover.replay:9";
        add(many, 2, Verdict::Same);
        tally
    }

    #[test]
    fn cases_are_counted_where_they_belong() {
        let tally = tally();
        assert_eq!((tally.crashes, tally.failed()), (6, 3));
        assert_eq!(tally.total().crashes, 6);
        let points = tally.by_point();
        assert_eq!(
            (points["mkdir.intent"].cases, points["mkdir.intent"].differ),
            (2, 1)
        );
        assert_eq!(points["then recover.replay"].broken, 1);
        let text = tally.table(true);
        assert!(
            text.contains("| mkdir | intent | 4 | 2 | 1 | 0 | 0 |"),
            "{text}"
        );
        assert!(
            text.contains("| recover | replay (second death) | 1 | 1 | 0 | 1 | 0 |"),
            "{text}"
        );
        assert!(
            text.contains("| many | case | 0 | 1 | 0 | 0 | 0 |"),
            "{text}"
        );
        assert!(text.contains("| all | all | 6 | 5 | 1 | 1 | 1 |"), "{text}");
    }

    #[test]
    fn a_run_is_gone_on_with_only_if_it_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("result.json");
        let one = tally();
        one.write(&path).unwrap();
        assert_eq!(Tally::resume(&path, &one).unwrap().total(), one.total());
        let other = Tally { seed: 4, ..tally() };
        assert!(Tally::resume(&path, &other).is_err());
        let kernel = Tally {
            kernel: "7.4.0".into(),
            ..tally()
        };
        let refused = Tally::resume(&path, &kernel).unwrap_err().to_string();
        assert!(
            refused.contains("7.3.4") && refused.contains("7.4.0"),
            "{refused}"
        );
        let build = Tally {
            build: "#2".into(),
            ..tally()
        };
        let refused = Tally::resume(&path, &build).unwrap_err().to_string();
        assert!(refused.contains("another build"), "{refused}");
        assert!(Tally::resume(&dir.path().join("none"), &one).is_err());
    }
}
