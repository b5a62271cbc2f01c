// SPDX-License-Identifier: GPL-2.0
//! `scripts/scenarios`: every scenario, with its result in every guest asked for, and what the kernels complained of.

use super::build_program;
use crate::guest::OUT_FILE;
use crate::paths::Paths;
use crate::ui;
use crate::vm::{self, BackendName, KernelName};
use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Run every scenario in several guests and show the results side by side
///
/// UML with lockdep and atomic-sleep, and QEMU with KASAN, lockdep, kmemleak and
/// atomic-sleep, unless --guests says otherwise; both have the traps by which
/// some scenarios hold a window open. Any complaint of a kernel makes the run
/// fail. The debug kernel takes most of the time: 20 minutes and more without
/// KVM.
///
/// Examples:
///   scripts/scenarios
///   scripts/scenarios --guests uml,qemu,mutants revoked stale
///   scripts/scenarios --guests debug --no-kmemleak --json result.json
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct TableArgs {
    /// Only these families or scenarios
    filter: Vec<String>,
    /// Where to run them
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["mutants", "debug-mutants"])]
    guests: Vec<Guest>,
    /// Boot the debug kernel with kmemleak off (its scans stop everything)
    #[arg(long)]
    no_kmemleak: bool,
    /// Seconds that one guest may take
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    timeout: u64,
    /// Store the table here as well
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Guest {
    /// The series in user-mode Linux
    Uml,
    /// The series with traps held open, in user-mode Linux
    Mutants,
    /// The series in QEMU, two processors
    Qemu,
    /// The series in QEMU with every check of the kernel's
    Debug,
    /// The series with traps held open, in QEMU with every check
    DebugMutants,
    /// The series as a module, in QEMU
    Module,
    /// The same with every check of the kernel's
    DebugModule,
    /// The same kernel without the series
    Stock,
}

impl Guest {
    fn name(self) -> &'static str {
        match self {
            Guest::Uml => "uml",
            Guest::Mutants => "mutants",
            Guest::Qemu => "qemu",
            Guest::Debug => "debug",
            Guest::DebugMutants => "debug-mutants",
            Guest::Module => "module",
            Guest::DebugModule => "debug-module",
            Guest::Stock => "stock",
        }
    }

    /// Backend, kernel, patience in seconds: an emulator and checkers on top of it are slow, not broken.
    fn is(self) -> (BackendName, KernelName, &'static str) {
        match self {
            Guest::Uml => (BackendName::Uml, KernelName::Patched, "10"),
            Guest::Mutants => (BackendName::Uml, KernelName::Mutants, "10"),
            Guest::Qemu => (BackendName::Qemu, KernelName::Patched, "30"),
            Guest::Debug => (BackendName::Qemu, KernelName::Debug, "60"),
            Guest::DebugMutants => (BackendName::Qemu, KernelName::Mutants, "60"),
            Guest::Module => (BackendName::Qemu, KernelName::Module, "30"),
            Guest::DebugModule => (BackendName::Qemu, KernelName::DebugModule, "60"),
            Guest::Stock => (BackendName::Qemu, KernelName::Stock, "30"),
        }
    }
}

#[derive(Deserialize)]
struct Summary {
    kernel: String,
    seed: u64,
    scenarios: Vec<Outcome>,
}

#[derive(Deserialize)]
struct Outcome {
    name: String,
    verdict: String,
    reason: String,
    seconds: f64,
}

/// What one guest said.
#[derive(Serialize)]
struct Column {
    guest: &'static str,
    kernel: String,
    seed: u64,
    passed: usize,
    failed: usize,
    skipped: usize,
    /// What its kernel reported: warnings, lockdep, KASAN, leaks, hung tasks.
    complaints: usize,
    seconds: f64,
}

#[derive(Default, Serialize)]
struct Row {
    name: String,
    /// Guest, verdict.
    results: BTreeMap<&'static str, String>,
    /// Guest, reason, where it did not pass.
    reasons: BTreeMap<&'static str, String>,
}

#[derive(Default, Serialize)]
struct Table {
    guests: Vec<Column>,
    scenarios: Vec<Row>,
}

impl Table {
    fn add(&mut self, guest: &'static str, summary: Summary, complaints: usize) {
        let count = |verdict: &str| {
            let with = summary.scenarios.iter().filter(|s| s.verdict == verdict);
            with.count()
        };
        self.guests.push(Column {
            guest,
            passed: count("pass"),
            failed: count("fail"),
            skipped: count("skip"),
            complaints,
            seconds: summary.scenarios.iter().map(|s| s.seconds).sum(),
            kernel: summary.kernel,
            seed: summary.seed,
        });
        for outcome in summary.scenarios {
            let known = self.scenarios.iter().position(|r| r.name == outcome.name);
            let at = known.unwrap_or_else(|| {
                self.scenarios.push(Row {
                    name: outcome.name.clone(),
                    ..Row::default()
                });
                self.scenarios.len() - 1
            });
            let row = &mut self.scenarios[at];
            if outcome.verdict != "pass" {
                row.reasons.insert(guest, outcome.reason);
            }
            row.results.insert(guest, outcome.verdict);
        }
    }

