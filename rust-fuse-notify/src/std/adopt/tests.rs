// SPDX-License-Identifier: GPL-2.0
//! Adoption from the first INIT to COMMIT, against a kernel that is played, with everything that can go wrong.

use std::cell::RefCell;
use std::os::fd::AsRawFd;
use std::rc::Rc;

use zerocopy::IntoBytes;

use super::fake_kernel::{Inode, Kernel, Phase, Shared, INIT_ID};
use super::test_support::*;
use super::*;
use crate::std::device::fake;
use crate::std::state::Intent;
use crate::std::wire::*;

#[test]
fn first_start_signs_with_the_identity() {
    let mount = Mount::new(FUSE_RESTARTABLE);
    let mut server = Server::default();
    let adopted = mount.adopt(&mut server, SIGNS).unwrap();
    assert_eq!(adopted.how, How::First(Support::Granted));
    assert!(mount.is_under(&adopted.session));
    let cloexec = nix::fcntl::fcntl(&adopted.session, nix::fcntl::FcntlArg::F_GETFD);
    assert_eq!(cloexec, Ok(libc::FD_CLOEXEC));
    assert_eq!(mount.kernel.borrow().init.unwrap().identity, IDENTITY.0);
    assert!(server.calls.is_empty());
    assert_eq!(
        State::peek(mount.memfd.as_fd()).unwrap(),
        crate::std::state::Stage::Serving
    );
}

#[test]
fn first_start_without_the_flag_or_the_kernel() {
    let mount = Mount::new(FUSE_RESTARTABLE);
    let plain = Answer {
        flags: FUSE_INIT_EXT,
        ..SIGNS
    };
    assert_eq!(
        mount.adopt(&mut Server::default(), plain).unwrap().how,
        How::First(Support::NotGranted)
    );
    assert_eq!(mount.kernel.borrow().init.unwrap().identity, [0, 0]);
    let mount = Mount::new(0);
    assert_eq!(
        mount.adopt(&mut Server::default(), SIGNS).unwrap().how,
        How::First(Support::OldKernel)
    );
    assert_eq!(
        mount.kernel.borrow().init.unwrap().identity,
        [0, 0],
        "an old kernel may check its unused fields"
    );
    let mount = Mount::new(FUSE_RESTARTABLE);
    let passthrough = Answer {
        flags: SIGNS.flags | 1 << 37,
        ..SIGNS
    };
    assert_eq!(
        mount
            .adopt(&mut Server::default(), passthrough)
            .unwrap()
            .how,
        How::First(Support::NotGranted)
    );
}

#[test]
fn a_recovery_from_restarted_to_commit() {
    let mount = Mount::served(&[10, 20, 30]);
    let unknown = Inode {
        nodeid: 99 << 32 | 50,
        generation: 5,
        nlookup: 1,
        ino: 50,
        kind: libc::S_IFREG,
    };
    let reborn = Inode {
        generation: 6,
        ..mount.kernel.borrow().inodes[3]
    };
    mount.kernel.borrow_mut().inodes[3] = reborn;
    mount.kernel.borrow_mut().inodes.push(unknown);
    mount.kernel.borrow_mut().lowest_owed = 1234;
    drop(
        open_state(&mount.memfd)
            .journal()
            .begin(77, &Intent::default())
            .unwrap(),
    );
    let mut server = Server::default();
    let adopted = mount.adopt(&mut server, SIGNS).unwrap();
    let How::Recovered { report, .. } = adopted.how else {
        panic!("{:?}", adopted.how)
    };
    assert_eq!(
        (report.replayed, report.confirmed, report.revoked),
        (5, 3, 2)
    );
    assert_eq!((report.epoch, report.lowest_owed), (1, Some(1234)));
    assert!(mount.is_under(&adopted.session));
    let log = mount.log();
    assert_eq!(log.first().unwrap(), "restarted 1");
    assert_eq!(log.last().unwrap(), "commit 1");
    assert_eq!(server.calls[0], "resolve");
    assert_eq!(server.calls[1], "replay 0x1");
    assert_eq!(server.calls.last().unwrap(), "finish true");
    // The table is the replayed set, with the kernel's counts.
    let state = open_state(&mount.memfd);
    let kernel = mount.kernel.borrow();
    assert_eq!(
        state.nodes().get(kernel.inodes[1].nodeid).unwrap().lookups,
        7
    );
    assert_eq!(state.nodes().get(reborn.nodeid), None);
    assert_eq!(state.nodes().len(), 2);
}

