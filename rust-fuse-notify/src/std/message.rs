// SPDX-License-Identifier: GPL-2.0
//! What is read from `/dev/fuse` during a recovery, and the answers to it.
//!
//! The bytes are taken as hostile: whatever they are, parsing ends in a value or in a [`MessageError`].

use zerocopy::{FromBytes, IntoBytes};

use super::wire::{
    Attr, AttrOut, GetattrIn, InHeader, OutHeader, RestartedIn, COOKIE_BIT, FUSE_GETATTR, FUSE_GETATTR_REPLAY,
    FUSE_NOTIFY_REPLY,
};

/// The kernel shows an inode that it caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replay {
    /// Goes into the answer, all 64 bits of it.
    pub unique: u64,
    /// The nodeid that some earlier instance gave.
    pub nodeid: u64,
    /// The generation that came with it, 32 bits.
    pub generation: u32,
    /// How many lookups of it the kernel has not given back.
    pub nlookup: u64,
}

/// The end of the replay: what the kernel kept, what it revoked, what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Cookie of the RESTARTED that is reported on.
    pub cookie: u64,
    /// Goes into COMMIT.
    pub epoch: u32,
    /// Replays answered, the root among them; the sum of the next two.
    pub replayed: u64,
    /// Inodes that stay.
    pub confirmed: u64,
    /// Inodes that fail with `EIO` from COMMIT on.
    pub revoked: u64,
    /// Requests that wait for COMMIT.
    pub held: u64,
    /// Smallest original id that the kernel still owes an answer to; `None` if there is none.
    pub lowest_owed: Option<u64>,
    /// Nanoseconds spent collecting what the dead instance left.
    pub hold_ns: u64,
    /// Nanoseconds until the root was answered.
    pub root_ns: u64,
    /// Nanoseconds until the last inode was answered.
    pub replay_ns: u64,
    /// Nanoseconds spent waiting for requests in transit.
    pub settle_ns: u64,
}

/// A message from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// An inode is shown; answer with [`attr_reply`] or [`error_reply`].
    Replay(Replay),
    /// The last inode was shown; nothing is to be answered.
    Report(Report),
    /// Any other message.
    Other {
        /// Its header.
        header: InHeader,
        /// What follows the header.
        body: &'a [u8],
    },
}

/// A message that the kernel never sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Shorter than its header.
    #[error("a message of {0} bytes is shorter than its header of 40")]
    Short(usize),
    /// The header says another length.
    #[error("a message of {got} bytes says that it has {said}")]
    Length {
        /// Bytes that were read.
        got: usize,
        /// Bytes that the header names.
        said: u32,
    },
    /// A body that does not fit the opcode.
    #[error("the body of opcode {opcode} has {got} bytes instead of {want}")]
    Body {
        /// The opcode.
        opcode: u32,
        /// Bytes after the header.
        got: usize,
        /// Bytes expected.
        want: usize,
    },
}

/// Takes one message, as one `read(2)` returned it, apart.
///
/// # Errors
/// [`MessageError`] if the bytes are no message.
pub fn parse(bytes: &[u8]) -> Result<Message<'_>, MessageError> {
    let (header, body) = InHeader::read_from_prefix(bytes).map_err(|_| MessageError::Short(bytes.len()))?;
    if header.len as usize != bytes.len() {
        return Err(MessageError::Length { got: bytes.len(), said: header.len });
    }
    match header.opcode {
        FUSE_GETATTR => {
            let args: GetattrIn = exactly(&header, body)?;
            if args.getattr_flags & FUSE_GETATTR_REPLAY == 0 {
                return Ok(Message::Other { header, body });
            }
            Ok(Message::Replay(Replay {
                unique: header.unique,
                nodeid: header.nodeid,
                generation: args.dummy,
                nlookup: args.fh,
            }))
        }
        // FUSE_NOTIFY_RETRIEVE is answered under the same opcode, but its id comes from the request counter.
        FUSE_NOTIFY_REPLY if header.unique & COOKIE_BIT != 0 => {
            let said: RestartedIn = exactly(&header, body)?;
            Ok(Message::Report(Report {
                cookie: header.unique,
                epoch: said.epoch,
                replayed: said.replayed,
                confirmed: said.confirmed,
                revoked: said.revoked,
                held: said.held,
                lowest_owed: (said.lowest_owed != 0).then_some(said.lowest_owed),
                hold_ns: said.hold_ns,
                root_ns: said.root_ns,
                replay_ns: said.replay_ns,
                settle_ns: said.settle_ns,
            }))
        }
        _ => Ok(Message::Other { header, body }),
    }
}

fn exactly<T: FromBytes>(header: &InHeader, body: &[u8]) -> Result<T, MessageError> {
    T::read_from_bytes(body).map_err(|_| MessageError::Body {
        opcode: header.opcode,
        got: body.len(),
        want: size_of::<T>(),
    })
}

/// The answer to a replay that is confirmed, ready for one `write(2)`. The kernel applies no attribute of it, it
/// compares the type and the inode number.
pub fn attr_reply(unique: u64, attr: &Attr) -> [u8; 120] {
    let mut message = [0; 120];
    let body = AttrOut { attr: *attr, ..AttrOut::default() };
    let header = OutHeader { len: message.len() as u32, error: 0, unique };
    message[..16].copy_from_slice(header.as_bytes());
    message[16..].copy_from_slice(body.as_bytes());
    message
}

/// An answer that is only an error, ready for one `write(2)`.
///
/// `errno` is positive, as `libc` has it. What the kernel would not accept as an error (0, or 512 and above)
/// becomes `EIO`.
pub fn error_reply(unique: u64, errno: i32) -> [u8; 16] {
    let errno = if (1..512).contains(&errno) { errno } else { libc::EIO };
    let header = OutHeader { len: 16, error: -errno, unique };
    let mut message = [0; 16];
    message.copy_from_slice(header.as_bytes());
    message
}

impl From<&libc::stat> for Attr {
    fn from(stat: &libc::stat) -> Self {
        Attr {
            ino: stat.st_ino,
            size: stat.st_size as u64,
            blocks: stat.st_blocks as u64,
            atime: stat.st_atime as u64,
            mtime: stat.st_mtime as u64,
            ctime: stat.st_ctime as u64,
            atimensec: stat.st_atime_nsec as u32,
            mtimensec: stat.st_mtime_nsec as u32,
            ctimensec: stat.st_ctime_nsec as u32,
            mode: stat.st_mode,
            nlink: stat.st_nlink as u32,
            uid: stat.st_uid,
            gid: stat.st_gid,
            // The low half of a dev_t is the encoding that FUSE uses.
            rdev: stat.st_rdev as u32,
            blksize: stat.st_blksize as u32,
            flags: 0,
        }
    }
}
