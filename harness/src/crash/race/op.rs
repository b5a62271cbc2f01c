// SPDX-License-Identifier: GPL-2.0
//! What a racing process does, and what it was told: data that can be drawn, written to a log and judged.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The shared directories. Nobody removes or renames them.
pub const DIRS: [&str; 2] = ["a", "b"];
/// The names in each of them that everybody fights for.
const IN_EACH: [&str; 3] = ["x", "y", "z"];
/// All shared names.
pub const NAMES: usize = DIRS.len() * IN_EACH.len();
/// Files with one byte each, which always are there.
pub const REGISTERS: [&str; 2] = ["r", "s"];

/// A shared name, by number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Name(pub u8);

impl Name {
    pub fn all() -> impl Iterator<Item = Name> {
        (0..NAMES as u8).map(Name)
    }

    pub fn dir(self) -> u8 {
        self.0 / IN_EACH.len() as u8
    }

    /// Below the root of the mount.
    pub fn path(self) -> String {
        let (dir, name) = (self.dir(), self.0 as usize % IN_EACH.len());
        format!("{}/{}", DIRS[usize::from(dir)], IN_EACH[name])
    }

    /// The name that an entry of a directory stands for.
    pub fn find(dir: u8, entry: &str) -> Option<Name> {
        let at = IN_EACH.iter().position(|name| *name == entry)?;
        Some(Name(dir * IN_EACH.len() as u8 + at as u8))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum How {
    Plain,
    NoReplace,
    Exchange,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    File,
    Dir,
    Symlink,
}

/// One call, or few that belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Op {
    /// open(2) with `O_CREAT | O_EXCL`, and fstat(2) of what it gave.
    Create(Name),
    /// mknod(2) of a regular file.
    Mknod(Name),
    Mkdir(Name),
    /// The number is the target.
    Symlink(Name, u32),
    Rmdir(Name),
    Unlink(Name),
    Link(Name, Name),
    Rename(Name, Name, How),
    /// With `XATTR_CREATE`.
    SetNew(Name, u8),
    /// With `XATTR_REPLACE`.
    SetOld(Name, u8),
    RemoveXattr(Name),
    GetXattr(Name),
    /// lstat(2): type and inode number.
    Stat(Name),
    Readlink(Name),
    /// One byte, by a file that is opened with `O_APPEND` and closed again.
    Append(Name, u8),
    /// The whole file.
    Read(Name),
    /// The first getdents64(2) of a directory, which has room for all.
    List(u8),
    Put(u8, u8),
    Get(u8),
}

impl Op {
    /// The shared names that it is about; a [`Op::List`] is about all of its directory.
    pub fn names(&self) -> Vec<Name> {
        match *self {
            Op::Create(n) | Op::Mknod(n) | Op::Mkdir(n) | Op::Symlink(n, _) => vec![n],
            Op::Rmdir(n) | Op::Unlink(n) | Op::Stat(n) | Op::Readlink(n) => vec![n],
            Op::SetNew(n, _) | Op::SetOld(n, _) | Op::RemoveXattr(n) | Op::GetXattr(n) => vec![n],
            Op::Append(n, _) | Op::Read(n) => vec![n],
            Op::Link(from, to) | Op::Rename(from, to, _) => vec![from, to],
            Op::List(dir) => Name::all().filter(|name| name.dir() == dir).collect(),
            Op::Put(..) | Op::Get(_) => Vec::new(),
        }
    }

    pub fn register(&self) -> Option<u8> {
        match *self {
            Op::Put(register, _) | Op::Get(register) => Some(register),
            _ => None,
        }
    }

