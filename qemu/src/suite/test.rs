// SPDX-License-Identifier: GPL-2.0
//! All checks, cheap ones first. Ends with `N passed, N failed`: N counts cargo
//! tests one by one and every other check as one.

use super::beside::{Beside, Part};
use super::{crash, fuzz, race, scenarios, selftests, smoke, systemd};
use crate::kernel::{self, flavor::Flavor};
use crate::paths::Paths;
use crate::setup::{self, Need};
use crate::ui;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

/// Run all checks: format, lints, unit tests, the series, guests
///
/// From nothing under 50 minutes on two cores, most of it kernels; warm under 10.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct TestArgs {
    /// Only what needs no kernel
    #[arg(long)]
    host: bool,
    /// Guests with the debug kernel as well (builds it: 14 minutes more, once)
    #[arg(long)]
    debug_kernel: bool,
    /// Only a part that runs beside the rest
    #[arg(long, hide = true, requires = "result")]
    beside: Option<Part>,
    /// Where its result goes
    #[arg(long, hide = true, value_name = "FILE")]
    result: Option<PathBuf>,
}

/// What was found so far.
#[derive(Default, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    pub passed: u32,
    pub failed: u32,
    skipped: u32,
    failures: Vec<String>,
}

impl Tally {
    pub fn check(&mut self, name: &str, what: impl FnOnce() -> Result<()>) {
        let start = Instant::now();
        ui::step(format!("check: {name}"));
        match what() {
            Ok(()) => {
                self.passed += 1;
                ui::step(format!("ok: {name} ({})", ui::clock(start.elapsed())));
            }
            Err(e) => self.fail(name, &format!("{e:#}")),
        }
    }

    /// Results that a program counted itself.
    pub fn add(&mut self, name: &str, passed: u32, failed: u32, skipped: u32) {
        self.passed += passed;
        if failed > 0 {
            self.fail(name, &format!("{failed} failed"));
            self.failed += failed - 1;
        }
        self.skipped += skipped;
    }

    /// What another process found.
    pub fn join(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures.extend(other.failures);
    }

    pub fn fail(&mut self, name: &str, why: &str) {
        self.failed += 1;
        eprintln!("FAILED: {name}: {why}");
        self.failures.push(name.to_string());
    }

    fn finish(&self) -> ExitCode {
        for f in &self.failures {
            println!("failed: {f}");
        }
        let skipped = if self.skipped > 0 {
            format!(", {} skipped", self.skipped)
        } else {
            String::new()
        };
        println!("{} passed, {} failed{skipped}", self.passed, self.failed);
        ExitCode::from(u8::from(self.failed > 0 || self.passed == 0))
    }
}

pub fn run(paths: &Paths, args: &TestArgs) -> Result<ExitCode> {
    let mut tally = Tally::default();
    if let (Some(part), Some(result)) = (args.beside, &args.result) {
        match part {
            Part::Servers => {
                crash::run(paths, &mut tally);
                race::run(paths, &mut tally);
                systemd::run(paths, &mut tally);
            }
            Part::Qemu => {
                scenarios::qemu(paths, &mut tally, args.debug_kernel);
                fuzz::run(paths, &mut tally);
            }
        }
        std::fs::write(result, serde_json::to_vec(&tally)?)?;
        return Ok(tally.finish());
    }
    tally.check("cargo fmt", || cargo(paths, &["fmt", "--all", "--check"]));
    tally.check("cargo clippy", || {
        cargo(
            paths,
            &[
                "clippy",
                "--workspace",
                "--all-targets",
                "--locked",
                "--",
                "-D",
                "warnings",
            ],
        )
    });
    cargo_tests(paths, &mut tally);
    crash::host(paths, &mut tally);
    if args.host {
        return Ok(tally.finish());
    }
    if knows_series_check()? {
        tally.check("the series is what the crate generates", || {
            me(paths, &["kernel", "series", "--check"])
        });
    }
    tally.check("packages for guests", || setup::ensure(Need::Guest));
    tally.check("packages for QEMU", || setup::ensure(Need::Qemu));
    let mut flavors = vec![Flavor::Uml, Flavor::Stock, Flavor::Patched];
    flavors.extend(args.debug_kernel.then_some(Flavor::Debug));
    for f in flavors {
        tally.check(&format!("kernel {}", f.name()), || {
            kernel::ensure(paths, f).map(drop)
        });
    }
    smoke::run(paths, &mut tally, args.debug_kernel);
    selftests::step(paths, &mut tally);
    // A guest leaves most of two processors idle: much of what it does is to wait.
    let debug: &[&str] = if args.debug_kernel {
        &["--debug-kernel"]
    } else {
        &[]
    };
    let beside = [
        Beside::start(paths, Part::Servers, &[]),
        Beside::start(paths, Part::Qemu, debug),
    ];
    scenarios::uml(paths, &mut tally);
    for beside in beside {
        match beside {
            Ok(beside) => beside.join(&mut tally),
            Err(e) => tally.fail("what runs beside", &format!("{e:#}")),
        }
    }
    Ok(tally.finish())
}

