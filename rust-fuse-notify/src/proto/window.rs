// SPDX-License-Identifier: GPL-2.0

//! How many replays are in flight: as many as there are slots.

/// The number of slots.
///
/// One page of requests: enough that a server with a few threads never waits for the kernel's
/// worker, and small enough that a recovery costs the same memory however many inodes there are.
pub const SLOTS: usize = 64;

/// Which slots are in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    busy: u64,
}

impl Window {
    /// All slots are free.
    pub const fn new() -> Self {
        Self { busy: 0 }
    }

    /// Takes the lowest free slot, if there is one.
    pub fn take(&mut self) -> Option<usize> {
        let slot = self.busy.trailing_ones() as usize;
        if slot >= SLOTS {
            return None;
        }
        self.busy |= 1 << slot;
        Some(slot)
    }

    /// Gives a slot back. Returns false if it was not taken.
    pub fn give(&mut self, slot: usize) -> bool {
        if slot >= SLOTS || self.busy & (1 << slot) == 0 {
            return false;
        }
        self.busy &= !(1 << slot);
        true
    }

    /// How many are taken.
    pub fn in_flight(&self) -> u32 {
        self.busy.count_ones()
    }
}
