// SPDX-License-Identifier: GPL-2.0
//! Where files live that have no name any more but are still in use.
//!
//! A file without a name cannot be opened by handle once its last descriptor is closed, and the
//! death of the server closes all of them. So the last name of a file that the kernel still knows
//! is not removed but moved to a hidden directory in the backing, under the file's nodeid (never
//! used twice, so the names never clash). FORGET removes it, or the end of a recovery in which the
//! kernel did not ask for it. Attributes show the link count without the hidden name.

use std::collections::HashSet;
use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use anyhow::{bail, Context};
use nix::errno::Errno;

use super::dents::{self, Entry};
use super::sys::{self, Res};

/// Reserved in the root of the backing: not shown, not found, not to be created.
pub const NAME: &CStr = c".fuse-restart-graveyard";

pub struct Graveyard {
    /// `None` on a backing that cannot be written: nothing can lose its name there either.
    dir: Option<OwnedFd>,
    inside: Mutex<HashSet<u64>>,
}

impl Graveyard {
    /// For who removes nothing.
    pub fn none() -> Graveyard {
        Graveyard {
            dir: None,
            inside: Mutex::default(),
        }
    }

    /// Opens the hidden directory below `root`, making it if need be, and takes stock of it. Two servers with one
    /// graveyard would remove each other's files, so there is one at a time.
    pub fn open(root: BorrowedFd<'_>) -> anyhow::Result<Graveyard> {
        let shown = NAME.to_string_lossy();
        let dir = loop {
            match sys::mkdir_at(root, NAME, 0o700) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(Errno::EROFS) => return Ok(Graveyard::none()),
                Err(e) => bail!("cannot make {shown} in the backing directory: {}", e.desc()),
            }
            let flags = libc::O_RDONLY | libc::O_DIRECTORY;
            let dir = match sys::open_at(root, NAME, flags, 0) {
                Err(Errno::ENOENT) => continue, // removed just now, see below
                dir => dir.with_context(|| {
                    format!(
                        "{shown} in the backing directory is reserved for removed files but cannot be opened as a \
                         directory: move it away"
                    )
                })?,
            };
            lock(dir.as_fd())?;
            // A server that ends removes it and lets go of it then: what was locked may be that one.
            if is_at(dir.as_fd(), root, NAME) {
                break dir;
            }
        };
        let mut inside = HashSet::new();
        for entry in dents::read_all(dir.as_fd()).context("cannot read the graveyard")? {
            match parse(&entry.name) {
                Some(nodeid) => {
                    inside.insert(nodeid);
                }
                None if entry.is_dot() => {}
                None => tracing::warn!(
                    "{shown} holds {:?}, which this server did not put there; leaving it alone",
                    OsStr::new(entry.name())
                ),
            }
        }
        Ok(Graveyard {
            dir: Some(dir),
            inside: Mutex::new(inside),
        })
    }

    /// Whether `name` in the directory `nodeid` is the hidden one.
    pub fn is_reserved(nodeid: u64, name: &[u8]) -> bool {
        nodeid == super::nodes::ROOT && name == NAME.to_bytes()
    }

    pub fn exists(&self) -> bool {
        self.dir.is_some()
    }

    pub fn contains(&self, nodeid: u64) -> bool {
        self.inside
            .lock()
            .expect("no holder panics")
            .contains(&nodeid)
    }

    pub fn all(&self) -> Vec<u64> {
        self.inside
            .lock()
            .expect("no holder panics")
            .iter()
            .copied()
            .collect()
    }

    fn dir(&self) -> Res<BorrowedFd<'_>> {
        self.open_dir().ok_or(Errno::EROFS)
    }

    /// The hidden directory; `None` on a backing that cannot be written.
    pub fn open_dir(&self) -> Option<BorrowedFd<'_>> {
        self.dir.as_ref().map(AsFd::as_fd)
    }

    /// Takes the last name of a file away, in one step; `flags`: 0, or `RENAME_WHITEOUT` for what is to be in its
    /// place.
    pub fn bury(&self, nodeid: u64, parent: BorrowedFd<'_>, name: &CStr, flags: u32) -> Res<()> {
        sys::rename_at(
            parent,
            name,
            self.dir()?,
            &grave(nodeid),
            libc::RENAME_NOREPLACE | flags,
        )?;
        self.note(nodeid);
        Ok(())
    }

    /// Gives a directory its name back that was not empty after all; a whiteout goes that is in its place, and nothing else.
    pub fn exhume(&self, nodeid: u64, parent: BorrowedFd<'_>, name: &CStr) -> Res<()> {
        let (yard, grave) = (self.dir()?, grave(nodeid));
        match sys::rename_at(yard, &grave, parent, name, libc::RENAME_NOREPLACE) {
            Err(Errno::EEXIST) if is_whiteout(parent, name)? => {
                sys::rename_at(yard, &grave, parent, name, libc::RENAME_EXCHANGE)?;
                sys::unlink_at(yard, &grave)?;
            }
            other => other?,
        }
        self.inside
            .lock()
            .expect("no holder panics")
            .remove(&nodeid);
        Ok(())
    }

    /// A second name for a file whose last one is about to be overwritten by a rename.
    ///
    /// Not noted before [`Graveyard::note`]: until the rename is done, the link count is right.
    pub fn prepare(&self, nodeid: u64, file: BorrowedFd<'_>) -> Res<()> {
        match sys::link_fd(file, self.dir()?, &grave(nodeid)) {
            Err(Errno::EEXIST) => Ok(()), // left by a crash between this and the rename
            other => other,
        }
    }

    /// Takes [`Graveyard::prepare`] back.
    pub fn unprepare(&self, nodeid: u64) {
        if let Ok(dir) = self.dir() {
            if let Err(e) = sys::unlink_at(dir, &grave(nodeid)) {
                tracing::warn!(
                    "cannot remove the spare name of node {nodeid}: {}",
                    e.desc()
                );
            }
        }
    }

    pub fn note(&self, nodeid: u64) {
        self.inside.lock().expect("no holder panics").insert(nodeid);
    }

    /// Nobody uses the file any more.
    pub fn release(&self, nodeid: u64) {
        if !self
            .inside
            .lock()
            .expect("no holder panics")
            .remove(&nodeid)
        {
            return;
        }
        let Ok(dir) = self.dir() else { return };
        let name = grave(nodeid);
        let gone = match sys::unlink_at(dir, &name) {
            Err(Errno::EISDIR) => sys::rmdir_at(dir, &name),
            other => other,
        };
        match gone {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(e) => tracing::warn!("cannot remove the removed node {nodeid}: {}", e.desc()),
        }
    }

    /// Opens what lies in the grave of `nodeid`.
    pub fn open_grave(&self, nodeid: u64) -> Res<OwnedFd> {
        sys::open_at(self.dir()?, &grave(nodeid), libc::O_PATH, 0)
    }

    /// After an unmount: nothing is in use any more, and no trace stays in the backing.
    pub fn clear(&self, root: BorrowedFd<'_>) {
        for nodeid in self.all() {
            self.release(nodeid);
        }
        if self.exists() {
            match sys::rmdir_at(root, NAME) {
                Ok(()) | Err(Errno::ENOTEMPTY | Errno::ENOENT) => {}
                Err(e) => tracing::warn!("cannot remove the graveyard: {}", e.desc()),
            }
        }
    }
}

