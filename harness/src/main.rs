// SPDX-License-Identifier: GPL-2.0
//! `fuse-restart`: keep a FUSE mount alive while its server dies and comes back.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    cli::main()
}
