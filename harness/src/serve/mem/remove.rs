// SPDX-License-Identifier: GPL-2.0
//! Changes that take a name away: unlink, rmdir, rename.

use std::ffi::OsStr;

use nix::errno::Errno;

use super::inode::{Inode, Time, Which};
use super::layout::inode as at;
use super::make::{Caller, New};
use super::names::{valid, Entry};
use super::once::{Kept, Opcode};
use super::store::{Change, Res};
use super::tree::{Index, Tree};

impl Tree {
    /// unlink, and rmdir if `dir`.
    pub fn remove(&self, unique: u64, (parent, name): (u64, &OsStr), dir: bool) -> Kept<'_, ()> {
        let name = valid(name)?;
        if let Some(slot) = self.answered(unique)? {
            return Ok(((), Some(slot)));
        }
        let index = &mut *self.changing();
        let entry = self.find(index, parent, name)?;
        let victim = self.store.inode(entry.child)?;
        match (dir, victim.is_dir()) {
            (true, false) => return Err(Errno::ENOTDIR),
            (false, true) => return Err(Errno::EISDIR),
            _ => {}
        }
        let mut change = Change::default();
        self.lose_name(index, &mut change, &victim, parent)?;
        change.set(self.store.child_at(entry.record), 0);
        self.touch_dir(&mut change, parent)?;
        let opcode = if dir { Opcode::Rmdir } else { Opcode::Unlink };
        let slot = self.once(unique, opcode, change)?;
        self.unnamed(index, &entry);
        self.lost(index, &victim);
        Ok(((), Some(slot)))
    }

    /// A file loses one of its names, a directory the only one.
    fn lose_name(
        &self,
        index: &Index,
        change: &mut Change,
        victim: &Inode,
        parent: u64,
    ) -> Res<()> {
        let place = self.store.place(victim.nodeid)?;
        change.time(&self.store, place, Which::Change, Time::now());
        if !victim.is_dir() {
            change.links(&self.store, place, -1);
            return Ok(());
        }
        if !self.dir(index, victim.nodeid)?.is_empty() {
            return Err(Errno::ENOTEMPTY);
        }
        change.links(&self.store, place, -(victim.nlink as i32));
        change.links(&self.store, self.store.place(parent)?, -1);
        Ok(())
    }

    /// The change was made: a removed directory is below nothing, and what nobody holds goes.
    fn lost(&self, index: &mut Index, victim: &Inode) {
        if let Some(dir) = index.dirs.get_mut(&victim.nodeid) {
            dir.parent = 0;
        }
        self.drop_if_unused(index, victim.nodeid);
    }

    /// The record of a name is free.
    fn unnamed(&self, index: &mut Index, entry: &Entry) {
        if let Some(dir) = index.dirs.get_mut(&entry.parent) {
            dir.remove(entry);
        }
        index.names.give(entry.record);
    }

    pub fn rename(
        &self,
        unique: u64,
        caller: Caller,
        (parent, name): (u64, &OsStr),
        (newparent, newname): (u64, &OsStr),
        flags: u32,
    ) -> Kept<'_, ()> {
        const KNOWN: u32 = libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT;
        if flags & !KNOWN != 0 {
            return Err(Errno::EINVAL);
        }
        let (name, newname) = (valid(name)?, valid(newname)?);
        if let Some(slot) = self.answered(unique)? {
            return Ok(((), Some(slot)));
        }
        let index = &mut *self.changing();
        let from = self.find(index, parent, name)?;
        let to = match self.find(index, newparent, newname) {
            Ok(_) if flags & libc::RENAME_NOREPLACE != 0 => return Err(Errno::EEXIST),
            Ok(to) => Some(to),
            Err(Errno::ENOENT) => None,
            Err(e) => return Err(e),
        };
        if to.as_ref().is_some_and(|to| to.child == from.child) {
            return Ok(((), None)); // two names of one file: as often as one likes
        }
        let slot = match (to, flags & libc::RENAME_EXCHANGE != 0) {
            (Some(to), true) => self.exchange(unique, index, &from, &to)?,
            (None, true) => return Err(Errno::ENOENT),
            (to, false) => {
                let whiteout = flags & libc::RENAME_WHITEOUT != 0;
                let whiteout = whiteout.then_some(caller);
                self.move_name(unique, index, (&from, whiteout), (newparent, newname, to))?
            }
        };
        Ok(((), Some(slot)))
    }

    /// What every rename changes: times, and the links of the directories if one moves between them.
    fn moved(&self, change: &mut Change, child: &Inode, from: u64, to: u64) -> Res<()> {
        let place = self.store.place(child.nodeid)?;
        change.time(&self.store, place, Which::Change, Time::now());
        self.touch_dir(change, from)?;
        self.touch_dir(change, to)?;
        if child.is_dir() {
            change.links(&self.store, self.store.place(from)?, -1);
            change.links(&self.store, self.store.place(to)?, 1);
        }
        Ok(())
    }

    fn exchange(
        &self,
        unique: u64,
        index: &mut Index,
        from: &Entry,
        to: &Entry,
    ) -> Res<super::once::Slot<'_>> {
        let mut change = Change::default();
        self.moved(
            &mut change,
            &self.store.inode(from.child)?,
            from.parent,
            to.parent,
        )?;
        self.moved(
            &mut change,
            &self.store.inode(to.child)?,
            to.parent,
            from.parent,
        )?;
        change.set(self.store.child_at(from.record), to.child);
        change.set(self.store.child_at(to.record), from.child);
        let slot = self.once(unique, Opcode::Rename, change)?;
        for (child, parent) in [(from.child, to.parent), (to.child, from.parent)] {
            if let Some(dir) = index.dirs.get_mut(&child) {
                dir.parent = parent;
            }
        }
        Ok(slot)
    }

    /// A rename that is no exchange. The new name keeps its record if it is there; the old one goes to the whiteout
    /// if there is to be one.
    fn move_name(
        &self,
        unique: u64,
        index: &mut Index,
        (from, whiteout): (&Entry, Option<Caller>),
        (newparent, newname, to): (u64, &[u8], Option<Entry>),
    ) -> Res<super::once::Slot<'_>> {
        let child = self.store.inode(from.child)?;
        let mut change = Change::default();
        let victim = match &to {
            Some(to) => Some(self.store.inode(to.child)?),
            None => None,
        };
        if let Some(victim) = &victim {
            match (child.is_dir(), victim.is_dir()) {
                (true, false) => return Err(Errno::ENOTDIR),
                (false, true) => return Err(Errno::EISDIR),
                _ => self.lose_name(index, &mut change, victim, newparent)?,
            }
        } else if self.store.inode(newparent)?.nlink == 0 {
            return Err(Errno::ENOENT);
        }
        self.moved(&mut change, &child, from.parent, newparent)?;
        let entry = match &to {
            Some(to) => to.clone(),
            None => self.new_entry(index, newparent, newname)?,
        };
        let made = whiteout.map(|caller| {
            let new = New {
                opcode: Opcode::Rename,
                mode: libc::S_IFCHR,
                rdev: 0,
                target: b"",
            };
            self.prepare(index, caller, from.parent, &new)
        });
        let made = made.transpose();
        let result = made.map(|made| {
            change.set(self.store.child_at(entry.record), from.child);
            change.set(
                self.store.child_at(from.record),
                made.map_or(0, |(_, nodeid)| nodeid),
            );
            if let Some((place, nodeid)) = made {
                change.set(place + at::NODEID, nodeid);
            }
            (self.once(unique, Opcode::Rename, change), made)
        });
        let give_back = |index: &mut Index| {
            if to.is_none() {
                index.names.give(entry.record);
            }
        };
        match result {
            Ok((Ok(slot), made)) => {
                if made.is_none() {
                    self.unnamed(index, from);
                }
                if to.is_none() {
                    self.named(index, &entry);
                }
                if let Some(dir) = index.dirs.get_mut(&from.child) {
                    dir.parent = newparent;
                }
                if let Some(victim) = &victim {
                    self.lost(index, victim);
                }
                Ok(slot)
            }
            Ok((Err(e), made)) => {
                give_back(index);
                if let Some((place, nodeid)) = made {
                    self.unprepare(index, place, nodeid);
                }
                Err(e)
            }
            Err(e) => {
                give_back(index);
                Err(e)
            }
        }
    }
}
