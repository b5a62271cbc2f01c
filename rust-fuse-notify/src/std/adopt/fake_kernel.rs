// SPDX-License-Identifier: GPL-2.0
//! A kernel for tests: the server's side of the protocol as DESIGN fixes it, errors included.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::sys::socket::{send, socketpair, AddressFamily, MsgFlags, SockFlag, SockType};
use zerocopy::{FromBytes, IntoBytes};

use crate::std::device::fake;
use crate::std::wire::*;

/// What the kernel caches of an inode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inode {
    pub(crate) nodeid: u64,
    pub(crate) generation: u32,
    pub(crate) nlookup: u64,
    pub(crate) ino: u64,
    pub(crate) kind: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Serving,
    Replay,
    Refused,
    Prepared,
}

/// Everything that a test may look at or change.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// INIT flags that it offers; without RESTARTABLE it is an old kernel.
    pub(crate) offers: u64,
    /// Whether it knows RESEND.
    pub(crate) resends: bool,
    pub(crate) init: Option<InitOut>,
    /// Whether INIT was read (or is to be) and its answer is awaited.
    pub(crate) awaits_init: bool,
    pub(crate) epoch: u32,
    pub(crate) phase: Phase,
    cookie: u64,
    pub(crate) inodes: Vec<Inode>,
    shown: usize,
    pub(crate) lowest_owed: u64,
    pub(crate) confirmed: Vec<u64>,
    pub(crate) revoked: Vec<u64>,
    /// What goes to the server before anything else.
    pub(crate) inject: VecDeque<Result<Vec<u8>, Errno>>,
    /// What the server wrote, in words.
    pub(crate) log: Vec<String>,
}

pub(crate) const INIT_ID: u64 = 2;

impl Kernel {
    pub(crate) fn new(offers: u64) -> Kernel {
        let root = Inode {
            nodeid: 1,
            generation: 0,
            nlookup: 1,
            ino: 1,
            kind: libc::S_IFDIR,
        };
        Kernel {
            offers: offers | FUSE_INIT_EXT,
            resends: true,
            init: None,
            awaits_init: true,
            epoch: 0,
            phase: Phase::Serving,
            cookie: 0,
            inodes: vec![root],
            shown: 0,
            lowest_owed: 0,
            confirmed: Vec::new(),
            revoked: Vec::new(),
            inject: VecDeque::new(),
            log: Vec::new(),
        }
    }

    fn is_patched(&self) -> bool {
        self.offers & FUSE_RESTARTABLE != 0
    }

    fn granted(&self) -> bool {
        const EXCLUDED: u64 = 1 << 37 | 1 << 41;
        let flags = self.init.map_or(0, |init| init.all_flags());
        flags & FUSE_RESTARTABLE != 0 && flags & EXCLUDED == 0
    }

    /// The message that a mount leaves in the queue.
    pub(crate) fn init_request(&self) -> Vec<u8> {
        let body = InitIn {
            major: 7,
            minor: 48,
            max_readahead: 131_072,
            flags: self.offers as u32,
        };
        let mut rest = [0_u32; 12];
        rest[0] = (self.offers >> 32) as u32;
        let mut message = [body.as_bytes(), rest.as_bytes()].concat();
        let header = InHeader {
            len: 40 + message.len() as u32,
            opcode: FUSE_INIT,
            unique: INIT_ID,
            ..InHeader::default()
        };
        message.splice(0..0, header.as_bytes().iter().copied());
        message
    }

    pub(crate) fn write(&mut self, message: &[u8]) -> Result<(), Errno> {
        let (header, body) = OutHeader::read_from_prefix(message).map_err(|_| Errno::EINVAL)?;
        if header.len as usize != message.len() {
            return Err(Errno::EINVAL);
        }
        if header.unique == 0 {
            return self.notification(header.error, body);
        }
        if header.unique == INIT_ID {
            if !std::mem::take(&mut self.awaits_init) {
                return Err(Errno::ENOENT);
            }
            self.log.push("init".into());
            self.init = Some(InitOut::read_from_bytes(body).map_err(|_| Errno::EINVAL)?);
            return Ok(());
        }
        self.replay_answered(&header, body)
    }

    fn notification(&mut self, code: i32, body: &[u8]) -> Result<(), Errno> {
        let Some(init) = self.init else {
            return Err(Errno::EINVAL);
        };
        match code {
            FUSE_NOTIFY_POLL => Ok(()),
            FUSE_NOTIFY_RESEND if self.phase != Phase::Serving => Err(Errno::EBUSY),
            FUSE_NOTIFY_RESEND if self.resends => {
                self.log.push("resend".into());
                Ok(())
            }
            FUSE_NOTIFY_RESTARTED if self.is_patched() => {
                let out = RestartedOut::read_from_bytes(body).map_err(|_| Errno::EINVAL)?;
                if !self.granted() {
                    return Err(Errno::EOPNOTSUPP);
                }
                if out.cookie & COOKIE_BIT == 0 || out.flags & !FUSE_RESTARTED_COMMIT != 0 {
                    return Err(Errno::EINVAL);
                }
                if out.identity != [0, 0] && out.identity != init.identity {
                    return Err(Errno::ESTALE);
                }
                self.restarted(&out)
            }
            _ => Err(Errno::EINVAL),
        }
    }

