// SPDX-License-Identifier: GPL-2.0
//! Memory whose first touch sleeps until the process is killed: a buffer for `read(2)` and `write(2)` of a server that
//! dies inside them.

use std::os::fd::RawFd;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;

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

nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, UffdioApi);
nix::ioctl_readwrite!(uffdio_register, 0xaa, 0x00, UffdioRegister);

const UFFD_API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;

/// Memory of which nothing is there yet, and nobody will bring it. Belongs to the process that made it, and goes with
/// it.
pub struct Abyss {
    pub start: *mut u8,
    pub len: usize,
    _uffd: RawFd,
}

impl Abyss {
    pub fn new(len: usize) -> Result<Abyss> {
        // SAFETY: userfaultfd takes an integer and returns a descriptor or an error.
        let uffd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        let uffd = Errno::result(uffd).context("userfaultfd")? as RawFd;
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
            _uffd: uffd,
        })
    }

    /// `read(2)` into it.
    pub fn read_from(&self, fd: RawFd) -> i32 {
        // SAFETY: the kernel writes to the mapping, of which nobody has a reference.
        i32::from(unsafe { libc::read(fd, self.start.cast(), self.len) } >= 0)
    }

    /// `writev(2)` of `head`, which is there, and `len` bytes which are not.
    pub fn write_to(&self, fd: RawFd, head: &[u8], len: usize) -> i32 {
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
        i32::from(unsafe { libc::writev(fd, parts.as_ptr(), 2) } >= 0)
    }
}
