// SPDX-License-Identifier: GPL-2.0
//! A `fuser` file system whose requests are marked in the state (feature `fuser`).
//!
//! Wrap the file system, and a request on which the server dies again and again costs `EIO` instead of the mount, and
//! a keeper finds out that the server hangs:
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use rust_fuse_notify::std::{state::State, watched::Watched};
//! # fn sketch(filesystem: impl fuser::Filesystem, fd: std::os::fd::OwnedFd, state: Arc<State>) -> std::io::Result<()> {
//! let filesystem = Watched::new(filesystem, state);
//! fuser::Session::from_fd(filesystem, fd, fuser::SessionACL::All, fuser::Config::default())?.run()
//! # }
//! ```
//!
//! A request counts as answered when the method returns. A server that hands the reply to another thread must not be
//! wrapped; it calls [`State::flights`] itself, and keeps the [`super::state::Flight`] with the reply.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, INodeNo,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier,
    RenameFlags, ReplyAttr, ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLock, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::state::{Flight, InFlight, State};

/// How a keeper, or a unit file, says after how many deaths a request is refused; 0: never.
pub const MAX_TRIES_VARIABLE: &str = "FUSE_RESTART_MAX_TRIES";

/// See the module.
#[derive(Debug)]
pub struct Watched<F> {
    server: F,
    state: Arc<State>,
}

impl<F> Watched<F> {
    /// Wraps a file system that answers before its methods return. [`MAX_TRIES_VARIABLE`] is obeyed.
    pub fn new(server: F, state: Arc<State>) -> Watched<F> {
        if let Ok(text) = std::env::var(MAX_TRIES_VARIABLE) {
            match text.parse() {
                Ok(tries) => state.flights().set_max_tries(tries),
                Err(_) => tracing::warn!("{MAX_TRIES_VARIABLE}={text:?} is no number: ignored"),
            }
        }
        state.flights().watch();
        Watched { server, state }
    }

    fn enter(&self, req: &Request, opcode: u32, node: INodeNo) -> Flight<'_> {
        self.state.flights().enter(InFlight {
            unique: req.unique().0,
            opcode,
            nodeid: node.0,
            pid: req.pid(),
        })
    }
}

macro_rules! watched {
    ($($name:ident = $opcode:literal ($node:ident $(, $arg:ident: $type:ty)*) -> $reply:ty;)*) => { $(
        fn $name(&self, req: &Request, $node: INodeNo, $($arg: $type,)* reply: $reply) {
            let flight = self.enter(req, $opcode, $node);
            if flight.is_refused() {
                return reply.error(Errno::EIO);
            }
            self.server.$name(req, $node, $($arg,)* reply);
            drop(flight);
        }
    )* };
}

impl<F: Filesystem> Filesystem for Watched<F> {
    fn init(&mut self, req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        self.server.init(req, config)
    }

    fn destroy(&mut self) {
        self.server.destroy();
    }

    // Not answered, so never asked again.
    fn forget(&self, req: &Request, ino: INodeNo, nlookup: u64) {
        self.server.forget(req, ino, nlookup);
    }

