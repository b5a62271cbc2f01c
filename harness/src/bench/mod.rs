// SPDX-License-Identifier: GPL-2.0
//! Measurements on the running kernel: with a raw server of one thread, and of the passthrough server.

mod handles;
mod journal;
mod memory;
mod ops;
mod outage;
mod replay;
mod server;

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::{mount, MsFlags};
use nix::sched::{unshare, CloneFlags};
use serde::Serialize;

use crate::raw::ctl;
use crate::raw::env::{Env, SharedIds, Support};

#[derive(clap::Subcommand, Debug)]
pub enum Bench {
    /// Replay against storm: how fast a recovery shows N inodes, and how fast T threads could stat them
    Replay(replay::Args),
    /// The normal path: time per stat, open and close, 4 KiB read and write
    Ops(ops::Args),
    Journal(journal::Args),
    Handles(handles::Args),
    Outage(outage::Args),
}

pub fn run(which: &Bench) -> Result<ExitCode> {
    // Mounts of a benchmark that is killed go with its namespace.
    unshare(CloneFlags::CLONE_NEWNS).context("benchmarks need root for their mounts")?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .context("cannot make the mounts private")?;
    ctl::ensure_mounted()?;
    let scratch =
        nix::unistd::mkdtemp("/tmp/fuse-restart-bench.XXXXXX").context("no temporary directory")?;
    let ids = SharedIds::new()?;
    let env = Env {
        patience: Duration::from_secs(60),
        seed: 0,
        support: Support::default(),
        ids: &ids,
        scratch: &scratch,
        problems: RefCell::default(),
    };
    let result = match which {
        Bench::Replay(args) => replay::run(args, &env),
        Bench::Ops(args) => ops::run(args, &env),
        Bench::Journal(args) => journal::run(args, &env),
        Bench::Handles(args) => handles::run(args, &env),
        Bench::Outage(args) => outage::run(args, &env),
    };
    let _ = fs::remove_dir(&scratch);
    let problems = env.problems.into_inner();
    result?;
    anyhow::ensure!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(ExitCode::SUCCESS)
}

fn kernel() -> Result<String> {
    Ok(nix::sys::utsname::uname()?
        .release()
        .to_string_lossy()
        .into_owned())
}

fn write_json(path: Option<&PathBuf>, value: &impl Serialize) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    store(path, &(serde_json::to_string_pretty(value)? + "\n"))
}

fn store(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The middle value; of an even number the lower of the two.
fn median<T: Copy + PartialOrd>(values: &[T]) -> Option<T> {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    sorted.get(sorted.len().checked_sub(1)? / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[3, 1, 2]), Some(2));
        assert_eq!(median(&[4, 1, 2, 3]), Some(2));
        assert_eq!(median::<u32>(&[]), None);
    }
}
