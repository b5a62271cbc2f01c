// SPDX-License-Identifier: GPL-2.0
//! The memfd as an array of 64-bit words. The only file of the state that is not safe code.
//!
//! Other processes may map the same memfd, so no `&[u8]` into it is ever made: every access is an atomic load or
//! store of one word, and what is read is a copy. On the machines that FUSE runs on these are plain moves.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{fence, AtomicU64, Ordering};

use nix::sys::mman::{mmap, munmap, MapFlags, ProtFlags};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// Bytes of a word.
pub(super) const WORD: usize = 8;

/// A shared mapping of the whole memfd.
///
/// # Invariants
///
/// `base` is the start of `len` mapped bytes, page-aligned, readable and writable, shared, until drop. The file is
/// sealed against shrinking, so each of them stays accessible.
#[derive(Debug)]
pub(super) struct Region {
    base: NonNull<AtomicU64>,
    len: usize,
    fd: OwnedFd,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only accessed through atomics.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `len` bytes. The caller has sealed `fd` against shrinking below that.
    pub(super) fn map(fd: OwnedFd, len: usize) -> io::Result<Region> {
        let Some(size) = NonZeroUsize::new(len) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // NORESERVE: the tables are far larger than what is ever used of them.
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: no address is asked for, so no mapping of anybody is replaced.
        let base = unsafe { mmap(None, size, prot, flags, &fd, 0) }?;
        // INVARIANT: mmap aligns to pages and mapped `len` bytes as asked.
        Ok(Region {
            base: base.cast(),
            len,
            fd,
        })
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(
            offset.is_multiple_of(WORD) && offset < self.len,
            "offset {offset:#x} is outside of the state"
        );
        // SAFETY: in bounds and aligned by the assertion and the invariant; every bit pattern is a u64; all
        // accesses of this process go through here.
        unsafe { self.base.add(offset / WORD).as_ref() }
    }

    /// One word, with no ordering.
    pub(super) fn load(&self, offset: usize) -> u64 {
        self.word(offset).load(Ordering::Relaxed)
    }

    /// One word; what its publisher stored before is visible afterwards.
    pub(super) fn load_published(&self, offset: usize) -> u64 {
        self.word(offset).load(Ordering::Acquire)
    }

    /// Whether a word that was [`Region::load_published`] still has that value after what it guards was read.
    pub(super) fn still(&self, offset: usize, value: u64) -> bool {
        fence(Ordering::Acquire);
        self.word(offset).load(Ordering::Relaxed) == value
    }

    /// One word, with no ordering.
    pub(super) fn store(&self, offset: usize, value: u64) {
        crash_point();
        self.word(offset).store(value, Ordering::Relaxed);
    }

    /// The one store that makes valid what was stored before it. A process that is killed leaves all stores or a
    /// prefix of them, in program order; the release keeps the compiler from moving others behind this one.
    pub(super) fn publish(&self, offset: usize, value: u64) {
        crash_point();
        self.word(offset).store(value, Ordering::Release);
        crash_point();
    }

    /// The value before; never given twice.
    pub(super) fn next(&self, offset: usize) -> u64 {
        crash_point();
        self.word(offset).fetch_add(1, Ordering::Relaxed)
    }

    /// Fills `bytes` from `offset` on.
    pub(super) fn read(&self, mut offset: usize, bytes: &mut [u8]) {
        // Whole words first: each is one load and one store.
        let mut words = bytes.chunks_exact_mut(WORD);
        for word in &mut words {
            word.copy_from_slice(&self.load(offset).to_ne_bytes());
            offset += WORD;
        }
        let rest = words.into_remainder();
        if !rest.is_empty() {
            rest.copy_from_slice(&self.load(offset).to_ne_bytes()[..rest.len()]);
        }
    }

    /// Stores `bytes` from `offset` on; a last word that is not full is filled with zeroes.
    pub(super) fn write(&self, mut offset: usize, bytes: &[u8]) {
        let words = bytes.chunks_exact(WORD);
        let rest = words.remainder();
        for chunk in words {
            let mut word = [0; WORD];
            word.copy_from_slice(chunk);
            self.store(offset, u64::from_ne_bytes(word));
            offset += WORD;
        }
        if !rest.is_empty() {
            let mut word = [0; WORD];
            word[..rest.len()].copy_from_slice(rest);
            self.store(offset, u64::from_ne_bytes(word));
        }
    }

    /// A copy of a struct.
    pub(super) fn get<T: FromBytes + IntoBytes + FromZeros>(&self, offset: usize) -> T {
        let mut value = T::new_zeroed();
        self.read(offset, value.as_mut_bytes());
        value
    }

    /// Stores a struct.
    pub(super) fn put<T: IntoBytes + Immutable>(&self, offset: usize, value: &T) {
        self.write(offset, value.as_bytes());
    }

    /// One `read(2)` straight into the mapping, so that no crash can come between reading and storing.
    pub(super) fn read_from(
        &self,
        device: BorrowedFd<'_>,
        offset: usize,
        len: usize,
    ) -> io::Result<usize> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: in bounds by the assertion; the kernel writes there as another process that maps the memfd could.
        let got = unsafe {
            let start = self.base.as_ptr().cast::<u8>().add(offset);
            libc::read(device.as_raw_fd(), start.cast(), len)
        };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }

    /// The next bytes from `offset` on that have memory, as a range; to read others would give them some. All of the rest
    /// where that cannot be told, and `None` if there are none.
    pub(super) fn next_used(&self, offset: usize) -> Option<std::ops::Range<usize>> {
        use nix::unistd::{lseek, Whence};
        let seek = |from: usize, whence| lseek(self.fd.as_fd(), from as i64, whence);
        let begin = match seek(offset, Whence::SeekData) {
            Ok(begin) => begin as usize,
            Err(nix::errno::Errno::ENXIO) => return None,
            Err(_) => return Some(offset..self.len),
        };
        let end = seek(begin, Whence::SeekHole).map_or(self.len, |end| end as usize);
        Some(begin..end.min(self.len))
    }

    /// Makes sure that there is memory; what was stored stays.
    pub(super) fn allocate(&self, offset: usize, len: usize) -> io::Result<()> {
        use nix::fcntl::{fallocate, FallocateFlags};
        let nothing = FallocateFlags::empty();
        Ok(fallocate(
            self.fd.as_fd(),
            nothing,
            offset as i64,
            len as i64,
        )?)
    }

    /// Gives the memory of whole pages back; they read as zeroes afterwards.
    pub(super) fn punch(&self, offset: usize, len: usize) -> io::Result<()> {
        use nix::fcntl::{fallocate, FallocateFlags};
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(
            self.fd.as_fd(),
            flags,
            offset as i64,
            len as i64,
        )?)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length; no reference into it outlives `self`.
        // An error would mean that the arguments are wrong, and leaves nothing to be done.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}

/// In tests: the process kills itself here when the count-down that the test set has run out.
#[cfg(test)]
fn crash_point() {
    super::crash_tests::step();
}

#[cfg(not(test))]
#[inline(always)]
fn crash_point() {}
