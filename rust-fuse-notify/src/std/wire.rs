// SPDX-License-Identifier: GPL-2.0
//! The bytes that cross `/dev/fuse`, as far as a restart needs them.
//!
//! All fields are in the machine's own byte order: the kernel and the server run on the same machine. Every
//! struct here has no padding and accepts any bit pattern, so parsing hostile bytes is always defined.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::proto;

/// Opcode of a request for attributes; a replay is one of these.
pub const FUSE_GETATTR: u32 = 3;
/// Opcode of the handshake, the first message on every connection.
pub const FUSE_INIT: u32 = 26;
/// Opcode under which the kernel sends data for a notification; the report comes as one.
pub const FUSE_NOTIFY_REPLY: u32 = 41;

/// Notification: wake the pollers of a `kh`. Harmless for an unknown `kh`, and accepted in every phase.
pub const FUSE_NOTIFY_POLL: i32 = 1;
/// Notification: send again what was read and never answered (Linux 6.9 and later).
pub const FUSE_NOTIFY_RESEND: i32 = 7;
/// Notification: a new instance serves this connection, or (with COMMIT) is ready to.
pub const FUSE_NOTIFY_RESTARTED: i32 = proto::wire::NOTIFY_RESTARTED;

/// `fuse_init_in.flags`: `flags2` is valid.
pub const FUSE_INIT_EXT: u64 = 1 << 30;
/// INIT flag: `fcntl` locks are the server's business.
pub const FUSE_POSIX_LOCKS: u64 = 1 << 1;
/// INIT flag: OPEN truncates.
pub const FUSE_ATOMIC_O_TRUNC: u64 = 1 << 3;
/// INIT flag: `flock` locks are the server's business.
pub const FUSE_FLOCK_LOCKS: u64 = 1 << 10;
/// INIT flag: the kernel can resend.
pub const FUSE_HAS_RESEND: u64 = 1 << 39;
/// INIT flag: the kernel offers, the server signs, the contract of restartable servers.
pub const FUSE_RESTARTABLE: u64 = proto::wire::RESTARTABLE;

/// `getattr_flags` of a replay.
pub const FUSE_GETATTR_REPLAY: u32 = proto::wire::GETATTR_REPLAY;
/// `flags` of the second notification.
pub const FUSE_RESTARTED_COMMIT: u32 = proto::wire::COMMIT;
/// A cookie has this bit set, so that it can never be the id of a request.
pub const COOKIE_BIT: u64 = proto::wire::COOKIE;
/// Set in the `unique` of every request that was sent before, and of every replay.
pub const FUSE_UNIQUE_RESEND: u64 = proto::ids::RESEND;
/// The bits of a `unique` that hold the id with which a request was first sent.
pub const ORIGINAL_ID_MASK: u64 = proto::ids::ID_MASK;
/// The nodeid of the root of every FUSE file system.
pub const FUSE_ROOT_ID: u64 = 1;
/// Smallest buffer that a read of `/dev/fuse` accepts, in bytes.
pub const FUSE_MIN_READ_BUFFER: usize = 8192;
/// Offset of `identity` in `fuse_init_out`, in bytes.
pub const INIT_OUT_IDENTITY: usize = proto::wire::INIT_IDENTITY_OFFSET;

/// `struct fuse_in_header`: the start of every message from the kernel.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct InHeader {
    /// Bytes in the whole message, this header included.
    pub len: u32,
    /// What is asked for.
    pub opcode: u32,
    /// Id of the request; the answer carries the same.
    pub unique: u64,
    /// Inode that the request is about.
    pub nodeid: u64,
    /// User that asks.
    pub uid: u32,
    /// Group that asks.
    pub gid: u32,
    /// Thread that asks; 0 if it is the kernel itself.
    pub pid: u32,
    /// Length of the extensions, in units of 8 bytes.
    pub total_extlen: u16,
    /// Unused.
    pub padding: u16,
}

/// `struct fuse_out_header`: the start of every message to the kernel.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct OutHeader {
    /// Bytes in the whole message, this header included.
    pub len: u32,
    /// Minus the errno, or 0; for a notification its code.
    pub error: i32,
    /// Id of the request that is answered; 0 for a notification.
    pub unique: u64,
}

/// `struct fuse_getattr_in`, as a replay fills it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct GetattrIn {
    /// [`FUSE_GETATTR_REPLAY`] in a replay.
    pub getattr_flags: u32,
    /// In a replay: the generation of the inode, 32 bits.
    pub dummy: u32,
    /// In a replay: the lookup count of the inode.
    pub fh: u64,
}

