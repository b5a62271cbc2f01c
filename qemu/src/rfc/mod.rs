// SPDX-License-Identifier: GPL-2.0
//! The series as it would be mailed: rebuilt, checked patch by patch, and a
//! rehearsal of the mailing. It never sends.
//!
//! [`tree`] makes commits of the patches, [`check`] says what is due, [`run`]
//! does it in the directories of [`objects`], [`store`] remembers, [`messages`]
//! finds what is new in what the tools say.

mod boot;
mod canary;
mod check;
mod count;
mod cover;
mod mail;
mod messages;
mod objects;
mod report;
mod run;
mod rustdoc;
mod store;
mod text;
mod tree;
mod waivers;

use crate::kernel::{self, source, tools::Tools};
use crate::paths::Paths;
use crate::setup::{self, Need};
use crate::ui;
use anyhow::{ensure, Context, Result};
use check::{Check, Wish};
use run::{Outcome, Runner, Verdict};
use serde_json::json;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tree::Tree;

/// The source has a copy of its own: it is moved from patch to patch.
const TRACK: &str = "-rfc";

/// Check each patch of the series as its reviewers would, and rehearse the mailing
///
/// Compares the patches with what they are generated from, applies them by `git
/// am` to a pristine tree, and for each commit runs checkpatch, sparse, clippy,
/// rustfmt, rustdoc, kernel-doc, W=1, and builds fs/fuse built in and as
/// modules, with and without CONFIG_FUSE_RESTART, and without CONFIG_RUST.
/// Warnings count if the pristine tree does not have them. Then it checks the
/// cover letter, lists the recipients, and lets git rehearse the mailing.
///
/// It never sends, and could not: see Documentation/submitting.md.
///
/// The first run prepares a source tree and six object directories (about 25
/// minutes and 4 GB on two cores; with --boot 10 more), then takes about two
/// minutes a patch. Results are kept by content: a second run takes seconds, and
/// one that was interrupted goes on.
///
/// Examples:
///   scripts/rfc                       all checks of all patches
///   scripts/rfc --boot                and boot each one
///   scripts/rfc --quick               read all patches, build the last
///   scripts/rfc --patch 9 --only sparse --only clippy
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct RfcArgs {
    /// Build only the last patch
    #[arg(long)]
    quick: bool,
    /// Only this patch (may be repeated)
    #[arg(long, value_name = "N")]
    patch: Vec<usize>,
    /// Only this check (may be repeated)
    #[arg(long, value_enum, value_name = "CHECK")]
    only: Vec<Check>,
    /// Boot each patch on UML and try a mount
    #[arg(long)]
    boot: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    list: bool,
    /// Only count lines of C and Rust and `unsafe`
    #[arg(long, conflicts_with = "list")]
    count: bool,
    /// Put a commit on top that each check must object to, and see whether it does
    #[arg(long, conflicts_with_all = ["patch", "quick", "list", "count", "json"])]
    canary: bool,
    /// Do not believe the results of earlier runs
    #[arg(long)]
    fresh: bool,
    /// Store everything as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub fn run(paths: &Paths, args: &RfcArgs) -> Result<ExitCode> {
    setup::ensure(Need::Kernel)?;
    setup::ensure(Need::Rfc)?;
    // Generated files first: everything else would be about the wrong ones.
    let mut wrong = kernel::generated::check(&paths.repo, &paths.patches())?;
    for w in &mut wrong {
        *w += " (`scripts/kernel series --write` writes it)";
    }
    let lock = kernel::build::lock(paths, "rfc")?;
    let source = source::get(paths, TRACK)?;
    wrong.extend(base_differs(paths, &source.id));
    let tree = Tree::set_up(paths, &source, args.canary)?;
    if args.count {
        let counts = count::count(&tree)?;
        print!("{}", counts.table());
        for file in counts.misplaced() {
            println!("{file} has `unsafe`: only the ring of abstractions may");
        }
        return Ok(ExitCode::from(u8::from(!counts.misplaced().is_empty())));
    }
    let tools = Tools::set_up(paths)?;
    let store = store::Store::open(paths.cache_dir("rfc")?, args.fresh)?;
    let versions = run::versions(&tree.dir) + &tools.id;
    let mut runner = Runner::new(paths, &source, &tree, &tools, store, versions)?;
    let wish = Wish {
        quick: args.quick,
        boot: args.boot,
        patches: args.patch.clone(),
        only: args.only.clone(),
    };
    if args.canary {
        return sing(&mut runner, wish);
    }
    for n in &wish.patches {
        ensure!(
            (1..=tree.commits.len()).contains(n),
            "there is no patch {n}: the series has {}",
            tree.commits.len()
        );
    }
    let plan = check::plan(&wish, tree.commits.len());
    if args.list {
        list(&runner, &plan)?;
        return Ok(ExitCode::SUCCESS);
    }

    let outcomes = carry_out(&mut runner, &plan)?;
    let cover = cover::path(&paths.patches());
    wrong.extend(
        cover::check(&tree, &cover)?
            .into_iter()
            .map(|f| format!("the cover letter: {f}")),
    );
    let counts = count::count(&tree)?;
    for file in counts.misplaced() {
        wrong.push(format!(
            "{file} has `unsafe`: only the ring of abstractions may"
        ));
    }
    let recipients = mail::recipients(&tree)?;
    let rehearsal = mail::rehearse(&tree, &cover, &recipients)?;
    drop(lock);

    println!("\n{}", report::table(&tree.commits, &outcomes));
    print!("{}", counts.table());
    let notes = report::notes(&outcomes);
    if !notes.is_empty() {
        println!("\nWhat checkpatch says and is not counted:");
        for n in &notes {
            println!("  {n}");
        }
    }
    println!("\nRecipients (scripts/get_maintainer.pl; patches go to all of them):");
    for (who, role) in &recipients {
        println!("  {who} ({role})");
    }
    println!(
        "\nRehearsed (git send-email --dry-run): {} mails, \"{}\" first.",
        rehearsal.mails,
        rehearsal.subjects.first().map_or("", String::as_str)
    );
    println!("\n{}", mail::what_is_left(&tree.outgoing));
    for w in &wrong {
        println!("\n{w}");
    }
    print!("\n{}", report::findings(&outcomes));
    let failed = outcomes
        .iter()
        .filter(|o| o.verdict == Verdict::Failed)
        .count();
    let nothing = outcomes
        .iter()
        .filter(|o| o.verdict == Verdict::Nothing)
        .count();
    let passed = outcomes.len() - failed - nothing;
    let all_wrong = failed + wrong.len();
    println!("{passed} passed, {all_wrong} failed, {nothing} had nothing to check");
    if let Some(file) = &args.json {
        let json = json!({
            "source": source.id, "passed": passed, "failed": all_wrong, "checks": outcomes,
            "series": wrong, "counts": counts, "recipients": recipients, "rehearsal": rehearsal,
            "patches": tree.commits.iter().map(|c| &c.subject).collect::<Vec<_>>(),
        });
        std::fs::write(file, serde_json::to_vec_pretty(&json)?)
            .with_context(|| file.display().to_string())?;
    }
    Ok(ExitCode::from(u8::from(all_wrong > 0 || passed == 0)))
}