    fn restarted(&mut self, out: &RestartedOut) -> Result<(), Errno> {
        if out.flags == FUSE_RESTARTED_COMMIT {
            if self.phase != Phase::Prepared || out.epoch != self.epoch {
                return Err(Errno::ESTALE);
            }
            self.phase = Phase::Serving;
            self.log.push(format!("commit {}", out.epoch));
            return Ok(());
        }
        self.epoch += 1;
        self.phase = Phase::Replay;
        self.cookie = out.cookie;
        self.shown = 0;
        self.confirmed.clear();
        self.revoked.clear();
        self.log.push(format!("restarted {}", self.epoch));
        Ok(())
    }

    fn replay_id(&self, which: usize) -> u64 {
        FUSE_UNIQUE_RESEND | (u64::from(self.epoch) & 0xff) << 48 | (100 + which as u64)
    }

    fn replay_answered(&mut self, header: &OutHeader, body: &[u8]) -> Result<(), Errno> {
        let which = self.shown.wrapping_sub(1);
        if self.phase != Phase::Replay || self.shown == 0 || header.unique != self.replay_id(which)
        {
            return Err(Errno::ENOENT);
        }
        let inode = self.inodes[which];
        let attr = AttrOut::read_from_bytes(body).map(|out| out.attr);
        let good = |attr: Attr| attr.ino == inode.ino && attr.mode & libc::S_IFMT == inode.kind;
        if header.error == 0 && attr.is_ok_and(good) {
            self.confirmed.push(inode.nodeid);
        } else if inode.nodeid == FUSE_ROOT_ID {
            self.phase = Phase::Refused;
        } else {
            self.revoked.push(inode.nodeid);
        }
        self.log
            .push(format!("replay {:#x} {}", inode.nodeid, header.error));
        Ok(())
    }

    pub(crate) fn replay_message(&self, which: usize) -> Vec<u8> {
        let inode = self.inodes[which];
        let body = GetattrIn {
            getattr_flags: FUSE_GETATTR_REPLAY,
            dummy: inode.generation,
            fh: inode.nlookup,
        };
        let header = InHeader {
            len: 56,
            opcode: FUSE_GETATTR,
            unique: self.replay_id(which),
            nodeid: inode.nodeid,
            ..InHeader::default()
        };
        [header.as_bytes(), body.as_bytes()].concat()
    }

    pub(crate) fn report_message(&self, cookie: u64) -> Vec<u8> {
        let (confirmed, revoked) = (self.confirmed.len() as u64, self.revoked.len() as u64);
        let body = RestartedIn {
            epoch: self.epoch,
            replayed: confirmed + revoked,
            confirmed,
            revoked,
            lowest_owed: self.lowest_owed,
            ..RestartedIn::default()
        };
        let header = InHeader {
            len: 136,
            opcode: FUSE_NOTIFY_REPLY,
            unique: cookie,
            ..InHeader::default()
        };
        [header.as_bytes(), body.as_bytes()].concat()
    }

    pub(crate) fn read(&mut self) -> Result<Vec<u8>, Errno> {
        if let Some(message) = self.inject.pop_front() {
            return message;
        }
        match self.phase {
            Phase::Refused => Err(Errno::ESTALE),
            Phase::Replay if self.shown < self.inodes.len() => {
                self.shown += 1;
                Ok(self.replay_message(self.shown - 1))
            }
            Phase::Replay => {
                self.phase = Phase::Prepared;
                Ok(self.report_message(self.cookie))
            }
            // Here the real one would block for ever.
            _ => panic!("nothing to read in {:?}, after {:?}", self.phase, self.log),
        }
    }
}

/// The same kernel, shared between the test and the descriptor.
#[derive(Clone)]
pub(crate) struct Shared(pub(crate) Rc<RefCell<Kernel>>);

impl fake::Kernel for Shared {
    fn write(&mut self, message: &[u8]) -> Result<(), Errno> {
        self.0.borrow_mut().write(message)
    }

    fn read(&mut self) -> Result<Vec<u8>, Errno> {
        self.0.borrow_mut().read()
    }
}

/// A descriptor with INIT in its queue; the second one keeps it open.
pub(crate) fn mount(kernel: &Kernel) -> (OwnedFd, OwnedFd) {
    let (device, far) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    send(far.as_raw_fd(), &kernel.init_request(), MsgFlags::empty()).unwrap();
    (device, far)
}