    fn fine(&self) -> bool {
        let good = |c: &Column| c.failed == 0 && c.passed > 0 && c.complaints == 0;
        !self.guests.is_empty() && self.guests.iter().all(good)
    }

    fn text(&self) -> String {
        let width = self.scenarios.iter().map(|r| r.name.len()).max();
        let width = width.unwrap_or(0).max("kernel complaints".len());
        let line = |name: &str, cells: Vec<String>| {
            let cells: String = cells.iter().map(|c| format!("  {c:<13}")).collect();
            format!("{name:<width$}{cells}").trim_end().to_owned() + "\n"
        };
        let per_guest = |cell: &dyn Fn(&Column) -> String| self.guests.iter().map(cell).collect();
        let mut text = line("", per_guest(&|c| c.guest.into()));
        for row in &self.scenarios {
            let cell = |c: &Column| row.results.get(c.guest).cloned().unwrap_or("-".into());
            text += &line(&row.name, per_guest(&cell));
        }
        text += &line("passed", per_guest(&|c| c.passed.to_string()));
        text += &line("failed", per_guest(&|c| c.failed.to_string()));
        text += &line("skipped", per_guest(&|c| c.skipped.to_string()));
        text += &line(
            "kernel complaints",
            per_guest(&|c| c.complaints.to_string()),
        );
        for row in &self.scenarios {
            for (guest, why) in &row.reasons {
                text += &format!("{} {} in {guest}: {why}\n", row.results[guest], row.name);
            }
        }
        text
    }
}

pub fn run(paths: &Paths, args: &TableArgs) -> Result<ExitCode> {
    let mut table = Table::default();
    for guest in &args.guests {
        ui::step(format!("scenarios in {}", guest.name()));
        let (summary, complaints) = one(paths, *guest, args)?;
        table.add(guest.name(), summary, complaints);
    }
    print!("{}", table.text());
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&table)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(match table.fine() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn one(paths: &Paths, guest: Guest, args: &TableArgs) -> Result<(Summary, usize)> {
    let program = build_program(paths, false)?.display().to_string();
    let (backend, kernel, patience) = guest.is();
    let out = std::env::temp_dir().join(format!(
        "fuse-restart-scenarios-{}-{}.json",
        guest.name(),
        std::process::id()
    ));
    let argv = [&program, "scenario", "--json", OUT_FILE, "--limit", "180"];
    let mut argv = Vec::from(argv.map(str::to_owned));
    argv.extend(["--patience".into(), patience.into()]);
    if guest != Guest::Stock {
        argv.push("--require-series".into());
    }
    argv.extend(args.filter.iter().cloned());
    let options = vm::Options {
        backend,
        kernel,
        timeout: Duration::from_secs(args.timeout),
        out: Some(out.clone()),
        kmemleak: !args.no_kmemleak,
        argv,
        ..vm::Options::default()
    };
    let ended = vm::run_to_end(paths, &options);
    let json = std::fs::read(&out);
    let _ = std::fs::remove_file(&out);
    let ended = ended?;
    let json = json.context("the scenarios left no result")?;
    let summary = serde_json::from_slice(&json).with_context(|| {
        format!(
            "the scenarios left no result in {}: status {}",
            guest.name(),
            ended.code
        )
    })?;
    Ok((summary, ended.complaints))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(verdicts: &[(&str, &str)]) -> Summary {
        let scenarios = verdicts.iter().map(|(name, verdict)| Outcome {
            name: name.to_string(),
            verdict: verdict.to_string(),
            reason: "why".into(),
            seconds: 1.0,
        });
        Summary {
            kernel: "7.3".into(),
            seed: 1,
            scenarios: scenarios.collect(),
        }
    }

    #[test]
    fn guests_stand_side_by_side() {
        let mut table = Table::default();
        table.add("uml", summary(&[("a/x", "pass"), ("a/y", "skip")]), 0);
        table.add("debug", summary(&[("a/y", "pass"), ("b/z", "pass")]), 0);
        assert!(table.fine());
        let text = table.text();
        let line = |name: &str| {
            let found = text.lines().find(|l| l.starts_with(name)).unwrap();
            found.split_whitespace().skip(1).collect::<Vec<_>>()
        };
        assert_eq!(line("a/x"), ["pass", "-"]);
        assert_eq!(line("a/y"), ["skip", "pass"]);
        assert_eq!(line("b/z"), ["-", "pass"]);
        assert_eq!(line("passed"), ["1", "2"]);
        assert!(text.contains("skip a/y in uml: why"));
    }

    #[test]
    fn failures_and_complaints_are_no_success() {
        let of = |verdict, complaints| {
            let mut table = Table::default();
            table.add("uml", summary(&[("a/x", verdict)]), complaints);
            table.fine()
        };
        assert!(of("pass", 0));
        assert!(!of("pass", 3));
        assert!(!of("fail", 0));
        assert!(!of("skip", 0), "nothing ran");
        assert!(!Table::default().fine());
    }
}
