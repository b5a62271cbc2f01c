// SPDX-License-Identifier: GPL-2.0
//! Operations that add a name: create, mkdir, mknod, symlink, link.

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use rust_fuse_notify::std::state::{HandleKind, Slot};

use super::creds::Caller;
use super::handle::Handle;
use super::intent::{Intent, Place};
use super::nodes::Entry;
use super::server::Server;
use super::sys::{self, Res};
use super::wire::decode_dev;

/// What is to be made.
pub enum Thing<'a> {
    Dir { mode: u32 },
    Node { mode: u32, rdev: u32 },
    Symlink { target: &'a CStr },
}

impl Thing<'_> {
    fn make(&self, dir: BorrowedFd<'_>, name: &CStr) -> Res<()> {
        match self {
            Thing::Dir { mode } => sys::mkdir_at(dir, name, *mode),
            Thing::Node { mode, rdev } => sys::mknod_at(dir, name, *mode, decode_dev(*rdev)),
            Thing::Symlink { target } => sys::symlink_at(target, dir, name),
        }
    }
}

/// A result with the journal's slot, to be given back when the request was answered.
pub type Kept<'a, T> = Res<(T, Option<Slot<'a>>)>;

/// What CREATE answers.
#[derive(Debug)]
pub struct Created {
    pub entry: Entry,
    pub fh: u64,
}

impl Server {
    /// mkdir, mknod, symlink.
    pub fn make(
        &self,
        unique: u64,
        caller: Caller,
        (parent, name): (u64, &OsStr),
        umask: u32,
        thing: &Thing<'_>,
    ) -> Kept<'_, Entry> {
        let name = self.name_in(parent, name, Errno::EPERM)?;
        if let Some(slot) = self.answered(unique)? {
            return Ok((self.lookup_c(parent, &name)?, Some(slot)));
        }
        let dir = self.absent(parent, &name)?;
        let intent = || Intent::Make {
            place: Place::new(parent, &name),
        };
        let ((), slot) = self.once(unique, intent, || {
            caller.create(umask, || thing.make(dir.as_fd(), &name))
        })?;
        kept(self.lookup_c(parent, &name), slot)
    }

    pub fn link(&self, unique: u64, nodeid: u64, (parent, name): (u64, &OsStr)) -> Kept<'_, Entry> {
        let name = self.name_in(parent, name, Errno::EPERM)?;
        if let Some(slot) = self.answered(unique)? {
            return Ok((self.lookup_c(parent, &name)?, Some(slot)));
        }
        let source = Handle(self.node(nodeid)?.info.handle);
        if self.yard.contains(nodeid) {
            return Err(Errno::ENOENT); // as link(2) says of a file without a name
        }
        let dir = self.absent(parent, &name)?;
        let file = self.node_fd(nodeid)?;
        let intent = || Intent::Link {
            place: Place::new(parent, &name),
            source,
        };
        let ((), slot) = self.once(unique, intent, || {
            sys::link_fd(file.as_fd(), dir.as_fd(), &name)
        })?;
        kept(self.lookup_c(parent, &name), slot)
    }

    pub fn create(
        &self,
        unique: u64,
        caller: Caller,
        (parent, name): (u64, &OsStr),
        (mode, umask): (u32, u32),
        flags: i32,
    ) -> Kept<'_, Created> {
        let name = self.name_in(parent, name, Errno::EPERM)?;
        if let Some(slot) = self.answered(unique)? {
            // It is ours: O_EXCL is satisfied, and there is nothing to truncate.
            let flags = flags & !(libc::O_EXCL | libc::O_TRUNC);
            return Ok((
                self.open_existing(unique, parent, &name, flags)?,
                Some(slot),
            ));
        }
        let intent = || Intent::Make {
            place: Place::new(parent, &name),
        };
        let backing_flags = self.backing_flags(flags);
        let exclusive = backing_flags | libc::O_CREAT | libc::O_EXCL;
        let made = self.absent(parent, &name).and_then(|dir| {
            self.once(unique, intent, || {
                caller.create(umask, || {
                    sys::open_at(dir.as_fd(), &name, exclusive, mode & 0o7777)
                })
            })
        });
        let (fd, slot) = match made {
            Err(Errno::EEXIST) => {
                return Ok((self.open_existing(unique, parent, &name, flags)?, None))
            }
            made => made?,
        };
        kept(self.opened(unique, fd, backing_flags), slot)
    }

    /// The directory, once it is sure that the name is free in it.
    fn absent(&self, parent: u64, name: &CString) -> Res<std::sync::Arc<OwnedFd>> {
        let dir = self.node_fd(parent)?;
        if !self.opts.journal {
            return Ok(dir); // the change itself will say so
        }
        match sys::lstat_at(dir.as_fd(), name) {
            Err(Errno::ENOENT) => Ok(dir),
            Ok(_) => Err(Errno::EEXIST),
            Err(e) => Err(e),
        }
    }

    /// CREATE of a name that the kernel did not know, or that an earlier instance made.
    fn open_existing(&self, unique: u64, parent: u64, name: &CStr, flags: i32) -> Res<Created> {
        if flags & libc::O_EXCL != 0 {
            return Err(Errno::EEXIST);
        }
        let dir = self.node_fd(parent)?;
        let path = sys::open_at(dir.as_fd(), name, libc::O_PATH, 0)?;
        match sys::fstat(path.as_fd())?.st_mode & libc::S_IFMT {
            libc::S_IFREG => {}
            libc::S_IFDIR => return Err(Errno::EISDIR),
            libc::S_IFLNK => return Err(Errno::ELOOP),
            _ => return Err(Errno::EEXIST), // never opened here: a fifo would block the thread
        }
        let backing_flags = self.backing_flags(flags);
        let fd = sys::reopen(path.as_fd(), backing_flags)?;
        // What was opened for this request was also truncated for it; since then others may have written.
        let (handle, _) = Handle::of(path.as_fd())?;
        let opened = self.handle_of_resend(unique, self.known(&handle));
        if flags & libc::O_TRUNC != 0 && opened.is_none() {
            sys::ftruncate(fd.as_fd(), 0)?;
        }
        self.opened(unique, fd, backing_flags)
    }

    fn opened(&self, unique: u64, fd: OwnedFd, flags: i32) -> Res<Created> {
        let entry = self.count(&fd)?;
        let fh = match self.handle_of_resend(unique, entry.nodeid) {
            Some(fh) => Ok(fh),
            None => self.new_handle(unique, entry.nodeid, flags, HandleKind::File, fd),
        };
        match fh {
            Ok(fh) => Ok(Created { entry, fh }),
            Err(e) => {
                self.forget(entry.nodeid, 1);
                Err(e)
            }
        }
    }
}

/// What was made, or the error (a table is full, say) with which the caller is told of it. Then its slot, which would stay until
/// the next recovery, goes; a moment before the caller is told: who dies in between makes of it another error (`EEXIST`).
fn kept<T>(made: Res<T>, slot: Option<Slot<'_>>) -> Kept<'_, T> {
    match made {
        Ok(made) => Ok((made, slot)),
        Err(e) => {
            slot.into_iter().for_each(Slot::done);
            Err(e)
        }
    }
}

/// The target of a symbolic link, which may be anything but NUL.
pub fn target(path: &std::path::Path) -> Res<CString> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        return Err(Errno::ENOENT);
    }
    CString::new(bytes).map_err(|_| Errno::EINVAL)
}
