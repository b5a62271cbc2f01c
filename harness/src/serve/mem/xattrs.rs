// SPDX-License-Identifier: GPL-2.0
//! Extended attributes: a chain of blocks, one for each.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;

use super::inode::{Time, Which};
use super::layout::{inode, xattr as at};
use super::once::{Kept, Opcode};
use super::store::{Change, Res, Store};
use super::tree::Tree;

/// One that was found.
#[derive(Clone, Copy)]
struct Found {
    block: u32,
    /// The word that points to it.
    pointer: usize,
}

impl Store {
    /// Calls `each` with the block of every attribute, and the word that points to it.
    pub fn each_xattr(&self, file: usize, each: &mut impl FnMut(u32, usize)) {
        let mut pointer = file + inode::XATTRS;
        loop {
            let block = self.load(pointer) as u32;
            if block == 0 {
                return;
            }
            each(block, pointer);
            pointer = self.layout.block(block) + at::NEXT;
        }
    }

    fn xattr(&self, block: u32) -> (Vec<u8>, Vec<u8>) {
        let place = self.layout.block(block);
        let lens = self.load(place + at::LENS);
        let name = (lens as u32 as usize).min(at::MOST_BYTES);
        let value = ((lens >> 32) as usize).min(at::MOST_BYTES - name);
        let mut bytes = vec![0; name + value];
        self.read(place + at::BYTES, &mut bytes);
        let value = bytes.split_off(name);
        (bytes, value)
    }

    fn find_xattr(&self, file: usize, name: &[u8]) -> Option<Found> {
        let mut found = None;
        self.each_xattr(file, &mut |block, pointer| {
            if found.is_none() && self.xattr(block).0 == name {
                found = Some(Found { block, pointer });
            }
        });
        found
    }
}

/// The kernel checks the namespace; what would have to be understood here is refused.
fn valid(name: &OsStr) -> Res<&[u8]> {
    match name.as_bytes() {
        system if system.starts_with(b"system.") => Err(Errno::EOPNOTSUPP),
        long if long.len() > 255 => Err(Errno::ERANGE),
        name => Ok(name),
    }
}

impl Tree {
    pub fn get_xattr(&self, nodeid: u64, name: &OsStr) -> Res<Vec<u8>> {
        let _index = self.reading();
        let file = self.store.place(nodeid)?;
        let found = self.store.find_xattr(file, valid(name)?);
        Ok(self.store.xattr(found.ok_or(Errno::ENODATA)?.block).1)
    }

    /// The names, each with its NUL.
    pub fn list_xattrs(&self, nodeid: u64) -> Res<Vec<u8>> {
        let _index = self.reading();
        let mut list = Vec::new();
        self.store
            .each_xattr(self.store.place(nodeid)?, &mut |block, _| {
                list.extend(self.store.xattr(block).0);
                list.push(0);
            });
        Ok(list)
    }

    pub fn set_xattr(
        &self,
        unique: u64,
        nodeid: u64,
        name: &OsStr,
        value: &[u8],
        flags: i32,
    ) -> Kept<'_, ()> {
        let name = valid(name)?;
        if let Some(slot) = self.answered(unique)? {
            return Ok(((), Some(slot)));
        }
        let index = &mut *self.changing();
        let file = self.store.place(nodeid)?;
        let old = self.store.find_xattr(file, name);
        match old {
            Some(_) if flags & libc::XATTR_CREATE != 0 => return Err(Errno::EEXIST),
            None if flags & libc::XATTR_REPLACE != 0 => return Err(Errno::ENODATA),
            _ => {}
        }
        if name.len() + value.len() > at::MOST_BYTES {
            return Err(Errno::ENOSPC);
        }
        let new = self.store.new_block(&mut index.blocks)?;
        let place = self.store.layout.block(new);
        // A new one comes first; one that is replaced stays where it was.
        let (pointer, next) = match old {
            Some(old) => {
                let next = self.store.layout.block(old.block) + at::NEXT;
                (old.pointer, self.store.load(next))
            }
            None => {
                let first = file + inode::XATTRS;
                (first, self.store.load(first))
            }
        };
        self.store.store(place + at::NEXT, next);
        let lens = name.len() as u64 | (value.len() as u64) << 32;
        self.store.store(place + at::LENS, lens);
        self.store.write(place + at::BYTES, &[name, value].concat());
        let mut change = Change::default();
        change.set(pointer, u64::from(new));
        change.time(&self.store, file, Which::Change, Time::now());
        let slot = self.once(unique, Opcode::SetXattr, change);
        let unused = if slot.is_ok() {
            old.map(|old| old.block)
        } else {
            Some(new)
        };
        unused
            .into_iter()
            .for_each(|block| index.blocks.give(block));
        Ok(((), Some(slot?)))
    }

    pub fn remove_xattr(&self, unique: u64, nodeid: u64, name: &OsStr) -> Kept<'_, ()> {
        let name = valid(name)?;
        if let Some(slot) = self.answered(unique)? {
            return Ok(((), Some(slot)));
        }
        let index = &mut *self.changing();
        let file = self.store.place(nodeid)?;
        let found = self.store.find_xattr(file, name).ok_or(Errno::ENODATA)?;
        let next = self.store.layout.block(found.block) + at::NEXT;
        let mut change = Change::default();
        change.set(found.pointer, self.store.load(next));
        change.time(&self.store, file, Which::Change, Time::now());
        let slot = self.once(unique, Opcode::RemoveXattr, change)?;
        index.blocks.give(found.block);
        Ok(((), Some(slot)))
    }
}
