// SPDX-License-Identifier: GPL-2.0
//! `scripts/mutants`: takes the hunks of the series out, one at a time, and
//! sees the scenario fail that Documentation/traps.md names for it.
//!
//! Each has a guest of its own: without its hunk a kernel may hang or fall over.

use super::build_program;
use crate::guest::OUT_FILE;
use crate::paths::Paths;
use crate::ui;
use crate::vm::runner::Ended;
use crate::vm::{self, BackendName, KernelName};
use anyhow::{ensure, Context, Result};
use clap::Args;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// Take hunks of the series out and see that the scenario for each fails
///
/// Documentation/traps.md has a table: trap, scenario, mutant, hunk, what happens
/// without it. For each row a guest boots the kernel `mutants`, in which every
/// such hunk can be switched off, switches that one off and runs the scenario.
/// A scenario that passes guards nothing, and one that fails with every hunk in
/// its place shows nothing: both are errors.
///
/// Examples:
///   scripts/mutants                      # all: some 10 seconds each
///   scripts/mutants sort read_recheck    # these
///   scripts/mutants --list
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct MutantsArgs {
    /// Only these mutants
    names: Vec<String>,
    /// Show the table's rows and run nothing
    #[arg(long)]
    list: bool,
}

/// A row of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    mutant: String,
    scenario: String,
}

/// What a guest's run said.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// The scenario failed, and how.
    Noticed(String),
    /// It passed.
    Survived,
    /// It did not run.
    Nothing(String),
}

#[derive(Deserialize)]
struct Summary {
    scenarios: Vec<Outcome>,
}

#[derive(Deserialize)]
struct Outcome {
    #[serde(default)]
    name: String,
    verdict: String,
    reason: String,
}

