// SPDX-License-Identifier: GPL-2.0
//! fuser's trait: takes requests apart, sends answers. What they mean is in the other modules.
//!
//! There are no handles: every request carries the nodeid, an inode stays as long as the kernel knows it, and offsets
//! come with the requests. So OPEN and OPENDIR give out 0, and there is nothing of them to survive.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, FileHandle, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use rust_fuse_notify::std::state::Slot;
use rust_fuse_notify::std::wire::FUSE_RESTARTABLE;

use crate::crash_points::{begin, poison, reach};

use super::attr::Attributes;
use super::inode::{kind, Inode, Time};
use super::layout::PAGE;
use super::make::{Caller, New};
use super::once::{Kept, Opcode};
use super::store::Res;
use super::tree::Tree;

/// The largest read and write, as in the kernel's own default limit of 256 pages.
const MAX_WRITE: u32 = 1 << 20;
/// Nobody changes anything but through the mount.
const TTL: Duration = Duration::from_secs(60);
const GENERATION: Generation = Generation(0);

pub struct Mem(pub Arc<Tree>);

fn errno(e: nix::errno::Errno) -> fuser::Errno {
    fuser::Errno::from_i32(e as i32)
}

fn caller(req: &Request) -> Caller {
    Caller {
        uid: req.uid(),
        gid: req.gid(),
    }
}

/// The request was answered: nobody will ask again.
fn answered(slot: Option<Slot<'_>>) {
    if let Some(slot) = slot {
        reach("answered");
        slot.done();
    }
}

fn entry(reply: ReplyEntry, made: Kept<'_, Inode>) {
    match made {
        Ok((inode, slot)) => {
            reach("reply");
            reply.entry(&TTL, &inode.attr(), GENERATION);
            answered(slot);
        }
        Err(e) => reply.error(errno(e)),
    }
}

fn attr(reply: ReplyAttr, inode: Res<Inode>) {
    match inode {
        Ok(inode) => {
            reach("reply");
            reply.attr(&TTL, &inode.attr());
        }
        Err(e) => reply.error(errno(e)),
    }
}

fn empty(reply: ReplyEmpty, done: Kept<'_, ()>) {
    match done {
        Ok(((), slot)) => {
            reach("reply");
            reply.ok();
            answered(slot);
        }
        Err(e) => reply.error(errno(e)),
    }
}

fn data(reply: ReplyData, data: Res<Vec<u8>>) {
    match data {
        Ok(data) => reply.data(&data),
        Err(e) => reply.error(errno(e)),
    }
}

