// SPDX-License-Identifier: GPL-2.0
//! Attributes and extended attributes.

use std::ffi::{CString, OsStr};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::time::{SystemTime, UNIX_EPOCH};

use fuser::TimeOrNow;
use nix::errno::Errno;
use rust_fuse_notify::std::state::Slot;

use super::intent::Intent;
use super::server::Server;
use super::sys::{self, Res};
use super::wire::Attr;

/// What SETATTR asks for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Change {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<TimeOrNow>,
    pub mtime: Option<TimeOrNow>,
    pub fh: Option<u64>,
}

impl Server {
    /// Every part can be repeated, so a resent SETATTR is simply executed again.
    pub fn set_attr(&self, nodeid: u64, change: &Change) -> Res<Attr> {
        let fd = self.node_fd(nodeid)?;
        // The owner first: a change of owner clears the set-id bits that the mode may set. (That
        // the kernel wants them cleared on a write, it says with a mode of its own.)
        if change.uid.is_some() || change.gid.is_some() {
            sys::chown(fd.as_fd(), change.uid, change.gid)?;
        }
        if let Some(mode) = change.mode {
            sys::chmod(fd.as_fd(), mode & 0o7777)?;
        }
        if let Some(size) = change.size {
            self.truncate(nodeid, change.fh, size)?;
        }
        // Last, for the size changes the times as well.
        if change.atime.is_some() || change.mtime.is_some() {
            sys::utimens(
                fd.as_fd(),
                &[timespec(change.atime), timespec(change.mtime)],
            )?;
        }
        self.attr(nodeid)
    }

    fn truncate(&self, nodeid: u64, fh: Option<u64>, size: u64) -> Res<()> {
        if let Some(fh) = fh {
            match self
                .file(nodeid, fh)
                .and_then(|f| sys::ftruncate(f.as_fd(), size))
            {
                // Opened for reading only: the application used the path, not this descriptor.
                Err(Errno::EINVAL | Errno::EBADF) => {}
                other => return other,
            }
        }
        let st = sys::fstat(self.node_fd(nodeid)?.as_fd())?;
        match st.st_mode & libc::S_IFMT {
            libc::S_IFREG => {}
            libc::S_IFDIR => return Err(Errno::EISDIR),
            _ => return Err(Errno::EINVAL), // never opened here: a fifo would block the thread
        }
        let file = self.open_node(nodeid, libc::O_WRONLY)?;
        sys::ftruncate(file.as_fd(), size)
    }

    /// An empty `buf` asks for the size.
    pub fn get_xattr(&self, nodeid: u64, name: &OsStr, buf: &mut [u8]) -> Res<usize> {
        let fd = self.node_fd(nodeid)?;
        sys::get_xattr(fd.as_fd(), &attribute(name)?, buf)
    }

    pub fn list_xattr(&self, nodeid: u64, buf: &mut [u8]) -> Res<usize> {
        sys::list_xattr(self.node_fd(nodeid)?.as_fd(), buf)
    }

    pub fn set_xattr(
        &self,
        unique: u64,
        nodeid: u64,
        name: &OsStr,
        value: &[u8],
        flags: i32,
    ) -> Res<Option<Slot<'_>>> {
        let name = attribute(name)?;
        if let Some(slot) = self.answered(unique)? {
            return Ok(Some(slot));
        }
        let fd = self.node_fd(nodeid)?;
        let set = || sys::set_xattr(fd.as_fd(), &name, value, flags);
        // To set or replace an attribute twice is to do it once; to create it is not.
        // Nor is it when it fails, be the attribute there already or of a kind that this file system has not.
        if flags & libc::XATTR_CREATE == 0
            || !self.opts.journal
            || sys::get_xattr(fd.as_fd(), &name, &mut []) != Err(Errno::ENODATA)
        {
            set()?;
            return Ok(None);
        }
        let intent = || Intent::SetXattr {
            node: nodeid,
            name: name.clone(),
        };
        let ((), slot) = self.once(unique, intent, set)?;
        Ok(slot)
    }

    pub fn remove_xattr(&self, unique: u64, nodeid: u64, name: &OsStr) -> Res<Option<Slot<'_>>> {
        let name = attribute(name)?;
        if let Some(slot) = self.answered(unique)? {
            return Ok(Some(slot));
        }
        let fd = self.node_fd(nodeid)?;
        if self.opts.journal {
            match sys::get_xattr(fd.as_fd(), &name, &mut []) {
                // To remove an ACL that is not there is no error.
                Err(Errno::ENODATA) if name.to_bytes().starts_with(b"system.posix_acl_") => {}
                other => drop(other?), // absent: as removexattr(2) says it
            }
        }
        let intent = || Intent::RemoveXattr {
            node: nodeid,
            name: name.clone(),
        };
        let ((), slot) = self.once(unique, intent, || sys::remove_xattr(fd.as_fd(), &name))?;
        Ok(slot)
    }
}

fn attribute(name: &OsStr) -> Res<CString> {
    if name.len() > 255 {
        return Err(Errno::ERANGE);
    }
    CString::new(name.as_bytes()).map_err(|_| Errno::EINVAL)
}

fn timespec(time: Option<TimeOrNow>) -> libc::timespec {
    match time {
        None => libc::timespec {
            tv_sec: 0,
            tv_nsec: libc::UTIME_OMIT,
        },
        Some(TimeOrNow::Now) => libc::timespec {
            tv_sec: 0,
            tv_nsec: libc::UTIME_NOW,
        },
        Some(TimeOrNow::SpecificTime(time)) => at(time),
    }
}

/// What the kernel said before fuser made a `SystemTime` of it.
///
/// Before 1970 the kernel's seconds round down and its nanoseconds count up from there; fuser 0.18
/// subtracts both from 1970. Taking them apart in the same wrong way gives back what was sent.
fn at(time: SystemTime) -> libc::timespec {
    let (sign, distance) = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => (1, after),
        Err(e) => (-1, e.duration()),
    };
    libc::timespec {
        tv_sec: sign * distance.as_secs() as i64,
        tv_nsec: i64::from(distance.subsec_nanos()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_before_1970_are_what_the_kernel_sent() {
        let pair = |t: libc::timespec| (t.tv_sec, t.tv_nsec);
        assert_eq!(pair(at(UNIX_EPOCH + Duration::new(5, 7))), (5, 7));
        // As fuser says -5 seconds and 7 nanoseconds.
        assert_eq!(pair(at(UNIX_EPOCH - Duration::new(5, 7))), (-5, 7));
        assert_eq!(pair(at(UNIX_EPOCH - Duration::new(5, 0))), (-5, 0));
    }

    #[test]
    fn what_is_not_asked_for_is_left_alone() {
        assert_eq!(timespec(None).tv_nsec, libc::UTIME_OMIT);
        assert_eq!(timespec(Some(TimeOrNow::Now)).tv_nsec, libc::UTIME_NOW);
    }
}
