// SPDX-License-Identifier: GPL-2.0
//! `scripts/test` and `scripts/demo`: everything in its order.

pub mod beside;
pub mod crash;
pub mod demo;
pub mod fuzz;
pub mod mutants;
pub mod race;
pub mod scenarios;
pub mod selftests;
pub mod smoke;
pub mod systemd;
pub mod table;
pub mod tap;
pub mod test;

use crate::paths::Paths;
use crate::ui;
use crate::vm;
use anyhow::{ensure, Context, Result};
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs a program in a guest; the JSON that it writes to [`crate::guest::OUT_FILE`], and its status.
pub fn json_from_guest<T: DeserializeOwned>(
    paths: &Paths,
    what: &str,
    options: vm::Options,
) -> Result<(T, u8)> {
    let name = format!("fuse-restart-{what}-{}.json", std::process::id());
    let out = std::env::temp_dir().join(name);
    let options = vm::Options {
        out: Some(out.clone()),
        ..options
    };
    let code = vm::run(paths, &options);
    let json = std::fs::read(&out);
    let _ = std::fs::remove_file(&out);
    let code = code?;
    let json = json.with_context(|| format!("{what} left no result"))?;
    let result = serde_json::from_slice(&json).with_context(|| format!("the result of {what}"))?;
    Ok((result, code))
}

/// Builds `fuse-restart`, the program that is run in the guests.
pub fn build_program(paths: &Paths, release: bool) -> Result<PathBuf> {
    ui::step("building fuse-restart (a minute or two the first time)");
    let profile = if release { "release" } else { "debug" };
    build(
        paths,
        &target(paths),
        profile,
        release.then_some("--release"),
    )
}

/// The same with points at which a server can be made to die; elsewhere, so that the other one stays what it is.
pub fn build_with_crash_points(paths: &Paths) -> Result<PathBuf> {
    ui::step("building fuse-restart with crash points (a minute or two the first time)");
    let target = crash_target(paths);
    build(paths, &target, "debug", ["--features", "crash-points"])
}

/// `cargo COMMAND` for `fuse-restart` with crash points.
pub fn with_crash_points(paths: &Paths, command: &str, options: &[&str]) -> Result<()> {
    let mut c = Command::new("cargo");
    c.args([command, "--locked", "-p", "fuse-restart"])
        .args(["--features", "crash-points", "--target-dir"])
        .arg(crash_target(paths))
        .args(options)
        .current_dir(&paths.repo);
    let status = c.status().context("cannot run cargo")?;
    ensure!(status.success(), "cargo {command} ended with {status}");
    Ok(())
}

fn crash_target(paths: &Paths) -> PathBuf {
    target(paths).join("crash")
}

fn target(paths: &Paths) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR");
    paths
        .repo
        .join(target.map_or_else(|| "target".into(), PathBuf::from))
}

fn build<'a>(
    paths: &Paths,
    target: &Path,
    profile: &str,
    options: impl IntoIterator<Item = &'a str>,
) -> Result<PathBuf> {
    let mut c = Command::new("cargo");
    c.args([
        "build",
        "--locked",
        "--quiet",
        "-p",
        "fuse-restart",
        "--target-dir",
    ])
    .arg(target)
    .args(options)
    .current_dir(&paths.repo);
    let status = c.status().context("cannot run cargo")?;
    ensure!(status.success(), "cargo build ended with {status}");
    let program = target.join(profile).join("fuse-restart");
    ensure!(
        program.is_file(),
        "{} is not there after the build",
        program.display()
    );
    Ok(program)
}
