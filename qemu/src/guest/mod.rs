// SPDX-License-Identifier: GPL-2.0
//! The inside of a guest: [`init`] is process 1, [`mounts`] makes the host's
//! read-only files into a usable machine, [`command`] runs the command and
//! relays what it says.

pub mod command;
pub mod init;
pub mod mounts;

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What the runner wants done. Lies as JSON in the run directory, which the
/// guest sees like every file of the host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    pub argv: Vec<String>,
    pub cwd: PathBuf,
    pub env: Vec<(String, String)>,
    /// Becomes writable (an overlay in memory).
    pub home: PathBuf,
    /// Stay visible even where something is mounted above them.
    pub keep: Vec<PathBuf>,
    pub channel: Channel,
    /// Ask kmemleak at the end, if the kernel has it.
    pub kmemleak: bool,
    /// How to end: UML powers off; QEMU runs with `-no-reboot`, so it reboots.
    pub power_off: bool,
}

/// Where the frames go.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Channel {
    Tty(PathBuf),
    /// A virtio port by name.
    VirtioPort(String),
}

/// The virtio port's name.
pub const PORT: &str = "fuse-restart";
/// Kernel command-line key that names the job file.
pub const JOB_KEY: &str = "fuse_restart_job";
/// Environment variable that names the module to load before anything else.
pub const MODULE_ENV: &str = "FUSE_RESTART_MODULE";
/// Where a command in the guest may leave a file for the host.
pub const OUT_FILE: &str = "/run/fuse-restart/out";