/// `struct fuse_attr`: what the kernel is told about an inode.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct Attr {
    /// Inode number that applications see.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Size in blocks of 512 bytes.
    pub blocks: u64,
    /// Last access, seconds since the epoch.
    pub atime: u64,
    /// Last change of the content, seconds since the epoch.
    pub mtime: u64,
    /// Last change of the inode, seconds since the epoch.
    pub ctime: u64,
    /// Nanoseconds of `atime`.
    pub atimensec: u32,
    /// Nanoseconds of `mtime`.
    pub mtimensec: u32,
    /// Nanoseconds of `ctime`.
    pub ctimensec: u32,
    /// Type and permission bits, as in `st_mode`.
    pub mode: u32,
    /// Number of hard links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number, of device nodes.
    pub rdev: u32,
    /// Preferred size of I/O, in bytes.
    pub blksize: u32,
    /// `FUSE_ATTR_*`.
    pub flags: u32,
}

impl Attr {
    /// What the kernel compares in a replay: inode number, and the type in `mode` (`S_IFDIR`, `S_IFREG`, ...).
    pub fn new(ino: u64, mode: u32) -> Attr {
        Attr {
            ino,
            mode,
            nlink: 1,
            ..Attr::default()
        }
    }
}

/// `struct fuse_attr_out`: the answer to GETATTR.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct AttrOut {
    /// Seconds for which the kernel may cache the attributes; ignored in a replay.
    pub attr_valid: u64,
    /// Nanoseconds of `attr_valid`.
    pub attr_valid_nsec: u32,
    /// Unused.
    pub dummy: u32,
    /// The attributes.
    pub attr: Attr,
}

/// `struct fuse_notify_restarted_out`: both steps of a restart.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct RestartedOut {
    /// Comes back in the report; [`COOKIE_BIT`] is set.
    pub cookie: u64,
    /// 0 or [`FUSE_RESTARTED_COMMIT`].
    pub flags: u32,
    /// With COMMIT the epoch of the report, else 0.
    pub epoch: u32,
    /// Which file system this is; zeroes: not said.
    pub identity: [u64; 2],
}

/// `struct fuse_notify_restarted_in`: the body of the report.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct RestartedIn {
    /// Number of this recovery on this connection.
    pub epoch: u32,
    /// Unused.
    pub flags: u32,
    /// Replays answered, the root among them.
    pub replayed: u64,
    /// Inodes that stay.
    pub confirmed: u64,
    /// Inodes that fail with `EIO` from now on.
    pub revoked: u64,
    /// Requests that wait for COMMIT.
    pub held: u64,
    /// Smallest original id among them; 0: none is owed.
    pub lowest_owed: u64,
    /// Nanoseconds spent collecting.
    pub hold_ns: u64,
    /// Nanoseconds spent on the root.
    pub root_ns: u64,
    /// Nanoseconds spent on the other inodes.
    pub replay_ns: u64,
    /// Nanoseconds spent waiting for requests in transit.
    pub settle_ns: u64,
    /// Unused.
    pub spare: [u64; 2],
}

/// `struct fuse_init_in`, the part that every kernel since 7.6 sends.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct InitIn {
    /// Major version of the protocol; 7.
    pub major: u32,
    /// Minor version of the kernel.
    pub minor: u32,
    /// Largest read ahead, in bytes.
    pub max_readahead: u32,
    /// Low half of the flags that the kernel offers.
    pub flags: u32,
}

/// `struct fuse_init_out`, with the identity that this series puts into its unused tail.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct InitOut {
    /// Major version of the protocol; 7.
    pub major: u32,
    /// Minor version of the server.
    pub minor: u32,
    /// Largest read ahead, in bytes.
    pub max_readahead: u32,
    /// Low half of the flags.
    pub flags: u32,
    /// Background requests in flight.
    pub max_background: u16,
    /// Background requests from which on the device counts as congested.
    pub congestion_threshold: u16,
    /// Largest WRITE, in bytes.
    pub max_write: u32,
    /// Granularity of time stamps, in nanoseconds.
    pub time_gran: u32,
    /// Largest request, in pages.
    pub max_pages: u16,
    /// Alignment of DAX mappings, as a power of two.
    pub map_alignment: u16,
    /// High half of the flags.
    pub flags2: u32,
    /// How deep passthrough may stack.
    pub max_stack_depth: u32,
    /// Seconds until the kernel gives up on a request.
    pub request_timeout: u16,
    /// Unused.
    pub unused: [u16; 3],
    /// Which file system this is; zeroes: not said.
    pub identity: [u64; 2],
}

impl InitOut {
    /// All flags of the reply in one word; `flags2` counts only with [`FUSE_INIT_EXT`].
    pub fn all_flags(&self) -> u64 {
        let low = u64::from(self.flags);
        if low & FUSE_INIT_EXT == 0 {
            return low;
        }
        low | (u64::from(self.flags2) << 32)
    }
}

