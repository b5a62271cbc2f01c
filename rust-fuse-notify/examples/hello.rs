// SPDX-License-Identifier: MIT
//! fuser's `hello` example (by Christopher Berner and others), made restartable: compare it with `hello_plain.rs`.
//! Run it with: fuse-restart keep --mountpoint DIR -- hello

use std::ffi::OsStr;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry, Request,
};
use rust_fuse_notify::std::adopt::{Adopt, Recover};
use rust_fuse_notify::std::state::{Config, State};
use rust_fuse_notify::std::{listen, message::Replay, wire};

const TTL: Duration = Duration::from_secs(1);
const CONTENT: &str = "Hello World!\n";

const DIR: FileAttr = FileAttr {
    ino: INodeNo::ROOT,
    size: 0,
    blocks: 0,
    atime: UNIX_EPOCH,
    mtime: UNIX_EPOCH,
    ctime: UNIX_EPOCH,
    crtime: UNIX_EPOCH,
    kind: FileType::Directory,
    perm: 0o755,
    nlink: 2,
    uid: 501,
    gid: 20,
    rdev: 0,
    flags: 0,
    blksize: 512,
};

const TXT: FileAttr = FileAttr {
    ino: INodeNo(2),
    size: CONTENT.len() as u64,
    blocks: 1,
    kind: FileType::RegularFile,
    perm: 0o644,
    nlink: 1,
    ..DIR
};

struct Hello;

/// Nodeids are constants, and nothing changes: to know the inodes again is all there is to do.
impl Recover for Hello {
    fn replay(&mut self, _state: &State, replay: &Replay) -> Result<wire::Attr, i32> {
        match replay.nodeid {
            1 => Ok(wire::Attr::new(1, libc::S_IFDIR)),
            2 => Ok(wire::Attr::new(2, libc::S_IFREG)),
            _ => Err(libc::ESTALE),
        }
    }
}

impl Filesystem for Hello {
    fn init(&mut self, _req: &Request, config: &mut fuser::KernelConfig) -> std::io::Result<()> {
        let flag = fuser::InitFlags::from_bits_retain(wire::FUSE_RESTARTABLE);
        let _ = config.add_capabilities(flag); // an older kernel: it does without
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT && name == "hello.txt" {
            reply.entry(&TTL, &TXT, Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match ino.0 {
            1 => reply.attr(&TTL, &DIR),
            2 => reply.attr(&TTL, &TXT),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        _size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match ino.0 {
            2 => reply.data(
                CONTENT
                    .as_bytes()
                    .get(offset as usize..)
                    .unwrap_or_default(),
            ),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if ino != INodeNo::ROOT {
            return reply.error(Errno::ENOENT);
        }
        let entries = [
            (1, FileType::Directory, "."),
            (1, FileType::Directory, ".."),
            (2, FileType::RegularFile, "hello.txt"),
        ];
        for (i, entry) in entries.into_iter().enumerate().skip(offset as usize) {
            if reply.add(INodeNo(entry.0), (i + 1) as u64, entry.1, entry.2) {
                break;
            }
        }
        reply.ok();
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let given = listen::adopt_from_environment()?;
    let identity = wire::Identity([0x68_65_6c_6c_6f, 1]); // the same in every instance
    let state = State::open(given.state, identity, &Config::default())?;
    let adopted = Adopt::new(given.device, state.into()).run(&mut Hello, |fd| {
        fuser::Session::from_fd(Hello, fd, fuser::SessionACL::All, fuser::Config::default())
    })?;
    adopted.session.run()?;
    Ok(())
}
