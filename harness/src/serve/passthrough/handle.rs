// SPDX-License-Identifier: GPL-2.0
//! Kernel file handles: the identity of a backing file that outlives this process.
//!
//! `name_to_handle_at(2)` gives a few opaque bytes and a type; `open_by_handle_at(2)` opens the
//! same file, or fails with `ESTALE` when it is gone. The file system puts its own generation
//! number into the bytes, so a new file in the place of a removed one has another handle.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use rust_fuse_notify::std::state::FileHandle;

use super::sys::{self, Res};

/// What the kernel allows at most (`MAX_HANDLE_SZ`).
pub const MAX_BYTES: usize = FileHandle::MAX;

/// A file handle. Two names with equal handles are one file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Handle(pub FileHandle);

/// `struct file_handle` with room for the largest one.
#[repr(C)]
struct Raw {
    len: u32,
    kind: i32,
    bytes: [u8; MAX_BYTES],
}

impl Handle {
    /// The handle of an open file (`O_PATH` is enough) and the id of the mount it was opened through.
    pub fn of(fd: BorrowedFd<'_>) -> Res<(Handle, i32)> {
        Self::get(fd, c"", libc::AT_EMPTY_PATH)
    }

    /// The handle of `name` in `dir`; a final symbolic link is not followed.
    pub fn at(dir: BorrowedFd<'_>, name: &CStr) -> Res<Handle> {
        Self::get(dir, name, 0).map(|(handle, _)| handle)
    }

    fn get(dir: BorrowedFd<'_>, name: &CStr, flags: i32) -> Res<(Handle, i32)> {
        let mut raw = Raw {
            len: MAX_BYTES as u32,
            kind: 0,
            bytes: [0; MAX_BYTES],
        };
        let mut mount = 0;
        // SAFETY: `raw` has the layout of struct file_handle followed by the room its `len` claims.
        sys::after("name_to_handle_at", unsafe {
            libc::name_to_handle_at(
                dir.as_raw_fd(),
                name.as_ptr(),
                (&raw mut raw).cast::<libc::file_handle>(),
                &mut mount,
                flags,
            )
        })?;
        let bytes = raw.bytes.get(..raw.len as usize).ok_or(Errno::EOVERFLOW)?;
        let handle = FileHandle::new(raw.kind, bytes).ok_or(Errno::EOVERFLOW)?;
        Ok((Handle(handle), mount))
    }

    /// Opens the file; `mount` is any descriptor on its file system that is not `O_PATH`.
    pub fn open(&self, mount: BorrowedFd<'_>, flags: i32) -> Res<OwnedFd> {
        let bytes = self.0.bytes();
        let mut raw = Raw {
            len: bytes.len() as u32,
            kind: self.0.kind(),
            bytes: [0; MAX_BYTES],
        };
        raw.bytes[..bytes.len()].copy_from_slice(bytes);
        // SAFETY: as in `get`; the call only reads the handle.
        let fd = sys::after("open_by_handle_at", unsafe {
            libc::open_by_handle_at(
                mount.as_raw_fd(),
                (&raw mut raw).cast::<libc::file_handle>(),
                flags | libc::O_CLOEXEC,
            )
        })?;
        // SAFETY: the call succeeded, so `fd` is new and ours.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// For the journal: type (little endian), then the bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.0.kind().to_le_bytes().to_vec();
        out.extend_from_slice(self.0.bytes());
        out
    }

    /// The inverse of [`Handle::encode`]. The state may be damaged: anything that no handle can be
    /// is refused.
    pub fn decode(data: &[u8]) -> Option<Handle> {
        let (kind, bytes) = data.split_first_chunk::<4>()?;
        if bytes.is_empty() {
            return None;
        }
        FileHandle::new(i32::from_le_bytes(*kind), bytes).map(Handle)
    }

    /// A number that goes with the nodeid as its generation: a node that the kernel shows with
    /// another one is not the node of this file.
    pub fn generation(&self) -> u32 {
        let fnv = |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
        self.encode().iter().fold(0x811c_9dc5, fnv)
    }

    #[cfg(test)]
    pub fn fake(kind: i32, bytes: &[u8]) -> Handle {
        Handle(FileHandle::new(kind, bytes).unwrap())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_encoded_is_decoded() {
        for handle in [
            Handle::fake(1, &[1, 2, 3, 4, 5, 6, 7, 8]),
            Handle::fake(-1, &[0]),
            Handle::fake(0x7fff_ffff, &[0xff; MAX_BYTES]),
        ] {
            assert_eq!(Handle::decode(&handle.encode()), Some(handle));
        }
    }

    #[test]
    fn what_no_handle_can_be_is_refused() {
        assert_eq!(Handle::decode(&[]), None);
        assert_eq!(Handle::decode(&[1, 0, 0]), None, "no whole type");
        assert_eq!(Handle::decode(&[1, 0, 0, 0]), None, "no bytes");
        assert_eq!(Handle::decode(&[0; 4 + MAX_BYTES + 1]), None, "too long");
    }

    #[test]
    fn generations_differ_where_handles_do() {
        let one = Handle::fake(1, &[1, 2, 3, 4]);
        assert_eq!(one.generation(), one.clone().generation());
        assert_ne!(
            one.generation(),
            Handle::fake(1, &[1, 2, 3, 5]).generation()
        );
        assert_ne!(
            one.generation(),
            Handle::fake(2, &[1, 2, 3, 4]).generation()
        );
    }

    #[test]
    fn type_and_bytes_both_tell_files_apart() {
        let one = Handle::fake(1, &[1, 2]);
        assert_ne!(one, Handle::fake(2, &[1, 2]));
        assert_ne!(one, Handle::fake(1, &[1, 3]));
        assert_ne!(one.encode(), Handle::fake(2, &[1, 2]).encode());
    }
}
