// SPDX-License-Identifier: GPL-2.0
//! What the tests of adoption share: a server, a session and a mount.

use std::cell::RefCell;
use std::rc::Rc;

use zerocopy::{FromBytes, IntoBytes};

use super::fake_kernel::{mount, Inode, Kernel, Shared, INIT_ID};
use super::*;
use crate::std::device::fake;
use crate::std::state::{Config, FileHandle, Keep, NewNode, NodeFlags};
use crate::std::wire::*;

pub(super) const IDENTITY: Identity = Identity([3, 4]);
const CONFIG: Config = Config {
    nodes: 100,
    handles: 10,
    journal: 4,
    arena_pages: 0,
};

pub(super) fn open_state(fd: &OwnedFd) -> Arc<State> {
    Arc::new(State::open(fd.try_clone().unwrap(), IDENTITY, &CONFIG).unwrap())
}

pub(super) fn file(which: u64) -> NewNode {
    NewNode {
        handle: FileHandle::new(1, &which.to_ne_bytes()).unwrap(),
        domain: 0,
        generation: 5,
        ino: which,
        mode: libc::S_IFREG,
        flags: NodeFlags::NONE,
        aux: [0; 4],
    }
}

/// A server that knows what is in its node table.
#[derive(Default)]
pub(super) struct Server {
    pub(super) root_error: Option<i32>,
    /// What is said of every other inode.
    pub(super) error: Option<i32>,
    pub(super) fail_resolve: bool,
    pub(super) fail_finish: bool,
    pub(super) calls: Vec<String>,
}

impl Recover for Server {
    fn resolve(&mut self, state: &State) -> Result<(), ServerError> {
        self.calls.push("resolve".into());
        for intent in state.journal().unresolved() {
            state.journal().resume(intent.id).unwrap().cancel();
        }
        if self.fail_resolve {
            Err("disk on fire".into())
        } else {
            Ok(())
        }
    }

    fn replay(&mut self, state: &State, replay: &Replay) -> Result<Attr, i32> {
        self.calls.push(format!("replay {:#x}", replay.nodeid));
        if replay.nodeid == FUSE_ROOT_ID {
            return match self.root_error {
                Some(errno) => Err(errno),
                None => Ok(Attr {
                    ino: 1,
                    mode: libc::S_IFDIR,
                    ..Attr::default()
                }),
            };
        }
        if let Some(errno) = self.error {
            return Err(errno);
        }
        let node = state.nodes().replayed(replay)?;
        Ok(Attr {
            ino: node.info.ino,
            mode: node.info.mode,
            ..Attr::default()
        })
    }

    fn finish(&mut self, state: &State, report: Option<&Report>) -> Result<(), ServerError> {
        self.calls.push(format!("finish {}", report.is_some()));
        if let Some(report) = report {
            state.settle(report, |_| Keep::Drop);
        }
        if self.fail_finish {
            Err("disk full".into())
        } else {
            Ok(())
        }
    }
}

/// Answers INIT as fuser does: within the closure, on the descriptor it is given.
#[derive(Clone, Copy)]
pub(super) struct Answer {
    pub(super) flags: u64,
    pub(super) max_write: u32,
    pub(super) minor: u32,
}

pub(super) const SIGNS: Answer = Answer {
    flags: FUSE_INIT_EXT | FUSE_RESTARTABLE,
    max_write: 65536,
    minor: 40,
};

pub(super) fn session(answer: Answer) -> impl FnOnce(OwnedFd) -> io::Result<OwnedFd> {
    move |fd| {
        let mut buffer = [0; 8192];
        let len = nix::unistd::read(&fd, &mut buffer)?;
        let (header, _) = InHeader::read_from_prefix(&buffer[..len]).unwrap();
        assert_eq!(
            (header.opcode, header.unique, header.len as usize),
            (FUSE_INIT, INIT_ID, len)
        );
        let out = InitOut {
            major: 7,
            minor: answer.minor,
            flags: answer.flags as u32,
            flags2: (answer.flags >> 32) as u32,
            max_write: answer.max_write,
            ..InitOut::default()
        };
        let header = OutHeader {
            len: 80,
            error: 0,
            unique: header.unique,
        };
        nix::unistd::write(&fd, &[header.as_bytes(), out.as_bytes()].concat())?;
        Ok(fd)
    }
}

/// One mount: the kernel's side, the memfd and the keeper's descriptor.
pub(super) struct Mount {
    pub(super) kernel: Rc<RefCell<Kernel>>,
    pub(super) device: OwnedFd,
    pub(super) memfd: OwnedFd,
    pub(super) far: OwnedFd,
}

impl Mount {
    pub(super) fn new(offers: u64) -> Mount {
        let kernel = Kernel::new(offers);
        let (device, far) = mount(&kernel);
        Mount {
            kernel: Rc::new(RefCell::new(kernel)),
            device,
            memfd: State::create_memfd().unwrap(),
            far,
        }
    }

    /// One instance, from start to being served.
    pub(super) fn adopt(
        &self,
        server: &mut Server,
        answer: Answer,
    ) -> Result<Adopted<OwnedFd>, AdoptError> {
        self.adopt_with(server, session(answer))
    }

    pub(super) fn adopt_with(
        &self,
        server: &mut Server,
        session: impl FnOnce(OwnedFd) -> io::Result<OwnedFd>,
    ) -> Result<Adopted<OwnedFd>, AdoptError> {
        let adopt = Adopt::new(self.device.try_clone().unwrap(), open_state(&self.memfd));
        fake::with(Box::new(Shared(self.kernel.clone())), || {
            adopt.run(server, session)
        })
    }

    pub(super) fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.kernel.borrow_mut().log)
    }

    /// Has been served, with these files in table and cache.
    pub(super) fn served(files: &[u64]) -> Mount {
        let mount = Mount::new(FUSE_RESTARTABLE);
        mount.adopt(&mut Server::default(), SIGNS).unwrap();
        let state = open_state(&mount.memfd);
        for which in files {
            let nodeid = state.nodes().lookup(&file(*which)).unwrap().nodeid;
            let inode = Inode {
                nodeid,
                generation: 5,
                nlookup: 7,
                ino: *which,
                kind: libc::S_IFREG,
            };
            mount.kernel.borrow_mut().inodes.push(inode);
        }
        mount.log();
        mount
    }

    pub(super) fn is_under(&self, session: &OwnedFd) -> bool {
        let inode = |fd: BorrowedFd<'_>| nix::sys::stat::fstat(fd).unwrap().st_ino;
        inode(session.as_fd()) == inode(self.device.as_fd())
    }
}
