// SPDX-License-Identifier: GPL-2.0
//! Fuzzing the kernel's side: everything a server can write, while applications do everything they can.
//!
//! * [`script`] what a case does, from its seed; [`hand`] every way to write to the device
//! * [`server`] executes the server's steps; [`apps`] the applications; [`rival`] a second, hostile server thread
//! * [`case`] one case from the mount to the oracle

mod apps;
mod case;
mod hand;
mod rival;
mod script;
mod server;
pub mod shared;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::raw::env::Env;
use crate::scenario::runner::{self, Verdict};
use crate::scenario::Scenario;
use script::{Mode, Script};
use shared::Shared;

/// Fuzz the kernel's side of recovery with raw servers and applications.
///
/// A case is a mount, a server's script of a few hundred steps and some applications, all drawn from the seed and the
/// case's number before it begins. In half of them the server is honest: it dies, is late and repeats itself, but
/// never lies; then no application may see an error or wrong data. In the other half it does anything. After each case
/// a good server takes over, or the mount is torn down, and everything must end in time, serve again, and count right.
/// Root is needed, and a kernel with the series.
///
/// Examples:
///   fuse-restart fuzz --ops 20000
///   fuse-restart fuzz --seed 7 --case 12          one case again
///   fuse-restart fuzz --seed 7 --case 12 --print  what it does
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Default: the clock; printed
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Stop when so many operations are done: messages read, writes to the device, system calls of applications
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    ops: u64,
    /// Only this case
    #[arg(long, value_name = "C")]
    case: Option<u64>,
    /// The first case
    #[arg(long, value_name = "C", default_value_t = 0, conflicts_with = "case")]
    from: u64,
    /// Run this many cases, whatever they amount to
    #[arg(long, value_name = "N", conflicts_with = "case")]
    cases: Option<u64>,
    /// Steps of the server in one case
    #[arg(long, value_name = "N", default_value_t = 150)]
    steps: usize,
    /// Begin no case after so many seconds
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// Only servers that keep the contract, or only others
    #[arg(long, value_enum)]
    only: Option<Only>,
    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Print the script of the case, and run nothing
    #[arg(long, requires = "case")]
    print: bool,
    /// Go on after a failed case
    #[arg(long)]
    keep_going: bool,
    /// Seconds that something may take which should take no time
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    patience: u64,
    /// Seconds that one case may take
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    limit: u64,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Only {
    Honest,
    Hostile,
}

#[derive(Serialize, Debug, Default)]
struct Summary {
    kernel: String,
    seed: u64,
    steps: usize,
    passed: u32,
    failed: u32,
    skipped: u32,
    server_ops: u64,
    /// Writes to the device, messages read from it, and operations of applications.
    operations: u64,
    writes: u64,
    app_ops: u64,
    messages: u64,
    recoveries: u64,
    seconds: f64,
    failures: Vec<Failure>,
}

#[derive(Serialize, Debug)]
struct Failure {
    case: u64,
    reason: String,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let seed = args.seed.unwrap_or_else(runner::clock_seed);
    let only = args.only.map(|only| match only {
        Only::Honest => Mode::Honest,
        Only::Hostile => Mode::Hostile,
    });
    if let (true, Some(case)) = (args.print, args.case) {
        println!("{:#?}", Script::of(seed, case, args.steps, only));
        return Ok(ExitCode::SUCCESS);
    }
    let shared = Shared::new()?;
    let patience = Duration::from_secs(args.patience);
    runner::with_env(patience, seed, |env| {
        anyhow::ensure!(
            env.support.series,
            "this kernel does not offer FUSE_RESTARTABLE: boot one with the series (scripts/vm)"
        );
        fuzz(args, env, seed, only, shared)
    })
}

fn fuzz(
    args: &Args,
    env: &Env<'_>,
    seed: u64,
    only: Option<Mode>,
    shared: &'static Shared,
) -> Result<ExitCode> {
    let mut summary = Summary {
        kernel: runner::kernel()?,
        seed,
        steps: args.steps,
        ..Summary::default()
    };
    println!(
        "kernel {}, seed {seed}, {} steps a case",
        summary.kernel, args.steps
    );
    let start = Instant::now();
    let mut told = Instant::now();
    let first = args.case.unwrap_or(args.from);
    for case in first.. {
        let counts = shared.counts();
        let done = counts.operations();
        let enough = match (args.case, args.cases) {
            (Some(only), _) => case > only,
            (_, Some(n)) => case >= first + n,
            _ => done >= args.ops,
        };
        let late = args.seconds.is_some_and(|s| start.elapsed().as_secs() >= s);
        if enough || late || runner::interrupted() {
            break;
        }
        if told.elapsed() > Duration::from_secs(20) {
            told = Instant::now();
            println!(
                "case {case}: {done} operations, {:.0} s",
                start.elapsed().as_secs_f64()
            );
        }
        shared.begin();
        let steps = args.steps;
        let story = Scenario::series(format!("fuzz/{case}"), "", move |env| {
            case::run(
                env,
                &Script::of(seed, case, steps, only),
                seed ^ case,
                shared,
            )
        });
        let (verdict, reason) = runner::contained(&story, env, Duration::from_secs(args.limit))?;
        match verdict {
            Verdict::Pass => summary.passed += 1,
            Verdict::Skip => summary.skipped += 1,
            Verdict::Fail => {
                summary.failed += 1;
                println!("FAIL case {case}: {reason}\n  again: fuse-restart fuzz --seed {seed} --case {case} --steps {steps}");
                summary.failures.push(Failure { case, reason });
                if !args.keep_going {
                    break;
                }
            }
        }
    }
    let counts = shared.counts();
    summary.server_ops = counts.server_ops;
    summary.operations = counts.operations();
    summary.writes = counts.writes;
    summary.app_ops = counts.app_ops;
    summary.messages = counts.messages;
    summary.recoveries = counts.recoveries;
    summary.seconds = start.elapsed().as_secs_f64();
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&summary)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!(
        "{} passed, {} failed; {} operations: {} writes to the device, {} messages read, {} of applications; {} recoveries, {:.1} s",
        summary.passed,
        summary.failed,
        summary.operations,
        summary.writes,
        summary.messages,
        summary.app_ops,
        summary.recoveries,
        summary.seconds
    );
    let fine = summary.failed == 0 && summary.passed > 0;
    Ok(if fine {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
