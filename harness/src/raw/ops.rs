// SPDX-License-Identifier: GPL-2.0
//! What applications do: one function a system call, with the bare errno.
//!
//! Descriptors are plain numbers and are never closed behind the scenario's back: a close sends FLUSH and
//! waits for a server, which a scenario that failed no longer has.

use std::ffi::CString;
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags, AT_FDCWD};
use nix::sys::stat::Mode;

pub type Done<T> = Result<T, Errno>;

fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("no scenario uses a NUL in a path")
}

/// `statx` that always asks the server for the attributes.
pub fn stat(path: &Path) -> Done<libc::statx> {
    statx(libc::AT_FDCWD, &c(path), libc::AT_STATX_FORCE_SYNC)
}

/// `statx` that is happy with what the kernel has cached.
pub fn stat_cached(path: &Path) -> Done<libc::statx> {
    statx(libc::AT_FDCWD, &c(path), libc::AT_STATX_SYNC_AS_STAT)
}

/// The attributes of an open file, asked from the server.
pub fn fstat(fd: RawFd) -> Done<libc::statx> {
    statx(fd, c"", libc::AT_EMPTY_PATH | libc::AT_STATX_FORCE_SYNC)
}

/// The attributes of an open file, as far as they are valid those that the kernel has cached.
pub fn fstat_cached(fd: RawFd) -> Done<libc::statx> {
    statx(fd, c"", libc::AT_EMPTY_PATH | libc::AT_STATX_SYNC_AS_STAT)
}

fn statx(dir: RawFd, path: &std::ffi::CStr, flags: i32) -> Done<libc::statx> {
    // SAFETY: an all-zero statx is valid; the kernel fills it, and the path ends with a NUL.
    unsafe {
        let mut out: libc::statx = std::mem::zeroed();
        let rc = libc::statx(dir, path.as_ptr(), flags, libc::STATX_BASIC_STATS, &mut out);
        Errno::result(rc).map(|_| out)
    }
}

pub fn mkdir(path: &Path) -> Done<()> {
    nix::unistd::mkdir(path, Mode::from_bits_truncate(0o755))
}

pub fn rmdir(path: &Path) -> Done<()> {
    // SAFETY: the path ends with a NUL.
    Errno::result(unsafe { libc::rmdir(c(path).as_ptr()) }).map(drop)
}

pub fn unlink(path: &Path) -> Done<()> {
    nix::unistd::unlink(path)
}

pub fn symlink(target: &str, path: &Path) -> Done<()> {
    nix::unistd::symlinkat(target, AT_FDCWD, path)
}

pub fn readlink(path: &Path) -> Done<std::ffi::OsString> {
    nix::fcntl::readlink(path)
}

/// `linkat` that follows the old path, so that `/proc/self/fd/N` names an open file.
pub fn link(old: &Path, new: &Path) -> Done<()> {
    nix::unistd::linkat(
        AT_FDCWD,
        old,
        AT_FDCWD,
        new,
        nix::fcntl::AtFlags::AT_SYMLINK_FOLLOW,
    )
}

pub fn rename(old: &Path, new: &Path, flags: RenameFlags) -> Done<()> {
    nix::fcntl::renameat2(AT_FDCWD, old, AT_FDCWD, new, flags)
}

pub fn chmod(path: &Path, mode: u32) -> Done<()> {
    // SAFETY: the path ends with a NUL.
    Errno::result(unsafe { libc::chmod(c(path).as_ptr(), mode) }).map(drop)
}

pub fn open(path: &Path, flags: OFlag) -> Done<RawFd> {
    nix::fcntl::open(
        path,
        flags | OFlag::O_CLOEXEC,
        Mode::from_bits_truncate(0o644),
    )
    .map(IntoRawFd::into_raw_fd)
}

pub fn close(fd: RawFd) -> Done<()> {
    // SAFETY: a number; the scenario owns it.
    Errno::result(unsafe { libc::close(fd) }).map(drop)
}

pub fn pread(fd: RawFd, len: usize, offset: i64) -> Done<Vec<u8>> {
    let mut buffer = vec![0; len];
    let n = pread_into(fd, &mut buffer, offset)?;
    buffer.truncate(n);
    Ok(buffer)
}

