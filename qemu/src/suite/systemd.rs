// SPDX-License-Identifier: GPL-2.0
//! Integration tests of `harness/tests` that want a guest: the machine's systemd (without a keeper), and servers that
//! die of one request or hang (feature `crash-points`).

use super::test::Tally;
use crate::paths::Paths;
use crate::ui;
use crate::vm::{self, BackendName, KernelName};
use anyhow::{ensure, Context, Result};
use serde::Deserialize;
use std::process::{Command, Stdio};
use std::time::Duration;

/// What `cargo test --no-run --message-format=json` says of a test program.
#[derive(Deserialize)]
struct Message {
    executable: Option<String>,
    target: Option<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

/// Counts that agree with the kernel's, what was discarded is revoked, and what only the kernel holds. Twenty seconds.
const SURVIVES: &[&str] = &[
    "counts_agree",
    "lookups_are_counted",
    "discarded",
    "examples::",
    "what_only_a_current_directory",
    "what_is_open",
    "graves_of_a_mount",
];

pub fn run(paths: &Paths, tally: &mut Tally) {
    tally.check("systemd, uml patched", || {
        guest(paths, "systemd", false, &[])
    });
    // What only a kernel with the series shows; the host's tests have been without it.
    tally.check("what survives a crash, uml patched", || {
        guest(paths, "passthrough", false, SURVIVES)
    });
    tally.check("deaths at a point, poison and hangs, uml patched", || {
        guest(
            paths,
            "passthrough",
            true,
            &["points", "poison", "late_create"],
        )
    });
}

fn guest(paths: &Paths, name: &str, crash_points: bool, filters: &[&str]) -> Result<()> {
    let program = build(paths, name, crash_points)?;
    let mut argv = vec![program, "--nocapture".into()];
    argv.extend(filters.iter().map(|filter| (*filter).to_owned()));
    let options = vm::Options {
        backend: BackendName::Uml,
        kernel: KernelName::Patched,
        timeout: Duration::from_secs(300),
        argv,
        ..vm::Options::default()
    };
    let code = vm::run(paths, &options)?;
    ensure!(code == 0, "the guest ended with status {code}");
    Ok(())
}

/// Builds one test program of the harness. Crash points go to a directory of their own, or the program under test would
/// have them from then on.
fn build(paths: &Paths, name: &str, crash_points: bool) -> Result<String> {
    ui::step(format!("building the {name} tests"));
    let mut cargo = Command::new("cargo");
    cargo
        .args([
            "test",
            "--locked",
            "--quiet",
            "-p",
            "fuse-restart",
            "--no-run",
        ])
        .args(["--message-format=json", "--test", name])
        .current_dir(&paths.repo)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    if crash_points {
        let options = ["--features", "crash-points", "--target-dir"];
        cargo.args(options).arg(super::crash_target(paths));
    }
    let out = cargo.output().context("cannot run cargo")?;
    ensure!(out.status.success(), "cargo test ended with {}", out.status);
    let text = String::from_utf8_lossy(&out.stdout);
    executable(&text, name).with_context(|| format!("cargo built no test program {name}"))
}

fn executable(messages: &str, name: &str) -> Option<String> {
    let messages = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok());
    messages
        .filter(|m| m.target.as_ref().is_some_and(|target| target.name == name))
        .find_map(|m| m.executable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_found_by_name() {
        let text = r#"{"reason":"compiler-artifact","target":{"name":"libc"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"fuse-restart"},"executable":"/t/fuse-restart"}
{"reason":"compiler-artifact","target":{"name":"systemd"},"executable":"/t/deps/systemd-1"}
{"reason":"build-finished","success":true}
no json"#;
        assert_eq!(executable(text, "systemd").unwrap(), "/t/deps/systemd-1");
        assert_eq!(executable(text, "libc"), None);
        assert_eq!(executable(text, "keep"), None);
    }
}