#[test]
fn many_recoveries() {
    let mount = Mount::served(&[10]);
    for epoch in 1..=300 {
        let How::Recovered { report, .. } = mount.adopt(&mut Server::default(), SIGNS).unwrap().how
        else {
            panic!()
        };
        assert_eq!((report.epoch, report.confirmed), (epoch, 2));
    }
}

#[test]
fn the_wrong_server_is_refused_and_the_right_one_still_takes_over() {
    let mount = Mount::served(&[10]);
    // The kernel knows another identity than state and server.
    mount.kernel.borrow_mut().init.as_mut().unwrap().identity = [8, 8];
    let mut wrong = Server::default();
    assert!(matches!(
        mount.adopt(&mut wrong, SIGNS),
        Err(AdoptError::WrongIdentity { .. })
    ));
    assert!(mount.log().is_empty() && wrong.calls.is_empty());
    mount.kernel.borrow_mut().init.as_mut().unwrap().identity = IDENTITY.0;
    // Its root is another.
    let mut wrong = Server {
        root_error: Some(libc::ESTALE),
        ..Server::default()
    };
    let error = mount.adopt(&mut wrong, SIGNS).unwrap_err();
    assert!(matches!(error, AdoptError::RootRefused { .. }));
    assert!(
        error
            .to_string()
            .contains("right server can still take over"),
        "{error}"
    );
    assert!(!wrong.calls.contains(&"finish true".to_owned()));
    assert_eq!(mount.kernel.borrow().phase, Phase::Refused);
    // The kernel has something against the root.
    mount.kernel.borrow_mut().inodes[0].ino = 2;
    assert!(matches!(
        mount.adopt(&mut Server::default(), SIGNS),
        Err(AdoptError::RootRefused { .. })
    ));
    mount.kernel.borrow_mut().inodes[0].ino = 1;
    let adopted = mount.adopt(&mut Server::default(), SIGNS).unwrap();
    assert!(
        matches!(adopted.how, How::Recovered { report, .. } if report.confirmed == 2 && report.revoked == 0)
    );
}

#[test]
fn a_server_that_would_answer_init_otherwise_is_refused() {
    let others = [
        (
            Answer {
                flags: SIGNS.flags | 1 << 16,
                ..SIGNS
            },
            "the set of flags",
        ),
        (
            Answer {
                max_write: 4096,
                ..SIGNS
            },
            "max_write",
        ),
        (Answer { minor: 39, ..SIGNS }, "the version of the protocol"),
    ];
    let mount = Mount::served(&[10]);
    for (answer, part) in others {
        match mount.adopt(&mut Server::default(), answer) {
            Err(AdoptError::InitDiffers { what, .. }) => assert_eq!(what, part),
            other => panic!("{other:?}"),
        }
        assert!(!mount.log().iter().any(|entry| entry.starts_with("commit")));
    }
    let larger = Answer {
        max_write: 1 << 20,
        ..SIGNS
    };
    assert!(mount.adopt(&mut Server::default(), larger).is_ok());
}

