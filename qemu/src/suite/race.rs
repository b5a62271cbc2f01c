// SPDX-License-Identifier: GPL-2.0
//! A bounded share of the racing workload, in the guest that boots fastest, and that it finds what the journal is for.
//! Documentation/race.md has the long runs.

use super::{build_with_crash_points, json_from_guest, test::Tally};
use crate::guest::OUT_FILE;
use crate::paths::Paths;
use crate::vm::{self, BackendName, KernelName};
use anyhow::{ensure, Result};
use serde::Deserialize;
use std::time::Duration;

/// Seconds after which no further history is begun.
const SECONDS: &str = "25";
/// The same where the first one that fails is the end: a few histories are enough, however busy the machine is.
const UNTIL_FOUND: &str = "120";
/// The same calls each time; their order is the machine's.
const SEED: &str = "20261123";

/// The part of the program's JSON that is looked at here.
#[derive(Debug, Default, Deserialize)]
struct Summary {
    histories: u64,
    crashes: u64,
    not_linearizable: u64,
    broken: u64,
}

pub fn run(paths: &Paths, tally: &mut Tally) {
    tally.check("racing workload, uml patched", || {
        let (summary, code) = guest(paths, &["--seconds", SECONDS])?;
        fine(&summary, code)
    });
    tally.check("racing workload without the journal is found", || {
        let first = ["--no-journal", "--kills", "points", "--failures", "1"];
        let options = [&first[..], &["--seconds", UNTIL_FOUND]].concat();
        let (summary, code) = guest(paths, &options)?;
        found_something(&summary, code)
    });
}

fn guest(paths: &Paths, options: &[&str]) -> Result<(Summary, u8)> {
    let program = build_with_crash_points(paths)?;
    let program = program.display().to_string();
    let mut argv = vec![program.as_str(), "race", "--seed", SEED, "--json", OUT_FILE];
    argv.extend(["--rounds", "50", "--operations", "60"]);
    argv.extend(["--dims", "t4-wt,c4-wb"]);
    argv.extend(options);
    let options = vm::Options {
        backend: BackendName::Uml,
        kernel: KernelName::Patched,
        timeout: Duration::from_secs(300),
        argv: argv.into_iter().map(str::to_owned).collect(),
        ..vm::Options::default()
    };
    json_from_guest(paths, "race", options)
}

fn fine(summary: &Summary, code: u8) -> Result<()> {
    let failed = summary.not_linearizable + summary.broken;
    ensure!(
        failed == 0,
        "{failed} of {} histories failed (seed {SEED})",
        summary.histories
    );
    ensure!(
        code == 0,
        "the guest ended with status {code} (seed {SEED})"
    );
    ensure!(summary.crashes > 0, "nothing was crashed");
    Ok(())
}

/// Without the journal the program ends well if it found something.
fn found_something(summary: &Summary, code: u8) -> Result<()> {
    ensure!(
        summary.not_linearizable > 0 && code == 0,
        "{} crashes without the journal, and none of {} histories shows it (status {code}, seed {SEED})",
        summary.crashes,
        summary.histories
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(crashes: u64, not_linearizable: u64, broken: u64) -> Summary {
        Summary {
            histories: 3,
            crashes,
            not_linearizable,
            broken,
        }
    }

    #[test]
    fn nothing_done_is_no_success() {
        assert!(fine(&of(3, 0, 0), 0).is_ok());
        // Also if hardly anybody died.
        assert!(fine(&of(3, 0, 0), 1).is_err());
        assert!(fine(&of(0, 0, 0), 0).is_err());
        for bad in [of(3, 1, 0), of(3, 0, 1)] {
            assert!(fine(&bad, 0).is_err());
        }
        assert!(found_something(&of(3, 1, 0), 0).is_ok());
        assert!(found_something(&of(3, 0, 1), 0).is_err());
        assert!(found_something(&of(3, 1, 0), 1).is_err());
    }
}
