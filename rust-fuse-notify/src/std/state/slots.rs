// SPDX-License-Identifier: GPL-2.0
//! Which slots of a table are in use: a bitmap in process memory, rebuilt from the table at start.
//!
//! The lowest free slot is always taken first, so that a table stays dense and its end can be given back.

/// A bitmap of slots, as long as it needs to be.
#[derive(Debug)]
pub(super) struct Slots {
    used: Vec<u64>,
    capacity: u32,
    live: usize,
    /// No word before this one has a free bit.
    hint: usize,
}

impl Slots {
    pub(super) fn new(capacity: u32) -> Slots {
        Slots {
            used: Vec::new(),
            capacity,
            live: 0,
            hint: 0,
        }
    }

    /// Marks a slot that was found in use, or reserves it. `false` if it was marked already.
    pub(super) fn mark(&mut self, slot: u32) -> bool {
        let (word, bit) = place(slot);
        if self.used.len() <= word {
            self.used.resize(word + 1, 0);
        }
        let fresh = self.used[word] & bit == 0;
        self.used[word] |= bit;
        self.live += usize::from(fresh);
        fresh
    }

    /// Takes the lowest free slot.
    pub(super) fn take(&mut self) -> Option<u32> {
        while self.used.get(self.hint) == Some(&u64::MAX) {
            self.hint += 1;
        }
        let free = self
            .used
            .get(self.hint)
            .map_or(0, |word| word.trailing_ones());
        let slot = u32::try_from(self.hint)
            .ok()?
            .checked_mul(64)?
            .checked_add(free)?;
        if slot >= self.capacity {
            return None;
        }
        self.mark(slot);
        Some(slot)
    }

    /// Gives a slot back.
    pub(super) fn give(&mut self, slot: u32) {
        let (word, bit) = place(slot);
        if self.used.get(word).is_some_and(|bits| bits & bit != 0) {
            self.used[word] &= !bit;
            self.live -= 1;
            self.hint = self.hint.min(word);
        }
    }

    /// Slots in use.
    pub(super) fn live(&self) -> usize {
        self.live
    }

    /// One more than the highest slot that was ever in use.
    pub(super) fn end(&self) -> u32 {
        (self.used.len() as u32)
            .saturating_mul(64)
            .min(self.capacity)
    }

    /// Whether none of `count` slots from `first` on is in use; both are multiples of 16, `count` is 16.
    pub(super) fn is_group_free(&self, first: u32) -> bool {
        let (word, _) = place(first);
        self.used
            .get(word)
            .is_none_or(|bits| (bits >> (first % 64)) & 0xffff == 0)
    }
}

fn place(slot: u32) -> (usize, u64) {
    ((slot / 64) as usize, 1 << (slot % 64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_as_a_set(ops in proptest::collection::vec((any::<bool>(), 0u32..300), 0..600)) {
            let mut slots = Slots::new(200);
            let mut model = BTreeSet::new();
            for (take, which) in ops {
                if take {
                    let want = (0..200).find(|slot| !model.contains(slot));
                    prop_assert_eq!(slots.take(), want);
                    model.extend(want);
                } else {
                    slots.give(which);
                    model.remove(&which);
                }
                prop_assert_eq!(slots.live(), model.len());
                let group = which / 16 * 16;
                prop_assert_eq!(slots.is_group_free(group), model.range(group..group + 16).next().is_none());
            }
        }
    }
}
