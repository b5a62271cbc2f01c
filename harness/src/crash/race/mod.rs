// SPDX-License-Identifier: GPL-2.0
//! The racing workload: several processes fight for a few names while the server dies again and again, and what they
//! were told is judged for linearizability.
//!
//! * [`op`] the calls, [`draw`] draws them from the seed, [`app`] does them, [`shared`] is their clock
//! * [`model`] what one call after the other would do; [`judge`] whether a history can be explained by that;
//!   [`window`] the shortest part of one that cannot
//! * [`killer`] kills; [`case`] makes and judges one history, [`run`] many of them, [`results`] adds them up
//!
//! `Documentation/race.md` says what is judged, and what is not and why.

#[cfg(feature = "crash-points")]
mod app;
#[cfg(feature = "crash-points")]
mod case;
#[cfg(feature = "crash-points")]
mod draw;
#[cfg(feature = "crash-points")]
mod judge;
#[cfg(all(test, feature = "crash-points"))]
mod judge_tests;
#[cfg(feature = "crash-points")]
mod killer;
#[cfg(feature = "crash-points")]
mod model;
#[cfg(feature = "crash-points")]
mod op;
#[cfg(feature = "crash-points")]
mod results;
#[cfg(feature = "crash-points")]
mod run;
#[cfg(feature = "crash-points")]
mod shared;
#[cfg(feature = "crash-points")]
mod window;

use std::path::PathBuf;
use std::process::ExitCode;

/// Race for shared names while the server dies, and judge what the processes were told
///
/// Several processes create, remove, link, rename, exchange, read and append to the same few names in two shared
/// directories, while the passthrough server is killed at points of its own work or from outside. Every call is
/// recorded with the stamps of one clock; then a history must be linearizable: some order of the calls that agrees
/// with the stamps explains all results. The same histories without a server (on a tmpfs) and without deaths show that
/// the judge asks for nothing that Linux does not promise. Documentation/race.md says more.
///
/// The program must be built with crash points, as for `fuse-restart crash`. Root is needed. Examples:
///
///     scripts/vm -- target/crash/debug/fuse-restart race --seed 7 --rounds 10
///     ... race --seed 7 --rounds 10 --json all.json --resume all.json
///     ... race --seed 7 --kills tmpfs --rounds 200            the judge, without FUSE
///     ... race --seed 7 --case t4-wt/points/3 --rounds 20     one case again, twenty times
///     ... race --seed 7 --no-journal                          must be found
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
#[cfg_attr(not(feature = "crash-points"), allow(dead_code))]
pub struct Args {
    /// Default: the clock; printed
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Only this case, as it was printed: DIMENSION/KILLS/ROUND; --rounds says how often
    #[arg(long, value_name = "CASE")]
    pub case: Option<String>,
    /// Print what the processes of the case do, and run nothing
    #[arg(long, requires = "case")]
    pub print: bool,
    /// Draw every case so many times
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub rounds: u64,
    /// Begin no history after so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub seconds: Option<u64>,
    /// Only these: tmpfs (no server), none (it lives), points (it dies at points of its own), signals (from outside)
    #[arg(long, value_name = "KILLS", value_delimiter = ',')]
    pub kills: Vec<String>,
    /// Only these: t1, t4, c4 (one thread, four, four with cloned descriptors) with -wt or -wb (write-through, write-back)
    #[arg(long, value_name = "DIMENSION", value_delimiter = ',')]
    pub dims: Vec<String>,
    /// Processes that race
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub processes: usize,
    /// Operations of each process
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub operations: usize,
    /// Have the server write down nothing of what it is about to do
    #[arg(long)]
    pub no_journal: bool,
    /// Have the server not sign the contract, so that the kernel only sends again what was not answered
    #[arg(long)]
    pub resend_only: bool,
    /// Write the results to this file as JSON, also now and then
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Go on with the results of an earlier run of the same kernel, seed and mode
    #[arg(long, value_name = "FILE")]
    pub resume: Option<PathBuf>,
    /// Stop after so many failed histories [default: 5; never without journal or signature]
    #[arg(long, value_name = "N")]
    pub failures: Option<u64>,
    /// Seconds that something may take which should take no time
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub patience: u64,
}

#[cfg(feature = "crash-points")]
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    run::run(args)
}

#[cfg(not(feature = "crash-points"))]
pub fn run(_: &Args) -> anyhow::Result<ExitCode> {
    anyhow::bail!(
        "this program was built without crash points, so no server dies at one; build it with: \
         cargo build -p fuse-restart --features crash-points --target-dir target/crash"
    )
}