/// Names a file system, in 128 bits. Zero means "not said".
///
/// Every FUSE root is a directory with nodeid 1, so the kernel cannot tell file systems apart by their root. A
/// good identity is a UUID of the file system, or a hash over what the server exports (device, inode, path).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Identity(pub [u64; 2]);

impl Identity {
    /// The identity that says nothing: the kernel then compares none.
    pub const UNSAID: Identity = Identity([0, 0]);

    /// Whether this is [`Identity::UNSAID`].
    pub fn is_unsaid(self) -> bool {
        self == Identity::UNSAID
    }
}

impl From<u128> for Identity {
    fn from(value: u128) -> Self {
        Identity([(value >> 64) as u64, value as u64])
    }
}

impl From<Identity> for u128 {
    fn from(value: Identity) -> Self {
        (u128::from(value.0[0]) << 64) | u128::from(value.0[1])
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}{:016x}", self.0[0], self.0[1])
    }
}

/// The id with which a request was first sent, whatever resends have put into its upper bits.
///
/// ```
/// # use rust_fuse_notify::std::wire::original_id;
/// assert_eq!(original_id((1 << 63) | (3 << 48) | 0x1234), 0x1234);
/// ```
pub fn original_id(unique: u64) -> u64 {
    proto::ids::original(unique)
}

/// Whether a request was sent before, to an instance that is dead now.
pub fn is_resent(unique: u64) -> bool {
    proto::ids::is_resent(unique)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    #[test]
    fn sizes_are_those_of_the_header_file() {
        assert_eq!(size_of::<InHeader>(), 40);
        assert_eq!(size_of::<OutHeader>(), 16);
        assert_eq!(size_of::<GetattrIn>(), 16);
        assert_eq!(size_of::<Attr>(), 88);
        assert_eq!(size_of::<AttrOut>(), 104);
        assert_eq!(size_of::<RestartedOut>(), 32);
        assert_eq!(size_of::<RestartedIn>(), 96);
        assert_eq!(size_of::<InitOut>(), 64);
        assert_eq!(offset_of!(InitOut, identity), INIT_OUT_IDENTITY);
        assert_eq!(offset_of!(InitOut, unused), 42);
    }

    /// The core has the same structs without zerocopy's derives, since the kernel compiles it.
    #[test]
    fn structs_are_laid_out_as_in_the_core() {
        assert_eq!(
            size_of::<RestartedOut>(),
            size_of::<proto::wire::RestartedOut>()
        );
        assert_eq!(
            size_of::<RestartedIn>(),
            size_of::<proto::wire::RestartedIn>()
        );
        assert_eq!(
            offset_of!(RestartedOut, epoch),
            offset_of!(proto::wire::RestartedOut, epoch)
        );
        assert_eq!(
            offset_of!(RestartedOut, identity),
            offset_of!(proto::wire::RestartedOut, identity)
        );
        assert_eq!(
            offset_of!(RestartedIn, replayed),
            offset_of!(proto::wire::RestartedIn, replayed)
        );
        assert_eq!(
            offset_of!(RestartedIn, confirmed),
            offset_of!(proto::wire::RestartedIn, confirmed)
        );
        assert_eq!(
            offset_of!(RestartedIn, revoked),
            offset_of!(proto::wire::RestartedIn, revoked)
        );
        assert_eq!(
            offset_of!(RestartedIn, held),
            offset_of!(proto::wire::RestartedIn, held)
        );
        assert_eq!(
            offset_of!(RestartedIn, lowest_owed),
            offset_of!(proto::wire::RestartedIn, lowest_owed)
        );
        assert_eq!(
            offset_of!(RestartedIn, settle_ns),
            offset_of!(proto::wire::RestartedIn, settle_ns)
        );
    }

    #[test]
    fn flags2_counts_only_with_init_ext() {
        let mut out = InitOut {
            flags2: 1 << 13,
            ..InitOut::default()
        };
        assert_eq!(out.all_flags() & FUSE_RESTARTABLE, 0);
        out.flags = FUSE_INIT_EXT as u32;
        assert_ne!(out.all_flags() & FUSE_RESTARTABLE, 0);
    }

    #[test]
    fn identity_round_trips() {
        let id = Identity::from(0x0123_4567_89ab_cdef_0011_2233_4455_6677_u128);
        assert_eq!(
            u128::from(id),
            0x0123_4567_89ab_cdef_0011_2233_4455_6677_u128
        );
        assert_eq!(id.to_string(), "0123456789abcdef0011223344556677");
    }
}
