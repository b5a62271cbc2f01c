// SPDX-License-Identifier: GPL-2.0
//! A bounded cache of open descriptors.
//!
//! The kernel may cache a hundred thousand inodes; a descriptor for each would pass every limit.
//! Both kinds of descriptors that the server holds can be opened again from the state (`O_PATH`
//! ones from the node's handle, files from the node and the open flags), so the cache may forget
//! any of them at any time. Whoever uses one holds an [`Arc`], so it stays open as long as needed.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

/// Descriptors by key, the least recently used half of them dropped when there are too many.
pub struct FdCache {
    limit: usize,
    inner: Mutex<Inner>,
}

struct Inner {
    /// Counts uses; a descriptor remembers when it was used last.
    clock: u64,
    map: HashMap<u64, (Arc<OwnedFd>, u64)>,
}

impl FdCache {
    pub fn new(limit: usize) -> Self {
        FdCache {
            limit: limit.max(2),
            inner: Mutex::new(Inner {
                clock: 0,
                map: HashMap::new(),
            }),
        }
    }

    pub fn get(&self, key: u64) -> Option<Arc<OwnedFd>> {
        let inner = &mut *self.inner.lock().expect("no holder panics");
        inner.clock += 1;
        let (fd, used) = inner.map.get_mut(&key)?;
        *used = inner.clock;
        Some(fd.clone())
    }

    pub fn insert(&self, key: u64, fd: Arc<OwnedFd>) {
        // Closing can be slow: what falls out is closed after the lock is gone.
        let mut dropped = Vec::new();
        let mut guard = self.inner.lock().expect("no holder panics");
        let inner = &mut *guard;
        if inner.map.len() >= self.limit {
            // Half at once, so that the scan is paid for by as many insertions as it drops.
            let mut uses: Vec<u64> = inner.map.values().map(|(_, used)| *used).collect();
            let middle = uses.len() / 2;
            let (_, &mut median, _) = uses.select_nth_unstable(middle);
            dropped.extend(inner.map.extract_if(|_, (_, used)| *used < median));
        }
        inner.clock += 1;
        let replaced = inner.map.insert(key, (fd, inner.clock));
        drop(guard);
        drop((dropped, replaced));
    }

    pub fn remove(&self, key: u64) {
        let gone = self
            .inner
            .lock()
            .expect("no holder panics")
            .map
            .remove(&key);
        drop(gone);
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.inner.lock().unwrap().map.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fd() -> Arc<OwnedFd> {
        Arc::new(std::fs::File::open("/").unwrap().into())
    }

    #[test]
    fn it_never_holds_more_than_its_limit() {
        let cache = FdCache::new(16);
        for key in 0..1000 {
            cache.insert(key, fd());
            assert!(cache.len() <= 16, "{} descriptors", cache.len());
        }
    }

    #[test]
    fn what_is_used_stays_and_what_is_not_goes() {
        let cache = FdCache::new(8);
        cache.insert(1, fd());
        for key in 2..100 {
            assert!(cache.get(1).is_some(), "used before every insertion");
            cache.insert(key, fd());
        }
        assert!(cache.get(1).is_some());
        assert!(cache.get(2).is_none(), "never used again");
    }

    #[test]
    fn a_dropped_descriptor_stays_open_for_its_user() {
        let cache = FdCache::new(2);
        cache.insert(1, fd());
        let mine = cache.get(1).unwrap();
        cache.remove(1);
        assert!(super::super::sys::fstat(std::os::fd::AsFd::as_fd(&*mine)).is_ok());
    }
}
