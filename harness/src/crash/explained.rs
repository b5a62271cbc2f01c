// SPDX-License-Identifier: GPL-2.0
//! What became of each cell when the server lacked something: it differs, or the reason why it cannot, or neither.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::cells::{self, Lacks};
use super::dim::{Dim, Mode};
use super::tally::{Cell, Tally};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fate {
    Differs,
    Reason,
    /// No case differs, and there is no reason; or nobody has written anything of it.
    Unexplained,
    /// A case differs, against the reason.
    Refuted,
    /// All its cases were broken, or did not come to the point.
    Untested,
}

/// Which death of its case a cell is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Death {
    First,
    Second,
    /// Of the keeper.
    Keeper,
    SecondKeeper,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    pub opcode: String,
    pub point: String,
    pub death: Death,
    /// With a descriptor for each thread, on a kernel that only sends again.
    pub cloned: bool,
    pub cases: u64,
    pub differ: u64,
    /// Of those that differ: another thread's request could be the reason.
    pub beside: u64,
    pub fate: Fate,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Explained {
    pub differ: usize,
    pub reasons: usize,
    pub unexplained: usize,
    pub refuted: usize,
    pub untested: usize,
    pub cells: Vec<Row>,
}

impl Explained {
    pub fn of(tally: &Tally, mode: Mode) -> Explained {
        let mut all: BTreeMap<(Lacks, &str), Cell> = BTreeMap::new();
        for (dim, points) in &tally.cells {
            let cloned = Dim::find(dim).is_ok_and(|dim| dim.cloned);
            for (name, cell) in points.iter().filter(|(_, cell)| cell.cases > 0) {
                let key = (Lacks::of(mode, cloned), name.as_str());
                all.entry(key).or_default().sum(cell);
            }
        }
        let mut cells: Vec<Row> = all
            .into_iter()
            .map(|((lacks, name), cell)| row(lacks, name, &cell))
            .collect();
        cells.sort_by(|a, b| {
            let key = |row: &Row| {
                let (opcode, point) = (row.opcode.clone(), row.point.clone());
                (row.cloned, row.death, opcode, point)
            };
            key(a).cmp(&key(b))
        });
        let count = |fate| cells.iter().filter(|row| row.fate == fate).count();
        Explained {
            differ: count(Fate::Differs),
            reasons: count(Fate::Reason),
            unexplained: count(Fate::Unexplained),
            refuted: count(Fate::Refuted),
            untested: count(Fate::Untested),
            cells,
        }
    }

    /// Something was looked at, and nothing is left open.
    pub fn fine(&self) -> bool {
        self.unexplained + self.refuted + self.untested == 0 && !self.cells.is_empty()
    }

    pub fn summary(&self) -> String {
        format!(
            "{} cells: {} differ, {} with a reason, {} unexplained, {} refuted, {} untested",
            self.cells.len(),
            self.differ,
            self.reasons,
            self.unexplained,
            self.refuted,
            self.untested
        )
    }

    /// A line for each cell.
    pub fn table(&self) -> String {
        let line = |columns: [&str; 6]| {
            let [opcode, point, cases, differ, beside, why] = columns;
            format!("{opcode:<16} {point:<34} {cases:>6} {differ:>6} {beside:>6}  {why}\n")
        };
        let head = ["opcode", "point", "cases", "differ", "beside", "or why not"];
        let mut text = line(head);
        for row in &self.cells {
            let numbers = [row.cases, row.differ, row.beside].map(|n| n.to_string());
            let [cases, differ, beside] = &numbers;
            let point = format!("{}{}", row.point, row.of());
            text += &line([&row.opcode, &point, cases, differ, beside, &row.why()]);
        }
        text
    }

    /// The same as Markdown: a line for what is of one opcode and has one reason, or differs.
    pub fn markdown(&self) -> String {
        let mut groups: Vec<(&Row, String)> = Vec::new();
        for row in &self.cells {
            let cases = match row.differ {
                0 => format!("{} {}", row.point, row.cases),
                differ => format!("{} {differ} of {}", row.point, row.cases),
            };
            let beside = match row.beside {
                0 => String::new(),
                beside => format!(" ({beside} beside)"),
            };
            let like = |(first, _): &&mut (&Row, String)| {
                (&first.opcode, first.of(), first.why()) == (&row.opcode, row.of(), row.why())
            };
            match groups.iter_mut().find(like) {
                Some((_, points)) => *points += &format!(", {cases}{beside}"),
                None => groups.push((row, cases + &beside)),
            }
        }
        let mut text = "| opcode | points with cases | or why not |\n|---|---|---|\n".to_owned();
        for (row, points) in groups {
            let (opcode, of, why) = (&row.opcode, row.of(), row.why());
            text += &format!("| {opcode}{of} | {points} | {why} |\n");
        }
        text
    }
}

