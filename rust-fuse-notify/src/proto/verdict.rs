// SPDX-License-Identifier: GPL-2.0

//! What the answer to one replay means for the inode.

/// What the kernel knows of the inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// File type, `mode & S_IFMT`.
    pub kind: u32,
    /// `attr.ino` as the last server gave it; `None` where it never gave one (a root whose
    /// attributes were never fetched).
    pub ino: Option<u64>,
}

/// The part of the answer that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    /// `attr.mode`.
    pub mode: u32,
    /// `attr.ino`.
    pub ino: u64,
    /// `attr.size`.
    pub size: u64,
}

/// How a replay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The epoch is over or the connection gone. The kernel's own state says so, never an errno:
    /// a server may well answer `ENOTCONN`.
    Over,
    /// The server answered with an error.
    Error,
    /// The server answered with attributes.
    Attr(Shown),
}

/// What becomes of the inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the same file.
    Confirmed,
    /// It is not, but the server took its lookup count: FORGET will follow.
    RevokedCounted,
    /// The server does not know it: its lookup count is zero from now on. A count that the server
    /// has under this nodeid belongs to a successor.
    RevokedUnknown,
    /// Nothing was learned.
    Void,
}

const S_IFMT: u32 = 0o170000;

/// The types that FUSE knows: FIFO, character device, directory, block device, file, link, socket.
const TYPES: [u32; 7] = [
    0o010000, 0o020000, 0o040000, 0o060000, 0o100000, 0o120000, 0o140000,
];

impl Shown {
    /// Returns whether the attributes are such as a server may give at all.
    pub fn is_valid(&self) -> bool {
        TYPES.contains(&(self.mode & S_IFMT)) && self.size <= i64::MAX as u64
    }
}

/// Judges one answer.
pub fn judge(known: Known, answer: Answer) -> Verdict {
    let shown = match answer {
        Answer::Over => return Verdict::Void,
        Answer::Error => return Verdict::RevokedUnknown,
        Answer::Attr(shown) => shown,
    };
    let same_ino = match known.ino {
        Some(ino) => ino == shown.ino,
        None => true,
    };
    if shown.is_valid() && shown.mode & S_IFMT == known.kind & S_IFMT && same_ino {
        Verdict::Confirmed
    } else {
        Verdict::RevokedCounted
    }
}
