// SPDX-License-Identifier: GPL-2.0
//! A server that changes state, and never twice: each write to one of its files adds 1 to what it counts.
//!
//! Run it with: fuse-restart keep --mountpoint DIR -- counters; then: echo >> DIR/3; cat DIR/3
//!
//! To write again what a dead server may have written would count twice. So every write is entered in the journal:
//! *intent*, with the value before; the change, which is one store; *outcome*; answer; done. Whoever comes after a dead
//! server compares the value with the one before: that decides every intent.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, Session, SessionACL, WriteFlags,
};
use rust_fuse_notify::std::adopt::{Adopt, Recover, ServerError};
use rust_fuse_notify::std::listen;
use rust_fuse_notify::std::message::Replay;
use rust_fuse_notify::std::state::{Config, Intent, Recorded, State, Success};
use rust_fuse_notify::std::wire::{is_resent, Attr, Identity, FUSE_RESTARTABLE};

/// A UUID would do; the same in every instance.
pub const IDENTITY: Identity = Identity([0x636f_756e_7465_7273, 1]);
/// The files `0` to `7`. Their nodeids are constants, so no table of nodes is needed.
const FILES: u64 = 8;
const FIRST: u64 = 2;
/// A value may change behind the kernel's back: it must always ask.
const TTL: Duration = Duration::ZERO;

#[derive(Clone)]
pub struct Counters(pub Arc<State>);

impl Counters {
    /// Where the value of a file lies in the arena.
    fn place(ino: u64) -> Option<usize> {
        let which = ino.checked_sub(FIRST).filter(|which| *which < FILES)?;
        Some(which as usize * 8)
    }

    fn text(&self, place: usize) -> String {
        format!("{}\n", self.0.arena().load(place))
    }

    fn attr(&self, ino: u64) -> Option<FileAttr> {
        let (kind, size) = match (ino, Self::place(ino)) {
            (1, _) => (FileType::Directory, 0),
            (_, Some(place)) => (FileType::RegularFile, self.text(place).len() as u64),
            _ => return None,
        };
        Some(FileAttr {
            ino: INodeNo(ino),
            size,
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: if ino == 1 { 0o755 } else { 0o666 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 512,
            flags: 0,
        })
    }

    /// Adds 1, once for this request. The kernel writes to one file at a time, and waits for the answer.
    fn add_one(&self, unique: u64, ino: u64, place: usize) -> Result<(), ServerError> {
        let before = self.0.arena().load(place);
        let intent = Intent {
            opcode: 16, // FUSE_WRITE
            nodeids: [ino, 0],
            args: [before, 0, 0, 0],
            ..Intent::default()
        };
        let mut slot = self.0.journal().begin(unique, &intent)?;
        self.0.arena().publish(place, before + 1);
        slot.outcome(&Ok(Success::default()))?;
        // Dropping the slot keeps the outcome, until `answered`.
        Ok(())
    }

    fn answered(&self, unique: u64) {
        if let Some(slot) = self.0.journal().resume(unique) {
            slot.done();
        }
    }
}

impl Recover for Counters {
    fn resolve(&mut self, state: &State) -> Result<(), ServerError> {
        for intent in state.journal().unresolved() {
            let place = Self::place(intent.nodeids[0]).ok_or("an intent of another server")?;
            let mut slot = state.journal().resume(intent.id).ok_or("it was there")?;
            if state.arena().load(place) == intent.args[0] {
                slot.cancel();
            } else {
                slot.outcome(&Ok(Success::default()))?;
            }
        }
        Ok(())
    }

    fn replay(&mut self, _state: &State, replay: &Replay) -> Result<Attr, i32> {
        let attr = self.attr(replay.nodeid).ok_or(libc::ESTALE)?;
        let kind = if attr.kind == FileType::Directory {
            libc::S_IFDIR
        } else {
            libc::S_IFREG
        };
        Ok(Attr::new(replay.nodeid, kind | u32::from(attr.perm)))
    }
}

impl Filesystem for Counters {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // An error means that this kernel does not offer it; the server then works without.
        let _ = config.add_capabilities(InitFlags::from_bits_retain(FUSE_RESTARTABLE));
        Ok(())
    }

    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let which = name.to_str().and_then(|name| name.parse::<u64>().ok());
        match which.filter(|which| *which < FILES) {
            Some(which) => match self.attr(FIRST + which) {
                Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
                None => reply.error(Errno::ENOENT),
            },
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino.0) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // The nodeid says all, so the handle is 0 and there is nothing of it to survive.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
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
        match Self::place(ino.0) {
            Some(place) => {
                let text = self.text(place);
                reply.data(text.as_bytes().get(offset as usize..).unwrap_or_default());
            }
            None => reply.error(Errno::ESTALE),
        }
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let unique = req.unique().0;
        let Some(place) = Self::place(ino.0) else {
            return reply.error(Errno::ESTALE);
        };
        let known = is_resent(unique).then(|| self.0.journal().lookup(unique));
        match known.flatten() {
            Some(Recorded::Outcome(Ok(_))) => {}
            // Nobody knows whether it was executed: not once more.
            Some(Recorded::Outcome(Err(e))) => return reply.error(Errno::from_i32(e)),
            _ => {
                if let Err(e) = self.add_one(unique, ino.0, place) {
                    eprintln!("request {unique:#x}: {e}");
                    return reply.error(Errno::EIO);
                }
            }
        }
        reply.written(data.len() as u32);
        self.answered(unique);
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<fuser::TimeOrNow>,
        _mtime: Option<fuser::TimeOrNow>,
        _ctime: Option<std::time::SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<std::time::SystemTime>,
        _chgtime: Option<std::time::SystemTime>,
        _bkuptime: Option<std::time::SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        // `echo > DIR/3` truncates first, which counts nothing.
        match self.attr(ino.0) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let dots = [".", ".."].map(|name| (1, FileType::Directory, name.to_owned()));
        let files = (0..FILES).map(|n| (FIRST + n, FileType::RegularFile, n.to_string()));
        let all = dots.into_iter().chain(files);
        for (at, (ino, kind, name)) in all.enumerate().skip(offset as usize) {
            if reply.add(INodeNo(ino), at as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let given = listen::adopt_from_environment()?;
    let config = Config {
        arena_pages: 1,
        ..Config::default()
    };
    let state = Arc::new(State::open(given.state, IDENTITY, &config)?);
    state.arena().allocate(0, state.arena().len())?;
    let counters = Counters(state.clone());
    let adopted = Adopt::new(given.device, state).run(&mut counters.clone(), |fd| {
        // Replays and resent requests carry other users' ids.
        Session::from_fd(counters, fd, SessionACL::All, fuser::Config::default())
    })?;
    eprintln!("serving: {:?}", adopted.how);
    adopted.session.run()?;
    Ok(())
}