impl Row {
    fn why(&self) -> String {
        let reason = self.reason.as_deref().unwrap_or_default();
        match self.fate {
            Fate::Differs => String::new(),
            Fate::Reason => reason.to_owned(),
            Fate::Unexplained => "unexplained".into(),
            Fate::Refuted => format!("reason refuted: {reason}"),
            Fate::Untested => "untested".into(),
        }
    }

    fn of(&self) -> &'static str {
        match (self.death, self.cloned) {
            (Death::First, false) => "",
            (Death::First, true) => " (cloned)",
            (Death::Second, false) => " (second death)",
            (Death::Second, true) => " (second death, cloned)",
            (Death::Keeper, false) => " (keeper)",
            (Death::Keeper, true) => " (keeper, cloned)",
            (Death::SecondKeeper, false) => " (keeper, second death)",
            (Death::SecondKeeper, true) => " (keeper, second death, cloned)",
        }
    }
}

fn row(lacks: Lacks, name: &str, cell: &Cell) -> Row {
    let second = name.strip_prefix("then ");
    let whole = second.unwrap_or(name);
    let keeper = whole.strip_prefix("keeper.");
    let (opcode, point) = keeper
        .unwrap_or(whole)
        .split_once('.')
        .unwrap_or((name, ""));
    let death = match (keeper, second) {
        (Some(_), Some(_)) => Death::SecondKeeper,
        (Some(_), None) => Death::Keeper,
        (None, Some(_)) => Death::Second,
        (None, None) => Death::First,
    };
    let reason = cells::reason(lacks, name);
    let fate = if cell.refuted > 0 {
        Fate::Refuted
    } else if cells::listed(lacks, name) && cell.could > 0 && cell.differ > cell.beside {
        Fate::Differs
    } else if cell.cases == cell.broken + cell.unreached {
        Fate::Untested
    } else if cell.could > 0 || reason.is_none() {
        Fate::Unexplained
    } else {
        Fate::Reason
    };
    Row {
        opcode: opcode.to_owned(),
        point: point.to_owned(),
        death,
        cloned: lacks.descriptor,
        cases: cell.cases,
        differ: cell.differ,
        beside: cell.beside,
        fate,
        reason: matches!(fate, Fate::Reason | Fate::Refuted)
            .then(|| reason.unwrap_or("(none)").to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crash::plan::Case;
    use crate::crash::tally::Verdict;

    const NO_JOURNAL: Mode = Mode {
        journal: false,
        sign: true,
    };

    const RESEND_ONLY: Mode = Mode {
        journal: true,
        sign: false,
    };

    fn explained(cases: &[(&str, Verdict, &[&str])]) -> Explained {
        explained_in(NO_JOURNAL, cases)
    }

    fn explained_in(mode: Mode, cases: &[(&str, Verdict, &[&str])]) -> Explained {
        let mut tally = Tally::default();
        for (text, verdict, beside) in cases {
            let case: Case = text.parse().unwrap();
            let beside: Vec<String> = beside.iter().map(|name| (*name).to_owned()).collect();
            let expected = cells::expected(mode, &case, &beside);
            tally.add(&case, &case.kills, *verdict, expected);
        }
        Explained::of(&tally, mode)
    }

    fn fate(cases: &[(&str, Verdict, &[&str])]) -> Fate {
        let explained = explained(cases);
        assert_eq!(explained.cells.len(), 1, "{explained:?}");
        explained.cells[0].fate
    }

    #[test]
    fn a_cell_differs_or_has_a_reason_or_is_reported() {
        use Verdict::{Broken, Differs, Same, Unreached};
        let mkdirat = "t1-wt/mkdir/0/mkdir.mkdirat:1";
        assert_eq!(fate(&[(mkdirat, Differs, &[])]), Fate::Differs);
        assert_eq!(fate(&[(mkdirat, Same, &[])]), Fate::Unexplained);
        let both = [(mkdirat, Same, &[][..]), (mkdirat, Differs, &[])];
        assert_eq!(fate(&both), Fate::Differs);
        let untested = [(mkdirat, Broken, &[][..]), (mkdirat, Unreached, &[])];
        assert_eq!(fate(&untested), Fate::Untested);
        let start = "t4-wt/mkdir/0/mkdir.start:1";
        assert_eq!(fate(&[(start, Same, &[])]), Fate::Reason);
        assert_eq!(fate(&[(start, Differs, &[])]), Fate::Refuted);
        assert_eq!(fate(&[(start, Differs, &["read.pread"])]), Fate::Refuted);
        let unknown = "t1-wt/mkdir/0/mkdir.chmod:1";
        assert_eq!(fate(&[(unknown, Same, &[])]), Fate::Unexplained);
        assert_eq!(fate(&[(unknown, Differs, &[])]), Fate::Unexplained);
    }

    #[test]
    fn what_another_thread_may_be_the_cause_of_proves_nothing() {
        use Verdict::Differs;
        let beside: &[&str] = &["link.start"];
        let start = "t4-wt/mkdir/0/mkdir.start:1";
        assert_eq!(fate(&[(start, Differs, beside)]), Fate::Reason);
        let mkdirat = "t4-wt/mkdir/0/mkdir.mkdirat:1";
        assert_eq!(fate(&[(mkdirat, Differs, beside)]), Fate::Unexplained);
        let keeper = "t1-wt/keeper/0/mkdir.start:1";
        assert_eq!(fate(&[(keeper, Differs, &[])]), Fate::Reason);
    }

    /// The answer was given, and the next request of the same process was read by another thread, which is at no point yet.
    #[test]
    fn what_is_lost_with_another_descriptor_proves_nothing() {
        use Verdict::{Differs, Same};
        let fate = |case| explained_in(RESEND_ONLY, &[case]).cells[0].fate;
        assert_eq!(
            fate(("c4-wt/link/1/link.answered:4", Differs, &[])),
            Fate::Reason
        );
        assert_eq!(
            fate(("c4-wt/link/1/link.linkat:1", Differs, &[])),
            Fate::Differs
        );
        assert_eq!(
            fate(("c4-wt/link/1/link.linkat:1", Same, &[])),
            Fate::Unexplained
        );
        assert_eq!(
            fate(("t4-wt/link/1/link.answered:4", Differs, &[])),
            Fate::Refuted
        );
    }

    #[test]
    fn of_two_deaths_either_can_show() {
        use Verdict::{Differs, Same};
        let could = "t1-wt/twice/0/mkdir.reply:1+recover.start:1";
        let not = "t1-wt/twice/0/mkdir.start:1+recover.start:1";
        assert_eq!(fate(&[(could, Differs, &[])]), Fate::Differs);
        assert_eq!(
            fate(&[(could, Same, &[]), (not, Same, &[])]),
            Fate::Unexplained
        );
        assert_eq!(fate(&[(not, Same, &[])]), Fate::Reason);
        let against = [(could, Differs, &[][..]), (not, Differs, &[])];
        assert_eq!(fate(&against), Fate::Refuted);
    }

    #[test]
    fn the_table_says_so() {
        use Verdict::{Differs, Same};
        let told = explained(&[
            ("t1-wt/mkdir/0/mkdir.mkdirat:1", Same, &[]),
            ("t1-wt/mkdir/0/mkdir.start:1", Differs, &[]),
            ("t1-wt/mkdir/0/mkdir.end:1", Same, &[]),
            ("t1-wt/mkdir/0/mkdir.reply:1", Differs, &[]),
        ]);
        assert!(!told.fine());
        assert_eq!(
            told.summary(),
            "4 cells: 1 differ, 1 with a reason, 1 unexplained, 1 refuted, 0 untested"
        );
        let table = told.table();
        let lines: Vec<Vec<&str>> = table
            .lines()
            .map(|l| l.split_whitespace().collect())
            .collect();
        assert_eq!(lines[1][..6], ["mkdir", "end", "1", "0", "0", "the"]);
        assert_eq!(
            lines[2][..6],
            ["mkdir", "mkdirat", "1", "0", "0", "unexplained"]
        );
        assert_eq!(lines[3], ["mkdir", "reply", "1", "1", "0"]);
        assert_eq!(
            lines[4][..7],
            ["mkdir", "start", "1", "1", "0", "reason", "refuted:"]
        );
        let json = serde_json::to_string(&told).unwrap();
        assert!(json.contains("\"unexplained\":1,\"refuted\":1"), "{json}");
        assert!(explained(&[("t1-wt/mkdir/0/mkdir.reply:1", Differs, &[])]).fine());
    }

    #[test]
    fn markdown_has_a_line_for_each_reason_of_an_opcode() {
        use Verdict::{Differs, Same};
        let told = explained(&[
            ("t1-wt/mkdir/0/mkdir.mkdirat:1", Differs, &[]),
            ("t1-wt/mkdir/0/mkdir.reply:1", Differs, &[]),
            ("t4-wt/mkdir/0/mkdir.reply:1", Differs, &["link.reply"]),
            ("t4-wt/mkdir/0/mkdir.reply:1", Same, &[]),
            ("t1-wt/mkdir/0/mkdir.end:1", Same, &[]),
            ("t1-wt/twice/0/mkdir.reply:1+recover.end:1", Differs, &[]),
        ]);
        let lines: Vec<String> = told.markdown().lines().skip(2).map(str::to_owned).collect();
        assert_eq!(
            lines,
            [
                "| mkdir | end 1 | the kernel has the answer: not sent again |",
                "| mkdir | mkdirat 1 of 1, reply 2 of 3 (1 beside) |  |",
                "| recover (second death) | end 1 of 1 |  |",
            ]
        );
    }
}
