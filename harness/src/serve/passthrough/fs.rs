// SPDX-License-Identifier: GPL-2.0
//! fuser's trait: takes requests apart, sends answers. What they mean is in the other modules.

use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, FileHandle, FopenFlags, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr,
    Request, TimeOrNow, WriteFlags,
};
use nix::errno::Errno;
use rust_fuse_notify::std::wire::FUSE_RESTARTABLE;
use zerocopy::IntoBytes;

use crate::crash_points::{begin, poison};

use super::answer::{answered, empty};
use super::attr::Change;
use super::creds::Caller;
use super::make::{target, Created, Thing};
use super::nodes::ROOT;
use super::server::Server;
use super::sys;
use super::wire::{OpenOut, WriteOut};

/// The largest read and write, as in the kernel's own default limit of 256 pages.
const MAX_WRITE: u32 = 1 << 20;

pub struct Passthrough(pub Arc<Server>);

pub fn errno(e: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(e as i32)
}

fn caller(req: &Request) -> Caller {
    Caller {
        uid: req.uid(),
        gid: req.gid(),
    }
}

impl fuser::Filesystem for Passthrough {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let mut wanted = vec![
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            // The backing decides what a umask means, for a default ACL overrules it.
            InitFlags::FUSE_DONT_MASK,
            // Also makes the kernel check permissions, which the server relies on.
            InitFlags::FUSE_POSIX_ACL,
            InitFlags::FUSE_AUTO_INVAL_DATA,
        ];
        if self.0.opts.sign {
            wanted.push(InitFlags::from_bits_retain(FUSE_RESTARTABLE));
        }
        if self.0.opts.writeback {
            wanted.push(InitFlags::FUSE_WRITEBACK_CACHE);
        }
        for flag in wanted {
            // What the kernel does not offer, the server can do without.
            if config.add_capabilities(flag).is_err() {
                tracing::debug!("the kernel does not offer {flag:?}");
            }
        }
        config
            .set_max_write(MAX_WRITE)
            .and_then(|_| {
                config
                    .set_max_background(64)
                    .map(u32::from)
                    .map_err(u32::from)
            })
            .map_err(|best| io::Error::other(format!("fuser wants {best}")))?;
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _request = begin("lookup");
        poison(name);
        let entry = self.0.lookup(parent.0, name);
        self.entry(req, reply, entry.map(|e| (e, None)));
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        let _request = begin("forget");
        self.0.forget(ino.0, nlookup);
    }

    fn getattr(&self, req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let _request = begin("getattr");
        self.attr(req, reply, self.0.attr(ino.0));
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let _request = begin("setattr");
        let fh = fh.map(|fh| fh.0);
        let change = Change {
            mode,
            uid,
            gid,
            size,
            atime,
            mtime,
            fh,
        };
        self.attr(req, reply, self.0.set_attr(ino.0, &change));
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let _request = begin("readlink");
        match self
            .0
            .node_fd(ino.0)
            .and_then(|fd| sys::readlink(fd.as_fd()))
        {
            Ok(target) => reply.data(&target),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let _request = begin("mknod");
        let thing = Thing::Node { mode, rdev };
        let made = self
            .0
            .make(req.unique().0, caller(req), (parent.0, name), umask, &thing);
        self.entry(req, reply, made);
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let _request = begin("mkdir");
        let thing = Thing::Dir { mode };
        let made = self
            .0
            .make(req.unique().0, caller(req), (parent.0, name), umask, &thing);
        self.entry(req, reply, made);
    }

    fn symlink(&self, req: &Request, parent: INodeNo, name: &OsStr, to: &Path, reply: ReplyEntry) {
        let _request = begin("symlink");
        let made = target(to).and_then(|target| {
            let thing = Thing::Symlink { target: &target };
            self.0
                .make(req.unique().0, caller(req), (parent.0, name), 0, &thing)
        });
        self.entry(req, reply, made);
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _request = begin("unlink");
        let removed = self.0.remove(req.unique().0, (parent.0, name), false);
        self.empty_kept(req, reply, removed.map(|((), slot)| slot));
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _request = begin("rmdir");
        let removed = self.0.remove(req.unique().0, (parent.0, name), true);
        self.empty_kept(req, reply, removed.map(|((), slot)| slot));
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
        self.empty_kept(req, reply, renamed.map(|((), slot)| slot));
    }

    fn link(&self, req: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _request = begin("link");
        let linked = self.0.link(req.unique().0, ino.0, (parent.0, name));
        self.entry(req, reply, linked);
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let _request = begin("open");
        match self.0.open(req.unique().0, ino.0, flags.0) {
            Ok(fh) => reply.opened(FileHandle(fh), FopenFlags::empty()),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let _request = begin("create");
        let unique = req.unique().0;
        let created = self
            .0
            .create(unique, caller(req), (parent.0, name), (mode, umask), flags);
        match created {
            Ok((Created { entry, fh }, slot)) => {
                let open = OpenOut {
                    fh,
                    open_flags: 0,
                    backing_id: 0,
                };
                let out = self.0.entry_out(&entry);
                if self.raw(req, reply, &[out.as_bytes(), open.as_bytes()]) {
                    answered(slot);
                } else {
                    self.0.close(fh);
                    self.0.forget(entry.nodeid, 1);
                }
            }
            Err(e) => reply.error(errno(e)),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _request = begin("read");
        let mut buf = vec![0; size.min(MAX_WRITE) as usize];
        let read = self.0.file(ino.0, fh.0);
        match read.and_then(|fd| sys::read_full_at(fd.as_fd(), &mut buf, offset)) {
            Ok(n) => reply.data(&buf[..n]),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _request = begin("write");
        let file = self.0.file(ino.0, fh.0);
        match file.and_then(|fd| sys::write_full_at(fd.as_fd(), data, offset)) {
            Ok(n) => reply.written(n as u32),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn flush(&self, _: &Request, ino: INodeNo, fh: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        let _request = begin("flush");
        empty(reply, self.0.flush(ino.0, fh.0));
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let _request = begin("release");
        self.0.close(fh.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, fh: FileHandle, data: bool, reply: ReplyEmpty) {
        let _request = begin("fsync");
        let file = self.0.file(ino.0, fh.0);
        empty(reply, file.and_then(|fd| sys::fsync(fd.as_fd(), data)));
    }

    fn opendir(&self, req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let _request = begin("opendir");
        match self.0.open_dir(req.unique().0, ino.0) {
            Ok(fh) => reply.opened(FileHandle(fh), FopenFlags::empty()),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let _request = begin("readdir");
        let read = self
            .0
            .read_dir(ino.0, fh.0, offset, |ino, off, kind, name| {
                reply.add(INodeNo(ino), off, kind, name)
            });
        match read {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn readdirplus(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let _request = begin("readdirplus");
        match self.0.read_dir_plus(ino.0, fh.0, offset) {
            Ok((buf, counted)) => {
                if !self.raw(req, reply, &[buf.bytes()]) {
                    self.0.take_back(&counted);
                }
            }
            Err(e) => reply.error(errno(e)),
        }
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let _request = begin("releasedir");
        self.0.close(fh.0);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, fh: FileHandle, data: bool, reply: ReplyEmpty) {
        let _request = begin("fsyncdir");
        let dir = self.0.file(ino.0, fh.0);
        empty(reply, dir.and_then(|fd| sys::fsync(fd.as_fd(), data)));
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let _request = begin("statfs");
        match sys::fstatvfs(self.0.backing.root()) {
            Ok(st) => reply.statfs(
                st.f_blocks,
                st.f_bfree,
                st.f_bavail,
                st.f_files,
                st.f_ffree,
                st.f_bsize as u32,
                st.f_namemax as u32,
                st.f_frsize as u32,
            ),
            Err(e) => reply.error(errno(e)),
        }
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
        self.empty_kept(
            req,
            reply,
            self.0.set_xattr(req.unique().0, ino.0, name, value, flags),
        );
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let _request = begin("getxattr");
        Self::xattr(reply, size, |buf| self.0.get_xattr(ino.0, name, buf));
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let _request = begin("listxattr");
        Self::xattr(reply, size, |buf| self.0.list_xattr(ino.0, buf));
    }

    fn removexattr(&self, req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _request = begin("removexattr");
        self.empty_kept(req, reply, self.0.remove_xattr(req.unique().0, ino.0, name));
    }

    fn access(&self, req: &Request, ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        let _request = begin("access");
        let allowed = self
            .0
            .node_fd(ino.0)
            .and_then(|fd| caller(req).restricted(|| sys::access(fd.as_fd(), mask.bits())));
        empty(reply, allowed);
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let _request = begin("fallocate");
        empty(reply, self.0.allocate(ino.0, fh.0, mode, offset, length));
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let _request = begin("lseek");
        let file = self.0.file(ino.0, fh.0);
        match file.and_then(|fd| sys::lseek(fd.as_fd(), offset, whence)) {
            Ok(at) => reply.offset(at),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn copy_file_range(
        &self,
        req: &Request,
        ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let _request = begin("copy_file_range");
        let (from, to) = (
            (ino_in.0, fh_in.0, offset_in),
            (ino_out.0, fh_out.0, offset_out),
        );
        match self.0.copy(req.unique().0, from, to, len) {
            Ok((size, slot)) => {
                let out = WriteOut { size, padding: 0 };
                self.kept(req, reply, out.as_bytes(), slot);
            }
            Err(e) => reply.error(errno(e)),
        }
    }

    // The kernel asks once and then does without.

    fn poll(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _ph: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(fuser::Errno::ENOTTY);
    }
}

const _: () = assert!(ROOT == INodeNo::ROOT.0);
