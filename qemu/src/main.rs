// SPDX-License-Identifier: GPL-2.0
//! Builds the kernels of this project and runs commands in guests that boot
//! them. `scripts/kernel`, `scripts/vm`, `scripts/test`, `scripts/demo` and
//! `scripts/rfc` are this program by other names; as the init of a guest it is
//! the other end of `scripts/vm`.
//!
//! Where to read on:
//! * [`vm`]: the runner on the host, one file a backend;
//! * [`guest`]: what runs inside, and [`frame`], the line between the two;
//! * [`splat`]: what in a kernel's log makes a run fail;
//! * [`kernel`]: source, series, configuration, build, cache;
//! * [`rfc`]: checks of each patch of the series.

mod cargo_tool;
mod cli;
mod frame;
mod guest;
mod kernel;
mod paths;
mod rfc;
mod setup;
mod splat;
mod splat_signs;
mod suite;
mod ui;
mod vm;

use std::process::ExitCode;

fn main() -> ExitCode {
    // The kernel starts init with the job on its command line, not in argv.
    if std::process::id() == 1 {
        guest::init::main();
    }
    match cli::run() {
        Ok(code) => code,
        Err(e) => {
            eprintln!("{}: {e:#}", ui::program());
            ExitCode::from(vm::EXIT_RUNNER)
        }
    }
}