#[test]
fn a_session_that_does_not_answer_is_refused() {
    let mount = Mount::new(FUSE_RESTARTABLE);
    let result = mount.adopt_with(&mut Server::default(), |_| Err(io::Error::other("no")));
    assert!(matches!(result, Err(AdoptError::Session(_))));
    let result = mount.adopt_with(&mut Server::default(), Ok);
    assert!(matches!(result, Err(AdoptError::NoReply(_))));
    let result = mount.adopt_with(&mut Server::default(), |_| {
        Ok(std::fs::File::open("/dev/null")?.into())
    });
    assert!(matches!(result, Err(AdoptError::OtherDescriptor)));
    let result = mount.adopt_with(&mut Server::default(), |fd| {
        let header = OutHeader {
            len: 16,
            error: -libc::EPROTO,
            unique: INIT_ID,
        };
        nix::unistd::write(&fd, header.as_bytes())?;
        Ok(fd)
    });
    assert!(matches!(result, Err(AdoptError::NoReply(_))));
    // A session that reads twice finds the end, it does not hang.
    let result = mount.adopt_with(&mut Server::default(), |fd| {
        let mut buffer = [0; 8192];
        nix::unistd::read(&fd, &mut buffer)?;
        assert_eq!(nix::unistd::read(&fd, &mut buffer), Ok(0));
        Ok(fd)
    });
    assert!(matches!(result, Err(AdoptError::NoReply(_))));
    assert!(mount.log().is_empty(), "something reached the kernel");
    // INIT was read five times ago, and is still there.
    assert_eq!(
        mount.adopt(&mut Server::default(), SIGNS).unwrap().how,
        How::First(Support::Granted)
    );
}

#[test]
fn killed_around_the_write_of_the_reply() {
    // After the reply was kept, before it was written.
    let mount = Mount::new(FUSE_RESTARTABLE);
    keep_reply(&mount);
    assert_eq!(
        mount.adopt(&mut Server::default(), SIGNS).unwrap().how,
        How::First(Support::Granted)
    );
    assert_eq!(mount.log(), ["init"]);
    // After it was written, before that was noted.
    let mount = Mount::new(FUSE_RESTARTABLE);
    let reply = keep_reply(&mount);
    mount.kernel.borrow_mut().write(&reply).unwrap();
    let adopted = mount.adopt(&mut Server::default(), SIGNS).unwrap();
    assert!(
        matches!(adopted.how, How::Recovered { .. }),
        "{:?}",
        adopted.how
    );
    // The keeper made a fresh mount and kept the memfd.
    let mut mount = Mount::new(FUSE_RESTARTABLE);
    keep_reply(&mount);
    let kernel = Kernel::new(FUSE_RESTARTABLE);
    (mount.device, mount.far) = super::fake_kernel::mount(&kernel);
    mount.kernel = Rc::new(RefCell::new(kernel));
    mount.kernel.borrow_mut().awaits_init = false;
    let result = mount.adopt_with(&mut Server::default(), |fd| {
        // From here on INIT is read.
        mount.kernel.borrow_mut().awaits_init = true;
        session(SIGNS)(fd)
    });
    assert_eq!(result.unwrap().how, How::First(Support::Granted));
}

/// What an instance leaves that is killed right before it writes its reply.
fn keep_reply(mount: &Mount) -> Vec<u8> {
    let state = open_state(&mount.memfd);
    let request = state.init().read_request(mount.device.as_fd()).unwrap();
    let (_, mut reply) = handshake::play(&request, session(SIGNS)).unwrap();
    handshake::put_identity(&mut reply, IDENTITY);
    assert!(state.init().set_reply(&reply));
    reply
}

#[test]
fn a_state_that_does_not_belong_to_the_mount() {
    // Served before, memfd lost: reading would steal a request.
    let mut mount = Mount::served(&[]);
    mount.memfd = State::create_memfd().unwrap();
    let request = [0; 40];
    nix::sys::socket::send(
        mount.far.as_raw_fd(),
        &request,
        nix::sys::socket::MsgFlags::empty(),
    )
    .unwrap();
    assert!(matches!(
        mount.adopt(&mut Server::default(), SIGNS),
        Err(AdoptError::StateLost)
    ));
    // Served before, mounted afresh with the old memfd.
    let mut mount = Mount::served(&[]);
    let kernel = Kernel::new(FUSE_RESTARTABLE);
    (mount.device, mount.far) = super::fake_kernel::mount(&kernel);
    mount.kernel = Rc::new(RefCell::new(kernel));
    assert!(matches!(
        mount.adopt(&mut Server::default(), SIGNS),
        Err(AdoptError::StateOfEarlierMount)
    ));
    // Nobody waits for an answer to INIT.
    let mount = Mount::new(FUSE_RESTARTABLE);
    mount.kernel.borrow_mut().awaits_init = false;
    assert!(matches!(
        mount.adopt(&mut Server::default(), SIGNS),
        Err(AdoptError::InitLost)
    ));
}

