// SPDX-License-Identifier: GPL-2.0
//! What one scenario run is given: how long to wait, which seed, and where to note what it made.

use std::cell::RefCell;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::mman::{mmap_anonymous, MapFlags, ProtFlags};

/// What the running kernel can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Support {
    /// The kernel offers FUSE_RESTARTABLE: it carries the series.
    pub series: bool,
    pub passthrough: bool,
}

/// Connections a scenario has opened, in memory shared with the runner, which must be able to abort them when
/// the scenario itself cannot any more.
pub struct SharedIds {
    slots: &'static [AtomicU32],
}

const SLOTS: usize = 1024;

impl SharedIds {
    pub fn new() -> Result<SharedIds> {
        let size = NonZeroUsize::new(SLOTS * 4).expect("not zero");
        // SAFETY: a fresh anonymous mapping; it is never unmapped, so the slice may live for ever.
        let memory = unsafe {
            mmap_anonymous(
                None,
                size,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
            )
        }
        .context("cannot map memory shared with the scenario")?;
        // SAFETY: zeroed, page-aligned, large enough, and only ever accessed as atomics.
        let slots =
            unsafe { std::slice::from_raw_parts(memory.as_ptr().cast::<AtomicU32>(), SLOTS) };
        Ok(SharedIds { slots })
    }

    pub fn add(&self, id: u32) {
        for slot in self.slots {
            if slot
                .compare_exchange(0, id, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
            {
                return;
            }
        }
    }

    pub fn clear(&self) {
        self.slots.iter().for_each(|s| s.store(0, Ordering::SeqCst));
    }

    pub fn all(&self) -> Vec<u32> {
        self.slots
            .iter()
            .map(|s| s.load(Ordering::SeqCst))
            .filter(|id| *id != 0)
            .collect()
    }
}

pub struct Env<'a> {
    /// How long something may take that should take no time at all.
    pub patience: Duration,
    pub seed: u64,
    pub support: Support,
    pub ids: &'a SharedIds,
    /// Where mount points are made; the runner removes what a scenario leaves there.
    pub scratch: &'a Path,
    /// What went wrong outside the scenario's own checks: hanging applications, failed unmounts.
    pub problems: RefCell<Vec<String>>,
}

impl Env<'_> {
    pub fn problem(&self, what: String) {
        self.problems.borrow_mut().push(what);
    }
}

/// A scenario that cannot run here, and why. Not a failure.
#[derive(Debug)]
pub struct Skip(pub String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

pub fn skip<T>(why: impl Into<String>) -> Result<T> {
    Err(Skip(why.into()).into())
}
