// SPDX-License-Identifier: GPL-2.0
//! The demonstration: sets up, builds, and shows it in a guest.

use crate::kernel::{self, flavor::Flavor};
use crate::paths::Paths;
use crate::setup::{self, Need};
use crate::ui;
use crate::vm::{self, BackendName, KernelName};
use anyhow::{ensure, Context, Result};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

/// Kill a FUSE server again and again under a real workload, and show that nobody notices
///
/// From nothing under 25 minutes on two cores, warm under 4.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct DemoArgs {
    /// The same numbers as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[arg(long, value_enum, default_value = "qemu")]
    backend: BackendName,
    #[arg(long, value_enum, default_value = "patched")]
    kernel: KernelName,
    /// Passed to `fuse-restart demo`
    #[arg(last = true)]
    rest: Vec<String>,
}

pub fn run(paths: &Paths, args: &DemoArgs) -> Result<ExitCode> {
    for need in [Need::Kernel, Need::Qemu, Need::Guest] {
        setup::ensure(need)?;
    }
    let program = build(paths)?;
    let source = kernel::source::get(paths)?;
    let mut argv = vec![program.display().to_string(), "demo".into()];
    argv.extend(args.rest.iter().cloned());
    let options = vm::Options {
        backend: args.backend,
        kernel: args.kernel,
        mem: None,
        cpus: None,
        timeout: Duration::from_secs(600),
        icount: false,
        out: args.json.clone(),
        log: None,
        env: vec![format!(
            "FUSE_RESTART_KERNEL_SOURCE={}",
            source.tree.display()
        )],
        append: vec![],
        kmemleak: true,
        quiet: false,
        argv,
    };
    let (_, flavor) = vm::resolve(args.backend, args.kernel, false)?;
    if flavor == Flavor::Patched {
        // Its objects make the patched one cheap, and the comparison needs it.
        kernel::ensure(paths, Flavor::Stock)?;
    }
    Ok(ExitCode::from(vm::run(paths, &options)?))
}

/// The program under demonstration, optimised.
fn build(paths: &Paths) -> Result<PathBuf> {
    ui::step("building fuse-restart (a minute or two the first time)");
    let status = Command::new("cargo")
        .args([
            "build",
            "--release",
            "--locked",
            "--quiet",
            "-p",
            "fuse-restart",
        ])
        .current_dir(&paths.repo)
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "cargo build ended with {status}");
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| paths.repo.join("target"), PathBuf::from);
    let program = paths.repo.join(target).join("release/fuse-restart");
    ensure!(
        Path::new(&program).is_file(),
        "{} is not there after the build",
        program.display()
    );
    Ok(program)
}
