// SPDX-License-Identifier: GPL-2.0
//! The system calls of the server, each as a small safe function.
//!
//! Everything works on descriptors and single path components: a name that could leave the
//! directory it is looked up in never reaches the kernel, see [`component`]. Operations that have
//! no `*at(2)` form with `AT_EMPTY_PATH` on every kernel we serve go through `/proc/self/fd`,
//! which follows the descriptor to the very file, symbolic links and devices included.

use std::ffi::{CStr, CString, OsStr};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use libc::{c_char, c_int, c_void};
use nix::errno::{Errno, ErrnoSentinel};

use crate::crash_points;

pub type Res<T> = Result<T, Errno>;

const EMPTY: &CStr = c"";

/// A name as one path component, or why it is refused.
///
/// The kernel never sends such names; whoever does is not the kernel.
pub fn component(name: &OsStr) -> Res<CString> {
    let bytes = name.as_bytes();
    match bytes {
        b"" => Err(Errno::ENOENT),
        b"." | b".." => Err(Errno::EINVAL),
        _ if bytes.contains(&b'/') => Err(Errno::EINVAL),
        _ if bytes.len() > libc::NAME_MAX as usize => Err(Errno::ENAMETOOLONG),
        _ => CString::new(bytes).map_err(|_| Errno::EINVAL),
    }
}

/// The result of the system call `name`, after which the server may die.
pub fn after<T: ErrnoSentinel + PartialEq>(name: &'static str, ret: T) -> Res<T> {
    let result = Errno::result(ret);
    crash_points::reach(name);
    result
}

fn owned(name: &'static str, ret: c_int) -> Res<OwnedFd> {
    let fd = after(name, ret)?;
    // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn proc_path(fd: RawFd) -> CString {
    CString::new(format!("/proc/self/fd/{fd}")).expect("digits have no NUL")
}

/// Opens `name` in `dir` without following a final symbolic link.
pub fn open_at(dir: BorrowedFd<'_>, name: &CStr, flags: c_int, mode: u32) -> Res<OwnedFd> {
    let flags = flags | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    // SAFETY: `dir` is open and `name` is NUL-terminated for the duration of the call.
    owned("openat", unsafe {
        libc::openat(dir.as_raw_fd(), name.as_ptr(), flags, mode)
    })
}

/// Opens the file behind an `O_PATH` descriptor once more, with other flags.
pub fn reopen(fd: BorrowedFd<'_>, flags: c_int) -> Res<OwnedFd> {
    let path = proc_path(fd.as_raw_fd());
    let flags = (flags | libc::O_CLOEXEC) & !libc::O_NOFOLLOW;
    // SAFETY: `path` is NUL-terminated for the duration of the call.
    owned("open", unsafe { libc::open(path.as_ptr(), flags) })
}

/// Also of an `O_PATH` descriptor. (To the crash points it is the same as with an empty path.)
pub fn fstat(fd: BorrowedFd<'_>) -> Res<libc::stat> {
    let mut st = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `st` is large enough and written on success, which is checked before it is read.
    after("fstatat", unsafe {
        raw_fstat(fd.as_raw_fd(), st.as_mut_ptr())
    })?;
    // SAFETY: the call succeeded.
    Ok(unsafe { st.assume_init() })
}

