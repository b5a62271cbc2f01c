// SPDX-License-Identifier: GPL-2.0
//! One inode: what its record says, and what changes of it are made of.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};
use nix::errno::Errno;

use super::layout::{inode as at, INODES_USED_AT, PAGE};
use super::store::{Change, Res, Store};

/// Seconds and nanoseconds since 1970; the latter are never negative.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    pub secs: i64,
    pub nanos: u32,
}

impl Time {
    pub fn now() -> Time {
        SystemTime::now().into()
    }

    fn as_system(self) -> SystemTime {
        let nanos = Duration::from_nanos(u64::from(self.nanos));
        let whole = Duration::from_secs(self.secs.unsigned_abs());
        // What does not fit is the epoch; the kernel sends nothing of the kind.
        let base = if self.secs < 0 {
            UNIX_EPOCH.checked_sub(whole)
        } else {
            UNIX_EPOCH.checked_add(whole)
        };
        base.and_then(|base| base.checked_add(nanos))
            .unwrap_or(UNIX_EPOCH)
    }
}

impl From<SystemTime> for Time {
    fn from(time: SystemTime) -> Time {
        match time.duration_since(UNIX_EPOCH) {
            Ok(after) => Time {
                secs: after.as_secs() as i64,
                nanos: after.subsec_nanos(),
            },
            Err(before) => {
                let before = before.duration();
                let borrow = i64::from(before.subsec_nanos() != 0);
                Time {
                    secs: -(before.as_secs() as i64) - borrow,
                    nanos: (1_000_000_000 - before.subsec_nanos()) % 1_000_000_000,
                }
            }
        }
    }
}

/// Which of the three times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    Access,
    Modification,
    Change,
}

/// A copy of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode {
    pub nodeid: u64,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub rdev: u32,
    pub times: [Time; 3],
}

impl Inode {
    pub fn is_dir(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }

    pub fn attr(&self) -> FileAttr {
        let [atime, mtime, ctime] = self.times.map(Time::as_system);
        FileAttr {
            ino: INodeNo(self.nodeid),
            size: self.size,
            blocks: self.size.div_ceil(512),
            atime,
            mtime,
            ctime,
            crtime: UNIX_EPOCH,
            kind: kind(self.mode),
            perm: (self.mode & 0o7777) as u16,
            nlink: self.nlink,
            uid: self.uid,
            gid: self.gid,
            rdev: self.rdev,
            blksize: PAGE as u32,
            flags: 0,
        }
    }
}

pub fn kind(mode: u32) -> FileType {
    match mode & libc::S_IFMT {
        libc::S_IFDIR => FileType::Directory,
        libc::S_IFLNK => FileType::Symlink,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFBLK => FileType::BlockDevice,
        libc::S_IFIFO => FileType::NamedPipe,
        libc::S_IFSOCK => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

fn halves(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

fn word(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

impl Store {
    /// Where the record of a nodeid is; `ESTALE` if it was never given out or its file is gone.
    pub fn place(&self, nodeid: u64) -> Res<usize> {
        let slot = nodeid as u32;
        if slot == 0 || slot >= self.used(INODES_USED_AT, self.layout.inodes) {
            return Err(Errno::ESTALE);
        }
        let place = self.layout.inode(slot);
        if self.load(place + at::NODEID) == nodeid {
            Ok(place)
        } else {
            Err(Errno::ESTALE)
        }
    }

    pub fn inode(&self, nodeid: u64) -> Res<Inode> {
        let place = self.place(nodeid)?;
        let load = |field| self.load(place + field);
        let (mode, nlink) = halves(load(at::MODE));
        let (uid, gid) = halves(load(at::OWNER));
        let (access, modification) = halves(load(at::NANOS));
        let nanos = [access, modification, load(at::CHANGE_NANOS) as u32];
        let time = |which: usize| Time {
            secs: load(at::TIMES[which]) as i64,
            nanos: nanos[which],
        };
        Ok(Inode {
            nodeid,
            mode,
            nlink,
            uid,
            gid,
            size: load(at::SIZE),
            rdev: load(at::RDEV) as u32,
            times: [time(0), time(1), time(2)],
        })
    }

    /// Fills a free record; nothing says yet that it is in use.
    pub fn fill(&self, place: usize, new: &Inode) {
        self.clear(place + 8, at::LEN - 8);
        let [access, modification, change] = new.times;
        for (which, time) in at::TIMES.into_iter().zip(new.times) {
            self.store(place + which, time.secs as u64);
        }
        self.store(place + at::NANOS, word(access.nanos, modification.nanos));
        self.store(place + at::CHANGE_NANOS, u64::from(change.nanos));
        self.store(place + at::MODE, word(new.mode, new.nlink));
        self.store(place + at::OWNER, word(new.uid, new.gid));
        self.store(place + at::SIZE, new.size);
        self.store(place + at::RDEV, u64::from(new.rdev));
    }
}

impl Change {
    pub fn time(&mut self, store: &Store, place: usize, which: Which, time: Time) {
        self.set(place + at::TIMES[which as usize], time.secs as u64);
        let (access, modification) = halves(self.get(store, place + at::NANOS));
        match which {
            Which::Access => self.set(place + at::NANOS, word(time.nanos, modification)),
            Which::Modification => self.set(place + at::NANOS, word(access, time.nanos)),
            Which::Change => self.set(place + at::CHANGE_NANOS, u64::from(time.nanos)),
        }
    }

    /// Adds to the link count; the new one.
    pub fn links(&mut self, store: &Store, place: usize, by: i32) -> u32 {
        let (mode, nlink) = halves(self.get(store, place + at::MODE));
        let nlink = nlink.saturating_add_signed(by);
        self.set(place + at::MODE, word(mode, nlink));
        nlink
    }

    pub fn permissions(&mut self, store: &Store, place: usize, permissions: u32) {
        let (mode, nlink) = halves(self.get(store, place + at::MODE));
        let mode = mode & libc::S_IFMT | permissions & 0o7777;
        self.set(place + at::MODE, word(mode, nlink));
    }

    pub fn owner(&mut self, store: &Store, place: usize, uid: Option<u32>, gid: Option<u32>) {
        let (old_uid, old_gid) = halves(self.get(store, place + at::OWNER));
        let owner = word(uid.unwrap_or(old_uid), gid.unwrap_or(old_gid));
        self.set(place + at::OWNER, owner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_and_after_1970_come_back() {
        for (secs, nanos) in [
            (0, 0),
            (5, 7),
            (-5, 0),
            (-5, 999_999_999),
            (-1, 1),
            (1 << 34, 3),
        ] {
            let time = Time { secs, nanos };
            assert_eq!(Time::from(time.as_system()), time);
        }
    }
}
