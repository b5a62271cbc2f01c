// SPDX-License-Identifier: GPL-2.0
//! Memory of the server's own, beside the tables.

use std::io;
use std::sync::Arc;

use super::region::{Region, WORD};

/// Words of 8 bytes in the memfd whose meaning is the server's alone: [`super::Config::arena_pages`] of them are laid
/// out. They are zero at first.
///
/// What SIGKILL leaves is every completed store in program order. So store first what nothing points to yet, then make
/// it valid with one [`Arena::publish`].
///
/// # Panics
///
/// Every method, if an offset is outside of [`Arena::len`] or not a multiple of 8.
#[derive(Debug)]
pub struct Arena {
    region: Arc<Region>,
    base: usize,
    len: usize,
}

impl Arena {
    pub(super) fn new(region: Arc<Region>, base: usize, len: usize) -> Arena {
        Arena { region, base, len }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the state was laid out without one.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// One word. What was stored before the [`Arena::publish`] that it is from is visible afterwards.
    pub fn load(&self, offset: usize) -> u64 {
        self.region.load_published(self.at(offset, WORD))
    }

    /// Stores one word.
    pub fn store(&self, offset: usize, value: u64) {
        self.region.store(self.at(offset, WORD), value);
    }

    /// Stores one word after everything that this thread stored before.
    pub fn publish(&self, offset: usize, value: u64) {
        self.region.publish(self.at(offset, WORD), value);
    }

    /// Fills `bytes` from `offset` on.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.region.read(self.at(offset, bytes.len()), bytes);
    }

    /// Stores `bytes` from `offset` on, word by word; a last word that is not full is filled with zeroes.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.region.write(self.at(offset, bytes.len()), bytes);
    }

    /// Makes sure that there is memory for a range; what was stored there stays. Storing where there is none can kill
    /// the process (SIGBUS) when the machine has none left.
    ///
    /// # Errors
    /// `ENOSPC` or `ENOMEM`: there is none.
    pub fn allocate(&self, offset: usize, len: usize) -> io::Result<()> {
        self.region.allocate(self.at(offset, len), len)
    }

    fn at(&self, offset: usize, len: usize) -> usize {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "{len} bytes at {offset:#x} are outside of the arena"
        );
        self.base + offset
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::SMALL;
    use super::super::{Config, State};
    use crate::std::wire::Identity;

    const ID: Identity = Identity([3, 4]);

    #[test]
    fn what_is_stored_is_there_for_the_next_instance() {
        let memfd = State::create_memfd().unwrap();
        let config = Config {
            arena_pages: 3,
            ..SMALL
        };
        let state = State::open(memfd.try_clone().unwrap(), ID, &config).unwrap();
        assert_eq!(state.arena().len(), 3 * 4096);
        state.arena().allocate(0, 3 * 4096).unwrap();
        state.arena().write(8, b"twelve bytes");
        state.arena().publish(3 * 4096 - 8, 77);
        state.nodes().set_root(&super::super::tests::node(0));
        drop(state);
        // Another configuration does not change what is there.
        let state = State::open(memfd, ID, &SMALL).unwrap();
        let mut bytes = [0; 12];
        state.arena().read(8, &mut bytes);
        assert_eq!(&bytes, b"twelve bytes");
        assert_eq!(
            (state.arena().load(0), state.arena().load(3 * 4096 - 8)),
            (0, 77)
        );
        assert_eq!(state.nodes().len(), 1);
    }

    #[test]
    #[should_panic(expected = "outside of the arena")]
    fn nothing_outside_is_touched() {
        let state = State::open(State::create_memfd().unwrap(), ID, &SMALL).unwrap();
        assert!(state.arena().is_empty());
        state.arena().store(0, 1);
    }
}