    /// Whether it changes something if it succeeds.
    pub fn changes(&self) -> bool {
        use Op::*;
        !matches!(
            self,
            GetXattr(_) | Stat(_) | Readlink(_) | Read(_) | List(_) | Get(_)
        )
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Op::Create(n) => write!(f, "create {n}"),
            Op::Mknod(n) => write!(f, "mknod {n}"),
            Op::Mkdir(n) => write!(f, "mkdir {n}"),
            Op::Symlink(n, to) => write!(f, "symlink to-{to} {n}"),
            Op::Rmdir(n) => write!(f, "rmdir {n}"),
            Op::Unlink(n) => write!(f, "unlink {n}"),
            Op::Link(from, to) => write!(f, "link {from} {to}"),
            Op::Rename(from, to, How::Plain) => write!(f, "rename {from} {to}"),
            Op::Rename(from, to, How::NoReplace) => write!(f, "rename NOREPLACE {from} {to}"),
            Op::Rename(from, to, How::Exchange) => write!(f, "rename EXCHANGE {from} {to}"),
            Op::SetNew(n, v) => write!(f, "setxattr CREATE {n} {v}"),
            Op::SetOld(n, v) => write!(f, "setxattr REPLACE {n} {v}"),
            Op::RemoveXattr(n) => write!(f, "removexattr {n}"),
            Op::GetXattr(n) => write!(f, "getxattr {n}"),
            Op::Stat(n) => write!(f, "stat {n}"),
            Op::Readlink(n) => write!(f, "readlink {n}"),
            Op::Append(n, v) => write!(f, "append {n} {v}"),
            Op::Read(n) => write!(f, "read {n}"),
            Op::List(dir) => write!(f, "list {}", DIRS[usize::from(dir)]),
            Op::Put(r, v) => write!(f, "put {} {v}", REGISTERS[usize::from(r)]),
            Op::Get(r) => write!(f, "get {}", REGISTERS[usize::from(r)]),
        }
    }
}

/// What a call gave.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Got {
    Done,
    /// errno
    Failed(i32),
    /// Type and inode number.
    Node(Kind, u64),
    Bytes(Vec<u8>),
    Target(u32),
    /// The entries, sorted, but for `.` and `..`.
    Entries(Vec<(Name, Kind)>),
    /// Something that no call of these can give: told as it is.
    Odd(String),
}

impl fmt::Display for Got {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Got::Done => f.write_str("0"),
            Got::Failed(errno) => write!(f, "{:?}", nix::errno::Errno::from_raw(*errno)),
            Got::Node(kind, ino) => write!(f, "{kind:?} with inode {ino}"),
            Got::Bytes(bytes) => write!(f, "{bytes:?}"),
            Got::Target(target) => write!(f, "to-{target}"),
            Got::Entries(entries) => {
                let each = entries
                    .iter()
                    .map(|(name, kind)| format!("{name} {kind:?}"));
                write!(f, "[{}]", each.collect::<Vec<_>>().join(", "))
            }
            Got::Odd(what) => f.write_str(what),
        }
    }
}

/// One call of a history. The stamps are of one clock for all processes, no two are equal: `called` was taken before
/// the call, `returned` after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub process: u8,
    pub op: Op,
    pub called: u64,
    pub returned: u64,
    pub got: Got,
}

impl Record {
    /// Whether the history would be the same for everybody else without it.
    pub fn only_looks(&self) -> bool {
        !self.op.changes() || matches!(self.got, Got::Failed(_))
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "[{:>5} to {:>5}] process {}: {} = {}",
            self.called, self.returned, self.process, self.op, self.got
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_entries_are_one_to_one() {
        for name in Name::all() {
            let path = name.path();
            let (dir, entry) = path.split_once('/').unwrap();
            assert_eq!(dir, DIRS[usize::from(name.dir())]);
            assert_eq!(Name::find(name.dir(), entry), Some(name));
        }
        assert_eq!(Name::all().count(), NAMES);
        assert_eq!(Name::find(0, "w"), None);
    }

    #[test]
    fn a_record_survives_its_log() {
        let record = Record {
            process: 3,
            op: Op::Rename(Name(1), Name(4), How::Exchange),
            called: 7,
            returned: 9,
            got: Got::Entries(vec![(Name(0), Kind::Symlink)]),
        };
        let line = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&line).unwrap(), record);
        assert!(!line.contains('\n'));
    }
}
