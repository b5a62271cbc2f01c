// SPDX-License-Identifier: GPL-2.0
//! Reading directories with the backing file system's own cookies.
//!
//! The offset of an entry that the kernel is given is `d_off` of the backing, so a directory
//! stream that was begun with one instance of the server goes on with the next.

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;

use super::sys::{self, Res};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub ino: u64,
    /// The position *after* this entry.
    pub off: u64,
    pub kind: u8,
    pub name: CString,
}

impl Entry {
    pub fn is_dot(&self) -> bool {
        matches!(self.name.to_bytes(), b"." | b"..")
    }

    pub fn name(&self) -> &OsStr {
        OsStr::from_bytes(self.name.to_bytes())
    }
}

/// Iterates over `linux_dirent64` records; stops at the first that makes no sense.
struct Records<'a>(&'a [u8]);

impl Iterator for Records<'_> {
    type Item = Entry;

    fn next(&mut self) -> Option<Entry> {
        const HEAD: usize = 19; // d_ino, d_off, d_reclen, d_type
        let head = self.0.first_chunk::<HEAD>()?;
        let reclen = u16::from_ne_bytes([head[16], head[17]]) as usize;
        let record = self.0.get(..reclen)?;
        let name = CStr::from_bytes_until_nul(record.get(HEAD..)?).ok()?;
        let word = |at: usize| u64::from_ne_bytes(head[at..at + 8].try_into().expect("8 bytes"));
        let entry = Entry {
            ino: word(0),
            off: word(8),
            kind: head[18],
            name: name.to_owned(),
        };
        self.0 = &self.0[reclen..];
        Some(entry)
    }
}

/// The entries after position `offset`, at least one unless the directory ends there.
pub fn read_from(dir: BorrowedFd<'_>, offset: u64, room: usize) -> Res<Vec<Entry>> {
    let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
    sys::lseek(dir, offset, libc::SEEK_SET)?;
    // A record must fit: 19 bytes and a name of 255, its NUL, padded.
    let mut buf = vec![0; room.clamp(512, 64 * 1024)];
    let n = sys::getdents(dir, &mut buf)?;
    Ok(Records(&buf[..n]).collect())
}

/// The whole directory.
pub fn read_all(dir: BorrowedFd<'_>) -> Res<Vec<Entry>> {
    let mut all = Vec::new();
    let mut offset = 0;
    loop {
        let some = read_from(dir, offset, 64 * 1024)?;
        match some.last() {
            Some(last) => offset = last.off,
            None => return Ok(all),
        }
        all.extend(some);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn every_entry_is_found_once_and_from_every_position() {
        let tmp = tempfile::tempdir().unwrap();
        for i in 0..200 {
            std::fs::write(tmp.path().join(format!("file-{i}")), b"").unwrap();
        }
        let dir = std::fs::File::open(tmp.path()).unwrap();
        let all = read_all(dir.as_fd()).unwrap();
        assert_eq!(all.len(), 202, "with . and ..");
        let mut names: Vec<_> = all.iter().map(|e| e.name.clone()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 202);
        for (i, entry) in all.iter().enumerate().step_by(17) {
            // Another descriptor: the position belongs to the directory, not to the stream.
            let other = std::fs::File::open(tmp.path()).unwrap();
            let rest = read_from(other.as_fd(), entry.off, 512).unwrap();
            assert_eq!(rest.first(), all.get(i + 1), "after entry {i}");
        }
    }

    #[test]
    fn a_record_that_makes_no_sense_ends_the_list() {
        assert_eq!(Records(&[0; 10]).next(), None, "too short");
        assert_eq!(Records(&[0; 64]).next(), None, "length 0");
        let mut long = [1u8; 64];
        long[16..18].copy_from_slice(&1000u16.to_ne_bytes());
        assert_eq!(Records(&long).next(), None, "longer than the buffer");
        long[16..18].copy_from_slice(&64u16.to_ne_bytes());
        assert_eq!(Records(&long).next(), None, "no NUL");
    }
}
