// SPDX-License-Identifier: GPL-2.0
//! The handshake, kept: what the kernel asked in INIT and what it was answered.
//!
//! The request is read from the device straight into the memfd: a server that is killed right after its `read(2)`
//! has not lost what the kernel will never say again.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use super::header::{
    ANSWERED_AT, REPLY_AT, REPLY_LEN_AT, REPLY_MAX, REQUEST_AT, REQUEST_LEN_AT, REQUEST_MAX,
};
use super::region::Region;
use super::StateError;
use crate::std::wire::{InHeader, FUSE_INIT};

/// The kernel's INIT and the answer to it, with their headers.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) request: Vec<u8>,
    pub(crate) reply: Vec<u8>,
}

/// Both messages, read from a memfd that may be mapped elsewhere: no server changes them once INIT is answered.
pub(super) fn pair_in(fd: BorrowedFd<'_>) -> Result<Pair, StateError> {
    let message = |len: usize, at: usize, max: usize, what| {
        if !(1..=max).contains(&len) {
            return Err(StateError::NoHandshake(what));
        }
        let mut bytes = vec![0; len];
        read_exact_at(fd, &mut bytes, at)?;
        Ok(bytes)
    };
    // The request says its length itself, and the word for it can be missing, see `InitStore::request()`.
    let mut request = InHeader::default();
    read_exact_at(fd, request.as_mut_bytes(), REQUEST_AT)?;
    let mut reply = [0; 8];
    read_exact_at(fd, &mut reply, REPLY_LEN_AT)?;
    let reply = u64::from_ne_bytes(reply) as usize;
    Ok(Pair {
        request: message(
            request.len as usize,
            REQUEST_AT,
            REQUEST_MAX,
            "the length of INIT is wrong",
        )?,
        reply: message(
            reply,
            REPLY_AT,
            REPLY_MAX,
            "the length of the answer to INIT is wrong",
        )?,
    })
}

fn read_exact_at(fd: BorrowedFd<'_>, bytes: &mut [u8], at: usize) -> Result<(), StateError> {
    match nix::sys::uio::pread(fd, bytes, at as i64) {
        Ok(got) if got == bytes.len() => Ok(()),
        Ok(_) => Err(StateError::NoHandshake("the file is too short")),
        Err(errno) => Err(StateError::io("reading")(errno)),
    }
}

/// INIT and its answer.
#[derive(Debug)]
pub(crate) struct InitStore {
    region: Arc<Region>,
}

impl InitStore {
    pub(super) fn new(region: Arc<Region>) -> InitStore {
        InitStore { region }
    }

    /// Reads the first message of a connection; blocks until there is one. The bytes are those of one message, of
    /// whatever kind.
    pub(crate) fn read_request(&self, device: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
        self.reset();
        let got = self.region.read_from(device, REQUEST_AT, REQUEST_MAX)?;
        self.region.publish(REQUEST_LEN_AT, got as u64);
        Ok(self.copy(REQUEST_AT, got))
    }

    /// The INIT that this or an earlier instance read.
    pub(crate) fn request(&self) -> Option<Vec<u8>> {
        let len = self.region.load_published(REQUEST_LEN_AT) as usize;
        if (1..=REQUEST_MAX).contains(&len) {
            return Some(self.copy(REQUEST_AT, len));
        }
        // Killed between the read and the length: the message says its length itself.
        let header = self.copy(REQUEST_AT, size_of::<InHeader>());
        let (header, _) = InHeader::read_from_prefix(&header).ok()?;
        let len = header.len as usize;
        let whole =
            header.opcode == FUSE_INIT && (size_of::<InHeader>()..=REQUEST_MAX).contains(&len);
        whole.then(|| self.copy(REQUEST_AT, len))
    }

    /// Keeps the reply, before the kernel gets it. `false`: it is longer than any reply to INIT.
    pub(crate) fn set_reply(&self, reply: &[u8]) -> bool {
        if reply.is_empty() || reply.len() > REPLY_MAX {
            return false;
        }
        self.region.write(REPLY_AT, reply);
        self.region.publish(REPLY_LEN_AT, reply.len() as u64);
        true
    }

    /// The reply that was kept.
    pub(crate) fn reply(&self) -> Option<Vec<u8>> {
        let len = self.region.load_published(REPLY_LEN_AT) as usize;
        (1..=REPLY_MAX)
            .contains(&len)
            .then(|| self.copy(REPLY_AT, len))
    }

    /// The kernel has the reply.
    pub(crate) fn set_answered(&self) {
        self.region.publish(ANSWERED_AT, 1);
    }

    /// Whether the kernel has the reply for sure.
    pub(crate) fn is_answered(&self) -> bool {
        self.region.load_published(ANSWERED_AT) != 0
    }

    /// Forgets a handshake that never got its answer.
    fn reset(&self) {
        self.region.publish(REPLY_LEN_AT, 0);
        self.region.publish(REQUEST_LEN_AT, 0);
        self.region.write(REQUEST_AT, &[0; size_of::<InHeader>()]);
    }

    fn copy(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.region.read(offset, &mut bytes);
        bytes
    }
}
