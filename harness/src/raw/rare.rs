// SPDX-License-Identifier: GPL-2.0
//! System calls that few applications make: locks and leases, splice and sendfile, file handles, attributes of open
//! files. As in [`super::ops`]: one function a call, with the bare errno.

use std::ffi::CString;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;

use super::ops::Done;

fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("no scenario uses a NUL in a path")
}

fn plain(rc: i32) -> Done<()> {
    Errno::result(rc).map(drop)
}

/// Which of the three kinds of lock that Linux has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    Posix,
    /// Owned by the open file, not by the process.
    Ofd,
    Flock,
}

impl Lock {
    /// Locks the whole file for writing (`lock`), or gives the lock back; waits for others only if told to.
    pub fn set(self, fd: RawFd, lock: bool, wait: bool) -> Done<()> {
        if self == Lock::Flock {
            let how = if lock { libc::LOCK_EX } else { libc::LOCK_UN };
            let nb = if wait { 0 } else { libc::LOCK_NB };
            // SAFETY: plain numbers.
            return plain(unsafe { libc::flock(fd, how | nb) });
        }
        let cmd = match (self, wait) {
            (Lock::Posix, false) => libc::F_SETLK,
            (Lock::Posix, true) => libc::F_SETLKW,
            (_, false) => libc::F_OFD_SETLK,
            (_, true) => libc::F_OFD_SETLKW,
        };
        // SAFETY: an all-zero flock is valid; the kernel only reads it.
        unsafe {
            let mut arg: libc::flock = std::mem::zeroed();
            arg.l_type = if lock { libc::F_WRLCK } else { libc::F_UNLCK } as i16;
            plain(libc::fcntl(fd, cmd, &arg))
        }
    }

    pub fn try_lock(self, fd: RawFd) -> Done<()> {
        self.set(fd, true, false)
    }

    pub fn unlock(self, fd: RawFd) -> Done<()> {
        self.set(fd, false, false)
    }
}

/// Takes a read lease, or gives it back.
pub fn lease(fd: RawFd, take: bool) -> Done<()> {
    let kind = if take { libc::F_RDLCK } else { libc::F_UNLCK };
    // SAFETY: plain numbers.
    plain(unsafe { libc::fcntl(fd, libc::F_SETLEASE, kind) })
}

pub fn fchmod(fd: RawFd, mode: u32) -> Done<()> {
    // SAFETY: plain numbers.
    plain(unsafe { libc::fchmod(fd, mode) })
}

pub fn fdatasync(fd: RawFd) -> Done<()> {
    // SAFETY: a number.
    plain(unsafe { libc::fdatasync(fd) })
}

pub fn syncfs(fd: RawFd) -> Done<()> {
    // SAFETY: a number.
    plain(unsafe { libc::syncfs(fd) })
}

pub fn fgetxattr(fd: RawFd, name: &str) -> Done<Vec<u8>> {
    let name = CString::new(name).expect("no NUL in attribute names here");
    let mut value = vec![0u8; 256];
    // SAFETY: a NUL-terminated string, and the buffer's own length.
    let n = unsafe { libc::fgetxattr(fd, name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(Errno::result(n)? as usize);
    Ok(value)
}

/// `mmap` of the first page, read-only and shared, which is never touched.
pub fn map_untouched(fd: RawFd) -> Done<usize> {
    let (prot, flags) = (libc::PROT_READ, libc::MAP_SHARED);
    // SAFETY: a fresh mapping where the kernel likes.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, flags, fd, 0) };
    if at == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    Ok(at as usize)
}

/// Whether the page cache has the page behind a mapping of [`map_untouched`].
pub fn in_page_cache(at: usize) -> Done<bool> {
    let mut one = 0u8;
    // SAFETY: one page, one byte of answer.
    plain(unsafe { libc::mincore(at as *mut libc::c_void, 4096, &mut one) })?;
    Ok(one & 1 != 0)
}

pub fn sendfile(out: RawFd, from: RawFd, len: usize) -> Done<usize> {
    let mut offset = 0i64;
    // SAFETY: the offset lives until the call returns.
    Errno::result(unsafe { libc::sendfile(out, from, &mut offset, len) }).map(|n| n as usize)
}

/// `splice` of the file's beginning into a pipe's write end.
pub fn splice_into(fd: RawFd, pipe: RawFd, len: usize) -> Done<usize> {
    let mut offset = 0i64;
    // SAFETY: the offset lives until the call returns.
    let n = unsafe { libc::splice(fd, &mut offset, pipe, std::ptr::null_mut(), len, 0) };
    Errno::result(n).map(|n| n as usize)
}

/// `splice` of some bytes, which are in a pipe by then, to the file's beginning.
pub fn splice_from_pipe(fd: RawFd, bytes: &[u8]) -> Done<usize> {
    let (read, write) = nix::unistd::pipe()?;
    nix::unistd::write(&write, bytes)?;
    let (pipe, mut offset) = (std::os::fd::AsRawFd::as_raw_fd(&read), 0i64);
    // SAFETY: the offset lives until the call returns.
    let n = unsafe { libc::splice(pipe, std::ptr::null_mut(), fd, &mut offset, bytes.len(), 0) };
    Errno::result(n).map(|n| n as usize)
}

pub fn read(fd: RawFd, len: usize) -> Done<Vec<u8>> {
    let mut buffer = vec![0; len];
    // SAFETY: the pointer and the length are those of the buffer.
    let n = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), len) };
    buffer.truncate(Errno::result(n)? as usize);
    Ok(buffer)
}

