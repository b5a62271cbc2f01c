// SPDX-License-Identifier: GPL-2.0
//! Replies that fuser cannot say.
//!
//! fuser 0.18 uses one number as the nodeid and as `attr.ino`. They are different things here:
//! the nodeid is never given to another file, the inode number is the backing file's (`st_ino`
//! that programs compare, stable when the kernel forgets a node and looks it up again). So the
//! replies that carry an entry are written to the device by hand; fuser parses and schedules.

use std::cell::Cell;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::uio::writev;
use rust_fuse_notify::std::wire::OutHeader;
pub use rust_fuse_notify::std::wire::{Attr, AttrOut};
use zerocopy::{Immutable, IntoBytes};

use super::sys::Res;

/// `struct fuse_entry_out`
#[repr(C)]
#[derive(IntoBytes, Immutable, Clone, Copy, Debug)]
pub struct EntryOut {
    pub nodeid: u64,
    pub generation: u64,
    pub entry_valid: u64,
    pub attr_valid: u64,
    pub entry_valid_nsec: u32,
    pub attr_valid_nsec: u32,
    pub attr: Attr,
}

/// `struct fuse_open_out`
#[repr(C)]
#[derive(IntoBytes, Immutable, Clone, Copy, Debug)]
pub struct OpenOut {
    pub fh: u64,
    pub open_flags: u32,
    pub backing_id: i32,
}

/// `struct fuse_write_out`
#[repr(C)]
#[derive(IntoBytes, Immutable, Clone, Copy, Debug)]
pub struct WriteOut {
    pub size: u32,
    pub padding: u32,
}

/// `struct fuse_dirent` without the name
#[repr(C)]
#[derive(IntoBytes, Immutable, Clone, Copy, Debug)]
pub struct Dirent {
    pub ino: u64,
    pub off: u64,
    pub namelen: u32,
    pub kind: u32,
}

/// What `stat(2)` says, as the protocol says it.
pub fn attr_from_stat(st: &libc::stat) -> Attr {
    Attr {
        ino: st.st_ino,
        size: st.st_size as u64,
        blocks: st.st_blocks as u64,
        atime: st.st_atime as u64,
        mtime: st.st_mtime as u64,
        ctime: st.st_ctime as u64,
        atimensec: st.st_atime_nsec as u32,
        mtimensec: st.st_mtime_nsec as u32,
        ctimensec: st.st_ctime_nsec as u32,
        mode: st.st_mode,
        nlink: st.st_nlink as u32,
        uid: st.st_uid,
        gid: st.st_gid,
        rdev: encode_dev(st.st_rdev),
        blksize: st.st_blksize as u32,
        flags: 0,
    }
}

impl EntryOut {
    pub fn new(nodeid: u64, generation: u64, attr: Attr, ttl: Duration) -> EntryOut {
        EntryOut {
            nodeid,
            generation,
            entry_valid: ttl.as_secs(),
            attr_valid: ttl.as_secs(),
            entry_valid_nsec: ttl.subsec_nanos(),
            attr_valid_nsec: ttl.subsec_nanos(),
            attr,
        }
    }

    /// An entry that counts as no lookup: `.` and `..` of a directory.
    pub fn uncounted(attr: Attr) -> EntryOut {
        EntryOut::new(0, 0, attr, Duration::ZERO)
    }
}

/// An attribute reply.
pub fn attr_out(attr: Attr, ttl: Duration) -> AttrOut {
    AttrOut {
        attr_valid: ttl.as_secs(),
        attr_valid_nsec: ttl.subsec_nanos(),
        dummy: 0,
        attr,
    }
}