#[test]
fn a_device_without_a_mount() {
    let Ok(device) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
    else {
        return eprintln!("SKIPPED: /dev/fuse cannot be opened");
    };
    let adopt = Adopt::new(device.into(), open_state(&State::create_memfd().unwrap()));
    assert!(matches!(
        adopt.run(&mut Server::default(), session(SIGNS)),
        Err(AdoptError::NotMounted)
    ));
}

#[test]
fn what_is_no_init_is_refused() {
    for message in [&b"short"[..], &[0; 40], &[0xff; 104]] {
        let mount = Mount::new(FUSE_RESTARTABLE);
        let mut drain = [0; 8192];
        nix::unistd::read(&mount.device, &mut drain).unwrap();
        nix::sys::socket::send(
            mount.far.as_raw_fd(),
            message,
            nix::sys::socket::MsgFlags::empty(),
        )
        .unwrap();
        assert!(matches!(
            mount.adopt(&mut Server::default(), SIGNS),
            Err(AdoptError::NotInit(_))
        ));
    }
    let mut version_8 = Kernel::new(0).init_request();
    version_8[40] = 8;
    assert!(matches!(
        handshake::check_request(&version_8),
        Err(AdoptError::NotInit(_))
    ));
}

#[test]
fn kernels_without_the_series() {
    let old = Answer {
        flags: FUSE_INIT_EXT,
        ..SIGNS
    };
    let mount = Mount::new(0);
    mount.adopt(&mut Server::default(), old).unwrap();
    let mut server = Server::default();
    assert_eq!(mount.adopt(&mut server, old).unwrap().how, How::Resent);
    assert_eq!(server.calls, ["resolve", "finish false"]);
    assert_eq!(mount.log(), ["init", "resend"]);
    mount.kernel.borrow_mut().resends = false;
    assert_eq!(
        mount.adopt(&mut Server::default(), old).unwrap().how,
        How::Nothing
    );
    // Signed, but not granted.
    let mount = Mount::new(FUSE_RESTARTABLE);
    let passthrough = Answer {
        flags: SIGNS.flags | 1 << 37,
        ..SIGNS
    };
    mount.adopt(&mut Server::default(), passthrough).unwrap();
    assert_eq!(
        mount
            .adopt(&mut Server::default(), passthrough)
            .unwrap()
            .how,
        How::Resent
    );
}

#[test]
fn the_server_own_errors_end_the_adoption_and_the_next_one_goes_on() {
    let mount = Mount::served(&[10]);
    let mut server = Server {
        fail_resolve: true,
        ..Server::default()
    };
    assert!(matches!(
        mount.adopt(&mut server, SIGNS),
        Err(AdoptError::Resolve(_))
    ));
    assert_eq!(
        server.calls,
        ["resolve"],
        "a replay was answered before everything was resolved"
    );
    let mut server = Server {
        fail_finish: true,
        ..Server::default()
    };
    assert!(matches!(
        mount.adopt(&mut server, SIGNS),
        Err(AdoptError::Finish(_))
    ));
    assert!(!mount.log().iter().any(|entry| entry.starts_with("commit")));
    let How::Recovered { report, .. } = mount.adopt(&mut Server::default(), SIGNS).unwrap().how
    else {
        panic!()
    };
    assert_eq!((report.epoch, report.confirmed), (3, 2));
}

