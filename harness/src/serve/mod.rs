// SPDX-License-Identifier: GPL-2.0
//! `serve`: the reference servers.

pub mod mem;
pub mod passthrough;
mod stop;
mod store;

use std::process::ExitCode;

#[derive(clap::Subcommand, Debug)]
pub enum Serve {
    #[command(verbatim_doc_comment)]
    Passthrough(passthrough::Args),
    #[command(verbatim_doc_comment)]
    Mem(mem::Args),
}

pub fn run(serve: &Serve) -> anyhow::Result<ExitCode> {
    match serve {
        Serve::Passthrough(args) => passthrough::run(args),
        Serve::Mem(args) => mem::run(args),
    }
}
