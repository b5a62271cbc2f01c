// SPDX-License-Identifier: GPL-2.0
//! The toolchain: LLVM 19 and Debian's rustc for the kernel (rustup's has no
//! library source), bindgen from crates.io in the cache.

use crate::cargo_tool::CargoTool;
use crate::paths::Paths;
use anyhow::{bail, Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

const LIBCLANG: &str = "/usr/lib/llvm-19/lib";
const BINDGEN: CargoTool = CargoTool {
    name: "bindgen-cli",
    version: "0.73.2",
    program: "bindgen",
    env: &[("LIBCLANG_PATH", LIBCLANG)],
};

pub struct Tools {
    bindgen: PathBuf,
    /// What their versions are: part of a kernel's hash.
    pub id: String,
}

impl Tools {
    /// Finds them, building bindgen on first use.
    pub fn set_up(paths: &Paths) -> Result<Tools> {
        BINDGEN.ensure(paths)?;
        Self::find(paths)
    }

    /// Without setting anything up.
    pub fn find(paths: &Paths) -> Result<Tools> {
        let bindgen = BINDGEN.path(paths);
        let mut id = String::new();
        for tool in [
            Path::new("clang-19"),
            Path::new("ld.lld-19"),
            Path::new("/usr/bin/rustc"),
            &bindgen,
        ] {
            id.push_str(&version(tool)?);
        }
        Ok(Tools { bindgen, id })
    }

    /// `make` for one kernel tree and object directory.
    pub fn make(&self, tree: &Path, objects: &Path, arch: &str) -> Command {
        let mut c = Command::new("make");
        c.current_dir(tree)
            .env_clear()
            .envs(
                std::env::vars_os().filter(|(k, _)| {
                    k == "PATH" || k == "HOME" || k == "RUSTUP_HOME" || k == "TMPDIR"
                }),
            )
            .env("LC_ALL", "C")
            .env("LIBCLANG_PATH", LIBCLANG)
            // The same inputs make the same kernel.
            .env("KBUILD_BUILD_USER", "fuse-restart")
            .env("KBUILD_BUILD_HOST", "localhost")
            .env("KBUILD_BUILD_TIMESTAMP", "1 Jan 2026")
            .arg("LLVM=-19")
            .args([
                "RUSTC=/usr/bin/rustc",
                "HOSTRUSTC=/usr/bin/rustc",
                "RUSTDOC=/usr/bin/rustdoc",
            ])
            .arg(format!("BINDGEN={}", self.bindgen.display()))
            .arg(format!("ARCH={arch}"))
            .arg(format!("O={}", objects.display()));
        c
    }
}

fn version(tool: &Path) -> Result<String> {
    let out = Command::new(tool)
        .arg("--version")
        .output()
        .with_context(|| {
            format!(
                "{} is missing: run scripts/kernel, which installs it",
                tool.display()
            )
        })?;
    if !out.status.success() {
        bail!(
            "{} --version failed: {}",
            tool.display(),
            String::from_utf8_lossy(&out.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout)
        .lines()
        .next()
        .unwrap_or_default()
        .to_string()
        + "\n")
}

#[cfg(test)]
impl Tools {
    pub fn fake(id: &str) -> Tools {
        Tools {
            bindgen: "/bin/false".into(),
            id: id.into(),
        }
    }
}
