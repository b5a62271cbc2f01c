// SPDX-License-Identifier: GPL-2.0
//! Words in the arena, and changes of many words that are made as one.
//!
//! A change is written to the log as (place, value) pairs; the one store of their count makes it happen. Then the
//! pairs are stored where they belong, and the count goes back to 0. A server that dies before the count was
//! stored has changed nothing; one that dies later has changed everything, for the next one stores the pairs again
//! before it does anything else. To store them twice is to store them once.

use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use rust_fuse_notify::std::state::State;

use crate::crash_points::reach;

use super::error::{Checked, TreeError};
use super::layout::{self as at, Layout};

pub type Res<T> = Result<T, Errno>;

/// Memory is asked for in pieces of this size.
const PIECE: usize = 1 << 20;

pub struct Store {
    pub state: Arc<State>,
    pub layout: Layout,
    /// Pieces for which there is memory.
    reserved: Mutex<Vec<bool>>,
}

impl Store {
    /// Finishes a change that a dead server had begun; lays out an arena that is empty.
    pub fn open(state: Arc<State>) -> Checked<Store> {
        let arena = state.arena();
        let layout = Layout::of(arena.len()).ok_or(TreeError::Small(arena.len()))?;
        let store = Store {
            layout,
            reserved: Mutex::new(vec![false; arena.len().div_ceil(PIECE)]),
            state,
        };
        store.reserve(0, at::TABLES_AT).map_err(TreeError::Memory)?;
        let capacities = [
            (at::INODES_AT, layout.inodes),
            (at::NAMES_AT, layout.names),
            (at::BLOCKS_AT, layout.blocks),
        ];
        match store.load(at::MAGIC_AT) {
            0 => {
                store.check_empty()?;
                for (at, capacity) in capacities {
                    store.store(at, u64::from(capacity));
                }
                store.publish(at::MAGIC_AT, at::MAGIC);
            }
            at::MAGIC => {
                let laid_out = |(at, capacity)| store.load(at) == u64::from(capacity);
                if !capacities.into_iter().all(laid_out) {
                    return Err(TreeError::Version);
                }
                store.check_header()?;
                store.check_log()?;
                store.finish();
            }
            _ => return Err(TreeError::Foreign),
        }
        Ok(store)
    }

    pub fn load(&self, at: usize) -> u64 {
        self.state.arena().load(at)
    }

    pub fn store(&self, at: usize, value: u64) {
        reach("store");
        self.state.arena().store(at, value);
    }

    /// The store that makes valid what was stored before it.
    pub fn publish(&self, at: usize, value: u64) {
        reach("publish");
        self.state.arena().publish(at, value);
        reach("published");
    }

    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        let skip = at % 8;
        if skip == 0 {
            return self.state.arena().read(at, bytes);
        }
        let mut words = vec![0; skip + bytes.len()];
        self.state.arena().read(at - skip, &mut words);
        bytes.copy_from_slice(&words[skip..]);
    }

    /// Stores bytes anywhere, word by word; what is beside them in the first and last word stays.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        let skip = at % 8;
        let (first, rest) = bytes.split_at(bytes.len().min((8 - skip) % 8));
        let (middle, last) = rest.split_at(rest.len() / 8 * 8);
        self.write_part(at, first);
        let mut at = at + first.len();
        for word in middle.chunks_exact(8) {
            reach("store");
            self.state.arena().write(at, word);
            at += 8;
        }
        self.write_part(at, last);
    }

    fn write_part(&self, at: usize, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let (word, skip) = (at / 8 * 8, at % 8);
        let mut whole = self.load(word).to_ne_bytes();
        whole[skip..skip + bytes.len()].copy_from_slice(bytes);
        self.store(word, u64::from_ne_bytes(whole));
    }

    /// Sets a range to zero; what is zero is left alone.
    pub fn clear(&self, at: usize, len: usize) {
        let end = at + len;
        let whole = at.next_multiple_of(8).min(end);
        self.write_part(at, &[0; 8][..whole - at]);
        for at in (whole..end / 8 * 8).step_by(8) {
            if self.load(at) != 0 {
                self.store(at, 0);
            }
        }
        let last = (end / 8 * 8).max(whole);
        self.write_part(last, &[0; 8][..end - last]);
    }

    /// Makes sure that there is memory behind a range, so that no store kills the server.
    pub fn reserve(&self, at: usize, len: usize) -> Res<()> {
        let mut reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        let arena = self.state.arena();
        for piece in at / PIECE..=(at + len.max(1) - 1) / PIECE {
            if !reserved[piece] {
                let start = piece * PIECE;
                let memory = arena.allocate(start, PIECE.min(arena.len() - start));
                memory.map_err(|e| {
                    tracing::warn!("the machine has no memory for the tree: {e}");
                    Errno::ENOSPC
                })?;
                reserved[piece] = true;
            }
        }
        Ok(())
    }

    /// A record of a table is about to be used. `at`: the word that says how many ever were.
    pub fn will_use(&self, at: usize, record: u32) {
        if self.load(at) <= u64::from(record) {
            self.store(at, u64::from(record) + 1);
        }
    }

    /// How many records of a table have to be looked at.
    pub fn used(&self, at: usize, capacity: u32) -> u32 {
        u32::try_from(self.load(at))
            .unwrap_or(capacity)
            .min(capacity)
    }

    /// How many changes were made, ever; the number of the last one.
    pub fn changes(&self) -> u64 {
        self.load(at::CHANGES_AT)
    }

    /// Makes a change; its number is one more than the last one's.
    pub fn commit(&self, mut change: Change) {
        change.set(at::CHANGES_AT, self.changes() + 1);
        assert!(change.0.len() <= at::MOST_PAIRS, "a change is too large");
        for (n, (at, value)) in change.0.iter().enumerate() {
            self.store(at::PAIRS_AT + 16 * n, *at as u64);
            self.store(at::PAIRS_AT + 16 * n + 8, *value);
        }
        self.publish(at::LOG_AT, change.0.len() as u64);
        self.finish();
    }

    /// Stores the pairs of the log where they belong.
    fn finish(&self) {
        let pairs = self.load(at::LOG_AT) as usize;
        if pairs == 0 {
            return;
        }
        for n in 0..pairs.min(at::MOST_PAIRS) {
            let place = self.load(at::PAIRS_AT + 16 * n) as usize;
            self.store(place, self.load(at::PAIRS_AT + 16 * n + 8));
        }
        self.publish(at::LOG_AT, 0);
    }
}

/// Words that are to change together. Each place stands once in it.
#[derive(Debug, Default)]
pub struct Change(Vec<(usize, u64)>);

impl Change {
    pub fn set(&mut self, at: usize, value: u64) {
        match self.0.iter_mut().find(|(place, _)| *place == at) {
            Some((_, old)) => *old = value,
            None => self.0.push((at, value)),
        }
    }

    /// What the word will be.
    pub fn get(&self, store: &Store, at: usize) -> u64 {
        let own = self.0.iter().find(|(place, _)| *place == at);
        own.map_or_else(|| store.load(at), |(_, value)| *value)
    }
}
