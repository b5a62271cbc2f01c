// SPDX-License-Identifier: GPL-2.0
//! Programs from crates.io that Debian does not have: built once, into the cache.

use crate::paths::Paths;
use crate::ui;
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

pub struct CargoTool {
    /// The crate.
    pub name: &'static str,
    pub version: &'static str,
    pub program: &'static str,
    /// Added to the environment of the build.
    pub env: &'static [(&'static str, &'static str)],
}

/// Finds holes in how a file system keeps a file's bytes; the crash matrix runs it.
pub const FSX: CargoTool = CargoTool {
    name: "fsx",
    version: "0.3.2",
    program: "fsx",
    env: &[],
};

/// Where they are; guests look there, too.
pub fn directory(paths: &Paths) -> PathBuf {
    paths.cache.join("tools/bin")
}

impl CargoTool {
    pub fn path(&self, paths: &Paths) -> PathBuf {
        directory(paths).join(self.program)
    }

    /// Builds it if this version is not there.
    pub fn ensure(&self, paths: &Paths) -> Result<PathBuf> {
        let program = self.path(paths);
        if self.is_there(paths) {
            return Ok(program);
        }
        ui::step(format!(
            "building {} {} (crates.io, about a minute)",
            self.program, self.version
        ));
        let root = paths.cache.join("tools");
        // One of its own: two may be built at a time.
        let target = root.join(format!("target-{}", self.name));
        let mut c = Command::new("cargo");
        c.args(["install", self.name, "--version", self.version])
            .args(["--locked", "--force", "--root"])
            .arg(&root)
            .env("CARGO_TARGET_DIR", &target)
            .envs(self.env.iter().copied());
        ui::run_logged(
            &mut c,
            &paths.cache.join(format!("logs/{}.log", self.name)),
            &format!("cargo install {}", self.name),
        )?;
        let _ = std::fs::remove_dir_all(target);
        Ok(program)
    }

    fn is_there(&self, paths: &Paths) -> bool {
        let out = Command::new(self.path(paths)).arg("--version").output();
        out.is_ok_and(|out| {
            out.status.success() && String::from_utf8_lossy(&out.stdout).contains(self.version)
        })
    }
}