pub fn run(paths: &Paths, args: &MutantsArgs) -> Result<ExitCode> {
    let document = paths.repo.join("Documentation/traps.md");
    let text =
        std::fs::read_to_string(&document).with_context(|| document.display().to_string())?;
    let mut rows = rows(&text);
    ensure!(
        !rows.is_empty(),
        "{} has no rows with mutants",
        document.display()
    );
    for name in &args.names {
        ensure!(
            rows.iter().any(|r| r.mutant == *name),
            "{} has no mutant {name:?}; --list shows them",
            document.display()
        );
    }
    rows.retain(|r| args.names.is_empty() || args.names.contains(&r.mutant));
    if args.list {
        for row in &rows {
            println!("{:<20} {}", row.mutant, row.scenario);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let program = build_program(paths, false)?;
    let mut wrong = Vec::new();
    let broken = without_mutant(paths, &program, &rows)?;
    for row in &rows {
        if broken.contains(&row.scenario) {
            ui::step(format!("{}: {} fails anyway", row.mutant, row.scenario));
            wrong.push(row.mutant.as_str());
            continue;
        }
        let verdict = one(paths, &program, row)?;
        match &verdict {
            Verdict::Noticed(how) => {
                ui::step(format!("{}: {} fails: {how}", row.mutant, row.scenario))
            }
            Verdict::Survived => ui::step(format!("{}: {} PASSES", row.mutant, row.scenario)),
            Verdict::Nothing(why) => ui::step(format!("{}: nothing ran: {why}", row.mutant)),
        }
        if !matches!(verdict, Verdict::Noticed(_)) {
            wrong.push(row.mutant.as_str());
        }
    }
    println!(
        "{} mutants, {} noticed, {} not{}{}",
        rows.len(),
        rows.len() - wrong.len(),
        wrong.len(),
        if wrong.is_empty() { "" } else { ": " },
        wrong.join(" ")
    );
    Ok(if wrong.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Rows of Markdown tables whose third column is `mutant` in backquotes.
fn rows(text: &str) -> Vec<Row> {
    let code = |cell: &str| {
        cell.trim()
            .strip_prefix('`')?
            .strip_suffix('`')
            .map(str::to_owned)
    };
    text.lines()
        .filter_map(|line| {
            let cells: Vec<&str> = line.strip_prefix('|')?.split('|').collect();
            Some(Row {
                scenario: code(cells.get(1)?)?,
                mutant: code(cells.get(2)?)?,
            })
        })
        .collect()
}

/// Runs all scenarios with every hunk in its place; those that do not pass.
fn without_mutant(paths: &Paths, program: &Path, rows: &[Row]) -> Result<BTreeSet<String>> {
    let names: BTreeSet<String> = rows.iter().map(|r| r.scenario.clone()).collect();
    ui::step(format!("{} scenarios without a mutant", names.len()));
    let mut argv = vec![program.display().to_string()];
    argv.extend(["scenario", "--limit", "70", "--json", OUT_FILE].map(str::to_owned));
    argv.extend(names.iter().cloned());
    let options = vm::Options {
        backend: BackendName::Uml,
        kernel: KernelName::Mutants,
        timeout: Duration::from_secs(900),
        quiet: true,
        argv,
        ..vm::Options::default()
    };
    let (told, code): (Summary, u8) = super::json_from_guest(paths, "mutants", options)?;
    ensure!(
        code != vm::EXIT_REPORT,
        "the kernel complains although every hunk is in its place"
    );
    Ok(did_not_pass(names, &told))
}

/// A name may be the beginning of several, as on the command line: all of them must have passed.
fn did_not_pass(names: BTreeSet<String>, told: &Summary) -> BTreeSet<String> {
    let passed = |name: &String| {
        let mut of_it = told
            .scenarios
            .iter()
            .filter(|o| o.name.starts_with(name))
            .peekable();
        of_it.peek().is_some() && of_it.all(|o| o.verdict == "pass")
    };
    names.into_iter().filter(|name| !passed(name)).collect()
}

fn one(paths: &Paths, program: &Path, row: &Row) -> Result<Verdict> {
    let out = std::env::temp_dir().join(format!(
        "fuse-restart-mutant-{}-{}.json",
        row.mutant,
        std::process::id()
    ));
    let script = "echo $1 > /sys/module/fuse/parameters/mutant && exec $0 scenario --patience 4 --limit 70 --json $2 $3";
    let argv = [
        "sh",
        "-c",
        script,
        &program.display().to_string(),
        &row.mutant,
        OUT_FILE,
        &row.scenario,
    ];
    let options = vm::Options {
        backend: BackendName::Uml,
        kernel: KernelName::Mutants,
        timeout: Duration::from_secs(120),
        out: Some(out.clone()),
        quiet: true,
        argv: argv.map(str::to_owned).into(),
        ..vm::Options::default()
    };
    let ended = vm::run_to_end(paths, &options)?;
    let json = std::fs::read(&out).unwrap_or_default();
    let _ = std::fs::remove_file(&out);
    Ok(judge(&ended, &json))
}

fn judge(ended: &Ended, json: &[u8]) -> Verdict {
    if !ended.began {
        // The mutant is made after the boot.
        return Verdict::Nothing("the guest did not come up".into());
    }
    let told: Option<Summary> = serde_json::from_slice(json).ok();
    let failed = told.as_ref().and_then(|s| {
        let bad = s.scenarios.iter().find(|o| o.verdict == "fail")?;
        Some(bad.reason.lines().next().unwrap_or_default().to_owned())
    });
    let passed = told
        .as_ref()
        .is_some_and(|s| s.scenarios.iter().any(|o| o.verdict == "pass"));
    match (ended.code, failed, passed) {
        (vm::EXIT_REPORT, why, _) => Verdict::Noticed(format!(
            "the kernel complains{}",
            why.map(|w| format!(" ({w})")).unwrap_or_default()
        )),
        (vm::EXIT_TIMEOUT, ..) => Verdict::Noticed("the guest hangs".into()),
        (_, Some(why), _) => Verdict::Noticed(why),
        (0, None, true) => Verdict::Survived,
        (code, ..) => Verdict::Nothing(format!("status {code}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_read_and_the_rest_is_not() {
        let text = "\
# Traps
| trap | scenario | mutant | hunk | without it |
|---|---|---|---|---|
| held in order | `held/thousand` | `sort` | x | y |
| none is possible | `held/a` | none: a race | x | y |
no | `a` | `b` |
";
        let wanted = Row {
            mutant: "sort".into(),
            scenario: "held/thousand".into(),
        };
        assert_eq!(rows(text), [wanted]);
    }

    /// A mutant that the tests-only patch lost would change nothing, and its scenario pass.
    #[test]
    fn every_mutant_of_the_table_is_somewhere_in_the_code() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
        let patch = read("patches/7.3-tests/0001-fuse-traps-and-mutants.patch");
        let table = rows(&read("../Documentation/traps.md"));
        assert!(table.len() > 80);
        for Row { mutant, .. } in table {
            let uses = [
                format!("fuse_mutant({mutant})"),
                format!("fuse_mutant_FUSE_MUTANT_{mutant})"),
            ];
            let used = |line: &str| line.starts_with('+') && uses.iter().any(|u| line.contains(u));
            let somewhere = patch.lines().any(used);
            assert!(somewhere, "no hunk is taken out by {mutant}");
        }
    }

    /// A row's "N: FILE[:FUNCTION()]" must be in patch N, or it leads a reader nowhere.
    #[test]
    fn every_hunk_of_the_table_is_in_its_patch() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let text = std::fs::read_to_string(root.join("Documentation/traps.md")).unwrap();
        let patches: Vec<_> = std::fs::read_dir(root.join("kernel-patches/7.3"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        let mut wrong = Vec::new();
        for line in text.lines().filter(|l| rows(l).len() == 1) {
            let hunk = line.split('|').nth(4).unwrap().trim();
            let (number, place) = hunk.split_once(": ").expect(hunk);
            let (file, function) = place.split_once(':').unwrap_or((place, ""));
            let prefix = format!("{number:0>4}-");
            let named = |p: &&std::path::PathBuf| {
                p.file_name()
                    .is_some_and(|n| n.to_string_lossy().starts_with(&prefix))
            };
            let patch = patches.iter().find(named).expect(hunk);
            let patch = std::fs::read_to_string(patch).unwrap();
            let header = format!("diff --git a/fs/fuse/{file} ");
            let diff = patch
                .split("\ndiff --git ")
                .map(|d| format!("diff --git {d}"));
            let of_file: String = diff.filter(|d| d.starts_with(&header)).collect();
            if of_file.is_empty() || !of_file.contains(function.trim_end_matches("()")) {
                wrong.push(hunk);
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn who_fails_anyway_shows_nothing() {
        let json = r#"{"scenarios":[{"name":"a/x","verdict":"pass","reason":""},
            {"name":"a/y","verdict":"fail","reason":""}]}"#;
        let names = ["a/x", "a/y", "a/z", "a/"].map(str::to_owned).into();
        let broken = did_not_pass(names, &serde_json::from_str(json).unwrap());
        assert_eq!(broken, ["a/y", "a/z", "a/"].map(str::to_owned).into());
    }

    #[test]
    fn only_a_failure_notices() {
        let json = |verdict: &str| {
            format!(r#"{{"scenarios":[{{"verdict":"{verdict}","reason":"why\nmore"}}]}}"#)
                .into_bytes()
        };
        let judge = |code, json: &[u8]| {
            let ended = Ended {
                code,
                complaints: 0,
                began: true,
            };
            (
                judge(&ended, json),
                judge(
                    &Ended {
                        began: false,
                        ..ended
                    },
                    json,
                ),
            )
        };
        let noticed = |why: &str| Verdict::Noticed(why.into());
        assert_eq!(judge(1, &json("fail")).0, noticed("why"));
        assert_eq!(judge(0, &json("pass")).0, Verdict::Survived);
        assert!(matches!(judge(0, &json("skip")).0, Verdict::Nothing(_)));
        assert!(matches!(judge(125, b"").0, Verdict::Nothing(_)));
        // A panic at boot is none of the mutant's.
        for (code, json) in [
            (vm::EXIT_REPORT, json("pass")),
            (vm::EXIT_TIMEOUT, Vec::new()),
        ] {
            let (began, did_not) = judge(code, &json);
            assert!(matches!(began, Verdict::Noticed(_)), "{began:?}");
            assert!(matches!(did_not, Verdict::Nothing(_)), "{did_not:?}");
        }
    }
}
