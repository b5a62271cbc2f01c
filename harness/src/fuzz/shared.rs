// SPDX-License-Identifier: GPL-2.0
//! Numbers that every process of a case adds to, and the word that ends its applications.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use anyhow::{Context, Result};
use nix::sys::mman::{mmap_anonymous, MapFlags, ProtFlags};

#[derive(Default)]
pub struct Shared {
    server_ops: AtomicU64,
    writes: AtomicU64,
    messages: AtomicU64,
    recoveries: AtomicU64,
    app_ops: AtomicU64,
    stop: AtomicBool,
    /// The first result that must not be: application, step and errno, plus one.
    wrong: AtomicU64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub server_ops: u64,
    /// Writes to the device.
    pub writes: u64,
    /// Messages read from it.
    pub messages: u64,
    pub recoveries: u64,
    pub app_ops: u64,
}

impl Counts {
    /// What was done to the device, and what applications did.
    pub fn operations(&self) -> u64 {
        self.writes + self.messages + self.app_ops
    }
}

impl Shared {
    pub fn new() -> Result<&'static Shared> {
        let size = NonZeroUsize::new(size_of::<Shared>()).expect("not zero");
        // SAFETY: a fresh anonymous mapping; it is never unmapped, so a reference may live for ever.
        let memory = unsafe {
            mmap_anonymous(
                None,
                size,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
            )
        }
        .context("cannot map shared memory")?;
        // SAFETY: page-aligned, large enough, and zeros are valid for atomics.
        Ok(unsafe { memory.cast::<Shared>().as_ref() })
    }

    pub fn server_op(&self) {
        self.server_ops.fetch_add(1, SeqCst);
    }

    pub fn write(&self) {
        self.writes.fetch_add(1, SeqCst);
    }

    pub fn message(&self) {
        self.messages.fetch_add(1, SeqCst);
    }

    pub fn recovery(&self) {
        self.recoveries.fetch_add(1, SeqCst);
    }

    pub fn app_op(&self) {
        self.app_ops.fetch_add(1, SeqCst);
    }

    pub fn counts(&self) -> Counts {
        Counts {
            server_ops: self.server_ops.load(SeqCst),
            writes: self.writes.load(SeqCst),
            messages: self.messages.load(SeqCst),
            recoveries: self.recoveries.load(SeqCst),
            app_ops: self.app_ops.load(SeqCst),
        }
    }

    pub fn begin(&self) {
        self.stop.store(false, SeqCst);
        self.wrong.store(0, SeqCst);
    }

    pub fn stop(&self) {
        self.stop.store(true, SeqCst);
    }

    pub fn stopped(&self) -> bool {
        self.stop.load(SeqCst)
    }

    pub fn is_wrong(&self, app: usize, step: usize, errno: i32) {
        let code = (app as u64) << 48 | (step as u64) << 16 | (u64::from(errno.unsigned_abs()) + 1);
        let _ = self.wrong.compare_exchange(0, code, SeqCst, SeqCst);
    }

    /// Application, step and errno (0: wrong data) of the first result that must not be.
    pub fn wrong(&self) -> Option<(usize, usize, i32)> {
        let code = self.wrong.load(SeqCst).checked_sub(1)?;
        Some((
            (code >> 48) as usize,
            (code >> 16 & 0xffff_ffff) as usize,
            (code & 0xffff) as i32,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_wrong_result_is_kept() {
        let shared = Shared::default();
        assert_eq!(shared.wrong(), None);
        shared.is_wrong(3, 70, 0);
        shared.is_wrong(4, 71, 5);
        assert_eq!(shared.wrong(), Some((3, 70, 0)));
    }
}