/// fstat(2) itself: before glibc 2.39 the C library looks up an empty path instead, which takes half as long again, for
/// each of a hundred thousand inodes of a recovery.
#[cfg(target_arch = "x86_64")]
unsafe fn raw_fstat(fd: RawFd, st: *mut libc::stat) -> c_int {
    // SAFETY: as the caller promises; here the kernel's structure is the C library's.
    unsafe { libc::syscall(libc::SYS_fstat, fd, st) as c_int }
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn raw_fstat(fd: RawFd, st: *mut libc::stat) -> c_int {
    // SAFETY: as the caller promises.
    unsafe { libc::fstat(fd, st) }
}

pub fn lstat_at(dir: BorrowedFd<'_>, name: &CStr) -> Res<libc::stat> {
    stat_at(dir, name, libc::AT_SYMLINK_NOFOLLOW)
}

fn stat_at(dir: BorrowedFd<'_>, name: &CStr, flags: c_int) -> Res<libc::stat> {
    let mut st = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `st` is large enough and written on success, which is checked before it is read.
    after("fstatat", unsafe {
        libc::fstatat(dir.as_raw_fd(), name.as_ptr(), st.as_mut_ptr(), flags)
    })?;
    // SAFETY: the call succeeded.
    Ok(unsafe { st.assume_init() })
}

pub fn fstatvfs(fd: BorrowedFd<'_>) -> Res<libc::statvfs> {
    let mut st = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: as in `stat_at`.
    after("fstatvfs", unsafe {
        libc::fstatvfs(fd.as_raw_fd(), st.as_mut_ptr())
    })?;
    // SAFETY: the call succeeded.
    Ok(unsafe { st.assume_init() })
}

pub fn mkdir_at(dir: BorrowedFd<'_>, name: &CStr, mode: u32) -> Res<()> {
    // SAFETY: `dir` is open and `name` NUL-terminated.
    after("mkdirat", unsafe {
        libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode)
    })
    .map(drop)
}

pub fn mknod_at(dir: BorrowedFd<'_>, name: &CStr, mode: u32, rdev: libc::dev_t) -> Res<()> {
    // SAFETY: as in `mkdir_at`.
    after("mknodat", unsafe {
        libc::mknodat(dir.as_raw_fd(), name.as_ptr(), mode, rdev)
    })
    .map(drop)
}

pub fn symlink_at(target: &CStr, dir: BorrowedFd<'_>, name: &CStr) -> Res<()> {
    // SAFETY: as in `mkdir_at`, for both strings.
    after("symlinkat", unsafe {
        libc::symlinkat(target.as_ptr(), dir.as_raw_fd(), name.as_ptr())
    })
    .map(drop)
}

/// A hard link to the open file itself, whatever name it has now.
pub fn link_fd(file: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &CStr) -> Res<()> {
    // SAFETY: as in `mkdir_at`; the empty path with AT_EMPTY_PATH names `file`.
    after("linkat", unsafe {
        libc::linkat(
            file.as_raw_fd(),
            EMPTY.as_ptr(),
            dir.as_raw_fd(),
            name.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    })
    .map(drop)
}

pub fn unlink_at(dir: BorrowedFd<'_>, name: &CStr) -> Res<()> {
    // SAFETY: as in `mkdir_at`.
    after("unlinkat", unsafe {
        libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), 0)
    })
    .map(drop)
}

pub fn rmdir_at(dir: BorrowedFd<'_>, name: &CStr) -> Res<()> {
    // SAFETY: as in `mkdir_at`.
    after("unlinkat", unsafe {
        libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), libc::AT_REMOVEDIR)
    })
    .map(drop)
}

pub fn rename_at(
    from: BorrowedFd<'_>,
    name: &CStr,
    to: BorrowedFd<'_>,
    newname: &CStr,
    flags: u32,
) -> Res<()> {
    // SAFETY: as in `mkdir_at`, for both names. The system call is used directly because the C
    // library's wrapper is missing in some; the arguments are the documented ones.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            from.as_raw_fd(),
            name.as_ptr(),
            to.as_raw_fd(),
            newname.as_ptr(),
            flags,
        )
    };
    after("renameat2", ret).map(drop)
}

pub fn readlink(link: BorrowedFd<'_>) -> Res<Vec<u8>> {
    let mut buf = vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: the buffer is writable for its length; the empty path names `link`.
    let n = after("readlinkat", unsafe {
        libc::readlinkat(
            link.as_raw_fd(),
            EMPTY.as_ptr(),
            buf.as_mut_ptr().cast::<c_char>(),
            buf.len(),
        )
    })?;
    buf.truncate(n as usize);
    Ok(buf)
}

pub fn chmod(fd: BorrowedFd<'_>, mode: u32) -> Res<()> {
    // SAFETY: the path is NUL-terminated. (fchmodat2 with AT_EMPTY_PATH needs Linux 6.6.)
    after("chmod", unsafe {
        libc::chmod(proc_path(fd.as_raw_fd()).as_ptr(), mode)
    })
    .map(drop)
}

