// SPDX-License-Identifier: GPL-2.0
//! Why a tree cannot be served, and what an operator can do.

use std::fmt;

use nix::errno::Errno;

/// Where something is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Header,
    /// The change that was being made.
    Log,
    /// The record of an inode, or a block of it.
    Inode(u32),
    /// The record of a name.
    Name(u32),
}

/// Why a tree cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TreeError {
    /// The arena has so many bytes.
    Small(usize),
    Memory(Errno),
    /// Of another version of this server.
    Version,
    /// Of another server.
    Foreign,
    /// No server leaves it like this.
    Damaged {
        part: Part,
        what: &'static str,
    },
}

pub type Checked<T> = Result<T, TreeError>;

/// Damage, unless `holds`.
pub fn check(holds: bool, part: Part, what: &'static str) -> Checked<()> {
    match holds {
        true => Ok(()),
        false => Err(TreeError::Damaged { part, what }),
    }
}

/// The tree is nowhere else.
const WAY_OUT: &str = "unmount, and mount again with an empty memfd; \
    all files are lost then, for they are nowhere but in this one";

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Header => write!(f, "header"),
            Part::Log => write!(f, "log"),
            Part::Inode(slot) => write!(f, "inode {slot}"),
            Part::Name(record) => write!(f, "name {record}"),
        }
    }
}

impl fmt::Display for TreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TreeError::Small(bytes) => {
                write!(f, "the state has {bytes} bytes for the tree, which is too few: {WAY_OUT}")
            }
            TreeError::Memory(e) => write!(
                f,
                "the machine has no memory for the tree ({}): free some, and start the server again",
                e.desc()
            ),
            TreeError::Version => write!(
                f,
                "the tree was laid out by another version of this server: start that one; or {WAY_OUT}"
            ),
            TreeError::Foreign => write!(
                f,
                "the state holds the tree of another server, or of another version: start that one; or {WAY_OUT}"
            ),
            TreeError::Damaged { part, what } => {
                write!(f, "the tree is damaged ({part}: {what}): {WAY_OUT}")
            }
        }
    }
}

impl std::error::Error for TreeError {}
