// SPDX-License-Identifier: GPL-2.0
//! `bench outage`: how long applications wait when the server crashes, and for what.
//!
//! * [`mounted`] a mount under the real keeper with N cached inodes
//! * [`trace`] when the kernel's recovery changed its phase; [`sample`] one crash, taken apart

pub(super) mod mounted;
mod sample;
mod trace;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use serde::{Deserialize, Serialize};

use crate::earlier::{self, Of};
use crate::raw::env::Env;
use crate::scenario::runner::{catch_signals, interrupted};
use mounted::Mounted;
use sample::{percentile, Sample, PARTS};
use trace::Trace;

const TELL_EVERY: Duration = Duration::from_secs(20);
/// Crashes of a hundred whose stamps may disagree, before nothing is believed.
const MOST_DOUBTFUL: usize = 2;

/// Crash to first answered request, and its parts: the distribution over many crashes
///
/// `serve passthrough` under `keep --restart-delay 0`, over N files of a tmpfs of our own (1,000 in a directory), each
/// of which was looked up once, so the kernel caches N inodes and those of their directories. Then, again and again: the
/// server gets SIGKILL, and one request (GETATTR of an open file) is made at once and waits for its answer.
///
///     notice   SIGKILL, until the keeper has told the kernel (it saw the death by its pidfd, reaped the server and
///              killed what it may have left; that much of it is `(seen)`)
///     start    until the next server says RESTARTED for itself
///     replay   until every inode was shown to it, and the report is there
///     report   until it says COMMIT
///     release  until the request is answered
///
/// The stamps are CLOCK_MONOTONIC: the application's own, the keeper's events, the tracepoint `fuse_restart_phase`. A
/// crash whose stamps are not in order, or of which the kernel's `recovery` file says something else by more than
/// 10 ms and 2 %, is counted as doubtful and left out; more than 2 in 100 of them are an error. Needs root, a kernel with
/// the series, and tracefs in /sys/kernel/tracing. Ctrl-C ends it with the table of what was done.
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Cached inodes; more than one number: one after the other
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "1,10000,100000"
    )]
    inodes: Vec<u64>,
    /// Crashes for each number of inodes
    #[arg(long, value_name = "C", default_value_t = 100)]
    crashes: usize,
    /// Begin no crash after so many seconds for each number of inodes
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// Threads of the server
    #[arg(long, value_name = "N", default_value_t = 4)]
    threads: u16,
    /// Write all crashes to this file as JSON, also now and then
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Go on with the crashes of an earlier run on the same kernel
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
}

/// All crashes with one number of inodes.
#[derive(Default, Serialize, Deserialize)]
struct Series {
    samples: Vec<Sample>,
    /// Left out: what was wrong with their stamps.
    doubtful: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Results {
    kernel: String,
    #[serde(default)]
    build: String,
    threads: u16,
    inodes: BTreeMap<u64, Series>,
}

impl Results {
    fn of(&self) -> Of<'_> {
        Of {
            kernel: &self.kernel,
            build: &self.build,
            asked: format!("{} threads", self.threads),
        }
    }
}

pub fn run(args: &Args, env: &Env<'_>) -> Result<()> {
    ensure!(
        args.crashes > 0 && !args.inodes.is_empty() && args.inodes.iter().all(|n| *n > 0),
        "nothing to measure: all numbers must be at least 1"
    );
    // Ctrl-C would only interrupt a request, which no request of a FUSE file system is.
    catch_signals()?;
    let mut results = Results {
        kernel: super::kernel()?,
        build: crate::scenario::runner::build()?,
        threads: args.threads,
        inodes: BTreeMap::new(),
    };
    if let Some(path) = &args.resume {
        let old: Results = earlier::read(path, "bench outage")?;
        earlier::ensure_same(path, &old.of(), &results.of())?;
        results = old;
    }
    println!(
        "kernel {}, {} processors, {} threads; milliseconds",
        results.kernel,
        std::thread::available_parallelism().map_or(1, usize::from),
        args.threads
    );
    for inodes in &args.inodes {
        let done = results
            .inodes
            .get(inodes)
            .map_or(0, |series| series.samples.len());
        let result = match done < args.crashes && !interrupted() {
            true => measure(args, env, *inodes, &mut results),
            false => Ok(()),
        };
        tell(*inodes, results.inodes.entry(*inodes).or_default());
        super::write_json(args.json.as_ref(), &results)?;
        result?;
    }
    Ok(())
}

fn measure(args: &Args, env: &Env<'_>, inodes: u64, results: &mut Results) -> Result<()> {
    let began = Instant::now();
    let trace = Trace::begin()?;
    let mut mounted = Mounted::new(env.scratch, inodes, args.threads)?;
    let cached = mounted.look_everything_up()?;
    eprintln!(
        "{inodes} inodes: {cached} cached with their directories and the root, {:.1} s",
        began.elapsed().as_secs_f64()
    );
    let (began, mut told) = (Instant::now(), Instant::now());
    loop {
        let series = results.inodes.entry(inodes).or_default();
        let late = |limit| began.elapsed() >= Duration::from_secs(limit);
        if series.samples.len() >= args.crashes || interrupted() || args.seconds.is_some_and(late) {
            return Ok(());
        }
        match mounted.crash(&trace)? {
            Ok(sample) => {
                ensure!(
                    sample.replayed >= cached,
                    "{cached} inodes were cached, {} were replayed: the machine has too little memory",
                    sample.replayed
                );
                series.samples.push(sample);
            }
            Err(e) => series.doubtful.push(format!("{e:#}")),
        }
        let all = series.samples.len() + series.doubtful.len();
        ensure!(
            series.doubtful.len() <= (all * MOST_DOUBTFUL).div_ceil(100).max(2),
            "{} of {all} crashes cannot be believed; the last: {}",
            series.doubtful.len(),
            series.doubtful.last().map_or("", String::as_str)
        );
        if told.elapsed() > TELL_EVERY {
            told = Instant::now();
            let (done, of) = (series.samples.len(), args.crashes);
            eprintln!(
                "{done} of {of} crashes, {:.0} s",
                began.elapsed().as_secs_f64()
            );
            super::write_json(args.json.as_ref(), results)?;
        }
    }
}

fn tell(inodes: u64, series: &Series) {
    println!(
        "{inodes} inodes, {} crashes, {} left out{}",
        series.samples.len(),
        series.doubtful.len(),
        series
            .doubtful
            .last()
            .map_or(String::new(), |why| format!(" (the last: {why})"))
    );
    if series.samples.is_empty() {
        return;
    }
    println!("            p50      p90      p99      max");
    let line = |name: &str, of: &dyn Fn(&Sample) -> u64| {
        let mut values: Vec<u64> = series.samples.iter().map(of).collect();
        let [p50, p90, p99, max] =
            [50, 90, 99, 100].map(|p| percentile(&mut values, p) as f64 / 1e6);
        println!("{name:<8} {p50:>8.2} {p90:>8.2} {p99:>8.2} {max:>8.2}");
    };
    line("whole", &|sample| sample.whole);
    for (n, part) in PARTS.iter().enumerate() {
        line(part, &|sample| sample.parts[n]);
    }
    line("(seen)", &|sample| sample.seen);
}
