// SPDX-License-Identifier: GPL-2.0
//! `bench ops`: what one operation costs while nothing recovers.
//!
//! Made for `-icount shift=0,sleep=off` on one emulated processor, where a nanosecond is an instruction and two runs
//! differ by next to nothing; elsewhere it is an ordinary micro-benchmark.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use nix::fcntl::OFlag;
use nix::sched::{sched_setaffinity, CpuSet};
use nix::unistd::Pid;
use serde::Serialize;
use zerocopy::IntoBytes;

use super::server::{pages, Server, Stop};
use crate::raw::env::Env;
use crate::raw::kit::{Config, Kit};
use crate::raw::ops;
use crate::raw::wire::init;

/// Time stat, open and close, 4 KiB reads and 4 KiB writes, each a round trip to a raw server.
///
/// Client and server are two threads on one processor. Under `scripts/vm --icount` a nanosecond is one instruction,
/// so that stock and patched kernel can be compared to a fraction of a percent. The second half is the same for a
/// server that asks to be restartable: compare it with the second half of a kernel that does not grant it, since
/// a second mount costs a little by itself.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Operations in one batch
    #[arg(long, value_name = "N", default_value_t = 1000)]
    count: u32,
    /// Batches of every kind; the median is told
    #[arg(long, value_name = "N", default_value_t = 9)]
    batches: u32,
    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Serialize)]
struct Kind {
    name: &'static str,
    /// Whether the server asked to be restartable; a kernel without the series does not grant it.
    asked: bool,
    ns_per_op: f64,
    batches_ns: Vec<u64>,
}

#[derive(Serialize)]
struct Results {
    kernel: String,
    series: bool,
    count: u32,
    operations: Vec<Kind>,
}

pub fn run(args: &Args, env: &Env<'_>) -> Result<()> {
    ensure!(
        args.count > 0 && args.batches > 0,
        "nothing to measure: all numbers must be at least 1"
    );
    let mut cpu = CpuSet::new();
    cpu.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &cpu).context("cannot stay on one processor")?;
    let (mut operations, series) = measure(args, env, false)?;
    operations.extend(measure(args, env, true)?.0);
    let results = Results {
        kernel: super::kernel()?,
        series,
        count: args.count,
        operations,
    };
    println!(
        "kernel {}; {} batches of {}; median ns per operation (instructions under --icount)",
        results.kernel, args.batches, args.count
    );
    for kind in &results.operations {
        let spread = kind
            .batches_ns
            .iter()
            .max()
            .zip(kind.batches_ns.iter().min());
        let spread = spread.map_or(0.0, |(a, b)| 100.0 * (a - b) as f64 / *b as f64);
        let connection = match (kind.asked, series) {
            (false, _) => "unsigned",
            (true, true) => "signed",
            (true, false) => "not granted",
        };
        println!(
            "{:<12} {connection:<11} {:>10.1}   (batches differ by {spread:.2} %)",
            kind.name, kind.ns_per_op
        );
    }
    super::write_json(args.json.as_ref(), &results)
}

/// The operations on one mount; also whether the kernel has the series.
fn measure(args: &Args, env: &Env<'_>, asked: bool) -> Result<(Vec<Kind>, bool)> {
    let config = if asked {
        Config::default()
    } else {
        Config::unsigned()
    };
    let kit = Kit::mount(env, config)?;
    let series = kit.offered & init::RESTARTABLE != 0;
    let mut server = Server::new(kit.dev.raw(), 1);
    let (count, batches, mnt) = (args.count, args.batches, kit.mnt.clone());
    let client = std::thread::spawn(move || -> Result<Vec<Kind>> {
        let result = client(&mnt.join("n0"), count, batches, asked);
        let _ = ops::stat(&mnt.join("stop"));
        result
    });
    let stopped = server.serve()?;
    ensure!(
        matches!(stopped, Stop::Asked),
        "the server stopped with {stopped:?}"
    );
    let kinds = client
        .join()
        .map_err(|_| anyhow::anyhow!("the client panicked"))??;
    Ok((kinds, series))
}

fn client(path: &std::path::Path, count: u32, batches: u32, asked: bool) -> Result<Vec<Kind>> {
    let fd = ops::open(path, OFlag::O_RDWR)?;
    let (mut buffer, data) = (pages(1), pages(1));
    let run = |name: &'static str, op: &mut dyn FnMut() -> ops::Done<()>| -> Result<Kind> {
        let mut batches_ns = Vec::with_capacity(batches as usize);
        // The first batch warms up caches and branch history, and is not told.
        for batch in 0..=batches {
            let began = Instant::now();
            for _ in 0..count {
                op().context(name)?;
            }
            let took = began.elapsed().as_nanos() as u64;
            if batch > 0 {
                batches_ns.push(took);
            }
        }
        let middle = super::median(&batches_ns).context("no batch")?;
        Ok(Kind {
            name,
            asked,
            ns_per_op: middle as f64 / f64::from(count),
            batches_ns,
        })
    };
    let kinds = vec![
        run("stat", &mut || ops::stat(path).map(drop))?,
        run("open+close", &mut || {
            ops::close(ops::open(path, OFlag::O_RDONLY)?)
        })?,
        run(
            "read 4 KiB",
            &mut || match ops::pread_into(fd, buffer.as_mut_bytes(), 0)? {
                4096 => Ok(()),
                _ => Err(nix::errno::Errno::EIO),
            },
        )?,
        run(
            "write 4 KiB",
            &mut || match ops::pwrite(fd, data.as_bytes(), 0)? {
                4096 => Ok(()),
                _ => Err(nix::errno::Errno::EIO),
            },
        )?,
    ];
    ops::close(fd)?;
    Ok(kinds)
}