pub fn chown(fd: BorrowedFd<'_>, uid: Option<u32>, gid: Option<u32>) -> Res<()> {
    let (uid, gid) = (uid.unwrap_or(u32::MAX), gid.unwrap_or(u32::MAX));
    // SAFETY: `fd` is open and the empty path names it; (uid_t)-1 leaves an id as it is.
    after("fchownat", unsafe {
        libc::fchownat(
            fd.as_raw_fd(),
            EMPTY.as_ptr(),
            uid,
            gid,
            libc::AT_EMPTY_PATH,
        )
    })
    .map(drop)
}

pub fn utimens(fd: BorrowedFd<'_>, times: &[libc::timespec; 2]) -> Res<()> {
    // SAFETY: two timespecs, as the call wants; the path is NUL-terminated. (utimensat with
    // AT_EMPTY_PATH needs Linux 5.8 and C libraries refuse it; the magic link does the same.)
    after("utimensat", unsafe {
        libc::utimensat(
            libc::AT_FDCWD,
            proc_path(fd.as_raw_fd()).as_ptr(),
            times.as_ptr(),
            0,
        )
    })
    .map(drop)
}

pub fn ftruncate(fd: BorrowedFd<'_>, size: u64) -> Res<()> {
    let size = i64::try_from(size).map_err(|_| Errno::EFBIG)?;
    // SAFETY: no memory is involved.
    after("ftruncate", unsafe {
        libc::ftruncate(fd.as_raw_fd(), size)
    })
    .map(drop)
}

pub fn fallocate(fd: BorrowedFd<'_>, mode: c_int, offset: u64, len: u64) -> Res<()> {
    let offset = i64::try_from(offset).map_err(|_| Errno::EFBIG)?;
    let len = i64::try_from(len).map_err(|_| Errno::EFBIG)?;
    // SAFETY: no memory is involved.
    after("fallocate", unsafe {
        libc::fallocate(fd.as_raw_fd(), mode, offset, len)
    })
    .map(drop)
}

pub fn fsync(fd: BorrowedFd<'_>, datasync: bool) -> Res<()> {
    // SAFETY: no memory is involved.
    after("fsync", unsafe {
        if datasync {
            libc::fdatasync(fd.as_raw_fd())
        } else {
            libc::fsync(fd.as_raw_fd())
        }
    })
    .map(drop)
}

pub fn lseek(fd: BorrowedFd<'_>, offset: i64, whence: c_int) -> Res<i64> {
    // SAFETY: no memory is involved.
    after("lseek", unsafe {
        libc::lseek(fd.as_raw_fd(), offset, whence)
    })
}

