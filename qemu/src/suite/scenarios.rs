// SPDX-License-Identifier: GPL-2.0
//! `fuse-restart scenario` in guests: one boot, many scenarios; its JSON is
//! what counts, and the guest kernel's log has the last word.

use super::{build_program, json_from_guest, test::Tally};
use crate::guest::OUT_FILE;
use crate::kernel::source;
use crate::paths::Paths;
use crate::vm::{self, BackendName, KernelName};
use anyhow::Result;
use serde::Deserialize;
use std::time::Duration;

/// The part of the program's JSON that is added up here.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
struct Summary {
    passed: u32,
    failed: u32,
    #[serde(default)]
    skipped: u32,
}

pub fn uml(paths: &Paths, tally: &mut Tally) {
    run(paths, tally, &[(BackendName::Uml, KernelName::Patched)]);
}

pub fn qemu(paths: &Paths, tally: &mut Tally, debug_kernel: bool) {
    let mut guests = vec![
        (BackendName::Qemu, KernelName::Patched),
        (BackendName::Qemu, KernelName::Stock),
    ];
    guests.extend(debug_kernel.then_some((BackendName::Qemu, KernelName::Debug)));
    run(paths, tally, &guests);
}

fn run(paths: &Paths, tally: &mut Tally, guests: &[(BackendName, KernelName)]) {
    for &(backend, kernel) in guests {
        let name = format!("scenarios, {backend:?} {kernel:?}").to_lowercase();
        // Without the series in the repository there is no patched kernel yet.
        let series = kernel != KernelName::Stock && has_series(paths);
        let mut summary = Summary::default();
        tally.check(&name, || {
            guest(paths, backend, kernel, series, &mut summary)
        });
        tally.add(&name, summary.passed, summary.failed, summary.skipped);
    }
}

fn has_series(paths: &Paths) -> bool {
    crate::kernel::series::list(&paths.patches()).is_ok_and(|p| !p.is_empty())
}

fn guest(
    paths: &Paths,
    backend: BackendName,
    kernel: KernelName,
    series: bool,
    summary: &mut Summary,
) -> Result<()> {
    let program = build_program(paths, false)?;
    // An emulator, and checkers on top of it, are slow, not broken.
    let patience = match (backend, kernel) {
        (BackendName::Uml, _) => "10",
        (_, KernelName::Debug) => "60",
        _ => "30",
    };
    let mut argv = vec![
        program.display().to_string(),
        "scenario".into(),
        "--json".into(),
        OUT_FILE.into(),
    ];
    argv.extend([
        "--patience".into(),
        patience.into(),
        "--limit".into(),
        "180".into(),
    ]);
    argv.extend(series.then(|| "--require-series".to_string()));
    let tree = source::get(paths, "")?.tree;
    let options = vm::Options {
        backend,
        kernel,
        timeout: Duration::from_secs(1200),
        env: vec![format!("FUSE_RESTART_KERNEL_SOURCE={}", tree.display())],
        argv,
        ..vm::Options::default()
    };
    let code;
    (*summary, code) = json_from_guest(paths, "scenarios", options)?;
    // Failed scenarios are counted one by one; what is left is everything else.
    anyhow::ensure!(
        code == 0 || (code == 1 && summary.failed > 0),
        "the guest ended with status {code}"
    );
    anyhow::ensure!(summary.passed + summary.failed > 0, "no scenario ran");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_is_read_with_more_around_it() {
        let s: Summary = serde_json::from_str(
            r#"{"kernel":"x","passed":3,"failed":1,"skipped":2,"scenarios":[]}"#,
        )
        .unwrap();
        assert_eq!(
            s,
            Summary {
                passed: 3,
                failed: 1,
                skipped: 2
            }
        );
        assert!(serde_json::from_str::<Summary>("{}").is_err());
    }
}
