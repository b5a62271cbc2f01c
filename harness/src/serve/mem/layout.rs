// SPDX-License-Identifier: GPL-2.0
//! Where things are in the arena.
//!
//! ```text
//! 0        header: magic, capacities, number of the last change
//! 0x1000   the change that is being made: count, then (place, value) pairs
//! 0x2000   inodes, 128 bytes each | names, 320 bytes each | blocks, 4096 bytes each
//! ```
//!
//! A record whose first word is 0 is free. Nothing else says what is free: allocation is found out at every start, by
//! looking at what is reached. So nothing can leak, whenever the server dies.

/// "FUSEmem" and the byte order; stored last.
pub const MAGIC: u64 = u64::from_ne_bytes(*b"FUSEmem\x01");
pub const MAGIC_AT: usize = 0;
pub const INODES_AT: usize = 8;
pub const NAMES_AT: usize = 16;
pub const BLOCKS_AT: usize = 24;
/// How many changes were made, ever.
pub const CHANGES_AT: usize = 32;
/// One more than the highest record that was ever used: what is behind takes no memory, not even to be looked at.
pub const INODES_USED_AT: usize = 40;
pub const NAMES_USED_AT: usize = 48;

/// How many pairs of the log are valid; 0: no change is being made.
pub const LOG_AT: usize = 0x1000;
pub const PAIRS_AT: usize = LOG_AT + 16;
pub const MOST_PAIRS: usize = (TABLES_AT - PAIRS_AT) / 16;

pub const TABLES_AT: usize = 0x2000;
pub const PAGE: usize = 4096;

/// Of an inode.
pub mod inode {
    pub const LEN: usize = 128;
    /// 0, or the nodeid: the number of the slot, and a stamp in the upper half.
    pub const NODEID: usize = 0;
    /// How often the kernel looked it up. Not part of any change: one word, set anew by each replay.
    pub const LOOKUPS: usize = 8;
    /// Mode, and link count in the upper half.
    pub const MODE: usize = 16;
    /// User, and group in the upper half.
    pub const OWNER: usize = 24;
    pub const SIZE: usize = 32;
    pub const RDEV: usize = 40;
    /// Seconds of access, modification, change.
    pub const TIMES: [usize; 3] = [48, 56, 64];
    /// Nanoseconds of access, and of modification in the upper half.
    pub const NANOS: usize = 72;
    /// Nanoseconds of change.
    pub const CHANGE_NANOS: usize = 80;
    /// The tree of blocks: block number, and height in the upper byte. 0: no data.
    pub const DATA: usize = 88;
    /// Block of the first extended attribute; 0: none.
    pub const XATTRS: usize = 96;
}

/// Of a name.
pub mod name {
    pub const LEN: usize = 320;
    /// 0, or the nodeid that has the name.
    pub const CHILD: usize = 0;
    /// Nodeid of the directory.
    pub const PARENT: usize = 8;
    /// Position in the directory: never used twice.
    pub const COOKIE: usize = 16;
    pub const BYTES_LEN: usize = 24;
    pub const BYTES: usize = 32;
    pub const MOST_BYTES: usize = 255;
}

/// Of an extended attribute, in a block of its own.
pub mod xattr {
    /// Block of the next one; 0: none.
    pub const NEXT: usize = 0;
    /// Bytes of the name, and of the value in the upper half.
    pub const LENS: usize = 8;
    /// The name, then the value.
    pub const BYTES: usize = 16;
    pub const MOST_BYTES: usize = super::PAGE - BYTES;
}

/// How many of each there can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub inodes: u32,
    pub names: u32,
    pub blocks: u32,
}

impl Layout {
    /// For an arena of `len` bytes: an inode and two names for each 16 KiB.
    pub fn of(len: usize) -> Option<Layout> {
        let room = len.checked_sub(TABLES_AT)?;
        let inodes = u32::try_from(room / (16 << 10)).ok()?.max(16);
        let mut layout = Layout {
            inodes,
            names: inodes.checked_mul(2)?,
            blocks: 0,
        };
        layout.blocks = u32::try_from(len.checked_sub(layout.blocks_at())? / PAGE).ok()?;
        // Number 0 is none.
        (layout.blocks > 16).then_some(layout)
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.blocks_at() + self.blocks as usize * PAGE
    }

    pub fn inode(&self, slot: u32) -> usize {
        assert!(slot < self.inodes, "there is no inode {slot}");
        TABLES_AT + slot as usize * inode::LEN
    }

    fn names_at(&self) -> usize {
        (TABLES_AT + self.inodes as usize * inode::LEN).next_multiple_of(PAGE)
    }

    pub fn name(&self, slot: u32) -> usize {
        assert!(slot < self.names, "there is no name {slot}");
        self.names_at() + slot as usize * name::LEN
    }

    fn blocks_at(&self) -> usize {
        (self.names_at() + self.names as usize * name::LEN).next_multiple_of(PAGE)
    }

    /// A place that may be one of a change: a word of an inode, what has a name, the next extended attribute.
    pub fn in_change(&self, place: u64) -> Option<usize> {
        let place = usize::try_from(place).ok()?;
        let inodes = TABLES_AT..TABLES_AT + self.inodes as usize * inode::LEN;
        let (names, blocks) = (self.names_at(), self.blocks_at());
        let names = (names..names + self.names as usize * name::LEN)
            .contains(&place)
            .then(|| (place - names) % name::LEN == name::CHILD);
        let blocks = (blocks + PAGE..blocks + self.blocks as usize * PAGE)
            .contains(&place)
            .then(|| (place - blocks) % PAGE == xattr::NEXT);
        let inodes = inodes.contains(&place).then_some(place % 8 == 0);
        inodes.or(names).or(blocks)?.then_some(place)
    }

    pub fn block(&self, block: u32) -> usize {
        assert!(
            block != 0 && block < self.blocks,
            "there is no block {block}"
        );
        self.blocks_at() + block as usize * PAGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_has_its_place() {
        assert_eq!(Layout::of(0), None);
        assert_eq!(Layout::of(64 << 10), None);
        let layout = Layout::of(1 << 20).unwrap();
        assert!(layout.len() <= 1 << 20 && layout.len() + PAGE > 1 << 20);
        assert!(layout.inode(layout.inodes - 1) + inode::LEN <= layout.name(0));
        assert!(layout.name(layout.names - 1) + name::LEN <= layout.block(1));
        assert_eq!(layout.block(layout.blocks - 1) + PAGE, layout.len());
        assert_eq!(layout.block(1) % PAGE, 0);
        let last = layout.block(layout.blocks - 1) as u64;
        for place in [TABLES_AT as u64 + 8, layout.name(3) as u64, last] {
            assert_eq!(layout.in_change(place), Some(place as usize));
            assert_eq!(layout.in_change(place + 4), None);
        }
        assert_eq!(layout.in_change(last + PAGE as u64), None);
    }
}
