// SPDX-License-Identifier: GPL-2.0
//! `bench replay`: N cached inodes, one server thread; a storm of statx by 1, 2, 4, 8 threads, then recoveries.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use serde::Serialize;

use super::memory::Kernel;
use super::server::{Server, Stop};
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::ops;
use crate::raw::wire::{init, Report};

/// Show how fast a recovery replays N cached inodes, beside how fast applications could have asked for them.
///
/// One raw server thread answers everything. First T = 1, 2, 4, 8 threads statx(AT_STATX_FORCE_SYNC) all inodes (the
/// "storm" that a recovery without replay would cost), then RESTARTED is said and the replays are timed until the
/// report, by the wall clock and by the kernel's own numbers. Another recovery samples the kernel's memory. On a
/// kernel without the series only the storm is run.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Cached inodes
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    inodes: u64,
    /// Most threads of the storm: it is run with 1, 2, 4 ... up to this many
    #[arg(long, value_name = "T", default_value_t = 8)]
    threads: u32,
    /// Recoveries that are timed
    #[arg(long, value_name = "N", default_value_t = 5)]
    runs: u32,
    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Serialize)]
struct Storm {
    threads: u32,
    seconds: f64,
    per_second: f64,
}

#[derive(Serialize, Clone, Copy)]
struct Replay {
    /// From before RESTARTED to after the report was read.
    seconds: f64,
    per_second: f64,
    /// By the report: the phases ROOT and REPLAY.
    kernel_seconds: f64,
    kernel_per_second: f64,
}

#[derive(Serialize)]
struct Memory {
    before: Kernel,
    /// The largest of each value over all samples.
    most: Kernel,
    samples: usize,
    grown_bytes: i64,
    grown_slab_bytes: i64,
    grown_fuse_request_bytes: Option<i64>,
}

#[derive(Serialize)]
struct Results {
    kernel: String,
    series: bool,
    processors: usize,
    inodes: u64,
    storm: Vec<Storm>,
    replay: Vec<Replay>,
    replay_per_second: Option<f64>,
    replay_to_one_thread: Option<f64>,
    replay_to_fastest: Option<f64>,
    memory: Option<Memory>,
}

pub fn run(args: &Args, env: &Env<'_>) -> Result<()> {
    ensure!(
        args.inodes > 0 && args.threads > 0 && args.runs > 0,
        "nothing to measure: all numbers must be at least 1"
    );
    let mut kit = Kit::mount(env, Config::default())?;
    let series = kit.offered & init::RESTARTABLE != 0;
    let mut server = Server::new(kit.dev.raw(), args.inodes);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    println!(
        "{} inodes, kernel {}, {processors} processors, one server thread",
        args.inodes,
        super::kernel()?
    );

    let first = storm(&kit, &mut server, args.inodes, 1, false)?;
    println!(
        "first lookups       {:>10.0} a second",
        args.inodes as f64 / first.as_secs_f64()
    );
    let mut storms = Vec::new();
    let mut threads = 1;
    while threads <= args.threads {
        let seconds = storm(&kit, &mut server, args.inodes, threads, true)?.as_secs_f64();
        let per_second = args.inodes as f64 / seconds;
        println!(
            "storm, {threads:>3} thread{} {per_second:>10.0} a second",
            if threads == 1 { " " } else { "s" }
        );
        storms.push(Storm {
            threads,
            seconds,
            per_second,
        });
        threads *= 2;
    }

    let mut replays = Vec::new();
    let mut memory = None;
    if series {
        // The first of all, so that what a recovery allocates once and keeps is seen as well.
        memory = Some(sample(&mut kit, &mut server, args.inodes)?);
        for _ in 0..args.runs {
            replays.push(replay(&mut kit, &mut server, args.inodes)?);
        }
    }
    let rates: Vec<f64> = replays.iter().map(|r| r.per_second).collect();
    let rate = super::median(&rates);
    let one = storms.first().map(|s| s.per_second);
    let fastest = storms.iter().map(|s| s.per_second).reduce(f64::max);
    let results = Results {
        kernel: super::kernel()?,
        series,
        processors,
        inodes: args.inodes,
        replay_per_second: rate,
        replay_to_one_thread: rate.zip(one).map(|(r, s)| r / s),
        replay_to_fastest: rate.zip(fastest).map(|(r, s)| r / s),
        storm: storms,
        replay: replays,
        memory,
    };
    tell(&results);
    super::write_json(args.json.as_ref(), &results)
}

fn tell(results: &Results) {
    for r in &results.replay {
        println!(
            "replay              {:>10.0} a second ({:.0} by the kernel's clock)",
            r.per_second, r.kernel_per_second
        );
    }
    match (
        results.replay_per_second,
        results.replay_to_one_thread,
        results.replay_to_fastest,
    ) {
        (Some(rate), Some(one), Some(fastest)) => {
            println!("replay, median      {rate:>10.0} a second: {one:.1} times the storm of one thread, {fastest:.1} times the fastest");
        }
        _ => println!("no replay: this kernel does not offer FUSE_RESTARTABLE"),
    }
    if let Some(m) = &results.memory {
        let requests = m
            .grown_fuse_request_bytes
            .map_or("not listed".to_owned(), |b| format!("{} KiB", b / 1024));
        println!(
            "kernel memory grew by {} KiB during a replay ({} samples; unreclaimable slab {} KiB, fuse_request {requests})",
            m.grown_bytes / 1024,
            m.samples,
            m.grown_slab_bytes / 1024
        );
    }
}

