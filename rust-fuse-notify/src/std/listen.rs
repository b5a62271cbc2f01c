// SPDX-License-Identifier: GPL-2.0
//! Descriptors that a keeper (or systemd) hands on: `LISTEN_FDS`, `LISTEN_PID`, `LISTEN_FDNAMES`.

use std::os::fd::OwnedFd;

/// Name under which the `/dev/fuse` descriptor is passed.
pub const NAME_DEVICE: &str = "fusedev";
/// Name under which the memfd of state is passed.
pub const NAME_STATE: &str = "fusestate";

/// Why no descriptors could be adopted.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Not implemented.
    #[error("not yet")]
    NotYet,
}

/// What a server that runs under a keeper was given.
#[derive(Debug)]
pub struct Inherited {
    /// `/dev/fuse`, mounted already.
    pub device: OwnedFd,
    /// The memfd that survives this process.
    pub state: OwnedFd,
}

/// Takes the descriptors over: they become close-on-exec, and the variables are removed from the environment.
///
/// # Errors
/// [`ListenError`] says which variable or descriptor is missing.
pub fn adopt_from_environment() -> Result<Inherited, ListenError> {
    Err(ListenError::NotYet)
}
