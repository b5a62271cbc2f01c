// SPDX-License-Identifier: GPL-2.0
//! `bench handles`: what it costs that open files survive a crash.

use std::fs::File;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use rust_fuse_notify::std::state::{Config, HandleKind, NewHandle, State};
use rust_fuse_notify::std::wire::Identity;
use serde::Serialize;

use super::outage::mounted::Mounted;
use crate::raw::env::Env;

/// What it costs that open files survive a crash: entry in the state and its removal, against open() and close()
///
/// The first rows are the state alone, as a server uses it for OPEN and RELEASE: one handle is entered and removed, while
/// others stay open. The last is an application that opens and closes a file of `serve passthrough`. Needs root.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Pairs in one batch
    #[arg(long, value_name = "N", default_value_t = 2000)]
    count: u32,
    /// Batches of every kind; the median is told
    #[arg(long, value_name = "N", default_value_t = 15)]
    batches: u32,
    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Handles that stay open meanwhile, and of how many files.
const OTHERS: [(u64, u64); 3] = [(0, 1), (100_000, 100_000), (100_000, 1)];

#[derive(Serialize)]
struct Row {
    what: String,
    ns: f64,
}

#[derive(Serialize)]
struct Results {
    kernel: String,
    rows: Vec<Row>,
    /// Bytes of the state that one handle takes.
    bytes: f64,
    /// The slowest of the first rows, as a part of open() and close().
    part: f64,
}

pub fn run(args: &Args, env: &Env<'_>) -> Result<()> {
    ensure!(
        args.count > 0 && args.batches > 0,
        "nothing to measure: all numbers must be at least 1"
    );
    let mut rows = Vec::new();
    let mut bytes = 0.0;
    for (open, files) in OTHERS {
        let (ns, each) = alone(args, open, files)?;
        bytes = f64::max(bytes, each);
        let what = match (open, files) {
            (0, _) => "state, nothing else open".to_owned(),
            (_, 1) => format!("state, one file open {open} times"),
            _ => format!("state, {open} files open"),
        };
        rows.push(Row { what, ns });
    }
    let slowest = rows.iter().map(|row| row.ns).fold(0.0, f64::max);
    let mounted = Mounted::new(env.scratch, 1, 1)?;
    let path = mounted.file(0);
    let whole = median(args, &mut || {
        drop(File::open(&path).with_context(|| path.display().to_string())?);
        Ok(())
    })?;
    rows.push(Row {
        what: "open() and close() through the mount".to_owned(),
        ns: whole,
    });
    let results = Results {
        kernel: super::kernel()?,
        rows,
        bytes,
        part: slowest / whole,
    };
    println!(
        "kernel {}; {} batches of {}; median ns for one",
        results.kernel, args.batches, args.count
    );
    for row in &results.rows {
        println!("{:<40} {:>10.0}", row.what, row.ns);
    }
    println!(
        "bytes of state for a handle: {:.1}; at most {:.2} % of the time",
        results.bytes,
        100.0 * results.part
    );
    super::write_json(args.json.as_ref(), &results)
}

/// One handle in and out of a state that has others: nanoseconds, and bytes for each of the others.
fn alone(args: &Args, open: u64, files: u64) -> Result<(f64, f64)> {
    let memfd = State::create_memfd()?;
    let state = State::open(memfd.try_clone()?, Identity([1, 2]), &Config::default())?;
    let handle = |n: u64| NewHandle {
        nodeid: 1 + n % files,
        flags: 0,
        kind: HandleKind::File,
        opener: 2 * n,
        aux: [0; 2],
    };
    let blocks = || Ok::<_, anyhow::Error>(nix::sys::stat::fstat(&memfd)?.st_blocks);
    let before = blocks()?;
    for n in 0..open {
        state.handles().insert(&handle(n))?;
    }
    let bytes = (blocks()? - before) as f64 * 512.0 / open.max(1) as f64;
    let ns = median(args, &mut || {
        let fh = state.handles().insert(&handle(open))?;
        state.handles().remove(fh).context("it was just entered")?;
        Ok(())
    })?;
    Ok((ns, bytes))
}

fn median(args: &Args, pair: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    let mut batches = Vec::new();
    // The first warms up, and is not told.
    for batch in 0..=args.batches {
        let began = Instant::now();
        for _ in 0..args.count {
            pair()?;
        }
        if batch > 0 {
            batches.push(began.elapsed().as_nanos() as u64);
        }
    }
    let middle = super::median(&batches).context("no batch")?;
    Ok(middle as f64 / f64::from(args.count))
}