/// `scripts/kernel series` comes with the series.
fn knows_series_check() -> Result<bool> {
    let out = Command::new(std::env::current_exe()?)
        .args(["kernel", "series", "--help"])
        .output()?;
    Ok(out.status.success())
}

fn me(paths: &Paths, args: &[&str]) -> Result<()> {
    let status = Command::new(std::env::current_exe()?)
        .args(args)
        .env("FUSE_RESTART_REPO", &paths.repo)
        .stdin(Stdio::null())
        .status()?;
    anyhow::ensure!(status.success(), "{} ended with {status}", args.join(" "));
    Ok(())
}

fn cargo(paths: &Paths, args: &[&str]) -> Result<()> {
    let status = Command::new("cargo")
        .args(args)
        .current_dir(&paths.repo)
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo")?;
    anyhow::ensure!(status.success(), "cargo {} ended with {status}", args[0]);
    Ok(())
}

fn cargo_tests(paths: &Paths, tally: &mut Tally) {
    ui::step("check: cargo test");
    let out = Command::new("cargo")
        .args([
            "test",
            "--workspace",
            "--locked",
            "--no-fail-fast",
            "--color=never",
        ])
        .current_dir(&paths.repo)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output();
    let out = match out {
        Ok(o) => o,
        Err(e) => return tally.fail("cargo test", &e.to_string()),
    };
    let text = String::from_utf8_lossy(&out.stdout);
    let (passed, failed) = count(&text);
    tally.passed += passed;
    if !out.status.success() || passed == 0 {
        println!("{text}");
        tally.fail(
            "cargo test",
            &format!("{failed} tests failed, {}", out.status),
        );
        tally.failed += failed.saturating_sub(1);
    } else {
        ui::step(format!("ok: cargo test ({passed} tests)"));
    }
}

/// Adds up the `test result:` lines of all test programs.
fn count(text: &str) -> (u32, u32) {
    let number = |line: &str, word: &str| -> u32 {
        let before = line.split(word).next().unwrap_or_default().trim();
        before
            .rsplit(' ')
            .next()
            .and_then(|n| n.parse().ok())
            .unwrap_or(0)
    };
    text.lines()
        .filter(|l| l.starts_with("test result:"))
        .fold((0, 0), |(p, f), l| {
            (p + number(l, " passed"), f + number(l, " failed"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_results_add_up() {
        let text = "\
test a ... ok
test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s
test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s
";
        assert_eq!(count(text), (15, 2));
        assert_eq!(count(""), (0, 0));
    }

    #[test]
    fn what_another_process_found_is_added() {
        let mut other = Tally::default();
        other.check("bad", || anyhow::bail!("no"));
        other.add("guest", 5, 2, 3);
        let json = serde_json::to_vec(&other).unwrap();
        let mut t = Tally::default();
        t.check("good", || Ok(()));
        t.join(serde_json::from_slice(&json).unwrap());
        assert_eq!((t.passed, t.failed, t.skipped), (6, 3, 3));
        assert_eq!(t.failures, ["bad", "guest"]);
    }

    #[test]
    fn a_failure_is_counted_and_named() {
        let mut t = Tally::default();
        t.check("good", || Ok(()));
        t.check("bad", || anyhow::bail!("no"));
        assert_eq!(
            (t.passed, t.failed, t.failures.clone()),
            (1, 1, vec!["bad".to_string()])
        );
    }
}
