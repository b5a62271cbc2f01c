// SPDX-License-Identifier: GPL-2.0
//! A bounded share of the crash matrix, in the guest that boots fastest. The long run is in
//! Documentation/crash-matrix.md.

use super::{build_with_crash_points, json_from_guest, test::Tally, with_crash_points};
use crate::cargo_tool::FSX;
use crate::guest::OUT_FILE;
use crate::paths::Paths;
use crate::vm::{self, BackendName, KernelName};
use anyhow::Result;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// Seconds after which no further case is begun.
const SECONDS: &str = "45";

/// Always the same cases here, so that a change is judged by what it changes; the long run draws its seed.
const SEED: &str = "20261123";

/// The part of the program's JSON that is looked at here.
#[derive(Debug, Default, Deserialize)]
struct Summary {
    crashes: u64,
    cells: BTreeMap<String, BTreeMap<String, Cell>>,
}

#[derive(Debug, Default, Deserialize)]
struct Cell {
    cases: u64,
    differ: u64,
    broken: u64,
    unreached: u64,
}

/// What the other lints and tests leave out, for it is only built with crash points.
pub fn host(paths: &Paths, tally: &mut Tally) {
    tally.check("cargo clippy, with crash points", || {
        let lints = ["--all-targets", "--", "-D", "warnings"];
        with_crash_points(paths, "clippy", &lints)
    });
    tally.check("cargo test, with crash points", || {
        with_crash_points(paths, "test", &["--quiet", "--bins", "crash"])
    });
}

pub fn run(paths: &Paths, tally: &mut Tally) {
    tally.check("crash matrix, uml patched", || guest(paths));
}

fn guest(paths: &Paths) -> Result<()> {
    FSX.ensure(paths)?;
    let program = build_with_crash_points(paths)?;
    let argv = [
        &program.display().to_string(),
        "crash",
        "--seed",
        SEED,
        "--seconds",
        SECONDS,
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
    let (summary, code): (Summary, u8) = json_from_guest(paths, "crash", options)?;
    judge(&summary, code)
}

fn judge(summary: &Summary, code: u8) -> Result<()> {
    let cells = || summary.cells.values().flat_map(BTreeMap::values);
    let failed: u64 = cells().map(|c| c.differ + c.broken + c.unreached).sum();
    let cases: u64 = cells().map(|c| c.cases).sum();
    anyhow::ensure!(
        failed == 0,
        "{failed} of {cases} cases failed (seed {SEED})"
    );
    anyhow::ensure!(
        code == 0,
        "the guest ended with status {code} (seed {SEED})"
    );
    anyhow::ensure!(cases > 0 && summary.crashes >= cases, "nothing was crashed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(crashes: u64, cells: &str) -> Summary {
        let text = format!(r#"{{"crashes":{crashes},"cells":{{"t1-wt":{{{cells}}}}},"more":1}}"#);
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn nothing_done_is_no_success() {
        let fine = r#""mkdir.start":{"cases":2,"differ":0,"broken":0,"unreached":0}"#;
        assert!(judge(&of(3, fine), 0).is_ok());
        assert!(judge(&of(3, fine), 121).is_err());
        assert!(judge(&of(1, fine), 0).is_err());
        assert!(judge(&of(0, ""), 0).is_err());
        for what in ["differ", "broken", "unreached"] {
            let bad = fine.replace(&format!(r#""{what}":0"#), &format!(r#""{what}":1"#));
            assert!(judge(&of(3, &bad), 1).is_err(), "{what}");
        }
    }
}
