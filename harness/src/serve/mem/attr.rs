// SPDX-License-Identifier: GPL-2.0
//! Reading and setting attributes; reading, writing and walking what there is.

use nix::errno::Errno;

use super::inode::{Inode, Time, Which};
use super::layout::inode as at;
use super::store::{Change, Res};
use super::tree::Tree;

/// What SETATTR asks for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Attributes {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<Time>,
    pub mtime: Option<Time>,
}

/// One entry of a directory, and the position behind it.
pub struct Shown<'a> {
    pub inode: Inode,
    pub position: u64,
    pub name: &'a [u8],
}

impl Tree {
    pub fn attr(&self, nodeid: u64) -> Res<Inode> {
        let _index = self.reading();
        self.store.inode(nodeid)
    }

    /// One change; all of it can be made twice.
    pub fn set_attr(&self, nodeid: u64, new: &Attributes) -> Res<Inode> {
        let index = &mut *self.changing();
        let place = self.store.place(nodeid)?;
        let old = self.store.inode(nodeid)?;
        let mut change = Change::default();
        change.time(&self.store, place, Which::Change, Time::now());
        if new.uid.is_some() || new.gid.is_some() {
            change.owner(&self.store, place, new.uid, new.gid);
        }
        if let Some(mode) = new.mode {
            change.permissions(&self.store, place, mode);
        }
        if let Some(size) = new.size {
            match old.mode & libc::S_IFMT {
                libc::S_IFREG if size > super::blocks::MOST_BYTES => return Err(Errno::EFBIG),
                libc::S_IFREG => {}
                libc::S_IFDIR => return Err(Errno::EISDIR),
                _ => return Err(Errno::EINVAL),
            }
            change.set(place + at::SIZE, size);
            self.store.touch(&mut change, place);
        }
        for (which, time) in [(Which::Access, new.atime), (Which::Modification, new.mtime)] {
            if let Some(time) = time {
                change.time(&self.store, place, which, time);
            }
        }
        self.store.commit(change);
        if new.size.is_some() {
            // Also when it has not shrunk: the dead server may have set the size and no more.
            self.store.trim(&mut index.blocks, place);
        }
        self.store.inode(nodeid)
    }

    pub fn read(&self, nodeid: u64, offset: u64, len: usize) -> Res<Vec<u8>> {
        let _index = self.reading();
        Ok(self.store.read_data(self.store.place(nodeid)?, offset, len))
    }

    pub fn write(&self, nodeid: u64, offset: u64, data: &[u8]) -> Res<usize> {
        let index = &mut *self.changing();
        let place = self.store.place(nodeid)?;
        self.store
            .write_data(&mut index.blocks, place, offset, data)
    }

    /// Holes can be made of a range, and blocks of holes; each can be done twice.
    pub fn allocate(&self, nodeid: u64, offset: u64, len: u64, mode: i32) -> Res<()> {
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let index = &mut *self.changing();
        let place = self.store.place(nodeid)?;
        match mode {
            PUNCH => {
                self.store.punch(&mut index.blocks, place, offset, len);
                Ok(())
            }
            0 => {
                self.store
                    .fill_holes(&mut index.blocks, place, offset, len)?;
                let mut change = Change::default();
                if offset + len > self.store.load(place + at::SIZE) {
                    change.set(place + at::SIZE, offset + len);
                }
                self.store.touch(&mut change, place);
                self.store.commit(change);
                Ok(())
            }
            // There would have to be something behind the size.
            _ => Err(Errno::EOPNOTSUPP),
        }
    }

    /// Calls `show` with the entries after a position until it says that there is no more room. With `count`, each
    /// entry that was taken, but `.` and `..`, is one lookup more.
    pub fn read_dir(
        &self,
        nodeid: u64,
        position: u64,
        count: bool,
        mut show: impl FnMut(&Shown<'_>) -> bool,
    ) -> Res<()> {
        let index = self.changing();
        let dir = self.dir(&index, nodeid)?;
        let parent = match dir.parent {
            0 => nodeid,
            parent => parent,
        };
        for (at, name, which) in [(1, b".".as_slice(), nodeid), (2, b"..", parent)] {
            let shown = Shown {
                inode: self.store.inode(which)?,
                position: at,
                name,
            };
            if position < at && show(&shown) {
                return Ok(());
            }
        }
        for record in dir.after(position.max(2)) {
            let entry = self.store.entry(record);
            let shown = Shown {
                inode: self.store.inode(entry.child)?,
                position: entry.position,
                name: &entry.name,
            };
            if show(&shown) {
                return Ok(());
            }
            if count {
                self.count(entry.child)?;
            }
        }
        Ok(())
    }
}
