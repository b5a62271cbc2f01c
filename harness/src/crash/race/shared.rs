// SPDX-License-Identifier: GPL-2.0
//! What the racing processes share: the clock of the history, and where they wait for each other.

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::mman::{mmap_anonymous, munmap, MapFlags, ProtFlags};

/// Processes that fit.
pub const MOST: usize = 16;
const CLOCK: usize = 0;
const ARRIVED: usize = 1;
/// Not 0: somebody has ended before his time and will not come.
const MISSING: usize = 2;
/// From here on one word a process: how many stamps it took. Odd: it is in a call.
const STAMPS: usize = 8;
const WORDS: usize = STAMPS + MOST;

/// How long a process that waits for others sleeps between two looks.
const LOOK_AGAIN: Duration = Duration::from_micros(100);

/// Memory that all children of this process share with it.
///
/// # Invariants
///
/// `base` is the start of [`WORDS`] mapped words, until drop.
pub struct Shared {
    base: NonNull<AtomicU64>,
}

// SAFETY: the mapping belongs to the process and is accessed through atomics only.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub fn new() -> Result<Shared> {
        let size = NonZeroUsize::new(WORDS * 8).context("no size")?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh anonymous mapping, zeroed, which nobody else knows of.
        let base = unsafe { mmap_anonymous(None, size, prot, MapFlags::MAP_SHARED) };
        // INVARIANT: mapped as asked.
        Ok(Shared {
            base: base.context("no shared memory")?.cast(),
        })
    }

    fn word(&self, word: usize) -> &AtomicU64 {
        assert!(word < WORDS);
        // SAFETY: in bounds by the assertion and the invariant; every bit pattern is a u64.
        unsafe { self.base.add(word).as_ref() }
    }

    /// The next stamp. It is one clock for all: a stamp taken after another one, wherever, is larger.
    pub fn stamp(&self, process: u8) -> u64 {
        self.word(STAMPS + usize::from(process))
            .fetch_add(1, Ordering::SeqCst);
        self.word(CLOCK).fetch_add(1, Ordering::SeqCst) + 1
    }

    /// A stamp for something that is no call.
    pub fn mark(&self) -> u64 {
        self.word(CLOCK).fetch_add(1, Ordering::SeqCst) + 1
    }

    pub fn now(&self) -> u64 {
        self.word(CLOCK).load(Ordering::SeqCst)
    }

    /// For each process how many stamps it took.
    pub fn stamps(&self) -> [u64; MOST] {
        std::array::from_fn(|process| self.word(STAMPS + process).load(Ordering::SeqCst))
    }

    /// Waits until `all` processes have come here for the `nth` time (from 1), or one of them is missing.
    pub fn meet(&self, all: u64, nth: u64) {
        let arrived = self.word(ARRIVED);
        arrived.fetch_add(1, Ordering::SeqCst);
        let missing = || self.word(MISSING).load(Ordering::SeqCst) != 0;
        while arrived.load(Ordering::SeqCst) < all * nth && !missing() {
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// A process ends that the others may wait for. The history is none; they need not hang for that.
    pub fn missing(&self) {
        self.word(MISSING).store(1, Ordering::SeqCst);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; no reference into it outlives `self`.
        let _ = unsafe { munmap(self.base.cast(), WORDS * 8) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_who_has_ended() {
        let shared = Shared::new().unwrap();
        std::thread::scope(|all| {
            let waits = all.spawn(|| shared.meet(2, 1));
            while shared.word(ARRIVED).load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            std::thread::sleep(10 * LOOK_AGAIN);
            assert!(!waits.is_finished());
            shared.missing();
            waits.join().unwrap();
        });
    }

    #[test]
    fn all_leave_when_the_last_one_comes() {
        let shared = Shared::new().unwrap();
        std::thread::scope(|all| {
            all.spawn(|| (1..4).for_each(|nth| shared.meet(2, nth)));
            all.spawn(|| (1..4).for_each(|nth| shared.meet(2, nth)));
        });
        assert_eq!(shared.word(ARRIVED).load(Ordering::SeqCst), 6);
    }
}