fn xattr(reply: ReplyXattr, size: u32, value: Res<Vec<u8>>) {
    match value {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(fuser::Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(e) => reply.error(errno(e)),
    }
}

fn time(time: TimeOrNow) -> Time {
    match time {
        TimeOrNow::Now => Time::now(),
        TimeOrNow::SpecificTime(time) => time.into(),
    }
}

impl fuser::Filesystem for Mem {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for flag in [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::from_bits_retain(FUSE_RESTARTABLE),
        ] {
            // What the kernel does not offer, the server can do without.
            if config.add_capabilities(flag).is_err() {
                tracing::debug!("the kernel does not offer {flag:?}");
            }
        }
        config
            .set_max_write(MAX_WRITE)
            .map(drop)
            .map_err(|best| io::Error::other(format!("fuser wants {best}")))
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _request = begin("lookup");
        poison(name);
        entry(
            reply,
            self.0.lookup(parent.0, name).map(|inode| (inode, None)),
        );
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        let _request = begin("forget");
        self.0.forget(ino.0, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let _request = begin("getattr");
        attr(reply, self.0.attr(ino.0));
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let _request = begin("setattr");
        let new = Attributes {
            mode,
            uid,
            gid,
            size,
            atime: atime.map(time),
            mtime: mtime.map(time),
        };
        attr(reply, self.0.set_attr(ino.0, &new));
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let _request = begin("readlink");
        data(reply, self.0.read(ino.0, 0, PAGE));
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let _request = begin("mknod");
        let new = New {
            opcode: Opcode::Mknod,
            mode,
            rdev,
            target: b"",
        };
        let made = self
            .0
            .make(req.unique().0, caller(req), (parent.0, name), &new);
        entry(reply, made);
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let _request = begin("mkdir");
        let new = New {
            opcode: Opcode::Mkdir,
            mode: mode & 0o7777 | libc::S_IFDIR,
            rdev: 0,
            target: b"",
        };
        let made = self
            .0
            .make(req.unique().0, caller(req), (parent.0, name), &new);
        entry(reply, made);
    }

    fn symlink(&self, req: &Request, parent: INodeNo, name: &OsStr, to: &Path, reply: ReplyEntry) {
        let _request = begin("symlink");
        let new = New {
            opcode: Opcode::Symlink,
            mode: libc::S_IFLNK | 0o777,
            rdev: 0,
            target: to.as_os_str().as_bytes(),
        };
        let made = self
            .0
            .make(req.unique().0, caller(req), (parent.0, name), &new);
        entry(reply, made);
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _request = begin("unlink");
        empty(
            reply,
            self.0.remove(req.unique().0, (parent.0, name), false),
        );
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _request = begin("rmdir");
        empty(reply, self.0.remove(req.unique().0, (parent.0, name), true));
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let _request = begin("rename");
        let (from, to) = ((parent.0, name), (newparent.0, newname));
        let renamed = self
            .0
            .rename(req.unique().0, caller(req), from, to, flags.bits());
        empty(reply, renamed);
    }

    fn link(&self, req: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _request = begin("link");
        entry(reply, self.0.link(req.unique().0, ino.0, (parent.0, name)));
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let _request = begin("create");
        let at = (parent.0, name);
        match self.0.create(req.unique().0, caller(req), at, mode, flags) {
            Ok((inode, slot)) => {
                reach("reply");
                let fh = FileHandle(0);
                reply.created(&TTL, &inode.attr(), GENERATION, fh, FopenFlags::empty());
                answered(slot);
            }
            Err(e) => reply.error(errno(e)),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _request = begin("read");
        data(
            reply,
            self.0.read(ino.0, offset, size.min(MAX_WRITE) as usize),
        );
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _request = begin("write");
        match self.0.write(ino.0, offset, data) {
            Ok(written) => {
                reach("reply");
                reply.written(written as u32);
            }
            Err(e) => reply.error(errno(e)),
        }
    }

    // Whatever was answered is where it will be found.

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _data: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _data: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let _request = begin("fallocate");
        let done = self.0.allocate(ino.0, offset, length, mode);
        empty(reply, done.map(|()| ((), None)));
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let _request = begin("readdir");
        let read = self.0.read_dir(ino.0, offset, false, |shown| {
            let name = OsStr::from_bytes(shown.name);
            let number = INodeNo(shown.inode.nodeid);
            reply.add(number, shown.position, kind(shown.inode.mode), name)
        });
        match read {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let _request = begin("readdirplus");
        let read = self.0.read_dir(ino.0, offset, true, |shown| {
            let name = OsStr::from_bytes(shown.name);
            let number = INodeNo(shown.inode.nodeid);
            let attr = shown.inode.attr();
            reply.add(number, shown.position, name, &TTL, &attr, GENERATION)
        });
        match read {
            Ok(()) => {
                reach("reply");
                reply.ok();
            }
            Err(e) => reply.error(errno(e)),
        }
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let (layout, index) = (self.0.store.layout, self.0.reading());
        let free = u64::from(index.blocks.left());
        reply.statfs(
            u64::from(layout.blocks),
            free,
            free,
            u64::from(layout.inodes),
            u64::from(index.inodes.left()),
            PAGE as u32,
            super::layout::name::MOST_BYTES as u32,
            PAGE as u32,
        );
    }

    fn setxattr(
        &self,
        req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let _request = begin("setxattr");
        let set = self.0.set_xattr(req.unique().0, ino.0, name, value, flags);
        empty(reply, set);
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let _request = begin("getxattr");
        xattr(reply, size, self.0.get_xattr(ino.0, name));
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let _request = begin("listxattr");
        xattr(reply, size, self.0.list_xattrs(ino.0));
    }

    fn removexattr(&self, req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _request = begin("removexattr");
        empty(reply, self.0.remove_xattr(req.unique().0, ino.0, name));
    }
}
