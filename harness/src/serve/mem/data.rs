// SPDX-License-Identifier: GPL-2.0
//! Data of files: read, write, truncate, punch.
//!
//! Bytes are stored in place, for a WRITE that is sent again stores the same ones. The size comes after the bytes and, when a
//! file shrinks, before they go; with the times it is one change.

use nix::errno::Errno;

use super::blocks::MOST_BYTES;
use super::free::Free;
use super::inode::{Time, Which};
use super::layout::{inode as at, PAGE};
use super::store::{Change, Res, Store};

const PAGE_BYTES: u64 = PAGE as u64;

/// The pieces of a range that lie in one block each: block, offset in it, bytes.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize)> {
    let end = offset + len as u64;
    let mut at = offset;
    std::iter::from_fn(move || {
        let within = (at % PAGE_BYTES) as usize;
        let bytes = (PAGE - within).min((end - at) as usize);
        let piece = (at / PAGE_BYTES, within, bytes);
        at += bytes as u64;
        (bytes > 0).then_some(piece)
    })
}

impl Store {
    pub fn read_data(&self, inode: usize, offset: u64, len: usize) -> Vec<u8> {
        let size = self.load(inode + at::SIZE);
        let len = len.min(usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX));
        let mut data = vec![0; len];
        let mut done = 0;
        for (block, within, bytes) in pieces(offset, len) {
            if let Some(block) = self.find_block(inode, block) {
                let place = self.layout.block(block) + within;
                self.read(place, &mut data[done..done + bytes]);
            }
            done += bytes;
        }
        data
    }

    /// How many bytes were written: less than all if there is no room for the rest.
    pub fn write_data(
        &self,
        free: &mut Free,
        inode: usize,
        offset: u64,
        data: &[u8],
    ) -> Res<usize> {
        if offset.saturating_add(data.len() as u64) > MOST_BYTES {
            return Err(Errno::EFBIG);
        }
        let mut done = 0;
        for (block, within, bytes) in pieces(offset, data.len()) {
            let part = &data[done..done + bytes];
            let added = match self.find_block(inode, block) {
                Some(block) => {
                    self.write(self.layout.block(block) + within, part);
                    Ok(())
                }
                None => {
                    self.add_block(free, inode, block, |place| self.write(place + within, part))
                }
            };
            match added {
                Ok(()) => done += bytes,
                Err(e) if done == 0 => return Err(e),
                Err(_) => break,
            }
        }
        let mut change = Change::default();
        let end = offset + done as u64;
        if end > self.load(inode + at::SIZE) {
            change.set(inode + at::SIZE, end);
        }
        self.touch(&mut change, inode);
        self.commit(change);
        Ok(done)
    }

    /// Its data has changed now.
    pub fn touch(&self, change: &mut Change, inode: usize) {
        let now = Time::now();
        change.time(self, inode, Which::Modification, now);
        change.time(self, inode, Which::Change, now);
    }

    /// Nothing is behind the size. Called when it has shrunk, and for every file at the start.
    pub fn trim(&self, free: &mut Free, inode: usize) {
        let size = self.load(inode + at::SIZE);
        self.drop_blocks(free, inode, size.div_ceil(PAGE_BYTES), u64::MAX);
        self.clear_in_block(inode, size, PAGE_BYTES - size % PAGE_BYTES);
    }

    /// Zeroes a part of one block, if there is one.
    fn clear_in_block(&self, inode: usize, offset: u64, len: u64) {
        if let Some(block) = self.find_block(inode, offset / PAGE_BYTES) {
            let place = self.layout.block(block) + (offset % PAGE_BYTES) as usize;
            self.clear(place, len as usize);
        }
    }

    /// Makes a range a hole; the size stays.
    pub fn punch(&self, free: &mut Free, inode: usize, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(MOST_BYTES);
        let (first, last) = (offset.div_ceil(PAGE_BYTES), end / PAGE_BYTES);
        if first > last {
            self.clear_in_block(inode, offset, end.saturating_sub(offset));
        } else {
            if !offset.is_multiple_of(PAGE_BYTES) {
                self.clear_in_block(inode, offset, first * PAGE_BYTES - offset);
            }
            if !end.is_multiple_of(PAGE_BYTES) {
                self.clear_in_block(inode, last * PAGE_BYTES, end % PAGE_BYTES);
            }
            self.drop_blocks(free, inode, first, last);
        }
        let mut change = Change::default();
        self.touch(&mut change, inode);
        self.commit(change);
    }

    /// Makes blocks of the holes in a range; all of them, or none behind the size.
    pub fn fill_holes(&self, free: &mut Free, inode: usize, offset: u64, len: u64) -> Res<()> {
        let end = offset
            .checked_add(len)
            .filter(|end| *end <= MOST_BYTES)
            .ok_or(Errno::EFBIG)?;
        for block in offset / PAGE_BYTES..end.div_ceil(PAGE_BYTES) {
            if self.find_block(inode, block).is_none() {
                // What there was room for would be nobody's until the next start.
                self.add_block(free, inode, block, |_| ())
                    .inspect_err(|_| self.trim(free, inode))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_at_the_ends_of_blocks() {
        let cut = |offset, len| pieces(offset, len).collect::<Vec<_>>();
        assert_eq!(cut(5, 0), []);
        assert_eq!(cut(5, 10), [(0, 5, 10)]);
        assert_eq!(cut(4090, 10), [(0, 4090, 6), (1, 0, 4)]);
        assert_eq!(cut(4096, 8192), [(1, 0, 4096), (2, 0, 4096)]);
    }
}
