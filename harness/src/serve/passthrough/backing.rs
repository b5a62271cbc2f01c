// SPDX-License-Identifier: GPL-2.0
//! The directory that is served: opened once, checked once, named by an identity.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{bail, Context};
use nix::errno::Errno;

use super::handle::Handle;
use super::sys::{self, Res};

pub struct Backing {
    /// Readable, because `open_by_handle_at` refuses an `O_PATH` descriptor as its mount.
    root: OwnedFd,
    pub root_handle: Handle,
    pub dev: u64,
    pub identity: [u64; 2],
}

impl Backing {
    /// Opens `path` and finds out whether its file system can be served.
    pub fn open(path: &Path) -> anyhow::Result<Backing> {
        let shown = path.display();
        let root: OwnedFd = match std::fs::File::open(path) {
            Ok(file) => file.into(),
            Err(e) => bail!("cannot open the backing directory {shown}: {e}"),
        };
        let st = sys::fstat(root.as_fd()).with_context(|| format!("cannot stat {shown}"))?;
        if st.st_mode & libc::S_IFMT != libc::S_IFDIR {
            bail!("the backing {shown} is not a directory: name the directory to serve");
        }
        let root_handle = match Handle::of(root.as_fd()) {
            Ok((handle, _)) => handle,
            Err(Errno::EOPNOTSUPP) => bail!(
                "the file system of {shown} has no file handles, so its files cannot be found \
                 again after a restart: use a directory on ext4, xfs, btrfs or tmpfs"
            ),
            Err(e) => bail!("cannot get a file handle of {shown}: {}", e.desc()),
        };
        match root_handle.open(root.as_fd(), libc::O_PATH) {
            Ok(_) => {}
            Err(Errno::EPERM) => bail!(
                "opening files by handle needs CAP_DAC_READ_SEARCH in the initial user \
                 namespace: run the server as root, outside of a user namespace"
            ),
            Err(e) => bail!(
                "the file system of {shown} gives file handles but does not open them ({}): \
                 use a directory on ext4, xfs, btrfs or tmpfs",
                e.desc()
            ),
        }
        let identity = identity(&fs_id(root.as_fd()), &root_handle);
        Ok(Backing {
            root,
            root_handle,
            dev: st.st_dev,
            identity,
        })
    }

    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Opens the file of `handle`, wherever it is now.
    pub fn open_handle(&self, handle: &Handle, flags: i32) -> Res<OwnedFd> {
        handle.open(self.root.as_fd(), flags)
    }
}

/// What the kernel calls this file system: `f_fsid` comes from its UUID where it has one (a tmpfs
/// makes one up at every mount, which is right: its content is gone with it).
fn fs_id(fd: BorrowedFd<'_>) -> Vec<u8> {
    match nix::sys::statfs::fstatfs(fd) {
        Ok(st) => {
            let id = st.filesystem_id();
            let mut bytes = st.filesystem_type().0.to_le_bytes().to_vec();
            // SAFETY: fsid_t is two plain integers.
            let raw: [u8; size_of::<libc::fsid_t>()] = unsafe { std::mem::transmute(id) };
            bytes.extend_from_slice(&raw);
            bytes
        }
        Err(_) => Vec::new(),
    }
}

/// 128 bits of FNV-1a: stable across builds, and nobody attacks it who could not replace the
/// directory's content as well. Never zero, which the protocol uses for "none".
fn identity(fs: &[u8], root: &Handle) -> [u64; 2] {
    const PRIME: u128 = 0x0000000001000000000000000000013b;
    const BASIS: u128 = 0x6c62272e07bb014262b821756295c58d;
    let mut hash = BASIS;
    for byte in fs.iter().chain(&root.encode()) {
        hash = (hash ^ u128::from(*byte)).wrapping_mul(PRIME);
    }
    let hash = if hash == 0 { BASIS } else { hash };
    [hash as u64, (hash >> 64) as u64]
}

/// Raises the number of descriptors to what the system allows and says how many that is.
pub fn raise_nofile() -> u64 {
    use nix::sys::resource::{getrlimit, setrlimit, Resource};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return 1024;
    };
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    }
}

/// For messages: what `path` is once links and dots are gone.
pub fn resolved(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(path: &Path) -> String {
        match Backing::open(path) {
            Ok(_) => panic!("{} was accepted", path.display()),
            Err(e) => format!("{e:#}"),
        }
    }

    #[test]
    fn a_backing_that_cannot_be_served_is_refused_with_its_reason() {
        let dir = tempfile::tempdir().unwrap();
        let missing = message(&dir.path().join("missing"));
        assert!(missing.contains("No such file"), "{missing}");
        let file = dir.path().join("file");
        std::fs::write(&file, b"").unwrap();
        let not_dir = message(&file);
        assert!(not_dir.contains("is not a directory"), "{not_dir}");
        // procfs has no export operations.
        let no_handles = message(Path::new("/proc/self"));
        assert!(no_handles.contains("no file handles"), "{no_handles}");
    }

    #[test]
    fn the_identity_tells_directories_and_file_systems_apart() {
        let (a, b) = (Handle::fake(1, &[1; 8]), Handle::fake(1, &[2; 8]));
        assert_eq!(identity(b"fs", &a), identity(b"fs", &a));
        assert_ne!(identity(b"fs", &a), identity(b"fs", &b));
        assert_ne!(identity(b"fs", &a), identity(b"sf", &a));
    }

    #[test]
    fn the_identity_of_a_directory_does_not_change_by_opening_it_again() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: needs CAP_DAC_READ_SEARCH");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let one = Backing::open(dir.path()).unwrap();
        let two = Backing::open(dir.path()).unwrap();
        assert_eq!(one.identity, two.identity);
        let other = tempfile::tempdir().unwrap();
        assert_ne!(Backing::open(other.path()).unwrap().identity, one.identity);
    }
}
