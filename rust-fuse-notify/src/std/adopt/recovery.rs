// SPDX-License-Identifier: GPL-2.0
//! The replay: what the kernel caches is shown, and each inode is confirmed or not.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use super::error::{device as device_error, AdoptError};
use super::Recover;
use crate::std::device;
use crate::std::message::{attr_reply, error_reply, parse, Message, Replay, Report};
use crate::std::state::State;
use crate::std::wire::{FUSE_MIN_READ_BUFFER, FUSE_ROOT_ID};

/// More than the headers of a WRITE, for which a read buffer must have room even when no WRITE can come.
const HEADERS: usize = 4096;
/// The kernel's own bound of `max_write`, 65535 pages, in bytes.
const MAX_MAX_WRITE: usize = 1 << 28;

/// Answers replays until the report comes.
pub(super) fn replay_all<R: Recover>(
    fd: BorrowedFd<'_>,
    cookie: u64,
    max_write: u32,
    recover: &mut R,
    state: &State,
) -> Result<Report, AdoptError> {
    let room = (max_write as usize).min(MAX_MAX_WRITE) + HEADERS;
    let mut buffer = vec![0; room.max(FUSE_MIN_READ_BUFFER)];
    let mut answered = 0;
    loop {
        let len = match device::read(fd, &mut buffer) {
            Ok(len) => len,
            // What the kernel says once it has refused the root, and to every read after it.
            Err(Errno::ESTALE) => {
                return Err(AdoptError::RootRefused {
                    reason: "the kernel knows it with another type or number".into(),
                })
            }
            Err(errno) => return Err(device_error("reading a replay")(errno)),
        };
        let message = buffer.get(..len).unwrap_or_default();
        match parse(message)? {
            Message::Replay(replay) if answered > 0 || replay.nodeid == FUSE_ROOT_ID => {
                state.saw_replay(replay.unique);
                answer(fd, &replay, recover, state)?;
                answered += 1;
            }
            Message::Replay(replay) => {
                let expected = "the root";
                return Err(AdoptError::Unexpected {
                    opcode: 3,
                    nodeid: replay.nodeid,
                    expected,
                });
            }
            Message::Report(report) if report.cookie == cookie => {
                if report.replayed != answered
                    || report.replayed != report.confirmed + report.revoked
                {
                    tracing::warn!(
                        answered,
                        ?report,
                        "the kernel's report does not add up with what was answered"
                    );
                }
                return Ok(report);
            }
            Message::Report(_) => return Err(AdoptError::Superseded),
            Message::Other { header, .. } => {
                let (opcode, nodeid) = (header.opcode, header.nodeid);
                return Err(AdoptError::Unexpected {
                    opcode,
                    nodeid,
                    expected: "the report",
                });
            }
        }
    }
}

/// Whether this errno is of the instance, and says nothing of the file. As an answer it would cost the application
/// its file for good, which the next instance may well be able to open.
fn says_nothing(errno: i32) -> bool {
    matches!(
        Errno::from_raw(errno),
        Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::EINTR | Errno::EAGAIN
    )
}

fn answer<R: Recover>(
    fd: BorrowedFd<'_>,
    replay: &Replay,
    recover: &mut R,
    state: &State,
) -> Result<(), AdoptError> {
    state.nodes().show(replay.nodeid);
    let verdict = recover.replay(state, replay);
    if let Err(errno) = verdict {
        if says_nothing(errno) {
            let nodeid = replay.nodeid;
            let errno = Errno::from_raw(errno);
            return Err(AdoptError::NothingLearned { nodeid, errno });
        }
    }
    if verdict.is_ok() {
        // Before the answer: what the kernel counts from then on comes on top. A server may have tables of its own.
        state.nodes().confirm(replay.nodeid, replay.nlookup);
    }
    let written = match &verdict {
        Ok(attr) => device::write(fd, &attr_reply(replay.unique, attr)),
        Err(errno) => device::write(fd, &error_reply(replay.unique, *errno)),
    };
    match written {
        Ok(()) => {}
        // Void: the connection ended or somebody said RESTARTED again. The next read says which.
        Err(Errno::ENOENT) => return Ok(()),
        Err(errno) => return Err(device_error("answering a replay")(errno)),
    }
    match verdict {
        Err(errno) if replay.nodeid == FUSE_ROOT_ID => {
            let reason = format!("this server does not know it: {}", Errno::from_raw(errno));
            Err(AdoptError::RootRefused { reason })
        }
        _ => Ok(()),
    }
}
