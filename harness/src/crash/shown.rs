// SPDX-License-Identifier: GPL-2.0
//! Attributes as text that is equal in two runs of one workload if, and only if, what must be equal is.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// Times between these seconds were set by somebody and are told exactly; others are those of some change.
pub const SET: std::ops::Range<i64> = 1_000_000_000..1_100_000_000;

/// What one onlooker has seen so far: inode numbers are told by the order in which they were met.
pub struct Shown {
    met: BTreeMap<u64, usize>,
    /// With the write-back cache it depends on the moment how many blocks the backing has.
    blocks: bool,
}

impl Shown {
    pub fn new(blocks: bool) -> Shown {
        Shown {
            met: BTreeMap::new(),
            blocks,
        }
    }

    pub fn ino(&mut self, ino: u64) -> usize {
        let next = self.met.len();
        *self.met.entry(ino).or_insert(next)
    }

    pub fn stat(&mut self, st: &libc::stat) -> String {
        let regular = st.st_mode & libc::S_IFMT == libc::S_IFREG;
        let blocks = if self.blocks && regular {
            format!(" blocks {}", st.st_blocks)
        } else {
            String::new()
        };
        format!(
            "#{} mode {:o} links {} owner {}:{} size {}{blocks} rdev {:x} atime {} mtime {}",
            self.ino(st.st_ino),
            st.st_mode,
            st.st_nlink,
            st.st_uid,
            st.st_gid,
            st.st_size,
            st.st_rdev,
            time(st.st_atime, st.st_atime_nsec),
            time(st.st_mtime, st.st_mtime_nsec)
        )
    }
}

fn time(seconds: i64, nanoseconds: i64) -> String {
    if SET.contains(&seconds) {
        format!("{seconds}.{nanoseconds:09}")
    } else {
        "of-a-change".into()
    }
}

/// The names of a file's extended attributes, sorted; labels of a security module are not told.
pub fn xattr_names(path: &CStr) -> nix::Result<Vec<CString>> {
    let mut list = vec![0u8; 4096];
    // SAFETY: the path is NUL-terminated and the buffer writable for its length.
    let n = unsafe { libc::llistxattr(path.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
    list.truncate(Errno::result(n)? as usize);
    let mut names: Vec<CString> = list
        .split_inclusive(|byte| *byte == 0)
        .filter_map(|name| CStr::from_bytes_with_nul(name).ok())
        .filter(|name| *name != c"security.selinux")
        .map(CStr::to_owned)
        .collect();
    names.sort();
    Ok(names)
}

pub fn xattr(path: &CStr, name: &CStr) -> nix::Result<Vec<u8>> {
    let mut value = vec![0u8; 4096];
    // SAFETY: as above, for both strings.
    let n = unsafe {
        libc::lgetxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    value.truncate(Errno::result(n)? as usize);
    Ok(value)
}

/// One getdents64(2): name, type and inode number of each entry; none at the end.
pub fn entries(dir: &impl AsRawFd, room: usize) -> nix::Result<Vec<(String, u8, u64)>> {
    let mut buf = vec![0u8; room];
    // SAFETY: the buffer is writable for its length.
    let n = unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            dir.as_raw_fd(),
            buf.as_mut_ptr(),
            buf.len(),
        )
    };
    buf.truncate(Errno::result(n)? as usize);
    let mut entries = Vec::new();
    let mut rest = &buf[..];
    // struct linux_dirent64: ino, off, reclen (2 bytes), type (1 byte), name.
    while rest.len() > 19 {
        let ino = u64::from_ne_bytes(rest[..8].try_into().expect("eight bytes"));
        let len = usize::from(u16::from_ne_bytes([rest[16], rest[17]]));
        let name = CStr::from_bytes_until_nul(&rest[19..len]).unwrap_or(c"?");
        entries.push((name.to_string_lossy().into_owned(), rest[18], ino));
        rest = &rest[len..];
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_times_that_were_set_are_told() {
        assert_eq!(time(1_000_000_007, 5), "1000000007.000000005");
        assert_eq!(time(1_800_000_000, 5), "of-a-change");
    }

    #[test]
    fn inodes_are_told_apart_and_not_by_their_numbers() {
        let mut shown = Shown::new(true);
        assert_eq!([shown.ino(77), shown.ino(5), shown.ino(77)], [0, 1, 0]);
    }

    #[test]
    fn entries_of_a_directory_are_read_in_pieces() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..40 {
            std::fs::write(dir.path().join(format!("file{n}")), b"").unwrap();
        }
        let open = std::fs::File::open(dir.path()).unwrap();
        let mut all = Vec::new();
        loop {
            let some = entries(&open, 256).unwrap();
            if some.is_empty() {
                break;
            }
            all.extend(some);
        }
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 42);
        assert!(all.iter().all(|(_, kind, ino)| *kind != 0 && *ino != 0));
    }
}
