// SPDX-License-Identifier: GPL-2.0
//! The demonstration: sets up, builds, and shows it in a guest.

use super::build_program;
use crate::kernel;
use crate::paths::Paths;
use crate::setup::{self, Need};
use crate::ui;
use crate::vm::{self, BackendName, KernelName};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

/// Kill a FUSE server again and again under a real workload, and show that nobody notices
///
/// One guest with the series, then one with the same kernel without it (fewer
/// files, under a time limit), and a table of both. From nothing under 25
/// minutes on two cores, warm under 4.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct DemoArgs {
    /// The same numbers as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[arg(long, value_enum, default_value = "qemu")]
    backend: BackendName,
    /// With `stock` only that column
    #[arg(long, value_enum, default_value = "patched")]
    kernel: KernelName,
    /// Leave the column without the series out
    #[arg(long)]
    no_stock: bool,
    /// Memory of the guests in MiB
    #[arg(long, value_name = "M", default_value_t = 3072)]
    mem: u32,
    /// Time limit of each guest
    #[arg(long, value_name = "SECONDS", default_value_t = 700)]
    timeout: u64,
    /// Passed to `fuse-restart demo` (see its --help), for both columns
    #[arg(last = true)]
    rest: Vec<String>,
}

pub fn run(paths: &Paths, args: &DemoArgs) -> Result<ExitCode> {
    for need in [Need::Kernel, Need::Qemu, Need::Guest] {
        setup::ensure(need)?;
    }
    let program = build_program(paths, true)?;
    let mut kernels = vec![args.kernel];
    if args.kernel != KernelName::Stock && !args.no_stock {
        kernels.push(KernelName::Stock);
    }
    // Stock first: with its objects the patched one is a matter of minutes.
    for &kernel in kernels.iter().rev() {
        kernel::ensure(paths, vm::resolve(args.backend, kernel, false)?.1)?;
    }
    let mut results = Vec::new();
    for &kernel in &kernels {
        let out = paths
            .cache_dir("run")?
            .join(format!("demo-{}-{kernel:?}.json", std::process::id()));
        let status = guest(paths, args, &program, kernel, &out)?;
        if kernel != KernelName::Stock && (status != 0 || !out.is_file()) {
            // It has said why; comparing a failure with anything helps nobody.
            if let (Some(json), true) = (&args.json, out.is_file()) {
                std::fs::copy(&out, json).with_context(|| json.display().to_string())?;
            }
            let _ = std::fs::remove_file(&out);
            return Ok(ExitCode::from(status.max(1)));
        }
        if out.is_file() {
            results.push(out);
        } else {
            ui::step("the guest without the series did not come to its end: no column of it");
        }
    }
    let mut table = Command::new(&program);
    table.args(["demo", "--merge"]).args(&results);
    if let Some(json) = &args.json {
        table.arg("--json").arg(json);
    }
    let status = table.status().context("cannot run fuse-restart")?;
    for out in results {
        let _ = std::fs::remove_file(out);
    }
    Ok(ExitCode::from(status.code().map_or(1, |c| c as u8)))
}

/// One column.
fn guest(
    paths: &Paths,
    args: &DemoArgs,
    program: &Path,
    kernel: KernelName,
    out: &Path,
) -> Result<u8> {
    let source = kernel::source::get(paths, "")?;
    let mut argv = vec![program.display().to_string(), "demo".into()];
    if kernel == KernelName::Stock {
        argv.push("--stock".into());
    }
    argv.extend(args.rest.iter().cloned());
    let options = vm::Options {
        backend: args.backend,
        kernel,
        mem: Some(args.mem),
        timeout: Duration::from_secs(args.timeout),
        out: Some(out.to_owned()),
        env: vec![format!(
            "FUSE_RESTART_KERNEL_SOURCE={}",
            source.tree.display()
        )],
        argv,
        ..vm::Options::default()
    };
    vm::run(paths, &options)
}
