// SPDX-License-Identifier: GPL-2.0
//! The table at the end.

use super::check::{Check, ALL};
use super::run::{Outcome, Verdict};
use super::tree::Commit;
use std::collections::BTreeSet;

/// A line a patch, a column a check.
pub fn table(commits: &[Commit], outcomes: &[Outcome]) -> String {
    let columns: Vec<Check> = ALL
        .iter()
        .copied()
        .filter(|c| outcomes.iter().any(|o| o.check == c.name()))
        .collect();
    let mut out = format!("{:<44}", "patch");
    for c in &columns {
        out += &format!(" {:>8}", c.name());
    }
    out.push('\n');
    for commit in commits {
        let of_it = |c: &Check| {
            outcomes
                .iter()
                .find(|o| o.patch == commit.number && o.check == c.name())
        };
        if columns.iter().all(|c| of_it(c).is_none()) {
            continue;
        }
        let subject: String = commit.subject.chars().take(40).collect();
        out += &format!("{:>2}  {subject:<40}", commit.number);
        for c in &columns {
            let word = match of_it(c).map(|o| &o.verdict) {
                Some(Verdict::Passed) => "ok",
                Some(Verdict::Failed) => "FAILED",
                Some(Verdict::Nothing) => "-",
                None => "",
            };
            out += &format!(" {word:>8}");
        }
        out.push('\n');
    }
    out
}

/// Every finding once, where it appears first.
pub fn findings(outcomes: &[Outcome]) -> String {
    let mut seen = BTreeSet::new();
    let mut out = String::new();
    for o in outcomes {
        for f in &o.findings {
            if seen.insert((o.check, without_lines(f))) {
                out += &format!("patch {}, {}: {f}\n", o.patch, o.check);
            }
        }
    }
    out
}

/// What moved down is the same finding.
fn without_lines(finding: &str) -> String {
    let parts = finding.split(':');
    let text = |p: &&str| p.is_empty() || !p.bytes().all(|b| b.is_ascii_digit());
    parts.filter(text).collect::<Vec<_>>().join(":")
}

/// What was waived, with the reasons, each once.
pub fn notes(outcomes: &[Outcome]) -> BTreeSet<&str> {
    outcomes
        .iter()
        .flat_map(|o| o.notes.iter().map(String::as_str))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(patch: usize, check: Check, findings: &[&str]) -> Outcome {
        Outcome {
            patch,
            check: check.name(),
            verdict: match findings {
                [] => Verdict::Passed,
                _ => Verdict::Failed,
            },
            findings: findings.iter().map(|s| s.to_string()).collect(),
            notes: vec!["n".into()],
            seconds: 1.0,
            cached: false,
        }
    }

    #[test]
    fn a_table_has_what_was_checked() {
        let commits: Vec<Commit> = ["one", "two", "three"]
            .iter()
            .enumerate()
            .map(|(i, s)| Commit {
                number: i + 1,
                id: String::new(),
                subject: s.to_string(),
                patch: "p".into(),
                files: vec![],
            })
            .collect();
        let outcomes = [
            outcome(1, Check::Sparse, &[]),
            outcome(2, Check::Sparse, &["bad"]),
            outcome(2, Check::Boot, &[]),
        ];
        let table = table(&commits, &outcomes);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 3, "{table}");
        assert!(lines[0].ends_with("sparse     boot") && lines[2].contains("two"));
        assert!(lines[2].ends_with("FAILED       ok"), "{table}");
    }

    #[test]
    fn a_finding_is_told_once() {
        let outcomes = [
            outcome(1, Check::Sparse, &["a"]),
            outcome(2, Check::Sparse, &["a", "b"]),
            outcome(2, Check::Clippy, &["a"]),
            outcome(3, Check::Clippy, &["x.c:5: c"]),
            outcome(4, Check::Clippy, &["x.c:9: c"]),
        ];
        let text = findings(&outcomes);
        assert_eq!(
            text,
            "patch 1, sparse: a\npatch 2, sparse: b\npatch 2, clippy: a\npatch 3, clippy: x.c:5: c\n"
        );
        assert_eq!(notes(&outcomes).len(), 1);
    }
}
