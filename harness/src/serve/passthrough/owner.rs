// SPDX-License-Identifier: GPL-2.0
//! Whose graves these are.
//!
//! A mount lives while it has no server, and so do its graves, but the lock of the graveyard goes with a server. So the
//! graveyard has the mount's mark (an extended attribute: the boot, and the kernel's number of the connection), and the first
//! server of another mount looks at it before it clears away what an ended one has left.
//!
//! A mount whose connection was aborted uses nothing any more, however many still have it open, and must not be in the way of
//! the next one. Only a kernel with the series tells that of a connection. On others, where fusectl is not mounted, and on a file
//! system without such attributes only a server that lives keeps another one out.

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::{bail, Context};
use nix::errno::Errno;

use super::sys;
use crate::fusectl;

const MARK: &std::ffi::CStr = c"trusted.fuse-restart.mount";

/// A mount, among those of all boots.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mark {
    boot: String,
    connection: u32,
}

impl Mark {
    /// `None`: this kernel does not tell.
    fn of(device: BorrowedFd<'_>) -> Option<Mark> {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", device.as_raw_fd())).ok()?;
        let number = info
            .lines()
            .find_map(|line| line.strip_prefix("fuse_connection:"))?;
        Some(Mark {
            boot: boot()?,
            connection: number.trim().parse().ok()?,
        })
    }

    fn text(&self) -> String {
        format!("{} {}", self.boot, self.connection)
    }

    fn parse(text: &str) -> Option<Mark> {
        let (boot, connection) = text.split_once(' ')?;
        Some(Mark {
            boot: boot.to_owned(),
            connection: connection.parse().ok()?,
        })
    }

    /// Whether a server can still come for that mount.
    fn lives(&self) -> bool {
        let recovery = || fusectl::recovery(self.connection).ok().flatten();
        boot().as_ref() == Some(&self.boot)
            && recovery().is_some_and(|r| r.supported() && r.state != "dead")
    }
}

fn boot() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

/// The graveyard `dir` is that of the mount behind `device` from now on, unless another mount is that still uses it.
pub fn claim(dir: BorrowedFd<'_>, device: BorrowedFd<'_>) -> anyhow::Result<()> {
    let Some(ours) = Mark::of(device) else {
        return Ok(());
    };
    let mut text = [0; 64];
    let found = match sys::get_xattr(dir, MARK, &mut text) {
        Ok(len) => std::str::from_utf8(&text[..len]).ok().and_then(Mark::parse),
        Err(_) => None,
    };
    if let Some(other) = found.filter(|other| *other != ours && other.lives()) {
        bail!(
            "it belongs to another mount (connection {}), which has no server at this moment and may still use files that \
             were removed: start its server or unmount it first ({} is that connection)",
            other.connection,
            fusectl::directory(other.connection).display()
        );
    }
    match sys::set_xattr(dir, MARK, ours.text().as_bytes(), 0) {
        Ok(()) | Err(Errno::EOPNOTSUPP | Errno::EPERM | Errno::ENOSPC) => Ok(()),
        Err(e) => Err(e).context("cannot mark the graveyard as this mount's"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_says_boot_and_connection_and_nothing_else_is_one() {
        let mark = Mark {
            boot: "one".into(),
            connection: 7,
        };
        assert_eq!(Mark::parse(&mark.text()), Some(mark));
        for text in ["", "one", "one x", "one -1", "one 1 2"] {
            assert_eq!(Mark::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_mount_of_another_boot_does_not_live() {
        let connection = u32::MAX;
        let boot = boot().unwrap();
        assert!(!Mark { boot, connection }.lives());
    }
}