/// `threads` threads stat all inodes between them, while this thread serves. The time from start to the end of the
/// last one.
fn storm(
    kit: &Kit<'_>,
    server: &mut Server,
    inodes: u64,
    threads: u32,
    force: bool,
) -> Result<Duration> {
    // All of them and the one that stops the clock.
    let (start, end) = (
        Arc::new(Barrier::new(threads as usize + 1)),
        Arc::new(Barrier::new(threads as usize + 1)),
    );
    let workers: Vec<_> = (0..u64::from(threads))
        .map(|t| {
            let (start, end, mnt) = (start.clone(), end.clone(), kit.mnt.clone());
            std::thread::spawn(move || {
                let share = inodes * t / u64::from(threads)..inodes * (t + 1) / u64::from(threads);
                let paths: Vec<PathBuf> = share.map(|i| mnt.join(format!("n{i}"))).collect();
                start.wait();
                let stat = if force { ops::stat } else { ops::stat_cached };
                let result = paths.iter().try_for_each(|p| stat(p).map(drop));
                end.wait();
                result
            })
        })
        .collect();
    let mnt = kit.mnt.clone();
    let clock = std::thread::spawn(move || {
        start.wait();
        let began = Instant::now();
        end.wait();
        let took = began.elapsed();
        let _ = ops::stat(&mnt.join("stop"));
        took
    });
    let stopped = server.serve()?;
    ensure!(
        matches!(stopped, Stop::Asked),
        "the storm ended with {stopped:?}"
    );
    let took = clock
        .join()
        .map_err(|_| anyhow::anyhow!("the clock's thread panicked"))?;
    for worker in workers {
        worker
            .join()
            .map_err(|_| anyhow::anyhow!("a thread of the storm panicked"))?
            .context("a stat of the storm")?;
    }
    Ok(took)
}

/// One recovery, up to the report.
fn until_report(kit: &mut Kit<'_>, server: &mut Server, inodes: u64) -> Result<Report> {
    server.replayed = 0;
    kit.restarted()?;
    let Stop::Report(report) = server.serve()? else {
        anyhow::bail!("no report came")
    };
    ensure!(
        report.replayed == inodes + 1
            && report.confirmed == report.replayed
            && server.replayed == report.replayed,
        "{} inodes and the root are cached; {} replays were answered, the report says {report:?}",
        inodes,
        server.replayed
    );
    Ok(report)
}

fn release(kit: &mut Kit<'_>, report: &Report) -> Result<()> {
    kit.commit_epoch(report.epoch).context("COMMIT")?;
    kit.wait_serving()
}

fn replay(kit: &mut Kit<'_>, server: &mut Server, inodes: u64) -> Result<Replay> {
    let began = Instant::now();
    let report = until_report(kit, server, inodes)?;
    let seconds = began.elapsed().as_secs_f64();
    release(kit, &report)?;
    let kernel_seconds = (report.root_ns + report.replay_ns) as f64 / 1e9;
    let count = report.replayed as f64;
    Ok(Replay {
        seconds,
        per_second: count / seconds,
        kernel_seconds,
        kernel_per_second: count / kernel_seconds,
    })
}

/// A recovery whose server looks at the kernel's memory at every fiftieth of the way.
fn sample(kit: &mut Kit<'_>, server: &mut Server, inodes: u64) -> Result<Memory> {
    // Once for nothing: the samples' own first use of memory is not the recovery's.
    Kernel::now()?;
    let before = Kernel::now()?;
    let seen = Rc::new(RefCell::new(Vec::with_capacity(128)));
    let log = seen.clone();
    let every = (inodes / 50).max(1);
    server.every = Some((
        every,
        Box::new(move || log.borrow_mut().extend(Kernel::now())),
    ));
    let report = until_report(kit, server, inodes)?;
    server.every = None;
    seen.borrow_mut().push(Kernel::now()?);
    release(kit, &report)?;
    let seen = seen.borrow();
    ensure!(seen.len() > 1, "the kernel's memory could not be sampled");
    let most = Kernel {
        total: seen.iter().map(|k| k.total).max().unwrap_or(0),
        slab_unreclaimable: seen.iter().map(|k| k.slab_unreclaimable).max().unwrap_or(0),
        fuse_requests: seen.iter().filter_map(|k| k.fuse_requests).max(),
    };
    let grown = |a: u64, b: u64| a as i64 - b as i64;
    Ok(Memory {
        samples: seen.len(),
        grown_bytes: grown(most.total, before.total),
        grown_slab_bytes: grown(most.slab_unreclaimable, before.slab_unreclaimable),
        grown_fuse_request_bytes: most
            .fuse_requests
            .zip(before.fuse_requests)
            .map(|(a, b)| grown(a, b)),
        before,
        most,
    })
}
