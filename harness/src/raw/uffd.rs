// SPDX-License-Identifier: GPL-2.0
//! Memory whose first touch sleeps until it is filled or the process is killed: a buffer for `read(2)` and `write(2)` of
//! a server that dies inside them, or sleeps there for very long.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::poll::PollFlags;

use super::dev::poll_one;

#[repr(C)]
#[derive(Default)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, UffdioApi);
nix::ioctl_readwrite!(uffdio_register, 0xaa, 0x00, UffdioRegister);
nix::ioctl_readwrite!(uffdio_copy, 0xaa, 0x03, UffdioCopy);

const UFFD_API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;

/// Memory of which nothing is there yet, and nobody will bring it but [`Abyss::fill`]. Belongs to the process that made
/// it.
pub struct Abyss {
    start: *mut u8,
    len: usize,
    uffd: OwnedFd,
}

// SAFETY: only the kernel touches the memory, by `&self`; it is unmapped when nobody has the value any more.
unsafe impl Send for Abyss {}
// SAFETY: as above.
unsafe impl Sync for Abyss {}

impl Abyss {
    pub fn new(len: usize) -> Result<Abyss> {
        // SAFETY: userfaultfd takes an integer and returns a descriptor or an error.
        let uffd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let uffd = Errno::result(uffd).context("userfaultfd")? as RawFd;
        // SAFETY: it was just made, and nobody else has it.
        let owned = unsafe { OwnedFd::from_raw_fd(uffd) };
        let mut api = UffdioApi {
            api: UFFD_API,
            ..Default::default()
        };
        // SAFETY: the structure is the kernel's, and lives until the call returns.
        unsafe { uffdio_api(uffd, &mut api) }.context("UFFDIO_API")?;
        // SAFETY: a fresh anonymous mapping, placed by the kernel.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        ensure!(start != libc::MAP_FAILED, "mmap: {}", Errno::last());
        let mut register = UffdioRegister {
            start: start as u64,
            len: len as u64,
            mode: MODE_MISSING,
            ..Default::default()
        };
        // SAFETY: as above; the range was just mapped.
        unsafe { uffdio_register(uffd, &mut register) }.context("UFFDIO_REGISTER")?;
        Ok(Abyss {
            start: start.cast(),
            len,
            uffd: owned,
        })
    }

    /// Whether somebody sleeps there.
    pub fn is_awaited(&self) -> Result<bool> {
        let ready = poll_one(self.uffd.as_fd(), PollFlags::POLLIN, Duration::ZERO)?;
        Ok(ready.contains(PollFlags::POLLIN))
    }

    /// Brings it, beginning with `head`: who sleeps there wakes up. Only once.
    pub fn fill(&self, head: &[u8]) -> Result<()> {
        let mut bytes = vec![0; self.len];
        bytes[..head.len()].copy_from_slice(head);
        let mut copy = UffdioCopy {
            dst: self.start as u64,
            src: bytes.as_ptr() as u64,
            len: self.len as u64,
            ..Default::default()
        };
        // SAFETY: the structure is the kernel's, and both ranges live until the call returns.
        unsafe { uffdio_copy(self.uffd.as_raw_fd(), &mut copy) }.context("UFFDIO_COPY")?;
        Ok(())
    }

    /// `read(2)` into it.
    pub fn read(&self, fd: RawFd) -> Result<usize, Errno> {
        // SAFETY: the kernel writes to the mapping, of which nobody has a reference.
        Errno::result(unsafe { libc::read(fd, self.start.cast(), self.len) }).map(|n| n as usize)
    }

    /// The same for a process of its own: its exit code.
    pub fn read_from(&self, fd: RawFd) -> i32 {
        i32::from(self.read(fd).is_ok())
    }

    /// `writev(2)` of `head`, which is there, and `len` bytes which are not.
    pub fn write(&self, fd: RawFd, head: &[u8], len: usize) -> Result<usize, Errno> {
        let parts = [
            libc::iovec {
                iov_base: head.as_ptr().cast_mut().cast(),
                iov_len: head.len(),
            },
            libc::iovec {
                iov_base: self.start.cast(),
                iov_len: len.min(self.len),
            },
        ];
        // SAFETY: both parts are mapped for as long as the call lasts, and are only read.
        Errno::result(unsafe { libc::writev(fd, parts.as_ptr(), 2) }).map(|n| n as usize)
    }

    /// The same for a process of its own: its exit code.
    pub fn write_to(&self, fd: RawFd, head: &[u8], len: usize) -> i32 {
        i32::from(self.write(fd, head, len).is_ok())
    }
}

impl Drop for Abyss {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody is in it any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}
