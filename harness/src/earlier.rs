// SPDX-License-Identifier: GPL-2.0
//! Results of an earlier run, with which a later one goes on.

use std::path::Path;

use anyhow::{ensure, Context, Result};
use serde::de::DeserializeOwned;

/// What a run is of. Results of another one do not add up with its own.
pub struct Of<'a> {
    pub kernel: &'a str,
    /// Of kernel and program, see [`crate::scenario::runner::build`].
    pub build: &'a str,
    /// What else was asked for, in words.
    pub asked: String,
}

/// The results in a file that `fuse-restart COMMAND` wrote.
pub fn read<T: DeserializeOwned>(path: &Path, command: &str) -> Result<T> {
    let shown = path.display();
    let text = std::fs::read(path).with_context(|| format!("cannot read {shown}"))?;
    serde_json::from_slice(&text)
        .with_context(|| format!("{shown} is no result of fuse-restart {command}"))
}

/// Refuses what is of another run, and says how it differs.
pub fn ensure_same(path: &Path, old: &Of<'_>, now: &Of<'_>) -> Result<()> {
    let shown = path.display();
    ensure!(
        old.kernel == now.kernel,
        "{shown} is of kernel {}; this one is {}: go on with it there, or begin anew",
        old.kernel,
        now.kernel
    );
    ensure!(
        old.build == now.build,
        "{shown} is of another build of the kernel or of this program ({}; now {}): what differs between them would be \
         lost in the sum; begin anew",
        old.build,
        now.build
    );
    ensure!(
        old.asked == now.asked,
        "{shown} is of {}; this run is of {}: give the same",
        old.asked,
        now.asked
    );
    Ok(())
}
