// SPDX-License-Identifier: GPL-2.0
//! Scenarios: small scripted stories told to the kernel's FUSE client, each guarding one thing.
//!
//! A family a file; each file lists its own in `scenarios()`. A scenario fails by returning an error, and by
//! leaving something behind: the runner ([`runner`]) ends every connection and expects that everybody wakes up.

mod aftermath;
mod again;
mod answer;
mod background;
mod bad_identity;
mod bad_inode;
mod bad_inode_rare;
mod bad_input;
mod clones;
mod counts;
mod dentries;
mod evictions;
mod fault;
mod fuseblk;
mod handover;
mod held;
mod help;
mod hostile;
mod interrupts;
mod kill;
mod kill_io;
mod kill_server;
mod late;
mod late_reused;
mod lost;
mod module;
mod no_memory;
mod patience;
mod replay;
mod resend;
mod resend_windows;
mod revoked;
mod revoked_held;
mod revoked_io;
mod revoked_map;
pub mod runner;
mod stale;
mod stale_data;
mod stale_drop;
mod stale_size;
mod stale_use;
mod stale_write;
mod stock_order;
mod successor;
mod survive;
mod system;
mod tmpfile;
mod trace;
mod transit;
mod unmount;
mod unprivileged;
mod waits;
mod windows;

use std::path::PathBuf;

use anyhow::Result;

use crate::raw::env::Env;

pub use runner::run;

/// What a scenario needs of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    Nothing,
    /// FUSE_NOTIFY_RESTARTED, or one of the fixes that come with it.
    Series,
    /// A kernel that does not know FUSE_NOTIFY_RESTARTED.
    Stock,
}

pub type Story = Box<dyn Fn(&Env<'_>) -> Result<()>>;

pub struct Scenario {
    pub name: String,
    /// What breaks when this fails.
    pub guards: &'static str,
    pub needs: Needs,
    pub run: Story,
}

impl Scenario {
    fn new(
        name: impl Into<String>,
        needs: Needs,
        guards: &'static str,
        run: impl Fn(&Env<'_>) -> Result<()> + 'static,
    ) -> Scenario {
        Scenario {
            name: name.into(),
            guards,
            needs,
            run: Box::new(run),
        }
    }

    pub fn series(
        name: impl Into<String>,
        guards: &'static str,
        run: impl Fn(&Env<'_>) -> Result<()> + 'static,
    ) -> Scenario {
        Scenario::new(name, Needs::Series, guards, run)
    }
}

/// Run scripted recoveries against the running kernel and check what it does.
///
/// Every scenario mounts its own file system in a private mount namespace, plays a server by hand on the bare
/// /dev/fuse, and runs under a time limit in a process of its own. Root is needed. Without the patches most
/// scenarios are skipped and say so.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Only these: a name, or the beginning of names (`bad-input/`). Default: all
    names: Vec<String>,
    /// List the scenarios with what they guard, and run nothing
    #[arg(long)]
    list: bool,
    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Fail when the kernel lacks the series, instead of skipping
    #[arg(long)]
    require_series: bool,
    /// Run scenarios even where the kernel lacks what they need (they should fail: a check of the checks)
    #[arg(long)]
    run_anyway: bool,
    /// Seed of every shuffled order; a failing run prints it
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Seconds that something may take which should take no time (raise it for debug kernels and emulators)
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    patience: u64,
    /// Seconds one scenario may take as a whole
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    limit: u64,
    /// Run everything this many times
    #[arg(long, value_name = "N", default_value_t = 1)]
    repeat: u32,
}

fn table() -> Vec<Scenario> {
    let families: [fn() -> Vec<Scenario>; 50] = [
        bad_identity::scenarios,
        bad_input::scenarios,
        replay::scenarios,
        resend::scenarios,
        resend_windows::scenarios,
        clones::scenarios,
        held::scenarios,
        counts::scenarios,
        again::scenarios,
        dentries::scenarios,
        background::scenarios,
        handover::scenarios,
        interrupts::scenarios,
        kill::scenarios,
        kill_io::scenarios,
        kill_server::scenarios,
        fault::scenarios,
        unmount::scenarios,
        fuseblk::scenarios,
        module::scenarios,
        no_memory::scenarios,
        unprivileged::scenarios,
        hostile::scenarios,
        bad_inode::scenarios,
        bad_inode_rare::scenarios,
        trace::scenarios,
        revoked::scenarios,
        revoked_held::scenarios,
        revoked_io::scenarios,
        revoked_map::scenarios,
        stale::scenarios,
        stale_data::scenarios,
        stale_drop::scenarios,
        stale_size::scenarios,
        stale_use::scenarios,
        stale_write::scenarios,
        survive::scenarios,
        transit::scenarios,
        successor::scenarios,
        answer::scenarios,
        late::scenarios,
        late_reused::scenarios,
        evictions::scenarios,
        patience::scenarios,
        windows::scenarios,
        aftermath::scenarios,
        system::scenarios,
        tmpfile::scenarios,
        waits::scenarios,
        stock_order::scenarios,
    ];
    families.iter().flat_map(|family| family()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_belong_to_a_family() {
        let mut names: Vec<String> = table().into_iter().map(|s| s.name).collect();
        let count = names.len();
        assert!(names.iter().all(|n| n.contains('/')), "{names:?}");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    /// The first column of the rst's table of what applications see, without its markup.
    fn promises(rst: &str) -> Vec<String> {
        let (_, rest) = rst.split_once("What applications see\n===").unwrap();
        let (table, _) = rest.split_once("How long the pause is").unwrap();
        let rows = table.split("   * - ").skip(2);
        let first = |row: &str| {
            let text = row.split("\n     - ").next().unwrap();
            let words: Vec<&str> = text.split_whitespace().collect();
            words.join(" ").replace("``", "")
        };
        rows.map(first).collect()
    }

    #[test]
    fn every_promise_has_its_scenarios() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../Documentation");
        let read = |name: &str| std::fs::read_to_string(root.join(name)).unwrap();
        let text = read("semantics.md");
        let rows = text.lines().filter_map(|l| {
            let (promise, scenarios) = l.strip_prefix("| ")?.split_once(" | ")?;
            Some((promise.to_owned(), scenarios))
        });
        let rows: Vec<_> = rows.skip(1).collect();
        let here: Vec<String> = rows.iter().map(|(promise, _)| promise.clone()).collect();
        assert!(here.len() > 10);
        assert_eq!(here, promises(&read("fuse-restart.rst")));
        let known: Vec<String> = table().into_iter().map(|s| s.name).collect();
        for (promise, scenarios) in rows {
            let named: Vec<&str> = scenarios.split('`').skip(1).step_by(2).collect();
            assert!(!named.is_empty(), "nothing tests {promise:?}");
            for name in named {
                assert!(
                    known.iter().any(|k| k == name),
                    "there is no scenario {name}"
                );
            }
        }
    }
}
