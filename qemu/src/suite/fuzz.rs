// SPDX-License-Identifier: GPL-2.0
//! A bounded share of `fuse-restart fuzz`, in the guest that boots fastest. The long run is in Documentation/fuzzing.md.

use super::{build_program, json_from_guest};
use crate::guest::OUT_FILE;
use crate::paths::Paths;
use crate::suite::test::Tally;
use crate::vm::{self, BackendName, KernelName};
use anyhow::Result;
use serde::Deserialize;
use std::time::Duration;

/// Seconds of fuzzing; the guest boots and ends in a few more.
const SECONDS: &str = "30";

/// Always the same cases here, so that a change is judged by what it changes; the long run draws its seed.
const SEED: &str = "20261123";

/// The part of the program's JSON that is looked at here.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Summary {
    seed: u64,
    passed: u32,
    failed: u32,
    operations: u64,
}

pub fn run(paths: &Paths, tally: &mut Tally) {
    tally.check("fuzz, uml patched", || guest(paths));
}

fn guest(paths: &Paths) -> Result<()> {
    let program = build_program(paths, false)?;
    let argv = [
        &program.display().to_string(),
        "fuzz",
        "--seed",
        SEED,
        "--seconds",
        SECONDS,
        "--ops",
        "1000000",
        "--json",
        OUT_FILE,
    ];
    let options = vm::Options {
        backend: BackendName::Uml,
        kernel: KernelName::Patched,
        timeout: Duration::from_secs(300),
        argv: argv.map(str::to_owned).into(),
        ..vm::Options::default()
    };
    let (summary, code): (Summary, u8) = json_from_guest(paths, "fuzz", options)?;
    judge(&summary, code)
}

fn judge(summary: &Summary, code: u8) -> Result<()> {
    let seed = summary.seed;
    anyhow::ensure!(
        summary.failed == 0,
        "{} cases failed (seed {seed})",
        summary.failed
    );
    anyhow::ensure!(
        code == 0,
        "the guest ended with status {code} (seed {seed})"
    );
    anyhow::ensure!(summary.passed > 0 && summary.operations > 0, "no case ran");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_done_is_no_success() {
        let of = |passed, failed, operations| Summary {
            seed: 1,
            passed,
            failed,
            operations,
        };
        assert!(judge(&of(3, 0, 400), 0).is_ok());
        assert!(judge(&of(0, 0, 0), 0).is_err());
        assert!(judge(&of(3, 1, 400), 1).is_err());
        assert!(judge(&of(3, 0, 400), 121).is_err());
    }
}
