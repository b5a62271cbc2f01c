// SPDX-License-Identifier: GPL-2.0
//! The command line: one enum variant a subcommand, each handed to its module.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "fuse-restart", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Mount, keep the descriptor, start the server and start it again whenever it dies
    Keep(crate::keep::Args),
    /// Be a reference server
    #[command(subcommand)]
    Serve(crate::serve::Serve),
    /// Say how a kept mount is doing
    Status(crate::status::Args),
    /// Measure
    #[command(subcommand)]
    Bench(crate::bench::Bench),
    /// Show the main job: a workload whose server is killed again and again
    Demo(crate::demo::Args),
    Scenario(crate::scenario::Args),
    Fuzz(crate::fuzz::Args),
    Stress(crate::stress::Args),
    Crash(crate::crash::Args),
    Race(crate::crash::race::Args),
}

pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result: anyhow::Result<ExitCode> = match cli.command {
        Command::Keep(args) => crate::keep::run(args),
        Command::Serve(which) => crate::serve::run(&which),
        Command::Status(args) => crate::status::run(args),
        Command::Bench(which) => crate::bench::run(&which),
        Command::Demo(args) => crate::demo::run(args),
        Command::Scenario(args) => crate::scenario::run(&args),
        Command::Fuzz(args) => crate::fuzz::run(&args),
        Command::Stress(args) => crate::stress::run(&args),
        Command::Crash(args) => crate::crash::run(&args),
        Command::Race(args) => crate::crash::race::run(&args),
    };
    result.unwrap_or_else(|e| {
        eprintln!("fuse-restart: {e:#}");
        ExitCode::FAILURE
    })
}
