// SPDX-License-Identifier: GPL-2.0
//! What is read from `/dev/fuse` during a recovery, and the answers to it.
//!
//! The bytes are taken as hostile: whatever they are, parsing ends in a value or in a [`MessageError`].

use zerocopy::{FromBytes, IntoBytes};

use super::wire::{
    Attr, AttrOut, GetattrIn, InHeader, OutHeader, RestartedIn, COOKIE_BIT, FUSE_GETATTR,
    FUSE_GETATTR_REPLAY, FUSE_NOTIFY_REPLY,
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
    let (header, body) =
        InHeader::read_from_prefix(bytes).map_err(|_| MessageError::Short(bytes.len()))?;
    if header.len as usize != bytes.len() {
        return Err(MessageError::Length {
            got: bytes.len(),
            said: header.len,
        });
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
    let body = AttrOut {
        attr: *attr,
        ..AttrOut::default()
    };
    let header = OutHeader {
        len: message.len() as u32,
        error: 0,
        unique,
    };
    message[..16].copy_from_slice(header.as_bytes());
    message[16..].copy_from_slice(body.as_bytes());
    message
}

/// An answer that is only an error, ready for one `write(2)`.
///
/// `errno` is positive, as `libc` has it. What the kernel would not accept as an error (0, or 512 and above)
/// becomes `EIO`.
pub fn error_reply(unique: u64, errno: i32) -> [u8; 16] {
    let errno = if (1..512).contains(&errno) {
        errno
    } else {
        libc::EIO
    };
    let header = OutHeader {
        len: 16,
        error: -errno,
        unique,
    };
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
        let header = InHeader {
            len: 40 + body.len() as u32,
            opcode,
            unique,
            nodeid: 7,
            ..InHeader::default()
        };
        [header.as_bytes(), body].concat()
    }

    #[test]
    fn a_getattr_without_the_flag_is_no_replay() {
        let body = GetattrIn {
            getattr_flags: 1,
            dummy: 2,
            fh: 3,
        };
        assert!(matches!(
            parse(&message(FUSE_GETATTR, 5, body.as_bytes())),
            Ok(Message::Other { .. })
        ));
    }

    #[test]
    fn an_answer_to_retrieve_is_no_report() {
        let body = [0; 96];
        assert!(matches!(
            parse(&message(FUSE_NOTIFY_REPLY, 5, &body)),
            Ok(Message::Other { .. })
        ));
        assert!(matches!(
            parse(&message(FUSE_NOTIFY_REPLY, COOKIE_BIT | 5, &body)),
            Ok(Message::Report(_))
        ));
        let error = parse(&message(FUSE_NOTIFY_REPLY, COOKIE_BIT | 5, &body[1..])).unwrap_err();
        assert_eq!(
            error,
            MessageError::Body {
                opcode: 41,
                got: 95,
                want: 96
            }
        );
    }

    #[test]
    fn errors_that_the_kernel_would_refuse_become_eio() {
        for (errno, becomes) in [
            (0, 5),
            (-2, 5),
            (512, 5),
            (i32::MIN, 5),
            (1, 1),
            (116, 116),
            (511, 511),
        ] {
            assert_eq!(
                error_reply(9, errno)[4..8],
                i32::to_ne_bytes(-becomes),
                "{errno}"
            );
        }
    }

    #[test]
    fn a_stat_becomes_an_attr() {
        let stat = nix::sys::stat::stat("/dev/null").unwrap();
        let attr = Attr::from(&stat);
        assert_eq!(
            (attr.ino, attr.mode, attr.nlink),
            (stat.st_ino, stat.st_mode, stat.st_nlink as u32)
        );
        // Major 1, minor 3.
        assert_eq!(attr.rdev, 0x103);
    }

    /// Bytes that come close to being a message.
    fn nearly() -> impl Strategy<Value = Vec<u8>> {
        let opcode = prop_oneof![Just(FUSE_GETATTR), Just(FUSE_NOTIFY_REPLY), any::<u32>()];
        let len = prop_oneof![Just(16_usize), Just(96), 0..200_usize];
        (opcode, any::<u64>(), len, any::<u8>(), 0..3_u8, any::<u8>()).prop_map(
            |(opcode, unique, len, fill, cut, at)| {
                let mut bytes = message(opcode, unique, &vec![fill; len]);
                match cut {
                    0 => {}
                    1 => bytes.truncate(usize::from(at)),
                    _ => {
                        let at = usize::from(at) % bytes.len();
                        bytes[at] ^= 0x40;
                    }
                }
                bytes
            },
        )
    }

    proptest! {
        #[test]
        fn hostile_bytes_end_in_a_value(bytes in prop_oneof![nearly(), proptest::collection::vec(any::<u8>(), 0..300)]) {
            match parse(&bytes) {
                Ok(Message::Replay(_)) => prop_assert_eq!(bytes.len(), 56),
                Ok(Message::Report(_)) => prop_assert_eq!(bytes.len(), 136),
                Ok(Message::Other { header, body }) => prop_assert_eq!(header.len as usize, 40 + body.len()),
                Err(MessageError::Short(got)) => prop_assert!(got < 40),
                Err(MessageError::Length { got, said }) => prop_assert_ne!(got, said as usize),
                Err(MessageError::Body { got, want, .. }) => prop_assert_ne!(got, want),
            }
        }

        #[test]
        fn replays_and_reports_come_out_as_they_went_in(a in any::<u64>(), b in any::<u32>(), c in any::<u64>()) {
            let body = GetattrIn { getattr_flags: FUSE_GETATTR_REPLAY, dummy: b, fh: c };
            let replay = Replay { unique: a, nodeid: 7, generation: b, nlookup: c };
            let bytes = message(FUSE_GETATTR, a, body.as_bytes());
            prop_assert_eq!(parse(&bytes), Ok(Message::Replay(replay)));
            let body = RestartedIn { epoch: b, replayed: c, lowest_owed: a, settle_ns: c ^ 1, ..RestartedIn::default() };
            match parse(&message(FUSE_NOTIFY_REPLY, COOKIE_BIT | a, body.as_bytes())) {
                Ok(Message::Report(report)) => {
                    prop_assert_eq!((report.cookie, report.epoch), (COOKIE_BIT | a, b));
                    prop_assert_eq!((report.replayed, report.settle_ns), (c, c ^ 1));
                    prop_assert_eq!(report.lowest_owed, (a != 0).then_some(a));
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }

        #[test]
        fn answers_carry_the_whole_id(unique in any::<u64>(), ino in any::<u64>(), errno in any::<i32>()) {
            let attr = Attr { ino, mode: 0o100_644, ..Attr::default() };
            let reply = attr_reply(unique, &attr);
            let (header, body) = OutHeader::read_from_prefix(&reply).unwrap();
            prop_assert_eq!(header, OutHeader { len: 120, error: 0, unique });
            prop_assert_eq!(AttrOut::read_from_bytes(body).unwrap().attr, attr);
            let (header, _) = OutHeader::read_from_prefix(&error_reply(unique, errno)).map(|(h, r)| (h, r.len())).unwrap();
            prop_assert!(header.unique == unique && header.len == 16 && (-511..0).contains(&header.error));
        }
    }
}
