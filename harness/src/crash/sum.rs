// SPDX-License-Identifier: GPL-2.0
//! What several runs come to, for a document: crashes by opcode and point.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{ensure, Result};

use super::tally::Tally;
use crate::earlier;

/// Prints the runs that wrote these files, one by one and added up.
pub fn run(paths: &[PathBuf]) -> Result<ExitCode> {
    let mut all = Tally::default();
    let (mut text, mut failed) = (String::new(), 0);
    for path in paths {
        let one: Tally = earlier::read(path, "crash")?;
        let head = format!("{}, seed {}, {}", one.kernel, one.seed, one.mode);
        text += &format!("{}: {head}: {}\n", path.display(), totals(&one));
        let (path, first) = (path.display(), paths[0].display());
        ensure!(
            all.mode.is_empty() || all.mode == one.mode,
            "{path} is of mode {:?}, {first} of {:?}: these do not add up",
            one.mode,
            all.mode
        );
        // Without the journal, or without the series, to differ is no failure.
        if one.mode == "whole" {
            failed += one.failed() + one.failures.len() as u64;
        }
        all.mode.clone_from(&one.mode);
        all.sum(&one);
        all.seconds += one.seconds;
    }
    let dims = all.cells.iter().map(|(dim, cells)| {
        let crashes: u64 = cells.values().map(|cell| cell.crashes).sum();
        format!("{dim} {crashes}")
    });
    let dims = dims.collect::<Vec<_>>().join(", ");
    text += &format!("\nall: {}\n\n{dims}\n\n{}", totals(&all), table(&all));
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(ExitCode::from(u8::from(failed > 0))),
    }
}

fn totals(tally: &Tally) -> String {
    let total = tally.total();
    format!(
        "{} cases, {} crashes, {} differ, {} broken, {} not reached ({} times once more), {:.0} s",
        total.cases,
        tally.crashes,
        total.differ,
        total.broken,
        total.unreached,
        tally.again,
        tally.seconds
    )
}

/// A row for each opcode; first deaths, second ones and those of keepers together.
fn table(tally: &Tally) -> String {
    let mut opcodes: BTreeMap<&str, BTreeMap<&str, u64>> = BTreeMap::new();
    for (name, cell) in tally
        .cells
        .values()
        .flatten()
        .filter(|(_, c)| c.crashes > 0)
    {
        let name = name.strip_prefix("then ").unwrap_or(name);
        let name = name.strip_prefix("keeper.").unwrap_or(name);
        let (opcode, point) = name.split_once('.').unwrap_or((name, ""));
        *opcodes.entry(opcode).or_default().entry(point).or_default() += cell.crashes;
    }
    let mut text = "| opcode | crashes | at its points |\n|---|---:|---|\n".to_owned();
    for (opcode, points) in opcodes {
        let all: u64 = points.values().sum();
        let mut points: Vec<(&str, u64)> = points.into_iter().collect();
        points.sort_by_key(|(point, crashes)| (std::cmp::Reverse(*crashes), *point));
        let points = points.iter().map(|(point, n)| format!("{point} {n}"));
        let points = points.collect::<Vec<_>>().join(", ");
        text += &format!("| {opcode} | {all} | {points} |\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::cells::Expected;
    use super::super::plan::{Case, Kill};
    use super::super::tally::Verdict;
    use super::*;

    #[test]
    fn all_deaths_are_in_the_table_whichever_they_were() {
        let mut tally = Tally::default();
        for text in [
            "t1-wt/mkdir/0/mkdir.mkdirat:1",
            "t4-wb/twice/0/mkdir.mkdirat:1+recover.replay:2",
            "t1-wt/keeper/0/mkdir.end:1",
        ] {
            let case: Case = text.parse().unwrap();
            let died: Vec<Kill> = case.kills.clone();
            tally.add(&case, &died, Verdict::Same, Expected::default());
        }
        let lines: Vec<String> = table(&tally).lines().map(str::to_owned).collect();
        assert_eq!(
            lines[2..],
            [
                "| mkdir | 3 | mkdirat 2, end 1 |",
                "| recover | 1 | replay 1 |"
            ]
        );
        assert!(totals(&tally).starts_with("3 cases, 4 crashes, 0 differ"));
    }
}
