// SPDX-License-Identifier: GPL-2.0
//! An instance is killed at every store and around every message of its adoption; the next one must take over.
//!
//! The kernel is played in the parent; the child passes every message on, so what it wrote has its effect although
//! the child may not live to see that.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::signal::{kill, Signal};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    recv, send, setsockopt, socketpair, AddressFamily, MsgFlags, SockFlag, SockType,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::sys::wait::{waitpid, WaitStatus};

use super::fake_kernel::{Inode, Phase};
use super::test_support::{open_state, session, Mount, Server, IDENTITY, SIGNS};
use super::*;
use crate::std::device::fake;
use crate::std::state::crash_tests::spawn;
use crate::std::state::Stage;

/// Where an instance dies.
#[derive(Clone, Copy, Debug)]
enum Kill {
    Never,
    /// Before this store into the memfd.
    Store(i64),
    /// Before this message has reached the kernel.
    Before(usize),
    /// After it has, before the instance knows.
    After(usize),
}

/// The kernel as the child sees it.
struct Proxy(OwnedFd);

impl Proxy {
    fn ask(&mut self, kind: u8, message: &[u8]) -> Result<Vec<u8>, Errno> {
        send(
            self.0.as_raw_fd(),
            &[&[kind], message].concat(),
            MsgFlags::MSG_NOSIGNAL,
        )
        .unwrap();
        let mut answer = vec![0; 4096];
        let len = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty()).unwrap();
        let errno = i32::from_ne_bytes(answer[..4].try_into().unwrap());
        if errno != 0 {
            return Err(Errno::from_raw(errno));
        }
        Ok(answer[4..len].to_vec())
    }
}

impl fake::Kernel for Proxy {
    fn write(&mut self, message: &[u8]) -> Result<(), Errno> {
        self.ask(b'w', message).map(drop)
    }

    fn read(&mut self) -> Result<Vec<u8>, Errno> {
        self.ask(b'r', &[])
    }
}

/// One instance; `true` if it took the connection over.
fn life(mount: &Mount, how: Kill) -> bool {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    let stores = if let Kill::Store(stores) = how {
        stores
    } else {
        -1
    };
    let child = spawn(stores, || {
        let adopt = Adopt::new(mount.device.try_clone().unwrap(), open_state(&mount.memfd));
        let proxy = Box::new(Proxy(theirs.try_clone().unwrap()));
        fake::with(proxy, || adopt.run(&mut Server::default(), session(SIGNS))).unwrap();
    });
    drop(theirs);
    let mut buffer = [0; 8192];
    setsockopt(&ours, ReceiveTimeout, &TimeVal::seconds(60)).unwrap();
    for nth in 0.. {
        let len = match recv(ours.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Err(Errno::EAGAIN) => {
                kill(child, Signal::SIGKILL).unwrap();
                panic!("{how:?}: the instance hangs");
            }
            other => other.unwrap_or(0),
        };
        if len == 0 {
            break;
        }
        if matches!(how, Kill::Before(at) if at == nth) {
            kill(child, Signal::SIGKILL).unwrap();
            break;
        }
        let mut kernel = mount.kernel.borrow_mut();
        let result = match buffer[0] {
            b'w' => kernel.write(&buffer[1..len]).map(|()| Vec::new()),
            _ => kernel.read(),
        };
        if matches!(how, Kill::After(at) if at == nth) {
            kill(child, Signal::SIGKILL).unwrap();
            break;
        }
        let (errno, message) = match result {
            Ok(message) => (0, message),
            Err(errno) => (errno as i32, Vec::new()),
        };
        // Fails if it killed itself meanwhile.
        let _ = send(
            ours.as_raw_fd(),
            &[&errno.to_ne_bytes()[..], &message].concat(),
            MsgFlags::MSG_NOSIGNAL,
        );
    }
    match waitpid(child, None).unwrap() {
        WaitStatus::Exited(_, 0) => true,
        WaitStatus::Signaled(_, Signal::SIGKILL, _) => false,
        other => panic!("{how:?}: the instance ended with {other:?}"),
    }
}

/// Tries every place of one kind until the instance outlives it.
fn at_every(place: fn(usize) -> Kill, mut test: impl FnMut(Kill) -> bool) {
    for nth in 0..10_000 {
        if test(place(nth)) {
            assert!(nth > 2, "only {nth} places were tried");
            return;
        }
    }
    panic!("it never came to its end");
}

const PLACES: [fn(usize) -> Kill; 3] = [|nth| Kill::Store(nth as i64), Kill::Before, Kill::After];

#[test]
fn killed_in_its_first_start() {
    for place in PLACES {
        at_every(place, |how| {
            let mount = Mount::new(crate::std::wire::FUSE_RESTARTABLE);
            let ended = life(&mount, how);
            if mount.kernel.borrow().init.is_some() {
                // On a kernel that says nothing of it itself the keeper would throw a mount away that serves.
                let stage = State::peek(mount.memfd.as_fd()).unwrap();
                assert_eq!(stage, Stage::Serving, "{how:?}");
            }
            assert!(life(&mount, Kill::Never), "{how:?}: nobody could take over");
            let log = mount.log();
            assert_eq!(
                log.iter().filter(|entry| *entry == "init").count(),
                1,
                "{how:?}: {log:?}"
            );
            assert_eq!(
                mount.kernel.borrow().init.unwrap().identity,
                IDENTITY.0,
                "{how:?}"
            );
            assert_eq!(
                State::peek(mount.memfd.as_fd()).unwrap(),
                Stage::Serving,
                "{how:?}"
            );
            ended
        });
    }
}

#[test]
fn killed_in_a_recovery() {
    for place in PLACES {
        at_every(place, |how| {
            let mount = Mount::served(&[10, 20]);
            let unknown = Inode {
                nodeid: 99 << 32 | 50,
                ..mount.kernel.borrow().inodes[1]
            };
            mount.kernel.borrow_mut().inodes.push(unknown);
            // The kernel forgot this one, and the FORGET was lost with a server.
            let state = open_state(&mount.memfd);
            let forgotten = state
                .nodes()
                .lookup(&super::test_support::file(30))
                .unwrap()
                .nodeid;
            drop(state);
            let ended = life(&mount, how);
            assert!(life(&mount, Kill::Never), "{how:?}: nobody could take over");
            let kernel = mount.kernel.borrow();
            assert_eq!(kernel.phase, Phase::Serving, "{how:?}");
            assert_eq!(
                (kernel.confirmed.len(), &kernel.revoked),
                (3, &vec![unknown.nodeid]),
                "{how:?}"
            );
            let state = open_state(&mount.memfd);
            for inode in &kernel.inodes[1..3] {
                assert_eq!(
                    state.nodes().get(inode.nodeid).unwrap().lookups,
                    inode.nlookup,
                    "{how:?}"
                );
            }
            assert_eq!(state.nodes().get(forgotten), None, "{how:?}");
            ended
        });
    }
}