/// Success is that every check fails.
fn sing(runner: &mut Runner, mut wish: Wish) -> Result<ExitCode> {
    let last = runner.tree.commits.len();
    wish.patches = vec![last];
    let outcomes = carry_out(runner, &check::plan(&wish, last))?;
    println!("\n{}", report::table(&runner.tree.commits, &outcomes));
    print!("{}", report::findings(&outcomes));
    let blind: Vec<&str> = outcomes
        .iter()
        .filter(|o| o.verdict != Verdict::Failed)
        .map(|o| o.check)
        .collect();
    println!(
        "{} of {} checks object to the canary{}",
        outcomes.len() - blind.len(),
        outcomes.len(),
        if blind.is_empty() {
            String::new()
        } else {
            format!("; these do not: {}", blind.join(" "))
        }
    );
    Ok(ExitCode::from(u8::from(
        !blind.is_empty() || outcomes.is_empty(),
    )))
}

/// Applies elsewhere as well, perhaps; but it was not checked there.
fn base_differs(paths: &Paths, id: &str) -> Option<String> {
    let path = paths.patches().join("BASE");
    let base = std::fs::read_to_string(&path).unwrap_or_default();
    let found = base.lines().any(|l| {
        l.split_whitespace()
            .any(|w| id == w || id == w.replace(':', "-"))
    });
    (!found).then(|| {
        format!(
            "the tree is {id}, {} says: {}",
            path.display(),
            base.trim().replace('\n', "; ")
        )
    })
}

fn list(runner: &Runner, plan: &[(usize, Check)]) -> Result<()> {
    let checks: BTreeSet<Check> = plan.iter().map(|(_, c)| *c).collect();
    for c in &checks {
        println!("{:<9} {}", c.name(), c.about());
    }
    let mut left = Vec::new();
    for commit in &runner.tree.commits {
        let mut due = Vec::new();
        for &(patch, check) in plan.iter().filter(|(p, _)| *p == commit.number) {
            let known = runner.known(patch, check)?;
            due.push(format!("{}{}", check.name(), if known { "=" } else { "" }));
            if !known {
                left.push((patch, check));
            }
        }
        if !due.is_empty() {
            println!(
                "{:>2}  {}\n      {}",
                commit.number,
                commit.subject,
                due.join(" ")
            );
        }
    }
    println!(
        "{} checks, {} of them to be run (=: known), about {}",
        plan.len(),
        left.len(),
        ui::clock(check::estimate(&left, &[]))
    );
    Ok(())
}

fn carry_out(runner: &mut Runner, plan: &[(usize, Check)]) -> Result<Vec<Outcome>> {
    let mut todo = Vec::new();
    for &(patch, check) in plan {
        if !runner.known(patch, check)? {
            todo.push((patch, check));
        }
    }
    ui::step(format!(
        "{} checks, {} of them to be run, about {}",
        plan.len(),
        todo.len(),
        ui::clock(check::estimate(&todo, &[]))
    ));
    let mut outcomes = Vec::new();
    let mut taken: Vec<(Check, Duration)> = Vec::new();
    for &(patch, check) in plan {
        let start = Instant::now();
        let o = runner
            .check(patch, check)
            .with_context(|| format!("patch {patch}, {}", check.name()))?;
        if !o.cached {
            todo.retain(|t| *t != (patch, check));
            taken.push((check, start.elapsed()));
            let word = match o.verdict {
                Verdict::Passed => "ok",
                Verdict::Failed => "FAILED",
                Verdict::Nothing => "nothing to check",
            };
            ui::step(format!(
                "patch {patch}, {}: {word} ({:.1}s; about {} left)",
                check.name(),
                start.elapsed().as_secs_f64(),
                ui::clock(check::estimate(&todo, &taken))
            ));
            for f in o.findings.iter().take(5) {
                eprintln!("          {f}");
            }
        }
        outcomes.push(o);
    }
    Ok(outcomes)
}
