// SPDX-License-Identifier: GPL-2.0
//! The crash matrix: a server that dies at every point of every operation, and applications that must not notice.
//!
//! * [`op`] what an application does, [`generate`], [`steps`] and [`programs`] draw it from the seed, [`app`]
//!   does it
//! * [`shown`] attributes, [`tree`] a tree, as text that can be compared
//! * [`kept`] a fresh mount under the real keeper, [`rest`] what must not be there at rest, [`case`] one case on
//!   it, [`plan`] its name
//! * [`group`] all cases of one workload; [`minimise`] a failed one
//! * [`race`] is another workload, on shared names, with a judge of its own
//! * [`cells`] which deaths show when the server lacks something, and why not the others; [`explained`] the table of it
//! * [`run`] everything, [`tally`] the results, [`ledger`] which of them count, [`sum`] of several runs, [`kmsg`] what the
//!   kernel complains of

#[cfg(feature = "crash-points")]
mod app;
#[cfg(feature = "crash-points")]
mod case;
#[cfg(feature = "crash-points")]
mod cells;
#[cfg(feature = "crash-points")]
mod dim;
#[cfg(feature = "crash-points")]
mod explained;
#[cfg(feature = "crash-points")]
mod generate;
#[cfg(feature = "crash-points")]
mod group;
#[cfg(feature = "crash-points")]
mod kept;
#[cfg(feature = "crash-points")]
mod kmsg;
#[cfg(feature = "crash-points")]
mod ledger;
#[cfg(feature = "crash-points")]
mod minimise;
#[cfg(feature = "crash-points")]
mod op;
#[cfg(feature = "crash-points")]
mod plan;
#[cfg(feature = "crash-points")]
mod programs;
pub mod race;
#[cfg(feature = "crash-points")]
mod rest;
#[cfg(feature = "crash-points")]
mod run;
#[cfg(feature = "crash-points")]
mod shown;
#[cfg(feature = "crash-points")]
mod steps;
#[cfg(feature = "crash-points")]
mod sum;
#[cfg(feature = "crash-points")]
mod tally;
#[cfg(feature = "crash-points")]
mod tree;

use std::path::PathBuf;
use std::process::ExitCode;

/// Kill the passthrough server at every point of every operation, and compare
///
/// A case is a fresh mount under the real keeper, a small workload drawn from the seed, and one or two points at which
/// the server kills itself. Every system call's result and the tree at the end must be those of the same workload
/// without a crash; the keeper must have counted as many restarts, the kernel's lookup counts must be the server's,
/// and nothing may be left over. A point that is not reached fails its case.
///
/// The program must be built with crash points, which no server of any use has:
///
///     cargo build -p fuse-restart --features crash-points --target-dir target/crash
///
/// Root is needed, and for more than --resend-only a kernel with the series. Examples:
///
///     scripts/vm -- target/crash/debug/fuse-restart crash --seed 7
///     ... crash --seed 7 --rounds 20 --json all.json            about 900 cases a round
///     ... crash --seed 7 --rounds 20 --json all.json --resume all.json
///     ... crash --seed 7 --case t1-wt/mkdir/0/mkdir.mkdirat:1   one case again
///     ... crash --seed 7 --case t1-wt/mkdir/0/ --print          what its workload does
///     ... crash --seed 7 --journal off                          how many differ without the journal
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
#[cfg_attr(not(feature = "crash-points"), allow(dead_code))]
pub struct Args {
    /// Default: the clock; printed
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Only this case, as it was printed: DIMENSION/FOCUS/ROUND/POINT:NTH[+POINT:NTH]
    #[arg(long, value_name = "CASE")]
    case: Option<String>,
    /// Print the workload of the case, and run nothing
    #[arg(long, requires = "case")]
    print: bool,
    /// Draw every workload so many times
    #[arg(long, value_name = "N", default_value_t = 1)]
    rounds: u64,
    /// The first round
    #[arg(long, value_name = "N", default_value_t = 0)]
    from: u64,
    /// Begin no case after so many seconds
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// Only these kinds of workload (`many`, the one with many deaths in a case, runs only if it is named here)
    #[arg(long, value_name = "FOCUS", value_delimiter = ',')]
    only: Vec<String>,
    /// Only these: t1, t4, c4 (one thread, four, four with cloned descriptors) with -wt or -wb (write-through, write-back)
    #[arg(long, value_name = "DIMENSION", value_delimiter = ',')]
    dims: Vec<String>,
    /// Whether the server writes down what it is about to do
    #[arg(long, value_enum, default_value = "on")]
    journal: Switch,
    /// Have the server not sign the contract, so that the kernel only sends again what was not answered
    #[arg(long)]
    resend_only: bool,
    /// Write the results to this file as JSON, also now and then
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Go on with the results of an earlier run of the same kernel, seed and mode
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
    /// Run nothing: add up what runs wrote with --json, and print crashes by opcode and point
    #[arg(long, value_name = "FILE", value_delimiter = ',', exclusive = true)]
    sum: Vec<PathBuf>,
    /// Write the table to this file as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Stop after so many failed cases [default: 10; never without journal or signature]
    #[arg(long, value_name = "N")]
    failures: Option<u64>,
    /// Do not look for the shortest workload that shows a difference
    #[arg(long)]
    no_shortest: bool,
    /// Seconds that something may take which should take no time [default: 120; with --resend-only 10]
    #[arg(long, value_name = "SECONDS")]
    patience: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Switch {
    On,
    Off,
}

#[cfg(feature = "crash-points")]
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match args.sum.is_empty() {
        true => run::run(args),
        false => sum::run(&args.sum),
    }
}

#[cfg(not(feature = "crash-points"))]
pub fn run(_: &Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!(
        "this program was built without crash points, so no server dies at one; build it with: \
         cargo build -p fuse-restart --features crash-points --target-dir target/crash"
    )
}
