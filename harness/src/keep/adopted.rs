// SPDX-License-Identifier: GPL-2.0
//! A keeper that takes over a mount instead of making one: whoever holds its descriptors hands them on in the way in
//! which a keeper hands them to a server (`LISTEN_FDS`). So a keeper can itself be killed and lose nothing, if
//! another one keeps it: `fuse-restart keep ... -- fuse-restart keep ... -- SERVER`.
//!
//! The mount is the holder's: this keeper never unmounts it.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use rust_fuse_notify::std::listen::{self, Inherited, ListenError};

use super::mount;

pub struct Adopted {
    pub device: OwnedFd,
    pub state: OwnedFd,
    pub mountpoint: PathBuf,
    pub connection: u32,
}

/// What we were handed; none if nobody handed anything to *this* process. Asks nothing of the mounted file system:
/// nobody serves it.
///
/// # Errors
/// The descriptors are not those of the mount that the command line names.
pub fn take(mountpoint: &Path) -> Result<Option<Adopted>> {
    if !listen::is_passed() {
        return Ok(None);
    }
    let Inherited { device, state } = match listen::adopt_from_environment() {
        Ok(inherited) => inherited,
        // Left over in the environment of who started us.
        Err(ListenError::OtherProcess { .. }) => return Ok(None),
        Err(e) => {
            return Err(e).context(
                "this keeper was handed descriptors (LISTEN_FDS is set) that it cannot take over; unset LISTEN_FDS to make a mount",
            )
        }
    };
    let (mountpoint, connection) = mounted(mountpoint)?;
    if let Some(other) = connection_of(&device).filter(|id| *id != connection) {
        bail!(
            "the descriptor that this keeper was handed is of FUSE connection {other}, but what is mounted on {} is {connection}: name the mount point of {other}",
            mountpoint.display()
        );
    }
    Ok(Some(Adopted {
        device,
        state,
        mountpoint,
        connection,
    }))
}

/// The FUSE mount at a path, and its connection.
fn mounted(path: &Path) -> Result<(PathBuf, u32)> {
    let path = mount::resolve(path)?;
    let entry = mount::mount_at(&path).context("reading /proc/self/mountinfo")?;
    match entry {
        Some(entry) if entry.fstype == "fuse" || entry.fstype.starts_with("fuse.") => {
            let connection = entry.connection();
            Ok((path, connection))
        }
        Some(entry) => bail!(
            "this keeper was handed the descriptors of a FUSE mount, but what is mounted on {} is of type {}: name the directory on which that is mounted",
            path.display(),
            entry.fstype
        ),
        None => bail!(
            "this keeper was handed the descriptors of a FUSE mount, but nothing is mounted on {}: name the directory on which that is mounted",
            path.display()
        ),
    }
}

/// The connection of a descriptor, if the kernel says it; older ones do not.
fn connection_of(device: &OwnedFd) -> Option<u32> {
    let path = format!("/proc/self/fdinfo/{}", device.as_raw_fd());
    parse_fdinfo(&fs::read_to_string(path).ok()?)
}

fn parse_fdinfo(text: &str) -> Option<u32> {
    let value = |line: &str| line.strip_prefix("fuse_connection:")?.trim().parse().ok();
    text.lines().find_map(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_connection_in_fdinfo() {
        let text = "pos:\t0\nflags:\t02100002\nmnt_id:\t27\nino:\t84\nfuse_connection:\t53\n";
        assert_eq!(parse_fdinfo(text), Some(53));
        assert_eq!(parse_fdinfo("pos:\t0\nfuse_connection:\tx\n"), None);
        assert_eq!(parse_fdinfo(""), None);
    }

    #[test]
    fn only_a_fuse_mount_is_taken() {
        let message = |path: &str| format!("{:#}", mounted(Path::new(path)).unwrap_err());
        assert!(message("/proc").contains("is of type proc"));
        let dir = tempfile::tempdir().unwrap();
        let plain = dir.path().to_str().unwrap();
        assert!(message(plain).contains("nothing is mounted"));
    }
}
