// SPDX-License-Identifier: GPL-2.0
//! Operations that take a name away: unlink, rmdir, rename.
//!
//! The last name of a file that the kernel knows is not removed but buried, see
//! [`super::graveyard`]: the file may be open, or a directory somebody's current one.

use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::creds::Caller;
use super::graveyard::is_empty;
use super::handle::Handle;
use super::intent::{Intent, Place};
use super::make::Kept;
use super::server::Server;
use super::sys::{self, Res};

/// A file that is about to lose a name.
struct Victim {
    fd: OwnedFd,
    handle: Handle,
    /// 0 if the kernel does not know the file.
    nodeid: u64,
    dir: bool,
    links: u64,
}

impl Victim {
    fn is_empty(&self) -> Res<bool> {
        let dir = sys::reopen(self.fd.as_fd(), libc::O_RDONLY | libc::O_DIRECTORY)?;
        is_empty(dir.as_fd())
    }
}

impl Server {
    fn victim(&self, dir: BorrowedFd<'_>, name: &CStr) -> Res<Victim> {
        let fd = sys::open_at(dir, name, libc::O_PATH, 0)?;
        let st = sys::fstat(fd.as_fd())?;
        if st.st_dev != self.backing.dev {
            return Err(Errno::EBUSY); // a mount point in the backing
        }
        let (handle, _) = Handle::of(fd.as_fd())?;
        Ok(Victim {
            nodeid: self.known(&handle),
            fd,
            handle,
            dir: st.st_mode & libc::S_IFMT == libc::S_IFDIR,
            links: st.st_nlink,
        })
    }

    /// Whether the file must be kept when it loses the name it was found at.
    fn to_be_kept(&self, victim: &Victim) -> bool {
        victim.nodeid != 0
            && self.yard.exists()
            && !self.yard.contains(victim.nodeid)
            && (victim.dir || victim.links == 1)
    }

