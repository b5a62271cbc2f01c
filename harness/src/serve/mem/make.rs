// SPDX-License-Identifier: GPL-2.0
//! Changes that add a name: create, mkdir, mknod, symlink, link.

use std::ffi::OsStr;

use nix::errno::Errno;

use super::inode::{Inode, Time, Which};
use super::layout::inode as at;
use super::names::{valid, Dir};
use super::once::{Kept, Opcode};
use super::store::{Change, Res};
use super::tree::{Index, Tree};

/// Who asks: what `fuse_in_header` says.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
}

/// What is to be made.
#[derive(Clone, Copy, Debug)]
pub struct New<'a> {
    pub opcode: Opcode,
    /// With the type.
    pub mode: u32,
    pub rdev: u32,
    /// Of a symbolic link; else empty.
    pub target: &'a [u8],
}

/// The longest target of a symbolic link: what fits into a block, with its end.
const MOST_TARGET: usize = 4095;

impl Tree {
    pub fn make(
        &self,
        unique: u64,
        caller: Caller,
        (parent, name): (u64, &OsStr),
        new: &New<'_>,
    ) -> Kept<'_, Inode> {
        let text = valid(name)?;
        if let Some(slot) = self.answered(unique)? {
            return Ok((self.lookup(parent, name)?, Some(slot)));
        }
        let index = &mut *self.changing();
        self.absent(index, parent, text)?;
        if new.target.len() > MOST_TARGET {
            return Err(Errno::ENAMETOOLONG);
        }
        let entry = self.new_entry(index, parent, text)?;
        let (place, nodeid) = match self.prepare(index, caller, parent, new) {
            Ok(made) => made,
            Err(e) => {
                index.names.give(entry.record);
                return Err(e);
            }
        };
        let mut change = Change::default();
        change.set(place + at::NODEID, nodeid);
        change.set(self.store.child_at(entry.record), nodeid);
        self.touch_dir(&mut change, parent)?;
        let dir = new.mode & libc::S_IFMT == libc::S_IFDIR;
        if dir {
            change.links(&self.store, self.store.place(parent)?, 1);
        }
        match self.once(unique, new.opcode, change) {
            Ok(slot) => {
                if dir {
                    index.dirs.insert(nodeid, Dir::new(parent));
                }
                self.named(index, &entry);
                Ok((self.count(nodeid)?, Some(slot)))
            }
            Err(e) => {
                index.names.give(entry.record);
                self.unprepare(index, place, nodeid);
                Err(e)
            }
        }
    }

    /// The name has become visible.
    pub fn named(&self, index: &mut Index, entry: &super::names::Entry) {
        if let Some(dir) = index.dirs.get_mut(&entry.parent) {
            dir.add(entry);
        }
    }

    /// Fills a free inode; nothing points to it, and nothing says yet that it is in use.
    pub fn prepare(
        &self,
        index: &mut Index,
        caller: Caller,
        parent: u64,
        new: &New<'_>,
    ) -> Res<(usize, u64)> {
        let above = self.store.inode(parent)?;
        let (place, nodeid) = self.new_inode(index)?;
        let dir = new.mode & libc::S_IFMT == libc::S_IFDIR;
        let inherit = above.mode & libc::S_ISGID != 0;
        let sticky_group = if dir && inherit { libc::S_ISGID } else { 0 };
        let inode = Inode {
            nodeid,
            mode: new.mode | sticky_group,
            nlink: if dir { 2 } else { 1 },
            uid: caller.uid,
            gid: if inherit { above.gid } else { caller.gid },
            size: new.target.len() as u64,
            rdev: new.rdev,
            times: [Time::now(); 3],
        };
        self.store.fill(place, &inode);
        if !new.target.is_empty() {
            let fill = |block| self.store.write(block, new.target);
            if let Err(e) = self.store.add_block(&mut index.blocks, place, 0, fill) {
                index.inodes.give(nodeid as u32);
                return Err(e);
            }
        }
        Ok((place, nodeid))
    }

    /// What was prepared is not made after all.
    pub fn unprepare(&self, index: &mut Index, place: usize, nodeid: u64) {
        let blocks = &mut index.blocks;
        self.store
            .each_block(place, &mut |block| blocks.give(block));
        index.inodes.give(nodeid as u32);
    }

    fn absent(&self, index: &Index, parent: u64, name: &[u8]) -> Res<()> {
        if self.dir(index, parent)?.find(name).is_some() {
            return Err(Errno::EEXIST);
        }
        match self.store.inode(parent)?.nlink {
            0 => Err(Errno::ENOENT), // removed, and still somebody's current directory
            _ => Ok(()),
        }
    }

    /// CREATE; a name that is there already is opened, unless the caller wants to be the one who made it.
    pub fn create(
        &self,
        unique: u64,
        caller: Caller,
        at: (u64, &OsStr),
        mode: u32,
        flags: i32,
    ) -> Kept<'_, Inode> {
        let new = New {
            opcode: Opcode::Create,
            mode: mode & 0o7777 | libc::S_IFREG,
            rdev: 0,
            target: b"",
        };
        match self.make(unique, caller, at, &new) {
            Err(Errno::EEXIST) if flags & libc::O_EXCL == 0 => {
                let found = self.lookup(at.0, at.1)?;
                match found.mode & libc::S_IFMT {
                    libc::S_IFREG => Ok((found, None)),
                    other => {
                        self.forget(found.nodeid, 1);
                        Err(if other == libc::S_IFDIR {
                            Errno::EISDIR
                        } else {
                            Errno::EEXIST
                        })
                    }
                }
            }
            made => made,
        }
    }

    pub fn link(&self, unique: u64, nodeid: u64, (parent, name): (u64, &OsStr)) -> Kept<'_, Inode> {
        let text = valid(name)?;
        if let Some(slot) = self.answered(unique)? {
            return Ok((self.lookup(parent, name)?, Some(slot)));
        }
        let index = &mut *self.changing();
        let place = self.store.place(nodeid)?;
        if self.store.inode(nodeid)?.nlink == 0 {
            return Err(Errno::ENOENT); // as link(2) says of a file without a name
        }
        self.absent(index, parent, text)?;
        let entry = self.new_entry(index, parent, text)?;
        let mut change = Change::default();
        change.set(self.store.child_at(entry.record), nodeid);
        change.links(&self.store, place, 1);
        change.time(&self.store, place, Which::Change, Time::now());
        self.touch_dir(&mut change, parent)?;
        match self.once(unique, Opcode::Link, change) {
            Ok(slot) => {
                self.named(index, &entry);
                Ok((self.count(nodeid)?, Some(slot)))
            }
            Err(e) => {
                index.names.give(entry.record);
                Err(e)
            }
        }
    }
}