pub fn pread_into(fd: RawFd, buffer: &mut [u8], offset: i64) -> Done<usize> {
    // SAFETY: the pointer and the length are those of the slice.
    let n = unsafe { libc::pread(fd, buffer.as_mut_ptr().cast(), buffer.len(), offset) };
    Errno::result(n).map(|n| n as usize)
}

pub fn pwrite(fd: RawFd, bytes: &[u8], offset: i64) -> Done<usize> {
    // SAFETY: the pointer and the length are those of the slice.
    Errno::result(unsafe { libc::pwrite(fd, bytes.as_ptr().cast(), bytes.len(), offset) })
        .map(|n| n as usize)
}

pub fn fsync(fd: RawFd) -> Done<()> {
    // SAFETY: a number.
    Errno::result(unsafe { libc::fsync(fd) }).map(drop)
}

pub fn ftruncate(fd: RawFd, len: i64) -> Done<()> {
    // SAFETY: plain numbers.
    Errno::result(unsafe { libc::ftruncate(fd, len) }).map(drop)
}

pub fn fallocate(fd: RawFd, offset: i64, len: i64) -> Done<()> {
    // SAFETY: plain numbers.
    Errno::result(unsafe { libc::fallocate(fd, 0, offset, len) }).map(drop)
}

/// `lseek(SEEK_DATA)`, which asks the server.
pub fn seek_data(fd: RawFd, offset: i64) -> Done<i64> {
    // SAFETY: plain numbers.
    Errno::result(unsafe { libc::lseek(fd, offset, libc::SEEK_DATA) })
}

pub fn copy_file_range(from: RawFd, to: RawFd, len: usize) -> Done<usize> {
    let (mut a, mut b) = (0i64, 0i64);
    // SAFETY: both offsets live until the call returns.
    Errno::result(unsafe { libc::copy_file_range(from, &mut a, to, &mut b, len, 0) })
        .map(|n| n as usize)
}

/// A POSIX write lock on the whole file, without waiting.
pub fn lock(fd: RawFd) -> Done<()> {
    // SAFETY: an all-zero flock is valid; the kernel only reads it.
    unsafe {
        let mut lock: libc::flock = std::mem::zeroed();
        lock.l_type = libc::F_WRLCK as i16;
        Errno::result(libc::fcntl(fd, libc::F_SETLK, &lock)).map(drop)
    }
}

/// `splice` from the file into a pipe.
pub fn splice_read(fd: RawFd, len: usize) -> Done<usize> {
    let (_read, write) = nix::unistd::pipe()?;
    let mut offset = 0i64;
    // SAFETY: the offset lives until the call returns, the descriptors are open.
    let n = unsafe {
        libc::splice(
            fd,
            &mut offset,
            write.as_raw_fd(),
            std::ptr::null_mut(),
            len,
            0,
        )
    };
    Errno::result(n).map(|n| n as usize)
}

/// What `poll(2)` says about the file at once.
pub fn poll_now(fd: RawFd) -> Done<i16> {
    let mut one = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, one entry.
    Errno::result(unsafe { libc::poll(&mut one, 1, 0) })?;
    Ok(one.revents)
}

pub fn listdir(path: &Path) -> Done<Vec<String>> {
    let mut dir = nix::dir::Dir::open(path, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut names = Vec::new();
    for entry in dir.iter() {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(names)
}

/// Opens, reads everything, closes.
pub fn read_file(path: &Path) -> Done<Vec<u8>> {
    let fd = open(path, OFlag::O_RDONLY)?;
    let mut all = Vec::new();
    loop {
        match pread(fd, 1 << 16, all.len() as i64) {
            Ok(part) if part.is_empty() => break,
            Ok(part) => all.extend_from_slice(&part),
            Err(e) => {
                let _ = close(fd);
                return Err(e);
            }
        }
    }
    close(fd)?;
    Ok(all)
}

pub fn setxattr(path: &Path, name: &str, value: &[u8]) -> Done<()> {
    let name = CString::new(name).expect("no NUL in attribute names here");
    // SAFETY: NUL-terminated strings, and the slice's own length.
    let rc = unsafe {
        libc::setxattr(
            c(path).as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    Errno::result(rc).map(drop)
}