    watched! {
        lookup = 1 (parent, name: &OsStr) -> ReplyEntry;
        getattr = 3 (ino, fh: Option<FileHandle>) -> ReplyAttr;
        setattr = 4 (ino, mode: Option<u32>, uid: Option<u32>, gid: Option<u32>, size: Option<u64>,
            atime: Option<TimeOrNow>, mtime: Option<TimeOrNow>, ctime: Option<SystemTime>,
            fh: Option<FileHandle>, crtime: Option<SystemTime>, chgtime: Option<SystemTime>,
            bkuptime: Option<SystemTime>, flags: Option<BsdFileFlags>) -> ReplyAttr;
        readlink = 5 (ino) -> ReplyData;
        symlink = 6 (parent, name: &OsStr, target: &Path) -> ReplyEntry;
        mknod = 8 (parent, name: &OsStr, mode: u32, umask: u32, rdev: u32) -> ReplyEntry;
        mkdir = 9 (parent, name: &OsStr, mode: u32, umask: u32) -> ReplyEntry;
        unlink = 10 (parent, name: &OsStr) -> ReplyEmpty;
        rmdir = 11 (parent, name: &OsStr) -> ReplyEmpty;
        rename = 12 (parent, name: &OsStr, newparent: INodeNo, newname: &OsStr, flags: RenameFlags)
            -> ReplyEmpty;
        link = 13 (ino, newparent: INodeNo, newname: &OsStr) -> ReplyEntry;
        open = 14 (ino, flags: OpenFlags) -> ReplyOpen;
        read = 15 (ino, fh: FileHandle, offset: u64, size: u32, flags: OpenFlags,
            lock_owner: Option<LockOwner>) -> ReplyData;
        write = 16 (ino, fh: FileHandle, offset: u64, data: &[u8], write_flags: WriteFlags,
            flags: OpenFlags, lock_owner: Option<LockOwner>) -> ReplyWrite;
        statfs = 17 (ino) -> ReplyStatfs;
        release = 18 (ino, fh: FileHandle, flags: OpenFlags, lock_owner: Option<LockOwner>,
            flush: bool) -> ReplyEmpty;
        fsync = 20 (ino, fh: FileHandle, datasync: bool) -> ReplyEmpty;
        setxattr = 21 (ino, name: &OsStr, value: &[u8], flags: i32, position: u32) -> ReplyEmpty;
        getxattr = 22 (ino, name: &OsStr, size: u32) -> ReplyXattr;
        listxattr = 23 (ino, size: u32) -> ReplyXattr;
        removexattr = 24 (ino, name: &OsStr) -> ReplyEmpty;
        flush = 25 (ino, fh: FileHandle, lock_owner: LockOwner) -> ReplyEmpty;
        opendir = 27 (ino, flags: OpenFlags) -> ReplyOpen;
        readdir = 28 (ino, fh: FileHandle, offset: u64) -> ReplyDirectory;
        releasedir = 29 (ino, fh: FileHandle, flags: OpenFlags) -> ReplyEmpty;
        fsyncdir = 30 (ino, fh: FileHandle, datasync: bool) -> ReplyEmpty;
        getlk = 31 (ino, fh: FileHandle, lock_owner: LockOwner, start: u64, end: u64, typ: i32,
            pid: u32) -> ReplyLock;
        access = 34 (ino, mask: AccessFlags) -> ReplyEmpty;
        create = 35 (parent, name: &OsStr, mode: u32, umask: u32, flags: i32) -> ReplyCreate;
        bmap = 37 (ino, blocksize: u32, idx: u64) -> ReplyBmap;
        ioctl = 39 (ino, fh: FileHandle, flags: IoctlFlags, cmd: u32, in_data: &[u8],
            out_size: u32) -> ReplyIoctl;
        poll = 40 (ino, fh: FileHandle, ph: PollNotifier, events: PollEvents, flags: PollFlags)
            -> ReplyPoll;
        fallocate = 43 (ino, fh: FileHandle, offset: u64, length: u64, mode: i32) -> ReplyEmpty;
        readdirplus = 44 (ino, fh: FileHandle, offset: u64) -> ReplyDirectoryPlus;
        lseek = 46 (ino, fh: FileHandle, offset: i64, whence: i32) -> ReplyLseek;
        copy_file_range = 47 (ino_in, fh_in: FileHandle, offset_in: u64, ino_out: INodeNo,
            fh_out: FileHandle, offset_out: u64, len: u64, flags: CopyFileRangeFlags) -> ReplyWrite;
    }

    fn setlk(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        lock_owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let flight = self.enter(req, if sleep { 33 } else { 32 }, ino);
        if flight.is_refused() {
            return reply.error(Errno::EIO);
        }
        self.server
            .setlk(req, ino, fh, lock_owner, start, end, typ, pid, sleep, reply);
        drop(flight);
    }
}
