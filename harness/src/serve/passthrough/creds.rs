// SPDX-License-Identifier: GPL-2.0
//! Acting as the caller, for one thread and one operation.
//!
//! A new file gets its owner from the file system ids of the thread that makes it, and its mode
//! from the umask (which a default ACL of the parent replaces). So the thread takes both over
//! from the request instead of repairing them afterwards: a crash in between leaves no file with
//! a wrong owner. Permissions were checked by the kernel before the request was sent, with groups
//! that the server does not know; so the thread keeps its capabilities.

use std::cell::Cell;

use nix::errno::Errno;

use super::sys::Res;

thread_local! {
    static OWN_UMASK: Cell<bool> = const { Cell::new(false) };
}

/// Who asks: what `fuse_in_header` says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `_LINUX_CAPABILITY_VERSION_3`.
const CAP_VERSION: u32 = 0x2008_0522;

/// Gives the thread its ids back, also when the operation panics.
struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        // Back to root, which also puts the file system capabilities back into force.
        set_fs_ids(0, 0);
    }
}

impl Caller {
    /// Runs `f` with the caller's ids and `umask`, and with the server's capabilities.
    pub fn create<R>(self, umask: u32, f: impl FnOnce() -> Res<R>) -> Res<R> {
        private_umask()?;
        // SAFETY: umask(2) cannot fail and touches no memory; this thread has one of its own.
        unsafe { libc::umask(umask & 0o777) };
        if self.uid == 0 && self.gid == 0 {
            return f();
        }
        let _guard = Guard;
        set_fs_ids(self.uid, self.gid);
        if self.uid != 0 {
            raise_permitted()?;
        }
        f()
    }

    /// Runs `f` with the caller's ids and without the capabilities that root would have.
    pub fn restricted<R>(self, f: impl FnOnce() -> Res<R>) -> Res<R> {
        let _guard = Guard;
        set_fs_ids(self.uid, self.gid);
        f()
    }
}

/// Threads share their umask until one asks for its own.
fn private_umask() -> Res<()> {
    if !OWN_UMASK.get() {
        // SAFETY: only the calling thread's root, working directory and umask are separated.
        Errno::result(unsafe { libc::unshare(libc::CLONE_FS) })?;
        OWN_UMASK.set(true);
    }
    Ok(())
}

/// The raw calls act on this thread alone, and never fail for a process with CAP_SETUID/SETGID.
fn set_fs_ids(uid: u32, gid: u32) {
    // SAFETY: no memory is involved.
    unsafe {
        libc::syscall(libc::SYS_setfsgid, gid);
        libc::syscall(libc::SYS_setfsuid, uid);
    }
}

/// `setfsuid` to a user drops the file system capabilities from the effective set.
fn raise_permitted() -> Res<()> {
    let mut header = CapHeader {
        version: CAP_VERSION,
        pid: 0,
    };
    let mut data = [CapData::default(); 2];
    // SAFETY: header and two data words are what version 3 reads and writes.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, &mut header, data.as_mut_ptr()) })?;
    for word in &mut data {
        word.effective |= word.permitted;
    }
    // SAFETY: as above.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &mut header, data.as_ptr()) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_new_file_belongs_to_the_caller_and_the_thread_is_root_again() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let caller = Caller {
            uid: 1234,
            gid: 5678,
        };
        caller
            .create(0o027, || {
                use std::os::unix::fs::OpenOptionsExt;
                std::fs::OpenOptions::new()
                    .create_new(true)
                    .write(true)
                    .mode(0o666)
                    .open(&path)
                    .map(drop)
                    .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))
            })
            .expect("the directory is root's alone: the capabilities must be in force");
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!(
            (meta.uid(), meta.gid(), meta.mode() & 0o777),
            (1234, 5678, 0o640)
        );

        let after = dir.path().join("after");
        std::fs::write(&after, b"").unwrap();
        assert_eq!(std::fs::metadata(&after).unwrap().uid(), 0);
    }
}
