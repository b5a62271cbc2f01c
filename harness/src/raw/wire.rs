// SPDX-License-Identifier: GPL-2.0
//! The FUSE wire format as the scenarios understand it.
//!
//! Written a second time on purpose: the crate under test has its own definitions, and a test that
//! borrowed them could not notice when both are wrong in the same way. Only what the scenarios
//! use is here; names and layouts follow `include/uapi/linux/fuse.h`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Opcodes, as the kernel numbers them.
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const SETLK: u32 = 32;
    pub const SETLKW: u32 = 33;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const BMAP: u32 = 37;
    pub const DESTROY: u32 = 38;
    pub const POLL: u32 = 40;
    pub const NOTIFY_REPLY: u32 = 41;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
    pub const STATX: u32 = 52;
    pub const COPY_FILE_RANGE_64: u32 = 53;
    pub const CUSE_INIT: u32 = 4096;

    /// The name of an opcode, for messages.
    pub fn name(opcode: u32) -> String {
        let known = match opcode {
            LOOKUP => "LOOKUP",
            FORGET => "FORGET",
            GETATTR => "GETATTR",
            SETATTR => "SETATTR",
            READLINK => "READLINK",
            SYMLINK => "SYMLINK",
            MKNOD => "MKNOD",
            MKDIR => "MKDIR",
            UNLINK => "UNLINK",
            RMDIR => "RMDIR",
            RENAME => "RENAME",
            LINK => "LINK",
            OPEN => "OPEN",
            READ => "READ",
            WRITE => "WRITE",
            STATFS => "STATFS",
            RELEASE => "RELEASE",
            FSYNC => "FSYNC",
            SETXATTR => "SETXATTR",
            GETXATTR => "GETXATTR",
            LISTXATTR => "LISTXATTR",
            REMOVEXATTR => "REMOVEXATTR",
            FLUSH => "FLUSH",
            INIT => "INIT",
            OPENDIR => "OPENDIR",
            READDIR => "READDIR",
            RELEASEDIR => "RELEASEDIR",
            FSYNCDIR => "FSYNCDIR",
            SETLK => "SETLK",
            SETLKW => "SETLKW",
            CREATE => "CREATE",
            INTERRUPT => "INTERRUPT",
            BMAP => "BMAP",
            DESTROY => "DESTROY",
            POLL => "POLL",
            NOTIFY_REPLY => "NOTIFY_REPLY",
            BATCH_FORGET => "BATCH_FORGET",
            FALLOCATE => "FALLOCATE",
            READDIRPLUS => "READDIRPLUS",
            RENAME2 => "RENAME2",
            LSEEK => "LSEEK",
            COPY_FILE_RANGE => "COPY_FILE_RANGE",
            SYNCFS => "SYNCFS",
            TMPFILE => "TMPFILE",
            STATX => "STATX",
            COPY_FILE_RANGE_64 => "COPY_FILE_RANGE_64",
            CUSE_INIT => "CUSE_INIT",
            _ => return format!("opcode {opcode}"),
        };
        known.to_owned()
    }
}

/// Notification codes (the `error` field of an out header whose `unique` is 0).
pub mod notify {
    pub const POLL: i32 = 1;
    pub const INVAL_INODE: i32 = 2;
    pub const INVAL_ENTRY: i32 = 3;
    pub const STORE: i32 = 4;
    pub const RETRIEVE: i32 = 5;
    pub const DELETE: i32 = 6;
    pub const RESEND: i32 = 7;
    pub const INC_EPOCH: i32 = 8;
    pub const PRUNE: i32 = 9;
    pub const RESTARTED: i32 = 12;
}

/// INIT flags as one 64-bit word (`flags` and `flags2`).
pub mod init {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const POSIX_LOCKS: u64 = 1 << 1;
    pub const EXPORT_SUPPORT: u64 = 1 << 4;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const FLOCK_LOCKS: u64 = 1 << 10;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const WRITEBACK_CACHE: u64 = 1 << 16;
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const PASSTHROUGH: u64 = 1 << 37;
    pub const ALLOW_IDMAP: u64 = 1 << 40;
    pub const OVER_IO_URING: u64 = 1 << 41;
    pub const RESTARTABLE: u64 = 1 << 45;
}