/// Reads until the buffer is full or the file ends: a short read in the middle of a file would be
/// taken for its end.
pub fn read_full_at(fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Res<usize> {
    let mut done = 0;
    while done < buf.len() {
        let at = i64::try_from(offset + done as u64).map_err(|_| Errno::EINVAL)?;
        let rest = &mut buf[done..];
        // SAFETY: `rest` is writable for its length.
        let n = after("pread", unsafe {
            libc::pread(
                fd.as_raw_fd(),
                rest.as_mut_ptr().cast::<c_void>(),
                rest.len(),
                at,
            )
        });
        match n {
            Ok(0) => break,
            Ok(n) => done += n as usize,
            Err(Errno::EINTR) => {}
            Err(_) if done > 0 => break,
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Writes all of it if it can; the number of bytes written before an error otherwise.
pub fn write_full_at(fd: BorrowedFd<'_>, data: &[u8], offset: u64) -> Res<usize> {
    let mut done = 0;
    while done < data.len() {
        let at = i64::try_from(offset + done as u64).map_err(|_| Errno::EINVAL)?;
        let rest = &data[done..];
        // SAFETY: `rest` is readable for its length.
        let n = after("pwrite", unsafe {
            libc::pwrite(
                fd.as_raw_fd(),
                rest.as_ptr().cast::<c_void>(),
                rest.len(),
                at,
            )
        });
        match n {
            Ok(0) => break,
            Ok(n) => done += n as usize,
            Err(Errno::EINTR) => {}
            Err(_) if done > 0 => break,
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

pub fn copy_file_range(
    from: BorrowedFd<'_>,
    offset_in: u64,
    to: BorrowedFd<'_>,
    offset_out: u64,
    len: usize,
) -> Res<usize> {
    let mut off_in = i64::try_from(offset_in).map_err(|_| Errno::EINVAL)?;
    let mut off_out = i64::try_from(offset_out).map_err(|_| Errno::EINVAL)?;
    // SAFETY: both offsets are valid for the duration of the call.
    let n = after("copy_file_range", unsafe {
        libc::copy_file_range(
            from.as_raw_fd(),
            &mut off_in,
            to.as_raw_fd(),
            &mut off_out,
            len,
            0,
        )
    })?;
    Ok(n as usize)
}

/// Fills `buf` with `linux_dirent64` records from the stream's position.
pub fn getdents(fd: BorrowedFd<'_>, buf: &mut [u8]) -> Res<usize> {
    // SAFETY: `buf` is writable for its length; the records are parsed as bytes.
    let n = after("getdents64", unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            fd.as_raw_fd(),
            buf.as_mut_ptr(),
            buf.len(),
        )
    })?;
    Ok(n as usize)
}

pub fn get_xattr(fd: BorrowedFd<'_>, name: &CStr, buf: &mut [u8]) -> Res<usize> {
    let path = proc_path(fd.as_raw_fd());
    // SAFETY: strings are NUL-terminated, `buf` is writable for its length (0 asks for the size).
    let n = after("getxattr", unsafe {
        libc::getxattr(
            path.as_ptr(),
            name.as_ptr(),
            buf.as_mut_ptr().cast::<c_void>(),
            buf.len(),
        )
    })?;
    Ok(n as usize)
}

pub fn list_xattr(fd: BorrowedFd<'_>, buf: &mut [u8]) -> Res<usize> {
    let path = proc_path(fd.as_raw_fd());
    // SAFETY: as in `get_xattr`.
    let n = after("listxattr", unsafe {
        libc::listxattr(path.as_ptr(), buf.as_mut_ptr().cast::<c_char>(), buf.len())
    })?;
    Ok(n as usize)
}

pub fn set_xattr(fd: BorrowedFd<'_>, name: &CStr, value: &[u8], flags: c_int) -> Res<()> {
    let path = proc_path(fd.as_raw_fd());
    // SAFETY: strings are NUL-terminated, `value` is readable for its length.
    after("setxattr", unsafe {
        libc::setxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast::<c_void>(),
            value.len(),
            flags,
        )
    })
    .map(drop)
}

pub fn remove_xattr(fd: BorrowedFd<'_>, name: &CStr) -> Res<()> {
    let path = proc_path(fd.as_raw_fd());
    // SAFETY: strings are NUL-terminated.
    after("removexattr", unsafe {
        libc::removexattr(path.as_ptr(), name.as_ptr())
    })
    .map(drop)
}

/// Like `access(2)`, with the thread's file system ids instead of the process's real ones.
pub fn access(fd: BorrowedFd<'_>, mask: c_int) -> Res<()> {
    // SAFETY: `fd` is open, the empty path names it.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_faccessat2,
            fd.as_raw_fd(),
            EMPTY.as_ptr(),
            mask,
            libc::AT_EMPTY_PATH | libc::AT_EACCESS,
        )
    };
    after("faccessat2", ret).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_component_is_one_name_and_nothing_else() {
        for (name, want) in [
            ("a", Ok(())),
            ("..a", Ok(())),
            ("...", Ok(())),
            ("", Err(Errno::ENOENT)),
            (".", Err(Errno::EINVAL)),
            ("..", Err(Errno::EINVAL)),
            ("a/b", Err(Errno::EINVAL)),
            ("/", Err(Errno::EINVAL)),
            ("../etc", Err(Errno::EINVAL)),
            ("a\0b", Err(Errno::EINVAL)),
        ] {
            assert_eq!(component(OsStr::new(name)).map(drop), want, "{name:?}");
        }
        let long = "x".repeat(256);
        assert_eq!(component(OsStr::new(&long)), Err(Errno::ENAMETOOLONG));
        assert!(component(OsStr::new(&long[..255])).is_ok());
    }
}