/// The kernel's 32-bit device number (`new_encode_dev`).
pub fn encode_dev(dev: libc::dev_t) -> u32 {
    let (major, minor) = (libc::major(dev), libc::minor(dev));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

pub fn decode_dev(dev: u32) -> libc::dev_t {
    libc::makedev((dev >> 8) & 0xfff, (dev & 0xff) | ((dev >> 12) & 0xf_ff00))
}

/// A buffer of directory entries, with or without attributes.
pub struct DirBuf {
    buf: Vec<u8>,
    limit: usize,
}

impl DirBuf {
    pub fn new(limit: usize) -> DirBuf {
        DirBuf {
            buf: Vec::with_capacity(limit.min(1 << 20)),
            limit,
        }
    }

    /// Whether an entry of this name would still fit.
    pub fn fits(&self, plus: bool, name: &[u8]) -> bool {
        let head = if plus { size_of::<EntryOut>() } else { 0 } + size_of::<Dirent>();
        self.buf.len() + (head + name.len()).next_multiple_of(8) <= self.limit
    }

    /// Appends an entry; the caller has asked [`DirBuf::fits`].
    pub fn push(&mut self, entry: Option<&EntryOut>, dirent: &Dirent, name: &[u8]) {
        if let Some(entry) = entry {
            self.buf.extend_from_slice(entry.as_bytes());
        }
        self.buf.extend_from_slice(dirent.as_bytes());
        self.buf.extend_from_slice(name);
        self.buf.resize(self.buf.len().next_multiple_of(8), 0);
    }

    pub fn bytes(&self) -> &[u8] {
        &self.buf
    }
}

/// The device a worker thread reads its requests from.
///
/// With cloned descriptors every thread has its own, and a reply finds its request only on the
/// one that the request was read from. fuser shows none of them, so a thread tries those that the
/// process has until one takes the reply (`ENOENT`: not mine) and keeps to it.
pub struct Device {
    fd: OwnedFd,
    cloned: bool,
}

thread_local! {
    static MINE: Cell<Option<RawFd>> = const { Cell::new(None) };
}

impl Device {
    /// `fd`: a duplicate of the session's descriptor.
    pub fn new(fd: OwnedFd, cloned: bool) -> Device {
        Device { fd, cloned }
    }

    /// Answers the request `unique` with success and `parts`.
    ///
    /// # Errors
    /// `ENOENT` when nobody waits for this answer any more.
    pub fn reply(&self, unique: u64, parts: &[&[u8]]) -> Res<()> {
        let size = size_of::<OutHeader>() + parts.iter().map(|p| p.len()).sum::<usize>();
        let header = OutHeader {
            len: u32::try_from(size).map_err(|_| Errno::EOVERFLOW)?,
            error: 0,
            unique,
        };
        let mut iov = vec![IoSlice::new(header.as_bytes())];
        iov.extend(
            parts
                .iter()
                .filter(|p| !p.is_empty())
                .map(|p| IoSlice::new(p)),
        );
        if !self.cloned {
            return writev(&self.fd, &iov).map(drop);
        }
        match MINE.get() {
            // SAFETY: fuser keeps a worker's descriptor open for as long as the worker runs.
            Some(fd) => writev(unsafe { BorrowedFd::borrow_raw(fd) }, &iov).map(drop),
            None => self.find_mine(&iov),
        }
    }

    fn find_mine(&self, iov: &[IoSlice<'_>]) -> Res<()> {
        for fd in fuse_descriptors() {
            // SAFETY: it was open when the directory was read. Were it closed meanwhile and its
            // number reused, the write fails or is refused: only a FUSE device takes the reply.
            match writev(unsafe { BorrowedFd::borrow_raw(fd) }, iov) {
                Ok(_) => {
                    // The shared one needs no memory, and is also open twice.
                    MINE.set(Some(fd));
                    return Ok(());
                }
                Err(Errno::ENOENT | Errno::EPERM | Errno::EBADF) => {}
                Err(e) => return Err(e),
            }
        }
        Err(Errno::ENOENT)
    }
}

/// All descriptors of this process that are `/dev/fuse`.
fn fuse_descriptors() -> Vec<RawFd> {
    let Ok(dir) = std::fs::read_dir("/proc/self/fd") else {
        return Vec::new();
    };
    dir.flatten()
        .filter(|e| std::fs::read_link(e.path()).is_ok_and(|l| l.as_os_str() == "/dev/fuse"))
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect()
}

/// A duplicate of `fd`: the same open file description.
pub fn duplicate(fd: BorrowedFd<'_>) -> Res<OwnedFd> {
    // SAFETY: no memory is involved; the new descriptor is ours.
    unsafe {
        let new = Errno::result(libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3))?;
        Ok(OwnedFd::from_raw_fd(new))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<OutHeader>(), 16);
        assert_eq!(size_of::<Attr>(), 88);
        assert_eq!(size_of::<EntryOut>(), 128);
        assert_eq!(size_of::<AttrOut>(), 104);
        assert_eq!(size_of::<OpenOut>(), 16);
        assert_eq!(size_of::<WriteOut>(), 8);
        assert_eq!(size_of::<Dirent>(), 24);
    }

    #[test]
    fn device_numbers_survive_the_encoding() {
        for (major, minor) in [(0, 0), (1, 3), (8, 255), (8, 256), (0xfff, 0xf_ffff)] {
            let dev = libc::makedev(major, minor);
            assert_eq!(decode_dev(encode_dev(dev)), dev, "{major}:{minor}");
        }
    }

    #[test]
    fn directory_entries_are_aligned_and_bounded() {
        let mut buf = DirBuf::new(64);
        let dirent = Dirent {
            ino: 1,
            off: 2,
            namelen: 3,
            kind: 8,
        };
        assert!(buf.fits(false, b"abc"));
        buf.push(None, &dirent, b"abc");
        assert_eq!(buf.bytes().len(), 32);
        assert!(buf.fits(false, b"abcdefgh"));
        assert!(!buf.fits(false, b"abcdefghi"));
        assert!(!buf.fits(true, b"a"));
    }
}
