// SPDX-License-Identifier: GPL-2.0
//! What is free of a table: found out at the start, and never written down.

/// A bitmap; the lowest free number is taken first.
pub struct Free {
    used: Vec<u64>,
    capacity: u32,
    live: u32,
    /// No word before this one has a free bit.
    hint: usize,
}

impl Free {
    /// Numbers below `capacity` are free, but those below `reserved`.
    pub fn new(capacity: u32, reserved: u32) -> Free {
        let mut free = Free {
            used: vec![0; capacity.div_ceil(64) as usize],
            capacity,
            live: 0,
            hint: 0,
        };
        (0..reserved).for_each(|number| assert!(free.mark(number)));
        free
    }

    /// Marks one as used; `false` if it was, or cannot be.
    pub fn mark(&mut self, number: u32) -> bool {
        let bit = 1 << (number % 64);
        match self.used.get_mut(number as usize / 64) {
            Some(word) if number < self.capacity && *word & bit == 0 => {
                *word |= bit;
                self.live += 1;
                true
            }
            _ => false,
        }
    }

    pub fn take(&mut self) -> Option<u32> {
        while *self.used.get(self.hint)? == u64::MAX {
            self.hint += 1;
        }
        let number = self.hint as u32 * 64 + self.used[self.hint].trailing_ones();
        self.mark(number).then_some(number)
    }

    pub fn give(&mut self, number: u32) {
        let (word, bit) = (number as usize / 64, 1 << (number % 64));
        if self.used[word] & bit != 0 {
            self.used[word] &= !bit;
            self.live -= 1;
            self.hint = self.hint.min(word);
        }
    }

    pub fn left(&self) -> u32 {
        self.capacity - self.live
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_is_taken_once_and_the_lowest_first() {
        let mut free = Free::new(70, 1);
        assert_eq!(free.left(), 69);
        let all: Vec<u32> = std::iter::from_fn(|| free.take()).collect();
        assert_eq!(all, (1..70).collect::<Vec<_>>());
        assert_eq!((free.left(), free.take(), free.mark(70)), (0, None, false));
        free.give(66);
        free.give(3);
        free.give(3);
        assert_eq!(free.left(), 2);
        assert!(!free.mark(4) && free.mark(3));
        assert_eq!((free.take(), free.take()), (Some(66), None));
    }
}
