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
///
/// `limit` are kept; while some are being closed, half as many more can be open.
pub struct FdCache<T = OwnedFd> {
    limit: usize,
    inner: Mutex<Inner<T>>,
    /// Held by the one who closes what fell out.
    closing: Mutex<()>,
}

struct Inner<T> {
    /// Counts uses; a descriptor remembers when it was used last.
    clock: u64,
    map: HashMap<u64, (Arc<T>, u64)>,
}

impl<T> Inner<T> {
    /// Half at once, so that the scan is paid for by as many insertions as it drops.
    fn make_room(&mut self) -> Vec<(u64, (Arc<T>, u64))> {
        let mut uses: Vec<u64> = self.map.values().map(|(_, used)| *used).collect();
        let middle = uses.len() / 2;
        let (_, &mut median, _) = uses.select_nth_unstable(middle);
        self.map.extract_if(|_, (_, used)| *used < median).collect()
    }
}

impl<T> FdCache<T> {
    pub fn new(limit: usize) -> Self {
        FdCache {
            limit: limit.max(2),
            inner: Mutex::new(Inner {
                clock: 0,
                map: HashMap::new(),
            }),
            closing: Mutex::new(()),
        }
    }

    pub fn get(&self, key: u64) -> Option<Arc<T>> {
        let inner = &mut *self.inner.lock().expect("no holder panics");
        inner.clock += 1;
        let (fd, used) = inner.map.get_mut(&key)?;
        *used = inner.clock;
        Some(fd.clone())
    }

    pub fn insert(&self, key: u64, fd: Arc<T>) {
        // Closing can be slow, so nobody who finds room waits for it. Who finds none does: another half would be open
        // beside the one that is being closed, and a third.
        let mut closing = None;
        let gone = loop {
            let mut inner = self.inner.lock().expect("no holder panics");
            let full = inner.map.len() >= self.limit;
            if full && closing.is_none() {
                drop(inner);
                closing = Some(self.closing.lock().expect("no holder panics"));
                continue;
            }
            let dropped = if full { inner.make_room() } else { Vec::new() };
            inner.clock += 1;
            let used = inner.clock;
            break (inner.map.insert(key, (fd, used)), dropped);
        };
        drop(gone);
        drop(closing);
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
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

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

    /// Takes its time to be closed.
    struct Slow(Arc<AtomicUsize>);

    impl Drop for Slow {
        fn drop(&mut self) {
            std::thread::sleep(Duration::from_micros(200));
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn closing_slowly_adds_half_at_most() {
        const LIMIT: usize = 32;
        const THREADS: u64 = 6;
        let (open, most) = (Arc::new(AtomicUsize::new(0)), AtomicUsize::new(0));
        let cache = FdCache::new(LIMIT);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (open, most, cache) = (&open, &most, &cache);
                scope.spawn(move || {
                    for n in 0..300 {
                        let now = open.fetch_add(1, Ordering::SeqCst) + 1;
                        most.fetch_max(now, Ordering::SeqCst);
                        cache.insert(n * THREADS + thread, Arc::new(Slow(open.clone())));
                    }
                });
            }
        });
        let most = most.into_inner();
        assert!(most <= LIMIT * 3 / 2 + THREADS as usize, "{most} were open");
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
