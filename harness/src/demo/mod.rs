// SPDX-License-Identifier: GPL-2.0
//! `fuse-restart demo`: a real workload over a mount whose server is killed again and again.
//!
//! * [`kept`]: the mount with its keeper and server, and what they and the kernel say;
//! * [`workload`]: the commands (tar, git, sha256sum), each of which must succeed;
//! * [`killer`]: SIGKILL at random moments; [`prober`]: what an application notices of it;
//! * [`held`]: descriptors open all the time, and what becomes of them when files change behind a dead server;
//! * [`watchdog`]: a hung run is a result, not a hung demo;
//! * [`report`]: the numbers, whether they add up, and the table.

mod held;
mod kept;
mod killer;
mod prober;
mod report;
pub mod rng;
mod run;
mod source;
mod watchdog;
mod workload;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{bail, Context, Result};
use report::Column;

/// Show the main job: a workload whose server is killed again and again.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Copies a source tree with tar onto a kept passthrough mount, puts it under git, and reads it back by hash, while the
server gets SIGKILL at random moments.  Then, while the server is down, one open file is deleted behind its back and
another is replaced.  Ends with a table; the counts of the kernel, of the keeper and of the workload must add up, and
any difference is a failure.  Needs root; better run it in a guest: scripts/demo does, and merges both columns.

Examples:
  fuse-restart demo --source /usr/src/linux/fs --json patched.json
  fuse-restart demo --source /usr/src/linux/fs --stock --json stock.json
  fuse-restart demo --merge patched.json stock.json")]
pub struct Args {
    /// Write the result to FILE as JSON
    #[arg(long, value_name = "FILE", env = "FUSE_RESTART_OUT")]
    json: Option<PathBuf>,

    /// For the random moments of the kills (default: from the clock; it is printed)
    #[arg(long, value_name = "S")]
    seed: Option<u64>,

    /// Kill the server at least so often (with --stock at most 8 times are asked for)
    #[arg(long, value_name = "N", default_value_t = 20)]
    kills: u32,

    /// The tree to copy (default: `fs` of the kernel source in $FUSE_RESTART_KERNEL_SOURCE)
    #[arg(long, value_name = "DIR")]
    source: Option<PathBuf>,

    /// For a kernel without the series (FUSE_NOTIFY_RESEND alone): whatever happens is the result, not an error
    #[arg(long)]
    stock: bool,

    /// Copy so many files of the tree (default: all; with --stock 80)
    #[arg(long, value_name = "N")]
    files: Option<usize>,

    /// End the run after so many seconds (default: 600; with --stock 60)
    #[arg(long, value_name = "SECONDS")]
    time_limit: Option<u64>,

    /// The server's backing file system: `tmpfs` (a directory in the work directory) or `ext4` (on a loop device)
    #[arg(long, value_enum, default_value_t = Backing::Tmpfs)]
    backing: Backing,

    /// Threads of the server
    #[arg(long, value_name = "N", default_value_t = 2)]
    threads: u32,

    /// Where to work; needs room for three copies of the tree, and file handles and xattrs (tmpfs, ext4)
    #[arg(long, value_name = "DIR", default_value = "/tmp")]
    work_dir: PathBuf,

    /// Keep the work directory, with the keeper's log in it
    #[arg(long)]
    keep_work_dir: bool,

    /// Print the table of one or two results, and do nothing else
    #[arg(long, num_args = 1..=2, value_names = ["A.json", "B.json"])]
    merge: Option<Vec<PathBuf>>,
}

#[derive(clap::ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
enum Backing {
    Tmpfs,
    Ext4,
}

pub fn run(args: Args) -> Result<ExitCode> {
    if let Some(files) = &args.merge {
        return merge(files, args.json.as_deref());
    }
    let column = run::run(&args)?;
    report::print(std::slice::from_ref(&column));
    if let Some(path) = &args.json {
        write_json(path, &column)?;
    }
    Ok(verdict(&[column]))
}

fn merge(files: &[PathBuf], json: Option<&Path>) -> Result<ExitCode> {
    let columns = files
        .iter()
        .map(|p| read_json(p))
        .collect::<Result<Vec<_>>>()?;
    report::print(&columns);
    if let Some(path) = json {
        write_json(path, &columns)?;
    }
    Ok(verdict(&columns))
}

/// A run without the series is there to be looked at; only the series can fail.
fn verdict(columns: &[Column]) -> ExitCode {
    match columns.iter().all(|c| c.stock || c.passed()) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn read_json(path: &Path) -> Result<Column> {
    let text = fs::read(path).with_context(|| format!("result of a demo {}", path.display()))?;
    if text.is_empty() {
        bail!(
            "{} is empty: that run did not come to its end",
            path.display()
        );
    }
    serde_json::from_slice(&text)
        .with_context(|| format!("{} is no result of a demo", path.display()))
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