/// Names in one `getdents64` with a buffer of `len` bytes; empty at the end.
pub fn getdents(fd: RawFd, len: usize) -> Done<Vec<String>> {
    let mut buffer = vec![0u8; len];
    // SAFETY: the pointer and the length are those of the buffer.
    let n = unsafe { libc::syscall(libc::SYS_getdents64, fd, buffer.as_mut_ptr(), len) };
    let n = Errno::result(n)? as usize;
    let mut names = Vec::new();
    let mut at = 0;
    while at + 19 <= n {
        let size = u16::from_ne_bytes([buffer[at + 16], buffer[at + 17]]) as usize;
        let name = &buffer[at + 19..(at + size).min(n)];
        let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
        names.push(String::from_utf8_lossy(&name[..end]).into_owned());
        at += size.max(19);
    }
    Ok(names)
}

pub fn rewind(fd: RawFd) -> Done<()> {
    // SAFETY: plain numbers.
    Errno::result(unsafe { libc::lseek(fd, 0, libc::SEEK_SET) }).map(drop)
}

/// What `name_to_handle_at` gives, with room for the largest handle.
#[repr(C)]
#[derive(Clone, Debug)]
pub struct Handle {
    bytes: u32,
    kind: i32,
    data: [u8; 128],
}

pub fn name_to_handle(path: &Path) -> Done<Handle> {
    let mut handle = Handle {
        bytes: 128,
        kind: 0,
        data: [0; 128],
    };
    let mut mount_id = 0;
    let path = c(path);
    // SAFETY: the handle has the room it announces; the path ends with a NUL.
    plain(unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            libc::AT_FDCWD,
            path.as_ptr(),
            &mut handle,
            &mut mount_id,
            0,
        )
    } as i32)?;
    Ok(handle)
}

/// `mount` is any descriptor of the mount; the new one is opened for reading.
pub fn open_by_handle(mount: RawFd, handle: &Handle) -> Done<RawFd> {
    let mut handle = handle.clone();
    // SAFETY: the handle came from the kernel and is as long as it says.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount,
            &mut handle,
            libc::O_RDONLY | libc::O_CLOEXEC,
        )
    };
    Errno::result(fd).map(|fd| fd as RawFd)
}

/// A descriptor of an inotify instance, and a watch of everything on `path`.
pub fn inotify() -> Done<OwnedFd> {
    // SAFETY: a fresh descriptor that nobody else owns.
    unsafe {
        let fd = Errno::result(libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

pub fn watch(inotify: RawFd, path: &Path) -> Done<i32> {
    // SAFETY: the path ends with a NUL.
    Errno::result(unsafe {
        libc::inotify_add_watch(inotify, c(path).as_ptr(), libc::IN_ALL_EVENTS)
    })
}

/// The watches that have events now.
pub fn events(inotify: RawFd) -> Done<Vec<i32>> {
    let bytes = match read(inotify, 4096) {
        Err(Errno::EAGAIN) => return Ok(vec![]),
        other => other?,
    };
    let mut watches = Vec::new();
    let mut at = 0;
    while at + 16 <= bytes.len() {
        let word = |i: usize| u32::from_ne_bytes(bytes[at + i..at + i + 4].try_into().expect("4"));
        watches.push(word(0) as i32);
        at += 16 + word(12) as usize;
    }
    Ok(watches)
}

pub fn unwatch(inotify: RawFd, watch: i32) -> Done<()> {
    // SAFETY: plain numbers.
    plain(unsafe { libc::inotify_rm_watch(inotify, watch) })
}