/// It goes with the descriptor.
fn lock(dir: BorrowedFd<'_>) -> anyhow::Result<()> {
    // SAFETY: no memory is involved.
    let locked = unsafe { libc::flock(dir.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    match Errno::result(locked) {
        Err(Errno::EWOULDBLOCK) => bail!(
            "another server serves this backing directory: end it first, or serve another one"
        ),
        _ => Ok(()),
    }
}

/// Whether this directory is what has the name.
fn is_at(dir: BorrowedFd<'_>, parent: BorrowedFd<'_>, name: &CStr) -> bool {
    let file = |st: libc::stat| (st.st_dev, st.st_ino);
    let (own, there) = (
        sys::fstat(dir).map(file),
        sys::lstat_at(parent, name).map(file),
    );
    own.is_ok() && own == there
}

fn is_whiteout(parent: BorrowedFd<'_>, name: &CStr) -> Res<bool> {
    let st = sys::lstat_at(parent, name)?;
    Ok(st.st_mode & libc::S_IFMT == libc::S_IFCHR && st.st_rdev == 0)
}

fn grave(nodeid: u64) -> CString {
    CString::new(format!("n{nodeid:016x}")).expect("digits have no NUL")
}

fn parse(name: &CStr) -> Option<u64> {
    let digits = name.to_str().ok()?.strip_prefix('n')?;
    let lower = digits
        .bytes()
        .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    (digits.len() == 16 && lower).then(|| u64::from_str_radix(digits, 16).ok())?
}

/// Whether a directory holds nothing but itself and its parent.
pub fn is_empty(dir: BorrowedFd<'_>) -> Res<bool> {
    Ok(dents::read_all(dir)?.iter().all(Entry::is_dot))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grave_is_named_by_its_node_and_by_nothing_else() {
        for nodeid in [0, 2, 0xdead_beef, u64::MAX] {
            assert_eq!(parse(&grave(nodeid)), Some(nodeid));
        }
        for name in [
            c"n1",
            c"m0000000000000002",
            c"n000000000000000g",
            c"n00000000000000022",
            c"n+00000000000002",
            c"nABCDEFABCDEFABCD",
            c"",
        ] {
            assert_eq!(parse(name), None, "{name:?}");
        }
    }

    #[test]
    fn the_name_is_reserved_in_the_root_only() {
        assert!(Graveyard::is_reserved(1, NAME.to_bytes()));
        assert!(!Graveyard::is_reserved(2, NAME.to_bytes()));
        assert!(!Graveyard::is_reserved(1, b".fuse-restart"));
    }

    #[test]
    fn what_is_buried_is_found_again_and_released() {
        let tmp = tempfile::tempdir().unwrap();
        let root: OwnedFd = std::fs::File::open(tmp.path()).unwrap().into();
        let yard = Graveyard::open(root.as_fd()).unwrap();
        std::fs::write(tmp.path().join("file"), b"x").unwrap();
        std::fs::create_dir(tmp.path().join("dir")).unwrap();
        yard.bury(7, root.as_fd(), c"file", 0).unwrap();
        yard.bury(8, root.as_fd(), c"dir", 0).unwrap();
        assert!(!tmp.path().join("file").exists());

        drop(yard);
        let again = Graveyard::open(root.as_fd()).unwrap();
        assert!(again.contains(7) && again.contains(8) && !again.contains(9));
        again.release(7);
        again.release(8);
        drop(again);
        let again = Graveyard::open(root.as_fd()).unwrap();
        assert!(again.all().is_empty());

        again.clear(root.as_fd());
        assert_eq!(
            std::fs::read_dir(tmp.path()).unwrap().count(),
            0,
            "no trace"
        );
    }

    #[test]
    fn a_directory_goes_back_to_its_name_if_that_is_free_or_a_whiteout() {
        let tmp = tempfile::tempdir().unwrap();
        let root: OwnedFd = std::fs::File::open(tmp.path()).unwrap().into();
        let yard = Graveyard::open(root.as_fd()).unwrap();
        let dir = tmp.path().join("dir");
        let there = || std::fs::read_to_string(dir.join("inner")).ok();
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("inner"), b"x").unwrap();
        yard.bury(8, root.as_fd(), c"dir", 0).unwrap();
        yard.exhume(8, root.as_fd(), c"dir").unwrap();
        assert_eq!(there().as_deref(), Some("x"));
        if nix::unistd::geteuid().is_root() {
            yard.bury(8, root.as_fd(), c"dir", libc::RENAME_WHITEOUT)
                .unwrap();
            yard.exhume(8, root.as_fd(), c"dir").unwrap();
            assert_eq!(there().as_deref(), Some("x"));
            assert!(dents::read_all(yard.open_dir().unwrap())
                .unwrap()
                .iter()
                .all(Entry::is_dot));
        }
        // Somebody's file is not ours to remove.
        yard.bury(8, root.as_fd(), c"dir", 0).unwrap();
        std::fs::write(&dir, b"somebody's").unwrap();
        assert_eq!(yard.exhume(8, root.as_fd(), c"dir"), Err(Errno::EEXIST));
        assert_eq!(std::fs::read(&dir).unwrap(), b"somebody's");
        assert!(yard.contains(8));
    }

    #[test]
    fn a_graveyard_is_locked_and_is_the_one_that_has_the_name() {
        let tmp = tempfile::tempdir().unwrap();
        let root: OwnedFd = std::fs::File::open(tmp.path()).unwrap().into();
        let yard = Graveyard::open(root.as_fd()).unwrap();
        let refused = Graveyard::open(root.as_fd()).err().expect("locked");
        assert!(
            format!("{refused:#}").contains("another server"),
            "{refused:#}"
        );
        let own = yard.open_dir().unwrap();
        assert!(is_at(own, root.as_fd(), NAME));
        // It goes in the end, and the next one has its own.
        yard.clear(root.as_fd());
        assert!(!is_at(own, root.as_fd(), NAME));
        let next = Graveyard::open(root.as_fd()).unwrap();
        assert!(is_at(next.open_dir().unwrap(), root.as_fd(), NAME));
        assert!(!is_at(own, root.as_fd(), NAME));
    }

    #[test]
    fn a_file_in_the_place_of_the_graveyard_is_an_error() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::write(tmp.path().join(NAME.to_str().unwrap()), b"").unwrap();
        let root: OwnedFd = std::fs::File::open(tmp.path()).unwrap().into();
        let error = Graveyard::open(root.as_fd()).err().expect("refused");
        assert!(format!("{error:#}").contains("move it away"), "{error:#}");
    }
}
