// SPDX-License-Identifier: GPL-2.0
//! `scripts/test` and `scripts/demo`: everything in its order.

pub mod demo;
pub mod fuzz;
pub mod mutants;
pub mod scenarios;
pub mod smoke;
pub mod table;
pub mod test;

use crate::paths::Paths;
use crate::ui;
use anyhow::{ensure, Context, Result};
use std::path::PathBuf;
use std::process::Command;

/// Builds `fuse-restart`, the program that is run in the guests.
pub fn build_program(paths: &Paths, release: bool) -> Result<PathBuf> {
    ui::step("building fuse-restart (a minute or two the first time)");
    let mut c = Command::new("cargo");
    c.args(["build", "--locked", "--quiet", "-p", "fuse-restart"])
        .args(release.then_some("--release"))
        .current_dir(&paths.repo);
    let status = c.status().context("cannot run cargo")?;
    ensure!(status.success(), "cargo build ended with {status}");
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    let profile = if release { "release" } else { "debug" };
    let program = paths.repo.join(target).join(profile).join("fuse-restart");
    ensure!(
        program.is_file(),
        "{} is not there after the build",
        program.display()
    );
    Ok(program)
}
