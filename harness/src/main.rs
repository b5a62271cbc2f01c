// SPDX-License-Identifier: GPL-2.0
//! `fuse-restart`: keep a FUSE mount alive while its server dies and comes back.

mod bench;
mod cli;
mod crash;
mod crash_points;
mod demo;
mod earlier;
mod fusectl;
mod fuzz;
mod keep;
mod raw;
mod scenario;
mod serve;
mod status;
mod stress;

use std::io::IsTerminal;
use std::process::ExitCode;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        // Its report of an error would panic on a closed stderr; the keeper must outlive its terminal.
        .log_internal_errors(false)
        .init();
    cli::main()
}