/// FOPEN_* flags of an OPEN reply.
pub mod fopen {
    pub const DIRECT_IO: u32 = 1 << 0;
    pub const KEEP_CACHE: u32 = 1 << 1;
    pub const CACHE_DIR: u32 = 1 << 3;
    pub const NOFLUSH: u32 = 1 << 5;
    pub const PASSTHROUGH: u32 = 1 << 7;
}

pub const ROOT: u64 = 1;
/// Bit 63 of a request id: sent again.
pub const UNIQUE_RESEND: u64 = 1 << 63;
/// Bit 62 must be set in the cookie of a RESTARTED.
pub const COOKIE_BIT: u64 = 1 << 62;
pub const RESTARTED_COMMIT: u32 = 1;
pub const GETATTR_REPLAY: u32 = 1 << 1;

/// The id a request was born with, whatever was sent again since.
pub fn original_id(unique: u64) -> u64 {
    unique & ((1 << 48) - 1)
}

/// The low byte of the epoch that a resent or replayed request carries.
pub fn epoch_byte(unique: u64) -> u8 {
    (unique >> 48) as u8
}

/// The id under which request `original` is sent again in `epoch`.
pub fn resent_id(original: u64, epoch: u32) -> u64 {
    original_id(original) | UNIQUE_RESEND | (u64::from(epoch & 0xff) << 48)
}

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident { $($field:ident : $ty:ty),* $(,)? } = $size:literal) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        pub struct $name { $(pub $field: $ty),* }
        const _: () = assert!(std::mem::size_of::<$name>() == $size);
    };
}