#[test]
fn messages_that_have_no_place_in_a_recovery() {
    type Check = fn(&AdoptError) -> bool;
    let mount = Mount::served(&[10]);
    let not_root = mount.kernel.borrow().replay_message(1);
    let other_report = mount.kernel.borrow().report_message(COOKIE_BIT | 1);
    let mut lookup = mount.kernel.borrow().replay_message(0);
    lookup[4] = 1;
    let mut lies = mount.kernel.borrow().replay_message(0);
    lies[0] = 255;
    let cases: [(Result<Vec<u8>, Errno>, Check); 8] = [
        (Ok(not_root), |error| {
            matches!(
                error,
                AdoptError::Unexpected {
                    expected: "the root",
                    ..
                }
            )
        }),
        (Ok(other_report), |error| {
            matches!(error, AdoptError::Superseded)
        }),
        (Ok(lookup), |error| {
            matches!(error, AdoptError::Unexpected { opcode: 1, .. })
        }),
        (Ok(lies), |error| matches!(error, AdoptError::Message(_))),
        (Ok(vec![]), |error| matches!(error, AdoptError::Message(_))),
        (Err(Errno::ENODEV), |error| {
            matches!(error, AdoptError::Gone)
        }),
        (Err(Errno::ESTALE), |error| {
            matches!(error, AdoptError::RootRefused { .. })
        }),
        (Err(Errno::EIO), |error| {
            matches!(
                error,
                AdoptError::Device {
                    errno: Errno::EIO,
                    ..
                }
            )
        }),
    ];
    for (message, is_right) in cases {
        mount.kernel.borrow_mut().inject.push_back(message.clone());
        let mut server = Server::default();
        let error = mount.adopt(&mut server, SIGNS).unwrap_err();
        assert!(is_right(&error), "{message:?}: {error:?}");
        assert!(
            !server.calls.contains(&"finish true".to_owned()),
            "{message:?} was taken for the end"
        );
        assert!(!mount.log().iter().any(|entry| entry.starts_with("commit")));
        assert!(
            mount.adopt(&mut Server::default(), SIGNS).is_ok(),
            "the next one cannot take over"
        );
        mount.log();
    }
}

#[test]
fn another_restarted_in_between_is_noticed() {
    struct Racing<'a>(Server, &'a Mount);
    impl Recover for Racing<'_> {
        fn resolve(&mut self, state: &State) -> Result<(), ServerError> {
            self.0.resolve(state)
        }
        fn replay(&mut self, state: &State, replay: &Replay) -> Result<Attr, i32> {
            self.0.replay(state, replay)
        }
        fn finish(&mut self, _: &State, _: Option<&Report>) -> Result<(), ServerError> {
            // Too late to be seen in the report: only COMMIT tells.
            let mut kernel = self.1.kernel.borrow_mut();
            kernel.epoch += 1;
            kernel.phase = Phase::Replay;
            Ok(())
        }
    }
    let mount = Mount::served(&[10]);
    let adopt = Adopt::new(mount.device.try_clone().unwrap(), open_state(&mount.memfd));
    let mut server = Racing(Server::default(), &mount);
    let kernel = Box::new(Shared(mount.kernel.clone()));
    let result = fake::with(kernel, || adopt.run(&mut server, session(SIGNS)));
    assert!(matches!(result, Err(AdoptError::Superseded)));
}

#[test]
fn an_instance_that_could_not_look_does_not_cost_the_application_its_file() {
    for (errno, is_answer) in [
        (libc::ENOMEM, false),
        (libc::EMFILE, false),
        (libc::ENFILE, false),
        (libc::EINTR, false),
        (libc::EAGAIN, false),
        (libc::ESTALE, true),
        (libc::EIO, true),
    ] {
        let mount = Mount::served(&[10]);
        mount.log();
        let mut server = Server {
            error: Some(errno),
            ..Server::default()
        };
        let result = mount.adopt(&mut server, SIGNS).map(|adopted| adopted.how);
        let committed = mount.log().iter().any(|e| e.starts_with("commit"));
        assert_eq!(committed, is_answer, "{errno}: {result:?}");
        match result {
            Ok(How::Recovered { report, .. }) if is_answer => {
                assert_eq!((report.confirmed, report.revoked), (1, 1), "{errno}");
                continue;
            }
            Err(AdoptError::NothingLearned {
                nodeid,
                errno: said,
            }) => {
                assert!(nodeid != 1 && said as i32 == errno, "{errno}: {said}");
            }
            result => panic!("{errno}: {result:?}"),
        }
        let adopted = mount.adopt(&mut Server::default(), SIGNS).unwrap();
        assert!(
            matches!(adopted.how, How::Recovered { report, .. } if (report.confirmed, report.revoked) == (2, 0)),
            "{errno}: {:?}",
            adopted.how
        );
    }
}
