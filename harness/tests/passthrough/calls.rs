// SPDX-License-Identifier: GPL-2.0
//! System calls that the standard library does not have, and results as text.

use std::ffi::CString;
use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A result as text, errors by number.
pub fn say<T: Debug>(result: io::Result<T>) -> String {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(e) => format!("errno {:?}", e.raw_os_error()),
    }
}

pub fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

pub fn ret(value: impl Into<i64>) -> io::Result<i64> {
    match value.into() {
        -1 => Err(io::Error::last_os_error()),
        n => Ok(n),
    }
}

pub fn rename2(from: &Path, to: &Path, flags: u32) -> io::Result<i64> {
    let (from, to) = (c(from), c(to));
    // SAFETY: both strings are NUL-terminated.
    ret(unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            libc::AT_FDCWD,
            from.as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            flags,
        )
    })
}

pub fn mknod(path: &Path, mode: u32, dev: libc::dev_t) -> io::Result<i64> {
    // SAFETY: the string is NUL-terminated.
    ret(unsafe { libc::mknod(c(path).as_ptr(), mode, dev) })
}

pub fn setxattr(path: &Path, name: &str, value: &[u8], flags: i32) -> io::Result<i64> {
    let name = CString::new(name).unwrap();
    // SAFETY: strings are NUL-terminated, the value is readable for its length.
    ret(unsafe {
        libc::lsetxattr(
            c(path).as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            flags,
        )
    })
}

pub fn removexattr(path: &Path, name: &str) -> io::Result<i64> {
    let name = CString::new(name).unwrap();
    // SAFETY: strings are NUL-terminated.
    ret(unsafe { libc::lremovexattr(c(path).as_ptr(), name.as_ptr()) })
}

pub fn utimens(path: &Path, atime: (i64, i64), mtime: (i64, i64)) -> io::Result<i64> {
    let times = [atime, mtime].map(|(tv_sec, tv_nsec)| libc::timespec { tv_sec, tv_nsec });
    let flags = libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: the string is NUL-terminated, two timespecs follow.
    ret(unsafe { libc::utimensat(libc::AT_FDCWD, c(path).as_ptr(), times.as_ptr(), flags) })
}

pub fn times(path: &Path) -> String {
    say(fs::symlink_metadata(path).map(|m| (m.atime(), m.atime_nsec(), m.mtime(), m.mtime_nsec())))
}

pub fn rw(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}
