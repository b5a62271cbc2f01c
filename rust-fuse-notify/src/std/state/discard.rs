// SPDX-License-Identifier: GPL-2.0
//! Going on without a state that cannot be used.
//!
//! What a dead server had in its hands is owed an answer by somebody; without the state nobody knows whether it was
//! executed. So after [`State::discard`] nothing is guessed: the tables are empty, hence every cached inode but the
//! root is revoked, and each request that a dead server had read is answered with `EIO` ([`super::Journal::lookup`]). Which
//! those are is known from their ids: the replay of the root is a request as well, and ids only grow.
//!
//! Only the handshake is carried over, which the kernel never says again. Without it there is no going on.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use zerocopy::FromBytes;

use super::header::{self, Layout, DISCARDED_BELOW_AT};
use super::region::Region;
use super::{Config, State, StateError};
use crate::std::wire::{original_id, Identity, InitOut, OutHeader, FUSE_RESTARTABLE};

/// Every request that is sent again.
const ALL: u64 = u64::MAX;

impl State {
    /// Makes an empty state in a memfd whose content [`State::open`] refuses; see [`StateError::is_discardable`]. The
    /// handshake stays, so the connection can be recovered: inodes that applications use are revoked (`EIO`), and so
    /// is every request that the dead server had read. A server that is killed in the midst of it leaves something
    /// that the next [`State::open`] finishes.
    ///
    /// # Errors
    /// [`StateError::NoHandshake`] if there is nothing to carry over; [`StateError::WrongIdentity`] if the connection
    /// is that of another file system; what [`State::open`] says of a memfd that is no memfd, or in use. The content
    /// was not changed then.
    pub fn discard(fd: OwnedFd, identity: Identity, config: &Config) -> Result<State, StateError> {
        let size = super::size_of_file(fd.as_fd())?;
        super::lock(fd.as_fd())?;
        let kept = Kept::find(fd.as_fd(), size)?;
        if kept.identity.is_some_and(|found| found != identity) {
            return Err(StateError::WrongIdentity {
                found: kept.identity.unwrap_or(identity),
                ours: identity,
            });
        }
        let layout = Layout::filling(config, size).ok_or(StateError::NoHandshake(
            "its size is none that a state can have",
        ))?;
        super::seal(fd.as_fd())?;
        let region = Region::map(fd, layout.len).map_err(StateError::io("mapping"))?;
        layout
            .write_anew(&region, identity, kept.stamp)
            .map_err(StateError::io("emptying"))?;
        let below = if kept.answered { ALL } else { 0 };
        region.store(DISCARDED_BELOW_AT, below);
        layout.finish(&region);
        State::on(region, layout, identity, !kept.answered)
    }

    /// Requests that were sent again, have a smaller id and are not in the journal are lost: see [`State::discard`].
    /// 0: nothing was discarded.
    pub fn discarded_below(&self) -> u64 {
        self.region.load(DISCARDED_BELOW_AT)
    }

    /// A replay has come: what was owed has smaller ids.
    pub(crate) fn saw_replay(&self, unique: u64) {
        if self.discarded_below() == ALL {
            self.region.publish(DISCARDED_BELOW_AT, original_id(unique));
        }
    }
}

/// What survives a discarded state.
struct Kept {
    /// More than any stamp that was given.
    stamp: u64,
    /// Whether the kernel had its answer to INIT.
    answered: bool,
    /// Of the connection.
    identity: Option<Identity>,
}

impl Kept {
    fn find(fd: BorrowedFd<'_>, size: u64) -> Result<Kept, StateError> {
        let mut page = [0; header::HEADER_LEN + header::REPLY_MAX];
        let got = nix::sys::uio::pread(fd, &mut page, 0)
            .map_err(StateError::io("reading the header of"))?;
        if got < page.len() || size < header::TABLES_AT as u64 {
            return Err(StateError::NoHandshake("it is too short"));
        }
        let word = |at: usize| u64::from_ne_bytes(page[at..at + 8].try_into().unwrap_or_default());
        if ![header::MAGIC, header::DISCARDING].contains(&word(header::MAGIC_AT)) {
            return Err(StateError::NoHandshake("it is not a state at all"));
        }
        let answered = word(header::ANSWERED_AT) != 0;
        let reply = &page[header::REPLY_AT..];
        let len = word(header::REPLY_LEN_AT) as usize;
        let identity = match reply
            .get(..len)
            .map(<[u8]>::split_first_chunk::<{ size_of::<OutHeader>() }>)
        {
            Some(Some((_, body))) if answered => identity_in(body),
            _ if answered => return Err(StateError::NoHandshake("its INIT reply has no end")),
            _ => None,
        };
        // Stamps count new nodes and handles from 1 on. Should that number be lost with the rest, seconds since 1970
        // are more than it comes to in two days of ten thousand a second.
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(1 << 31, |time| time.as_secs());
        Ok(Kept {
            stamp: word(header::STAMP_AT).max(now).wrapping_add(1),
            answered,
            identity,
        })
    }
}

/// The identity that was given to the kernel, if any was.
fn identity_in(body: &[u8]) -> Option<Identity> {
    let (out, _) = InitOut::read_from_prefix(body).ok()?;
    (out.all_flags() & FUSE_RESTARTABLE != 0).then_some(Identity(out.identity))
}