    /// unlink, and rmdir if `dir`.
    pub fn remove(&self, unique: u64, (parent, name): (u64, &OsStr), dir: bool) -> Kept<'_, ()> {
        let name = self.name_in(parent, name, Errno::ENOENT)?;
        if let Some(slot) = self.answered(unique)? {
            return Ok(((), Some(slot)));
        }
        let parent_fd = self.node_fd(parent)?;
        let victim = self.victim(parent_fd.as_fd(), &name)?;
        match (dir, victim.dir) {
            (true, false) => return Err(Errno::ENOTDIR),
            (false, true) => return Err(Errno::EISDIR),
            _ => {}
        }
        let intent = || Intent::Remove {
            place: Place::new(parent, &name),
            victim: victim.handle.clone(),
            nodeid: victim.nodeid,
        };
        self.once(unique, intent, || {
            self.take_name(&victim, parent_fd.as_fd(), &name)
        })
    }

    fn take_name(&self, victim: &Victim, parent: BorrowedFd<'_>, name: &CStr) -> Res<()> {
        if self.to_be_kept(victim) {
            let buried = match victim.dir {
                true => self.bury_dir(victim, parent, name, 0)?,
                false => self.buried(victim, parent, name, 0)?,
            };
            if buried {
                return Ok(());
            }
        }
        if victim.dir {
            sys::rmdir_at(parent, name)
        } else {
            sys::unlink_at(parent, name)
        }
    }

    /// Buries what `name` is; false: it cannot be. `whiteout`: 0, or the flag.
    fn buried(
        &self,
        victim: &Victim,
        parent: BorrowedFd<'_>,
        name: &CStr,
        whiteout: u32,
    ) -> Res<bool> {
        match self.yard.bury(victim.nodeid, parent, name, whiteout) {
            Ok(()) => Ok(true),
            // A quota project of its own, a full disk: better removed than refused.
            Err(e) => {
                tracing::warn!(
                    "node {} is removed at once and will not survive a restart if it is in use: {}",
                    victim.nodeid,
                    e.desc()
                );
                Ok(false)
            }
        }
    }

    /// The same for a directory, which must be empty; the kernel lets nobody add to it meanwhile.
    fn bury_dir(
        &self,
        victim: &Victim,
        parent: BorrowedFd<'_>,
        name: &CStr,
        whiteout: u32,
    ) -> Res<bool> {
        if !victim.is_empty()? {
            return Err(Errno::ENOTEMPTY);
        }
        let buried = self.buried(victim, parent, name, whiteout)?;
        // Who cannot look (no descriptor is left) has seen it empty before.
        if buried && victim.is_empty() == Ok(false) {
            // Somebody added to it in the backing, behind our back: nothing may get lost.
            self.yard.exhume(victim.nodeid, parent, name)?;
            return Err(Errno::ENOTEMPTY);
        }
        Ok(buried)
    }

    pub fn rename(
        &self,
        unique: u64,
        caller: Caller,
        (parent, name): (u64, &OsStr),
        (newparent, newname): (u64, &OsStr),
        flags: u32,
    ) -> Kept<'_, ()> {
        const KNOWN: u32 = libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT;
        if flags & !KNOWN != 0 {
            return Err(Errno::EINVAL);
        }
        let name = self.name_in(parent, name, Errno::ENOENT)?;
        let newname = self.name_in(newparent, newname, Errno::EPERM)?;
        if let Some(slot) = self.answered(unique)? {
            return Ok(((), Some(slot)));
        }
        let (from, to) = (self.node_fd(parent)?, self.node_fd(newparent)?);
        let source = self.victim(from.as_fd(), &name)?;
        let target = match self.victim(to.as_fd(), &newname) {
            Ok(victim) => Some(victim),
            Err(Errno::ENOENT) => None,
            Err(e) => return Err(e),
        };
        let intent = || Intent::Rename {
            from: Place::new(parent, &name),
            to: Place::new(newparent, &newname),
            flags,
            source: source.handle.clone(),
            target: target.as_ref().map(|t| t.handle.clone()),
            nodeid: target.as_ref().map_or(0, |t| t.nodeid),
            caller,
        };
        self.once(unique, intent, || {
            let plain = || {
                let rename = || sys::rename_at(from.as_fd(), &name, to.as_fd(), &newname, flags);
                match flags & libc::RENAME_WHITEOUT {
                    0 => rename(),
                    // The whiteout is a file of the caller's.
                    _ => caller.create(0, rename),
                }
            };
            match &target {
                Some(target)
                    if flags & !libc::RENAME_WHITEOUT == 0
                        && target.handle != source.handle
                        && target.dir == source.dir
                        && self.to_be_kept(target) =>
                {
                    if target.dir {
                        let places = ((from.as_fd(), &*name), (to.as_fd(), &*newname));
                        self.over_dir(target, places, (caller, flags), plain)
                    } else {
                        self.over_file(target, plain)
                    }
                }
                _ => plain(),
            }
        })
    }

    /// The name must never be missing in between: the victim gets a second name first.
    fn over_file(&self, target: &Victim, rename: impl FnOnce() -> Res<()>) -> Res<()> {
        if let Err(e) = self.yard.prepare(target.nodeid, target.fd.as_fd()) {
            tracing::warn!(
                "node {} is overwritten at once and will not survive a restart if it is open: {}",
                target.nodeid,
                e.desc()
            );
            return rename();
        }
        match rename() {
            Ok(()) => {
                self.yard.note(target.nodeid);
                Ok(())
            }
            Err(e) => {
                self.yard.unprepare(target.nodeid);
                Err(e)
            }
        }
    }

    /// A directory has only one name: exchange the two, then bury the victim at the old one.
    fn over_dir(
        &self,
        target: &Victim,
        ((from, name), (to, newname)): ((BorrowedFd<'_>, &CStr), (BorrowedFd<'_>, &CStr)),
        (caller, whiteout): (Caller, u32),
        plain: impl FnOnce() -> Res<()>,
    ) -> Res<()> {
        if !target.is_empty()? {
            return plain();
        }
        if sys::rename_at(from, name, to, newname, libc::RENAME_EXCHANGE).is_err() {
            return plain(); // not offered by every file system
        }
        let bury = || self.bury_dir(target, from, name, whiteout);
        let buried = match whiteout {
            0 => bury(),
            _ => caller.create(0, bury),
        };
        if buried == Ok(true) {
            return Ok(());
        }
        sys::rename_at(from, name, to, newname, libc::RENAME_EXCHANGE)?;
        buried?;
        // In one step: a rename that fails, for want of room for its whiteout, say, must not cost the victim.
        plain()
    }
}