wire!(
    InHeader {
        len: u32,
        opcode: u32,
        unique: u64,
        nodeid: u64,
        uid: u32,
        gid: u32,
        pid: u32,
        extlen: u16,
        padding: u16
    } = 40
);
wire!(
    OutHeader {
        len: u32,
        error: i32,
        unique: u64
    } = 16
);
wire!(
    InitIn {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        flags2: u32,
        unused: [u32; 11]
    } = 64
);
wire!(
    /// `identity` sits at offset 48, behind the three 16-bit words that stay unused.
    InitOut { major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16,
        congestion_threshold: u16, max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16,
        flags2: u32, max_stack_depth: u32, request_timeout: u16, unused: [u16; 3], identity: [u64; 2] } = 64
);
const _: () = assert!(std::mem::offset_of!(InitOut, identity) == 48);
wire!(
    Attr {
        ino: u64,
        size: u64,
        blocks: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        nlink: u32,
        uid: u32,
        gid: u32,
        rdev: u32,
        blksize: u32,
        flags: u32
    } = 88
);
wire!(
    EntryOut {
        nodeid: u64,
        generation: u64,
        entry_valid: u64,
        attr_valid: u64,
        entry_valid_nsec: u32,
        attr_valid_nsec: u32,
        attr: Attr
    } = 128
);
wire!(
    AttrOut {
        attr_valid: u64,
        attr_valid_nsec: u32,
        dummy: u32,
        attr: Attr
    } = 104
);
wire!(
    GetattrIn {
        getattr_flags: u32,
        dummy: u32,
        fh: u64
    } = 16
);
wire!(
    SetattrIn {
        valid: u32,
        padding: u32,
        fh: u64,
        size: u64,
        lock_owner: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        unused4: u32,
        uid: u32,
        gid: u32,
        unused5: u32
    } = 88
);
wire!(
    ForgetOne {
        nodeid: u64,
        nlookup: u64
    } = 16
);
wire!(
    BatchForgetIn {
        count: u32,
        dummy: u32
    } = 8
);
wire!(
    MknodIn {
        mode: u32,
        rdev: u32,
        umask: u32,
        padding: u32
    } = 16
);
wire!(
    MkdirIn {
        mode: u32,
        umask: u32
    } = 8
);
wire!(RenameIn { newdir: u64 } = 8);
wire!(
    Rename2In {
        newdir: u64,
        flags: u32,
        padding: u32
    } = 16
);
wire!(LinkIn { oldnodeid: u64 } = 8);
wire!(
    CreateIn {
        flags: u32,
        mode: u32,
        umask: u32,
        open_flags: u32
    } = 16
);
wire!(
    OpenOut {
        fh: u64,
        open_flags: u32,
        backing_id: i32
    } = 16
);
wire!(
    ReadIn {
        fh: u64,
        offset: u64,
        size: u32,
        read_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32
    } = 40
);
wire!(
    WriteIn {
        fh: u64,
        offset: u64,
        size: u32,
        write_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32
    } = 40
);
wire!(
    WriteOut {
        size: u32,
        padding: u32
    } = 8
);
wire!(
    StatfsOut {
        blocks: u64,
        bfree: u64,
        bavail: u64,
        files: u64,
        ffree: u64,
        bsize: u32,
        namelen: u32,
        frsize: u32,
        padding: u32,
        spare: [u32; 6]
    } = 80
);
wire!(LseekOut { offset: u64 } = 8);
wire!(
    PollIn {
        fh: u64,
        kh: u64,
        flags: u32,
        events: u32
    } = 24
);
wire!(
    PollOut {
        revents: u32,
        padding: u32
    } = 8
);
wire!(InterruptIn { unique: u64 } = 8);
wire!(
    DirentHead {
        ino: u64,
        off: u64,
        namelen: u32,
        kind: u32
    } = 24
);
wire!(
    RestartedOut {
        cookie: u64,
        flags: u32,
        epoch: u32,
        identity: [u64; 2]
    } = 32
);
wire!(
    Report {
        epoch: u32,
        flags: u32,
        replayed: u64,
        confirmed: u64,
        revoked: u64,
        held: u64,
        lowest_owed: u64,
        hold_ns: u64,
        root_ns: u64,
        replay_ns: u64,
        settle_ns: u64,
        spare: [u64; 2]
    } = 96
);
wire!(
    InvalInodeOut {
        ino: u64,
        off: i64,
        len: i64
    } = 24
);
wire!(
    InvalEntryOut {
        parent: u64,
        namelen: u32,
        flags: u32
    } = 16
);
wire!(
    DeleteOut {
        parent: u64,
        child: u64,
        namelen: u32,
        padding: u32
    } = 24
);
wire!(
    StoreOut {
        nodeid: u64,
        offset: u64,
        size: u32,
        padding: u32
    } = 24
);
wire!(
    RetrieveOut {
        notify_unique: u64,
        nodeid: u64,
        offset: u64,
        size: u32,
        padding: u32
    } = 32
);
wire!(PollWakeupOut { kh: u64 } = 8);
wire!(
    PruneOut {
        count: u32,
        padding: u32,
        spare: u64
    } = 16
);
wire!(
    CuseInitOut {
        major: u32,
        minor: u32,
        unused: u32,
        flags: u32,
        max_read: u32,
        max_write: u32,
        dev_major: u32,
        dev_minor: u32,
        spare: [u32; 10]
    } = 72
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_keep_their_origin_and_carry_the_epoch() {
        let id = 0x1234_5678;
        let again = resent_id(id, 0x1ff);
        assert_eq!(original_id(again), id);
        assert_eq!(epoch_byte(again), 0xff);
        assert_ne!(again & UNIQUE_RESEND, 0);
        // A third sending must not pile up the bits of the second.
        assert_eq!(resent_id(again, 1), resent_id(id, 1));
    }

    #[test]
    fn unknown_opcodes_are_named_by_number() {
        assert_eq!(op::name(op::MKDIR), "MKDIR");
        assert_eq!(op::name(777), "opcode 777");
    }
}
