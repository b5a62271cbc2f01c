// SPDX-License-Identifier: GPL-2.0
//! The blocks of a file: a tree of 512 pointers a node, as high as the file needs it.
//!
//! A block is filled first, then one store in its parent makes it a part of the file; one store takes it away. No
//! change of the log is needed: what a file holds behind its size is nothing, and is taken away at the next start.

use nix::errno::Errno;

use super::free::Free;
use super::layout::{inode as at, PAGE};
use super::store::{Res, Store};

pub const FAN_OUT: u64 = 512;
/// 512 to the third, times 4 KiB: 512 GiB.
pub const MOST_HEIGHT: u32 = 3;

/// The largest file, in bytes.
pub const MOST_BYTES: u64 = FAN_OUT.pow(MOST_HEIGHT) * PAGE as u64;

/// The word in an inode: a block number and the height of the tree above the data.
pub fn root(word: u64) -> (u32, u32) {
    (word as u32, (word >> 56) as u32)
}

pub fn root_word(block: u32, height: u32) -> u64 {
    u64::from(block) | u64::from(height) << 56
}

/// How many blocks of data a tree of this height holds.
fn room(height: u32) -> u64 {
    FAN_OUT.pow(height)
}

impl Store {
    /// A block of zeroes that nothing points to.
    pub fn new_block(&self, free: &mut Free) -> Res<u32> {
        let block = free.take().ok_or(Errno::ENOSPC)?;
        let place = self.layout.block(block);
        if let Err(e) = self.reserve(place, PAGE) {
            free.give(block);
            return Err(e);
        }
        self.clear(place, PAGE);
        Ok(block)
    }

    /// The block number `index` of the file whose record is at `inode`; `None`: a hole.
    pub fn find_block(&self, inode: usize, index: u64) -> Option<u32> {
        let (mut block, mut height) = root(self.load(inode + at::DATA));
        if block == 0 || index >= room(height) {
            return None;
        }
        while height > 0 {
            height -= 1;
            block = self.load(self.pointer(block, index, height)) as u32;
            if block == 0 {
                return None;
            }
        }
        Some(block)
    }

    /// Where a node above subtrees of `height` has the pointer for `index`.
    fn pointer(&self, node: u32, index: u64, height: u32) -> usize {
        let which = index / room(height) % FAN_OUT;
        self.layout.block(node) + which as usize * 8
    }

    /// Makes a hole a block, whose content `fill` stores before it becomes a part of the file.
    pub fn add_block(
        &self,
        free: &mut Free,
        inode: usize,
        index: u64,
        fill: impl FnOnce(usize),
    ) -> Res<()> {
        let (mut node, mut height) = root(self.load(inode + at::DATA));
        if node == 0 {
            height = (0..=MOST_HEIGHT)
                .find(|height| index < room(*height))
                .ok_or(Errno::EFBIG)?;
        }
        // Higher, by a new root above the old one.
        while node != 0 && index >= room(height) {
            if height == MOST_HEIGHT {
                return Err(Errno::EFBIG);
            }
            let above = self.new_block(free)?;
            self.store(self.layout.block(above), u64::from(node));
            height += 1;
            self.publish(inode + at::DATA, root_word(above, height));
            node = above;
        }
        let mut parent = inode + at::DATA;
        let mut upper = height;
        loop {
            if node == 0 {
                node = self.new_block(free)?;
                let word = match upper == height {
                    true => root_word(node, height),
                    false => u64::from(node),
                };
                if upper == 0 {
                    fill(self.layout.block(node));
                    self.publish(parent, word);
                    return Ok(());
                }
                self.publish(parent, word);
            }
            assert!(upper > 0, "block {index} is no hole");
            upper -= 1;
            parent = self.pointer(node, index, upper);
            node = self.load(parent) as u32;
        }
    }

    /// Takes the blocks from `first` up to `end` away; nodes of the tree that are left without any go as well.
    pub fn drop_blocks(&self, free: &mut Free, inode: usize, first: u64, end: u64) {
        let (block, height) = root(self.load(inode + at::DATA));
        if block != 0 && self.prune(free, block, height, 0, (first, end)) {
            self.publish(inode + at::DATA, 0);
            free.give(block);
        }
    }

    /// Whether nothing is left of the subtree, whose first block is `base`; the caller takes its root away.
    fn prune(&self, free: &mut Free, node: u32, height: u32, base: u64, cut: (u64, u64)) -> bool {
        let (first, end) = cut;
        if height == 0 {
            return base >= first && base < end;
        }
        let below = room(height - 1);
        let mut left = false;
        for which in 0..FAN_OUT {
            let place = self.layout.block(node) + which as usize * 8;
            let child = self.load(place) as u32;
            if child == 0 {
                continue;
            }
            let start = base + which * below;
            let touched = start < end && start + below > first;
            if touched && self.prune(free, child, height - 1, start, cut) {
                self.publish(place, 0);
                free.give(child);
            } else {
                left = true;
            }
        }
        !left
    }

    /// Calls `each` with every block of a file, those of the tree among them.
    pub fn each_block(&self, inode: usize, each: &mut impl FnMut(u32)) {
        let (block, height) = root(self.load(inode + at::DATA));
        if block != 0 {
            self.each_below(block, height, each);
        }
    }

    fn each_below(&self, node: u32, height: u32, each: &mut impl FnMut(u32)) {
        each(node);
        if height == 0 {
            return;
        }
        for which in 0..FAN_OUT as usize {
            let child = self.load(self.layout.block(node) + which * 8) as u32;
            if child != 0 {
                self.each_below(child, height - 1, each);
            }
        }
    }
}
